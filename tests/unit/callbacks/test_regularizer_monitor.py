"""RegularizerMonitor: what the strengths and step sizes are, layer by layer."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass

import pytest
import torch
from conftest import TanhNet, regression_episode
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_imaml import IMAMLModule
from lightning_imaml.callbacks import RegularizerMonitor
from lightning_imaml.inner import GradientDescent
from lightning_imaml.meta_gradients import Unrolled
from lightning_imaml.regularizers import LowRankProximal, Proximal, Regularizer


def module(**settings) -> IMAMLModule:
    torch.manual_seed(0)
    defaults = {"loss": F.mse_loss, "inner_solver": GradientDescent(0.1, 2), "regularizer_lr": 0.05}
    return IMAMLModule(TanhNet().double(), **defaults | settings)


def fit(model, logger=False, every: int = 1, batches: int = 2) -> Trainer:
    trainer = Trainer(
        accelerator="cpu", devices=1, logger=logger, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, max_epochs=1, callbacks=[RegularizerMonitor(every)],
    )  # fmt: skip
    trainer.fit(model, DataLoader([regression_episode(seed=k) for k in range(batches)], batch_size=None))
    return trainer


def test_a_scalar_is_logged_before_every_due_step(tmp_path):
    logger = CSVLogger(tmp_path, name="", version="")
    trainer = fit(module(regularizer=Proximal(0.5, learned=True)), logger, every=2, batches=5)
    with (tmp_path / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["regularizer/strength"]]
    assert len(rows) == 2
    # One step of Adam has moved it by its learning rate, two steps in a row at most by twice that.
    assert 0 < abs(math.log(float(rows[0]["regularizer/strength"]) / 0.5)) <= 0.0501
    assert not any(name.startswith("regularizer/strength/") for name in trainer.callback_metrics)


def test_layers_are_logged_with_their_own_strengths_and_step_sizes():
    solver = GradientDescent({"out.*": 0.1, "*": 0.2}, 2, learned=True)
    model = module(regularizer=Proximal({"out.*": 3.0, "*": 1.0}), inner_solver=solver, estimator=Unrolled())
    found = fit(model, batches=1).callback_metrics
    assert found["regularizer/strength/out"] == pytest.approx(3)
    assert found["regularizer/strength/hidden"] == pytest.approx(1)
    assert found["regularizer/strength"] == pytest.approx((3 * 10 + 1 * 16) / 26)
    assert found["inner_solver/lr/out"] == pytest.approx(0.1)
    assert found["inner_solver/lr/hidden"] == pytest.approx(0.2)


def test_tensorboard_gets_a_histogram_of_each_layer_whose_values_differ(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="board")
    written = []
    logger.experiment.add_histogram = lambda name, values, step: written.append((name, values, step))
    model = module(regularizer=LowRankProximal(1.0, rank=2), adapt_only=["out.*"])
    expected = model.regularizer.diagonal(torch.zeros(1, 10), model.strengths).detach()
    fit(model, logger, batches=1)
    ((name, values, step),) = written
    assert (name, step) == ("regularizer/strength/out", 0)
    torch.testing.assert_close(values.double(), expected, rtol=1e-6, atol=0)


@dataclass(frozen=True)
class Own(Regularizer):
    def init(self, model):
        return {"pull": torch.tensor(0.25, dtype=model.dtype)}

    def penalty(self, parameters, initial, strengths):
        return strengths["pull"] * (parameters - initial).square().sum(dim=1)


def test_the_strengths_of_a_regulariser_of_ones_own_are_logged_by_name():
    assert fit(module(regularizer=Own()), batches=1).callback_metrics["regularizer/pull"] == 0.25


def test_it_needs_the_modules_interface():
    with pytest.raises(TypeError, match=r"RegularizerMonitor needs a module .* which lacks regularizer"):
        RegularizerMonitor().setup(Trainer(accelerator="cpu", logger=False), LightningModule(), "fit")
    with pytest.raises(ValueError, match="every_n_steps must be at least 1; found 0"):
        RegularizerMonitor(0)
