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
from torch.utils import _pytree as pytree

from lightning_imaml.episodes import clone_inference_tensors
from lightning_imaml.parameters.layout import Layout
from lightning_imaml.parameters.names import matches, require_matches, tied_names
from lightning_imaml.problems.isolation import Place, Snapshot, replacing, traits_of, untouched
from lightning_imaml.problems.refusals import refuse_state
from lightning_imaml.problems.stock_layers import has_stock_layers_alone
from lightning_imaml.problems.support_set import support_rows
from lightning_imaml.problems.vmap import vmap_tasks


class FlatModel:
    """A module as a function of rows of flat parameters.

    Only parameters with ``requires_grad`` belong to the rows; frozen ones stay as they are in the module. With
    ``adapt_only``, the other trainable parameters ω are shared: all tasks use the module's own.

    Args:
        module: any module that maps inputs ``[n, ...]`` to outputs ``[n, ...]``.
        compile: compile functions of it, see :mod:`lightning_imaml._compile.door`. Rows then hold the weights of
            convolutions with the channels innermost, as compiled convolutions read them.
        dtype: the dtype of the rows, in which the network then computes; None for that of its parameters.
        adapt_only: patterns over parameter names; the trainable parameters that match, tied ones by any of their names,
            belong to the rows. None is all.

    Attributes:
        traits: what earlier calls of the module have shown.

    Raises:
        ValueError: nothing in the module is trainable, a pattern matches nothing that is, the trainable parameters
            differ in dtype or device, or a layer keeps state from one call to the next, which tasks must not share.
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
        refuse_state(module)
        self.module = module
        self.traits = traits_of(module)
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
        # last. Their second derivatives are slower; compiled rows have them so already.
        here = parameters.device.type == "cpu" and parameters.dtype == torch.float32 and not self.compile
        channels_last = first_order_only and here and parameters.shape[0] == 1 and has_stock_layers_alone(self.module)

        def call(named: dict[str, Tensor], own: dict[str, Tensor], inputs: Any) -> Any:
            named = {**named, **(state or {}), **own}
            if channels_last:
                named = {name: _channels_last(t) for name, t in named.items()}
            outputs = self.forward(named, inputs, support)
            if channels_last:  # As the loss expects them.
                outputs = pytree.tree_map(Tensor.contiguous, outputs)
            return outputs

        def of_tasks(parameters: Tensor, inputs: Any) -> Any:
            own = self._written_buffers(state, parameters.shape[0])
            return vmap_tasks(call, self.module, self.unflatten(parameters), own, inputs)

        if torch.is_grad_enabled():
            return of_tasks(parameters, inputs)
        if not self.traits.differentiates:
            try:
                return of_tasks(parameters, inputs)
            except RuntimeError as error:
                if "does not require grad" not in str(error):
                    raise
                self.traits.differentiates = True
        with torch.inference_mode(False), torch.enable_grad():
            state = None if state is None else clone_inference_tensors(dict(state))
            outputs = of_tasks(*clone_inference_tensors((parameters, inputs)))
        return pytree.tree_map_only(Tensor, Tensor.detach, outputs)

    def forward(self, named: dict[str, Tensor], inputs: Any, support: int = 0, keep: bool = False) -> Any:
        """Outputs ``[n, ...]`` of the module with other parameters and buffers.

        Args:
            named: parameters and buffers by name. Afterwards it holds the buffers that the forward pass has set.
            inputs: ``[n, ...]``.
            support: see :meth:`__call__`.
            keep: whether the attributes that the forward pass writes stay so.
        """
        named |= {other: named[name] for other, name in self._tied.items() if name in named}
        before = Snapshot(self.module, values=False) if self.traits.writes and not keep else None
        try:
            with self.surroundings(support), replacing(self.traits):
                outputs = functional_call(self.module, named, (inputs,), tie_weights=False)
        finally:
            if before is not None:
                before.restore()
        return pytree.tree_map(lambda t: t[support:], outputs) if support else outputs

    @contextlib.contextmanager
    def surroundings(self, support: int = 0) -> Iterator[None]:
        """What a call of the module has around it, see :meth:`__call__`."""
        with support_rows(support), _refuse_checkpoint(self.module):
            yield

    def isolated(self) -> contextlib.AbstractContextManager[None]:
        """Around all that calls the module: afterwards its state is as it was."""
        return untouched(self.module, self.traits)

    def _written_buffers(self, state: Mapping[str, Tensor] | None, tasks: int) -> dict[str, Tensor]:
        """A copy for each task of every buffer that the forward pass writes, ``[T, ...]``."""
        if not self.traits.writes:
            return {}
        names = {_qualified(place) for place in self.traits.writes}
        held = self.cast({name: buffer for name, buffer in self.module.named_buffers() if name in names})
        held |= {name: value for name, value in (state or {}).items() if name in held}
        return {name: value.expand(tasks, *value.shape).clone() for name, value in held.items()}


def _qualified(place: Place) -> str:
    return ".".join(filter(None, place))


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
