"""The comparison of the Hessian-free solver with gradient descent counts what each of them evaluates."""

from __future__ import annotations

import csv

import hessian_free
import pytest
import torch
from lightning.pytorch import Trainer

from lightning_imaml import IMAMLModule
from lightning_imaml.curvature import GaussNewton, Hessian
from lightning_imaml.data import GlyphDataModule
from lightning_imaml.inner import HessianFree
from lightning_imaml.models import Conv4


def test_counts_are_those_of_the_solvers(tmp_path, capsys):
    options = [
        "--tasks",
        "2",
        "--strengths",
        "2.0",
        "--steps",
        "3",
        "--most",
        "2",
        "--output",
        str(tmp_path / "counts.csv"),
    ]
    rows = hessian_free.main(options)
    descent, *newton = rows
    assert (descent["gradients"], descent["products"], descent["values"]) == (3, 0, 0)
    assert descent["reached"] == 1
    for row in newton:
        steps = row["gradients"]
        assert 1 <= steps <= 2
        assert row["products"] == 5 * steps
        assert row["values"] >= steps  # At least one try of its length; that where it sets out comes with the gradient.
        assert 6 <= row["mean_evaluations"] <= 6 * steps
        assert (row["reached"] == 1) == (row["largest_gradient_norm"] <= descent["largest_gradient_norm"]) or steps == 2
    with (tmp_path / "counts.csv").open() as file:
        assert [row["solver"] for row in csv.DictReader(file)] == [row["solver"] for row in rows]
    assert "Gauss-Newton" in capsys.readouterr().out


@pytest.mark.parametrize("curvature", [Hessian(), GaussNewton()])
def test_counting_changes_nothing(curvature):
    episode = next(iter(GlyphDataModule(queries=1, tasks_per_batch=2).train_dataloader()))
    problem = hessian_free.problem_of(episode, 2.0, hessian_free.network(None, 0))
    plain = HessianFree(2, curvature=curvature).solve(problem, problem.start()).parameters
    _, taken, counts = hessian_free.until(problem, curvature, torch.zeros(2), most=2)
    counted = HessianFree(2, curvature=hessian_free.CountingCurvature(curvature)).solve(problem, problem.start())
    assert torch.equal(counted.parameters, plain)
    assert (counts["gradients"], counts["products"]) == (2, 10)
    assert taken.tolist() == [2, 2]


def test_a_meta_trained_network_has_the_weights_of_its_checkpoint(tmp_path):
    trained = Conv4(5)
    module = IMAMLModule(trained)
    trainer = Trainer(logger=False, max_steps=0, accelerator="cpu", enable_progress_bar=False)
    trainer.fit(module, GlyphDataModule(queries=1, tasks_per_batch=1, batches_per_epoch=1))
    trainer.save_checkpoint(tmp_path / "some.ckpt")
    found = hessian_free.network(tmp_path / "some.ckpt", seed=0)
    assert found.state_dict().keys() == trained.state_dict().keys()
    for name, weight in trained.state_dict().items():
        assert torch.equal(found.state_dict()[name], weight)
