"""Regularisers of the inner problem."""

from lightning_imaml.regularizers.base import Regularizer
from lightning_imaml.regularizers.no_regularizer import NoRegularizer
from lightning_imaml.regularizers.proximal import Proximal

__all__ = ["NoRegularizer", "Proximal", "Regularizer"]
