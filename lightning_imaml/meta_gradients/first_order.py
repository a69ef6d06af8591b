"""The first-order meta-gradient."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_imaml.inner.base import InnerSolver
from lightning_imaml.meta_gradients.base import (
    Estimate,
    Estimator,
    query_gradient,
    require_fixed_rates,
    require_fixed_strengths,
)
from lightning_imaml.problems.supervised import SupervisedProblem, TaskLoss
from lightning_imaml.runtime.phases import INNER_LOOP, phase


@dataclass(frozen=True)
class FirstOrder(Estimator):
    """dQ_i/dθ ≈ ∇Q_i(φ_i): first-order MAML (`Finn et al., 2017 <https://arxiv.org/abs/1703.03400>`_, section 5.2).

    It takes dφ_i/dθ as the identity, and φ_i as a constant in everything else. So it has no gradient for learned
    strengths and step sizes. Where only a part adapts, the shared parameters get ∂Q_i/∂ω.

    Raises:
        ValueError: in use, strengths or step sizes are learned.
    """

    def estimate(self, problem: SupervisedProblem, query: TaskLoss, inner_solver: InnerSolver) -> Estimate:
        """Adapt, judge and differentiate, see :meth:`Estimator.estimate`."""
        require_fixed_strengths(self, problem)
        require_fixed_rates(self, problem, "it takes the adapted parameters as constants")
        with phase(INNER_LOOP):
            inner = inner_solver.solve(problem, problem.start())
        loss, outputs, slope, shared = query_gradient(query, inner.parameters)
        return Estimate(loss, outputs, inner, problem.residual_norm(inner.parameters), slope.sum(dim=0), shared)
