"""Bad input: each error says the argument, the requirement, what was found and the remedy."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from conftest import class_episode, regression_episode
from torch import nn
from torch.nn import functional as F

from lightning_imaml import Episode
from lightning_imaml.curvature import GaussNewton
from lightning_imaml.functional import adapt, meta_gradient
from lightning_imaml.inner import GradientDescent
from lightning_imaml.linear import Direct
from lightning_imaml.meta_gradients import FirstOrder, Implicit
from lightning_imaml.models import Conv4, use_batch_statistics
from lightning_imaml.regularizers import Proximal, Regularizer

EPISODE = class_episode(tasks=3, shape=(3,))


def linear(outputs: int = 5) -> nn.Module:
    return nn.Linear(3, outputs)


def run(model: nn.Module, episode: Episode = EPISODE, **settings):
    return meta_gradient(model, episode, inner_solver=GradientDescent(0.1, 2), **settings)


def with_targets(value: int) -> Episode:
    targets = EPISODE.support_targets.clone()
    targets[1, 0] = value
    return EPISODE._replace(support_targets=targets)


BAD_INPUT = {
    "labels above the outputs": (
        lambda: run(linear(4)),
        r"targets must lie in 0 … 3, since the backbone has 4 outputs; found 4. Give the backbone one output",
    ),
    "negative labels": (
        lambda: run(linear(), with_targets(-2)),
        r"support_targets must be class indices from 0; found -2. Relabel",
    ),
    "labels beyond the ways": (lambda: run(linear(), with_targets(7)), r"targets must lie in 0 … 4.*found 7"),
    "inputs of another dtype": (
        lambda: run(linear(), EPISODE._replace(query_inputs=EPISODE.query_inputs.double())),
        r"query_inputs must be of the backbone's dtype torch.float32; found torch.float64. Convert",
    ),
    "parameters of mixed dtypes": (
        lambda: run(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 5).double())),
        r"must share one floating dtype and one device; found .*float32.*float64.*Convert it with .to",
    ),
    "nothing to train": (
        lambda: run(linear().requires_grad_(False)),
        r"at least one parameter with requires_grad=True; found none in Linear. Unfreeze",
    ),
    "BatchNorm with running statistics": (
        lambda: run(nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5))),
        r"norm layers must not track running statistics.*found BatchNorm1d '1'. Build it with track_running_stats=",
    ),
    "chunks of nothing": (lambda: run(linear(), chunk_size=0), r"chunk_size must be at least 1.*found 0"),
    "no task dimension": (
        lambda: run(linear(), EPISODE._replace(query_targets=torch.zeros(10, dtype=torch.long))),
        r"query_targets must have shape \[tasks, samples, ...\].*found \[10\].*unsqueeze\(0\)",
    ),
    "tasks that differ": (
        lambda: run(linear(), EPISODE._replace(query_inputs=EPISODE.query_inputs[:2])),
        r"query_inputs must have the same number of tasks as support_targets \(3\); found 2",
    ),
    "inputs without a target": (
        lambda: run(linear(), EPISODE._replace(query_targets=EPISODE.query_targets[:, :7])),
        r"query_targets must have one target for each query input; found 7 targets for 10 inputs",
    ),
    "learned strength without a gradient": (
        lambda: run(linear(), estimator=FirstOrder(), regularizer=Proximal(1.0, learned=True)),
        r"the strengths must be fixed, since it has no gradient .*; found \['log_strength'\]. Set learned",
    ),
    "strengths of another name": (
        lambda: run(linear(), regularizer=Proximal(1.0, learned=True), strengths={"strength": torch.ones(())}),
        r"strengths must be tensors .* that Proximal learns, \{'log_strength': \[\]\}; found \{'strength': \[\]\}",
    ),
    "strengths where none are learned": (
        lambda: run(linear(), strengths={"log_strength": torch.ones(())}),
        r"strengths must be tensors .* that Proximal learns, \{\}; found \{'log_strength': \[\]\}",
    ),
    "strengths of another shape": (
        lambda: run(
            linear(),
            regularizer=Proximal(1.0, learned=True, per="parameter"),
            strengths={"log_strength": torch.ones(7)},
        ),
        r"learns, \{'log_strength': \[20\]\}; found \{'log_strength': \[7\]\}",
    ),
    "rates of another name": (
        lambda: adapt(
            linear(),
            *EPISODE[:2],
            inner_solver=GradientDescent(0.1, 2, learned=True),
            rates={"lr": torch.ones(())},
        ),
        r"rates must be tensors .* that GradientDescent learns, \{'log_lr': \[\]\}; found \{'lr': \[\]\}. Take .*rates",
    ),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_explained(case):
    call, words = BAD_INPUT[case]
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (1.0, "support_targets must hold tensors only, at least one; found float"),
        ({}, "support_targets must hold tensors only, at least one; found nothing"),
        ([1, 2], "support_targets must hold tensors only, at least one; found int"),
    ],
)
def test_any_part_of_an_episode_is_checked(targets, words):
    with pytest.raises(TypeError, match=words):
        run(linear(), EPISODE._replace(support_targets=targets))


def test_a_loss_for_each_sample_is_refused():
    for tasks in (1, 3):
        with pytest.raises(ValueError, match=r"loss must give one number for each task; found .* shape \[5\].*'mean'"):
            run(linear(), class_episode(tasks, shape=(3,)), loss=nn.CrossEntropyLoss(reduction="none"))


def test_gauss_newton_explains_that_it_needs_one_tensor():
    class Pair(nn.Linear):
        def forward(self, x):
            return super().forward(x), x

    with pytest.raises(TypeError, match=r"outputs must be one tensor; found tuple.*curvature=Hessian"):
        run(Pair(3, 5), loss=lambda o, t: F.cross_entropy(o[0], t), estimator=Implicit(curvature=GaussNewton()))
    assert run(Pair(3, 5), loss=lambda o, t: F.cross_entropy(o[0], t)).loss.isfinite().all()


@dataclass(frozen=True)
class Anchor(Regularizer):
    power: int

    def penalty(self, parameters, initial, strengths):
        return parameters.pow(self.power).sum(dim=1)


@pytest.mark.parametrize("power", [1, 2])
def test_a_regulariser_without_the_initialisation_is_explained(power):
    """Also one with a gradient that varies, by which a meta-gradient of zero would look like any other."""
    with pytest.raises(ValueError, match=r"must depend on the initialisation; found .*Anchor.*Use Proximal"):
        run(linear(), regularizer=Anchor(power))


def test_a_regulariser_without_the_initialisation_leaves_the_shared_parameters_to_learn():
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5))
    grads = run(net, regularizer=Anchor(2), adapt_only=("2.*",)).grads
    assert grads["0.weight"].abs().max() > 0
    assert grads["2.weight"].eq(0).all()


@pytest.mark.parametrize("size", [(1, 20, 20), (3, 28, 28)])
def test_conv4_explains_its_image_size(size):
    with pytest.raises(ValueError, match=r"images must have shape \[n, 1, 28, 28\]; found \[2, .*Resize them"):
        Conv4(5)(torch.rand(2, *size))
    with pytest.raises(ValueError, match="ways must be at least 1; found 0"):
        Conv4(0)


def test_an_episode_holds_tensors_only():
    with pytest.raises(
        TypeError, match=r"query_targets must hold tensors only, at least one; found float.*torch.as_tensor"
    ):
        run(linear(), EPISODE._replace(query_targets=1.0))


def test_a_nan_loss_names_its_task():
    inputs = EPISODE.support_inputs.clone()
    inputs[1, 2, 0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"gradient norm must be finite; found \[nan\] for tasks \[1\]"):
        run(linear(), EPISODE._replace(support_inputs=inputs))
    with pytest.raises(FloatingPointError, match=r"for tasks \[1\]"):
        adapt(linear(), inputs, EPISODE.support_targets, inner_solver=GradientDescent(0.1, 2))
    queries = EPISODE.query_inputs.clone()
    queries[2, 0, 0] = float("inf")
    with pytest.raises(FloatingPointError, match=r"outer loss must be finite; found .* for tasks \[2\].*Check these"):
        run(linear(), EPISODE._replace(query_inputs=queries))


def test_a_diverging_inner_loop_is_not_passed_on():
    episode = regression_episode()
    with pytest.raises(FloatingPointError, match="lower the inner learning rate"):
        meta_gradient(nn.Linear(3, 2).double(), episode, loss=F.mse_loss, inner_solver=GradientDescent(1e30, 20))


def test_ignored_targets_are_no_labels():
    episode = with_targets(-100)
    assert run(linear(), episode).loss.isfinite().all()
    ignoring = nn.CrossEntropyLoss(ignore_index=-7)
    assert run(linear(), with_targets(-7), loss=ignoring).loss.isfinite().all()
    assert run(linear(), with_targets(255), loss=nn.CrossEntropyLoss(ignore_index=255)).loss.isfinite().all()
    with pytest.raises(ValueError, match="found -100"):
        run(linear(), episode, loss=ignoring)


def test_batchnorm_in_evaluation_mode_is_frozen_and_works():
    net = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5)).eval()
    statistics = net[1].running_mean.clone()
    assert run(net).loss.isfinite().all()
    assert net[1].running_mean.equal(statistics)


def test_use_batch_statistics_is_the_remedy():
    net = use_batch_statistics(nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5)))
    trained = run(net.train()).loss
    assert run(net.eval()).loss.equal(trained), "the same statistics in training and in evaluation"


def test_conv4_takes_the_image_sizes_of_the_papers():
    assert Conv4(5)(torch.rand(2, 1, 28, 28)).shape == (2, 5)
    assert Conv4(20, channels=3, filters=32, image_size=84)(torch.rand(2, 3, 84, 84)).shape == (2, 20)
    filters, blocks = 64, 3
    expected = (9 + 1) * filters + blocks * (9 * filters + 1) * filters + 4 * 2 * filters + (4 * filters + 1) * 5
    assert sum(p.numel() for p in Conv4(5).parameters()) == expected


def test_one_parameter_set_may_be_shared():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 3, bias=False)
            self.b = nn.Linear(3, 3, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(torch.tanh(self.a(x)))

    torch.manual_seed(0)
    net = Tied().double()
    episode = regression_episode(outputs=3)
    settings = {"loss": F.mse_loss, "inner_solver": GradientDescent(0.2, 5000, tol=1e-12)}
    result = meta_gradient(net, episode, estimator=Implicit(Direct()), **settings)
    assert set(result.grads) == {"a.weight"}
    losses = []
    for step in (1e-4, -1e-4):
        moved = copy.deepcopy(net)
        with torch.no_grad():
            moved.a.weight[1, 2] += step
        losses.append(meta_gradient(moved, episode, estimator=FirstOrder(), **settings).loss.mean())
    difference = (losses[0] - losses[1]) / 2e-4
    torch.testing.assert_close(result.grads["a.weight"][1, 2], difference, rtol=1e-6, atol=1e-9)
