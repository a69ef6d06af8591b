"""Matrices that are known by their products alone, for linear solvers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

MatVec = Callable[[Tensor], Tensor]
"""v ↦ A v for T systems at once, ``[T, D]`` to ``[T, D]``, row by row."""


@dataclass(frozen=True, eq=False)
class LinearOperator:
    """T matrices A, one for each task, that are known by their products.

    Attributes:
        product: v ↦ A v, ``[T, D]`` to ``[T, D]``, row by row.
        symmetric: whether A = Aᵀ.
        transposed_product: v ↦ Aᵀ v; None where it is not known. A symmetric operator does not need it.
        preconditioner: v ↦ P v with P near A⁻¹, symmetric and positive definite; None where there is none.
    """

    product: MatVec
    symmetric: bool = True
    transposed_product: MatVec | None = None
    preconditioner: MatVec | None = None

    def __call__(self, vector: Tensor) -> Tensor:
        """A v."""
        return self.product(vector)

    @property
    def transpose(self) -> LinearOperator:
        """Aᵀ as an operator.

        Raises:
            ValueError: the operator is not symmetric and knows no transposed product.
        """
        if self.symmetric:
            return self
        if self.transposed_product is None:
            raise ValueError(
                "LinearOperator: transposed_product must be given where symmetric=False and the transpose is needed; "
                "found None. Pass v ↦ Aᵀ v, which torch.func.vjp gives."
            )
        return LinearOperator(self.transposed_product, False, self.product, self.preconditioner)


def as_operator(matvec: MatVec | LinearOperator) -> LinearOperator:
    """Return an operator unchanged, and a bare function as a symmetric operator without a preconditioner."""
    return matvec if isinstance(matvec, LinearOperator) else LinearOperator(matvec)


def require_symmetric(solver: object, matvec: MatVec | LinearOperator) -> LinearOperator:
    """Return ``matvec`` as an operator that a solver of symmetric systems can solve.

    Raises:
        ValueError: the operator says that it is not symmetric.
    """
    operator = as_operator(matvec)
    if not operator.symmetric:
        raise ValueError(
            f"{type(solver).__name__}: the operator must be symmetric; found symmetric=False. Use GMRES(), which "
            "solves any regular system."
        )
    return operator
