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

    Where all layers are well known (:mod:`lightning_imaml.models`, ``nn.Sequential`` of PyTorch's common layers), a
    product takes one forward pass in forward mode and one backward pass. Other networks differentiate their outputs
    twice, which takes longer; compiled code does so too, at no extra cost.

    Args:
        damping: this multiple of the identity is added to the matrix.

    Raises:
        ValueError: ``damping`` is negative.
    """

    damping: float = 0.0

    def expand(self, problem: SupervisedProblem, parameters: Tensor) -> Expansion:
        """Expand G around ``parameters``, see :meth:`Curvature.expand`."""
        forward_mode = has_forward_mode(problem.support)
        with torch.enable_grad():
            point = parameters.detach().requires_grad_()
            outputs = problem.support.outputs(point, first_order_only=forward_mode)
            if not isinstance(outputs, Tensor):
                raise TypeError(
                    f"GaussNewton: the backbone's outputs must be one tensor; found {type(outputs).__name__}. "
                    "Return one tensor, or use curvature=Hessian()."
                )
            detached = outputs.detach().requires_grad_()
            losses = problem.support.from_outputs(detached)
            (slope,) = torch.autograd.grad(losses.sum(), detached, create_graph=True)
            (gradient,) = torch.autograd.grad(outputs, point, slope.detach(), retain_graph=True)
        push = push_forward(problem.support, point) if forward_mode else push_by_reverse(point, outputs)

        def product(vector: Tensor) -> Tensor:
            regular = regularizer_product(problem, parameters, vector)
            if not slope.requires_grad:  # A loss that is linear in the outputs has no curvature.
                return regular
            (bent,) = torch.autograd.grad(slope, detached, push(vector), retain_graph=True, materialize_grads=True)
            (pulled,) = torch.autograd.grad(outputs, point, bent, retain_graph=True)
            return pulled + regular

        return expansion_of(problem, parameters, losses, gradient, product)
