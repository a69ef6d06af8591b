"""Peaks of nested phases from one counter that knows a single peak."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

MONITOR = "monitor"
"""The phase in which a monitor does work of its own, which is no part of the training that others measure."""


class PeakCounter(Protocol):
    """A count of bytes in use, with the most it has been since the last reset."""

    @property
    def peak(self) -> int:
        """Most bytes in use since the last reset."""

    def reset_peak(self) -> None:
        """Let the peak start again at the bytes in use now."""


@dataclass(frozen=True)
class CudaAllocated:
    """The bytes that PyTorch's caching allocator has handed out on one CUDA device."""

    device: torch.device

    @property
    def peak(self) -> int:
        """Most bytes allocated since the last reset (``torch.cuda.max_memory_allocated``)."""
        return torch.cuda.max_memory_allocated(self.device)

    def reset_peak(self) -> None:
        """Let the peak start again at the bytes allocated now."""
        torch.cuda.reset_peak_memory_stats(self.device)


class NestedPeaks:
    """A ``PhaseListener`` that finds the peak of every phase, although phases nest and the counter has only one peak.

    The counter's peak is read and reset at each boundary between phases, and the reading is credited to all the phases
    open until then: an inner phase's reset so loses nothing of the outer one's peak, and the outer one's earlier
    peak is not mistaken for the inner one's. No device synchronisation is needed: allocation happens on the host.

    Attributes:
        peaks: phase to the most bytes in use during it, over all its occurrences; without those that have not begun.
    """

    def __init__(self, counter: PeakCounter) -> None:
        self.peaks: dict[str, int] = {}
        self._counter = counter
        self._open: list[str] = []

    def enter(self, name: str) -> None:
        """Begin the phase ``name``."""
        self._boundary()
        self._open.append(name)

    def exit(self, name: str) -> None:
        """End the phase ``name``, the one that began last."""
        self._boundary()
        self._open.pop()

    def _boundary(self) -> None:
        # Whatever happens while a monitor works is credited to nobody.
        if MONITOR not in self._open:
            peak = self._counter.peak
            for name in self._open:
                self.peaks[name] = max(self.peaks.get(name, 0), peak)
        self._counter.reset_peak()
