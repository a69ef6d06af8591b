"""The implicit meta-gradient."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_imaml._compile import door as compilation
from lightning_imaml.curvature import Curvature, Hessian
from lightning_imaml.inner.base import InnerSolver
from lightning_imaml.linear.base import LinearSolver, MatVec, PreconditionedMatVec
from lightning_imaml.linear.conjugate_gradient import ConjugateGradient
from lightning_imaml.meta_gradients.base import Estimate, Estimator, leaves, query_gradient, refuse_rates
from lightning_imaml.problems.supervised import InnerProblem, TaskLoss
from lightning_imaml.regularizers.matrix import MatrixProximal
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

    def estimate(self, problem: InnerProblem, query: TaskLoss, inner_solver: InnerSolver) -> Estimate:
        """Adapt, judge and differentiate, see :meth:`Estimator.estimate`."""
        refuse_rates(self, problem, "the solution of the inner problem does not depend on them")
        with phase(INNER_LOOP):
            inner = inner_solver.solve(problem, problem.start())
        loss, outputs, slope, shared = query_gradient(query, inner.parameters)
        with phase(LINEAR_SOLVE), torch.no_grad():
            linearization = self.curvature.linearize(problem, inner.parameters)
            linear = self.linear_solver.solve(_preconditioned(problem, linearization.product), slope)
            residual = linearization.gradient.norm(dim=1)
            del linearization
        initial, others = _pull_back(problem, inner.parameters, linear.value)
        if shared:
            pulled = compilation.run(_pull_back_shared, problem.support, inner.parameters, linear.value)
            others |= {name: direct + pulled[name] for name, direct in shared.items()}
        return Estimate(loss, outputs, inner, residual, initial, others, linear)


def _preconditioned(problem: InnerProblem, product: MatVec) -> MatVec:
    """The product, with the inverse of R's matrix where it has one."""
    regularizer = problem.regularizer
    if not isinstance(regularizer, MatrixProximal):
        return product
    return PreconditionedMatVec(product, lambda vector: regularizer.solve(vector, problem.strengths))


def _pull_back(problem: InnerProblem, parameters: Tensor, u: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """−Σ_i (∂_η ∇_φ R)ᵀ u_i for η = θ and every learned strength; L does not depend on them."""
    with torch.enable_grad():
        initial = problem.initial.detach().requires_grad_()
        strengths = leaves(problem.strengths)
        gradient = problem.regularizer.gradient(parameters, initial, strengths)
        meta, constant = [initial, *strengths.values()], not gradient.requires_grad
        found = [None] if constant else torch.autograd.grad(gradient, meta, -u, allow_unused=True)
        # Without θ, as where a head is pulled to zero, there may be λ and ω to learn.
        if constant or (found[0] is None and not strengths and not problem.support.model.shared):
            raise ValueError(
                f"Implicit: the regularizer's gradient must depend on the initialisation; found {problem.regularizer}, "
                "whose does not, so that the meta-gradient would be zero. Use Proximal, or another estimator."
            )
    pulled = [torch.zeros_like(m) if f is None else f for m, f in zip(meta, found, strict=True)]
    return pulled[0], {f"regularizer.{name}": p for name, p in zip(strengths, pulled[1:], strict=True)}


def _pull_back_shared(support: TaskLoss, parameters: Tensor, u: Tensor) -> dict[str, Tensor]:
    """−Σ_i (∂_ω ∇_φ L_i)ᵀ u_i."""
    with torch.enable_grad():
        shared, point = leaves(support.shared()), parameters.detach().requires_grad_()
        loss = support.with_shared(shared).value(point).sum()
        (gradient,) = torch.autograd.grad(loss, point, create_graph=True)
        if not gradient.requires_grad:  # A loss whose slope is a constant.
            return {name: torch.zeros_like(value) for name, value in shared.items()}
        pulled = torch.autograd.grad(gradient, list(shared.values()), -u, materialize_grads=True)
    return dict(zip(shared, pulled, strict=True))
