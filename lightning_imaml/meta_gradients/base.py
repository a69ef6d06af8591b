"""The interface of estimators of the meta-gradient, and what they share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_imaml import _compile
from lightning_imaml.components.base import Component
from lightning_imaml.components.checks import require
from lightning_imaml.inner.base import InnerSolution, InnerSolver
from lightning_imaml.linear.base import LinearSolution
from lightning_imaml.problems.supervised import SupervisedProblem, TaskLoss, leaf


@dataclass(frozen=True)
class Estimate:
    """The meta-gradient of T tasks, and the solutions behind it.

    Attributes:
        loss: Q_i(φ_i), ``[T]``.
        outputs: the adapted networks' outputs on the query sets, ``[T, n, ...]``.
        inner: the solution of the inner loop.
        residual: ‖∇G_i(φ_i)‖, ``[T]``.
        initial: Σ_i dQ_i/dθ, ``[D]``.
        others: Σ_i dQ_i/dη for all other meta-parameters, by the names of ``SupervisedProblem.meta_parameters``.
        linear: the solution of the linear system; None for estimators without one.
    """

    loss: Tensor
    outputs: Any
    inner: InnerSolution
    residual: Tensor
    initial: Tensor
    others: dict[str, Tensor] = field(default_factory=dict)
    linear: LinearSolution | None = None


class Estimator(Component, ABC):
    """Gives dQ_i(φ_i)/dη for each meta-parameter η: θ, learned λ and step sizes, and ω where only a part adapts."""

    @abstractmethod
    def estimate(self, problem: SupervisedProblem, query: TaskLoss, inner_solver: InnerSolver) -> Estimate:
        """Adapt to the support sets, judge on the query sets and differentiate.

        Args:
            problem: the inner problem of T tasks.
            query: Q, their loss on the query sets.
            inner_solver: the solver of the inner problem.
        """

    def differentiated_steps(self, inner_solver: InnerSolver) -> int:
        """How many inner steps keep their graph at once; memory grows with them."""
        return 0


def query_gradient(query: TaskLoss, parameters: Tensor) -> tuple[Tensor, Any, Tensor, dict[str, Tensor]]:
    """Q ``[T]``, the outputs, ∇Q ``[T, D]`` and Σ_i ∂Q_i/∂ω at adapted parameters, all without a graph."""
    loss, outputs, gradient, shared = _compile.run(_query_gradient, query, parameters)
    return loss, outputs, gradient, shared


def _query_gradient(query: TaskLoss, parameters: Tensor) -> tuple[Tensor, Any, Tensor, dict[str, Tensor]]:
    with torch.enable_grad():
        point = leaf(parameters)
        shared = {name: leaf(value) for name, value in query.shared().items()}
        outputs = query.with_shared(shared).outputs(point, first_order_only=True)
        loss = query.from_outputs(outputs)
        gradient, *direct = torch.autograd.grad(loss.sum(), [point, *shared.values()], materialize_grads=True)
    outputs = pytree.tree_map(Tensor.detach, outputs)
    return loss.detach(), outputs, gradient, dict(zip(shared, direct, strict=True))


def require_fixed_strengths(estimator: Estimator, problem: SupervisedProblem) -> None:
    """Raise a ValueError if strengths are learned, for an estimator that has no gradient for them."""
    requirement = "fixed, since it has no gradient for learned ones"
    remedy = "Set learned=False, or use Implicit or Unrolled."
    require(not problem.strengths, estimator, "the strengths", requirement, sorted(problem.strengths), remedy)


def require_fixed_rates(estimator: Estimator, problem: SupervisedProblem, reason: str) -> None:
    """Raise a ValueError if step sizes are learned, for an estimator that has no gradient for them."""
    remedy = "Set learned=False, or use Unrolled or Truncated."
    require(not problem.rates, estimator, "the step sizes", f"fixed, since {reason}", sorted(problem.rates), remedy)
