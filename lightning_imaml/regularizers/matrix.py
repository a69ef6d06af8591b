"""Regularisers that are a squared distance in a metric."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor
from torch.linalg import vecdot

from lightning_imaml.components.checks import require
from lightning_imaml.parameters.layout import Layout
from lightning_imaml.regularizers.base import Regularizer


class MatrixProximal(Regularizer):
    r"""R(φ, θ, M) = ½ (φ − θ)ᵀ M (φ − θ), with a symmetric positive definite matrix M.

    The iMAML paper names vector- and matrix-valued λ as future work (`Rajeswaran et al., 2019
    <https://arxiv.org/abs/1909.04630>`_, section 6). ∇R = M (φ − θ) and ∇²R = M, so the implicit meta-gradient is
    dQ/dθ = M u. A subclass says how M multiplies and how it is inverted: :class:`Proximal` has a diagonal M,
    :class:`FullProximal`, :class:`KroneckerProximal` and :class:`LowRankProximal` have matrices that are learned.

    ``ConjugateGradient(preconditioner="regularizer")`` preconditions by M.
    """

    @abstractmethod
    def multiply(self, rows: Tensor, strengths: Mapping[str, Tensor]) -> Tensor:
        """M times every row, ``[T, D]``."""

    @abstractmethod
    def solve(self, rows: Tensor, strengths: Mapping[str, Tensor]) -> Tensor:
        """M⁻¹ times every row, ``[T, D]``."""

    @abstractmethod
    def diagonal(self, rows: Tensor, strengths: Mapping[str, Tensor]) -> Tensor:
        """The diagonal of M, ``[D]``, with the dtype and device of ``rows``."""

    def penalty(self, parameters: Tensor, initial: Tensor, strengths: Mapping[str, Tensor]) -> Tensor:
        """½ (φ − θ)ᵀ M (φ − θ) for every task: ``[T]``."""
        distance = parameters - initial
        penalty: Tensor = vecdot(distance, self.multiply(distance, strengths)) / 2
        return penalty

    def gradient(self, parameters: Tensor, initial: Tensor, strengths: Mapping[str, Tensor]) -> Tensor:
        """M (φ − θ): ``[T, D]``."""
        return self.multiply(parameters - initial, strengths)

    def product(self, vector: Tensor, parameters: Tensor, initial: Tensor, strengths: Mapping[str, Tensor]) -> Tensor:
        """M times ``vector``: ``[T, D]``."""
        return self.multiply(vector, strengths)


@dataclass(frozen=True)
class LearnedMatrix(MatrixProximal):
    """A learned M that starts as ``strength`` times the identity, with entries in the network's own order."""

    strength: float = 2.0

    def __post_init__(self) -> None:
        kind = "a positive finite number"
        require(0 < self.strength < math.inf, self, "strength", kind, self.strength, "The paper takes 2.")

    def for_layout(self, layout: Layout) -> MatrixProximal:
        """The regulariser for rows whose entries may have another order than the network's."""
        return InNetworkOrder(self, layout) if layout.channels_last else self


@dataclass(frozen=True)
class InNetworkOrder(MatrixProximal):
    """A regulariser whose strengths follow the network's order of entries, for rows with another order.

    Attributes:
        form: the regulariser.
        layout: the layout of the rows.
    """

    form: MatrixProximal
    layout: Layout

    def multiply(self, rows: Tensor, strengths: Mapping[str, Tensor]) -> Tensor:
        """M times every row, ``[T, D]``."""
        return self.layout.row_order(self.form.multiply(self.layout.network_order(rows), strengths))

    def solve(self, rows: Tensor, strengths: Mapping[str, Tensor]) -> Tensor:
        """M⁻¹ times every row, ``[T, D]``."""
        return self.layout.row_order(self.form.solve(self.layout.network_order(rows), strengths))

    def diagonal(self, rows: Tensor, strengths: Mapping[str, Tensor]) -> Tensor:
        """The diagonal of M, ``[D]``."""
        return self.layout.row_order(self.form.diagonal(rows, strengths))
