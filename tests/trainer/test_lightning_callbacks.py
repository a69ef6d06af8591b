"""Lightning's own callbacks and loggers beside the module."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import (
    BasePredictionWriter,
    EarlyStopping,
    EMAWeightAveraging,
    ModelCheckpoint,
    ModelSummary,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from small_runs import loader, module, network, trainer, weights
from torch import nn

from lightning_imaml import IMAMLModule
from lightning_imaml.data import SinusoidDataModule
from lightning_imaml.inner import GradientDescent
from lightning_imaml.models import MLP


def test_early_stopping_stops():
    stop = EarlyStopping("val/loss", patience=0, min_delta=1e9)
    run = trainer(stop, max_epochs=10)
    run.fit(module(), loader(1), loader(1))
    assert run.current_epoch == 2
    assert stop.stopped_epoch == 1


@pytest.mark.parametrize("layers", [[], [nn.BatchNorm1d(4, track_running_stats=False)]], ids=["plain", "batch norm"])
def test_stochastic_weight_averaging_averages(layers):
    kept = []

    class Keep(StochasticWeightAveraging):
        def on_train_epoch_start(self, trainer, pl_module):
            kept.append(weights(pl_module))
            super().on_train_epoch_start(trainer, pl_module)

    model = module(backbone=network(*layers))
    trainer(Keep(swa_lrs=0.5, swa_epoch_start=2), max_epochs=4).fit(model, loader(2))
    assert len(kept) == 4
    torch.testing.assert_close(weights(model), torch.stack(kept[1:]).mean(dim=0))


class Late(IMAMLModule):
    def configure_backbone(self):
        return network()


def test_weight_averaging_sees_a_network_that_is_built_late():
    average = StochasticWeightAveraging(swa_lrs=0.5, swa_epoch_start=1)
    model = module(Late, backbone=None)
    trainer(average, max_epochs=2).fit(model, loader(2))
    assert sum(p.numel() for p in average._average_model.parameters()) == weights(model).numel()


@pytest.mark.filterwarnings("ignore:.*overrides the configure_model")
def test_the_moving_average_of_weights_follows():
    model, run = module(), trainer(EMAWeightAveraging(decay=0.5), max_steps=2)
    steps = [weights(model)]
    original = model.on_train_batch_end
    model.on_train_batch_end = lambda *args: (steps.append(weights(model)), original(*args))
    run.fit(model, loader(2))
    torch.testing.assert_close(weights(model), (steps[1] + steps[2]) / 2)


def test_the_csv_logger_and_the_summary(tmp_path, capsys):
    logger = CSVLogger(tmp_path, name="csv")
    trainer(ModelSummary(max_depth=2), logger=logger).fit(module(), loader(3), loader(1))
    header, *rows = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    assert "train/outer_loss" in header
    assert "val/accuracy_interval95" in header
    assert {"0", "1", "2"} <= {row.split(",")[header.split(",").index("step")] for row in rows}
    assert "inner_solver" in (Path(logger.log_dir) / "hparams.yaml").read_text()


def test_the_tensorboard_logger(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard")
    logger = TensorBoardLogger(tmp_path, name="board")
    trainer(logger=logger).fit(module(), loader(3), loader(1))
    events = reader.EventAccumulator(logger.log_dir).Reload()
    assert [event.step for event in events.Scalars("train/outer_loss")] == [0, 1, 2]


@pytest.mark.filterwarnings("ignore:.*Using ModelCheckpoint with manual optimization")
def test_the_checkpoint_of_the_best_value_is_kept(tmp_path):
    saver = ModelCheckpoint(tmp_path, monitor="val/accuracy", mode="max", save_top_k=1, save_last=True)
    run = trainer(saver, max_epochs=3, enable_checkpointing=True)
    run.fit(module(), loader(2), loader(1))
    assert Path(saver.best_model_path).is_file()
    assert saver.best_model_score == max(saver.best_k_models.values())
    loaded = IMAMLModule.load_from_checkpoint(saver.best_model_path, backbone=network())
    assert loaded.inner_solver == GradientDescent(0.1, 2)


class Writer(BasePredictionWriter):
    def __init__(self, interval):
        super().__init__(interval)
        self.written = []

    def write_on_batch_end(self, trainer, pl_module, prediction, batch_indices, batch, batch_idx, dataloader_idx):
        self.written.append((batch_indices, prediction))

    def write_on_epoch_end(self, trainer, pl_module, predictions, batch_indices):
        (of_loader,) = batch_indices
        self.written += zip(of_loader, predictions, strict=True)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("interval", ["batch", "epoch", "batch_and_epoch"])
def test_a_prediction_writer_is_told_which_batches_it_writes(interval, workers):
    data = SinusoidDataModule(
        shots=2, queries=3, tasks_per_batch=2, batches_per_epoch=1, val_tasks=2, test_tasks=5, num_workers=workers
    )
    model, writer = module(backbone=MLP(1, 1, hidden=(4,)), loss=nn.functional.mse_loss), Writer(interval)
    trainer(writer).predict(model, datamodule=data, return_predictions=False)
    episodes = data.predict_dataloader().dataset
    expected = [model.predict_step(episodes[b], 0) for b in range(3)]
    assert len(writer.written) == 3 * (1 + (interval == "batch_and_epoch"))
    for k, (indices, prediction) in enumerate(writer.written):
        assert indices == [k % 3]
        torch.testing.assert_close(prediction, expected[k % 3])
