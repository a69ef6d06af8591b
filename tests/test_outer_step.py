"""What manual optimization leaves to the module, against plain PyTorch."""

from __future__ import annotations

import csv
import datetime
import functools
from pathlib import Path

import pytest
import torch
from conftest import class_episode
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelSummary,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import grad_norm
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_imaml import Episode, IMAMLModule
from lightning_imaml.callbacks import MetaGradientErrorMonitor, PeakMemoryMonitor
from lightning_imaml.inner import GradientDescent
from lightning_imaml.regularizers import Proximal

SHAPE = (1, 4, 4)
SGD = functools.partial(torch.optim.SGD, lr=1.0)


def episode(seed: int = 0) -> Episode:
    return class_episode(tasks=2, ways=3, shape=SHAPE, seed=seed)


def network(*layers: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 4), *layers, nn.Tanh(), nn.Linear(4, 3))


def module(kind: type[IMAMLModule] = IMAMLModule, **settings) -> IMAMLModule:
    defaults = {"backbone": network(), "inner_solver": GradientDescent(0.1, 2), "regularizer": Proximal(0.5)}
    return kind(**defaults | {"optimizer": SGD} | settings)


def loader(batches: int = 4) -> DataLoader:
    return DataLoader([episode(k) for k in range(batches)], batch_size=None)


def trainer(*callbacks, **settings) -> Trainer:
    defaults = {
        "max_epochs": 1, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
        "enable_model_summary": False, "accelerator": "cpu", "devices": 1, "log_every_n_steps": 1,
    }  # fmt: skip
    return Trainer(**defaults | settings, callbacks=list(callbacks))


def weights(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


def gradient(model: IMAMLModule) -> Tensor:
    found = model.meta_gradient(episode()).grads
    return torch.cat([found[name].flatten() for name, _ in model.backbone.named_parameters()])


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_the_meta_gradient_is_clipped_as_the_trainer_would(algorithm):
    model = module(gradient_clip_val=0.02, gradient_clip_algorithm=algorithm)
    start, full = weights(model), gradient(model)
    trainer(max_steps=1).fit(model, loader(1))
    clipped = full.clamp(-0.02, 0.02) if algorithm == "value" else full * 0.02 / full.norm()
    assert not torch.allclose(clipped, full)
    torch.testing.assert_close(start - weights(model), clipped, rtol=1e-4, atol=1e-6)


def test_the_gradients_norm_is_logged_before_it_is_clipped():
    model, run = module(gradient_clip_val=1e-3), trainer(max_steps=1)
    expected = gradient(model).norm()
    run.fit(model, loader(1))
    torch.testing.assert_close(run.callback_metrics["train/grad_norm"], expected)


class OwnClipping(IMAMLModule):
    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        for parameter in self.parameters():
            parameter.grad.fill_(gradient_clip_val)


def test_clipping_can_be_overridden():
    model = module(OwnClipping, gradient_clip_val=0.25)
    start = weights(model)
    trainer(max_steps=1).fit(model, loader(1))
    torch.testing.assert_close(start - weights(model), torch.full_like(start, 0.25))


class Norms(IMAMLModule):
    """The recipe of Lightning's documentation, with the call that ours needs."""

    calls_super = True

    def on_before_optimizer_step(self, optimizer):
        self.log_dict(grad_norm(self.backbone, norm_type=2))
        if self.calls_super:
            super().on_before_optimizer_step(optimizer)


def test_lightnings_recipe_for_gradient_norms_works():
    model, run = module(Norms, gradient_clip_val=0.1), trainer(max_steps=1)
    run.fit(model, loader(1))
    assert "grad_2.0_norm_total" in run.callback_metrics


def test_an_override_that_would_lose_the_clipping_is_refused():
    model = module(Norms, gradient_clip_val=0.1)
    model.calls_super = False
    with pytest.raises(RuntimeError, match=r"Norms.on_before_optimizer_step must call super\(\)"):
        trainer(max_steps=1).fit(model, loader(1))
    model.gradient_clip_val = None
    trainer(max_steps=1).fit(model, loader(1))


def test_the_learned_strength_has_its_own_learning_rate(tmp_path):
    model = module(regularizer=Proximal(0.5, learned=True), regularizer_lr=0.01)
    start, strength = weights(model.backbone), model.strengths["log_strength"].item()
    grads = model.meta_gradient(episode()).grads
    rates = LearningRateMonitor()
    run = trainer(rates, max_steps=1, logger=CSVLogger(tmp_path))
    run.fit(model, loader(1))
    moved = torch.cat([grads[name].flatten() for name, _ in model.backbone.named_parameters()])
    torch.testing.assert_close(start - weights(model.backbone), moved, rtol=1e-4, atol=1e-6)
    step = 0.01 * grads["regularizer.log_strength"].item()
    assert strength - model.strengths["log_strength"].item() == pytest.approx(step, rel=1e-3)
    assert rates.lrs["lr-SGD/backbone"][0] == 1.0
    assert rates.lrs["lr-SGD/regularizer"][0] == 0.01


class Groups(IMAMLModule):
    def configure_optimizers(self):
        head, body = self.backbone[-1], self.backbone[1]
        return torch.optim.SGD([{"params": body.parameters(), "lr": 0.5}, {"params": head.parameters()}], lr=2.0)


def test_the_networks_parts_can_have_learning_rates_of_their_own():
    model = module(Groups)
    grads = model.meta_gradient(episode()).grads
    head, body = model.backbone[-1].bias.detach().clone(), model.backbone[1].bias.detach().clone()
    trainer(max_steps=1).fit(model, loader(1))
    torch.testing.assert_close(head - model.backbone[-1].bias, 2.0 * grads["3.bias"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(body - model.backbone[1].bias, 0.5 * grads["1.bias"], rtol=1e-4, atol=1e-6)


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


def test_an_override_that_would_lose_the_count_of_meta_steps_is_refused():
    class OwnCallbacks(IMAMLModule):
        def configure_callbacks(self):
            return [EarlyStopping("train/outer_loss")]

    with pytest.raises(RuntimeError, match=r"configure_callbacks must return what super\(\)"):
        trainer().fit(module(OwnCallbacks, accumulate_meta_batches=2), loader(2))
    trainer().fit(module(OwnCallbacks), loader(1))


def test_an_override_that_would_lose_the_count_of_tasks_is_refused():
    class OwnStart(IMAMLModule):
        def on_train_start(self):
            pass

    with pytest.raises(RuntimeError, match=r"OwnStart.on_train_start must call super\(\)"):
        trainer().fit(module(OwnStart), loader(1))


def test_a_plateau_scheduler_can_go_by_steps():
    class Plateau(IMAMLModule):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
            # Nothing ever improves by this threshold, so that every call lowers the rate.
            schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=0, threshold=1e9)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step", "frequency": 2}}

    model, run = module(Plateau, lr_scheduler_monitor="val/loss"), trainer(val_check_interval=1)
    run.fit(model, loader(4), loader(1))
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.01)


def test_the_scheduler_starts_where_the_checkpoint_left_it(tmp_path):
    schedule = functools.partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
    run = trainer(max_epochs=1)
    run.fit(module(lr_scheduler=schedule), loader(2))
    run.save_checkpoint(tmp_path / "two.ckpt")
    resumed = trainer(max_epochs=2)
    resumed.fit(module(lr_scheduler=schedule), loader(2), ckpt_path=tmp_path / "two.ckpt")
    assert resumed.optimizers[0].param_groups[0]["lr"] == 0.5**4


# Lightning's own callbacks and loggers


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
