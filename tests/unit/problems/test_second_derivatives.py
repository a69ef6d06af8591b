"""Missing second derivatives are named, and the ways that the error names work."""

from __future__ import annotations

import pytest
import torch
from conftest import regression_episode
from test_isolation import PLAIN, Net, plain_loop
from torch import nn
from torch.nn import functional as F

from lightning_imaml import Episode
from lightning_imaml.curvature import GaussNewton, Hessian
from lightning_imaml.functional import adapt, meta_gradient
from lightning_imaml.inner import GradientDescent, HessianFree
from lightning_imaml.meta_gradients import FirstOrder, Implicit, Reptile, Unrolled


class Once(nn.Module):
    """The operation itself, for which nothing stands in: PyTorch has no second derivative of it."""

    def forward(self, h):
        return torch.ops.aten.hardsigmoid(h)


class Bent(Net):
    def __init__(self):
        super().__init__()
        self.bend = nn.Sequential(Once())

    def forward(self, x):
        return self.b(self.bend(self.hidden(x)))


def speech():
    """Five sequences of length 6 a task, as outputs ``[5, 6, 3]``."""
    episode = regression_episode(shots=5)
    targets = torch.randint(1, 3, (episode.tasks, 5, 2))
    return Episode(episode.support_inputs, targets, episode.query_inputs, targets)


class Frames(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(3, 18).double()

    def forward(self, x):
        return self.linear(x).unflatten(1, (6, 3))


def ctc(outputs, targets):
    count = len(outputs)
    return F.ctc_loss(
        outputs.log_softmax(-1).transpose(0, 1), targets, torch.full((count,), 6), torch.full((count,), 2)
    )


CASES = [
    (Bent, regression_episode, F.mse_loss, "found Once 'bend.0', whose derivative 'hardsigmoid_backward'"),
    (Frames, speech, ctc, "found the loss ctc, whose derivative '_ctc_loss_backward'"),
]


@pytest.mark.filterwarnings("ignore:.*must consist of operations:UserWarning")
@pytest.mark.parametrize("size", [1, None])
@pytest.mark.parametrize("estimator", [Unrolled(), Implicit(curvature=Hessian()), Implicit(curvature=GaussNewton())])
@pytest.mark.parametrize(("kind", "draw", "loss", "words"), CASES)
def test_a_missing_second_derivative_names_its_layer_or_loss(kind, draw, loss, words, estimator, size):
    settings = {"loss": loss, "inner_solver": GradientDescent(0.1, 2)}
    with pytest.raises(NotImplementedError, match=words):
        meta_gradient(kind(), draw(), estimator=estimator, chunk_size=size, **settings)


@pytest.mark.filterwarnings("ignore:.*must consist of operations:UserWarning")
@pytest.mark.parametrize(("kind", "draw", "loss", "words"), CASES)
def test_the_ways_that_the_error_names_work(kind, draw, loss, words):
    for estimator in (FirstOrder(), Reptile()):
        settings = {"loss": loss, "inner_solver": GradientDescent(0.1, 2), "estimator": estimator}
        together, alone = (meta_gradient(kind(), draw(), chunk_size=size, **settings).grads for size in (None, 1))
        torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-12)
        assert all(g.isfinite().all() for g in alone.values())
    if loss is F.mse_loss:
        found = meta_gradient(kind(), draw(), estimator=FirstOrder(), **PLAIN).grads
        torch.testing.assert_close(found, plain_loop(kind(), draw(), FirstOrder()), rtol=1e-9, atol=1e-12)


def test_a_hessian_free_solver_names_it_too():
    episode = regression_episode()
    with pytest.raises(NotImplementedError, match=r"found Once 'bend.0'"):
        adapt(Bent(), episode.support_inputs, episode.support_targets, loss=F.mse_loss, inner_solver=HessianFree(2),
              chunk_size=1)  # fmt: skip
