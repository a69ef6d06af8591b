"""The first-order meta-gradient."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_imaml.inner.base import InnerSolver
from lightning_imaml.meta_gradients.base import Estimate, Estimator, query_gradient, refuse_rates, refuse_strengths
from lightning_imaml.problems.supervised import SupervisedProblem, TaskLoss
from lightning_imaml.runtime.phases import INNER_LOOP, phase


@dataclass(frozen=True)
class FirstOrder(Estimator):
    """dQ_i/dθ ≈ ∇Q_i(φ_i): first-order MAML (`Finn et al., 2017 <https://arxiv.org/abs/1703.03400>`_, section 5.2).

    It takes dφ_i/dθ for the identity, and φ_i for a constant in everything else: it knows nothing of learned strengths
    and step sizes, and where only a part adapts, the shared parameters get ∂Q_i/∂ω.

    Raises:
        ValueError: the regulariser has learned strengths, or the inner solver learned step sizes.
    """

    def estimate(self, problem: SupervisedProblem, query: TaskLoss, inner_solver: InnerSolver) -> Estimate:
        """Adapt, judge and differentiate, see :meth:`Estimator.estimate`."""
        refuse_strengths(self, problem)
        refuse_rates(self, problem, "it takes the adapted parameters for constants")
        with phase(INNER_LOOP):
            inner = inner_solver.solve(problem, problem.start())
        loss, outputs, slope, shared = query_gradient(query, inner.parameters)
        return Estimate(loss, outputs, inner, problem.residual_norm(inner.parameters), slope.sum(dim=0), shared)
