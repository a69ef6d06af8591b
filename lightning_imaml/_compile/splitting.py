"""Compile recorded functions: as a whole, or cut where their last arguments come in.

A function that runs many times on one batch computes once what depends on the batch alone. A function that is linear in
its last argument computes once what does not depend on that argument.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch
import torch._inductor
from torch import Tensor, fx
from torch.utils import _pytree as pytree

# Inductor must run in one thread at a time. ``torch.compile`` would take such a lock; we call Inductor directly.
compiling = threading.RLock()
# These operations take most of a network's time: a graph is cut only where that saves one of them.
_WORK = {getattr(torch.ops.aten, name) for name in ("convolution", "mm", "bmm", "addmm", "baddbmm")}


class Whole:
    """A recorded function, compiled as a whole."""

    def __init__(self, graph: fx.GraphModule, form: pytree.TreeSpec, example: list[Tensor], fixed: int) -> None:
        self.form = form
        self.function = _inductor(graph)
        _compile_now(self.function(*example), example)

    def __call__(self, *tensors: Tensor) -> Any:
        return pytree.tree_unflatten(self.function(*tensors), self.form)


class Repeated:
    """A recorded function of (batch, arguments), cut where the arguments come in."""

    def __init__(
        self, before: fx.GraphModule, after: fx.GraphModule, form: pytree.TreeSpec, example: list[Tensor], fixed: int
    ) -> None:
        self.form = form
        self.before, self.after = _inductor(before), _inductor(after)
        _compile_now(self.after(*example[fixed:], *self.before(*example[:fixed])), example)

    def __call__(self, *tensors: Tensor) -> Any:
        return pytree.tree_unflatten(self.after(*tensors), self.form)


def repeated_or_whole(
    graph: fx.GraphModule, form: pytree.TreeSpec, example: list[Tensor], fixed: int
) -> Repeated | Whole:
    """Cut a graph after the ``fixed`` tensors of the batch, where that saves work; else keep it whole."""
    inputs, outputs = _ends(graph)
    # Every call must draw new random numbers.
    random = [node for node in graph.graph.nodes if _has(node, torch.Tag.nondeterministic_seeded)]
    late = _late(graph, [*inputs[fixed:], *random])
    saves = any(n not in late and getattr(n.target, "overloadpacket", None) in _WORK for n in graph.graph.nodes)
    if not saves:
        return Whole(graph, form, example, fixed)
    before, after = _cut(graph, late, inputs[:fixed], inputs[fixed:], [], outputs)
    return Repeated(before, after, form, example, fixed)


class Linear:
    """A recorded function of (…, vector), cut where the vector comes in; the last result alone is linear in it."""

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
    """Compile a graph anew for each new kind of input tensors, and run it."""
    kinds: dict[Hashable, Callable[..., Any]] = {}

    def call(*tensors: Tensor) -> Any:
        kind = torch.is_grad_enabled(), shapes_of(tensors)
        if kind not in kinds:
            with compiling:
                kinds[kind] = torch._inductor.compile(graph, list(tensors))
        return kinds[kind](*tensors)

    return call


def _compile_now(results: list[Tensor], example: list[Tensor]) -> None:
    """Compile the derivative of results too, where there is one: a later failure would end the run."""
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
    # An operation that Inductor fuses into its reader costs less to compute again than to pass on.
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


def shapes_of(tensors: Iterable[Tensor]) -> Hashable:
    return tuple((t.shape, t.stride(), t.dtype, t.device, t.requires_grad) for t in tensors)
