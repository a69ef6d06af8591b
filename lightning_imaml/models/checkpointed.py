"""Layers that are computed again instead of kept, under repeated differentiation and for many tasks at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from lightning_imaml.parameters.names import tied_names
from lightning_imaml.problems.support_set import current_support_rows, support_rows
from lightning_imaml.runtime.random_states import random_states, set_random_states


class Checkpointed(nn.Module):
    """Keeps a module's inputs alone and computes its insides again when they are differentiated, to save memory.

    For backbones whose activations do not fit otherwise: wrap some of the blocks, as in
    ``nn.Sequential(Checkpointed(block1), Checkpointed(block2), head)``. Values and derivatives stay the same. What is
    held is one block's graph at a time and the tensors between blocks, in Hessian and Gauss-Newton products and in
    unrolled inner steps too. The price is time: each block's forward pass once more in every gradient, and its forward
    and backward pass in every product.

    ``torch.utils.checkpoint`` cannot do that here: it computes again after the forward pass, when the network holds its
    initial weights and not a task's, and what it saves is kept by the first derivative's graph after all.

    With ``compile=True`` the compiler decides what to keep, and this module is the wrapped one.

    Args:
        module: takes tensors, gives one tensor, and changes nothing of its own in its forward pass. Random numbers, as
            dropout's, are drawn as the first time.

    Example:
        >>> from lightning_imaml.models import ResNet12
        >>> network = ResNet12(ways=5)
        >>> for k in range(4):
        ...     network.features[k] = Checkpointed(network.features[k])
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Tensor) -> Tensor:
        """The module's output."""
        if not torch.is_grad_enabled() or get_proxy_mode() is not None:
            plain: Tensor = self.module(*inputs)
            return plain
        held = dict(self.module.named_parameters()) | dict(self.module.named_buffers())
        tensors = (*inputs, *held.values())
        # Differentiable ones first; all are handed on, since batched ones must not be closed over. Which of them
        # are to be differentiated, vmap does not tell.
        order = sorted(range(len(tensors)), key=lambda k: not tensors[k].is_floating_point())
        differentiable = sum(tensor.is_floating_point() for tensor in tensors)
        # Names and numbers alone, so that the graph, which holds this function, keeps no tensor by it.
        support, count, names, tied = current_support_rows(), len(inputs), tuple(held), tied_names(self.module)

        def run(*ordered: Tensor) -> Tensor:
            found = [tensor for _, tensor in sorted(zip(order, ordered, strict=True), key=lambda pair: pair[0])]
            named = dict(zip(names, found[count:], strict=True))
            named |= {other: named[name] for other, name in tied.items()}
            with support_rows(support):
                output: Tensor = functional_call(self.module, named, tuple(found[:count]), tie_weights=False)
            return output

        segment = _Segment(run, differentiable, tensors[0].device)
        output: Tensor = _Forward.apply(segment, *(tensors[k] for k in order))
        return output


class _Segment:
    """A function of tensors, the first of which are differentiable, and the random state that it starts from."""

    def __init__(self, run: Callable[..., Tensor], differentiable: int, device: torch.device) -> None:
        self.run = run
        self.differentiable = differentiable
        self.device = device
        self.states = random_states(device)  # In evaluation too: some networks draw random numbers there.

    def pull_back(self, slope: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        """slopeᵀ J, for each differentiable tensor."""
        chosen, others = tensors[: self.differentiable], tensors[self.differentiable :]
        found: tuple[Tensor, ...] = vjp(lambda *chosen: self.run(*chosen, *others), *chosen)[1](slope)
        return found

    @contextmanager
    def same_random_numbers(self) -> Iterator[None]:
        """Draw what the first run drew."""
        outside = random_states(self.device)
        set_random_states(self.states, self.device)
        try:
            yield
        finally:
            set_random_states(outside, self.device)


class _Forward(torch.autograd.Function):
    """A segment without its graph."""

    generate_vmap_rule = True

    @staticmethod
    def forward(segment: _Segment, *tensors: Tensor) -> Tensor:
        return segment.run(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.segment, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Any:
        others = [None] * (len(ctx.saved_tensors) - ctx.segment.differentiable)
        return None, *_Backward.apply(ctx.segment, slope, *ctx.saved_tensors), *others


class _Backward(torch.autograd.Function):
    """The derivative of a segment, without its graph either, so that the second derivative keeps nothing more."""

    generate_vmap_rule = True

    @staticmethod
    def forward(segment: _Segment, slope: Tensor, *tensors: Tensor) -> Any:
        with segment.same_random_numbers():
            return segment.pull_back(slope, *tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.segment, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *vectors: Tensor) -> Any:
        segment: _Segment = ctx.segment
        slope, *tensors = ctx.saved_tensors
        chosen, others = tensors[: segment.differentiable], tensors[segment.differentiable :]
        with segment.same_random_numbers():
            found = vjp(lambda slope, *chosen: segment.pull_back(slope, *chosen, *others), slope, *chosen)[1](vectors)
        return None, *found, *[None] * len(others)
