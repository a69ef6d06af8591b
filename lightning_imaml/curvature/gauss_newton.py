"""The generalised Gauss-Newton matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_imaml.curvature.base import Curvature, Expansion, expansion_of, regularizer_product
from lightning_imaml.curvature.forward_mode import has_forward_mode, push_by_reverse, push_forward
from lightning_imaml.problems.supervised import SupervisedProblem


@dataclass(frozen=True)
class GaussNewton(Curvature):
    """The generalised Gauss-Newton matrix Jᵀ H_out J + ∇²R.

    J is the Jacobian of the network's outputs and H_out the Hessian of the loss in the outputs
    (`Schraudolph, 2002 <https://doi.org/10.1162/08997660260028683>`_). Where the loss is convex in the outputs
    (cross-entropy, squared error), Jᵀ H_out J is positive semi-definite everywhere; it equals ∇²L where the network is
    linear in its parameters or fits its support set exactly.

    For networks of well-known layers alone (:mod:`lightning_imaml.models`, ``nn.Sequential`` of PyTorch's common ones)
    a product is one more pass of the network, in forward mode, and one pass back. The outputs of others are
    differentiated twice, which takes longer, as are those of compiled ones, where it does not.

    Args:
        damping: times the identity, added to the matrix.

    Raises:
        ValueError: ``damping`` is negative.
    """

    damping: float = 0.0

    def expand(self, problem: SupervisedProblem, parameters: Tensor) -> Expansion:
        """Linearise G around ``parameters``, ``[T, D]``, with plain PyTorch."""
        forward_mode = has_forward_mode(problem.support)
        with torch.enable_grad():
            point = parameters.detach().requires_grad_()
            outputs = problem.support.outputs(point, first_order_only=forward_mode)
            if not isinstance(outputs, Tensor):
                raise TypeError(
                    f"GaussNewton: the backbone's outputs must be one tensor; found {type(outputs).__name__}. "
                    "Return one tensor, or use curvature=Hessian()."
                )
            cut = outputs.detach().requires_grad_()
            losses = problem.support.from_outputs(cut)
            (slope,) = torch.autograd.grad(losses.sum(), cut, create_graph=True)
            (gradient,) = torch.autograd.grad(outputs, point, slope.detach(), retain_graph=True)
        push = push_forward(problem.support, point) if forward_mode else push_by_reverse(point, outputs)

        def product(vector: Tensor) -> Tensor:
            regular = regularizer_product(problem, parameters, vector)
            if not slope.requires_grad:  # A loss that is linear in the outputs has no curvature.
                return regular
            (bent,) = torch.autograd.grad(slope, cut, push(vector), retain_graph=True, materialize_grads=True)
            (pulled,) = torch.autograd.grad(outputs, point, bent, retain_graph=True)
            return pulled + regular

        return expansion_of(problem, parameters, losses, gradient, product)
