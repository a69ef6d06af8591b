"""The product with the curvature of the inner problem, linearised once for all products of a solve."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from lightning_imaml import compilation
from lightning_imaml.component import Component, require
from lightning_imaml.tasks import InnerProblem, TaskLoss
from lightning_imaml.trials import gives_the_same

# PyTorch has a single level of dual numbers for all threads.
_one_level = threading.RLock()


class Linearization(NamedTuple):
    """The inner objective G around one point.

    Attributes:
        value: G, ``[T]``.
        gradient: ∇G, ``[T, D]``.
        product: v ↦ (curvature of G) v, both ``[T, D]``; holds the graph of one forward and one backward pass, which is
            freed with it.
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


@dataclass(frozen=True)
class Hessian(Curvature):
    """The exact Hessian ∇²L + ∇²R, by differentiating the gradient's graph (reverse over reverse).

    Away from a minimum of L it can be indefinite; conjugate gradient then stops early and reports it.

    Args:
        damping: times the identity, added to the matrix.

    Raises:
        ValueError: ``damping`` is negative.
    """

    damping: float = 0.0

    def expand(self, problem: InnerProblem, parameters: Tensor) -> Linearization:
        """Linearise G around ``parameters``, ``[T, D]``, with plain PyTorch."""
        with torch.enable_grad():
            point = parameters.detach().requires_grad_()
            losses = problem.support.value(point)
            (gradient,) = torch.autograd.grad(losses.sum(), point, create_graph=True)

        def product(vector: Tensor) -> Tensor:
            regular = _regularizer_product(problem, parameters, vector)
            if not gradient.requires_grad:  # A loss that is linear in φ has no second derivative.
                return regular
            (loss_product,) = torch.autograd.grad(gradient, point, vector, retain_graph=True, materialize_grads=True)
            return loss_product + regular

        return _linearization(problem, parameters, losses, gradient, product)


@dataclass(frozen=True)
class GaussNewton(Curvature):
    """The generalised Gauss-Newton matrix Jᵀ H_out J + ∇²R.

    J is the Jacobian of the network's outputs and H_out the Hessian of the loss in the outputs
    (`Schraudolph, 2002 <https://doi.org/10.1162/08997660260028683>`_). Where the loss is convex in the outputs
    (cross-entropy, squared error), Jᵀ H_out J is positive semi-definite everywhere; it equals ∇²L where the network is
    linear in its parameters or fits its support set exactly.

    A product is one more pass of the network, in forward mode, and one pass back. Where forward mode does not give the
    same, as for a network that draws random numbers or has an operation without a forward derivative, outputs are
    differentiated twice instead, which takes longer; so is what is compiled, where it does not.

    Args:
        damping: times the identity, added to the matrix.

    Raises:
        ValueError: ``damping`` is negative.
    """

    damping: float = 0.0

    def expand(self, problem: InnerProblem, parameters: Tensor) -> Linearization:
        """Linearise G around ``parameters``, ``[T, D]``, with plain PyTorch."""
        with problem.support.fast_form(parameters), torch.enable_grad():
            point = parameters.detach().requires_grad_()
            outputs = problem.support.outputs(point)
            if not isinstance(outputs, Tensor):
                raise TypeError(
                    f"GaussNewton: the backbone's outputs must be one tensor; found {type(outputs).__name__}. "
                    "Return one tensor, or use curvature=Hessian()."
                )
            cut = outputs.detach().requires_grad_()
            losses = problem.support.of(cut)
            (slope,) = torch.autograd.grad(losses.sum(), cut, create_graph=True)
            (gradient,) = torch.autograd.grad(outputs, point, slope.detach(), retain_graph=True)
        push = _pushforward(problem.support, point, outputs)

        def product(vector: Tensor) -> Tensor:
            regular = _regularizer_product(problem, parameters, vector)
            if not slope.requires_grad:  # A loss that is linear in the outputs has no curvature.
                return regular
            (bent,) = torch.autograd.grad(slope, cut, push(vector), retain_graph=True, materialize_grads=True)
            (pulled,) = torch.autograd.grad(outputs, point, bent, retain_graph=True)
            return pulled + regular

        return _linearization(problem, parameters, losses, gradient, product)


def _pushforward(support: TaskLoss, point: Tensor, outputs: Tensor) -> Callable[[Tensor], Tensor]:
    """The map v ↦ J v, ``[T, D]`` to ``[T, n, ...]``, where J is the Jacobian of the outputs at ``point``."""

    def forward(vector: Tensor) -> tuple[Tensor, Tensor]:
        with _one_level, support.fast_form(point), torch.no_grad(), forward_ad.dual_level():
            dual = forward_ad.make_dual(point.detach(), vector)  # type: ignore[no-untyped-call]
            value, tangent = forward_ad.unpack_dual(support.outputs(dual))  # type: ignore[no-untyped-call]
        return value, torch.zeros_like(value) if tangent is None else tangent

    def trial() -> tuple[Any, Any]:
        vector = torch.randn(point.shape, generator=torch.Generator().manual_seed(0)).to(point)
        value, pushed = forward(vector)
        # (J v)ᵀ(J v) = vᵀ Jᵀ(J v): a derivative that is stopped (torch.no_grad, hooks) is not stopped in forward mode.
        (pulled,) = torch.autograd.grad(outputs, point, pushed, retain_graph=True)
        return (value, pushed.square().sum()), (outputs, (pulled * vector).sum())

    # The network once more in forward mode costs less than the derivative of a derivative, but not to the compiler,
    # which takes out what is needless there.
    if get_proxy_mode() is None and gives_the_same(support.model.module, support.trial_key("forward mode"), trial):
        return lambda vector: forward(vector)[1]
    with torch.enable_grad():
        # Jᵀw is linear in w, and its derivative in w is J v.
        weight = torch.zeros_like(outputs, requires_grad=True)
        (pullback,) = torch.autograd.grad(outputs, point, weight, create_graph=True)
    return lambda vector: torch.autograd.grad(pullback, weight, vector, retain_graph=True)[0]


def _linearization(
    problem: InnerProblem, parameters: Tensor, losses: Tensor, gradient: Tensor, product: Callable[[Tensor], Tensor]
) -> Linearization:
    """That of G, where value and gradient are those of L alone."""
    at = (parameters, problem.initial, problem.strengths)
    with torch.no_grad():
        value, slope = problem.regularizer.penalty(*at), problem.regularizer.gradient(*at)
    return Linearization(losses.detach() + value, gradient.detach() + slope, product)


def _regularizer_product(problem: InnerProblem, parameters: Tensor, vector: Tensor) -> Tensor:
    with torch.no_grad():
        return problem.regularizer.product(vector, parameters, problem.initial, problem.strengths)
