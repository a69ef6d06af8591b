"""Meta-gradients by differentiating the inner loop's own steps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.utils import _pytree as pytree

from lightning_imaml.components.checks import require
from lightning_imaml.inner.base import InnerSolution, InnerSolver
from lightning_imaml.meta_gradients.base import Estimate, Estimator, require_fixed_rates, require_fixed_strengths
from lightning_imaml.problems.supervised import SupervisedProblem, TaskLoss, leaf
from lightning_imaml.runtime.phases import INNER_LOOP, phase


@dataclass(frozen=True)
class Unrolled(Estimator):
    """Back-propagation through all inner steps: MAML (`Finn et al., 2017 <https://arxiv.org/abs/1703.03400>`_, eq. 1).

    It is exact for the last iterate of the inner loop, converged or not. Memory grows linearly with the inner steps.
    """

    def estimate(self, problem: SupervisedProblem, query: TaskLoss, inner_solver: InnerSolver) -> Estimate:
        """Adapt, judge and differentiate, see :meth:`Estimator.estimate`."""
        return _through_steps(problem, query, inner_solver, self.differentiated_steps(inner_solver))

    def differentiated_steps(self, inner_solver: InnerSolver) -> int:
        """All inner steps."""
        return inner_solver.steps


@dataclass(frozen=True)
class Truncated(Estimator):
    """Back-propagation through the last inner steps alone.

    The derivative takes the iterate before them as θ plus a constant: all steps give :class:`Unrolled`, no step gives
    :class:`FirstOrder`. Memory grows with ``last_steps`` and does not depend on the number of inner steps. `Shaban et
    al. (2019) <https://arxiv.org/abs/1810.10667>`_ truncate the gradient of a hyper-parameter, for which the iterate
    before the last steps is a constant; for θ, their sum lacks the term that comes through this iterate.

    Args:
        last_steps: how many of the last steps to differentiate.

    Raises:
        ValueError: ``last_steps`` is negative; in use, it exceeds the inner solver's steps, or that solver has a
            tolerance, so that tasks end before the last steps; or strengths or step sizes are learned and no step is
            differentiated.
    """

    last_steps: int

    def __post_init__(self) -> None:
        require(self.last_steps >= 0, self, "last_steps", "zero or positive", self.last_steps, "0 is first order.")

    def estimate(self, problem: SupervisedProblem, query: TaskLoss, inner_solver: InnerSolver) -> Estimate:
        """Adapt, judge and differentiate, see :meth:`Estimator.estimate`."""
        most, tol = inner_solver.steps, inner_solver.tol
        requirement = f"at most the inner solver's steps, {most}"
        require(
            self.last_steps <= most, self, "last_steps", requirement, self.last_steps, "Use Unrolled for all steps."
        )
        requirement = "0, so that every task takes all steps"
        require(tol == 0, self, "the inner solver's tol", requirement, tol, "Set tol=0, or use Unrolled.")
        if self.last_steps == 0:
            require_fixed_strengths(self, problem)
            require_fixed_rates(self, problem, "with last_steps=0 it differentiates no step")
        return _through_steps(problem, query, inner_solver, self.differentiated_steps(inner_solver))

    def differentiated_steps(self, inner_solver: InnerSolver) -> int:
        """The last steps alone."""
        return self.last_steps


def _through_steps(problem: SupervisedProblem, query: TaskLoss, inner_solver: InnerSolver, steps: int) -> Estimate:
    with torch.enable_grad():
        initial = leaf(problem.initial)
        others = {name: leaf(value) for name, value in problem.meta_parameters().items()}
        attached = problem.with_meta_parameters(initial, others)
        with phase(INNER_LOOP):
            inner = inner_solver.solve(attached, attached.start(), differentiable_steps=steps)
        outputs = query.with_shared(attached.support.shared()).outputs(inner.parameters)
        loss = query.from_outputs(outputs)
        gradients = torch.autograd.grad(loss.sum(), [initial, *others.values()], materialize_grads=True)
    inner = InnerSolution(inner.parameters.detach(), inner.steps)
    return Estimate(
        loss.detach(),
        pytree.tree_map(torch.Tensor.detach, outputs),
        inner,
        problem.residual_norm(inner.parameters),
        gradients[0],
        dict(zip(others, gradients[1:], strict=True)),
    )
