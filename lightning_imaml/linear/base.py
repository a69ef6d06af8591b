"""The interface of linear solvers, and what it returns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_imaml.components.base import Component
from lightning_imaml.linear.operator import LinearOperator, MatVec


class LinearSolution(NamedTuple):
    """The outcome of solving A_i x_i = b_i for T tasks.

    Attributes:
        value: x, ``[T, D]``.
        steps: products with A that each task used, ``[T]``.
        residual: ‖b − A x‖ / ‖b‖, ``[T]``; 0 where b = 0, NaN where a product was not finite.
        converged: whether the residual is within the solver's tolerance, ``[T]``; almost never with a
            tolerance of 0.
        indefinite: whether the solver met a direction p with pᵀAp ≤ 0, ``[T]``.
    """

    value: Tensor
    steps: Tensor
    residual: Tensor
    converged: Tensor
    indefinite: Tensor


class LinearSolver(Component, ABC):
    """Solves T linear systems at once; it sees an operator, never a model."""

    @abstractmethod
    def solve(self, matvec: MatVec | LinearOperator, rhs: Tensor) -> LinearSolution:
        """Solve A x = b for every task.

        Args:
            matvec: A as an operator; or a bare function v ↦ A v, ``[T, D]`` to ``[T, D]``, of a symmetric A.
            rhs: b, ``[T, D]``.

        Raises:
            ValueError: the solver cannot solve such an operator; the message names one that can.
        """


def random_signs(rhs: Tensor, count: int) -> Iterator[Tensor]:
    """Give ``count`` vectors of random signs, ``[T, D]``, the same for every task and in every solve."""
    # A generator with its own seed, on the CPU, gives the same signs on every device and leaves the user's alone.
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        signs = torch.randint(0, 2, rhs.shape[1:], generator=generator).to(rhs) * 2 - 1
        yield signs.expand_as(rhs).contiguous()
