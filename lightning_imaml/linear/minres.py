"""The minimum residual method for many systems at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.linalg import vecdot, vector_norm

from lightning_imaml.components.stopping import all_done
from lightning_imaml.linear.base import LinearSolution
from lightning_imaml.linear.krylov import KrylovSolver, divide
from lightning_imaml.linear.operator import LinearOperator, MatVec, require_symmetric


@dataclass(frozen=True)
class MinRes(KrylovSolver):
    """MINRES (`Paige and Saunders, 1975 <https://doi.org/10.1137/0712047>`_) from x = 0, for indefinite systems too.

    The Lanczos process makes A tridiagonal, and Givens rotations minimise ‖b − Ax‖ over the Krylov space, so that the
    residual never grows. ``indefinite`` comes from the signs of the tridiagonal matrix's pivots: it says that A has a
    direction of negative curvature in that space. Masks on the device stop each task by itself. SciPy's equivalent is
    ``scipy.sparse.linalg.minres``.

    Args:
        max_iter: the most iterations, one product with A each; one more product measures the residual.
        rtol: a task stops when ‖r‖ ≤ rtol ‖b‖. 0 runs all iterations.
        check_every: after how many iterations the host looks whether all tasks are done. It waits for the device when
            it looks, and never looks with ``rtol=0``. The results do not depend on it.

    Raises:
        ValueError: ``max_iter`` or ``check_every`` is below 1, or ``rtol`` is negative.
    """

    max_iter: int = 5
    rtol: float = 0.0
    check_every: int = 1

    def solve(self, matvec: MatVec | LinearOperator, rhs: Tensor) -> LinearSolution:
        """Solve A x = b for every task, see :meth:`LinearSolver.solve`."""
        operator = require_symmetric(self, matvec)
        norm = vector_norm(rhs, dim=1)
        zero = torch.zeros_like(norm)
        x = torch.zeros_like(rhs)
        direction, older_direction = torch.zeros_like(rhs), torch.zeros_like(rhs)
        older, v = torch.zeros_like(rhs), divide(rhs, norm)
        phi, beta, cos, sin, delta, epsilon, pivot = norm, zero, zero - 1, zero, zero, zero, zero
        active = norm > 0
        scale = zero
        steps = torch.zeros_like(norm, dtype=torch.long)
        indefinite = torch.zeros_like(active)
        broken = torch.zeros_like(active)
        for k in range(self.max_iter):
            # Lanczos: A v_k = β_k v_{k-1} + α_k v_k + β_{k+1} v_{k+1}.
            product = operator(v)
            broken |= active & ~product.isfinite().all(dim=1)
            product = product.nan_to_num()
            alpha = vecdot(v, product)
            pivot = alpha - torch.where(pivot != 0, beta.square() / pivot, 0)
            indefinite |= active & (pivot <= 0)
            product = product - alpha.unsqueeze(1) * v - beta.unsqueeze(1) * older
            beta = vector_norm(product, dim=1)
            older, v = v, divide(product, beta)
            # The rotations of the last two columns, then this column's own.
            second, first = cos * delta + sin * alpha, sin * delta - cos * alpha
            pulled, epsilon, delta = epsilon, sin * beta, -cos * beta
            gamma = torch.hypot(first, beta)
            # A γ below rounding means that the Krylov space is exhausted or A is singular in it: the rest is noise.
            scale = torch.maximum(scale, torch.maximum(alpha.abs(), beta))
            noise = 10 * torch.finfo(rhs.dtype).eps * scale
            cos, sin = torch.where(gamma > 0, first / gamma, 0), torch.where(gamma > 0, beta / gamma, 0)
            following = divide(older - second.unsqueeze(1) * direction - pulled.unsqueeze(1) * older_direction, gamma)
            older_direction, direction = direction, following
            moving = active & (gamma > noise)
            steps += active
            x.addcmul_(torch.where(moving, cos * phi, 0).unsqueeze(1), direction)
            phi = torch.where(moving, sin * phi, phi)
            active = moving & (phi > self.rtol * norm) & (beta > noise)
            if self.rtol > 0 and k + 1 < self.max_iter and all_done(active, k + 1, self.check_every):
                break
        # This solver makes references, so it measures the residual instead of trusting the recurrence's phi.
        return self._measured(operator, rhs, x, steps, indefinite, broken)
