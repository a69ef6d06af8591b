"""The product with the curvature of the inner problem, linearised once for all products of a solve."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_imaml._compile import door as compilation
from lightning_imaml.components.base import Component
from lightning_imaml.components.checks import require
from lightning_imaml.problems.supervised import InnerProblem


class Linearization(NamedTuple):
    """The inner objective G around one point.

    Attributes:
        value: G, ``[T]``.
        gradient: ∇G, ``[T, D]``.
        product: v ↦ (curvature of G) v, both ``[T, D]``; holds the graph of one forward pass and of what else it
            differentiates again, which is freed with it.
    """

    value: Tensor
    gradient: Tensor
    product: Callable[[Tensor], Tensor]


class Curvature(Component, ABC):
    """Which second derivative of the support loss the implicit system and the Hessian-free solver use.

    ``damping`` adds that multiple of the identity to the matrix, for every solver that multiplies with it.
    """

    damping: float = 0.0

    def linearize(self, problem: InnerProblem, parameters: Tensor) -> Linearization:
        """Linearise G around ``parameters``, ``[T, D]``."""
        value, gradient, product = compilation.run_linear(self.expand, problem, parameters)
        if not self.damping:
            return Linearization(value, gradient, product)
        return Linearization(value, gradient, lambda vector: torch.add(product(vector), vector, alpha=self.damping))

    @abstractmethod
    def expand(self, problem: InnerProblem, parameters: Tensor) -> Linearization:
        """What :meth:`linearize` compiles where the user asked for it: value, gradient and product, without damping."""

    def __post_init__(self) -> None:
        require(self.damping >= 0, self, "damping", "zero or positive", self.damping, "Use 0 for no damping.")


def linearization_of(
    problem: InnerProblem, parameters: Tensor, losses: Tensor, gradient: Tensor, product: Callable[[Tensor], Tensor]
) -> Linearization:
    """That of G, where value and gradient are those of L alone."""
    at = (parameters, problem.initial, problem.strengths)
    with torch.no_grad():
        value, slope = problem.regularizer.penalty(*at), problem.regularizer.gradient(*at)
    return Linearization(losses.detach() + value, gradient.detach() + slope, product)


def regularizer_product(problem: InnerProblem, parameters: Tensor, vector: Tensor) -> Tensor:
    """∇²R times ``vector``, ``[T, D]``."""
    with torch.no_grad():
        return problem.regularizer.product(vector, parameters, problem.initial, problem.strengths)
