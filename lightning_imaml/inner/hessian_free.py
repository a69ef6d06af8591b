"""The Hessian-free inner solver of the paper."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_imaml.components.checks import require
from lightning_imaml.components.stopping import all_done
from lightning_imaml.curvature import Curvature, Hessian
from lightning_imaml.inner.base import State, SteppingSolver
from lightning_imaml.linear.conjugate_gradient import ConjugateGradient
from lightning_imaml.problems.base import InnerProblem, Minimization

_SUFFICIENT = 1e-4
_HALVINGS = 12


@dataclass(frozen=True)
class HessianFree(SteppingSolver):
    """Truncated Newton (`iMAML <https://arxiv.org/abs/1909.04630>`_, section 4; Martens, 2010).

    Every step linearises G once. A few conjugate gradient iterations on (∇²G) d = −∇G give the direction, and a
    backtracking line search on G gives its length (Armijo's condition with constant 1e-4, at most 12 halvings; a task
    that finds no decrease stays where it is). Conjugate gradient stops at negative curvature with a direction of
    descent; a task that meets negative curvature at once takes −∇G.

    Args:
        steps: the most steps a task takes.
        cg_steps: conjugate gradient iterations a step; the paper takes 5. On Omniglot, 2 reach the same ‖∇G‖ with fewer
            evaluations, see ``docs/experiments``.
        tol: a task stops when ‖∇G‖ ≤ tol. The line search compares rounded values of G, so it may not reach tolerances
            below about the square root of the dtype's precision.
        curvature: the exact Hessian, or Gauss-Newton, which has no negative curvature.
        check_every: after how many steps the host looks whether all tasks are done. It waits for the device when it
            looks, and never looks with ``tol=0``. The line search looks after every ``check_every`` tries, whatever
            ``tol`` is; from 12 on it never looks, and a step costs 12 forward passes. The results do not depend on it.

    Raises:
        ValueError: ``steps``, ``cg_steps`` or ``check_every`` is below 1, or ``tol`` is negative.
    """

    steps: int
    cg_steps: int = 5
    tol: float = 0.0
    curvature: Curvature = Hessian()  # noqa: RUF009 - frozen, so that sharing it is safe
    check_every: int = 1
    differentiable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.cg_steps >= 1, self, "cg_steps", "at least 1", self.cg_steps, "The paper takes 5.")

    def init(self, problem: InnerProblem, parameters: Tensor) -> State:
        """The state is the parameters alone."""
        if not isinstance(problem, Minimization):
            raise TypeError(
                f"HessianFree: the inner problem must minimise a value, which its line search compares; found "
                f"{type(problem).__name__}. Use Newton or Anderson for a condition F = 0."
            )
        return (parameters,)

    def step(self, problem: InnerProblem, state: State) -> tuple[State, Tensor]:
        """One truncated Newton step for all tasks."""
        assert isinstance(problem, Minimization)
        (parameters,) = state
        linearization = problem.linearize(parameters, self.curvature)
        # Take G from here and not from the last line search, where a lucky draw of dropout would stop a task for good.
        start, gradient = linearization.value, linearization.gradient
        newton = ConjugateGradient(self.cg_steps).solve(linearization.product, -gradient).value
        del linearization  # Its graph is not needed for the line search.
        direction = torch.where((newton == 0).all(dim=1, keepdim=True), -gradient, newton)
        slope = torch.linalg.vecdot(gradient, direction)
        length = torch.ones_like(start)
        found = torch.zeros_like(start, dtype=torch.bool)
        for tries in range(1, _HALVINGS + 1):
            reached = problem.value(torch.addcmul(parameters, length.unsqueeze(1), direction))
            found |= reached <= start + _SUFFICIENT * length * slope
            if tries < _HALVINGS and all_done(~found, tries, self.check_every):
                break
            length = torch.where(found, length, length / 2)
        length = torch.where(found, length, 0)
        return (torch.addcmul(parameters, length.unsqueeze(1), direction),), gradient
