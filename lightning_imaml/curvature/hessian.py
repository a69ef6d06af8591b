"""The exact Hessian."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_imaml.curvature.base import Curvature, Expansion, expansion_of, regularizer_product
from lightning_imaml.problems.supervised import SupervisedProblem


@dataclass(frozen=True)
class Hessian(Curvature):
    """The exact Hessian ∇²L + ∇²R, by differentiating the gradient's graph (reverse over reverse).

    Away from a minimum of L the Hessian can be indefinite; conjugate gradient then stops early and reports it.

    Args:
        damping: this multiple of the identity is added to the matrix.

    Raises:
        ValueError: ``damping`` is negative.
    """

    damping: float = 0.0

    def expand(self, problem: SupervisedProblem, parameters: Tensor) -> Expansion:
        """Expand G around ``parameters``, see :meth:`Curvature.expand`."""
        with torch.enable_grad():
            point = parameters.detach().requires_grad_()
            losses = problem.support.value(point)
            (gradient,) = torch.autograd.grad(losses.sum(), point, create_graph=True)

        def product(vector: Tensor) -> Tensor:
            regular = regularizer_product(problem, parameters, vector)
            if not gradient.requires_grad:  # A loss that is linear in φ has no second derivative.
                return regular
            (loss_product,) = torch.autograd.grad(gradient, point, vector, retain_graph=True, materialize_grads=True)
            return loss_product + regular

        return expansion_of(problem, parameters, losses, gradient, product)
