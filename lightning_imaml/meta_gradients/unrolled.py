"""Meta-gradients by differentiating the inner loop's own steps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.utils import _pytree as pytree

from lightning_imaml.components.checks import require
from lightning_imaml.inner.base import InnerSolution, InnerSolver
from lightning_imaml.meta_gradients.base import Estimate, Estimator, refuse_rates, refuse_strengths
from lightning_imaml.problems.supervised import SupervisedProblem, TaskLoss, leaf
from lightning_imaml.runtime.phases import INNER_LOOP, phase


@dataclass(frozen=True)
class Unrolled(Estimator):
    """Back-propagation through all inner steps: MAML (`Finn et al., 2017 <https://arxiv.org/abs/1703.03400>`_, eq. 1).

    Exact for the iterate that the inner loop ends at, converged or not. Memory grows linearly with the inner steps.
    """

    def estimate(self, problem: SupervisedProblem, query: TaskLoss, inner_solver: InnerSolver) -> Estimate:
        """Adapt, judge and differentiate, see :meth:`Estimator.estimate`."""
        return _through_steps(problem, query, inner_solver, self.differentiated_steps(inner_solver))

    def differentiated_steps(self, inner_solver: InnerSolver) -> int:
        """All of them."""
        return inner_solver.steps


@dataclass(frozen=True)
class Truncated(Estimator):
    """Back-propagation through the last inner steps alone.

    The iterate before them counts as θ plus a constant: with all steps this is :class:`Unrolled`, with none
    :class:`FirstOrder`. Memory grows with ``last_steps``, not with the inner steps. `Shaban et al. (2019)
    <https://arxiv.org/abs/1810.10667>`_ truncate a hyper-parameter's gradient, for which the iterate before the last
    steps is a constant alone; where θ is what the last steps are pulled to, their sum lacks what comes through θ here.

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
        if self.last_steps > inner_solver.steps or inner_solver.tol > 0:
            raise ValueError(
                f"Truncated: last_steps must be at most the inner solver's steps, which must have tol=0 so that every "
                f"task takes them all; found last_steps={self.last_steps} and {inner_solver}. Lower last_steps, or use "
                "Unrolled."
            )
        if self.last_steps == 0:
            refuse_strengths(self, problem)
            refuse_rates(self, problem, "with last_steps=0 it differentiates no step")
        return _through_steps(problem, query, inner_solver, self.differentiated_steps(inner_solver))

    def differentiated_steps(self, inner_solver: InnerSolver) -> int:
        """The last ones."""
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
