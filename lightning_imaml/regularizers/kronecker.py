"""Kronecker-factored matrices in place of λ, one for each weight."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_imaml.parameters.layout import Layout
from lightning_imaml.parameters.rows import Rows
from lightning_imaml.regularizers.cholesky import factor, scaled_identity
from lightning_imaml.regularizers.matrix import LearnedMatrix, MatrixProximal


@dataclass(frozen=True)
class KroneckerProximal(LearnedMatrix):
    """:class:`MatrixProximal` with a block M = A ⊗ B for each weight, and a diagonal block for each vector.

    A weight counts as a matrix W, ``[out, in]``, the kernel of a convolution as ``[out, in · height · width]``. Then
    (A ⊗ B) vec W = A W B, where A ``[out, out]`` and B ``[in, in]`` are symmetric positive definite and learned, as in
    K-FAC's curvature (`Martens and Grosse, 2015 <https://arxiv.org/abs/1503.05671>`_). Biases and the scales of
    normalisations have one strength for each entry. A product costs 2 (out + in) operations for each entry of a weight.

    A weight ``a.b`` has the strengths ``a/b/rows`` for A and ``a/b/columns`` for B, both in the form of
    :class:`~lightning_imaml.regularizers.FullProximal`; a vector has ``a/b/log_diagonal``.

    Args:
        strength: M starts as this times the identity.

    Raises:
        ValueError: ``strength`` is not a positive finite number; in use, a side of a weight is above 2048.
    """

    def init(self, model: Rows) -> dict[str, Tensor]:
        """A and B, or the diagonal, of every parameter."""
        found: dict[str, Tensor] = {}
        remedy = "Use Proximal(per='parameter') or LowRankProximal, or adapt other layers."
        for name, shape in zip(model.layout.names, model.layout.shapes, strict=True):
            if len(shape) < 2:
                start = torch.full((math.prod(shape),), math.log(self.strength), dtype=model.dtype, device=model.device)
                found[_key(name, "log_diagonal")] = start
                continue
            for part, size in (("rows", shape[0]), ("columns", math.prod(shape[1:]))):
                argument, scale = f"the {part} of {name!r}", self.strength**0.5
                found[_key(name, part)] = scaled_identity(self, argument, scale, size, model, remedy)
        return found

    def for_layout(self, layout: Layout) -> MatrixProximal:
        """The regulariser with the blocks of these parameters."""
        return _Blocks(layout)

    def multiply(self, rows: Tensor, strengths: Mapping[str, Tensor]) -> Tensor:
        """Refuse: the blocks belong to parameters.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "KroneckerProximal: the layout must be known, since each block belongs to a parameter; found rows alone. "
            "Use for_layout(layout)."
        )

    solve = diagonal = multiply


@dataclass(frozen=True)
class _Blocks(MatrixProximal):
    """:class:`KroneckerProximal` for rows with a known layout."""

    layout: Layout

    def multiply(self, rows: Tensor, strengths: Mapping[str, Tensor]) -> Tensor:
        def of_matrix(part: Tensor, a: Tensor, b: Tensor) -> Tensor:
            return a @ (a.mT @ part @ b) @ b.mT

        return self._by_block(rows, strengths, torch.mul, of_matrix)

    def solve(self, rows: Tensor, strengths: Mapping[str, Tensor]) -> Tensor:
        def of_matrix(part: Tensor, a: Tensor, b: Tensor) -> Tensor:
            left = torch.cholesky_solve(part, a.expand(len(part), -1, -1))
            return torch.cholesky_solve(left.mT, b.expand(len(part), -1, -1)).mT

        return self._by_block(rows, strengths, torch.div, of_matrix)

    def diagonal(self, rows: Tensor, strengths: Mapping[str, Tensor]) -> Tensor:
        def of_matrix(part: Tensor, a: Tensor, b: Tensor) -> Tensor:
            return torch.outer(a.square().sum(dim=1), b.square().sum(dim=1))

        return self._by_block(rows[:1], strengths, lambda part, diagonal: diagonal, of_matrix)[0]

    def _by_block(
        self,
        rows: Tensor,
        strengths: Mapping[str, Tensor],
        of_vector: Callable[[Tensor, Tensor], Tensor],
        of_matrix: Callable[[Tensor, Tensor, Tensor], Tensor],
    ) -> Tensor:
        """Apply ``of_vector`` to each vector and its diagonal, ``of_matrix`` to each weight and its two factors."""
        named = {}
        for name, part in self.layout.unflatten(rows).items():
            log_diagonal = strengths.get(_key(name, "log_diagonal"))
            if log_diagonal is not None:
                block = of_vector(part.reshape(len(part), -1), log_diagonal.exp())
            else:
                a, b = (factor(strengths[_key(name, side)]) for side in ("rows", "columns"))
                block = of_matrix(part.flatten(2), a, b)
            named[name] = block.reshape(part.shape)
        return self.layout.flatten(named)


def _key(name: str, part: str) -> str:
    # Names in a ParameterDict have no dots.
    return f"{name.replace('.', '/')}/{part}"
