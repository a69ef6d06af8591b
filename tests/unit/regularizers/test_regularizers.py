"""Regularisers: closed forms against automatic differentiation, and learned strengths."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from conftest import TanhNet, regression_episode
from torch.nn import functional as F

from lightning_imaml.functional import meta_gradient
from lightning_imaml.inner import GradientDescent
from lightning_imaml.linear import Direct
from lightning_imaml.meta_gradients import FirstOrder, Implicit, Reptile, Unrolled
from lightning_imaml.problems.network import FlatModel
from lightning_imaml.regularizers import NoRegularizer, Proximal, Regularizer


@dataclass(frozen=True)
class OwnProximal(Regularizer):
    """A user's regulariser with its one method; the derivatives are the base's."""

    strength: float = 2.0

    def penalty(self, parameters, initial, strengths):
        return self.strength / 2 * ((parameters - initial) ** 2).sum(dim=1)


@dataclass(frozen=True)
class Anchor(Regularizer):
    """Pulls along one fixed direction, and does not depend on θ in the second derivative."""

    def penalty(self, parameters, initial, strengths):
        return parameters.sum(dim=1)


def test_proximal_is_the_base_with_closed_forms():
    phi, theta, v = torch.randn(3, 5).double(), torch.randn(5).double(), torch.randn(3, 5).double()
    ours, base = Proximal(1.3), OwnProximal(1.3)
    torch.testing.assert_close(ours.penalty(phi, theta, {}), base.penalty(phi, theta, {}))
    torch.testing.assert_close(ours.gradient(phi, theta, {}), base.gradient(phi, theta, {}).detach())
    torch.testing.assert_close(ours.product(v, phi, theta, {}), base.product(v, phi, theta, {}))


@pytest.mark.parametrize("estimator", [Unrolled(), FirstOrder(), Reptile()])
def test_without_a_regularizer_is_the_limit_of_a_vanishing_one(tanh_net, estimator):
    settings = {"loss": F.mse_loss, "inner_solver": GradientDescent(0.1, 5), "estimator": estimator}
    without = meta_gradient(tanh_net, regression_episode(), regularizer=NoRegularizer(), **settings)
    vanishing = meta_gradient(tanh_net, regression_episode(), regularizer=Proximal(1e-12), **settings)
    for name in without.grads:
        torch.testing.assert_close(without.grads[name], vanishing.grads[name], rtol=1e-9, atol=1e-11)


def test_no_regularizer_is_the_base_with_closed_forms():
    phi, theta, v = torch.randn(3, 5).double(), torch.randn(5).double(), torch.randn(3, 5).double()
    assert NoRegularizer().penalty(phi, theta, {}).tolist() == [0, 0, 0]
    assert NoRegularizer().gradient(phi, theta, {}).eq(0).all()
    assert NoRegularizer().product(v, phi, theta, {}).eq(0).all()


def test_the_implicit_gradient_needs_a_regularizer(tanh_net):
    with pytest.raises(ValueError, match=r"Implicit: the regularizer's gradient must depend .* found NoRegularizer"):
        meta_gradient(tanh_net, regression_episode(), loss=F.mse_loss, regularizer=NoRegularizer())


def test_a_penalty_without_curvature_has_none():
    phi, theta = torch.randn(3, 5), torch.randn(5)
    assert Anchor().product(torch.ones(3, 5), phi, theta, {}).eq(0).all()
    assert Anchor().gradient(phi, theta, {}).eq(1).all()


def test_a_users_regulariser_gives_the_same_meta_gradient(tanh_net):
    episode = regression_episode()
    settings = {"loss": F.mse_loss, "inner_solver": GradientDescent(0.1, 200), "estimator": Implicit(Direct())}
    ours = meta_gradient(tanh_net, episode, regularizer=Proximal(1.5), **settings)
    own = meta_gradient(tanh_net, episode, regularizer=OwnProximal(1.5), **settings)
    for name in ours.grads:
        torch.testing.assert_close(ours.grads[name], own.grads[name], rtol=1e-9, atol=1e-12)


def test_the_learned_strength_has_the_gradient_of_finite_differences():
    torch.manual_seed(0)
    net = TanhNet().double()
    episode = regression_episode()
    regularizer = Proximal(1.5, learned=True)
    log_strength = regularizer.init(FlatModel(net))["log_strength"]
    assert log_strength.item() == pytest.approx(math.log(1.5))

    def run(value):
        return meta_gradient(
            net,
            episode,
            loss=F.mse_loss,
            inner_solver=GradientDescent(0.2, 5000, tol=1e-12),
            estimator=Implicit(Direct()),
            regularizer=regularizer,
            strengths={"log_strength": value},
        )

    step = 1e-4
    difference = (run(log_strength + step).loss.mean() - run(log_strength - step).loss.mean()) / (2 * step)
    gradient = run(log_strength).grads["regularizer.log_strength"]
    torch.testing.assert_close(gradient, difference, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("strength", [0.0, -1.0, math.nan, math.inf])
def test_the_strength_must_be_positive(strength):
    with pytest.raises(ValueError, match="strength must be a positive finite number; found"):
        Proximal(strength)
