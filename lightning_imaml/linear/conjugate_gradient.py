"""Conjugate gradient for many systems at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.linalg import vecdot

from lightning_imaml.components.checks import require
from lightning_imaml.components.stopping import all_done
from lightning_imaml.linear.base import LinearSolution, LinearSolver, random_signs
from lightning_imaml.linear.operator import LinearOperator, MatVec, require_symmetric


@dataclass(frozen=True)
class ConjugateGradient(LinearSolver):
    r"""Conjugate gradient (`Hestenes and Stiefel, 1952 <https://doi.org/10.6028/jres.049.044>`_) from x = 0.

    .. math:: α_k = \frac{r_k^⊤ r_k}{p_k^⊤ A p_k}, \quad x_{k+1} = x_k + α_k p_k, \quad r_{k+1} = r_k - α_k A p_k, \quad
              p_{k+1} = r_{k+1} + \frac{r_{k+1}^⊤ r_{k+1}}{r_k^⊤ r_k} p_k

    Every task has its own step sizes, and masks on the device stop each task by itself. A task that meets pᵀAp ≤ 0 has
    an indefinite (or singular) system; it keeps the iterate before that direction, which may be x = 0, and reports
    ``indefinite``. A task whose product is not finite has a residual of NaN. The residual comes from the recurrence,
    which rounding lets drift from ‖b − Ax‖ over hundreds of iterations. SciPy's equivalent is
    ``scipy.sparse.linalg.cg``.

    With Jacobi's preconditioner M = diag(A), p starts from M⁻¹r, and rᵀM⁻¹r replaces rᵀr in the formulas. Only products
    with A are known, so the diagonal is estimated as the mean of z ⊙ Az over probes z of random signs
    (`Bekas et al., 2007 <https://doi.org/10.1016/j.apnum.2007.01.003>`_), the same probes in every solve and for every
    task; the estimate is exact where A is diagonal. It helps where the diagonal spreads over orders of magnitude.
    Entries below a hundredth of the mean size are raised to that size, so that M is positive definite.

    With ``preconditioner="regularizer"``, M⁻¹ is the operator's own preconditioner, which an inner problem takes from a
    :class:`~lightning_imaml.regularizers.MatrixProximal`. It costs no products, and helps where R has most of the
    curvature and most of the curvature's spread.

    Example:
        >>> diagonal = torch.tensor([[1.0, 2.0, 4.0]])  # The matrix A of a single task.
        >>> solution = ConjugateGradient(max_iter=3).solve(lambda v: diagonal * v, torch.ones(1, 3))
        >>> solution.value
        tensor([[1.0000, 0.5000, 0.2500]])

    Args:
        max_iter: the most iterations, one product with A each.
        rtol: a task stops when ‖r‖ ≤ rtol ‖b‖. 0 runs all iterations, or until r is only rounding.
        damping: solves (A + damping · I) x = b instead.
        jacobi_probes: precondition by a diagonal estimated with this many products; 0 does not.
        check_every: after how many iterations the host looks whether all tasks are done. It waits for the device when
            it looks, and never looks with ``rtol=0``. The results do not depend on it.
        preconditioner: "regularizer" preconditions by the regulariser's matrix; None does not.

    Raises:
        ValueError: ``max_iter`` or ``check_every`` is below 1, or ``rtol``, ``damping`` or ``jacobi_probes`` is
            negative, or both preconditioners are asked for; in use, the operator is not symmetric, or there is no
            regulariser with a matrix.
    """

    max_iter: int = 5
    rtol: float = 0.0
    damping: float = 0.0
    jacobi_probes: int = 0
    check_every: int = 1
    preconditioner: Literal["regularizer"] | None = None

    def __post_init__(self) -> None:
        require(self.max_iter >= 1, self, "max_iter", "at least 1", self.max_iter, "The paper uses 5.")
        require(self.rtol >= 0, self, "rtol", "zero or positive", self.rtol, "Use 0 to run all iterations.")
        require(self.damping >= 0, self, "damping", "zero or positive", self.damping, "Use 0 for no damping.")
        probes = self.jacobi_probes
        require(probes >= 0, self, "jacobi_probes", "zero or positive", probes, "Use 0 for no preconditioner.")
        require(self.check_every >= 1, self, "check_every", "at least 1", self.check_every, "Use 1 for every step.")
        found, remedy = self.preconditioner, "Leave it out, or use jacobi_probes."
        require(found in (None, "regularizer"), self, "preconditioner", "'regularizer' or None", found, remedy)
        remedy = "Leave one of them out."
        require(not (found and probes), self, "preconditioner", "None with jacobi_probes", found, remedy)

    def solve(self, matvec: MatVec | LinearOperator, rhs: Tensor) -> LinearSolution:
        """Solve A x = b for every task, see :meth:`LinearSolver.solve`."""
        operator = require_symmetric(self, matvec)
        precondition = self._preconditioner(operator, rhs)
        x = torch.zeros_like(rhs)
        r = rhs.clone()
        p = rhs.clone() if precondition is None else precondition(rhs)
        rr = norm2 = vecdot(rhs, rhs)
        rz = rr if precondition is None else vecdot(r, p)
        # A residual below rounding is noise: pᵀAp would soon be zero, and a definite system would seem singular.
        goal = norm2 * max(self.rtol, torch.finfo(rhs.dtype).eps) ** 2
        active = rr > goal
        steps = torch.full_like(rr, self.jacobi_probes, dtype=torch.long)
        indefinite = torch.zeros_like(active)
        broken = torch.zeros_like(active)
        for k in range(self.max_iter):
            product = operator(p)
            if self.damping:
                product = product + self.damping * p
            curvature = vecdot(p, product)
            steps += active
            indefinite |= active & (curvature <= 0)
            broken |= active & ~curvature.isfinite()
            active = active & (curvature > 0)
            alpha = torch.where(active, rz / curvature, 0).unsqueeze(1)
            x.addcmul_(alpha, p)
            # A finished task has a step size of zero, and zero times an infinite or NaN product would be NaN.
            r.addcmul_(alpha, product.nan_to_num(), value=-1)
            rr = vecdot(r, r)
            if k + 1 < self.max_iter:
                z = r if precondition is None else precondition(r)
                previous, rz = rz, rr if precondition is None else vecdot(r, z)
                p.mul_(torch.where(active, rz / previous, 0).unsqueeze(1)).add_(z)
            active = active & (rr > goal)
            if self.rtol > 0 and k + 1 < self.max_iter and all_done(active, k + 1, self.check_every):
                break
        residual = torch.where(norm2 == 0, 0, (rr / norm2).sqrt()).masked_fill(broken, torch.nan)
        return LinearSolution(x, steps, residual, (rr <= goal) & ~broken, indefinite)

    def _preconditioner(self, operator: LinearOperator, rhs: Tensor) -> MatVec | None:
        """The map r ↦ M⁻¹ r, ``[T, D]`` to ``[T, D]``; None without a preconditioner."""
        if self.jacobi_probes:
            scale = self._jacobi(operator, rhs)
            return lambda vector: scale * vector
        if self.preconditioner is None:
            return None
        if operator.preconditioner is None:
            raise ValueError(
                "ConjugateGradient: preconditioner='regularizer' must have a regulariser with a matrix; found none. "
                "Use Proximal or another MatrixProximal, or jacobi_probes."
            )
        return operator.preconditioner

    def _jacobi(self, operator: LinearOperator, rhs: Tensor) -> Tensor:
        """The inverse of A's estimated diagonal: ``[T, D]``."""
        diagonal = torch.zeros_like(rhs)
        for probe in random_signs(rhs, self.jacobi_probes):
            diagonal.addcmul_(probe, operator(probe))
        # The iterations report a product that is not finite, since they meet it too.
        diagonal = (diagonal / self.jacobi_probes + self.damping).abs().nan_to_num(0, 0)
        floor = diagonal.mean(dim=1, keepdim=True) / 100
        return diagonal.clamp(min=torch.where(floor > 0, floor, 1)).reciprocal()
