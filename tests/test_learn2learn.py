"""Against learn2learn, the library whose MAML the field compares with."""

from __future__ import annotations

import warnings

import pytest
import torch
from conftest import TanhNet, regression_episode
from torch.nn import functional as F

from lightning_imaml.functional import meta_gradient
from lightning_imaml.inner import GradientDescent
from lightning_imaml.meta_gradients import FirstOrder, Unrolled
from lightning_imaml.regularizers import NoRegularizer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Of its old dependencies.
    learn2learn = pytest.importorskip("learn2learn", reason="learn2learn is an extra: requirements/learn2learn.txt")


@pytest.mark.parametrize("estimator", [FirstOrder(), Unrolled()], ids=["first order", "second order"])
def test_the_meta_gradient_is_that_of_learn2learns_maml(estimator):
    torch.manual_seed(0)
    net, episode, steps, lr = TanhNet().double(), regression_episode(tasks=3), 4, 0.1
    maml = learn2learn.algorithms.MAML(TanhNet().double(), lr=lr, first_order=estimator == FirstOrder())
    maml.module.load_state_dict(net.state_dict())
    total = 0.0
    for task in range(3):
        learner = maml.clone()
        for _ in range(steps):
            learner.adapt(F.mse_loss(learner(episode.support_inputs[task]), episode.support_targets[task]))
        total = total + F.mse_loss(learner(episode.query_inputs[task]), episode.query_targets[task]) / 3
    total.backward()
    ours = meta_gradient(
        net,
        episode,
        loss=F.mse_loss,
        inner_solver=GradientDescent(lr, steps),
        estimator=estimator,
        regularizer=NoRegularizer(),
    )
    assert ours.loss.mean().item() == pytest.approx(total.item(), rel=1e-10)
    for name, parameter in maml.module.named_parameters():
        torch.testing.assert_close(ours.grads[name], parameter.grad, rtol=1e-8, atol=1e-10)


def test_the_core_never_imports_it():
    import subprocess
    import sys

    code = "import lightning_imaml.cli, sys; assert 'learn2learn' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
