"""Kronecker-factored matrices in place of λ, one for each weight."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_imaml.parameters.layout import Layout
from lightning_imaml.parameters.rows import Rows
from lightning_imaml.regularizers.cholesky import factor, require_positive, require_small, scaled_identity
from lightning_imaml.regularizers.matrix import MatrixProximal


@dataclass(frozen=True)
class KroneckerProximal(MatrixProximal):
    """:class:`MatrixProximal` with M = A ⊗ B for each weight, block by block, and a diagonal for each vector.

    A weight is viewed as a matrix W, ``[out, in]``, the kernel of a convolution as ``[out, in · height · width]``; then
    (A ⊗ B) vec W = A W B, with A ``[out, out]`` and B ``[in, in]``, both symmetric positive definite and learned, as
    in K-FAC's curvature (`Martens and Grosse, 2015 <https://arxiv.org/abs/1503.05671>`_). Biases and the scales of
    normalisations have one strength an entry. A product costs 2 (out + in) operations for each entry of a weight.

    The strengths of a parameter ``a.b`` are ``a/b/rows`` (A) and ``a/b/columns`` (B), see
    :class:`~lightning_imaml.regularizers.FullProximal`, or ``a/b/log_diagonal``.

    Args:
        strength: M starts as this times the identity.

    Raises:
        ValueError: ``strength`` is not a positive finite number; in use, a side of a weight is above 2048.
    """

    strength: float = 2.0

    def __post_init__(self) -> None:
        require_positive(self, self.strength)

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
                require_small(self, f"the {part} of {name!r}", size, remedy)
                found[_key(name, part)] = scaled_identity(self.strength**0.5, size, model.dtype, model.device)
        return found

    def for_layout(self, layout: Layout) -> MatrixProximal:
        """The same with the blocks of these parameters."""
        return _Blocks(layout)

    def multiply(self, rows: Tensor, strengths: Mapping[str, Tensor]) -> Tensor:
        """Refuse: the blocks belong to parameters."""
        raise _without_layout()

    def solve(self, rows: Tensor, strengths: Mapping[str, Tensor]) -> Tensor:
        """Refuse: the blocks belong to parameters."""
        raise _without_layout()

    def diagonal(self, rows: Tensor, strengths: Mapping[str, Tensor]) -> Tensor:
        """Refuse: the blocks belong to parameters."""
        raise _without_layout()


@dataclass(frozen=True)
class _Blocks(MatrixProximal):
    layout: Layout

    def multiply(self, rows: Tensor, strengths: Mapping[str, Tensor]) -> Tensor:
        def block(name: str, part: Tensor) -> Tensor:
            diagonal = strengths.get(_key(name, "log_diagonal"))
            if diagonal is not None:
                return part.reshape(len(part), -1) * diagonal.exp()
            a, b = _factors(name, strengths)
            return a @ (a.mT @ part.flatten(2) @ b) @ b.mT

        return self._by_block(rows, block)

    def solve(self, rows: Tensor, strengths: Mapping[str, Tensor]) -> Tensor:
        def block(name: str, part: Tensor) -> Tensor:
            diagonal = strengths.get(_key(name, "log_diagonal"))
            if diagonal is not None:
                return part.reshape(len(part), -1) / diagonal.exp()
            a, b = _factors(name, strengths)
            left = torch.cholesky_solve(part.flatten(2), a.expand(len(part), -1, -1))
            return torch.cholesky_solve(left.mT, b.expand(len(part), -1, -1)).mT

        return self._by_block(rows, block)

    def diagonal(self, rows: Tensor, strengths: Mapping[str, Tensor]) -> Tensor:
        def block(name: str, part: Tensor) -> Tensor:
            diagonal = strengths.get(_key(name, "log_diagonal"))
            if diagonal is not None:
                return diagonal.exp()
            a, b = (lower.square().sum(dim=1) for lower in _factors(name, strengths))
            return torch.outer(a, b)

        return self._by_block(rows[:1], block)[0]

    def _by_block(self, rows: Tensor, block: Callable[[str, Tensor], Tensor]) -> Tensor:
        parts = self.layout.unflatten(rows)
        named = {name: block(name, part).reshape(part.shape) for name, part in parts.items()}
        return self.layout.flatten(named)


def _key(name: str, part: str) -> str:
    # Module parameters have no dots in their names.
    return f"{name.replace('.', '/')}/{part}"


def _factors(name: str, strengths: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    return factor(strengths[_key(name, "rows")]), factor(strengths[_key(name, "columns")])


def _without_layout() -> ValueError:
    return ValueError(
        "KroneckerProximal: the network must be known, since its blocks belong to parameters; found rows alone. Use "
        "what for_layout(layout) returns."
    )
