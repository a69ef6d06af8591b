"""Products with the Jacobian of a network's outputs."""

from __future__ import annotations

import functools
import importlib
import threading
import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from lightning_imaml.problems.stock_layers import has_stock_layers_alone
from lightning_imaml.problems.supervised import TaskLoss

# All threads share PyTorch's single level of dual numbers.
_one_level = threading.RLock()


def has_forward_mode(support: TaskLoss) -> bool:
    """Whether J v may come from one more forward pass, in forward mode, which is cheaper than two reverse derivatives.

    Recording for the compiler uses the two derivatives, since the compiler removes their needless parts.
    """
    return (
        get_proxy_mode() is None
        and forward_ad._current_level < 0  # PyTorch cannot nest forward mode in a user's own.
        and has_stock_layers_alone(support.model.module)
    )


def push_forward(support: TaskLoss, point: Tensor) -> Callable[[Tensor], Tensor]:
    """The map v ↦ J v, ``[T, D]`` to ``[T, n, ...]``, where J is the Jacobian of the outputs at ``point``."""

    def push(vector: Tensor) -> Tensor:
        with _one_level, torch.no_grad(), forward_ad.dual_level():
            dual = forward_ad.make_dual(point.detach(), vector)  # type: ignore[no-untyped-call]
            value, tangent = forward_ad.unpack_dual(support.outputs(dual, first_order_only=True))  # type: ignore[no-untyped-call]
        return torch.zeros_like(value) if tangent is None else tangent

    _load_forward_mode()
    return push


def push_by_reverse(point: Tensor, outputs: Tensor) -> Callable[[Tensor], Tensor]:
    """The map of :func:`push_forward`, by differentiating the graph of the outputs twice."""
    with torch.enable_grad():
        # Jᵀw is linear in w, and its vector-Jacobian product with v is J v.
        weight = torch.zeros_like(outputs, requires_grad=True)
        (pullback,) = torch.autograd.grad(outputs, point, weight, create_graph=True)
    return lambda vector: torch.autograd.grad(pullback, weight, vector, retain_graph=True)[0]


@functools.cache
def _load_forward_mode() -> None:
    """Import now what PyTorch imports at the first use of forward mode, and suppress its warning about that import."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module("torch._decomp.decompositions_for_jvp")
