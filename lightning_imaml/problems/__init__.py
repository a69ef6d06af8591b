"""Inner problems: what the inner loop solves and the implicit gradient differentiates."""

from lightning_imaml.problems.base import InnerProblem, Minimization
from lightning_imaml.problems.condition import Condition, Equilibrium, FixedPoint, Root

__all__ = ["Condition", "Equilibrium", "FixedPoint", "InnerProblem", "Minimization", "Root"]
