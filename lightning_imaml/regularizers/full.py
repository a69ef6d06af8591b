"""A full matrix in place of λ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_imaml.parameters.rows import Rows
from lightning_imaml.regularizers.cholesky import factor, scaled_identity
from lightning_imaml.regularizers.matrix import LearnedMatrix


@dataclass(frozen=True)
class FullProximal(LearnedMatrix):
    """:class:`MatrixProximal` with a full learned matrix M = L Lᵀ over all D adapted parameters, for small D.

    The strength ``log_cholesky``, ``[D, D]``, holds L: its strictly lower triangle, and the logarithms of its diagonal.
    The upper triangle of ``log_cholesky`` has no effect. A product costs D² operations a task.

    Args:
        strength: M starts as this times the identity.

    Raises:
        ValueError: ``strength`` is not a positive finite number; in use, D is above 2048.
    """

    def init(self, model: Rows) -> dict[str, Tensor]:
        """``log_cholesky``, ``[D, D]``."""
        size = sum(model.layout.sizes)
        remedy = "Use KroneckerProximal or LowRankProximal, or adapt fewer parameters."
        start = scaled_identity(self, "the number of adapted parameters", self.strength, size, model, remedy)
        return {"log_cholesky": start}

    def multiply(self, rows: Tensor, strengths: Mapping[str, Tensor]) -> Tensor:
        """L Lᵀ times every row, ``[T, D]``."""
        lower = factor(strengths["log_cholesky"])
        return rows @ lower @ lower.mT

    def solve(self, rows: Tensor, strengths: Mapping[str, Tensor]) -> Tensor:
        """(L Lᵀ)⁻¹ times every row, ``[T, D]``."""
        return torch.cholesky_solve(rows.mT, factor(strengths["log_cholesky"])).mT

    def diagonal(self, rows: Tensor, strengths: Mapping[str, Tensor]) -> Tensor:
        """The diagonal of L Lᵀ, ``[D]``."""
        return factor(strengths["log_cholesky"]).square().sum(dim=1)
