"""Estimators of the meta-gradient."""

from lightning_imaml.meta_gradients.base import Estimate, Estimator
from lightning_imaml.meta_gradients.first_order import FirstOrder
from lightning_imaml.meta_gradients.implicit import Implicit

__all__ = ["Estimate", "Estimator", "FirstOrder", "Implicit"]
