"""Solvers of the inner problem."""

from lightning_imaml.inner.base import InnerSolution, InnerSolver
from lightning_imaml.inner.gradient_descent import GradientDescent

__all__ = ["GradientDescent", "InnerSolution", "InnerSolver"]
