"""The Reptile direction."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lightning_imaml.components.checks import require
from lightning_imaml.inner.base import InnerSolver
from lightning_imaml.meta_gradients.base import Estimate, Estimator, require_fixed_rates, require_fixed_strengths
from lightning_imaml.problems.supervised import SupervisedProblem, TaskLoss
from lightning_imaml.runtime.phases import INNER_LOOP, phase


@dataclass(frozen=True)
class Reptile(Estimator):
    """θ − φ_i in place of dQ_i/dθ (`Nichol et al., 2018 <https://arxiv.org/abs/1803.02999>`_, Algorithm 2).

    It reports the query loss and never differentiates it; for the paper's protocol, put all of a task's examples in its
    support set. Plain SGD with learning rate ε makes θ ← θ + ε mean(φ_i − θ).

    Raises:
        ValueError: in use, strengths or step sizes are learned, or only a part of the network adapts: the other
            parameters have no such direction.
    """

    def estimate(self, problem: SupervisedProblem, query: TaskLoss, inner_solver: InnerSolver) -> Estimate:
        """Adapt, judge and return the direction, see :meth:`Estimator.estimate`."""
        require_fixed_strengths(self, problem)
        require_fixed_rates(self, problem, "it has no direction for them")
        shared = problem.support.model.shared
        remedy = "Leave out adapt_only, set requires_grad=False, or use another estimator."
        requirement = "frozen, since it has no direction for them"
        require(not shared, self, "the parameters that do not adapt", requirement, list(shared), remedy)
        with phase(INNER_LOOP):
            inner = inner_solver.solve(problem, problem.start())
        with torch.no_grad():
            outputs = query.outputs(inner.parameters)
            loss = query.from_outputs(outputs)
            direction = (problem.initial - inner.parameters).sum(dim=0)
        return Estimate(loss, outputs, inner, problem.residual_norm(inner.parameters), direction)
