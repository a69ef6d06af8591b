"""Symmetric positive definite matrices by the logarithms of their Cholesky factors."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_imaml.components.checks import require

_LARGEST = 2048


def scaled_identity(scale: float, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What :func:`factor` turns to √scale · I, ``[size, size]``."""
    return torch.eye(size, dtype=dtype, device=device) * (math.log(scale) / 2)


def factor(log_cholesky: Tensor) -> Tensor:
    """The lower triangular L of M = L Lᵀ from any square matrix, ``[n, n]``.

    Its diagonal holds the logarithms of L's, so that M is positive definite whatever the numbers are
    (`Pinheiro and Bates, 1996 <https://doi.org/10.1007/BF00140873>`_, log-Cholesky); the part above is not used.
    """
    return log_cholesky.tril(-1) + torch.diag_embed(log_cholesky.diagonal().exp())


def require_small(owner: object, what: str, size: int, remedy: str) -> None:
    """Raise a ValueError if a dense matrix of this size would be too large."""
    require(size <= _LARGEST, owner, what, f"at most {_LARGEST}, since its matrix is dense", size, remedy)


def require_positive(owner: object, strength: float) -> None:
    """Raise a ValueError unless a matrix may start as this times the identity."""
    positive = math.isfinite(strength) and strength > 0
    require(positive, owner, "strength", "a positive finite number", strength, "The paper takes 2.")
