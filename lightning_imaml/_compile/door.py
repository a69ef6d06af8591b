"""Functions of a batch of tasks through PyTorch's compiler, Inductor, where the user asked for it.

A function is first recorded as one flat graph of tensor operations, derivatives included
(``torch.fx.experimental.proxy_tensor.make_fx``), and the graph is compiled. So whatever can be differentiated can be
compiled, ``vmap`` and repeated differentiation too, and the code that runs without a compiler stays the only source.

We call Inductor directly, and not by ``torch.compile``. Dynamo would also trace a signal handler that fires during the
call, and the run would crash before it saved a checkpoint (still so in PyTorch 2.14.1).
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

# Below Lightning's logger, so that its handler shows compile times beside the Trainer's own messages.
_log = logging.getLogger("lightning.pytorch.lightning_imaml")
_MOST_KEPT = 256


class Tasks(Protocol):
    """A batch of tasks: tensors, and what is fixed when a function of it is compiled."""

    @property
    def compile(self) -> bool:
        """Whether functions of it are to be compiled."""

    @property
    def tasks(self) -> int:
        """The number of tasks."""

    def tensors(self) -> Any:
        """All its tensors, as a pytree."""

    def bind(self, tensors: Any) -> Self:
        """The same with other tensors."""

    def signature(self) -> Hashable:
        """Everything else that a function of it may depend on, in nested tuples whose first entry is the network."""


@dataclass
class _Kept:
    """What is known of one function at one signature and one set of shapes."""

    compiled: Callable[..., Any] | None = None
    failed: bool = False


@dataclass
class _Known:
    """A batch taken apart, so that the many calls of one solve need not do it again."""

    leaves: list[Tensor]
    structure: pytree.TreeSpec
    key: tuple[Hashable, ...]
    found: dict[Hashable, _Kept] = field(default_factory=dict)
    once: dict[Repeated, list[Tensor]] = field(default_factory=dict)


_kept: dict[tuple[Hashable, tuple[Hashable, ...]], _Kept] = {}
_watched: weakref.WeakSet[Any] = weakref.WeakSet()
_known: weakref.WeakKeyDictionary[Any, _Known] = weakref.WeakKeyDictionary()


def run(function: Callable[..., Any], batch: Tasks, *arguments: Tensor, repeated: bool = False) -> Any:
    """``function(batch, *arguments)``, compiled if the batch asks for it.

    Args:
        function: what to run.
        batch: the tasks.
        arguments: what it takes besides them.
        repeated: whether it runs many times on the same batch. Compiled, what the batch alone decides is then computed
            once, such as the features where the head alone adapts.
    """
    compiled = _compiled(_name(function), function, batch, arguments, repeated_or_whole if repeated else Whole)
    if compiled is None:
        return function(batch, *arguments)
    known = _known[batch]
    if not isinstance(compiled, Repeated):
        return compiled(*known.leaves, *arguments)
    if compiled not in known.once:
        known.once[compiled] = compiled.before(*known.leaves)
    return compiled(*arguments, *known.once[compiled])


def run_linear(function: Callable[..., tuple[Any, ...]], batch: Tasks, point: Tensor) -> tuple[Any, ...]:
    """``function(batch, point)``, which gives tensors and, last, a linear map, all compiled.

    What the map's argument does not change is computed once for all its uses.
    """

    def applied(batch: Tasks, point: Tensor, vector: Tensor) -> tuple[Tensor, ...]:
        *values, product = function(batch, point)
        return *values, product(vector)

    compiled = _compiled(_name(function), applied, batch, (point, torch.empty_like(point)), Linear)
    if compiled is None:
        return function(batch, point)
    result: tuple[Any, ...] = compiled(*_known[batch].leaves, point)
    return result


def _name(function: Callable[..., Any]) -> Hashable:
    # Methods of equal solvers are the same function; Python compares the solvers of methods by identity.
    return (function.__func__, function.__self__) if inspect.ismethod(function) else function


def _compiled(
    name: Hashable, function: Callable[..., Any], batch: Tasks, arguments: tuple[Tensor, ...], kind: Callable[..., Any]
) -> Callable[..., Any] | None:
    """The compiled function; None where it is to run as it is."""
    # A dispatch mode (a memory counter, a profiler) could not see into compiled code.
    if not batch.compile or _get_current_dispatch_mode() is not None:
        return None
    known = _known.get(batch)
    if known is None:
        leaves, structure = pytree.tree_flatten(batch.tensors())
        known = _known[batch] = _Known(leaves, structure, (batch.signature(), str(structure), shapes_of(leaves)))
    call = (name, shapes_of(arguments), _modes(arguments[0].device.type))
    try:
        hash((call, known.key))
    except TypeError as error:
        raise TypeError(
            "the loss, the regularizer and the solvers must be hashable with compile=True, so that compiled code finds "
            f"its own; found {error}. Make a dataclass of your own frozen."
        ) from error
    kept = known.found.get(call)
    if kept is None:
        # Taken out and put in again, at the end: the first are those that were not used for longest.
        kept = known.found[call] = _kept[call, known.key] = _kept.pop((call, known.key), _Kept())
        while len(_kept) > _MOST_KEPT:
            _kept.pop(next(iter(_kept)), None)
        _forget_with(_network(known.key))
    if kept.compiled is None and not kept.failed:
        try:
            kept.compiled = _compile(function, batch, known, arguments, kind)
        except Exception as error:  # Whatever the compiler cannot do, the code itself still can.
            network = _network(known.key)
            told = any(other.failed for (_, key), other in list(_kept.items()) if _network(key) == network)
            kept.failed = True
            if not told:
                warnings.warn(
                    f"compile=True must have a working compiler and a network that it can trace; found "
                    f"{type(error).__name__}: {first_line(error)}. Going on without compiling.",
                    stacklevel=2,
                )
    return kept.compiled


def _forget_with(network: Hashable) -> None:
    """See to it that what is kept of a network goes when it does."""
    module = network() if isinstance(network, weakref.ref) else None
    if module is not None and module not in _watched:
        _watched.add(module)
        weakref.finalize(module, _forget_the_dead).atexit = False


def _forget_the_dead() -> None:
    # Of a copy, and without a complaint where a key is gone: networks may go at any time, on any thread, also in here.
    for key in list(_kept):
        if isinstance(network := _network(key[1]), weakref.ref) and network() is None:
            _kept.pop(key, None)


def _network(key: Hashable) -> Hashable:
    while isinstance(key, tuple):
        key = key[0]
    return key


def _compile(
    function: Callable[..., Any], batch: Tasks, known: _Known, arguments: tuple[Tensor, ...], kind: Callable[..., Any]
) -> Callable[..., Any]:
    results: list[pytree.TreeSpec] = []
    # Clone: two solver states may share one tensor in the first call only.
    example = [*known.leaves, *(argument.clone() for argument in arguments)]

    def flat(*tensors: Tensor) -> list[Tensor]:
        count = len(known.leaves)
        same = batch.bind(pytree.tree_unflatten(tensors[:count], known.structure))
        values, form = pytree.tree_flatten(function(same, *tensors[count:]))
        results[:] = [form]
        return values

    begin = time.perf_counter()
    with compiling, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Of the compiler about itself.
        graph = record(flat, example, matrix_form=batch.tasks > 1)
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in example):
            require_own_derivative(graph, flat, example, _eps(arguments[0]))
        compiled: Callable[..., Any] = kind(graph, results[0], example, len(known.leaves))
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
    """The relative precision of what is computed from a tensor."""
    return torch.finfo(_autocast_dtype(tensor.device.type) or tensor.dtype).eps
