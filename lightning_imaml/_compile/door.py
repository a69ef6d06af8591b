"""Run functions of a batch of tasks through PyTorch's compiler, Inductor, where the user asked for it.

A function is first recorded as one flat graph of tensor operations, derivatives included
(``torch.fx.experimental.proxy_tensor.make_fx``); then the graph is compiled. So everything that can be differentiated
can be compiled, ``vmap`` and repeated differentiation too, and eager and compiled runs share one source.

We call Inductor directly. Dynamo would also trace a signal handler that fires during the call, and the run would crash
before it saved a checkpoint (still so in PyTorch 2.14.1).
"""

from __future__ import annotations

import inspect
import logging
import time
import warnings
import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _get_current_dispatch_mode
from typing_extensions import Self

from lightning_imaml._compile.recording import record, require_own_derivative
from lightning_imaml._compile.splitting import Linear, Repeated, Whole, compiling, repeated_or_whole, shapes_of
from lightning_imaml.components.checks import first_line

# This logger is a child of Lightning's, whose handler shows compile times beside the Trainer's own messages.
_log = logging.getLogger("lightning.pytorch.lightning_imaml")
_MOST_KEPT = 256


class Tasks(Protocol):
    """A batch of tasks: its tensors, and a signature of everything that compiled code takes as fixed."""

    @property
    def compile(self) -> bool:
        """Whether to compile functions of this batch."""

    @property
    def tasks(self) -> int:
        """The number of tasks."""

    def tensors(self) -> Any:
        """All tensors of the batch, as a pytree."""

    def bind(self, tensors: Any) -> Self:
        """This batch with other tensors."""

    def signature(self) -> Hashable:
        """Everything else that a function of the batch may depend on: nested tuples that begin with the network."""


@dataclass
class _Entry:
    """The compiled code of one function at one signature and one set of shapes, or that it failed to compile."""

    compiled: Callable[..., Any] | None = None
    failed: bool = False


@dataclass
class _FlatBatch:
    """A flattened batch, kept so that the many calls of one solve flatten it once.

    Attributes:
        leaves: its tensors.
        structure: what puts them together again.
        key: the batch's part of a key of the cache.
        entries: the entries of the cache that this batch has used.
        precomputed: the tensors that depend on the batch alone.
    """

    leaves: list[Tensor]
    structure: pytree.TreeSpec
    key: tuple[Hashable, ...]
    entries: dict[Hashable, _Entry] = field(default_factory=dict)
    precomputed: dict[Repeated, list[Tensor]] = field(default_factory=dict)


_kept: dict[tuple[Hashable, tuple[Hashable, ...]], _Entry] = {}
_watched: weakref.WeakSet[Any] = weakref.WeakSet()
_flat_batches: weakref.WeakKeyDictionary[Any, _FlatBatch] = weakref.WeakKeyDictionary()


def run(function: Callable[..., Any], batch: Tasks, *arguments: Tensor, repeated: bool = False) -> Any:
    """``function(batch, *arguments)``, compiled if the batch asks for it.

    Args:
        function: what to run.
        batch: the tasks.
        arguments: its further arguments.
        repeated: whether it runs many times on the same batch. Compiled code then computes once what depends on the
            batch alone, such as the features where only the head adapts.
    """
    compiled = _compiled(_name(function), function, batch, arguments, repeated_or_whole if repeated else Whole)
    if compiled is None:
        return function(batch, *arguments)
    flat = _flat_batches[batch]
    if not isinstance(compiled, Repeated):
        return compiled(*flat.leaves, *arguments)
    if compiled not in flat.precomputed:
        flat.precomputed[compiled] = compiled.before(*flat.leaves)
    return compiled(*arguments, *flat.precomputed[compiled])


def run_linear(function: Callable[..., tuple[Any, ...]], batch: Tasks, point: Tensor) -> tuple[Any, ...]:
    """``function(batch, point)``, which returns tensors and a linear map, compiled if the batch asks for it.

    The linear map comes last. Compiled code computes what does not depend on the map's argument once for all its uses.
    """

    def applied(batch: Tasks, point: Tensor, vector: Tensor) -> tuple[Tensor, ...]:
        *values, product = function(batch, point)
        return *values, product(vector)

    compiled = _compiled(_name(function), applied, batch, (point, torch.empty_like(point)), Linear)
    if compiled is None:
        return function(batch, point)
    result: tuple[Any, ...] = compiled(*_flat_batches[batch].leaves, point)
    return result


def _name(function: Callable[..., Any]) -> Hashable:
    # Methods of equal solvers count as one function here; Python compares the solvers of methods by identity.
    return (function.__func__, function.__self__) if inspect.ismethod(function) else function


def _compiled(
    name: Hashable, function: Callable[..., Any], batch: Tasks, arguments: tuple[Tensor, ...], kind: Callable[..., Any]
) -> Callable[..., Any] | None:
    """The compiled function; None where the function is to run eagerly."""
    # A dispatch mode (a memory counter, a profiler) cannot see into compiled code.
    if not batch.compile or _get_current_dispatch_mode() is not None:
        return None
    flat = _flat_batches.get(batch)
    if flat is None:
        leaves, structure = pytree.tree_flatten(batch.tensors())
        key = batch.signature(), str(structure), shapes_of(leaves)
        flat = _flat_batches[batch] = _FlatBatch(leaves, structure, key)
    call = (name, shapes_of(arguments), _modes(arguments[0].device.type))
    try:
        hash((call, flat.key))
    except TypeError as error:
        raise TypeError(
            "the loss, regularizer and solvers must be hashable with compile=True, since they are the key to the "
            f"compiled code; found {error}. Make a dataclass of your own frozen."
        ) from error
    entry = flat.entries.get(call)
    if entry is None:
        # Move the entry to the end of the cache, so that the least recently used ones come first.
        entry = flat.entries[call] = _kept[call, flat.key] = _kept.pop((call, flat.key), _Entry())
        while len(_kept) > _MOST_KEPT:
            _kept.pop(next(iter(_kept)), None)
        _forget_with(_network(flat.key))
    if entry.compiled is None and not entry.failed:
        try:
            entry.compiled = _compile(function, batch, flat, arguments, kind)
        except Exception as error:  # The function still runs eagerly.
            network = _network(flat.key)
            warned = any(other.failed for (_, key), other in list(_kept.items()) if _network(key) == network)
            entry.failed = True
            if not warned:
                warnings.warn(
                    f"compile=True must have a working compiler and a network that it can trace; found "
                    f"{type(error).__name__}: {first_line(error)}. Going on without compiling.",
                    stacklevel=2,
                )
    return entry.compiled


def _forget_with(network: Hashable) -> None:
    """Drop the compiled code of a network when the network itself is garbage-collected."""
    module = network() if isinstance(network, weakref.ref) else None
    if module is not None and module not in _watched:
        _watched.add(module)
        weakref.finalize(module, _forget_collected).atexit = False


def _forget_collected() -> None:
    # Networks may be collected at any time and on any thread, also during this loop: iterate over a copy of the keys,
    # any of which may be gone already.
    for key in list(_kept):
        if isinstance(network := _network(key[1]), weakref.ref) and network() is None:
            _kept.pop(key, None)


def _network(key: Hashable) -> Hashable:
    while isinstance(key, tuple):
        key = key[0]
    return key


def _compile(
    function: Callable[..., Any],
    batch: Tasks,
    flat: _FlatBatch,
    arguments: tuple[Tensor, ...],
    kind: Callable[..., Any],
) -> Callable[..., Any]:
    results: list[pytree.TreeSpec] = []
    # Clone: two solver states may share one tensor in the first call only.
    example = [*flat.leaves, *(argument.clone() for argument in arguments)]

    def of_tensors(*tensors: Tensor) -> list[Tensor]:
        count = len(flat.leaves)
        bound = batch.bind(pytree.tree_unflatten(tensors[:count], flat.structure))
        values, form = pytree.tree_flatten(function(bound, *tensors[count:]))
        results[:] = [form]
        return values

    begin = time.perf_counter()
    with compiling, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # The compiler warns about its own internals.
        graph = record(of_tensors, example, matrix_form=batch.tasks > 1)
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in example):
            require_own_derivative(graph, of_tensors, example, _eps(arguments[0]))
        compiled: Callable[..., Any] = kind(graph, results[0], example, len(flat.leaves))
    name = getattr(function, "__qualname__", type(function).__qualname__)
    _log.info("compiled %s for %d tasks in %.0f s", name, batch.tasks, time.perf_counter() - begin)
    return compiled


def _modes(device: str) -> Hashable:
    """The state of PyTorch that a recorded graph or its compiled code depends on."""
    precision, exact = torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()
    dtypes = torch.get_default_dtype(), _autocast_dtype(device)
    return torch.is_grad_enabled(), *dtypes, precision, exact, torch.get_num_threads()


def _autocast_dtype(device: str) -> torch.dtype | None:
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _eps(tensor: Tensor) -> float:
    """The relative precision in which PyTorch computes with a tensor, autocast included."""
    return torch.finfo(_autocast_dtype(tensor.device.type) or tensor.dtype).eps
