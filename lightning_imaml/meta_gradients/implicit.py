"""The implicit meta-gradient."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lightning_imaml.curvature import Curvature, Hessian
from lightning_imaml.inner.base import InnerSolver
from lightning_imaml.linear.base import LinearSolver
from lightning_imaml.linear.conjugate_gradient import ConjugateGradient
from lightning_imaml.meta_gradients.base import Estimate, Estimator, query_gradient, refuse_rates
from lightning_imaml.problems.supervised import SupervisedProblem, TaskLoss
from lightning_imaml.runtime.phases import INNER_LOOP, LINEAR_SOLVE, phase


@dataclass(frozen=True)
class Implicit(Estimator):
    r"""The implicit meta-gradient of `iMAML <https://arxiv.org/abs/1909.04630>`_ (Lemma 1, Algorithm 2).

    .. math:: (∇²L_i(φ_i) + ∇²_{φφ} R)\, u_i = ∇Q_i(φ_i), \qquad
              \frac{dQ_i}{dη} = -(∂_η ∇_φ G_i)^⊤ u_i, \quad η ∈ (θ, λ, ω)

    It depends on the solution φ_i and not on the way there, so memory does not grow with the number of inner steps. For
    :class:`~lightning_imaml.regularizers.Proximal`, dQ_i/dθ = λ u_i. Where only a part of the network adapts, the
    shared parameters ω get ∂Q_i/∂ω besides, and the mixed derivative of L is exact whatever the curvature. The solution
    does not depend on step sizes, so learned ones have no gradient.

    Args:
        linear_solver: solves for u.
        curvature: the matrix of the system: the exact :class:`Hessian`, as in the paper, or
            :class:`GaussNewton`, which stays definite where the Hessian does not.

    Raises:
        ValueError: in use, the inner solver has learned step sizes, or ∇R does not depend on the initialisation,
            nor is anything else learned.
    """

    linear_solver: LinearSolver = ConjugateGradient()  # noqa: RUF009 - frozen, so that sharing it is safe
    curvature: Curvature = Hessian()  # noqa: RUF009

    def estimate(self, problem: SupervisedProblem, query: TaskLoss, inner_solver: InnerSolver) -> Estimate:
        """Adapt, judge and differentiate, see :meth:`Estimator.estimate`."""
        refuse_rates(self, problem, "the solution of the inner problem does not depend on them")
        with phase(INNER_LOOP):
            inner = inner_solver.solve(problem, problem.start())
        loss, outputs, slope, shared = query_gradient(query, inner.parameters)
        with phase(LINEAR_SOLVE), torch.no_grad():
            around = problem.linearize(inner.parameters, self.curvature)
            linear = self.linear_solver.solve(around.product.transpose, slope)
            residual = around.gradient.norm(dim=1)
            del around  # With it goes the graph of a forward pass.
        initial, others = problem.pull_back(inner.parameters, linear.value)
        others |= {name: direct + others[name] for name, direct in shared.items()}
        return Estimate(loss, outputs, inner, residual, initial, others, linear)
