"""Accuracy against inner steps at test."""

from __future__ import annotations

import csv
import dataclasses

import pytest
import torch
from conftest import TanhNet, class_episode, regression_episode
from lightning.pytorch import Trainer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_imaml import IMAMLModule
from lightning_imaml.callbacks import AdaptationCurve
from lightning_imaml.inner import GradientDescent
from lightning_imaml.regularizers import Proximal

SHAPE = (1, 4, 4)


def module(**settings) -> IMAMLModule:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3))
    return IMAMLModule(
        **{"backbone": network, "inner_solver": GradientDescent(0.3, 4), "regularizer": Proximal(0.1)} | settings
    )


def trainer(tmp_path, *callbacks, **settings) -> Trainer:
    return Trainer(
        **{"precision": "32-true"} | settings, default_root_dir=tmp_path, callbacks=list(callbacks), logger=False,
        enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu", devices=1,
    )  # fmt: skip


def loader() -> DataLoader:
    return DataLoader([class_episode(tasks=t, ways=3, shape=SHAPE, seed=t) for t in (3, 5)], batch_size=None)


def rows(tmp_path) -> list[dict[str, str]]:
    return list(csv.DictReader((tmp_path / "adaptation_curve.csv").read_text().splitlines()))


def test_each_point_is_a_test_with_so_many_steps(tmp_path):
    model = module()
    trainer(tmp_path, AdaptationCurve()).test(model, loader(), verbose=False)
    found = rows(tmp_path)
    assert [int(row["inner_steps"]) for row in found] == [0, 1, 2, 4, 8, 16]
    for row in found:
        steps = int(row["inner_steps"])
        model.inner_solver = dataclasses.replace(GradientDescent(0.3, 4), steps=max(1, steps))
        (expected,) = trainer(tmp_path).test(model, loader(), verbose=False)
        name = "test/accuracy" if steps else "test/accuracy_before"
        interval = "test/accuracy_interval95" if steps else "test/accuracy_interval95_before"
        assert float(row["accuracy"]) == pytest.approx(expected[name], rel=1e-5)
        assert float(row["interval95"]) == pytest.approx(expected[interval], rel=1e-4)
    assert (tmp_path / "adaptation_curve.png").stat().st_size > 5000


def test_the_solver_of_evaluation_is_the_one_to_vary(tmp_path):
    model = module(eval_inner_solver=GradientDescent(0.1, 3))
    (found,) = trainer(tmp_path, AdaptationCurve()).test(model, loader(), verbose=False)
    assert [int(row["inner_steps"]) for row in rows(tmp_path)] == [0, 1, 2, 3, 4, 8]
    assert found["test/accuracy_at_3_steps"] == pytest.approx(found["test/accuracy"])


def test_it_changes_no_result_and_logs_its_own(tmp_path):
    (without,) = trainer(tmp_path).test(module(), loader(), verbose=False)
    (found,) = trainer(tmp_path, AdaptationCurve([4, 9])).test(module(), loader(), verbose=False)
    assert {name: found[name] for name in without} == without
    assert set(found) - set(without) == {"test/accuracy_at_4_steps", "test/accuracy_at_9_steps"}
    assert found["test/accuracy_at_4_steps"] == pytest.approx(without["test/accuracy"])


@pytest.mark.parametrize("precision", ["64-true", "bf16-mixed", "bf16-true"])
def test_every_precision(tmp_path, precision):
    (found,) = trainer(tmp_path, AdaptationCurve([0, 3]), precision=precision).test(module(), loader(), verbose=False)
    assert 0 <= found["test/accuracy_at_3_steps"] <= 1


def test_regression_draws_the_loss(tmp_path):
    model = IMAMLModule(TanhNet().double(), loss=F.mse_loss, inner_solver=GradientDescent(0.1, 2))
    data = DataLoader([regression_episode()], batch_size=None)
    (found,) = trainer(tmp_path, AdaptationCurve([2])).test(model, data, verbose=False)
    assert found["test/loss_at_2_steps"] == pytest.approx(found["test/loss"])
    assert "loss" in rows(tmp_path)[0]


def test_more_steps_than_are_stable_are_not_a_number(tmp_path):
    model = module(inner_solver=GradientDescent(30.0, 1), regularizer=Proximal(1.0))
    (found,) = trainer(tmp_path, AdaptationCurve([1, 200])).test(model, loader(), verbose=False)
    assert found["test/accuracy_at_1_steps"] == pytest.approx(found["test/accuracy"])
    assert found["test/accuracy_at_200_steps"] != found["test/accuracy_at_200_steps"]


@pytest.mark.parametrize("steps", [[], [-1, 2]])
def test_bad_steps_are_refused(steps):
    with pytest.raises(ValueError, match="steps must be numbers of inner steps, 0 or more; found"):
        AdaptationCurve(steps)
