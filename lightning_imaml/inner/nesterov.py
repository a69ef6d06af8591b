"""Accelerated gradient descent on the inner problem."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_imaml.inner.base import State, StepSizes
from lightning_imaml.parameters.positive import Bounds, Granularity, Value
from lightning_imaml.problems.base import InnerProblem


@dataclass(frozen=True, eq=False)
class Nesterov(StepSizes):
    r"""Nesterov's accelerated gradient descent with adaptive restart, per task.

    .. math:: x_{k+1} = y_k - \text{lr} ∇G(y_k), \quad t_{k+1} = \tfrac{1 + \sqrt{1 + 4 t_k^2}}{2}, \quad
              y_{k+1} = x_{k+1} + \tfrac{t_k - 1}{t_{k+1}} (x_{k+1} - x_k)

    A task whose momentum points uphill, ∇G(y_k)ᵀ(x_{k+1} − x_k) > 0, resets its momentum
    (`O'Donoghue and Candès, 2015 <https://doi.org/10.1007/s10208-013-9150-3>`_). That gives the rate of strong
    convexity, about √κ log(1/δ) steps for lr = 1/L, without knowing μ. The solution is the last y, at which the
    gradient is measured.

    Args:
        lr: the step size, or one for each pattern over parameter names; the first pattern that matches counts. The
            method converges where lr ≤ 1/L for an L-smooth G.
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
    positions: ClassVar[int] = 2

    def init(self, problem: InnerProblem, parameters: Tensor) -> State:
        """The state is (y, x, t)."""
        # Clone: Inductor would compile a separate version for one tensor that is given twice.
        return parameters, parameters.clone(), torch.ones_like(parameters[:, :1])

    def step(self, problem: InnerProblem, state: State) -> tuple[State, Tensor]:
        """One accelerated step for all tasks."""
        following, gradient = problem.run(self._accelerate, *state)
        return following, gradient

    def _accelerate(self, problem: InnerProblem, y: Tensor, x: Tensor, t: Tensor) -> tuple[State, Tensor]:
        gradient = problem.residual(y)
        following = self.descend(problem, y, gradient)
        move = following - x
        uphill = torch.linalg.vecdot(gradient.detach(), move.detach()).unsqueeze(1) > 0
        t = torch.where(uphill, 1.0, t)
        next_t = (1 + (1 + 4 * t.square()).sqrt()) / 2
        momentum = (t - 1) / next_t
        return (torch.addcmul(following, momentum, move), following, next_t), gradient
