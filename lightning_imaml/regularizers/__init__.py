"""Regularisers of the inner problem."""

from lightning_imaml.regularizers.base import Regularizer
from lightning_imaml.regularizers.full import FullProximal
from lightning_imaml.regularizers.kronecker import KroneckerProximal
from lightning_imaml.regularizers.low_rank import LowRankProximal
from lightning_imaml.regularizers.matrix import MatrixProximal
from lightning_imaml.regularizers.no_regularizer import NoRegularizer
from lightning_imaml.regularizers.proximal import Proximal

__all__ = [
    "FullProximal",
    "KroneckerProximal",
    "LowRankProximal",
    "MatrixProximal",
    "NoRegularizer",
    "Proximal",
    "Regularizer",
]
