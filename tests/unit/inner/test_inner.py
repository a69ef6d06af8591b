"""Inner solvers against closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.optimize
import torch
from conftest import regression_episode
from torch import nn
from torch.nn import functional as F

from lightning_imaml.curvature import GaussNewton, Hessian
from lightning_imaml.functional import adapt
from lightning_imaml.inner import GradientDescent, HessianFree, Nesterov, TorchOptimizer
from lightning_imaml.problems.network import FlatModel
from lightning_imaml.problems.supervised import SupervisedProblem, TaskLoss
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
        copy = by_hand(net, episode, i, torch.optim.SGD, {"lr": 0.1}, 7)
        for name, value in copy.named_parameters():
            torch.testing.assert_close(adapted.parameters[name][i], value.detach(), rtol=1e-12, atol=1e-14)


def by_hand(net: nn.Linear, episode, task: int, optimizer, options, steps: int) -> nn.Linear:
    """The proximal inner loop of one task in plain PyTorch."""
    copy = nn.Linear(3, 2).double()
    copy.load_state_dict(net.state_dict())
    stepper = optimizer(copy.parameters(), **options)
    for _ in range(steps):
        stepper.zero_grad()
        pull = sum((a - b.detach()).square().sum() for a, b in zip(copy.parameters(), net.parameters(), strict=True))
        loss = F.mse_loss(copy(episode.support_inputs[task]), episode.support_targets[task]) + STRENGTH / 2 * pull
        loss.backward()
        stepper.step()
    return copy


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"lr": 0.0, "steps": 1}, "lr must be a positive finite number; found 0.0"),
        ({"lr": 0.1, "steps": 0}, "steps must be at least 1; found 0"),
        ({"lr": 0.1, "steps": 1, "tol": -1.0}, "tol must be zero or positive; found -1.0"),
    ],
)
def test_bad_settings_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        GradientDescent(**arguments)


def logistic(inputs: int = 3):
    """Binary logistic regression of T tasks: strongly convex with the proximal term, no closed form."""
    torch.manual_seed(0)
    net = nn.Linear(inputs, 1).double()
    episode = regression_episode(tasks=3, shots=12, inputs=inputs, outputs=1)
    return net, episode.support_inputs, (episode.support_targets > 0).double()


SOLVERS = [
    GradientDescent(1.0, 3000, tol=1e-10),
    Nesterov(1.0, 3000, tol=1e-10),
    HessianFree(40, cg_steps=5, tol=1e-8),
    HessianFree(40, cg_steps=5, tol=1e-8, curvature=GaussNewton()),
    TorchOptimizer(torch.optim.SGD, 3000, {"lr": 0.5, "momentum": 0.5}, tol=1e-10),
    TorchOptimizer(torch.optim.Adam, 4000, {"lr": 0.02}, tol=1e-6),
]


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: f"{type(s).__name__}-{s.steps}")
def test_every_solver_reaches_scipys_optimum_of_logistic_regression(solver):
    net, inputs, targets = logistic()
    start = np.concatenate([net.weight.detach().numpy().ravel(), net.bias.detach().numpy()])
    adapted = adapt(
        net, inputs, targets,
        loss=F.binary_cross_entropy_with_logits, inner_solver=solver, regularizer=Proximal(0.1),
    )  # fmt: skip
    assert adapted.converged.all()
    for i in range(3):
        x, y = inputs[i].numpy(), targets[i].numpy().ravel()

        def objective(p, x=x, y=y):
            z = x @ p[:-1] + p[-1]
            return np.mean(np.logaddexp(0, z) - y * z) + 0.05 * np.sum((p - start) ** 2)

        best = scipy.optimize.minimize(objective, start, method="BFGS", options={"gtol": 1e-10})
        found = torch.cat([adapted.parameters["weight"][i].ravel(), adapted.parameters["bias"][i]])
        # ‖∇G‖ ≤ tol bounds the distance by tol/μ, and μ ≥ λ = 0.1; SciPy's own differences end near 1e-7.
        np.testing.assert_allclose(found.numpy(), best.x, atol=max(10 * solver.tol, 1e-6))


def test_nesterov_needs_fewer_steps_on_an_ill_conditioned_problem():
    torch.manual_seed(0)
    net = nn.Linear(20, 1, bias=False).double()
    inputs = torch.randn(2, 40, 20, dtype=torch.float64) * torch.logspace(0, 0.9, 20, dtype=torch.float64)
    targets = torch.randn(2, 40, 1, dtype=torch.float64)
    largest = torch.linalg.eigvalsh(2 / 40 * inputs.mT @ inputs).max().item() + 0.1
    steps = {}
    for kind in (GradientDescent, Nesterov):
        solver = kind(1 / largest, 20_000, tol=1e-7)
        adapted = adapt(net, inputs, targets, loss=F.mse_loss, inner_solver=solver, regularizer=Proximal(0.1))
        assert adapted.converged.all()
        steps[kind] = adapted.steps.max().item()
    assert steps[Nesterov] < steps[GradientDescent] / 4


def test_hessian_free_solves_a_quadratic_in_one_step():
    torch.manual_seed(0)
    net = nn.Linear(3, 2, bias=False).double()
    episode = regression_episode()
    adapted = adapt(
        net, episode.support_inputs, episode.support_targets,
        loss=F.mse_loss, inner_solver=HessianFree(1, cg_steps=8), regularizer=Proximal(STRENGTH),
    )  # fmt: skip
    torch.testing.assert_close(adapted.parameters["weight"], ridge(net, episode), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("curvature", [Hessian(), GaussNewton()], ids=str)
def test_hessian_free_never_increases_a_non_convex_objective(tanh_net, curvature):
    episode = regression_episode()
    flat = FlatModel(tanh_net)
    support = TaskLoss(flat, F.mse_loss, episode.support_inputs, episode.support_targets)
    problem = SupervisedProblem(support, Proximal(1e-3), flat.initial(), {})
    rows = (
        problem.start() + 2 * torch.randn(4, len(flat.initial()), generator=torch.Generator().manual_seed(3)).double()
    )
    first = value = problem.value(rows)
    for _ in range(8):
        rows = HessianFree(1, curvature=curvature).solve(problem, rows).parameters
        following = problem.value(rows)
        assert (following <= value).all()
        value = following
    assert (value < 0.5 * first).all()


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
        (torch.optim.Adam, {"lr": 0.05}),
        (torch.optim.RMSprop, {"lr": 0.01}),
    ],
)
def test_torch_optimizer_is_the_optimizer_on_every_task_by_itself(optimizer, options):
    torch.manual_seed(0)
    net = nn.Linear(3, 2).double()
    episode = regression_episode(tasks=2)
    adapted = adapt(
        net, episode.support_inputs, episode.support_targets,
        loss=F.mse_loss, inner_solver=TorchOptimizer(optimizer, 6, options), regularizer=Proximal(STRENGTH),
    )  # fmt: skip
    for i in range(2):
        copy = by_hand(net, episode, i, optimizer, options, 6)
        for name, value in copy.named_parameters():
            torch.testing.assert_close(adapted.parameters[name][i], value.detach(), rtol=1e-10, atol=1e-12)


def test_optimizers_that_mix_tasks_are_refused():
    with pytest.raises(ValueError, match="optimizer must be element-wise, so that tasks do not mix; found 'LBFGS'"):
        TorchOptimizer(torch.optim.LBFGS, 3)
