"""The proximal regulariser of iMAML."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_imaml.component import require
from lightning_imaml.regularizers.base import Regularizer

if TYPE_CHECKING:
    from lightning_imaml.tasks import FlatModel


@dataclass(frozen=True)
class Proximal(Regularizer):
    r"""R(φ, θ, λ) = λ/2 ‖φ − θ‖² (`iMAML <https://arxiv.org/abs/1909.04630>`_, eq. 3).

    Args:
        strength: λ > 0, or its first value where it is learned.
        learned: learn λ by its implicit gradient. Its logarithm ``log_strength`` is the parameter, which keeps λ
            positive.

    Raises:
        ValueError: ``strength`` is not a positive finite number.
    """

    strength: float = 2.0
    learned: bool = False

    def __post_init__(self) -> None:
        positive = math.isfinite(self.strength) and self.strength > 0
        remedy = (
            "At λ = 0 the inner solution does not depend on θ: use an estimator without an implicit system instead."
        )
        require(positive, self, "strength", "a positive finite number", self.strength, remedy)

    def init(self, model: FlatModel) -> dict[str, Tensor]:
        """``log_strength``, a scalar, where λ is learned."""
        if not self.learned:
            return {}
        return {"log_strength": torch.tensor(math.log(self.strength), dtype=model.dtype, device=model.device)}

    def penalty(self, parameters: Tensor, initial: Tensor, strengths: Mapping[str, Tensor]) -> Tensor:
        """λ/2 ‖φ − θ‖² for every task: ``[T]``."""
        return (parameters - initial).square().sum(dim=1) * (self._strength(strengths) / 2)

    def gradient(self, parameters: Tensor, initial: Tensor, strengths: Mapping[str, Tensor]) -> Tensor:
        """λ (φ − θ): ``[T, D]``."""
        return (parameters - initial) * self._strength(strengths)

    def product(self, vector: Tensor, parameters: Tensor, initial: Tensor, strengths: Mapping[str, Tensor]) -> Tensor:
        """λ times ``vector``: ``[T, D]``."""
        return vector * self._strength(strengths)

    def _strength(self, strengths: Mapping[str, Tensor]) -> Tensor | float:
        return strengths["log_strength"].exp() if self.learned else self.strength
