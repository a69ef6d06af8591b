"""A network as a function of rows of parameters.

Row i of a ``[tasks, D]`` matrix holds all parameters of the network that task i adapts, raveled in the order of
``named_parameters()``. One call runs the networks of all rows as one batched operation.
"""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import disable_saved_tensors_hooks
from torch.func import functional_call
from torch.nn.modules.batchnorm import _NormBase
from torch.utils import _pytree as pytree

from lightning_imaml.parameters.layout import Layout
from lightning_imaml.parameters.names import matches, require_matches, tied_names
from lightning_imaml.problems.stock_layers import has_stock_layers_alone
from lightning_imaml.problems.support_set import support_rows
from lightning_imaml.problems.vmap import vmap_tasks


class FlatModel:
    """A module as a function of rows of flat parameters.

    Only parameters with ``requires_grad`` belong to the rows; frozen ones stay as they are in the module. With
    ``adapt_only``, the other trainable parameters ω are shared: all tasks use the module's own.

    Args:
        module: any module that maps inputs ``[n, ...]`` to outputs ``[n, ...]``.
        compile: compile functions of it, see :mod:`lightning_imaml.compilation`. Rows then hold the weights of
            convolutions with the channels innermost, as compiled convolutions read them.
        dtype: the dtype of the rows, in which the network then computes; None for that of its parameters.
        adapt_only: patterns over parameter names; the trainable parameters that match, tied ones by any of their names,
            belong to the rows. None is all.

    Raises:
        ValueError: nothing in the module is trainable, a pattern matches nothing that is, the trainable parameters
            differ in dtype or device, or the module would update BatchNorm running statistics, which tasks must not
            share.
    """

    def __init__(
        self,
        module: nn.Module,
        compile: bool = False,
        dtype: torch.dtype | None = None,
        adapt_only: Sequence[str] | None = None,
    ) -> None:
        trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
        if not trainable:
            raise ValueError(
                f"the backbone must have at least one parameter with requires_grad=True; found none in "
                f"{type(module).__name__}. Unfreeze what the inner loop should adapt."
            )
        kinds = {(p.dtype, p.device) for p in trainable.values()}
        if len(kinds) > 1 or not next(iter(kinds))[0].is_floating_point:
            raise ValueError(
                f"the backbone's trainable parameters must share one floating dtype and one device; found "
                f"{sorted(map(str, kinds))} in {type(module).__name__}. Convert it with .to(dtype=..., device=...)."
            )
        for name, layer in module.named_modules():
            if isinstance(layer, _NormBase) and layer.training and layer.running_mean is not None:
                raise ValueError(
                    f"the backbone's norm layers must not track running statistics in training, since every task "
                    f"would overwrite the others'; found {type(layer).__name__} {name!r}. Build it with "
                    "track_running_stats=False (batch statistics, the paper's protocol), or call "
                    "lightning_imaml.models.use_batch_statistics(backbone); for the inductive protocol, "
                    "use_support_statistics(backbone)."
                )
        self.module = module
        self.compile = compile
        adapted = list(trainable)
        # A tied parameter is one parameter, by whichever of its names.
        first = {p: name for name, p in trainable.items()}
        named = module.named_parameters(remove_duplicate=False)
        names = {name: first[p] for name, p in named if p in first}
        if adapt_only is not None:
            if isinstance(adapt_only, str) or not adapt_only:
                raise ValueError(
                    f"adapt_only must be a sequence of patterns, or None for all; found {adapt_only!r}. For a head "
                    "alone, write ('classifier.*',)."
                )
            require_matches(adapt_only, list(names), "adapt_only")
            chosen = {own for name, own in names.items() if matches(name, adapt_only)}
            adapted = [name for name in adapted if name in chosen]
        self._tied = tied_names(module)
        tied = tuple((name, own) for name, own in names.items() if name != own and own in adapted)
        self.layout = Layout(tuple(adapted), tuple(tuple(trainable[name].shape) for name in adapted), compile, tied)
        self.shared = tuple(name for name in trainable if name not in adapted)
        self.stored_dtype, self.device = next(iter(kinds))
        self.dtype = dtype or self.stored_dtype

    def with_dtype(self, dtype: torch.dtype) -> FlatModel:
        """The same network with rows of another dtype."""
        other = copy.copy(self)
        other.dtype = dtype
        return other

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the parameters that rows hold."""
        return self.layout.names

    def initial(self) -> Tensor:
        """The module's own parameters as one row ``[D]``, detached."""
        parameters = dict(self.module.named_parameters())
        return self.layout.flatten({name: parameters[name].detach() for name in self.names}).to(self.dtype)

    def unflatten(self, flat: Tensor) -> dict[str, Tensor]:
        """Cut ``[..., D]`` into named tensors ``[..., *shape]``."""
        return self.layout.unflatten(flat)

    def flatten(self, named: Mapping[str, Tensor]) -> Tensor:
        """The inverse of :meth:`unflatten`."""
        return self.layout.flatten(named)

    def state(self) -> dict[str, Tensor]:
        """What the network has besides the rows: shared and frozen parameters, detached, and its buffers."""
        named = dict(self.module.named_buffers()) | dict(self.module.named_parameters())
        state: dict[str, Tensor] = self.cast({name: t.detach() for name, t in named.items() if name not in self.names})
        return state

    def cast(self, tree: Any) -> Any:
        """Bring floating tensors to the dtype of the rows, where it is not that of the module's parameters."""
        if self.dtype == self.stored_dtype:
            return tree
        return pytree.tree_map_only(Tensor, lambda t: t.to(self.dtype) if t.is_floating_point() else t, tree)

    def signature(self) -> Hashable:
        """What a function of the network may depend on besides tensors."""
        return weakref.ref(self.module), tuple(m.training for m in self.module.modules()), self.layout, self.shared

    def __call__(
        self,
        parameters: Tensor,
        inputs: Any,
        state: Mapping[str, Tensor] | None = None,
        support: int = 0,
        first_order_only: bool = False,
    ) -> Any:
        """Outputs of every task's own network.

        Args:
            parameters: ``[T, D]``.
            inputs: ``[T, n, ...]``, or from :func:`support_set.concat_support`.
            state: stands in for :meth:`state`.
            support: how many of the first samples are the support set of the others, and have no outputs here; with 0,
                all of them are and have.
            first_order_only: whether nothing will be differentiated twice.

        Returns:
            ``[T, n, ...]``.
        """
        # The module's own shared parameters require gradients: every inner step would build their graph.
        if state is None and (self.shared or self.dtype != self.stored_dtype):
            state = self.state()
        # The library's convolutions of one task, and their first derivatives, are faster on a CPU with the channels
        # innermost. Their second derivatives are not; compiled rows have them so already.
        here = parameters.device.type == "cpu" and parameters.dtype == torch.float32 and not self.compile
        channels_last = first_order_only and here and parameters.shape[0] == 1 and has_stock_layers_alone(self.module)

        def call(named: dict[str, Tensor], inputs: Any) -> Any:
            with support_rows(support), _refuse_checkpoint(self.module):
                found = {**named, **(state or {})}
                found |= {other: found[name] for other, name in self._tied.items() if name in found}
                if channels_last:
                    found = {name: _channels_last(t) for name, t in found.items()}
                outputs = functional_call(self.module, found, (inputs,), tie_weights=False)
            if channels_last:  # As the loss expects them.
                outputs = pytree.tree_map(Tensor.contiguous, outputs)
            return pytree.tree_map(lambda t: t[support:], outputs) if support else outputs

        return vmap_tasks(call, self.module, self.unflatten(parameters), inputs)


def _channels_last(parameter: Tensor) -> Tensor:
    """The weight of a 2-d convolution in that order of memory; other parameters as they are."""
    if parameter.ndim != 4:
        return parameter
    moved = parameter.permute(0, 2, 3, 1)
    # Through a single dimension: a copy of one channel could keep the strides of the other order, and its images too.
    return moved.reshape(-1).view(moved.shape).permute(0, 3, 1, 2)


@contextlib.contextmanager
def _refuse_checkpoint(module: nn.Module) -> Iterator[None]:
    """Refuse hooks that a network sets on saved tensors: what they compute again would hold the initial weights."""
    refusal = disable_saved_tensors_hooks(
        f"the backbone must not use torch.utils.checkpoint, which would compute the layers of {type(module).__name__} "
        "again with their initial weights and not with a task's. Wrap them in lightning_imaml.models.Checkpointed."
    )
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(RuntimeError):  # There are some around all of this: those are safe.
            stack.enter_context(refusal)
        yield
