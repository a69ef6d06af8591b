"""Where the parameters of a network lie in a row."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """The parameters of a row ``[D]``, one after the other.

    Attributes:
        names: their names in the network.
        shapes: their shapes in the network.
        channels_last: whether rows hold the weights of 2-d convolutions as ``[out, height, width, in]``, the order in
            which compiled convolutions read them.
        tied: for a parameter with several names, each further name with the one in ``names``.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    channels_last: bool = False
    tied: tuple[tuple[str, str], ...] = ()

    def names_of(self, name: str) -> list[str]:
        """All names of a parameter, the one in ``names`` first."""
        return [name, *(other for other, first in self.tied if first == name)]

    @property
    def sizes(self) -> list[int]:
        """The number of entries of each parameter."""
        return [math.prod(shape) for shape in self.shapes]

    def unflatten(self, rows: Tensor) -> dict[str, Tensor]:
        """Cut ``[..., D]`` into named tensors ``[..., *shape]``."""
        # The backward of one split is one concatenation; that of a slice for each parameter fills a [T, D] for each.
        pieces = torch.split(rows, self.sizes, dim=-1)
        named = {}
        for name, piece, shape in zip(self.names, pieces, self.shapes, strict=True):
            if self._moved(shape):
                out, channels, height, width = shape
                piece = piece.reshape(*rows.shape[:-1], out, height, width, channels).movedim(-1, -3)
            else:
                piece = piece.reshape(*rows.shape[:-1], *shape)
            named[name] = piece
        return named

    def flatten(self, named: Mapping[str, Tensor]) -> Tensor:
        """The inverse of :meth:`unflatten`: tensors ``[..., *shape]`` to ``[..., D]``."""
        pieces = []
        for name, shape in zip(self.names, self.shapes, strict=True):
            tensor = named[name]
            leading = tensor.shape[: tensor.ndim - len(shape)]
            pieces.append((tensor.movedim(-3, -1) if self._moved(shape) else tensor).reshape(*leading, -1))
        return torch.cat(pieces, dim=-1)

    def network_order(self, rows: Tensor) -> Tensor:
        """``[..., D]`` with the entries of each parameter in the network's own order."""
        return self._in_network_order().flatten(self.unflatten(rows)) if self._reordered() else rows

    def row_order(self, rows: Tensor) -> Tensor:
        """The inverse of :meth:`network_order`."""
        return self.flatten(self._in_network_order().unflatten(rows)) if self._reordered() else rows

    def _in_network_order(self) -> Layout:
        return Layout(self.names, self.shapes)

    def _reordered(self) -> bool:
        # Where nothing moves, rows stay as they are: Inductor of PyTorch 2.14 computes wrong gradients of a vector that
        # is cut and put together again unchanged.
        return any(self._moved(shape) for shape in self.shapes)

    def _moved(self, shape: tuple[int, ...]) -> bool:
        return self.channels_last and len(shape) == 4
