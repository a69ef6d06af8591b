"""Regularisers of the inner problem."""

from lightning_imaml.regularizers.base import Regularizer
from lightning_imaml.regularizers.proximal import Proximal

__all__ = ["Proximal", "Regularizer"]
