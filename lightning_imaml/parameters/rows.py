"""The part of a network over rows of parameters that regularisers and solvers see."""

from __future__ import annotations

from typing import Protocol

import torch

from lightning_imaml.parameters.layout import Layout


class Rows(Protocol):
    """Rows ``[T, D]`` of parameters: their layout, dtype and device."""

    @property
    def layout(self) -> Layout:
        """Where each parameter lies in a row."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of rows."""

    @property
    def device(self) -> torch.device:
        """Where rows are."""
