"""Inner solvers against closed forms."""

from __future__ import annotations

import pytest
import torch
from conftest import regression_episode
from torch import nn
from torch.nn import functional as F

from lightning_imaml.functional import adapt
from lightning_imaml.inner import GradientDescent
from lightning_imaml.regularizers import Proximal

STRENGTH = 0.8


def ridge(net: nn.Linear, episode):
    """argmin_W mean((X Wᵀ − Y)²) + λ/2 ‖W − W₀‖² for every task."""
    x, y, start = episode.support_inputs, episode.support_targets, net.weight.detach()
    scale = 2 / y[0].numel()
    left = scale * x.mT @ x + STRENGTH * torch.eye(x.shape[2], dtype=x.dtype)
    return torch.linalg.solve(left, scale * x.mT @ y + STRENGTH * start.T).mT


def test_gradient_descent_reaches_the_ridge_solution_and_stops_by_itself():
    torch.manual_seed(0)
    net = nn.Linear(3, 2, bias=False).double()
    episode = regression_episode()
    solver = GradientDescent(lr=0.2, steps=2000, tol=1e-11)
    adapted = adapt(
        net, episode.support_inputs, episode.support_targets,
        loss=F.mse_loss, inner_solver=solver, regularizer=Proximal(STRENGTH),
    )  # fmt: skip
    torch.testing.assert_close(adapted.parameters["weight"], ridge(net, episode), rtol=1e-9, atol=1e-10)
    assert adapted.converged.all()
    assert (adapted.residual <= 1e-11).all()
    assert (adapted.steps < 2000).all()
    assert len(set(adapted.steps.tolist())) > 1, "tasks of different conditioning stop at different steps"


def test_each_step_is_one_step_of_torch_sgd():
    torch.manual_seed(0)
    net = nn.Linear(3, 2).double()
    episode = regression_episode(tasks=2)
    adapted = adapt(
        net, episode.support_inputs, episode.support_targets,
        loss=F.mse_loss, inner_solver=GradientDescent(0.1, 7), regularizer=Proximal(STRENGTH),
    )  # fmt: skip
    assert adapted.steps.tolist() == [7, 7]
    for i in range(2):
        copy = nn.Linear(3, 2).double()
        copy.load_state_dict(net.state_dict())
        optimizer = torch.optim.SGD(copy.parameters(), lr=0.1)
        for _ in range(7):
            optimizer.zero_grad()
            pull = sum(
                (a - b.detach()).square().sum() for a, b in zip(copy.parameters(), net.parameters(), strict=True)
            )
            loss = F.mse_loss(copy(episode.support_inputs[i]), episode.support_targets[i]) + STRENGTH / 2 * pull
            loss.backward()
            optimizer.step()
        for name, value in copy.named_parameters():
            torch.testing.assert_close(adapted.parameters[name][i], value.detach(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"lr": 0.0, "steps": 1}, "lr must be positive; found 0.0"),
        ({"lr": 0.1, "steps": 0}, "steps must be at least 1; found 0"),
        ({"lr": 0.1, "steps": 1, "tol": -1.0}, "tol must be zero or positive; found -1.0"),
    ],
)
def test_bad_settings_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        GradientDescent(**arguments)
