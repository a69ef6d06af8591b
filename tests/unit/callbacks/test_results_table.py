"""The results table: its rows, its caption and its baseline."""

import re

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_imaml import Episode, IMAMLModule
from lightning_imaml.callbacks import ResultsTable
from lightning_imaml.data import EpisodicDataModule
from lightning_imaml.diagnostics.baseline import reinitialised
from lightning_imaml.functional import adapt, predict
from lightning_imaml.inner import GradientDescent
from lightning_imaml.metrics import (
    EpisodicAccuracy,
    EpisodicCalibrationError,
    EpisodicInterval95,
    EpisodicLoss,
    with_intervals,
)
from lightning_imaml.regularizers import Proximal

WAYS, SHOTS, QUERIES, FEATURES, TASKS = 3, 2, 4, 5, 4
SOLVER = GradientDescent(lr=0.5, steps=7)


def classification(seed):
    generator = torch.Generator().manual_seed(seed)
    centres = 2 * torch.randn(TASKS, WAYS, FEATURES, generator=generator)

    def part(samples):
        targets = torch.arange(WAYS).repeat(samples).expand(TASKS, -1)
        inputs = centres.repeat(1, samples, 1)
        return inputs + torch.randn(inputs.shape, generator=generator), targets

    return Episode(*part(SHOTS), *part(QUERIES))


def regression(seed):
    generator = torch.Generator().manual_seed(seed)
    return Episode(*(torch.randn(TASKS, 6, n, generator=generator) for n in (FEATURES, 1, FEATURES, 1)))


def network(*layers):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(FEATURES, 8), *layers, nn.Tanh(), nn.Linear(8, WAYS))


def module(backbone=None, **kwargs):
    settings = {"inner_solver": SOLVER, "regularizer": Proximal(0.5), **kwargs}
    return IMAMLModule(backbone=network() if backbone is None else backbone, **settings)


def trainer_with(tmp_path, *callbacks, **kwargs):
    return Trainer(
        **{"max_epochs": 1, **kwargs},
        accelerator="cpu",
        default_root_dir=tmp_path,
        logger=False,
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def loader(make=classification, batches=3):
    return DataLoader([make(seed) for seed in range(batches)], batch_size=None)


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")


def cells(printed):
    """Row label to accuracy text."""
    return dict(re.findall(r"[│|] (\w[\w, ]*\w) +[│|] +(\S.*?) [│|]", printed))


def words(printed):
    """The text without its line breaks: a caption is wrapped to the width of its table."""
    return " ".join(printed.split())


def percent(metric):
    return f"{100 * float(metric):.2f}"


@pytest.mark.parametrize(
    "solvers", [{}, {"inner_solver": GradientDescent(lr=0.5, steps=1), "eval_inner_solver": SOLVER}]
)
def test_a_test_prints_accuracy_before_and_after_and_the_baseline(tmp_path, capsys, solvers):
    trainer, model = trainer_with(tmp_path, ResultsTable(seed=5)), module(**solvers)
    trainer.test(model, loader(), verbose=False)
    printed = capsys.readouterr().out
    metrics = trainer.callback_metrics

    fresh, fixed = reinitialised(model.backbone, 5)
    assert fixed == []
    accuracy, interval = EpisodicAccuracy(), EpisodicInterval95()
    for seed in range(3):
        episode = classification(seed)
        adapted = adapt(
            fresh, episode.support_inputs, episode.support_targets, inner_solver=SOLVER, regularizer=Proximal(0.5)
        )
        outputs = predict(fresh, adapted.parameters, episode.query_inputs)
        accuracy.update(outputs, episode.query_targets)
        interval.update(outputs, episode.query_targets)

    assert cells(printed) == {
        "after adaptation": f"{percent(metrics['test/accuracy'])} ± {percent(metrics['test/accuracy_interval95'])}",
        "before adaptation": f"{percent(metrics['test/accuracy_before'])} ± "
        f"{percent(metrics['test/accuracy_interval95_before'])}",
        "random weights, after adaptation": f"{percent(accuracy.compute())} ± {percent(interval.compute())}",
    }
    assert "Test results" in printed
    assert "3-way 2-shot, 4 queries a class, 7 inner steps, inductive, 12 tasks." in words(printed)


def test_the_baseline_can_have_the_first_tasks_alone(tmp_path, capsys):
    trainer_with(tmp_path, ResultsTable()).test(module(), loader(batches=2), verbose=False)
    first = cells(capsys.readouterr().out)["random weights, after adaptation"]
    trainer_with(tmp_path, ResultsTable(baseline_tasks=5)).test(module(), loader(), verbose=False)
    printed = capsys.readouterr().out
    assert cells(printed)["random weights, after adaptation, 8 tasks"] == first, "whole batches: two of four tasks"
    assert "12 tasks." in words(printed)


def test_a_baseline_of_no_tasks_is_refused():
    with pytest.raises(ValueError, match=r"tasks must be at least 1; found 0\. None is for all .*baseline=False"):
        ResultsTable(baseline_tasks=0)


def test_testing_twice_counts_twice_from_zero(tmp_path, capsys):
    trainer, model = trainer_with(tmp_path, ResultsTable()), module()
    trainer.test(model, loader(), verbose=False)
    first = capsys.readouterr().out
    trainer.test(model, loader(), verbose=False)
    assert capsys.readouterr().out == first


def test_the_baseline_can_be_left_out(tmp_path, capsys):
    trainer_with(tmp_path, ResultsTable(baseline=False)).test(module(), loader(), verbose=False)
    assert set(cells(capsys.readouterr().out)) == {"after adaptation", "before adaptation"}


def test_the_baseline_disturbs_neither_the_module_nor_the_random_state(tmp_path):
    def after(*callbacks):
        model = module()
        trainer_with(tmp_path, *callbacks).test(model, loader(), verbose=False)
        return {**model.backbone.state_dict(), "random state": torch.get_rng_state()}

    expected, found = after(), after(ResultsTable())
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_fit_prints_its_last_validation_once(tmp_path, capsys):
    trainer = trainer_with(tmp_path, ResultsTable(), max_epochs=2)
    trainer.fit(module(), loader(), loader(batches=2))
    printed = capsys.readouterr().out
    assert printed.count("Validation results") == 1
    assert set(cells(printed)) == {"after adaptation", "before adaptation"}
    assert cells(printed)["after adaptation"].startswith(percent(trainer.callback_metrics["val/accuracy"]))
    assert "8 tasks." in printed


def test_a_validation_on_its_own_prints(tmp_path, capsys):
    trainer_with(tmp_path, ResultsTable()).validate(module(), loader(), verbose=False)
    assert "Validation results" in capsys.readouterr().out


def test_batch_statistics_are_part_of_the_protocol(tmp_path, capsys):
    model = module(network(nn.BatchNorm1d(8, track_running_stats=False)))
    trainer_with(tmp_path, ResultsTable()).test(model, loader(), verbose=False)
    assert "7 inner steps, batch statistics (transductive), 12 tasks." in words(capsys.readouterr().out)


class Scale(nn.Module):
    """Has a parameter, and no way to draw it anew."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, inputs):
        return inputs * self.scale


def test_a_network_that_cannot_be_drawn_anew_has_a_note_for_its_baseline(tmp_path, capsys):
    trainer_with(tmp_path, ResultsTable()).test(module(network(Scale())), loader(), verbose=False)
    printed = capsys.readouterr().out
    assert "random weights, after adaptation" not in printed
    assert "No row for random weights: 1 cannot be drawn anew (no reset_parameters)." in words(printed)


def test_a_baseline_that_diverges_has_a_note(tmp_path, capsys):
    class Exploding(nn.Linear):
        """Finite as built, infinite once drawn anew."""

        def reset_parameters(self):
            nn.init.constant_(self.weight, 0.1 if not hasattr(self, "built") else float("inf"))
            nn.init.zeros_(self.bias)
            self.built = True

    model = module(nn.Sequential(Exploding(FEATURES, WAYS)))
    trainer_with(tmp_path, ResultsTable()).test(model, loader(), verbose=False)
    printed = capsys.readouterr().out
    assert set(cells(printed)) == {"after adaptation", "before adaptation"}
    assert "their adaptation diverged" in words(printed)


def test_regression_shows_its_loss(tmp_path, capsys):
    model = module(nn.Linear(FEATURES, 1), loss=nn.functional.mse_loss, inner_solver=GradientDescent(lr=0.05, steps=7))
    trainer = trainer_with(tmp_path, ResultsTable())
    trainer.test(model, loader(regression), verbose=False)
    printed = capsys.readouterr().out
    assert "loss" in printed
    assert cells(printed) == {
        "after adaptation": f"{float(trainer.callback_metrics['test/loss']):.4g}",
    }
    assert "6 support and 6 query samples a task, 7 inner steps, inductive, 12 tasks." in words(printed)


def test_only_rank_zero_prints(tmp_path, capsys):
    trainer = trainer_with(tmp_path, ResultsTable())
    trainer.strategy.__class__ = type("Other", (type(trainer.strategy),), {"is_global_zero": False})
    trainer.test(module(), loader(), verbose=False)
    assert "results" not in capsys.readouterr().out


def test_a_module_of_another_kind_is_refused(tmp_path):
    with pytest.raises(TypeError, match="ResultsTable needs a module with the interface of IMAMLModule"):
        trainer_with(tmp_path, ResultsTable()).test(BoringModel(), verbose=False)


def test_new_weights_follow_the_seed_and_leave_the_network_alone():
    original = network(nn.BatchNorm1d(8)).eval()
    weights = {name: value.clone() for name, value in original.state_dict().items()}
    (first, _), (second, _), (third, _) = (reinitialised(original, seed) for seed in (1, 1, 2))
    assert torch.equal(first[0].weight, second[0].weight)
    assert not torch.equal(first[0].weight, third[0].weight)
    assert not torch.equal(first[0].weight, original[0].weight)
    assert not first.training
    assert all(torch.equal(original.state_dict()[name], value) for name, value in weights.items())


def test_a_network_s_own_initialiser_has_the_last_word():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)
            self.scale = Scale()

        def reset_parameters(self):
            nn.init.constant_(self.layer.weight, 3.0)

    fresh, fixed = reinitialised(Own(), 0)
    assert fixed == []
    assert torch.equal(fresh.layer.weight, torch.full((2, 2), 3.0))


def test_tasks_of_several_shapes_are_named_as_a_range(tmp_path, capsys):
    """With a data module that draws ways and shots from ranges, from training to the table."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(200) % 20
    data = TensorDataset(torch.randn(20, FEATURES, generator=generator)[labels], labels)
    episodes = EpisodicDataModule(
        data, ways=(2, 3), shots=(1, 2), queries=4, tasks_per_batch=4, batches_per_epoch=3, val_tasks=12, test_tasks=12
    )
    trainer, model = trainer_with(tmp_path, ResultsTable()), module()
    trainer.fit(model, datamodule=episodes)
    trainer.test(model, datamodule=episodes, verbose=False)
    printed = words(capsys.readouterr().out)
    assert "2 to 3-way 1 to 2-shot, 4 queries a class, 7 inner steps, inductive, 12 tasks." in printed


class Measured(IMAMLModule):
    """With more metrics than the accuracy, each with its interval."""

    def configure_metrics(self):
        return with_intervals(
            accuracy=EpisodicAccuracy(), cross_entropy=EpisodicLoss(), calibration_error=EpisodicCalibrationError()
        )


def test_every_metric_with_an_interval_has_a_column(tmp_path, capsys):
    trainer = trainer_with(tmp_path, ResultsTable())
    model = Measured(backbone=network(), inner_solver=SOLVER, regularizer=Proximal(0.5))
    trainer.test(model, loader(), verbose=False)
    printed, metrics = capsys.readouterr().out, trainer.callback_metrics
    assert float(metrics["test/cross_entropy"]) == pytest.approx(float(metrics["test/loss"]), rel=1e-5)
    header = next(line for line in printed.splitlines() if "accuracy (%)" in line)
    assert "cross entropy" in header
    assert "calibration error" in header
    for when, suffix in (("after", ""), ("before", "_before")):
        row = next(line for line in printed.splitlines() if f" {when} adaptation" in line)
        for name in ("cross_entropy", "calibration_error"):
            value, half = (float(metrics[f"test/{key}{suffix}"]) for key in (name, f"{name}_interval95"))
            assert f"{value:.4g} ± {half:.2g}" in row


class LogsItsOwn(IMAMLModule):
    def test_step(self, batch, batch_idx):
        super().test_step(batch, batch_idx)
        self.log_dict({"test/own": 0.25, "test/own_interval95": 0.5}, batch_size=batch.tasks)


def test_what_is_logged_after_adaptation_only_has_a_dash_before_it(tmp_path, capsys):
    model = LogsItsOwn(backbone=network(), inner_solver=SOLVER, regularizer=Proximal(0.5))
    trainer_with(tmp_path, ResultsTable(baseline=False)).test(model, loader(), verbose=False)
    lines = capsys.readouterr().out.splitlines()
    rows = {when: next(line for line in lines if f" {when} adaptation" in line) for when in ("after", "before")}
    assert "0.25 ± 0.5" in rows["after"]
    assert rows["before"].rstrip(" │|").endswith("–")
