"""Properties that hold for every episode, on random ones: order, batching, chunks, linearity; CG's error.

Tolerances: the two sides of each equation are the same sums in another order, so they differ by rounding, 1e-16,
times the few steps and the condition of the systems. With Gauss-Newton that is at most λ_max/λ, below 1e3 on these
data; the Hessian's λ is high enough to keep it definite. 1e-10 leaves three orders of magnitude.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from conftest import TanhNet, regression_episode
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from lightning_imaml import Episode
from lightning_imaml.curvature import GaussNewton
from lightning_imaml.functional import meta_gradient
from lightning_imaml.inner import GradientDescent, HessianFree, Nesterov, TorchOptimizer
from lightning_imaml.linear import ConjugateGradient, Direct
from lightning_imaml.meta_gradients import FirstOrder, Implicit, Reptile, Truncated, Unrolled
from lightning_imaml.regularizers import Proximal

SOME = settings(max_examples=10, deadline=None)
RTOL, ATOL = 1e-10, 1e-12

SOLVERS = {
    "gd": GradientDescent(0.03, 4),
    "gd-tol": GradientDescent(0.03, 8, tol=1.0),
    "nesterov": Nesterov(0.03, 4),
    "hessian-free": HessianFree(2, cg_steps=3),
    # Adam divides by a gradient entry's own size: its eps keeps the rounding of small entries from growing.
    "adam": TorchOptimizer(torch.optim.Adam, 4, {"lr": 0.02, "eps": 1e-3}),
}
DIFFERENTIABLE = ("gd", "gd-tol", "nesterov")
FIXED_STEPS = ("gd", "nesterov")
NO_TOLERANCE = ("gd", "nesterov", "hessian-free", "adam")

ESTIMATORS = {
    "cg": (Implicit(ConjugateGradient(4), GaussNewton()), SOLVERS),
    "cg-converged": (Implicit(ConjugateGradient(100, rtol=1e-14), GaussNewton()), SOLVERS),
    "direct": (Implicit(Direct()), SOLVERS),
    "first-order": (FirstOrder(), SOLVERS),
    "unrolled": (Unrolled(), DIFFERENTIABLE),
    "truncated": (Truncated(2), FIXED_STEPS),
    "truncated-0": (Truncated(0), NO_TOLERANCE),
    "reptile": (Reptile(), SOLVERS),
}


def cases(*estimators: str):
    return pytest.mark.parametrize(
        ("estimator", "solver"),
        [
            pytest.param(ESTIMATORS[name][0], SOLVERS[solver], id=f"{name}-{solver}")
            for name in estimators
            for solver in ESTIMATORS[name][1]
        ],
    )


class Sample(NamedTuple):
    """A network and an episode for it."""

    net: TanhNet
    episode: Episode

    def run(self, estimator, solver, episode=None, **more):
        # Above the most negative curvature of these losses, so that no system comes near to singular.
        settings = {"loss": F.mse_loss, "regularizer": Proximal(8.0), "estimator": estimator, "inner_solver": solver}
        return meta_gradient(self.net, self.episode if episode is None else episode, **settings | more)


@st.composite
def samples(draw) -> Sample:
    inputs, hidden, outputs = draw(st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 2)))
    seed = draw(st.integers(0, 2**20))
    torch.manual_seed(seed)
    net = TanhNet(inputs, hidden, outputs).double()
    episode = regression_episode(draw(st.integers(2, 4)), draw(st.integers(1, 5)), inputs, outputs, seed + 1)
    return Sample(net, episode)


def part(episode: Episode, index) -> Episode:
    return Episode(*[tensor[index] for tensor in episode])


def same(found, expected):
    torch.testing.assert_close(found, expected, rtol=RTOL, atol=ATOL)


def per_task(result) -> dict:
    """Everything that belongs to single tasks, each with a leading task dimension."""
    found = {"loss": result.loss, "outputs": result.query_outputs, **result.adapted._asdict()}
    if result.linear is not None:
        found["linear"] = result.linear._asdict()
    return found


def pick(tree, index):
    return torch.utils._pytree.tree_map(lambda t: t[index], tree)


EVERY = cases("cg", "direct", "first-order", "unrolled", "truncated", "truncated-0", "reptile")


@EVERY
@SOME
@given(data=st.data(), sample=samples())
def test_tasks_in_another_order(estimator, solver, data, sample):
    """Results go with their tasks; the meta-gradient stays."""
    order = data.draw(st.permutations(range(sample.episode.tasks)))
    plain = sample.run(estimator, solver)
    shuffled = sample.run(estimator, solver, part(sample.episode, order))
    same(shuffled.grads, plain.grads)
    same(per_task(shuffled), pick(per_task(plain), order))


@EVERY
@SOME
@given(data=st.data(), sample=samples())
def test_tasks_in_chunks_and_one_by_one(estimator, solver, data, sample):
    """The meta-gradient of a batch is the mean of its tasks' own, however they are cut."""
    tasks = sample.episode.tasks
    whole = sample.run(estimator, solver)
    chunked = sample.run(estimator, solver, chunk_size=data.draw(st.integers(1, tasks)))
    same(chunked.grads, whole.grads)
    same(per_task(chunked), per_task(whole))
    alone = [sample.run(estimator, solver, part(sample.episode, slice(i, i + 1))) for i in range(tasks)]
    same({name: sum(a.grads[name] for a in alone) / tasks for name in whole.grads}, whole.grads)
    for i in range(tasks):
        same(pick(per_task(alone[i]), 0), pick(per_task(whole), i))


@cases("cg-converged", "direct", "first-order", "unrolled", "truncated", "truncated-0")
@SOME
@given(sample=samples(), a=st.floats(-3, 3), b=st.floats(-3, 3))
def test_linear_in_the_outer_loss(estimator, solver, sample, a, b):
    """Where the linear system is solved; a truncated conjugate gradient is no linear map of its right-hand side."""
    f, g = F.mse_loss, F.smooth_l1_loss
    of_f, of_g, of_both = (
        torch.cat([gradient.flatten() for gradient in sample.run(estimator, solver, outer_loss=loss).grads.values()])
        for loss in (f, g, lambda outputs, targets: a * f(outputs, targets) + b * g(outputs, targets))
    )
    # The two parts may cancel: rounding is relative to them and not to their sum.
    scale = abs(a) * of_f.norm() + abs(b) * of_g.norm()
    assert (of_both - a * of_f - b * of_g).norm() <= RTOL * scale


class Systems(NamedTuple):
    """Positive definite systems A x = b."""

    matrix: Tensor
    rhs: Tensor

    def cg(self, steps: int):
        return ConjugateGradient(steps).solve(lambda v: (self.matrix @ v.unsqueeze(2)).squeeze(2), self.rhs)

    def energy(self, error: Tensor) -> Tensor:
        """The A-norm of every task's error."""
        return torch.einsum("ti,tij,tj->t", error, self.matrix, error).sqrt()


@st.composite
def systems(draw) -> Systems:
    tasks, size, spread = draw(st.integers(1, 4)), draw(st.integers(1, 8)), draw(st.floats(0, 2))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rotation, _ = torch.linalg.qr(normal(tasks, size, size))
    values = 10 ** (spread * torch.rand(tasks, 1, size, generator=generator, dtype=torch.float64))
    return Systems((rotation * values) @ rotation.mT, normal(tasks, size))


@settings(max_examples=15, deadline=None)
@given(systems=systems())
def test_conjugate_gradients_error_falls_in_the_a_norm_for_every_task(systems):
    exact = torch.linalg.solve(systems.matrix, systems.rhs)
    start = previous = systems.energy(exact)
    for steps in range(1, systems.rhs.shape[1] + 1):
        solution = systems.cg(steps)
        energy = systems.energy(solution.value - exact)
        assert (energy <= previous + RTOL * start).all()  # The dense solution itself is no better than rounding.
        assert not solution.indefinite.any()
        previous = energy
    assert (previous <= 1e-8 * start).all()  # D steps solve a system of D unknowns.


@settings(max_examples=15, deadline=None)
@given(systems=systems())
def test_conjugate_gradient_gives_a_task_the_same_iterates_in_any_batch(systems):
    for steps in range(1, systems.rhs.shape[1] + 1):
        batch = systems.cg(steps)
        for i in range(len(systems.rhs)):
            alone = Systems(systems.matrix[i : i + 1], systems.rhs[i : i + 1]).cg(steps)
            same(pick(batch._asdict(), i), pick(alone._asdict(), 0))
