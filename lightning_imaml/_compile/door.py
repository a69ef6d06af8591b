"""Functions of a batch of tasks through PyTorch's compiler, Inductor, where the user asked for it.

A function is first recorded as one flat graph of tensor operations, derivatives included
(``torch.fx.experimental.proxy_tensor.make_fx``), and the graph is compiled. So whatever can be differentiated can be
compiled, ``vmap`` and repeated differentiation too, and the code that runs without a compiler stays the only source.

Not by ``torch.compile``: Dynamo has nothing left to do on a graph, and around each call it takes any Python code for a
part of it, also the handler of a signal that comes in just then, which would end with an error before it has saved.
"""

from __future__ import annotations

import inspect
import logging
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch._inductor
from torch import Tensor, fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _get_current_dispatch_mode

from lightning_imaml._compile.recording import record, require_own_derivative

if TYPE_CHECKING:
    from typing_extensions import Self

# Below Lightning's logger, so that its handler shows compile times beside the Trainer's own messages.
_log = logging.getLogger("lightning.pytorch.lightning_imaml")
_MOST_KEPT = 256
# PyTorch's compiler is one for all threads, which Dynamo would see to.
_compiling = threading.RLock()
# What makes it worth to cut a graph: the operations that take most of a network's time.
_WORK = {getattr(torch.ops.aten, name) for name in ("convolution", "mm", "bmm", "addmm", "baddbmm")}


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
    once: dict[_Repeated, list[Tensor]] = field(default_factory=dict)


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
    compiled = _compiled(_name(function), function, batch, arguments, _repeated if repeated else _Whole)
    if compiled is None:
        return function(batch, *arguments)
    known = _known[batch]
    if not isinstance(compiled, _Repeated):
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

    compiled = _compiled(_name(function), applied, batch, (point, torch.empty_like(point)), _Linear)
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
        known = _known[batch] = _Known(leaves, structure, (batch.signature(), str(structure), _shapes(leaves)))
    call = (name, _shapes(arguments), _modes(arguments[0].device.type))
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
    # Copies: arguments that are one tensor here, as two states of a solver may be at its start, later are not.
    example = [*known.leaves, *(argument.clone() for argument in arguments)]

    def flat(*tensors: Tensor) -> list[Tensor]:
        count = len(known.leaves)
        same = batch.bind(pytree.tree_unflatten(tensors[:count], known.structure))
        values, form = pytree.tree_flatten(function(same, *tensors[count:]))
        results[:] = [form]
        return values

    begin = time.perf_counter()
    with _compiling, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Of the compiler about itself.
        graph = record(flat, example, matrix_form=batch.tasks > 1)
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in example):
            require_own_derivative(graph, flat, example, _eps(arguments[0]))
        compiled: Callable[..., Any] = kind(graph, results[0], example, len(known.leaves))
    name = getattr(function, "__qualname__", type(function).__qualname__)
    _log.info("compiled %s for %d tasks in %.0f s", name, batch.tasks, time.perf_counter() - begin)
    return compiled


class _Whole:
    """A recorded function, compiled as it is."""

    def __init__(self, graph: fx.GraphModule, form: pytree.TreeSpec, example: list[Tensor], fixed: int) -> None:
        self.form = form
        self.function = _inductor(graph)
        _compile_now(self.function(*example), example)

    def __call__(self, *tensors: Tensor) -> Any:
        return pytree.tree_unflatten(self.function(*tensors), self.form)


class _Repeated:
    """A recorded function of (batch, arguments), cut where the arguments come in."""

    def __init__(
        self, before: fx.GraphModule, after: fx.GraphModule, form: pytree.TreeSpec, example: list[Tensor], fixed: int
    ) -> None:
        self.form = form
        self.before, self.after = _inductor(before), _inductor(after)
        _compile_now(self.after(*example[fixed:], *self.before(*example[:fixed])), example)

    def __call__(self, *tensors: Tensor) -> Any:
        return pytree.tree_unflatten(self.after(*tensors), self.form)


def _repeated(graph: fx.GraphModule, form: pytree.TreeSpec, example: list[Tensor], fixed: int) -> _Repeated | _Whole:
    """Cut after the ``fixed`` tensors of the batch, where that saves something."""
    inputs, outputs = _ends(graph)
    # Random numbers are drawn anew in every call.
    random = [node for node in graph.graph.nodes if _has(node, torch.Tag.nondeterministic_seeded)]
    late = _late(graph, [*inputs[fixed:], *random])
    saves = any(n not in late and getattr(n.target, "overloadpacket", None) in _WORK for n in graph.graph.nodes)
    if not saves:
        return _Whole(graph, form, example, fixed)
    before, after = _cut(graph, late, inputs[:fixed], inputs[fixed:], [], outputs)
    return _Repeated(before, after, form, example, fixed)


class _Linear:
    """A recorded function of (…, vector), whose last result alone is linear in it, cut where the vector comes in."""

    def __init__(self, graph: fx.GraphModule, form: pytree.TreeSpec, example: list[Tensor], fixed: int) -> None:
        (*inputs, vector), (*values, result) = _ends(graph)
        before, after = _cut(graph, _late(graph, [vector]), inputs, [vector], values, [result])
        self.before, self.after, self.values = _inductor(before), _inductor(after), len(values)
        *_, product = self(*example[:-1])
        product(example[-1])

    def __call__(self, *tensors: Tensor) -> tuple[Any, ...]:
        found = self.before(*tensors)
        values, needed = found[: self.values], found[self.values :]

        def product(vector: Tensor) -> Tensor:
            result: list[Tensor] = self.after(vector, *needed)
            return result[0]

        return *values, product


def _inductor(graph: fx.GraphModule) -> Callable[..., Any]:
    """A graph that is compiled when it meets tensors of another kind, and run."""
    kinds: dict[Hashable, Callable[..., Any]] = {}

    def call(*tensors: Tensor) -> Any:
        kind = torch.is_grad_enabled(), _shapes(tensors)
        if kind not in kinds:
            with _compiling:
                kinds[kind] = torch._inductor.compile(graph, list(tensors))
        return kinds[kind](*tensors)

    return call


def _compile_now(results: list[Tensor], example: list[Tensor]) -> None:
    """Compile the derivative of results too, where there is one: later, nobody could go on without it if that fails."""
    ends = [result for result in results if result.requires_grad]
    if ends:
        starts = [tensor for tensor in example if tensor.requires_grad]
        torch.autograd.grad(ends, starts, [torch.ones_like(end) for end in ends], allow_unused=True)


def _ends(graph: fx.GraphModule) -> tuple[list[fx.Node], list[fx.Node]]:
    """The inputs and the outputs of a graph."""
    inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
    (output,) = [node for node in graph.graph.nodes if node.op == "output"]
    return inputs, list(output.args[0])


def _late(graph: fx.GraphModule, starts: list[fx.Node]) -> set[fx.Node]:
    """Some nodes and all that depend on them."""
    late = set(starts)
    for node in graph.graph.nodes:
        if node.op != "output" and late.intersection(node.all_input_nodes):
            late.add(node)
    return late


def _cut(
    graph: fx.GraphModule,
    late: set[fx.Node],
    early_inputs: list[fx.Node],
    late_inputs: list[fx.Node],
    early_outputs: list[fx.Node],
    late_outputs: list[fx.Node],
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Cut a graph into (*early inputs) ↦ [*early outputs, *needed] and (*late inputs, *needed) ↦ [*late outputs]."""
    # What the compiler fuses into its reader costs less to compute again than to hand over.
    queue, again = [*late_outputs, *late], set[fx.Node]()
    needed: dict[fx.Node, None] = {}
    while queue:
        for source in queue.pop().all_input_nodes:
            if source in late or source in again or source in needed:
                continue
            if _is_fused(source):
                again.add(source)
                queue.append(source)
            else:
                needed[source] = None
    needed |= {output: None for output in late_outputs if output not in late}

    def build(starts: list[fx.Node], kept: Callable[[fx.Node], bool], ends: list[fx.Node]) -> fx.GraphModule:
        part, copies = fx.Graph(), {}
        for node in starts:
            copies[node] = part.placeholder(node.name)
            copies[node].meta = dict(node.meta)
        for node in graph.graph.nodes:
            if node.op in ("call_function", "get_attr") and node not in copies and kept(node):
                copies[node] = part.node_copy(node, copies.__getitem__)
        part.output([copies[node] for node in ends])
        part.eliminate_dead_code()
        return fx.GraphModule(graph, part)

    before = build(early_inputs, lambda node: node not in late, [*early_outputs, *needed])
    after = build([*late_inputs, *needed], lambda node: node in late or node in again, late_outputs)
    return before, after


def _is_fused(node: fx.Node) -> bool:
    operation = node.target
    return isinstance(operation, torch._ops.OpOverload) and (operation.is_view or _has(node, torch.Tag.pointwise))


def _has(node: fx.Node, tag: torch.Tag) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and tag in node.target.tags


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


def _shapes(tensors: Iterable[Tensor]) -> Hashable:
    return tuple((t.shape, t.stride(), t.dtype, t.device, t.requires_grad) for t in tensors)


def first_line(error: Exception) -> str:
    """An error's message without the rest of its story."""
    return (str(error).splitlines() or ["no message"])[0].rstrip(".")
