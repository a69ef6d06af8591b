"""What every linear solver offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_imaml.components.base import Component

MatVec = Callable[[Tensor], Tensor]
"""v ↦ A v for T symmetric systems at once, ``[T, D]`` to ``[T, D]``."""


@dataclass(frozen=True, eq=False)
class PreconditionedMatVec:
    """A matvec that comes with an approximation of A⁻¹, which a solver may precondition by.

    Attributes:
        product: v ↦ A v.
        inverse: v ↦ P v with P near A⁻¹, symmetric and positive definite, ``[T, D]`` to ``[T, D]``.
    """

    product: MatVec
    inverse: MatVec

    def __call__(self, vector: Tensor) -> Tensor:
        """A v."""
        return self.product(vector)


class LinearSolution(NamedTuple):
    """The outcome of solving A_i x_i = b_i for T tasks.

    Attributes:
        value: x, ``[T, D]``.
        steps: products with A that each task used, ``[T]``.
        residual: ‖b − A x‖ / ‖b‖, ``[T]``; 0 where b = 0, NaN where a product was not finite.
        converged: whether the residual is within the solver's tolerance, ``[T]``; with a tolerance of 0, hardly ever.
        indefinite: whether the solver met a direction p with pᵀAp ≤ 0, ``[T]``.
    """

    value: Tensor
    steps: Tensor
    residual: Tensor
    converged: Tensor
    indefinite: Tensor


class LinearSolver(Component, ABC):
    """Solves T symmetric linear systems at once; it sees products with A, never a model."""

    @abstractmethod
    def solve(self, matvec: MatVec, rhs: Tensor) -> LinearSolution:
        """Solve A x = b for every task.

        Args:
            matvec: v ↦ A v, ``[T, D]`` to ``[T, D]``, row by row.
            rhs: b, ``[T, D]``.
        """


def random_signs(rhs: Tensor, count: int) -> Iterator[Tensor]:
    """Vectors of random signs, the same for every task and in every solve: ``count`` of ``[T, D]``."""
    # Drawn on the CPU from a seed of its own: the same on every device, and the user's random state stays.
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        signs = torch.randint(0, 2, rhs.shape[1:], generator=generator).to(rhs) * 2 - 1
        yield signs.expand_as(rhs).contiguous()
