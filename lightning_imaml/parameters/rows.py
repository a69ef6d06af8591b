"""What regularisers and solvers know of a network whose parameters are rows."""

from __future__ import annotations

from typing import Protocol

import torch

from lightning_imaml.parameters.layout import Layout


class Rows(Protocol):
    """Rows ``[T, D]`` of parameters: which ones, and of which kind."""

    @property
    def layout(self) -> Layout:
        """The parameters of a row, one after the other."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of rows."""

    @property
    def device(self) -> torch.device:
        """Where rows are."""
