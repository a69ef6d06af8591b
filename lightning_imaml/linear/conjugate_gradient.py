"""Conjugate gradient for many systems at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.linalg import vecdot

from lightning_imaml.component import require
from lightning_imaml.linear.base import LinearSolution, LinearSolver, MatVec


@dataclass(frozen=True)
class ConjugateGradient(LinearSolver):
    r"""Conjugate gradient (`Hestenes and Stiefel, 1952 <https://doi.org/10.6028/jres.049.044>`_) from x = 0.

    .. math:: α_k = \frac{r_k^⊤ r_k}{p_k^⊤ A p_k}, \quad x_{k+1} = x_k + α_k p_k, \quad r_{k+1} = r_k - α_k A p_k, \quad
              p_{k+1} = r_{k+1} + \frac{r_{k+1}^⊤ r_{k+1}}{r_k^⊤ r_k} p_k

    Every task has its own step sizes and stops by itself, by masks on the device: the host never waits for a value. A
    task that meets pᵀAp ≤ 0 has an indefinite (or singular) system; it keeps the iterate it had, x = 0 if that is the
    first direction, and reports ``indefinite``. A task whose product is not finite has a residual of NaN. The residual
    is that of the recurrence, which rounding lets drift from ‖b − Ax‖ over hundreds of iterations. SciPy's equivalent
    is ``scipy.sparse.linalg.cg``.

    Args:
        max_iter: the most iterations, one product with A each.
        rtol: a task stops when ‖r‖ ≤ rtol ‖b‖. 0 runs all iterations.
        damping: solves (A + damping · I) x = b instead.

    Raises:
        ValueError: ``max_iter`` is below 1, or ``rtol`` or ``damping`` is negative.
    """

    max_iter: int = 5
    rtol: float = 0.0
    damping: float = 0.0

    def __post_init__(self) -> None:
        require(self.max_iter >= 1, self, "max_iter", "at least 1", self.max_iter, "The paper uses 5.")
        require(self.rtol >= 0, self, "rtol", "zero or positive", self.rtol, "Use 0 to run all iterations.")
        require(self.damping >= 0, self, "damping", "zero or positive", self.damping, "Use 0 for no damping.")

    def solve(self, matvec: MatVec, rhs: Tensor) -> LinearSolution:
        """Solve A x = b for every task, see :meth:`LinearSolver.solve`."""
        x = torch.zeros_like(rhs)
        r = rhs.clone()
        p = rhs.clone()
        rr = norm2 = vecdot(rhs, rhs)
        goal = norm2 * self.rtol**2
        active = rr > goal
        steps = torch.zeros_like(rr, dtype=torch.long)
        indefinite = torch.zeros_like(active)
        broken = torch.zeros_like(active)
        for k in range(self.max_iter):
            product = matvec(p)
            if self.damping:
                product = product + self.damping * p
            curvature = vecdot(p, product)
            steps += active
            indefinite |= active & (curvature <= 0)
            broken |= active & ~curvature.isfinite()
            active = active & (curvature > 0)
            alpha = torch.where(active, rr / curvature, 0).unsqueeze(1)
            x.addcmul_(alpha, p)
            # A finished task has a step size of zero, but its product may be infinite or NaN.
            r.addcmul_(alpha, product.nan_to_num(), value=-1)
            previous, rr = rr, vecdot(r, r)
            if k + 1 < self.max_iter:
                p.mul_(torch.where(active, rr / previous, 0).unsqueeze(1)).add_(r)
            active = active & (rr > goal)
        residual = torch.where(norm2 == 0, 0, (rr / norm2).sqrt()).masked_fill(broken, torch.nan)
        return LinearSolution(x, steps, residual, (rr <= goal) & ~broken, indefinite)
