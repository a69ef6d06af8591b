"""The core without Lightning: adapt to tasks, predict with adapted parameters, differentiate through adaptation."""

from lightning_imaml.functional.adaptation import Adapted, adapt
from lightning_imaml.functional.deployment import adapted_network
from lightning_imaml.functional.implicit_solve import Solution, solve
from lightning_imaml.functional.meta_gradient import MetaGradient, meta_gradient
from lightning_imaml.functional.prediction import evaluate, predict

__all__ = [
    "Adapted", "MetaGradient", "Solution", "adapt", "adapted_network", "evaluate", "meta_gradient", "predict", "solve",
]  # fmt: skip
