"""The Reptile direction."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lightning_imaml.inner.base import InnerSolver
from lightning_imaml.meta_gradients.base import Estimate, Estimator, refuse_rates, refuse_strengths
from lightning_imaml.problems.supervised import SupervisedProblem, TaskLoss
from lightning_imaml.runtime.phases import INNER_LOOP, phase


@dataclass(frozen=True)
class Reptile(Estimator):
    """θ − φ_i in place of dQ_i/dθ (`Nichol et al., 2018 <https://arxiv.org/abs/1803.02999>`_, Algorithm 2).

    It never differentiates the query loss, which is reported only; for the paper's protocol, put all of a task's
    examples in its support set. Plain SGD with learning rate ε makes θ ← θ + ε mean(φ_i − θ).

    Raises:
        ValueError: the regulariser has learned strengths, the inner solver learned step sizes, or only a part of the
            network adapts: only what adapts has such a direction.
    """

    def estimate(self, problem: SupervisedProblem, query: TaskLoss, inner_solver: InnerSolver) -> Estimate:
        """Adapt, judge and point, see :meth:`Estimator.estimate`."""
        refuse_strengths(self, problem)
        refuse_rates(self, problem, "it has no direction for them")
        shared = problem.support.model.shared
        if shared:
            raise ValueError(
                f"Reptile: all trainable parameters must adapt, since it has no direction for the others; found "
                f"{list(shared)}. Leave out adapt_only, freeze them (requires_grad=False), or use another estimator."
            )
        with phase(INNER_LOOP):
            inner = inner_solver.solve(problem, problem.start())
        with torch.no_grad():
            outputs = query.outputs(inner.parameters)
            loss = query.from_outputs(outputs)
            direction = (problem.initial - inner.parameters).sum(dim=0)
        return Estimate(loss, outputs, inner, problem.residual_norm(inner.parameters), direction)
