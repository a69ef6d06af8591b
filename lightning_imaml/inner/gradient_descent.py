"""Gradient descent on the inner problem."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lightning_imaml.inner.base import State, StepSizes
from lightning_imaml.parameters.positive import Bounds, Granularity, Value
from lightning_imaml.problems.base import InnerProblem


@dataclass(frozen=True, eq=False)
class GradientDescent(StepSizes):
    r"""φ ← φ − lr ∇G(φ), with the regulariser in every step (`iMAML <https://arxiv.org/abs/1909.04630>`_, eq. 3).

    It converges where lr < 2/L for an L-smooth G, and reaches distance δ in about κ log(1/δ) steps, κ = L/μ.

    Args:
        lr: the step size, or one for each pattern over parameter names; the first pattern that matches counts.
        steps: the most steps a task takes.
        tol: a task stops when ‖∇G‖ ≤ tol.
        check_every: after how many steps the host looks whether all tasks are done. It waits for the device when it
            looks, and never looks with ``tol=0``. The results do not depend on it.
        learned: learn the step sizes by their logarithm ``log_lr``, with ``Unrolled`` or ``Truncated``.
        per: "layer" learns a step size for each layer; "parameter" learns one for each entry of the parameters, like
            `Meta-SGD <https://arxiv.org/abs/1707.09835>`_; None learns one for each pattern of ``lr``.
        bounds: the lowest and the highest learned step size, see :class:`~lightning_imaml.regularizers.Proximal`.

    Raises:
        ValueError: ``lr`` is not positive or lies outside the bounds, ``per`` or ``bounds`` stands without ``learned``,
            ``steps`` or ``check_every`` is below 1, or ``tol`` is negative; in use, a pattern matches no parameter, or
            a parameter matches no pattern.
    """

    lr: Value
    steps: int
    tol: float = 0.0
    check_every: int = 1
    learned: bool = False
    per: Granularity | None = None
    bounds: Bounds | None = None

    def init(self, problem: InnerProblem, parameters: Tensor) -> State:
        """The state is the parameters alone."""
        return (parameters,)

    def step(self, problem: InnerProblem, state: State) -> tuple[State, Tensor]:
        """One gradient step for all tasks."""
        (parameters,) = state
        gradient = problem.residual(parameters)  # The residual at the end runs the same compiled code.
        return (self.descend(problem, parameters, gradient),), gradient
