"""The generalised minimal residual method for many systems at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.linalg import vector_norm

from lightning_imaml.components.checks import require
from lightning_imaml.components.stopping import all_done
from lightning_imaml.linear.base import LinearSolution
from lightning_imaml.linear.krylov import KrylovSolver, divide
from lightning_imaml.linear.operator import LinearOperator, MatVec, as_operator


@dataclass(frozen=True)
class GMRES(KrylovSolver):
    r"""GMRES (`Saad and Schultz, 1986 <https://doi.org/10.1137/0907058>`_) from x = 0, for any regular A.

    After k iterations x minimises ‖b − Ax‖ over the Krylov space span(b, Ab, …, A^{k−1}b), so that the residual never
    grows. The basis of that space is kept: ``[restart, T, D]`` numbers. Every task stops by itself, by masks on the
    device. ``indefinite`` says that the solver met a direction v of its basis with vᵀAv ≤ 0. SciPy's equivalent is
    ``scipy.sparse.linalg.gmres``.

    Example:
        >>> matrix = torch.tensor([[[2.0, 1.0], [0.0, 3.0]]])  # A single task.
        >>> operator = LinearOperator(lambda v: (matrix @ v.unsqueeze(2)).squeeze(2), symmetric=False)
        >>> GMRES(max_iter=2).solve(operator, torch.tensor([[4.0, 3.0]])).value
        tensor([[1.5000, 1.0000]])

    Args:
        max_iter: the most iterations, one product with A each; one more measures the residual.
        restart: after how many iterations the basis is dropped, which bounds memory and slows convergence; None keeps
            all of it. Each restart costs one more product.
        rtol: a task stops when ‖r‖ ≤ rtol ‖b‖. 0 runs all iterations.
        check_every: after how many iterations the host looks whether all tasks are done, for which it waits for the
            device; with ``rtol=0`` never. The results do not depend on it.

    Raises:
        ValueError: ``max_iter``, ``restart`` or ``check_every`` is below 1, or ``rtol`` is negative.
    """

    max_iter: int = 20
    restart: int | None = None
    rtol: float = 0.0
    check_every: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.restart is None or self.restart >= 1, self, "restart", "at least 1 or None", self.restart,
            "None keeps the whole basis.",
        )  # fmt: skip

    def solve(self, matvec: MatVec | LinearOperator, rhs: Tensor) -> LinearSolution:
        """Solve A x = b for every task, see :meth:`LinearSolver.solve`."""
        operator, norm = as_operator(matvec), vector_norm(rhs, dim=1)
        x, active = torch.zeros_like(rhs), norm > 0
        steps = torch.zeros_like(norm, dtype=torch.long)
        indefinite, broken = torch.zeros_like(active), torch.zeros_like(active)
        done = 0
        while done < self.max_iter:
            residual = rhs
            if done:
                if self.rtol > 0 and all_done(active, done, 1):
                    break
                residual = rhs - operator(x)
                steps += active
            size = min(self.restart or self.max_iter, self.max_iter - done)
            cycle = _Cycle(residual, size, active)
            for k in range(size):
                cycle.extend(operator)
                done += 1
                steps += cycle.extended
                cycle.active &= cycle.last.abs() > self.rtol * norm
                if self.rtol > 0 and done < self.max_iter and all_done(cycle.active, k + 1, self.check_every):
                    break
            x = x + cycle.correction()
            indefinite, broken = indefinite | cycle.indefinite, broken | cycle.broken
            active = active & ~cycle.broken & (cycle.last.abs() > self.rtol * norm)
        return self._measured(operator, rhs, x, steps + (norm > 0), indefinite, broken)


class _Cycle:
    """The iterations between two restarts: an orthonormal basis V and A V = V H, with H made triangular by rotations.

    Attributes:
        active: which tasks go on, ``[T]``.
        extended: which tasks took the last iteration, ``[T]``.
        last: the last entry of the rotated right-hand side, ``[T]``; its size is the norm of the residual.
        indefinite: which tasks met a direction v with vᵀAv ≤ 0, ``[T]``.
        broken: which tasks met a product that is not finite, ``[T]``.
    """

    def __init__(self, residual: Tensor, size: int, active: Tensor) -> None:
        self.last = vector_norm(residual, dim=1)
        self.active = self.extended = active & (self.last > 0)
        self.indefinite, self.broken = torch.zeros_like(active), torch.zeros_like(active)
        self.basis = [divide(residual, self.last)]
        self.rotations: list[tuple[Tensor, Tensor]] = []
        # A finished task keeps the identity here, and so zeros in its part of the solution.
        self.triangle = torch.eye(size, dtype=residual.dtype, device=residual.device).repeat(len(residual), 1, 1)
        self.goal = residual.new_zeros(len(residual), size)

    def extend(self, operator: LinearOperator) -> None:
        """One iteration: one product, made orthogonal to the basis twice, and one rotation."""
        k, active = len(self.rotations), self.active
        product = operator(self.basis[k])
        self.broken |= active & ~product.isfinite().all(dim=1)
        active = self.extended = active & ~self.broken
        product, scale = product.nan_to_num(), vector_norm(product, dim=1)
        column = torch.zeros_like(self.goal[:, : k + 1])
        basis = torch.stack(self.basis, dim=1)
        for _ in range(2):
            part = (basis @ product.unsqueeze(2)).squeeze(2)
            product = product - (part.unsqueeze(1) @ basis).squeeze(1)
            column = column + part
        self.indefinite |= active & (column[:, k] <= 0)
        below = vector_norm(product, dim=1)
        # What is left after orthogonalisation of a vector of the space is rounding alone.
        below = torch.where(below > 10 * torch.finfo(below.dtype).eps * scale, below, 0)
        self.basis.append(divide(product, below))
        entries = list(column.unbind(dim=1))
        for i, (cos, sin) in enumerate(self.rotations):
            entries[i], entries[i + 1] = (
                cos * entries[i] + sin * entries[i + 1],
                cos * entries[i + 1] - sin * entries[i],
            )
        pivot = torch.hypot(entries[k], below)
        cos, sin = torch.where(pivot > 0, entries[k] / pivot, 0), torch.where(pivot > 0, below / pivot, 0)
        self.rotations.append((cos, sin))
        entries[k] = pivot
        active = active & (pivot > 0)  # Else A is singular on the space, and x stays what it was.
        column = torch.where(active.unsqueeze(1), torch.stack(entries, dim=1), self.triangle[:, : k + 1, k])
        self.triangle[:, : k + 1, k] = column
        self.goal[:, k] = torch.where(active, cos * self.last, 0)
        self.last = torch.where(active, -sin * self.last, self.last)
        self.active = active & (below > 0)

    def correction(self) -> Tensor:
        """What the cycle adds to x, ``[T, D]``."""
        weights = torch.linalg.solve_triangular(self.triangle, self.goal.unsqueeze(2), upper=True).squeeze(2)
        basis = torch.stack(self.basis[: len(self.rotations)], dim=1)
        correction: Tensor = (weights[:, : len(self.rotations)].unsqueeze(1) @ basis).squeeze(1)
        return correction
