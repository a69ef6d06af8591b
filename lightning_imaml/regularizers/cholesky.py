"""Symmetric positive definite matrices by the logarithms of their Cholesky factors."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_imaml.components.checks import require
from lightning_imaml.parameters.rows import Rows

_LARGEST = 2048


def scaled_identity(owner: object, argument: str, scale: float, size: int, model: Rows, remedy: str) -> Tensor:
    """What :func:`factor` turns into √scale · I: ``[size, size]``, with the dtype and device of the rows.

    Raises:
        ValueError: the dense matrix would be too large; the message names the owner, the argument and the remedy.
    """
    require(size <= _LARGEST, owner, argument, f"at most {_LARGEST}, since its matrix is dense", size, remedy)
    return torch.eye(size, dtype=model.dtype, device=model.device) * (math.log(scale) / 2)


def factor(log_cholesky: Tensor) -> Tensor:
    """The lower triangular L of M = L Lᵀ from any square matrix, ``[n, n]``.

    The diagonal holds the logarithms of L's diagonal, so that M is positive definite whatever the numbers are
    (`Pinheiro and Bates, 1996 <https://doi.org/10.1007/BF00140873>`_, log-Cholesky). The part above it has no effect.
    """
    return log_cholesky.tril(-1) + torch.diag_embed(log_cholesky.diagonal().exp())
