"""Estimators of the meta-gradient."""

from lightning_imaml.meta_gradients.base import Estimate, Estimator
from lightning_imaml.meta_gradients.first_order import FirstOrder
from lightning_imaml.meta_gradients.implicit import Implicit
from lightning_imaml.meta_gradients.reptile import Reptile
from lightning_imaml.meta_gradients.unrolled import Truncated, Unrolled

__all__ = ["Estimate", "Estimator", "FirstOrder", "Implicit", "Reptile", "Truncated", "Unrolled"]
