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
"""Takes tensors and returns tensors."""

# The largest relative change of a derivative that may come from one unit crossing its kink; Conv4-64 showed 0.003.
_KINK = 0.05

# Autograd detaches the tensors that it saves for its derivatives. PyTorch 2.6 and some newer versions record these
# detaches (https://github.com/pytorch/pytorch/issues/175477), at which gradients of the graph would stop.
_DECOMPOSITIONS = {torch.ops.aten.detach.default: torch.ops.aten.alias.default}


def record(function: Flat, example: Sequence[Tensor], matrix_form: bool) -> fx.GraphModule:
    """Record the operations of a function, derivatives included, in one graph that writes to no tensor in place.

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
        # Some operation writes in place, as PyTorch's second derivative of LayerNorm does. Cutting a graph and
        # dead-code elimination are wrong for such operations.
        graph = recorded(functionalize(graph))
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def require_own_derivative(graph: Flat, function: Flat, example: Sequence[Tensor], eps: float) -> None:
    """Compare the derivative of a recorded graph with the derivative of its function.

    A graph holds only the operations. ``detach``, ``torch.no_grad`` and the backward pass of a
    ``torch.autograd.Function`` are missing from it, so its derivative differs where a network has them.

    Args:
        graph: the recorded graph.
        function: the function that was recorded.
        example: the arguments. The derivatives are taken near their values, in those that require gradients.
        eps: the relative precision of the computation.

    Raises:
        NotImplementedError: the derivatives differ.
    """
    # Rounding may carry a unit over a ReLU's kink in one of the two. The difference is then small, and gone at the next
    # point.
    for first in (1, 2, 3):
        difference = _difference(graph, function, example, eps, first)
        if difference <= eps**0.5:
            return
        if not difference <= _KINK:
            break
    raise NotImplementedError(
        "the recorded graph has another derivative, as where a network calls detach() or no_grad(), or has an "
        "autograd.Function"
    )


def _difference(graph: Flat, function: Flat, example: Sequence[Tensor], eps: float, first: int) -> float:
    """The largest relative difference of the two derivatives at the point whose waves begin with ``first``."""
    # The point is near the values, since zeros among them, such as new biases, would hide differences.
    points = [
        (t.detach() * (1 + 0.1 * _waves(t, first)) + 0.01 * _waves(t, first)).requires_grad_() if t.requires_grad else t
        for t in example
    ]
    meta, device = [point for point in points if point.requires_grad], example[0].device
    states = random_states(device)

    def slopes(function: Flat) -> list[Tensor]:
        set_random_states(states, device)  # Dropout then draws the same numbers in both.
        parts = [(output * _waves(output)).sum() for output in function(*points) if output.requires_grad]
        return list(torch.autograd.grad(parts, meta, materialize_grads=True)) if parts else [0 * m for m in meta]

    # Under a dispatch mode nothing is compiled, so that all parts of the function run eagerly.
    with BaseTorchDispatchMode():  # type: ignore[no-untyped-call]
        own, recorded = slopes(function), slopes(graph)
    set_random_states(states, device)  # The comparison leaves no trace in later draws.
    floor = 100 * eps**0.5 * torch.stack([slope.norm() for slope in own]).norm()
    tiny = torch.finfo(floor.dtype).tiny  # It avoids 0/0 where all slopes are zero.
    differences = [
        (found - slope).norm() / (slope.norm() + floor).clamp(min=tiny)
        for slope, found in zip(own, recorded, strict=True)
    ]
    return float(torch.stack(differences).nan_to_num(nan=torch.inf).max())


def _waves(like: Tensor, first: int = 1) -> Tensor:
    """Numbers in −1 … 1 without a pattern that a network could share."""
    return torch.arange(first, like.numel() + first, device=like.device).sin().to(like.dtype).view(like.shape)


def _with_any_strides(graph: fx.GraphModule) -> fx.GraphModule:
    """Replace views by reshapes, which may copy: kernels and Inductor may give tensors other strides than recorded."""
    views = (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default)
    for node in graph.graph.nodes:
        if node.target in views:
            node.target = torch.ops.aten.reshape.default
    graph.recompile()
    return graph
