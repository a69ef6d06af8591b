"""The Trainer counts meta-steps where it counts batches: validation, rows of the loggers, lengths of schedules."""

from __future__ import annotations

import csv
import datetime
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from small_runs import episode, loader, module, trainer
from torch.utils.data import DataLoader

from lightning_imaml import IMAMLModule
from lightning_imaml.callbacks import MetaGradientErrorMonitor, PeakMemoryMonitor


class CountValidations(IMAMLModule):
    def __init__(self, **settings):
        super().__init__(**settings)
        self.at = []

    def on_validation_start(self):
        if not self.trainer.sanity_checking:
            self.at.append(self.trainer.global_step)


class At(Callback):
    """Does something at the start of a batch of the epoch."""

    def __init__(self, batch: int, action):
        self.batch, self.action = batch, action

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == self.batch:
            self.action()


def test_max_steps_counts_meta_steps():
    model, run = module(accumulate_meta_batches=3), trainer(max_steps=2, max_epochs=-1)
    run.fit(model, loader(6))
    assert run.global_step == 2
    assert run.fit_loop.total_batch_idx + 1 == 6


INTERVALS = {
    # batches, accumulated, the Trainer's settings: the meta-steps after which it validates
    "whole windows": (8, 2, {"val_check_interval": 2}, [2, 4]),
    "a smaller last window counts": (5, 2, {"val_check_interval": 1}, [1, 2, 3]),
    "only the smaller last window": (5, 2, {"val_check_interval": 3}, [3]),
    "anew in every epoch": (5, 2, {"val_check_interval": 2, "max_epochs": 2}, [2, 5]),
    "every other epoch": (5, 2, {"val_check_interval": 2, "max_epochs": 4, "check_val_every_n_epoch": 2}, [5, 11]),
    "across epochs": (4, 2, {"val_check_interval": 3, "check_val_every_n_epoch": None, "max_epochs": 3}, [3, 6]),
    "across epochs with smaller last windows": (
        5, 2, {"val_check_interval": 2, "check_val_every_n_epoch": None, "max_epochs": 3}, [2, 4, 6, 8],
    ),
    "beyond an epoch": (5, 2, {"val_check_interval": 7, "check_val_every_n_epoch": None, "max_epochs": 5}, [7, 14]),
    "a window larger than an epoch": (2, 3, {"val_check_interval": 1, "max_epochs": 2}, [1, 2]),
    "the whole epoch": (5, 2, {}, [3]),
    "half an epoch": (8, 2, {"val_check_interval": 0.5}, [2, 4]),
    "half an epoch, rounded down": (5, 2, {"val_check_interval": 0.5}, [1, 2, 3]),
    "less than a meta-step": (4, 2, {"val_check_interval": 0.25}, [1, 2]),
    "a limited epoch": (9, 2, {"val_check_interval": 2, "limit_train_batches": 7}, [2, 4]),
    "a limited epoch's last window": (9, 2, {"val_check_interval": 3, "limit_train_batches": 5}, [3]),
    "half of a limited share": (10, 2, {"val_check_interval": 0.5, "limit_train_batches": 0.6}, [1, 2, 3]),
    "until the last step": (5, 2, {"val_check_interval": 2, "max_epochs": -1, "max_steps": 5}, [2, 5]),
}  # fmt: skip


@pytest.mark.parametrize("case", INTERVALS)
def test_val_check_interval_counts_meta_steps(case):
    batches, accumulated, settings, expected = INTERVALS[case]
    model = module(CountValidations, accumulate_meta_batches=accumulated)
    trainer(**settings).fit(model, loader(batches), loader(1))
    assert model.at == expected


class Stream(torch.utils.data.IterableDataset):
    """Episodes of an unknown number."""

    def __iter__(self):
        return (episode(k) for k in range(5))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({}, [3, 6]), ({"val_check_interval": 2}, [2, 5]), ({"val_check_interval": 3, "limit_train_batches": 3}, []),
     ({"val_check_interval": 2, "limit_train_batches": 3}, [2, 4]),
     ({"val_check_interval": 4, "check_val_every_n_epoch": None}, [4])],
    ids=str,
)  # fmt: skip
def test_val_check_interval_counts_the_meta_steps_of_a_stream(settings, expected):
    model = module(CountValidations, accumulate_meta_batches=2)
    run = trainer(max_epochs=2, **settings)
    data = DataLoader(Stream(), batch_size=None)
    if not expected:
        with pytest.raises(ValueError, match="must be"):
            run.fit(model, data, loader(1))
    else:
        run.fit(model, data, loader(1))
    assert model.at == expected


def test_validation_by_the_clock_may_come_in_the_middle_of_a_meta_step():
    model = module(CountValidations, accumulate_meta_batches=2)
    trainer(val_check_interval=datetime.timedelta(0)).fit(model, loader(4), loader(1))
    assert model.at == [0, 1, 1, 2]


def test_an_interval_that_never_comes_is_explained():
    with pytest.raises(ValueError, match="val_check_interval must be at most the meta-steps of an epoch; found 3"):
        trainer(val_check_interval=3).fit(module(accumulate_meta_batches=2), loader(4), loader(1))
    trainer(val_check_interval=3).fit(module(accumulate_meta_batches=2), loader(4))  # Nothing to validate.


@pytest.mark.parametrize("settings", [{}, {"limit_train_batches": 3}], ids=str)
def test_every_epoch_ends_with_a_meta_step(settings):
    model, run = module(accumulate_meta_batches=2), trainer(max_epochs=2, **settings)
    run.fit(model, loader(5))
    assert run.global_step == (4 if settings else 6)
    assert all(p.grad is None for p in model.parameters())


def test_a_schedule_is_as_long_as_the_meta_steps():
    class OneCycle(IMAMLModule):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
            self.steps = self.trainer.estimated_stepping_batches
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=self.steps)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    model, run = module(OneCycle, accumulate_meta_batches=2), trainer(max_epochs=2)
    run.fit(model, loader(5))
    assert model.steps == run.global_step == 6


def test_a_trainer_is_given_back_as_it_was():
    """Else a second fit would find an accumulation that manual optimization refuses."""
    run = trainer(log_every_n_steps=7)
    stop = At(1, lambda: (_ for _ in ()).throw(KeyError("in the middle of a meta-step")))
    run.callbacks.append(stop)
    with pytest.raises(KeyError):
        run.fit(module(accumulate_meta_batches=3), loader(4))
    run.callbacks.remove(stop)
    assert (run.accumulate_grad_batches, run.log_every_n_steps) == (1, 7)
    model = module(CountValidations)
    run.fit(model, loader(2), loader(1))
    assert model.at == [2]


def test_a_second_fit_does_not_count_the_meta_steps_of_the_first():
    model, run = module(CountValidations), trainer(val_check_interval=1)
    run.fit(module(accumulate_meta_batches=3), loader(6))
    run.fit_loop.max_epochs = 2
    run.fit(model, loader(4), loader(1))
    assert model.at == [3, 4, 5, 6]  # The Trainer goes on counting after two meta-steps.


def test_an_override_of_configure_callbacks_does_not_lose_the_count_of_meta_steps():
    class OwnCallbacks(CountValidations):
        def configure_callbacks(self):
            return EarlyStopping("train/outer_loss")

    model, run = module(OwnCallbacks, accumulate_meta_batches=2), trainer(val_check_interval=1)
    run.fit(model, loader(4), loader(1))
    assert model.at == [1, 2]
    assert any(isinstance(callback, EarlyStopping) for callback in run.callbacks)


def rows(logger: CSVLogger, name: str) -> dict[int, float]:
    """The values of a metric by their step; every step once."""
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        found = [(int(row["step"]), float(row[name])) for row in csv.DictReader(file) if row.get(name)]
    assert len(dict(found)) == len(found)
    return dict(found)


@pytest.mark.parametrize(("every", "steps"), [(1, [0, 1, 2]), (2, [1]), (3, [2])])
def test_rows_of_the_loggers_are_meta_steps(tmp_path, every, steps):
    """Means over all their tasks, by the number of the meta-step, every so many meta-steps."""
    logger, rates = CSVLogger(tmp_path), LearningRateMonitor("step")
    settings = {"logger": logger, "log_every_n_steps": every, "val_check_interval": 1}
    trainer(rates, **settings).fit(module(accumulate_meta_batches=2), loader(5), loader(1))
    first, second = (module().meta_gradient(episode(k)).loss.mean().item() for k in range(2))
    losses = rows(logger, "train/outer_loss")
    assert list(losses) == steps
    if 0 in losses:
        assert losses[0] == pytest.approx((first + second) / 2, rel=1e-6)
    for name in ("train/grad_norm", "train/accuracy_before", "lr-SGD"):
        assert list(rows(logger, name)) == steps, name
    assert list(rows(logger, "val/loss")) == [0, 1, 2]


@pytest.mark.filterwarnings("ignore:.*left out of the meta-gradient")
def test_a_meta_step_that_is_not_taken_has_no_row(tmp_path):
    bad = episode()._replace(support_inputs=episode().support_inputs * torch.nan)
    data = DataLoader([episode(0), bad, episode(1)], batch_size=None)
    logger, model = CSVLogger(tmp_path), module(on_bad_task="skip")
    run = trainer(logger=logger)
    run.fit(model, data)
    assert run.global_step == 2
    assert list(rows(logger, "train/outer_loss")) == [0, 1]


def test_monitors_log_by_meta_steps(tmp_path):
    logger, model = CSVLogger(tmp_path), module(accumulate_meta_batches=2)
    monitors = MetaGradientErrorMonitor(every_n_steps=2), PeakMemoryMonitor(every_n_steps=2)
    trainer(*monitors, logger=logger).fit(model, loader(8))
    assert list(rows(logger, "meta_gradient/relative_error")) == list(rows(logger, "memory/step_mib")) == [1, 3]
