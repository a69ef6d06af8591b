"""Sinusoids and linear functions: their formulas, their distributions, and the known best initialisation."""

from __future__ import annotations

import math
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from torch.nn import functional as F

from lightning_imaml.data import LinearRegressionDataModule, SinusoidDataModule
from lightning_imaml.functional import adapt
from lightning_imaml.inner import GradientDescent
from lightning_imaml.regularizers import Proximal


def episodes(module):
    return list(module.test_dataloader())


def test_sinusoids_are_sinusoids_of_the_paper():
    data = SinusoidDataModule(shots=8, queries=12, tasks_per_batch=50, test_tasks=400)
    amplitudes, phases, inputs = [], [], []
    for episode in episodes(data):
        assert episode.validate().support_inputs.shape == (50, 8, 1)
        assert episode.query_targets.shape == (50, 12, 1)
        x = torch.cat([episode.support_inputs, episode.query_inputs], dim=1).double()
        y = torch.cat([episode.support_targets, episode.query_targets], dim=1).double()
        # A sin(x - p) = a sin x + b cos x with a = A cos p, b = -A sin p: linear, and solved by least squares.
        design = torch.cat([x.sin(), x.cos()], dim=2)
        found = torch.linalg.lstsq(design, y).solution
        assert (design @ found - y).abs().max() < 1e-4
        a, b = found[:, 0, 0], found[:, 1, 0]
        amplitudes += (a**2 + b**2).sqrt().tolist()
        phases += torch.atan2(-b, a).tolist()
        inputs += x.flatten().tolist()
    # Kolmogorov and Smirnov's test against the uniform distributions of MAML, section 5.1.
    for values, low, high in ((amplitudes, 0.1, 5.0), (phases, 0.0, math.pi), (inputs, -5.0, 5.0)):
        assert stats.kstest(values, stats.uniform(low, high - low).cdf).pvalue > 1e-3


def test_linear_functions_have_gaussian_weights_and_noise():
    settings = {"features": 3, "mean": 2.0, "spread": 0.5, "noise": 0.3}
    data = LinearRegressionDataModule(shots=100, queries=100, tasks_per_batch=100, test_tasks=300, **settings)
    weights, residuals = [], []
    for episode in episodes(data):
        x, y = episode.support_inputs.double(), episode.support_targets.double()
        found = torch.linalg.lstsq(x, y).solution
        weights.append(found[..., 0])
        residuals.append((x @ found - y).square().sum(dim=1)[:, 0] / (100 - 3))
        for column in x.flatten(0, 1).T:
            assert stats.kstest(column.numpy(), "norm").pvalue > 1e-4
    weights, residuals = torch.cat(weights), torch.cat(residuals)
    assert weights.mean().item() == pytest.approx(2.0, abs=4 * 0.5 / math.sqrt(900))
    # The variance of a fitted weight is that of the weight and that of the fit, σ²/n.
    assert weights.var().item() == pytest.approx(0.5**2 + 0.3**2 / 97, rel=0.2)
    assert residuals.mean().item() == pytest.approx(0.3**2, rel=0.03)
    assert np.corrcoef(weights.T)[np.triu_indices(3, 1)].max() < 0.2


def test_the_mean_of_the_weights_is_the_best_initialisation():
    """The proximal inner problem is Bayesian linear regression: its solution is the posterior mean."""
    settings = {"features": 2, "mean": 1.5, "spread": 0.5, "noise": 0.2}
    data = LinearRegressionDataModule(shots=3, queries=20, tasks_per_batch=60, test_tasks=60, **settings)
    (episode,) = episodes(data)
    episode = type(episode)(*(part.double() for part in episode))
    x, y = episode.support_inputs, episode.support_targets
    ratio = 0.2**2 / 0.5**2
    system = x.mT @ x + ratio * torch.eye(2)
    posterior = torch.linalg.solve(system, x.mT @ y + ratio * 1.5)
    model = nn.Linear(2, 1, bias=False).double()
    errors = {}
    for start in (1.5, 0.0):
        nn.init.constant_(model.weight, start)
        adapted = adapt(
            model,
            x,
            y,
            loss=lambda outputs, targets: F.mse_loss(outputs, targets, reduction="sum") / 2,
            inner_solver=GradientDescent(lr=0.05, steps=2000),
            regularizer=Proximal(ratio),
        )
        weight = adapted.parameters["weight"].mT
        if start == 1.5:
            torch.testing.assert_close(weight, posterior, rtol=1e-6, atol=1e-8)
        errors[start] = F.mse_loss(episode.query_inputs @ weight, episode.query_targets).item()
    assert errors[1.5] < errors[0.0]


@pytest.mark.parametrize("make", [SinusoidDataModule, LinearRegressionDataModule])
def test_tasks_are_functions_of_seed_split_and_number(make):
    def drawn(split="train", **options):
        data = make(tasks_per_batch=3, batches_per_epoch=2, **options)
        return [tuple(e.query_targets.flatten(1).sum(1).tolist()) for e in getattr(data, f"{split}_dataloader")()]

    assert drawn() == drawn(num_workers=1)
    assert drawn() != drawn(seed=1)
    assert drawn()[0] != drawn("val", val_tasks=3)[0]
    assert drawn("test", test_tasks=6) == drawn("test", test_tasks=6)


def test_tasks_can_be_sent_to_a_spawned_worker():
    data = SinusoidDataModule(tasks_per_batch=2, val_tasks=2)
    expected = next(iter(data.val_dataloader()))
    data.trainer = SimpleNamespace(distributed_sampler_kwargs=None, unsendable=lambda: None)
    episode = pickle.loads(pickle.dumps(data.val_dataloader().dataset))[0]
    assert all(torch.equal(a, b) for a, b in zip(episode, expected, strict=True))


def test_spawned_workers_are_not_sent_the_trainer_by_a_transform():
    data = SinusoidDataModule(tasks_per_batch=2, transform=lambda x: x, train_transform=lambda x: x)
    data.trainer = SimpleNamespace(distributed_sampler_kwargs=None, unsendable=lambda: None)
    episode = pickle.loads(pickle.dumps(data.val_dataloader().dataset))[0]
    assert episode.support_inputs.shape == (2, 10, 1)
    assert data.transform is not None


def test_the_number_of_points_can_be_drawn():
    data = SinusoidDataModule(shots=(5, 7), queries=4, eval_shots=10, eval_queries=(2, 3), tasks_per_batch=2)
    assert {e.support_inputs.shape[1] for e in data.train_dataloader()} == {5, 6, 7}
    assert {(e.support_inputs.shape[1], e.query_inputs.shape[1]) for e in data.val_dataloader()} == {(10, 2), (10, 3)}


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (SinusoidDataModule, {"amplitude": (5.0, 0.1)}, "amplitude must be the lowest and the highest of a range"),
        (SinusoidDataModule, {"shots": 0}, "shots must be a whole number of at least 1; found 0"),
        (LinearRegressionDataModule, {"noise": -1.0}, "spread and noise at least 0; found 10, 1.0 and -1.0"),
        (LinearRegressionDataModule, {"features": 0}, "features must be at least 1"),
    ],
)
def test_arguments_are_checked(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)
