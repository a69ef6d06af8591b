"""Named phases of a meta-step, so that profilers and memory monitors can tell them apart."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch

INNER_LOOP = "inner_loop"
LINEAR_SOLVE = "linear_solve"
META_STEP = "meta_step"


class PhaseListener(Protocol):
    """An object that hears when a phase begins and ends; phases nest."""

    def enter(self, name: str) -> None:
        """Hear that the phase ``name`` begins."""

    def exit(self, name: str) -> None:
        """Hear that the phase ``name`` ends, also when it ends by an exception."""


_listeners: list[PhaseListener] = []


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Mark the enclosed code as the phase ``name`` for listeners and for ``torch.profiler``."""
    entered = list(_listeners)
    with torch.profiler.record_function(f"lightning_imaml.{name}"):
        for listener in entered:
            listener.enter(name)
        try:
            yield
        finally:
            for listener in reversed(entered):
                listener.exit(name)


@contextmanager
def listening(listener: PhaseListener) -> Iterator[None]:
    """Tell ``listener`` about every phase that begins in the enclosed code."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)
