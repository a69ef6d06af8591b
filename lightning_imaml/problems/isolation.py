"""A network's state: what a forward pass writes, put back as it was."""

from __future__ import annotations

import contextlib
import operator
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_imaml.runtime.replacements import Replacements

_CONTAINERS = (dict, list, set, deque)

Place = tuple[str, str]
"""The name of a layer in a network, empty for the network itself, and an attribute of the layer."""


class Snapshot:
    """The state of a network: attributes, registered tensors and hooks of all layers, and the values of its buffers.

    Attributes that are dictionaries, lists, sets or deques are compared and restored by what they hold. Objects of
    other kinds are the user's own, and their insides are left alone.

    Args:
        network: the network.
        values: whether to copy the values of buffers and of tensors among the attributes, so that what is written in
            place can be restored.
    """

    def __init__(self, network: nn.Module, values: bool = True) -> None:
        self._layers = [_Layer(name, layer) for name, layer in network.named_modules()]
        self._tensors: list[tuple[Place, Tensor, int, Tensor]] = []
        if values:
            self._tensors = [
                ((layer.name, key), tensor, tensor._version, tensor.detach().clone())
                for layer in self._layers
                for key, tensor in _own_tensors(layer.attributes)
                if not tensor.is_inference()
            ]

    def changes(self) -> list[Place]:
        """What differs by now, attributes and entries of ``_buffers`` by their names."""
        found = [place for place, tensor, version, _ in self._tensors if tensor._version != version]
        for layer in self._layers:
            if not layer.is_same():
                found += [(layer.name, key) for key in layer.changes()]
        return sorted(set(found))

    def restore(self) -> None:
        """Put everything back."""
        for layer in self._layers:
            if not layer.is_same():
                layer.restore()
        with torch.no_grad():
            for _, tensor, version, value in self._tensors:
                if tensor._version != version:
                    tensor.copy_(value)


class _Layer:
    """The attributes of one layer, and shallow copies of those that are containers."""

    def __init__(self, name: str, layer: nn.Module) -> None:
        self.name, self.held = name, vars(layer)
        self.attributes = attributes = self.held.copy()
        containers = [(key, value) for key, value in attributes.items() if isinstance(value, _CONTAINERS)]
        # Most of them are the empty ones of nn.Module.
        self.empty = [value for _, value in containers if not value]
        self.filled = {key: value.copy() for key, value in containers if value}

    def is_same(self) -> bool:
        """Whether nothing has changed."""
        held, attributes = self.held, self.attributes
        return (
            held.keys() == attributes.keys()
            and all(map(operator.is_, held.values(), attributes.values()))
            and not any(self.empty)
            and all(_same(attributes[key], before) for key, before in self.filled.items())
        )

    def changes(self) -> list[str]:
        """The names of attributes, buffers, parameters and submodules that have changed."""
        held, attributes = self.held, self.attributes
        found = [key for key in held.keys() | attributes.keys() if held.get(key) is not attributes.get(key)]
        for key, container in attributes.items():
            before = self.filled.get(key, type(container)()) if isinstance(container, _CONTAINERS) else None
            if before is None or _same(container, before):
                continue
            registered = key in ("_buffers", "_parameters", "_modules")
            found += _differences(container, before) if registered else [key]
        return found

    def restore(self) -> None:
        """Put everything back, in the order that it had."""
        self.held.clear()
        self.held.update(self.attributes)
        for container in self.empty:
            container.clear()
        for key, before in self.filled.items():
            container = self.attributes[key]
            if not _same(container, before):
                container.clear()
                (container.update if isinstance(before, (dict, set)) else container.extend)(before)


def _own_tensors(attributes: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    buffers = attributes.get("_buffers", {})
    yield from ((key, value) for held in (buffers, attributes) for key, value in held.items() if _plain(value))


def _plain(value: object) -> bool:
    return isinstance(value, Tensor) and not isinstance(value, nn.Parameter)


def _same(now: Any, before: Any) -> bool:
    """Whether two containers hold the same objects in the same order."""
    if isinstance(before, set):
        return bool(now == before)
    if len(now) != len(before):
        return False
    if isinstance(before, dict):
        return list(now) == list(before) and all(map(operator.is_, now.values(), before.values()))
    return all(map(operator.is_, now, before))


def _differences(now: Any, before: Any) -> list[str]:
    return [key for key in now.keys() | before.keys() if now.get(key) is not before.get(key)]


@dataclass
class Traits:
    """What the first calls of a network, in one choice of the training modes of its layers, or of a loss have shown.

    Attributes:
        replaced: whether it calls a function that :class:`~lightning_imaml.runtime.replacements.Replacements`
            replaces; None where no call has been watched yet.
        writes: what ``forward`` writes: attributes and buffers.
        differentiates: whether ``forward`` takes derivatives by itself, so that it needs a graph.
        checked: for which parameters and inputs the network has been checked.
    """

    replaced: bool | None = None
    writes: tuple[Place, ...] = ()
    differentiates: bool = False
    checked: set[Any] = field(default_factory=set)


_traits: weakref.WeakKeyDictionary[nn.Module, dict[tuple[bool, ...], Traits]] = weakref.WeakKeyDictionary()

_of_losses: weakref.WeakKeyDictionary[Any, Traits] = weakref.WeakKeyDictionary()


def traits_of(network: nn.Module) -> Traits:
    """What is known of a network in its present training modes."""
    modes = tuple(layer.training for layer in network.modules())
    return _traits.setdefault(network, {}).setdefault(modes, Traits())


def traits_of_loss(loss: Any) -> Traits:
    """What is known of a loss function."""
    try:
        return _of_losses.setdefault(loss, Traits())
    except TypeError:  # It cannot be a key, and is watched in every call.
        return Traits()


@contextlib.contextmanager
def replacing(traits: Traits) -> Iterator[None]:
    """Replace functions within the block, until a call has shown that there is nothing to replace."""
    if traits.replaced is False:
        yield
        return
    with Replacements() as replacements:
        yield
    traits.replaced = bool(traits.replaced) or replacements.used


@contextlib.contextmanager
def untouched(network: nn.Module, traits: Traits) -> Iterator[None]:
    """Put the network's state back at the end of the block, and note what was written.

    Args:
        network: the network.
        traits: where to note it.
    """
    before = Snapshot(network)
    try:
        yield
    finally:
        written = before.changes()
        if written:
            traits.writes = tuple(sorted({*traits.writes, *written}))
            before.restore()


class _Written:
    """Stands for what ``forward`` stored, while a loss runs: a tensor of one task would not be that of another."""

    def __init__(self, network: nn.Module, place: Place) -> None:
        vars(self)["_message"] = (
            f"a loss must depend on outputs and targets alone, since tasks are computed side by side; found that it "
            f"reads {'.'.join(filter(None, place))!r}, which {type(network).__name__}.forward stores. Return it with "
            "the outputs, as a tuple, and take it from there in the loss."
        )

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError(vars(self)["_message"])

    __getattr__ = __call__ = __getitem__ = __iter__ = __len__ = __bool__ = __float__ = __int__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __neg__ = _refuse
    __pow__ = __rpow__ = __matmul__ = __rmatmul__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse

    @classmethod
    def __torch_function__(cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in [*args, *(kwargs or {}).values()]:
            for part in value if isinstance(value, (list, tuple)) else [value]:
                if isinstance(part, _Written):
                    part._refuse()
        return NotImplemented


@contextlib.contextmanager
def unreadable(network: nn.Module, places: tuple[Place, ...]) -> Iterator[None]:
    """Let an error say so where code in the block reads what ``forward`` has written."""
    held: list[tuple[dict[str, Any], str, Any]] = []
    for place in places:
        name, key = place
        layer = network.get_submodule(name)
        where: dict[str, Any] = layer._buffers if key in layer._buffers else vars(layer)
        held.append((where, key, where.get(key, held)))
        where[key] = _Written(network, place)
    try:
        yield
    finally:
        for where, key, value in reversed(held):
            where.pop(key) if value is held else where.__setitem__(key, value)
