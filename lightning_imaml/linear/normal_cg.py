"""Conjugate gradient on the normal equations."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.linalg import vector_norm

from lightning_imaml.linear.base import LinearSolution
from lightning_imaml.linear.conjugate_gradient import ConjugateGradient
from lightning_imaml.linear.krylov import KrylovSolver
from lightning_imaml.linear.operator import LinearOperator, MatVec, as_operator


@dataclass(frozen=True)
class NormalCG(KrylovSolver):
    """Conjugate gradient on Aᵀ A x = Aᵀ b (CGNR, `Hestenes and Stiefel, 1952 <https://doi.org/10.6028/jres.049.044>`_).

    It needs products with Aᵀ too and squares the condition number, and in return never breaks down on a regular A. Use
    it where :class:`GMRES` stagnates.

    Args:
        max_iter: the most iterations, a product with A and one with Aᵀ each; two more for the right-hand side and the
            residual.
        rtol: a task stops when ‖Aᵀ r‖ ≤ rtol ‖Aᵀ b‖. 0 runs all iterations.
        check_every: after how many iterations the host looks whether all tasks are done, for which it waits for the
            device; with ``rtol=0`` never. The results do not depend on it.

    Raises:
        ValueError: ``max_iter`` or ``check_every`` is below 1, or ``rtol`` is negative; in use, the operator is not
            symmetric and knows no transposed product.
    """

    max_iter: int = 20
    rtol: float = 0.0
    check_every: int = 1

    def solve(self, matvec: MatVec | LinearOperator, rhs: Tensor) -> LinearSolution:
        """Solve A x = b for every task, see :meth:`LinearSolver.solve`."""
        operator = as_operator(matvec)
        transpose = operator.transpose
        inner = ConjugateGradient(self.max_iter, self.rtol, check_every=self.check_every)
        found = inner.solve(LinearOperator(lambda vector: transpose(operator(vector))), transpose(rhs))
        broken, none = found.residual.isnan(), torch.zeros_like(found.indefinite)
        steps = 2 * found.steps + (found.steps > 0) + (vector_norm(rhs, dim=1) > 0)
        return self._measured(operator, rhs, found.value, steps, none, broken)
