"""Anderson acceleration of a fixed-point iteration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_imaml.components.checks import require
from lightning_imaml.inner.base import State, SteppingSolver
from lightning_imaml.problems.base import InnerProblem


@dataclass(frozen=True)
class Anderson(SteppingSolver):
    r"""Anderson acceleration (`Walker and Ni, 2011 <https://doi.org/10.1137/10078356X>`_) of φ ← φ − lr F(φ).

    .. math:: φ_{k+1} = \sum_i α_i (φ_i - lr\, F(φ_i)), \qquad α = \arg\min_{\sum α_i = 1} ‖\sum_i α_i F(φ_i)‖

    over the last ``memory`` iterates. On a linear F it is GMRES in other words. On a fixed point with lr = 1, memory 1
    is Picard's iteration.

    Args:
        memory: how many iterates to combine; each takes two rows ``[T, D]``.
        steps: the most steps a task takes.
        tol: a task stops when ‖F‖ ≤ tol.
        lr: the step size of the iteration that is accelerated.
        check_every: after how many steps the host looks whether all tasks are done, for which it waits for the device;
            with ``tol=0`` never. The results do not depend on it.

    Raises:
        ValueError: ``memory``, ``steps`` or ``check_every`` is below 1, ``tol`` is negative or ``lr`` is not positive;
            in use, an estimator asks to differentiate the steps.
    """

    memory: int = 5
    steps: int = 50
    tol: float = 0.0
    lr: float = 1.0
    check_every: int = 1
    differentiable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.memory >= 1, self, "memory", "at least 1", self.memory, "5 is a usual number.")
        require(self.lr > 0, self, "lr", "positive", self.lr, "1 is right for a fixed point.")

    def init(self, problem: InnerProblem, parameters: Tensor) -> State:
        """The state is φ, the last iterates and their F, ``[T, memory, D]`` each, and which of them there are."""
        history = parameters.new_zeros(len(parameters), self.memory, parameters.shape[1])
        return parameters, history, history.clone(), history[:, :, 0].clone()

    def step(self, problem: InnerProblem, state: State) -> tuple[State, Tensor]:
        """One accelerated step for all tasks."""
        parameters, points, residuals, known = state
        residual = problem.residual(parameters)
        points, residuals = _pushed(points, parameters), _pushed(residuals, residual)
        known = torch.cat([torch.ones_like(known[:, :1]), known[:, :-1]], dim=1)
        gram = residuals @ residuals.mT
        scale = gram.diagonal(dim1=1, dim2=2).amax(dim=1).clamp(min=torch.finfo(gram.dtype).tiny)
        # Slots without an iterate get a unit diagonal and no share. The ridge keeps iterates alike from cancelling.
        ridge = torch.finfo(gram.dtype).eps * known + (1 - known)
        gram = gram / scale.view(-1, 1, 1) + torch.diag_embed(ridge)
        shares = torch.linalg.solve_ex(gram, known.unsqueeze(2)).result.squeeze(2)
        shares = shares / shares.sum(dim=1, keepdim=True)
        following = (shares.unsqueeze(1) @ (points - self.lr * residuals)).squeeze(1)
        return (following, points, residuals, known), residual


def _pushed(history: Tensor, newest: Tensor) -> Tensor:
    """The newest first, the oldest out: ``[T, memory, D]``."""
    return torch.cat([newest.unsqueeze(1), history[:, :-1]], dim=1)
