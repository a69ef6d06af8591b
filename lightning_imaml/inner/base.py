"""What every inner solver offers, and the loop that they share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_imaml.component import Component, require
from lightning_imaml.tasks import InnerProblem

State = tuple[Tensor, ...]
"""Tensors with a leading task dimension; the first is the parameters ``[T, D]``."""


class InnerSolution(NamedTuple):
    """The outcome of the inner loop for T tasks.

    Attributes:
        parameters: φ, ``[T, D]``.
        steps: the steps that each task took, ``[T]``.
    """

    parameters: Tensor
    steps: Tensor


class InnerSolver(Component, ABC):
    """Minimises G_i for all tasks at once, each until ‖∇G_i‖ ≤ ``tol`` or for ``steps`` steps.

    A subclass says how one step goes; stopping and differentiation belong to :meth:`solve`. Where G is μ-strongly
    convex, ‖∇G‖ ≤ tol bounds the distance to the solution by tol/μ.
    """

    steps: int
    tol: float

    def __post_init__(self) -> None:
        require(self.steps >= 1, self, "steps", "at least 1", self.steps, "The paper takes 16 for 5-way Omniglot.")
        require(self.tol >= 0, self, "tol", "zero or positive", self.tol, "Use 0 to take all steps.")

    @abstractmethod
    def init(self, problem: InnerProblem, parameters: Tensor) -> State:
        """The state before the first step, from parameters ``[T, D]``."""

    @abstractmethod
    def step(self, problem: InnerProblem, state: State) -> tuple[State, Tensor]:
        """One step.

        Returns:
            The next state, and ∇G ``[T, D]`` at the parameters that the step set out from.
        """

    def solve(self, problem: InnerProblem, parameters: Tensor, differentiable_steps: int = 0) -> InnerSolution:
        """Minimise G from ``parameters``.

        Args:
            problem: the tasks.
            parameters: the first iterate, ``[T, D]``.
            differentiable_steps: how many of the last steps keep their graph; memory grows with these alone.
        """
        with torch.no_grad():
            state = self.init(problem, parameters)
        taken = torch.zeros(parameters.shape[0], dtype=torch.long, device=parameters.device)
        active = torch.ones_like(taken, dtype=torch.bool)
        for k in range(self.steps):
            with torch.set_grad_enabled(k >= self.steps - differentiable_steps):
                following, gradient = self.step(problem, state)
                if self.tol > 0:
                    active = active & (gradient.detach().norm(dim=1) > self.tol)
                    if not active.any():
                        break
                    following = tuple(
                        torch.where(active.view(-1, *[1] * (new.ndim - 1)), new, old)
                        for new, old in zip(following, state, strict=True)
                    )
                state = following
                taken += active
        return InnerSolution(state[0], taken)
