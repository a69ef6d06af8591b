"""What every estimator of the meta-gradient offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_imaml import compilation
from lightning_imaml.component import Component
from lightning_imaml.inner.base import InnerSolution, InnerSolver
from lightning_imaml.linear.base import LinearSolution
from lightning_imaml.tasks import InnerProblem, TaskLoss


@dataclass(frozen=True)
class Estimate:
    """The meta-gradient of T tasks and how it came about.

    Attributes:
        loss: Q_i(φ_i), ``[T]``.
        outputs: the adapted networks' outputs on the query sets, ``[T, n, ...]``.
        inner: the inner loop's outcome.
        residual: ‖∇G_i(φ_i)‖, ``[T]``.
        initial: Σ_i dQ_i/dθ, ``[D]``.
        strengths: Σ_i dQ_i/dλ, by name.
        linear: the linear solve's outcome, where there was one.
    """

    loss: Tensor
    outputs: Any
    inner: InnerSolution
    residual: Tensor
    initial: Tensor
    strengths: dict[str, Tensor] = field(default_factory=dict)
    linear: LinearSolution | None = None


class Estimator(Component, ABC):
    """Gives dQ_i(φ_i)/dη for every meta-parameter η, the initialisation θ and learned strengths λ."""

    @abstractmethod
    def estimate(self, problem: InnerProblem, query: TaskLoss, inner_solver: InnerSolver) -> Estimate:
        """Adapt to the support sets, judge on the query sets and differentiate.

        Args:
            problem: the inner problem of T tasks.
            query: Q, their loss on the query sets.
            inner_solver: what adapts.
        """

    def differentiated_steps(self, inner_solver: InnerSolver) -> int:
        """How many inner steps keep their graph at once; memory grows with them."""
        return 0


def query_gradient(query: TaskLoss, parameters: Tensor) -> tuple[Tensor, Any, Tensor]:
    """Q ``[T]``, the outputs, and ∇Q ``[T, D]`` at adapted parameters; its graph is gone on return."""
    loss, outputs, gradient = compilation.run(_query_gradient, query, parameters)
    return loss, outputs, gradient


def _query_gradient(query: TaskLoss, parameters: Tensor) -> tuple[Tensor, Any, Tensor]:
    with torch.enable_grad():
        point = parameters.detach().requires_grad_()
        outputs = query.outputs(point)
        loss = query.of(outputs)
        (gradient,) = torch.autograd.grad(loss.sum(), point)
    return loss.detach(), pytree.tree_map(Tensor.detach, outputs), gradient


def refuse_strengths(estimator: Estimator, problem: InnerProblem) -> None:
    """Raise the error of an estimator for which learned strengths have no gradient."""
    if problem.strengths:
        raise ValueError(
            f"{type(estimator).__name__}: the regulariser must have no learned strengths, since it has no gradient for "
            f"them; found {sorted(problem.strengths)}. Fix them, or use Implicit or Unrolled."
        )
