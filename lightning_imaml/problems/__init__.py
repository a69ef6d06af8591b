"""Inner problems: what the inner loop solves and the implicit gradient differentiates."""

from lightning_imaml.problems.base import InnerProblem, Linearization, Minimization

__all__ = ["InnerProblem", "Linearization", "Minimization"]
