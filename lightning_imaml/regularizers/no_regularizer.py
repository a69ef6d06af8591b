"""No regulariser, for the methods without a proximal term."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_imaml.regularizers.base import Regularizer


@dataclass(frozen=True)
class NoRegularizer(Regularizer):
    """R = 0: the inner problem is the support loss alone, as in MAML, first-order MAML and Reptile.

    ``Implicit`` refuses it: without R the inner solution does not depend on the initialisation.
    """

    def penalty(self, parameters: Tensor, initial: Tensor, strengths: Mapping[str, Tensor]) -> Tensor:
        """Zero for every task: ``[T]``."""
        return parameters.new_zeros(parameters.shape[0])

    def gradient(self, parameters: Tensor, initial: Tensor, strengths: Mapping[str, Tensor]) -> Tensor:
        """Zero: ``[T, D]``."""
        return torch.zeros_like(parameters)

    def product(self, vector: Tensor, parameters: Tensor, initial: Tensor, strengths: Mapping[str, Tensor]) -> Tensor:
        """Zero: ``[T, D]``."""
        return torch.zeros_like(vector)
