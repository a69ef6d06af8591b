"""The stabilised bi-conjugate gradient method for many systems at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.linalg import vecdot, vector_norm

from lightning_imaml.components.stopping import all_done
from lightning_imaml.linear.base import LinearSolution
from lightning_imaml.linear.krylov import KrylovSolver
from lightning_imaml.linear.operator import LinearOperator, MatVec, as_operator


@dataclass(frozen=True)
class BiCGStab(KrylovSolver):
    """BiCGSTAB (`van der Vorst, 1992 <https://doi.org/10.1137/0913035>`_) from x = 0, for A that is not symmetric.

    It keeps a few vectors, whatever the number of iterations, where :class:`GMRES` keeps one for each. Its residual may
    grow in between. It can break down by a division by zero: the task then keeps the x that it has, and is not
    converged. SciPy's equivalent is ``scipy.sparse.linalg.bicgstab``.

    Args:
        max_iter: the most iterations, two products with A each; one more product measures the residual.
        rtol: a task stops when ‖r‖ ≤ rtol ‖b‖. 0 runs all iterations.
        check_every: after how many iterations the host looks whether all tasks are done, for which it waits for the
            device; with ``rtol=0`` never. The results do not depend on it.

    Raises:
        ValueError: ``max_iter`` or ``check_every`` is below 1, or ``rtol`` is negative.
    """

    max_iter: int = 20
    rtol: float = 0.0
    check_every: int = 1

    def solve(self, matvec: MatVec | LinearOperator, rhs: Tensor) -> LinearSolution:
        """Solve A x = b for every task, see :meth:`LinearSolver.solve`."""
        operator, norm = as_operator(matvec), vector_norm(rhs, dim=1)
        eps = torch.finfo(rhs.dtype).eps
        x, r, p = torch.zeros_like(rhs), rhs.clone(), rhs.clone()
        rho, active = norm.square(), norm > 0
        steps = torch.zeros_like(norm, dtype=torch.long)
        indefinite, broken = torch.zeros_like(active), torch.zeros_like(active)

        def times(vector: Tensor) -> Tensor:
            nonlocal active, broken, indefinite, steps
            product = operator(vector)
            steps += active
            broken |= active & ~product.isfinite().all(dim=1)
            active = active & ~broken
            product = product.nan_to_num()
            indefinite |= active & (vecdot(vector, product) <= 0)
            return product

        for k in range(self.max_iter):
            v = times(p)
            shadow = vecdot(rhs, v)
            active = active & (shadow.abs() > eps * norm * vector_norm(v, dim=1))
            alpha = torch.where(active, rho / shadow, 0).unsqueeze(1)
            x, s = x + alpha * p, r - alpha * v
            small = vector_norm(s, dim=1) <= max(self.rtol, eps) * norm
            r, active = torch.where(active.unsqueeze(1), s, r), active & ~small
            t = times(r)
            omega = torch.where(active, vecdot(t, r) / vecdot(t, t), 0).nan_to_num()
            x, r = x + omega.unsqueeze(1) * r, r - omega.unsqueeze(1) * t
            following = vecdot(rhs, r)
            left = vector_norm(r, dim=1)
            active = active & (omega != 0) & (following.abs() > eps * norm * left) & (left > max(self.rtol, eps) * norm)
            beta = torch.where(active, following / rho * (alpha.squeeze(1) / omega), 0).unsqueeze(1)
            p, rho = r + beta * (p - omega.unsqueeze(1) * v), torch.where(active, following, rho)
            if self.rtol > 0 and k + 1 < self.max_iter and all_done(active, k + 1, self.check_every):
                break
        return self._measured(operator, rhs, x, steps + (norm > 0), indefinite, broken)
