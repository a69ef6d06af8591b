"""Solvers of the inner problem."""

from lightning_imaml.inner.base import InnerSolution, InnerSolver, SteppingSolver, StepSizes
from lightning_imaml.inner.gradient_descent import GradientDescent
from lightning_imaml.inner.hessian_free import HessianFree
from lightning_imaml.inner.nesterov import Nesterov
from lightning_imaml.inner.torch_optimizer import TorchOptimizer

__all__ = [
    "GradientDescent",
    "HessianFree",
    "InnerSolution",
    "InnerSolver",
    "Nesterov",
    "StepSizes",
    "SteppingSolver",
    "TorchOptimizer",
]
