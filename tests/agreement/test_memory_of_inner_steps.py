"""Peak memory against the number of inner steps, counted exactly."""

from __future__ import annotations

import sys
from itertools import pairwise

import pytest
import torch
from conftest import class_episode

from lightning_imaml.callbacks import LiveTensorBytes
from lightning_imaml.functional import meta_gradient
from lightning_imaml.inner import GradientDescent, HessianFree, Nesterov, TorchOptimizer
from lightning_imaml.meta_gradients import FirstOrder, Implicit, Truncated, Unrolled
from lightning_imaml.models import MLP

SOLVERS = {
    "gradient descent": lambda steps: GradientDescent(0.01, steps),
    "gradient descent, tol": lambda steps: GradientDescent(0.01, steps, tol=1e-9),
    "Nesterov": lambda steps: Nesterov(0.01, steps),
    "Hessian-free": lambda steps: HessianFree(steps),
    "SGD": lambda steps: TorchOptimizer(torch.optim.SGD, steps, {"lr": 0.01, "momentum": 0.9}),
    "Adam": lambda steps: TorchOptimizer(torch.optim.Adam, steps, {"lr": 1e-3}),
}
# Python 3.10 keeps the arguments of a call until it returns: from the second step on, the first iterate besides.
STEPS = (1, 2, 128) if sys.version_info >= (3, 11) else (2, 3, 128)


def peak(solver, estimator):
    torch.manual_seed(0)
    # Wide for its few images: a [T, D] matrix too many is a tenth of the peak, and not hidden behind activations.
    net, episode = MLP(784, 5, hidden=(32,)), class_episode(tasks=2, queries=1)
    with LiveTensorBytes() as live:
        result = meta_gradient(net, episode, estimator=estimator, inner_solver=solver)
    assert result.adapted.steps.tolist() == [solver.steps] * 2
    return live.peak


@pytest.mark.parametrize("name", SOLVERS)
def test_the_implicit_peak_does_not_depend_on_the_inner_steps(name):
    peaks = [peak(SOLVERS[name](steps), Implicit()) for steps in STEPS]
    assert max(peaks) <= 1.02 * min(peaks), peaks


@pytest.mark.parametrize("name", ["gradient descent", "gradient descent, tol", "Nesterov"])
def test_the_inner_loop_keeps_nothing_of_earlier_steps(name):
    """Without a linear solve, whose peak is above that of the inner loop."""
    peaks = [peak(SOLVERS[name](steps), FirstOrder()) for steps in STEPS]
    assert max(peaks) <= 1.02 * min(peaks), peaks


def test_the_peak_of_maml_grows_linearly_and_that_of_the_last_steps_does_not():
    unrolled = [peak(SOLVERS["gradient descent"](steps), Unrolled()) for steps in (16, 32, 64, 128)]
    growth = [b - a for a, b in pairwise(unrolled)]
    for before, after in pairwise(growth):
        assert after == pytest.approx(2 * before, rel=0.02)
    assert unrolled[-1] > 10 * peak(SOLVERS["gradient descent"](128), Implicit())
    truncated = [peak(SOLVERS["gradient descent"](steps), Truncated(4)) for steps in (8, 128)]
    assert max(truncated) <= 1.02 * min(truncated)
