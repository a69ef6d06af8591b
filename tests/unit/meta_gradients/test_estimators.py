"""Estimators against each other where theory makes them agree, and against finite differences."""

from __future__ import annotations

import pytest
import torch
from conftest import TanhNet, class_episode, regression_episode
from torch import nn
from torch.nn import functional as F

from lightning_imaml.callbacks import LiveTensorBytes
from lightning_imaml.functional import meta_gradient
from lightning_imaml.inner import GradientDescent, HessianFree, Nesterov, TorchOptimizer
from lightning_imaml.linear import Direct
from lightning_imaml.meta_gradients import FirstOrder, Implicit, Reptile, Truncated, Unrolled
from lightning_imaml.models import Conv4
from lightning_imaml.problems.network import FlatModel
from lightning_imaml.regularizers import Proximal

EPISODE = regression_episode()


def run(net, estimator, solver, regularizer=Proximal(1.5), **more):  # noqa: B008
    return meta_gradient(
        net, EPISODE, loss=F.mse_loss, inner_solver=solver, estimator=estimator, regularizer=regularizer, **more
    )


def same(a, b, rtol=1e-10, atol=1e-12):
    assert a.grads.keys() == b.grads.keys()
    for name in a.grads:
        torch.testing.assert_close(a.grads[name], b.grads[name], rtol=rtol, atol=atol)


@pytest.mark.parametrize("solver", [GradientDescent(0.2, 400), Nesterov(0.2, 150)], ids=["gd", "nesterov"])
def test_implicit_is_unrolled_where_the_inner_problem_is_solved(tanh_net, solver):
    """For θ and for a learned λ."""
    regularizer = Proximal(1.5, learned=True)
    implicit = run(tanh_net, Implicit(Direct()), solver, regularizer)
    assert (implicit.adapted.residual < 1e-9).all()
    assert "regularizer.log_strength" in implicit.grads
    same(implicit, run(tanh_net, Unrolled(), solver, regularizer), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("solver", [GradientDescent(0.2, 5), Nesterov(0.2, 5)], ids=["gd", "nesterov"])
def test_unrolled_is_the_gradient_of_finite_differences_for_few_steps(tanh_net, solver):
    flat, step = FlatModel(tanh_net), 1e-5
    theta = flat.initial()

    def loss(row, log_strength=None):
        nn.utils.vector_to_parameters(row, tanh_net.parameters())
        strengths = None if log_strength is None else {"log_strength": log_strength}
        regularizer = Proximal(1.5, learned=log_strength is not None)
        return run(tanh_net, Unrolled(), solver, regularizer, strengths=strengths)

    result = loss(theta)
    gradient = torch.cat([result.grads[name].flatten() for name in flat.names])
    differences = torch.stack(
        [
            (loss(theta + step * unit).loss.mean() - loss(theta - step * unit).loss.mean()) / (2 * step)
            for unit in torch.eye(len(theta), dtype=torch.float64)
        ]
    )
    torch.testing.assert_close(gradient, differences, rtol=1e-6, atol=1e-8)
    value = torch.tensor(0.4, dtype=torch.float64)
    difference = (loss(theta, value + step).loss.mean() - loss(theta, value - step).loss.mean()) / (2 * step)
    found = loss(theta, value).grads["regularizer.log_strength"]
    torch.testing.assert_close(found, difference, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("solver", [GradientDescent(0.2, 6), Nesterov(0.2, 6)], ids=["gd", "nesterov"])
def test_truncated_lies_between_first_order_and_unrolled(tanh_net, solver):
    same(run(tanh_net, Truncated(6), solver), run(tanh_net, Unrolled(), solver))
    same(run(tanh_net, Truncated(0), solver), run(tanh_net, FirstOrder(), solver))
    between = [run(tanh_net, Truncated(k), solver).grads["out.weight"] for k in range(7)]
    distances = [(g - between[-1]).norm().item() for g in between]
    assert distances == sorted(distances, reverse=True)
    assert len({round(d, 12) for d in distances}) == 7


def test_reptile_points_from_the_adapted_parameters(tanh_net):
    solver = GradientDescent(0.1, 5)
    result = run(tanh_net, Reptile(), solver)
    for name, parameter in tanh_net.named_parameters():
        expected = (parameter.detach() - result.adapted.parameters[name]).mean(dim=0)
        torch.testing.assert_close(result.grads[name], expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(result.loss, run(tanh_net, FirstOrder(), solver).loss)


@pytest.mark.parametrize("estimator", [Unrolled(), Truncated(2), Reptile(), FirstOrder()], ids=str)
@pytest.mark.parametrize("chunk_size", [1, 3])
def test_chunks_do_not_change_the_result(tanh_net, estimator, chunk_size):
    solver = GradientDescent(0.1, 4)
    same(run(tanh_net, estimator, solver), run(tanh_net, estimator, solver, chunk_size=chunk_size))


@pytest.mark.parametrize("estimator", [Implicit(Direct()), Unrolled(), Truncated(2), FirstOrder()], ids=str)
def test_the_meta_gradient_is_linear_in_the_outer_loss(tanh_net, estimator):
    solver = GradientDescent(0.1, 4)
    one = run(tanh_net, estimator, solver, outer_loss=F.mse_loss)
    other = run(tanh_net, estimator, solver, outer_loss=F.l1_loss)
    both = run(tanh_net, estimator, solver, outer_loss=lambda o, t: 2 * F.mse_loss(o, t) - 3 * F.l1_loss(o, t))
    for name in both.grads:
        expected = 2 * one.grads[name] - 3 * other.grads[name]
        torch.testing.assert_close(both.grads[name], expected, rtol=1e-9, atol=1e-12)


def test_memory_grows_with_the_steps_that_are_differentiated_alone():
    torch.manual_seed(0)
    net, episode = Conv4(5, filters=8), class_episode(tasks=2)

    def peak(estimator, steps):
        with LiveTensorBytes() as live:
            meta_gradient(net, episode, estimator=estimator, inner_solver=GradientDescent(0.01, steps))
        return live.peak

    assert peak(Truncated(4), 32) <= 1.05 * peak(Truncated(4), 8)
    unrolled = [peak(Unrolled(), steps) for steps in (4, 8, 16)]
    assert unrolled[2] - unrolled[1] == pytest.approx(2 * (unrolled[1] - unrolled[0]), rel=0.1)


LEARNED = Proximal(1.0, learned=True)
GD = GradientDescent(0.1, 4)


@pytest.mark.parametrize(
    ("estimator", "solver", "regularizer", "words"),
    [
        (Reptile(), GD, LEARNED, r"Reptile: the strengths must be fixed.*found \['log_strength'\]. Set learned"),
        (Truncated(0), GD, LEARNED, r"Truncated: the strengths must be fixed.*found \['log_strength'\]"),
        (
            Truncated(5),
            GD,
            Proximal(1.0),
            r"last_steps must be at most the inner solver's steps, 4; found 5. Use Unrolled",
        ),
        (
            Truncated(2),
            GradientDescent(0.1, 4, tol=1e-3),
            Proximal(1.0),
            r"the inner solver's tol must be 0, .*found 0.001. Set tol=0",
        ),
        (
            Unrolled(),
            HessianFree(2),
            Proximal(1.0),
            r"HessianFree: the number of differentiated steps must be 0.*Use Impl",
        ),
        (
            Unrolled(),
            TorchOptimizer(torch.optim.Adam, 2),
            Proximal(1.0),
            r"TorchOptimizer: .* steps must be 0, since its steps have no derivative; found 2. Use Implicit",
        ),
    ],
)
def test_what_has_no_gradient_is_explained(estimator, solver, regularizer, words):
    with pytest.raises(ValueError, match=words):
        run(TanhNet().double(), estimator, solver, regularizer)


def test_truncated_needs_a_count():
    with pytest.raises(ValueError, match="last_steps must be zero or positive; found -1"):
        Truncated(-1)
