"""Linear solvers of the implicit system."""

from lightning_imaml.linear.base import LinearSolution, LinearSolver
from lightning_imaml.linear.conjugate_gradient import ConjugateGradient
from lightning_imaml.linear.direct import Direct
from lightning_imaml.linear.minres import MinRes
from lightning_imaml.linear.neumann import Neumann
from lightning_imaml.linear.operator import LinearOperator

__all__ = ["ConjugateGradient", "Direct", "LinearOperator", "LinearSolution", "LinearSolver", "MinRes", "Neumann"]
