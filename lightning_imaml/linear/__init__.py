"""Linear solvers of the implicit system."""

from lightning_imaml.linear.base import LinearSolution, LinearSolver
from lightning_imaml.linear.bicgstab import BiCGStab
from lightning_imaml.linear.conjugate_gradient import ConjugateGradient
from lightning_imaml.linear.direct import Direct
from lightning_imaml.linear.gmres import GMRES
from lightning_imaml.linear.minres import MinRes
from lightning_imaml.linear.neumann import Neumann
from lightning_imaml.linear.normal_cg import NormalCG
from lightning_imaml.linear.operator import LinearOperator

__all__ = [
    "GMRES",
    "BiCGStab",
    "ConjugateGradient",
    "Direct",
    "LinearOperator",
    "LinearSolution",
    "LinearSolver",
    "MinRes",
    "Neumann",
    "NormalCG",
]
