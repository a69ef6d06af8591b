"""Learning finds the best λ of each weight, and beats the best single λ on new tasks."""

from __future__ import annotations

import csv

import learned_regularizer
import pytest
import torch
from torch.nn import functional as F

from lightning_imaml.functional import adapt, evaluate
from lightning_imaml.inner import HessianFree
from lightning_imaml.regularizers import Proximal


def family(**settings) -> learned_regularizer.Family:
    best = torch.tensor([0.3, 1.0, 4.0], dtype=torch.float64)
    defaults = {"shots": 5, "queries": 8, "tasks": 4, "batches": 2, "noise": 0.7, "split": "train", "seed": 0}
    return learned_regularizer.Family(best, **defaults | settings)


def test_the_best_strengths_give_the_posterior_mean():
    """By Gaussian conditioning, which knows nothing of λ."""
    tasks = family()
    episode, ones = tasks[0], torch.ones(3, dtype=torch.float64)
    prior = torch.diag(2 * 0.7**2 / (5 * tasks.best))
    expected = []
    for x, y, xq, yq in zip(*episode, strict=True):
        of_targets = x @ prior @ x.T + 0.7**2 * torch.eye(5)
        mean = ones + prior @ x.T @ torch.linalg.solve(of_targets, y[:, 0] - x @ ones)
        expected.append((xq @ mean - yq[:, 0]).square().mean())
    torch.testing.assert_close(learned_regularizer.losses(episode, ones, tasks.best), torch.stack(expected))


def test_the_dense_solve_is_what_the_package_adapts_to():
    tasks = family()
    episode, model = tasks[1], torch.nn.Linear(3, 1, bias=False).double()
    adapted = adapt(
        model, episode.support_inputs, episode.support_targets, loss=F.mse_loss, inner_solver=HessianFree(1, 3),
        regularizer=Proximal(1.0, learned=True, per="parameter"), strengths={"log_strength": tasks.best.log()},
    )  # fmt: skip
    found, _ = evaluate(model, adapted.parameters, episode.query_inputs, episode.query_targets, loss=F.mse_loss)
    expected = learned_regularizer.losses(episode, model.weight.detach()[0], tasks.best)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


def test_tasks_are_a_function_of_their_number_and_split():
    assert torch.equal(family()[1].query_targets, family()[1].query_targets)
    others = [family()[0], family(split="test")[0], family(seed=1)[0]]
    assert not any(torch.equal(family()[1].query_targets, other.query_targets) for other in others)


@pytest.mark.slow  # Trains twice: the proof that the learned gradients lead where theory says.
def test_learning_finds_the_best_strengths_and_beats_the_best_scalar(tmp_path, capsys):
    settings = "--tasks 256 --meta-steps 400 --test-tasks 10000"
    rows, found = learned_regularizer.main([*settings.split(), "--output", str(tmp_path)])
    assert all(abs(row["relative_error"]) < 0.1 for row in found), found
    result = {row["regularizer"]: row for row in rows}
    gain = result["learned diagonal"]
    assert gain["below_best_scalar"] > 10 * gain["below_interval95"]
    assert abs(gain["test_mse"] - result["best diagonal"]["test_mse"]) < 1e-3
    assert abs(result["learned scalar"]["below_best_scalar"]) < 2e-3
    assert (tmp_path / "learned_regularizer.png").stat().st_size > 0
    with (tmp_path / "learned_regularizer.csv").open() as file:
        assert [float(row["learned"]) for row in csv.DictReader(file)] == [row["learned"] for row in found]
    assert "best single λ" in capsys.readouterr().out
