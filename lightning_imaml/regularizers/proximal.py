"""The proximal regulariser of iMAML, with one strength, or one for each group of parameters or each entry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_imaml.parameters.layout import Layout
from lightning_imaml.parameters.positive import Bounds, Granularity, Positive, Value, place, require_positive
from lightning_imaml.parameters.rows import Rows
from lightning_imaml.regularizers.matrix import MatrixProximal


@dataclass(frozen=True)
class Proximal(MatrixProximal):
    r"""R(φ, θ, λ) = λ/2 ‖φ − θ‖² (`iMAML <https://arxiv.org/abs/1909.04630>`_, eq. 3); or Σ_j λ_j/2 (φ_j − θ_j)².

    ``Proximal(2.0)`` is the paper's regulariser. ``Proximal({"features.*": 2.0, "*": 0.1}, learned=True)`` learns two
    strengths, ``Proximal(2.0, learned=True, per="layer")`` learns one for each layer, weight and bias together, and
    ``per="parameter"`` learns one for each single weight.

    Example:
        >>> from lightning_imaml import IMAMLModule
        >>> module = IMAMLModule(torch.nn.Linear(8, 5), regularizer=Proximal(2.0, learned=True, per="parameter"))
        >>> {name: value.shape for name, value in module.strengths.items()}
        {'log_strength': torch.Size([45])}

    Args:
        strength: λ > 0, or its first value where it is learned; or one λ for each pattern over parameter names. The
            first pattern that matches a name counts; a tied parameter matches by any of its names.
        learned: learn λ by its gradient. Its logarithm ``log_strength`` is the parameter, which keeps λ positive.
        per: "layer" learns a strength for each layer, which is all parameters that one module holds itself (a root
            module with parameters outside its submodules is a layer too). "parameter" learns one for each entry of the
            parameters. None learns one for each pattern, or one for the whole model where ``strength`` is a number.
        bounds: the lowest and the highest value of learned strengths. The parameter is then ``logit_strength``, s in
            λ = a (b/a)^σ(s) for bounds (a, b): strengths near a bound move slowly, but always have a gradient.

    Raises:
        ValueError: ``strength`` is not a positive finite number or lies outside the bounds, or ``per`` or ``bounds``
            stands without ``learned``; in use, a pattern matches no parameter, or a parameter no pattern.
    """

    strength: Value = 2.0
    learned: bool = False
    per: Granularity | None = None
    bounds: Bounds | None = None

    def __post_init__(self) -> None:
        remedy = "At λ = 0 the inner solution does not depend on θ: use an estimator without an implicit system."
        require_positive(self, "strength", self.strength, self.learned, self.per, self.bounds, remedy)

    def init(self, model: Rows) -> dict[str, Tensor]:
        """The learned parameter: a scalar, one number for each group, or one for each entry ``[D]``."""
        return self._placed(model.layout).init(model)

    def for_layout(self, layout: Layout) -> MatrixProximal:
        """The regulariser with the strengths of these rows."""
        return DiagonalProximal(self._placed(layout))

    def multiply(self, rows: Tensor, strengths: Mapping[str, Tensor]) -> Tensor:
        """Every row times λ, ``[T, D]``, for a single λ."""
        return DiagonalProximal(self._placed(None)).multiply(rows, strengths)

    def solve(self, rows: Tensor, strengths: Mapping[str, Tensor]) -> Tensor:
        """Every row divided by λ, ``[T, D]``, for a single λ."""
        return DiagonalProximal(self._placed(None)).solve(rows, strengths)

    def diagonal(self, rows: Tensor, strengths: Mapping[str, Tensor]) -> Tensor:
        """λ for every entry, ``[D]``, for a single λ."""
        return DiagonalProximal(self._placed(None)).diagonal(rows, strengths)

    def _placed(self, layout: Layout | None) -> Positive:
        return place("strength", self.strength, self.learned, self.per, self.bounds, layout)


@dataclass(frozen=True)
class DiagonalProximal(MatrixProximal):
    """:class:`Proximal` for rows with a known layout: M = diag(λ)."""

    strength: Positive

    def multiply(self, rows: Tensor, strengths: Mapping[str, Tensor]) -> Tensor:
        """Every row times λ, ``[T, D]``."""
        return rows * self.strength.values(strengths, rows)

    def solve(self, rows: Tensor, strengths: Mapping[str, Tensor]) -> Tensor:
        """Every row divided by λ, ``[T, D]``."""
        return rows / self.strength.values(strengths, rows)

    def diagonal(self, rows: Tensor, strengths: Mapping[str, Tensor]) -> Tensor:
        """λ for every entry, ``[D]``."""
        return torch.ones_like(rows[0]) * self.strength.values(strengths, rows)
