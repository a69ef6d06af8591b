"""Find the peaks of nested phases with a counter that has a single peak."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

MONITOR = "monitor"
"""The phase of a monitor's own work, which does not count as training."""


class PeakCounter(Protocol):
    """A counter of the bytes in use, and of their peak since the last reset."""

    @property
    def peak(self) -> int:
        """The most bytes in use since the last reset."""

    def reset_peak(self) -> None:
        """Start a new peak at the bytes in use now."""


@dataclass(frozen=True)
class CudaAllocated:
    """The bytes that PyTorch's caching allocator has handed out on one CUDA device."""

    device: torch.device

    @property
    def peak(self) -> int:
        """The most bytes allocated since the last reset (``torch.cuda.max_memory_allocated``)."""
        return torch.cuda.max_memory_allocated(self.device)

    def reset_peak(self) -> None:
        """Start a new peak at the bytes allocated now."""
        torch.cuda.reset_peak_memory_stats(self.device)


class NestedPeaks:
    """A ``PhaseListener`` that finds the peak of every phase, although phases nest and the counter has only one peak.

    Each boundary between phases reads and resets the counter's peak, and credits it to all phases that were open until
    then. So the reset of an inner phase loses nothing of the outer phase's peak, and the outer phase's earlier peak
    does not count for the inner phase. The host allocates memory, so the device need not be synchronised.

    Attributes:
        peaks: phase to the most bytes in use during it, over all its occurrences.
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
        # Memory that a monitor uses counts for no phase.
        if MONITOR not in self._open:
            peak = self._counter.peak
            for name in self._open:
                self.peaks[name] = max(self.peaks.get(name, 0), peak)
        self._counter.reset_peak()
