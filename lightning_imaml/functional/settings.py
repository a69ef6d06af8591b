"""The settings of a solve, in one object."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from lightning_imaml.components.checks import require_at_least_one
from lightning_imaml.inner import GradientDescent, InnerSolver
from lightning_imaml.problems.supervised import LossFunction
from lightning_imaml.regularizers import Proximal, Regularizer

DEFAULT_INNER_SOLVER = GradientDescent(lr=0.1, steps=16)
DEFAULT_REGULARIZER = Proximal(2.0)


def check_chunk_size(chunk_size: int | None) -> None:
    """Raise a ValueError if ``chunk_size`` is below 1."""
    if chunk_size is not None:
        require_at_least_one("chunk_size", chunk_size, "None chooses it from the size of a task.")


@dataclass(frozen=True)
class Settings:
    """How a batch of tasks is solved: the keywords of :func:`lightning_imaml.functional.meta_gradient`.

    Attributes:
        loss: the support loss L.
        outer_loss: the query loss Q; None takes ``loss``.
        inner_solver: what minimises G = L + R.
        regularizer: the regulariser R.
        strengths: the regulariser's learned values λ; None takes their first values.
        rates: the inner solver's learned step sizes; None takes their first values.
        adapt_only: patterns over the names of the parameters that adapt; None adapts all.
        chunk_size: the most tasks at once; None chooses it from the size of a task.
        compile: whether to compile the inner loop and the linear solve.
        full_precision: whether to solve in float32 or more, outside autocast.
        check_network: whether to check a network's structure when it is first used.

    Raises:
        ValueError: ``chunk_size`` is below 1.
    """

    loss: LossFunction = F.cross_entropy
    outer_loss: LossFunction | None = None
    inner_solver: InnerSolver = DEFAULT_INNER_SOLVER
    regularizer: Regularizer = DEFAULT_REGULARIZER
    strengths: Mapping[str, Tensor] | None = None
    rates: Mapping[str, Tensor] | None = None
    adapt_only: Sequence[str] | None = None
    chunk_size: int | None = None
    compile: bool = False
    full_precision: bool = True
    check_network: bool = True

    def __post_init__(self) -> None:
        check_chunk_size(self.chunk_size)

    @property
    def query_loss(self) -> LossFunction:
        """The loss on the query sets."""
        return self.outer_loss or self.loss
