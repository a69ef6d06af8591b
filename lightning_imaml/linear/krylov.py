"""What Krylov solvers share: their checks, and the residual that they measure at the end."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.linalg import vector_norm

from lightning_imaml.components.checks import require
from lightning_imaml.linear.base import LinearSolution, LinearSolver
from lightning_imaml.linear.operator import LinearOperator


class KrylovSolver(LinearSolver):
    """A solver with a number of iterations and a tolerance, whose residual is measured at its end."""

    max_iter: int
    rtol: float
    check_every: int

    def __post_init__(self) -> None:
        require(self.max_iter >= 1, self, "max_iter", "at least 1", self.max_iter, "Each iteration improves x.")
        require(self.rtol >= 0, self, "rtol", "zero or positive", self.rtol, "Use 0 to run all iterations.")
        require(self.check_every >= 1, self, "check_every", "at least 1", self.check_every, "Use 1 for every step.")

    def _measured(
        self, operator: LinearOperator, rhs: Tensor, x: Tensor, steps: Tensor, indefinite: Tensor, broken: Tensor
    ) -> LinearSolution:
        """The solution with its true residual ‖b − A x‖ / ‖b‖, for one more product.

        Args:
            operator: A.
            rhs: b, ``[T, D]``.
            x: ``[T, D]``.
            steps: the products that each task used, ``[T]``.
            indefinite: which tasks met a direction p with pᵀAp ≤ 0, ``[T]``.
            broken: which tasks met a product that is not finite, ``[T]``.
        """
        norm = vector_norm(rhs, dim=1)
        error = vector_norm(rhs - operator(x), dim=1)
        residual = torch.where(norm == 0, 0, error / norm).masked_fill(broken, torch.nan)
        converged = residual <= self.rtol + 10 * torch.finfo(rhs.dtype).eps  # NaN compares false.
        return LinearSolution(x, steps, residual, converged, indefinite)


def divide(rows: Tensor, by: Tensor) -> Tensor:
    """Rows ``[T, D]`` over their own divisors ``[T]``; zero where the divisor is zero, which ends a Krylov space."""
    return rows * torch.where(by != 0, 1 / by, 0).unsqueeze(1)
