"""Curvature products against dense derivatives."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import TanhNet, class_episode, regression_episode
from dense_curvature import dense
from torch.func import functional_call
from torch.nn import functional as F

from lightning_imaml._compile import splitting
from lightning_imaml.curvature import GaussNewton, Hessian
from lightning_imaml.inner import HessianFree
from lightning_imaml.problems.network import FlatModel
from lightning_imaml.problems.supervised import SupervisedProblem, TaskLoss
from lightning_imaml.regularizers import Proximal

CASES = {
    "squared error": (F.mse_loss, regression_episode(3)),
    "cross-entropy": (F.cross_entropy, class_episode(3, ways=2, queries=3, shots=3, shape=(3,))),
    "quartic": (lambda o, t: (o - t).pow(4).mean(), regression_episode(3)),
}


def problem_of(loss, episode, net):
    flat = FlatModel(net)
    support = TaskLoss(flat, loss, episode.support_inputs.double(), episode.support_targets)
    return SupervisedProblem(support, Proximal(0.7), flat.initial(), {})


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("curvature", [Hessian(), GaussNewton(), Hessian(0.4), GaussNewton(0.4)], ids=str)
def test_products_equal_the_dense_matrix(case, curvature):
    loss, episode = CASES[case]
    torch.manual_seed(1)
    net = TanhNet().double()
    problem = problem_of(loss, episode, net)
    flat = problem.support.model
    point = problem.start() + 0.3 * torch.randn(3, len(flat.initial()), dtype=torch.float64)
    vector = torch.randn_like(point)
    linearization = curvature.linearize(problem, point)
    product = linearization.product(vector)
    for i in range(3):
        matrix = dense(
            curvature, loss, net, flat, point[i], episode.support_inputs[i].double(), episode.support_targets[i]
        )
        torch.testing.assert_close(product[i], matrix @ vector[i], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        linearization.gradient, problem.gradient(point.detach()).detach(), rtol=1e-10, atol=1e-12
    )
    for i in range(3):
        outputs = functional_call(net, flat.unflatten(point[i]), (episode.support_inputs[i].double(),))
        value = loss(outputs, episode.support_targets[i]) + 0.35 * (point[i] - flat.initial()).square().sum()
        torch.testing.assert_close(linearization.value[i], value.detach())
    # One linearisation serves many products.
    torch.testing.assert_close(linearization.product(vector), product)


@pytest.mark.parametrize("curvature", [Hessian(0.4), GaussNewton(0.4)], ids=str)
def test_what_is_recorded_has_the_same_value_gradient_and_product(curvature, monkeypatch):
    monkeypatch.setattr(splitting, "_inductor", lambda graph: graph)  # Cut, and run as it is.
    net = TanhNet().double()
    problem = problem_of(lambda o, t: F.mse_loss(o, t).sqrt(), regression_episode(3), net)  # Its slope takes its value.
    support = replace(problem.support, model=FlatModel(net, compile=True))
    point = problem.start() + 0.3
    own, recorded = (curvature.linearize(p, point) for p in (problem, replace(problem, support=support)))
    torch.testing.assert_close(recorded[:2], own[:2])
    torch.testing.assert_close(recorded.product(point), own.product(point))


def test_a_step_whose_first_try_is_accepted_takes_one_forward_pass_besides_the_linearisation(monkeypatch):
    tried = []
    value = SupervisedProblem.value
    monkeypatch.setattr(SupervisedProblem, "value", lambda self, at: tried.append(at) or value(self, at))
    problem = problem_of(F.mse_loss, regression_episode(3), torch.nn.Linear(3, 2).double())  # Convex and quadratic.
    HessianFree(2, cg_steps=8).solve(problem, problem.start())
    assert len(tried) == 2


def test_damping_reaches_the_hessian_free_solver():
    """With a matrix that is all damping, its step is a gradient step of length 1/damping."""
    torch.manual_seed(0)  # An entry whose gradient nearly vanishes would not keep the bound.
    problem = problem_of(F.mse_loss, regression_episode(3), TanhNet().double())
    step = HessianFree(1, curvature=Hessian(damping=1e6)).solve(problem, problem.start()).parameters - problem.start()
    expected = -problem.gradient(problem.start()) / 1e6
    torch.testing.assert_close(step, expected, rtol=1e-4, atol=0)


def test_negative_damping_is_refused():
    with pytest.raises(ValueError, match=r"Hessian: damping must be zero or positive; found -1\.0"):
        Hessian(damping=-1.0)


def test_gauss_newton_is_definite_where_the_hessian_is_not():
    torch.manual_seed(0)
    net = TanhNet(hidden=8).double()
    loss, episode = F.mse_loss, regression_episode(6)
    problem = problem_of(loss, episode, net)
    flat = problem.support.model
    point = problem.start() + 2.0 * torch.randn(6, len(flat.initial()), dtype=torch.float64)
    lowest = {}
    for curvature in (Hessian(), GaussNewton()):
        lowest[type(curvature)] = min(
            torch.linalg.eigvalsh(
                dense(curvature, loss, net, flat, point[i], episode.support_inputs[i], episode.support_targets[i])
            )[0].item()
            for i in range(6)
        )
    assert lowest[GaussNewton] >= 0.7 - 1e-9
    assert lowest[Hessian] < 0


@pytest.mark.parametrize("curvature", [Hessian(), GaussNewton()], ids=str)
def test_a_linear_loss_has_the_regularisers_curvature_alone(curvature):
    net = torch.nn.Linear(3, 2).double()
    problem = problem_of(lambda o, t: (o * t).sum(), regression_episode(2), net)
    vector = torch.randn(2, 8, dtype=torch.float64)
    torch.testing.assert_close(curvature.linearize(problem, problem.start()).product(vector), 0.7 * vector)
