"""Hooks of Lightning in which a module has a part of its own, which no override loses.

Lightning's documentation overrides hooks without ``super()``. What ours do would be lost in silence then: a scheduler
by epochs would never step. So the part runs once in every call, whether or not an override calls ``super()``.
"""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

from lightning.pytorch import LightningModule

Hook = TypeVar("Hook", bound=Callable[..., Any])
When = Literal["first", "last"]
_parts: dict[Any, When] = {}
_completed: weakref.WeakSet[Any] = weakref.WeakSet()  # A subclass of a notebook must not be kept.
_RUNNING = "_hooks_running"  # By name: whether the part has run in this call of an override.


def own_part(when: When) -> Callable[[Hook], Hook]:
    """Mark a hook whose body runs in every call of it, before an override's own or after, unless that calls it."""

    def mark(hook: Hook) -> Hook:
        @functools.wraps(hook)
        def part(self: Any, *args: Any, **kwargs: Any) -> Any:
            running = self.__dict__.get(_RUNNING, {})
            if running.get(hook.__name__):
                return None
            if hook.__name__ in running:
                running[hook.__name__] = True
            return hook(self, *args, **kwargs)

        _parts[part] = when
        return part  # type: ignore[return-value]

    return mark


class OwnParts(LightningModule):
    """A module whose hooks marked by :func:`own_part` are complete in every subclass."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        parts: dict[str, Any] = {}
        for base in cls.__mro__:
            for name, value in vars(base).items():
                if isinstance(value, types.FunctionType) and value in _parts:
                    parts.setdefault(name, value)
        for name, part in parts.items():
            override = getattr(cls, name)
            if override is not part and override not in _completed:
                setattr(cls, name, _complete(name, override, part))


def _complete(name: str, override: Callable[..., Any], part: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(override)
    def hook(self: Any, *args: Any, **kwargs: Any) -> Any:
        running = self.__dict__.setdefault(_RUNNING, {})
        if name in running:  # An override of an override, which completes the call.
            return override(self, *args, **kwargs)
        running[name] = False
        try:
            if _parts[part] == "first":
                part(self, *args, **kwargs)
            result = override(self, *args, **kwargs)
            added = None if running[name] else part(self, *args, **kwargs)
            return result if added is None else [*_listed(result), *_listed(added)]
        finally:
            del running[name]

    _completed.add(hook)
    return hook


def _listed(value: Any) -> Sequence[Any]:
    if value is None:
        return []
    return value if isinstance(value, Sequence) else [value]
