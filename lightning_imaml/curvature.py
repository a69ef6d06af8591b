"""The product with the curvature of the inner problem, linearised once for all products of a solve."""

from __future__ import annotations

import functools
import importlib
import threading
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from lightning_imaml import compilation
from lightning_imaml.component import Component, require
from lightning_imaml.stock_layers import has_stock_layers_alone
from lightning_imaml.tasks import InnerProblem, TaskLoss

# PyTorch has a single level of dual numbers for all threads.
_one_level = threading.RLock()


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

    For networks of well-known layers alone (:mod:`lightning_imaml.models`, ``nn.Sequential`` of PyTorch's common ones)
    a product is one more pass of the network, in forward mode, and one pass back. The outputs of others are
    differentiated twice, which takes longer, as are those of compiled ones, where it does not.

    Args:
        damping: times the identity, added to the matrix.

    Raises:
        ValueError: ``damping`` is negative.
    """

    damping: float = 0.0

    def expand(self, problem: InnerProblem, parameters: Tensor) -> Linearization:
        """Linearise G around ``parameters``, ``[T, D]``, with plain PyTorch."""
        forward_mode = _has_forward_mode(problem.support)
        with torch.enable_grad():
            point = parameters.detach().requires_grad_()
            outputs = problem.support.outputs(point, once=forward_mode)
            if not isinstance(outputs, Tensor):
                raise TypeError(
                    f"GaussNewton: the backbone's outputs must be one tensor; found {type(outputs).__name__}. "
                    "Return one tensor, or use curvature=Hessian()."
                )
            cut = outputs.detach().requires_grad_()
            losses = problem.support.of(cut)
            (slope,) = torch.autograd.grad(losses.sum(), cut, create_graph=True)
            (gradient,) = torch.autograd.grad(outputs, point, slope.detach(), retain_graph=True)
        push = _push_forward(problem.support, point) if forward_mode else _push_by_reverse(point, outputs)

        def product(vector: Tensor) -> Tensor:
            regular = _regularizer_product(problem, parameters, vector)
            if not slope.requires_grad:  # A loss that is linear in the outputs has no curvature.
                return regular
            (bent,) = torch.autograd.grad(slope, cut, push(vector), retain_graph=True, materialize_grads=True)
            (pulled,) = torch.autograd.grad(outputs, point, bent, retain_graph=True)
            return pulled + regular

        return _linearization(problem, parameters, losses, gradient, product)


def _has_forward_mode(support: TaskLoss) -> bool:
    """Whether J v may come from the network once more, in forward mode, which costs less than two derivatives do.

    Not to the compiler, which takes out what is needless of the two.
    """
    return (
        get_proxy_mode() is None
        and forward_ad._current_level < 0  # A user's own forward mode, in which there can be no other.
        and has_stock_layers_alone(support.model.module)
    )


def _push_forward(support: TaskLoss, point: Tensor) -> Callable[[Tensor], Tensor]:
    """The map v ↦ J v, ``[T, D]`` to ``[T, n, ...]``, where J is the Jacobian of the outputs at ``point``."""

    def push(vector: Tensor) -> Tensor:
        with _one_level, torch.no_grad(), forward_ad.dual_level():
            dual = forward_ad.make_dual(point.detach(), vector)  # type: ignore[no-untyped-call]
            value, tangent = forward_ad.unpack_dual(support.outputs(dual, once=True))  # type: ignore[no-untyped-call]
        return torch.zeros_like(value) if tangent is None else tangent

    _load_forward_mode()
    return push


def _push_by_reverse(point: Tensor, outputs: Tensor) -> Callable[[Tensor], Tensor]:
    """The same map for outputs with a graph, differentiated twice."""
    with torch.enable_grad():
        # Jᵀw is linear in w, and its derivative in w is J v.
        weight = torch.zeros_like(outputs, requires_grad=True)
        (pullback,) = torch.autograd.grad(outputs, point, weight, create_graph=True)
    return lambda vector: torch.autograd.grad(pullback, weight, vector, retain_graph=True)[0]


@functools.cache
def _load_forward_mode() -> None:
    """Import what PyTorch's forward mode imports the first time, with a warning about itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module("torch._decomp.decompositions_for_jvp")


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
