"""The Trainer's flags, one by one: the rows of the table in docs/lightning.md."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest
import torch
from conftest import class_episode
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, GradientAccumulationScheduler, ModelSummary
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader

from lightning_imaml import IMAMLModule
from lightning_imaml.inner import GradientDescent

pytestmark = [
    pytest.mark.filterwarnings("ignore:You requested to overfit"),
    pytest.mark.filterwarnings("ignore:.*barebones"),
    pytest.mark.filterwarnings("ignore:The `LightningModule.log"),
    pytest.mark.filterwarnings("ignore:.*Anomaly Detection"),
]


class Counted(IMAMLModule):
    """Counts its steps and notes what the Trainer has switched."""

    def __init__(self, **settings):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
        super().__init__(network, inner_solver=GradientDescent(0.1, 2), **settings)
        self.validated, self.sanity, self.tested, self.switches = [], 0, 0, {}

    def training_step(self, batch, batch_idx):
        self.switches = {
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            "benchmark": torch.backends.cudnn.benchmark,
            "detect_anomaly": torch.is_anomaly_enabled(),
        }
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.switches["inference_mode"] = torch.is_inference_mode_enabled()
        if self.trainer.sanity_checking:
            self.sanity += 1
        else:
            self.validated.append(self.current_epoch)
        super().validation_step(batch, batch_idx)

    def test_step(self, batch, batch_idx):
        self.tested += 1
        super().test_step(batch, batch_idx)


def loader(batches: int) -> DataLoader:
    return DataLoader(
        [class_episode(tasks=2, ways=3, shape=(1, 4, 4), seed=k) for k in range(batches)], batch_size=None
    )


def trainer(**settings) -> Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "max_epochs": 1,
             "enable_model_summary": False, "accelerator": "cpu", "devices": 1, "log_every_n_steps": 1}  # fmt: skip
    if settings.get("barebones"):
        quiet = {"max_epochs": 1, "accelerator": "cpu", "devices": 1}
    return Trainer(**quiet | settings)


def stop_at_once() -> list[EarlyStopping]:
    return [EarlyStopping("val/loss", patience=0, min_delta=1e9)]


# Flag: its setting (and what it needs), what must then hold of the Trainer and the module.
FLAGS = {
    "max_epochs": ({"max_epochs": 2}, lambda run, model: run.global_step == 8),
    "min_epochs": (
        {"max_epochs": 9, "min_epochs": 4, "callbacks": stop_at_once()},
        lambda run, model: run.current_epoch == 4,
    ),
    "max_steps": ({"max_steps": 3}, lambda run, model: run.global_step == 3),
    "min_steps": (
        {"max_epochs": 9, "min_steps": 13, "callbacks": stop_at_once()},
        lambda run, model: 13 <= run.global_step < 9 * 4,
    ),
    "max_time": (
        {"max_epochs": 100_000, "max_time": datetime.timedelta(milliseconds=50)},
        lambda run, model: run.current_epoch < 100_000,
    ),
    "limit_train_batches": ({"limit_train_batches": 0.5}, lambda run, model: run.global_step == 2),
    "limit_val_batches": ({"limit_val_batches": 1}, lambda run, model: len(model.validated) == 1),
    "limit_test_batches": ({"limit_test_batches": 1}, lambda run, model: model.tested == 1),
    "overfit_batches": ({"overfit_batches": 1, "max_epochs": 3}, lambda run, model: run.global_step == 3),
    "check_val_every_n_epoch": (
        {"check_val_every_n_epoch": 2, "max_epochs": 4},
        lambda run, model: model.validated == [1, 1, 3, 3],
    ),
    "num_sanity_val_steps": ({"num_sanity_val_steps": 1}, lambda run, model: model.sanity == 1),
    "fast_dev_run": ({"fast_dev_run": True}, lambda run, model: run.global_step == 1 and model.tested == 1),
    "deterministic": ({"deterministic": True}, lambda run, model: model.switches["deterministic"]),
    "benchmark": ({"benchmark": True}, lambda run, model: model.switches["benchmark"]),
    "detect_anomaly": ({"detect_anomaly": True}, lambda run, model: model.switches["detect_anomaly"]),
    "inference_mode": ({"inference_mode": False}, lambda run, model: model.switches["inference_mode"] is False),
    "profiler": ({"profiler": "simple"}, lambda run, model: "training_step" in run.profiler.summary()),
    "sync_batchnorm": ({"sync_batchnorm": True}, lambda run, model: run.global_step == 4),  # Of one device: nothing.
    "model_registry": ({"model_registry": "mine"}, lambda run, model: run.global_step == 4 and model.tested > 0),
    "barebones": ({"barebones": True}, lambda run, model: run.global_step == 4),
    "enable_progress_bar": (
        {"enable_progress_bar": True},
        lambda run, model: "test/accuracy" in run.progress_bar_metrics,
    ),
    "enable_model_summary": (
        {"enable_model_summary": True},
        lambda run, model: any(isinstance(c, ModelSummary) for c in run.callbacks),
    ),
}


@pytest.fixture
def switches():
    """Put back what a Trainer leaves switched for the whole process."""
    deterministic, benchmark = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = benchmark


@pytest.mark.parametrize("flag", FLAGS)
def test_flag(flag, switches):
    settings, holds = FLAGS[flag]
    run, model = trainer(**settings), Counted()
    run.fit(model, loader(4), loader(2))
    run.test(model, loader(2), verbose=False)
    assert holds(run, model)


def test_the_same_results_without_inference_mode():
    found = [trainer(inference_mode=mode).test(Counted(), loader(2), verbose=False) for mode in (True, False)]
    assert found[0] == found[1]


def test_limit_predict_batches():
    assert len(trainer(limit_predict_batches=1).predict(Counted(), loader(3))) == 1


def test_log_every_n_steps_and_the_folder_of_the_run(tmp_path):
    run = trainer(logger=CSVLogger(tmp_path), log_every_n_steps=2)
    run.fit(Counted(), loader(5))
    header, *rows = [line.split(",") for line in (Path(run.log_dir) / "metrics.csv").read_text().splitlines()]
    assert [row[header.index("step")] for row in rows if row[header.index("train/outer_loss")]] == ["1", "3"]


@pytest.mark.parametrize("wanted", [True, False])
def test_enable_autolog_hparams(tmp_path, wanted):
    run = trainer(logger=CSVLogger(tmp_path), enable_autolog_hparams=wanted, log_every_n_steps=1)
    run.fit(Counted(), loader(1))
    kept = Path(run.log_dir) / "hparams.yaml"
    assert (kept.is_file() and "inner_solver" in kept.read_text()) is wanted


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        ({"gradient_clip_val": 1.0}, r"Pass gradient_clip_val=1.0 to the IMAMLModule"),
        ({"accumulate_grad_batches": 2}, r"Pass accumulate_meta_batches=2 to the IMAMLModule"),
        (
            {"callbacks": [GradientAccumulationScheduler({1: 2})]},
            r"pass accumulate_meta_batches=\.\.\. to the IMAMLModule",
        ),
    ],
    ids=["gradient_clip_val", "accumulate_grad_batches", "GradientAccumulationScheduler"],
)
def test_flags_that_the_trainer_refuses_in_manual_optimization(settings, remedy):
    with pytest.raises(MisconfigurationException, match=f"manual optimization; found .* {remedy}"):
        trainer(**settings).fit(Counted(), loader(1))
