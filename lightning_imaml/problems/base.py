"""The inner problem as an interface: what inner solvers solve and implicit gradients differentiate.

For each of T tasks an inner problem defines a solution φ by a condition F(φ, η) = 0, where η are all meta-parameters:
the initialisation θ, the learned strengths λ of a regulariser, and what all tasks share, ω. With the linear system
(∂_φ F)ᵀ u = ∂_φ Q, the gradient of an outer loss Q at the solution is

    dQ/dη = ∂_η Q − (∂_η F)ᵀ u

so that :meth:`InnerProblem.linearize` and :meth:`InnerProblem.pull_back` are all that it takes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.linalg import vector_norm
from typing_extensions import Self

from lightning_imaml.linear.operator import LinearOperator
from lightning_imaml.parameters.rows import Rows


class Linearization(NamedTuple):
    """The inner objective G around one point.

    Attributes:
        value: G, ``[T]``.
        gradient: F = ∇G, ``[T, D]``.
        product: v ↦ (curvature of G) v, both ``[T, D]``; holds the graph of one forward pass and of what else it
            differentiates again, which is freed with it.
    """

    value: Tensor
    gradient: Tensor
    product: LinearOperator


class SupportsLinearize(Protocol):
    """The curvature that stands for ∂_φ F, see :class:`~lightning_imaml.curvature.Curvature`."""

    def linearize(self, problem: Any, parameters: Tensor) -> Linearization:
        """The linearisation of a problem around ``parameters``, ``[T, D]``."""


class InnerProblem(ABC):
    """The inner problems of T tasks, each a condition F(φ, η) = 0 for a row φ of D numbers.

    Attributes:
        rates: the inner solver's learned step sizes.
    """

    rates: Mapping[str, Tensor]

    @property
    @abstractmethod
    def tasks(self) -> int:
        """The number of tasks T."""

    @property
    @abstractmethod
    def rows(self) -> Rows:
        """Which parameters a row holds."""

    @abstractmethod
    def start(self) -> Tensor:
        """The first iterate of every task: ``[T, D]``."""

    def run(self, function: Callable[..., Any], *arguments: Tensor) -> Any:
        """``function(problem, *arguments)``, which a problem that can be compiled runs as compiled code."""
        return function(self, *arguments)

    @abstractmethod
    def residual(self, parameters: Tensor) -> Tensor:
        """F at rows of parameters: ``[T, D]``; differentiable where gradients are enabled and the rows require them."""

    @abstractmethod
    def linearize(self, parameters: Tensor, curvature: SupportsLinearize) -> Linearization:
        """F around rows of parameters ``[T, D]``; the product is an operator that stands for ∂_φ F."""

    @abstractmethod
    def pull_back(self, parameters: Tensor, u: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """−Σ_i (∂_η F_i)ᵀ u_i for every meta-parameter η.

        Args:
            parameters: the solutions φ, ``[T, D]``.
            u: ``[T, D]``.

        Returns:
            That of θ, ``[D]``, and those of :meth:`meta_parameters` that F depends on, by name.
        """

    @abstractmethod
    def meta_parameters(self) -> dict[str, Tensor]:
        """All meta-parameters besides θ, under their names in :attr:`MetaGradient.grads`: ω, λ and step sizes."""

    @abstractmethod
    def with_meta_parameters(self, initial: Tensor, values: Mapping[str, Tensor]) -> Self:
        """The same problem with another θ, ``[D]``, and other values of :meth:`meta_parameters`."""

    def residual_norm(self, parameters: Tensor) -> Tensor:
        """‖F‖, how far rows of parameters are from a solution: ``[T]``, without a graph."""
        with torch.no_grad():
            norm: Tensor = vector_norm(self.residual(parameters), dim=1)
        return norm


class Minimization(InnerProblem):
    """An inner problem that minimises G_i(φ_i): F = ∇G."""

    @abstractmethod
    def value(self, parameters: Tensor) -> Tensor:
        """G: ``[T]``."""

    @abstractmethod
    def gradient(self, parameters: Tensor) -> Tensor:
        """∇G: ``[T, D]``, differentiable again where gradients are enabled and the parameters require them."""

    def residual(self, parameters: Tensor) -> Tensor:
        """∇G: ``[T, D]``."""
        return self.gradient(parameters)
