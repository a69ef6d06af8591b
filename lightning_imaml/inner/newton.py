"""Newton's method on the inner problem."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lightning_imaml.curvature import Curvature, Hessian
from lightning_imaml.inner.base import State, SteppingSolver
from lightning_imaml.linear import GMRES, LinearSolver
from lightning_imaml.problems.base import InnerProblem


@dataclass(frozen=True)
class Newton(SteppingSolver):
    """φ ← φ − (∂F)⁻¹ F, with the linear system solved by products.

    It converges quadratically near a regular solution, and may diverge far from one: there is no line search, which
    :class:`HessianFree` has for minimisation.

    Args:
        linear_solver: solves for the step.
        steps: the most steps a task takes.
        tol: a task stops when ‖F‖ ≤ tol.
        curvature: for a supervised problem, the matrix in the place of ∂F.
        check_every: after how many steps the host looks whether all tasks are done, for which it waits for the device;
            with ``tol=0`` never. The results do not depend on it.

    Raises:
        ValueError: ``steps`` or ``check_every`` is below 1, or ``tol`` is negative; in use, an estimator asks to
            differentiate the steps.
    """

    linear_solver: LinearSolver = GMRES(20)  # noqa: RUF009 - frozen, so that sharing it is safe
    steps: int = 10
    tol: float = 0.0
    curvature: Curvature = Hessian()  # noqa: RUF009
    check_every: int = 1
    differentiable: ClassVar[bool] = False

    def init(self, problem: InnerProblem, parameters: Tensor) -> State:
        """The state is the parameters alone."""
        return (parameters,)

    def step(self, problem: InnerProblem, state: State) -> tuple[State, Tensor]:
        """One Newton step for all tasks."""
        (parameters,) = state
        around = problem.linearize(parameters, self.curvature)
        return (parameters - self.linear_solver.solve(around.product, around.gradient).value,), around.gradient
