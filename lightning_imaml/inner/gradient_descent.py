"""Gradient descent on the inner problem."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_imaml import compilation
from lightning_imaml.component import require
from lightning_imaml.inner.base import State, SteppingSolver
from lightning_imaml.tasks import InnerProblem


@dataclass(frozen=True)
class GradientDescent(SteppingSolver):
    r"""φ ← φ − lr ∇G(φ), with the regulariser in every step (`iMAML <https://arxiv.org/abs/1909.04630>`_, eq. 3).

    Converges where lr < 2/L for an L-smooth G; in about κ log(1/δ) steps to distance δ, κ = L/μ.

    Args:
        lr: the step size.
        steps: the most steps a task takes.
        tol: a task stops when ‖∇G‖ ≤ tol.
        check_every: after how many steps the host looks whether all tasks are done, for which it waits for the device;
            with ``tol=0`` never. The results do not depend on it.

    Raises:
        ValueError: ``lr`` is not positive, ``steps`` or ``check_every`` is below 1, or ``tol`` is negative.
    """

    lr: float
    steps: int
    tol: float = 0.0
    check_every: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.lr > 0, self, "lr", "positive", self.lr, "0.1 is a usual start.")

    def init(self, problem: InnerProblem, parameters: Tensor) -> State:
        """The state is the parameters alone."""
        return (parameters,)

    def step(self, problem: InnerProblem, state: State) -> tuple[State, Tensor]:
        """One gradient step for all tasks."""
        following, gradient = compilation.run(self._descend, problem, *state)
        return (following,), gradient

    def _descend(self, problem: InnerProblem, parameters: Tensor) -> tuple[Tensor, Tensor]:
        gradient = problem.gradient(parameters)
        return torch.add(parameters, gradient, alpha=-self.lr), gradient
