"""Dense factorisation, for small systems and for references."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_imaml.linear.base import LinearSolution, LinearSolver
from lightning_imaml.linear.operator import LinearOperator, MatVec


@dataclass(frozen=True)
class Direct(LinearSolver):
    """Builds A from D products and solves it by LU factorisation, definite or not.

    It needs T·D² numbers and D products, so it fits small D: references, tests, heads. ``indefinite`` comes from the
    smallest eigenvalue of A's symmetric part. A task whose system is singular gets x = 0 and counts as not converged.
    SciPy's equivalent is ``scipy.linalg.solve``.
    """

    def solve(self, matvec: MatVec | LinearOperator, rhs: Tensor) -> LinearSolution:
        """Solve A x = b for every task, see :meth:`LinearSolver.solve`."""
        size = rhs.shape[1]
        columns = [
            matvec(unit.expand_as(rhs).contiguous()) for unit in torch.eye(size, dtype=rhs.dtype, device=rhs.device)
        ]
        matrix = torch.stack(columns, dim=2)
        value, failed = torch.linalg.solve_ex(matrix, rhs)
        value = torch.where(failed.unsqueeze(1) > 0, 0, value)
        norm = rhs.norm(dim=1)
        error = (rhs - (matrix @ value.unsqueeze(2)).squeeze(2)).norm(dim=1)
        residual = torch.where(norm == 0, 0, error / norm)
        # LU is backward stable: a larger residual means that the system is singular to working precision.
        converged = residual <= size * torch.finfo(rhs.dtype).eps * 1e3
        symmetric = ((matrix + matrix.transpose(1, 2)) / 2).nan_to_num()
        indefinite = torch.linalg.eigvalsh(symmetric)[:, 0] <= 0
        return LinearSolution(value, torch.full_like(norm, size, dtype=torch.long), residual, converged, indefinite)
