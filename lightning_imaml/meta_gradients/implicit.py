"""The implicit meta-gradient."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lightning_imaml.curvature import Curvature, Hessian
from lightning_imaml.inner.base import InnerSolver
from lightning_imaml.linear.base import LinearSolver
from lightning_imaml.linear.conjugate_gradient import ConjugateGradient
from lightning_imaml.meta_gradients.base import Estimate, Estimator, query_gradient, require_fixed_rates
from lightning_imaml.problems.supervised import SupervisedProblem, TaskLoss
from lightning_imaml.runtime.phases import INNER_LOOP, LINEAR_SOLVE, phase


@dataclass(frozen=True)
class Implicit(Estimator):
    r"""The implicit meta-gradient of `iMAML <https://arxiv.org/abs/1909.04630>`_ (Lemma 1, Algorithm 2).

    .. math:: (∇²L_i(φ_i) + ∇²_{φφ} R)\, u_i = ∇Q_i(φ_i), \qquad
              \frac{dQ_i}{dη} = -(∂_η ∇_φ G_i)^⊤ u_i, \quad η ∈ (θ, λ, ω)

    It depends on the solution φ_i alone, so memory does not grow with the number of inner steps. For
    :class:`~lightning_imaml.regularizers.Proximal`, dQ_i/dθ = λ u_i. Where only a part of the network adapts, ∂Q_i/∂ω
    is added for the shared parameters ω, and the mixed derivative of L is exact whatever the curvature. The solution
    does not depend on step sizes, so learned ones have no gradient.

    Args:
        linear_solver: solves for u.
        curvature: the matrix of the system. The paper uses the exact :class:`Hessian`; :class:`GaussNewton` stays
            definite where the Hessian does not.

    Raises:
        ValueError: in use, step sizes are learned; or ∇R does not depend on the initialisation and nothing else is
            learned.
    """

    linear_solver: LinearSolver = ConjugateGradient()  # noqa: RUF009 - frozen, so that sharing it is safe
    curvature: Curvature = Hessian()  # noqa: RUF009

    def estimate(self, problem: SupervisedProblem, query: TaskLoss, inner_solver: InnerSolver) -> Estimate:
        """Adapt, judge and differentiate, see :meth:`Estimator.estimate`."""
        require_fixed_rates(self, problem, "the solution of the inner problem does not depend on them")
        with phase(INNER_LOOP):
            inner = inner_solver.solve(problem, problem.start())
        loss, outputs, slope, shared = query_gradient(query, inner.parameters)
        with phase(LINEAR_SOLVE), torch.no_grad():
            around = problem.linearize(inner.parameters, self.curvature)
            linear = self.linear_solver.solve(around.product.transpose, slope)
            residual = around.gradient.norm(dim=1)
            del around  # Free the graph of its forward pass.
        initial, others = problem.pull_back(inner.parameters, linear.value)
        others |= {name: direct + others[name] for name, direct in shared.items()}
        return Estimate(loss, outputs, inner, residual, initial, others, linear)
