"""The Neumann series."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.linalg import vecdot, vector_norm

from lightning_imaml.components.checks import require
from lightning_imaml.linear.base import LinearSolution, LinearSolver, random_signs
from lightning_imaml.linear.operator import LinearOperator, MatVec, require_symmetric

_POWER_STEPS = 5
_MARGIN = 1.2


@dataclass(frozen=True)
class Neumann(LinearSolver):
    r"""The truncated Neumann series (`Lorraine et al., 2020 <https://arxiv.org/abs/1911.02590>`_, eq. 8).

    .. math:: x = η \sum_{j=0}^{\text{terms} - 1} (I - ηA)^j b

    It converges where A is positive definite and η < 2/λ_max. A task whose terms grow stops, keeps the sum before that
    term, and counts as not converged. Without ``step``, η is about 1/λ_max, which 5 power iterations (5 more products)
    estimate for every task with a margin of 20 %.

    Args:
        terms: how many terms; each but the first costs one product with A, and the residual costs one more.
        step: η; None estimates it.
        rtol: a task is converged when ‖b − Ax‖ ≤ rtol ‖b‖.

    Raises:
        ValueError: ``terms`` is below 1, ``step`` is not positive or ``rtol`` is negative.
    """

    terms: int
    step: float | None = None
    rtol: float = 0.0

    def __post_init__(self) -> None:
        require(self.terms >= 1, self, "terms", "at least 1", self.terms, "More terms are more exact.")
        require(self.step is None or self.step > 0, self, "step", "positive or None", self.step, "None estimates it.")
        require(self.rtol >= 0, self, "rtol", "zero or positive", self.rtol, "It only decides what is converged.")

    def solve(self, matvec: MatVec | LinearOperator, rhs: Tensor) -> LinearSolution:
        """Solve A x = b for every task, see :meth:`LinearSolver.solve`."""
        operator = require_symmetric(self, matvec)
        norm = size = vector_norm(rhs, dim=1)
        steps = torch.zeros_like(norm, dtype=torch.long)
        if self.step is None:
            eta = _inverse_norm(operator, rhs)
            steps += _POWER_STEPS * (norm > 0)
        else:
            eta = torch.full_like(norm, self.step)
        term, x = rhs.clone(), torch.zeros_like(rhs)
        active = norm > 0
        indefinite = torch.zeros_like(active)
        broken = ~norm.isfinite()
        for _ in range(self.terms):
            x.addcmul_(torch.where(active, eta, 0).unsqueeze(1), term)
            product = operator(term)
            steps += active
            indefinite |= active & (vecdot(term, product) <= 0)
            # After k terms, b − Ax is the next term, so the residual costs nothing more.
            following = torch.addcmul(term, eta.unsqueeze(1), product, value=-1)
            reached = vector_norm(following, dim=1)
            broken |= active & ~reached.isfinite()
            # Take back the last term where it made the residual worse or is not finite.
            worse = active & ~(reached < size)
            x.addcmul_(torch.where(worse, -eta, 0).unsqueeze(1), term)
            active = active & ~worse
            term = torch.where(active.unsqueeze(1), following, term)
            size = torch.where(active, reached, size)
        residual = torch.where(norm == 0, 0, size / norm).masked_fill(broken, torch.nan)
        return LinearSolution(x, steps, residual, residual <= self.rtol, indefinite)


def _inverse_norm(matvec: MatVec, rhs: Tensor) -> Tensor:
    """An estimate of 1/λ_max for every task, ``[T]``."""
    # Start from b plus random signs, since b may be orthogonal to the largest eigenvector. They are shorter than b, so
    # that they cannot cancel it.
    (signs,) = random_signs(rhs, 1)
    v = rhs + 0.5 * vector_norm(rhs, dim=1, keepdim=True) / rhs.shape[1] ** 0.5 * signs
    for _ in range(_POWER_STEPS):
        v = v / vector_norm(v, dim=1, keepdim=True).clamp(min=torch.finfo(v.dtype).tiny)
        v = matvec(v)
    inverse: Tensor = (_MARGIN * vector_norm(v, dim=1)).clamp(min=torch.finfo(v.dtype).tiny).reciprocal()
    return inverse
