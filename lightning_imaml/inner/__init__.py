"""Solvers of the inner problem."""

from lightning_imaml.inner.anderson import Anderson
from lightning_imaml.inner.base import InnerSolution, InnerSolver, SteppingSolver, StepSizes
from lightning_imaml.inner.gradient_descent import GradientDescent
from lightning_imaml.inner.hessian_free import HessianFree
from lightning_imaml.inner.nesterov import Nesterov
from lightning_imaml.inner.newton import Newton
from lightning_imaml.inner.torch_optimizer import TorchOptimizer

__all__ = [
    "Anderson",
    "GradientDescent",
    "HessianFree",
    "InnerSolution",
    "InnerSolver",
    "Nesterov",
    "Newton",
    "StepSizes",
    "SteppingSolver",
    "TorchOptimizer",
]
