"""The interface of curvatures: linearise the inner problem once for all products of a solve."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from lightning_imaml import _compile
from lightning_imaml.components.base import Component
from lightning_imaml.components.checks import require
from lightning_imaml.linear.operator import LinearOperator, MatVec
from lightning_imaml.problems.base import Linearization
from lightning_imaml.problems.supervised import SupervisedProblem

Expansion = tuple[Tensor, Tensor, MatVec]
"""G ``[T]``, ∇G ``[T, D]``, and the map v ↦ (curvature of G) v, both ``[T, D]``, at one point."""


class Curvature(Component, ABC):
    """The second derivative of the support loss that the implicit system and the Hessian-free solver use.

    ``damping`` times the identity is added to the matrix, for every solver.
    """

    damping: float = 0.0

    def linearize(self, problem: SupervisedProblem, parameters: Tensor) -> Linearization:
        """Linearise G around ``parameters``, ``[T, D]``."""
        value, gradient, product = _compile.run_linear(self.expand, problem, parameters)

        def damped(vector: Tensor) -> Tensor:
            return torch.add(product(vector), vector, alpha=self.damping)

        return Linearization(value, gradient, LinearOperator(damped if self.damping else product))

    @abstractmethod
    def expand(self, problem: SupervisedProblem, parameters: Tensor) -> Expansion:
        """Expand G around ``parameters``, ``[T, D]``, without damping; :meth:`linearize` may compile this.

        Returns:
            G ``[T]``, ∇G ``[T, D]``, and the map v ↦ (curvature of G) v, both ``[T, D]``.
        """

    def __post_init__(self) -> None:
        require(self.damping >= 0, self, "damping", "zero or positive", self.damping, "Use 0 for no damping.")


def expansion_of(
    problem: SupervisedProblem, parameters: Tensor, losses: Tensor, gradient: Tensor, product: MatVec
) -> Expansion:
    """The expansion of G = L + R, from the value and gradient of L and the product with the curvature of G."""
    at = (parameters, problem.initial, problem.strengths)
    with torch.no_grad():
        value, slope = problem.regularizer.penalty(*at), problem.regularizer.gradient(*at)
    return (losses.detach() + value, gradient.detach() + slope, product)


def regularizer_product(problem: SupervisedProblem, parameters: Tensor, vector: Tensor) -> Tensor:
    """∇²R times ``vector``, ``[T, D]``."""
    with torch.no_grad():
        return problem.regularizer.product(vector, parameters, problem.initial, problem.strengths)
