"""A diagonal plus a matrix of low rank in place of λ."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_imaml.components.checks import require
from lightning_imaml.parameters.rows import Rows
from lightning_imaml.regularizers.matrix import LearnedMatrix

# The share of λ that U Uᵀ starts with; a factor of zero would have no gradient.
_START = 0.01


@dataclass(frozen=True)
class LowRankProximal(LearnedMatrix):
    r""":class:`MatrixProximal` with M = diag(d) + U Uᵀ, where U is ``[D, rank]``.

    Memory and time are linear in D, so it fits whole networks. Woodbury's formula inverts M:

    .. math:: M^{-1} v = Δ v - Δ U (I + U^⊤ Δ U)^{-1} U^⊤ Δ v, \quad Δ = \operatorname{diag}(d)^{-1}

    The strengths are ``log_diagonal`` ``[D]``, the logarithm of d, and ``factor`` ``[D, rank]``, which
    starts from small random numbers, the same in every run.

    Args:
        strength: the first value of d.
        rank: the number of columns of U.

    Raises:
        ValueError: ``strength`` is not a positive finite number, or ``rank`` is below 1.
    """

    rank: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.rank >= 1, self, "rank", "at least 1", self.rank, "For a diagonal, use Proximal(per='parameter').")

    def init(self, model: Rows) -> dict[str, Tensor]:
        """``log_diagonal`` and ``factor``."""
        size = sum(model.layout.sizes)
        diagonal = torch.full((size,), math.log(self.strength), dtype=model.dtype, device=model.device)
        # A generator with its own seed gives the same numbers on every rank and device, and leaves the user's alone.
        random = torch.randn(size, self.rank, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        factor = random * math.sqrt(_START * self.strength / size)
        return {"log_diagonal": diagonal, "factor": factor.to(diagonal)}

    def multiply(self, rows: Tensor, strengths: Mapping[str, Tensor]) -> Tensor:
        """(diag(d) + U Uᵀ) times every row, ``[T, D]``."""
        factor = strengths["factor"]
        return rows * strengths["log_diagonal"].exp() + rows @ factor @ factor.mT

    def solve(self, rows: Tensor, strengths: Mapping[str, Tensor]) -> Tensor:
        """(diag(d) + U Uᵀ)⁻¹ times every row, ``[T, D]``."""
        factor, inverse = strengths["factor"], (-strengths["log_diagonal"]).exp()
        scaled = factor * inverse.unsqueeze(1)
        inner = torch.eye(self.rank, dtype=rows.dtype, device=rows.device) + factor.mT @ scaled
        # I + UᵀΔU is always positive definite; the check of ``cholesky`` would make the host wait for the device.
        small = torch.cholesky_solve((rows @ scaled).mT, torch.linalg.cholesky_ex(inner).L)
        return rows * inverse - small.mT @ scaled.mT

    def diagonal(self, rows: Tensor, strengths: Mapping[str, Tensor]) -> Tensor:
        """The diagonal of M, ``[D]``."""
        return strengths["log_diagonal"].exp() + strengths["factor"].square().sum(dim=1)
