"""The learning curve of plain Lightning modules that log what an IMAMLModule logs."""

import csv

import matplotlib.image
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger
from matplotlib import pyplot

from lightning_imaml.callbacks import LearningCurve, PeakMemoryMonitor
from lightning_imaml.diagnostics.curves import draw


class Logging(BoringModel):
    """Logs the optimizer step as its training loss and accuracy, and numbers of its own in validation."""

    def training_step(self, batch, batch_idx):
        self.log("train/outer_loss", float(self.global_step))
        self.log("train/accuracy", self.global_step / 100)
        self.log("unrelated", 1.0)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", 0.5)
        self.log("val/accuracy", 0.6)
        self.log("val/accuracy_interval95", 0.1)
        return super().validation_step(batch, batch_idx)


def trainer_with(tmp_path, *callbacks, **kwargs):
    return Trainer(
        **{"max_steps": 6, "limit_val_batches": 1, "val_check_interval": 3, "logger": False, **kwargs},
        accelerator="cpu",
        default_root_dir=tmp_path,
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def read(directory):
    curves = {}
    with (directory / "learning_curve.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            curves.setdefault(row["metric"], []).append((int(row["step"]), float(row["value"])))
    return curves


def test_it_writes_what_was_logged_and_a_picture(tmp_path):
    trainer_with(tmp_path, LearningCurve(every_n_steps=2)).fit(Logging())
    assert read(tmp_path) == {
        "train/outer_loss": [(2, 1.0), (4, 3.0), (6, 5.0)],
        "train/accuracy": [(2, pytest.approx(0.01)), (4, pytest.approx(0.03)), (6, pytest.approx(0.05))],
        "val/loss": [(3, 0.5), (6, 0.5)],
        "val/accuracy": [(3, pytest.approx(0.6)), (6, pytest.approx(0.6))],
        "val/accuracy_interval95": [(3, pytest.approx(0.1)), (6, pytest.approx(0.1))],
    }
    height, width, _ = matplotlib.image.imread(tmp_path / "learning_curve.png").shape
    assert width > 2 * height  # two panels side by side
    assert {path.name for path in tmp_path.iterdir()} == {"learning_curve.csv", "learning_curve.png"}


def test_it_writes_next_to_the_logger(tmp_path):
    logger = CSVLogger(tmp_path)
    trainer_with(tmp_path, LearningCurve(every_n_steps=1), logger=logger).fit(Logging())
    assert (tmp_path / "lightning_logs" / "version_0" / "learning_curve.png").is_file()


def test_a_monitor_s_number_counts_at_its_step_only_even_if_it_repeats(tmp_path):
    curve = LearningCurve(every_n_steps=4)
    trainer_with(tmp_path, PeakMemoryMonitor(every_n_steps=2), curve, limit_val_batches=0).fit(BoringModel())
    memory = read(tmp_path)["memory/step_mib"]
    assert [step for step, _ in memory] == [2, 4, 6]
    assert memory[1][1] == memory[2][1]


def test_validation_of_a_sanity_check_is_no_point(tmp_path):
    trainer_with(tmp_path, LearningCurve(), num_sanity_val_steps=1, val_check_interval=6).fit(Logging())
    assert [step for step, _ in read(tmp_path)["val/loss"]] == [6]


def test_a_failed_fit_leaves_its_curve(tmp_path):
    class Failing(Logging):
        def training_step(self, batch, batch_idx):
            if batch_idx == 2:
                raise RuntimeError("expected")
            return super().training_step(batch, batch_idx)

    with pytest.raises(RuntimeError, match="expected"):
        trainer_with(tmp_path, LearningCurve(every_n_steps=1)).fit(Failing())
    assert [step for step, _ in read(tmp_path)["train/outer_loss"]] == [1, 2]
    assert (tmp_path / "learning_curve.png").is_file()


def test_nothing_logged_is_nothing_written(tmp_path):
    trainer_with(tmp_path, LearningCurve(), limit_val_batches=0).fit(BoringModel())
    assert list(tmp_path.iterdir()) == []


def test_a_resumed_fit_goes_on_with_its_curve(tmp_path):
    # Checkpoints in the middle of an epoch need a resumable data loader.
    epochs = {"limit_train_batches": 3}
    first = trainer_with(tmp_path, LearningCurve(every_n_steps=1), max_steps=3, **epochs)
    first.fit(Logging())
    first.save_checkpoint(tmp_path / "step3.ckpt")
    trainer_with(tmp_path / "resumed", LearningCurve(every_n_steps=1), max_steps=6, **epochs).fit(
        Logging(), ckpt_path=tmp_path / "step3.ckpt"
    )
    assert read(tmp_path / "resumed")["train/outer_loss"] == [(step, step - 1.0) for step in range(1, 7)]


def test_the_state_loads_from_a_weights_only_checkpoint(tmp_path):
    curve = LearningCurve()
    curve.load_state_dict({"points": {"val/loss": [(3, 0.5)]}})
    torch.save(curve.state_dict(), tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt", weights_only=True) == {"points": {"val/loss": [(3, 0.5)]}}


def test_only_rank_zero_writes(tmp_path):
    class Elsewhere(Callback):
        def on_fit_start(self, trainer, pl_module):
            trainer.strategy.__class__ = type("Other", (type(trainer.strategy),), {"is_global_zero": False})

    trainer_with(tmp_path, Elsewhere(), LearningCurve(every_n_steps=1)).fit(Logging())
    assert list(tmp_path.iterdir()) == []


def test_panels_appear_with_their_data():
    points = {
        "train/outer_loss": [(1, 2.0), (2, 1.0)],
        "val/accuracy": [(2, 0.5), (4, 0.7)],
        "val/accuracy_interval95": [(2, 0.1), (4, 0.05)],
        "meta_gradient/relative_error": [(1, 0.1), (2, float("nan")), (3, 0.001)],
        "memory/inner_loop_mib": [(1, 12.0)],
    }
    figure = draw(points)
    assert [axes.get_ylabel() for axes in figure.axes] == ["loss", "accuracy", "relative error", "MiB"]
    assert [axes.get_yscale() for axes in figure.axes] == ["linear", "linear", "log", "linear"]
    (band,) = figure.axes[1].collections
    heights = band.get_paths()[0].vertices[:, 1]
    assert heights.min() == pytest.approx(0.4)
    assert heights.max() == pytest.approx(0.75)
    figure.canvas.draw()


def test_a_curve_of_nan_is_drawn_without_a_logarithm():
    figure = draw({"meta_gradient/relative_error": [(1, float("nan"))]})
    assert figure.axes[0].get_yscale() == "linear"
    figure.canvas.draw()


def test_pyplot_knows_nothing_of_the_picture():
    backend = matplotlib.rcParams._get("backend")
    draw({"val/loss": [(1, 2.0)]})
    assert pyplot.get_fignums() == []
    assert matplotlib.rcParams._get("backend") == backend


def test_the_trainer_s_logging_interval_is_the_default(tmp_path):
    trainer_with(tmp_path, LearningCurve(), log_every_n_steps=3).fit(Logging())
    assert [step for step, _ in read(tmp_path)["train/outer_loss"]] == [3, 6]
