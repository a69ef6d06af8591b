"""Functions of tensors, recorded as flat graphs of operations for a compiler."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, fx
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import BaseTorchDispatchMode

from lightning_imaml._compile.matrix_form import MatrixForm
from lightning_imaml.runtime.random_states import random_states, set_random_states

Flat = Callable[..., Sequence[Tensor]]
# What a unit on the other side of its kink may change in a derivative; on Conv4-64, 0.003 was seen.
_KINK = 0.05
"""Takes tensors, gives tensors."""

# Autograd detaches what it saves for its derivatives. PyTorch 2.6 records that too, as newer versions did
# (https://github.com/pytorch/pytorch/issues/175477): gradients of the graph would stop there.
_DECOMPOSITIONS = {torch.ops.aten.detach.default: torch.ops.aten.alias.default}


def record(function: Flat, example: Sequence[Tensor], matrix_form: bool) -> fx.GraphModule:
    """The operations of ``function`` on tensors like these, derivatives included, in one graph that writes nothing.

    Args:
        function: what to record.
        example: tensors of the shapes, strides, dtypes and devices to come.
        matrix_form: whether to take the matrix form of convolutions.
    """

    def recorded(function: Flat) -> fx.GraphModule:
        return _with_any_strides(make_fx(function, _DECOMPOSITIONS, tracing_mode="fake")(*example))

    with MatrixForm() if matrix_form else nullcontext():
        graph = recorded(function)
    if any(isinstance(n.target, torch._ops.OpOverload) and n.target._schema.is_mutable for n in graph.graph.nodes):
        # In place, as PyTorch's second derivative of LayerNorm writes. Neither cutting a graph nor leaving out what
        # nobody reads could stand that.
        graph = recorded(functionalize(graph))
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def require_own_derivative(graph: Flat, function: Flat, example: Sequence[Tensor], eps: float) -> None:
    """Compare the derivative of a graph with that of the function that it records.

    A graph holds the operations alone: ``detach``, ``torch.no_grad`` and the backward pass of a
    ``torch.autograd.Function`` are not in it, and its derivative is another one where a network has them.

    Args:
        graph: what was recorded.
        function: from what.
        example: its arguments; those that require gradients are differentiated, near the values that they have.
        eps: the relative precision of the computation.

    Raises:
        NotImplementedError: the derivatives differ.
    """
    # Rounding may carry a unit over a ReLU's kink in one of the two: a small difference, and not at the next point.
    for first in (1, 2, 3):
        difference = _difference(graph, function, example, eps, first)
        if difference <= eps**0.5:
            return
        if not difference <= _KINK:
            break
    raise NotImplementedError(
        "what it records has another derivative, as where a network calls detach() or no_grad(), or has an "
        "autograd.Function"
    )


def _difference(graph: Flat, function: Flat, example: Sequence[Tensor], eps: float, first: int) -> float:
    """Of the two derivatives, relative to the function's own, at the point whose waves begin with ``first``."""
    # Not at the values themselves, where zeros, as of a new network's biases, would hide much.
    points = [
        (t.detach() * (1 + 0.1 * _waves(t, first)) + 0.01 * _waves(t, first)).requires_grad_() if t.requires_grad else t
        for t in example
    ]
    meta, device = [point for point in points if point.requires_grad], example[0].device
    states = random_states(device)

    def slopes(function: Flat) -> list[Tensor]:
        set_random_states(states, device)  # A dropout draws the same in both.
        parts = [(output * _waves(output)).sum() for output in function(*points) if output.requires_grad]
        return list(torch.autograd.grad(parts, meta, materialize_grads=True)) if parts else [0 * m for m in meta]

    # Where there is a dispatch mode nothing is compiled, so that parts of the function are not either.
    with BaseTorchDispatchMode():  # type: ignore[no-untyped-call]
        own, recorded = slopes(function), slopes(graph)
    set_random_states(states, device)  # Whatever comes next draws as if nothing had been compared.
    floor = 100 * eps**0.5 * torch.stack([slope.norm() for slope in own]).norm()
    tiny = torch.finfo(floor.dtype).tiny  # Where all slopes are zero, 0/0 would be no number.
    differences = [
        (found - slope).norm() / (slope.norm() + floor).clamp(min=tiny)
        for slope, found in zip(own, recorded, strict=True)
    ]
    return float(torch.stack(differences).nan_to_num(nan=torch.inf).max())


def _waves(like: Tensor, first: int = 1) -> Tensor:
    """Numbers in −1 … 1 without a pattern that a network could share."""
    return torch.arange(first, like.numel() + first, device=like.device).sin().to(like.dtype).view(like.shape)


def _with_any_strides(graph: fx.GraphModule) -> fx.GraphModule:
    """Let views copy where they must: kernels and the compiler may lay tensors out otherwise than was recorded."""
    views = (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default)
    for node in graph.graph.nodes:
        if node.target in views:
            node.target = torch.ops.aten.reshape.default
    graph.recompile()
    return graph
