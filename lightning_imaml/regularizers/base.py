"""What every regulariser of the inner problem offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_imaml.components.base import Component
from lightning_imaml.parameters.layout import Layout
from lightning_imaml.parameters.rows import Rows


class Regularizer(Component, ABC):
    """R(φ, θ, λ), which ties each task's parameters φ to the initialisation θ.

    A regulariser of your own needs :meth:`penalty` alone; the derivatives come from automatic differentiation. Override
    them where a closed form is cheaper. With learned strengths λ, override :meth:`init` too.
    """

    def init(self, model: Rows) -> dict[str, Tensor]:
        """The learned strengths λ at the start, by names without dots; empty where nothing is learned."""
        return {}

    def for_layout(self, layout: Layout) -> Regularizer:
        """The regulariser for rows of this layout; itself where the layout makes no difference.

        With ``compile=True``, the returned regulariser must be hashable.
        """
        return self

    @abstractmethod
    def penalty(self, parameters: Tensor, initial: Tensor, strengths: Mapping[str, Tensor]) -> Tensor:
        """R for every task.

        Args:
            parameters: φ, ``[T, D]``.
            initial: θ, ``[D]``.
            strengths: λ, by the names of :meth:`init`.

        Returns:
            ``[T]``.
        """

    def gradient(self, parameters: Tensor, initial: Tensor, strengths: Mapping[str, Tensor]) -> Tensor:
        """∇_φ R: ``[T, D]``, differentiable in φ, θ and λ where gradients are enabled."""
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            point = parameters if parameters.requires_grad else parameters.detach().requires_grad_()
            penalty = self.penalty(point, initial, strengths).sum()
            (gradient,) = torch.autograd.grad(penalty, point, create_graph=create_graph, materialize_grads=True)
        return gradient

    def product(self, vector: Tensor, parameters: Tensor, initial: Tensor, strengths: Mapping[str, Tensor]) -> Tensor:
        """∇²_φφ R times ``vector``, all ``[T, D]``."""
        with torch.enable_grad():
            point = parameters.detach().requires_grad_()
            gradient = self.gradient(point, initial, strengths)
            if not gradient.requires_grad:
                return torch.zeros_like(vector)
            (product,) = torch.autograd.grad(gradient, point, vector, materialize_grads=True)
        return product
