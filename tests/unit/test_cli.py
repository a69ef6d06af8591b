"""The command line, in process, with the configurations that are shipped."""

from __future__ import annotations

import contextlib
import inspect
import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT

from lightning_imaml import IMAMLModule, cli
from lightning_imaml.checkpoints import AtomicCheckpointIO, export_weights
from lightning_imaml.inner import GradientDescent

CONFIGS = ROOT / "configs"
QUICKSTART = CONFIGS / "quickstart.yaml"

FIXED = {"check_every": 1, "learned": False, "per": None, "bounds": None}
SMALL = [
    "--model.backbone.init_args.filters", "4",
    "--model.inner_solver.init_args.steps", "2",
    "--model.compile", "false",
    "--data.tasks_per_batch", "2",
    "--data.batches_per_epoch", "3",
    "--data.val_tasks", "4",
    "--data.test_tasks", "5",
    "--trainer.max_epochs", "1",
    "--trainer.log_every_n_steps", "1",
    "--trainer.enable_model_summary", "false",
]  # fmt: skip


def shrunk(folder: Path) -> list[str]:
    """The quickstart, made small, with its monitors due."""
    config = yaml.safe_load(QUICKSTART.read_text())
    for callback in config["trainer"]["callbacks"]:
        if callback["class_path"].endswith("MetaGradientErrorMonitor"):
            callback["init_args"] = {"every_n_steps": 3, "reference_steps": 5, "reference_linear_steps": 5}
        if callback["class_path"].endswith("PeakMemoryMonitor"):
            callback["init_args"] = {"every_n_steps": 2}
    config["trainer"]["logger"]["init_args"]["save_dir"] = str(folder)
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(config))
    return ["--config", str(path), *SMALL]


@pytest.fixture
def small(tmp_path) -> list[str]:
    return shrunk(tmp_path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[list[str], cli.CommandLine, str]:
    """The options of a fit, the fit and what it printed."""
    options = shrunk(tmp_path_factory.mktemp("trained"))
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        fitted = cli.run(["fit", *options])
    return options, fitted, printed.getvalue()


@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # Each run has a folder of its own.
def test_fit_test_and_predict_leave_a_picture_a_table_and_a_checkpoint(trained, capsys):
    small, fitted, printed = trained
    folder = Path(fitted.trainer.log_dir)
    assert (folder / "learning_curve.png").stat().st_size > 10_000
    curve = (folder / "learning_curve.csv").read_text()
    for metric in ("train/outer_loss", "val/accuracy", "meta_gradient/relative_error", "memory/inner_loop_mib"):
        assert metric in curve
    assert "Validation results" in printed
    assert "5-way 1-shot" in printed
    assert isinstance(fitted.trainer.strategy.checkpoint_io, AtomicCheckpointIO)
    best = fitted.trainer.checkpoint_callback.best_model_path
    assert Path(best).is_file()
    loaded = IMAMLModule.load_from_checkpoint(best)
    assert loaded.backbone.classifier.in_features == 4 * 2 * 2
    assert loaded.inner_solver == fitted.model.inner_solver
    # In a process of its own, as a person would: nothing of the fit is left in the parser.
    command = [sys.executable, "-m", "lightning_imaml", "test", *small, "--ckpt_path", best]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    tested = cli.run(["test", *small, "--ckpt_path", best])
    assert 0 <= tested.trainer.callback_metrics["test/accuracy"] <= 1
    printed = capsys.readouterr().out
    for words in ("Test results", "after adaptation", "random weights", "±", "5 tasks", "batch statistics"):
        assert words in printed
    cli.run(["predict", *small, "--ckpt_path", best])
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    assert saved["model"]["init_args"]["inner_solver"]["init_args"] == {"lr": 0.3, "steps": 2, "tol": 0.0, **FIXED}


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_given_settings_that_a_checkpoint_replaces_are_named(trained):
    small, fitted, _ = trained
    best = fitted.trainer.checkpoint_callback.best_model_path
    steps = ["--model.inner_solver.init_args.steps", "7"]
    with pytest.warns(UserWarning, match=r"replace those given: [\w.]*steps=7 \(there 2\)\. For other settings"):
        tested = cli.run(["test", *small, *steps, "--ckpt_path", best])
    assert tested.model.inner_solver.steps == 2
    loaded = IMAMLModule.load_from_checkpoint(best, inner_solver=GradientDescent(lr=0.3, steps=7))
    assert loaded.inner_solver.steps == 7
    cli.run(["test", *small, "--ckpt_path", best])  # Nothing to warn of: warnings are errors in these tests.


class Chunked(torch.nn.Linear):
    """A network whose own setting has the name of one of the module's."""

    def __init__(self, chunk_size: int = 7) -> None:
        super().__init__(chunk_size, 5)


@pytest.fixture
def instantiated(monkeypatch, tmp_path):
    """The module that a command line makes for a checkpoint of such settings, without running anything."""
    monkeypatch.setattr(cli.CommandLine, "_run_subcommand", lambda *_: None)
    network = {"class_path": f"{__name__}.Chunked", "init_args": {"chunk_size": 7}}
    settings = {"chunk_size": 5, "compile": True, "backbone": network, "_class_path": "lightning_imaml.IMAMLModule"}
    torch.save({"hyper_parameters": settings}, tmp_path / "last.ckpt")
    own = ["--model", "IMAMLModule", "--data", "GlyphDataModule", "--ckpt_path", str(tmp_path / "last.ckpt")]
    return lambda *given: cli.run(["test", *own, *given]).model


def test_a_checkpoints_settings_of_the_machine_yield_to_given_ones_alone(instantiated):
    kept = instantiated()
    assert (kept.chunk_size, kept.compile_solves) == (5, True)
    given = instantiated("--model.chunk_size", "null", "--model.compile", "false")
    assert (given.chunk_size, given.compile_solves) == (None, False)


def test_a_networks_setting_of_the_same_name_stays_the_checkpoints(instantiated):
    network = ["--model.backbone", f"{__name__}.Chunked", "--model.backbone.chunk_size", "9"]
    with pytest.warns(UserWarning, match="replace those given"):
        assert instantiated(*network).backbone.in_features == 7


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_losses_by_their_class_are_trained_tested_and_exported(small, tmp_path):
    losses = ["--model.loss", "torch.nn.CrossEntropyLoss", "--model.loss.init_args.label_smoothing", "0.1",
              "--model.query_loss", "ScaledCrossEntropy", "--model.query_loss.init_args.scale", "2.0"]  # fmt: skip
    fitted = cli.run(["fit", *small, *losses])
    export_weights(fitted.trainer.checkpoint_callback.best_model_path, tmp_path / "weights.ckpt")
    tested = cli.run(["test", *small, *losses, "--ckpt_path", str(tmp_path / "weights.ckpt")])
    for model in (fitted.model, tested.model, IMAMLModule.load_from_checkpoint(tmp_path / "weights.ckpt")):
        assert (model.loss.label_smoothing, model.query_loss.scale) == (0.1, 2.0)


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_configuration_is_valid(config, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.run(["fit", "--config", str(config), "--print_config"])
    assert ended.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["class_path"].endswith("IMAMLModule")
    method = config.stem.removeprefix("omniglot_5way_1shot_").removeprefix("imaml_")
    settings = printed["model"]["init_args"]
    estimator, solver = (settings[name]["class_path"].rpartition(".")[2] for name in ("estimator", "inner_solver"))
    estimators = {"maml": "Unrolled", "fomaml": "FirstOrder", "reptile": "Reptile"}
    assert estimator == estimators.get(method, "Implicit")
    assert solver == ("HessianFree" if method == "hf" else "GradientDescent")


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("omniglot_5way_1shot_*.yaml")), ids=lambda path: path.stem)
def test_every_omniglot_configuration_trains(config, tmp_path, omniglot_root):
    where = ["--data.root", str(omniglot_root), "--trainer.logger.init_args.save_dir", str(tmp_path)]
    fitted = cli.run(["fit", "--config", str(config), *where, *SMALL])
    assert fitted.trainer.global_step == 3


def test_the_defaults_are_printed_in_full_and_can_be_read_again(tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli.run(["fit", "--model", "IMAMLModule", "--data", "GlyphDataModule", "--print_config"])
    text = capsys.readouterr().out
    printed = yaml.safe_load(text)
    solver = printed["model"]["init_args"]["inner_solver"]
    assert solver["class_path"] == "lightning_imaml.inner.GradientDescent"
    assert solver["init_args"] == {"lr": 0.1, "steps": 16, "tol": 0.0, **FIXED}
    path = tmp_path / "printed.yaml"
    path.write_text(text)
    with pytest.raises(SystemExit):
        cli.run(["fit", "--config", str(path), "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out) == printed


DATA = {
    "MiniImageNetDataModule": {"root": "photos", "on_broken": "skip"},
    "OmniglotDataModule": {"root": "drawings", "rotations": "false"},
    "CifarFSDataModule": {"root": "small"},
    "TieredImageNetDataModule": {"root": "photos", "in_memory": "true", "image_size": "32"},
    "CUBDataModule": {"root": "birds", "on_broken": "skip", "split_file": "split.csv"},
    "GlyphDataModule": {"class_transforms": "{inverted: torchvision.transforms.v2.functional.invert}"},
    "ImageFolderDataModule": {"root": "mine", "small_classes": "skip", "split_file": "split.csv"},
    "SinusoidDataModule": {"amplitude": "[1.0, 2.0]", "shots": "[5, 10]"},
    "LinearRegressionDataModule": {"features": "3"},
}


@pytest.mark.parametrize("name", DATA)
def test_every_data_module_takes_its_options_and_the_common_ones(name, capsys):
    options = {**DATA[name], "tasks_per_batch": "3", "transform": "torchvision.transforms.v2.Identity"}
    given = [argument for key, value in options.items() for argument in (f"--data.{key}", value)]
    with pytest.raises(SystemExit) as ended:
        cli.run(["fit", "--model", "IMAMLModule", "--data", name, *given, "--print_config"])
    assert ended.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)["data"]["init_args"]
    assert printed["transform"]["class_path"] == "torchvision.transforms.v2.Identity"
    for key, value in {**DATA[name], "tasks_per_batch": "3"}.items():
        assert printed[key] == yaml.safe_load(value)
    assert "train" not in printed  # its own data is the only one


@pytest.mark.parametrize(
    ("options", "unknown", "nearest"),
    [
        (["--model.inner_solver.init_args.stepz", "3"], "stepz", "steps"),
        (["--model.init_args.gradient_clip_value", "3"], "gradient_clip_value", "gradient_clip_val"),
        (["--model.inner_solver.class_path", "lightning_imaml.inner.GradientDescnt"], "GradientDescnt",
         "GradientDescent"),
        (["--model.inner_solver", "GradientDecent"], "GradientDecent", "GradientDescent"),
        (["--model.inner_solver", "Hessianfree"], "Hessianfree", "HessianFree"),
        (["--model.estimator.linear_solver", "ConjugateGradien"], "ConjugateGradien", "ConjugateGradient"),
        (["--data", "GlyphDataModul"], "GlyphDataModul", "GlyphDataModule"),
        (["--model", "IMAMLModul"], "IMAMLModul", "IMAMLModule"),
        (["--trainer.callbacks+", "LearningCurv"], "LearningCurv", "LearningCurve"),
        (["--data.init_args.querys", "3"], "querys", "queries"),
        (["--trainer.max_epoch", "3"], "trainer.max_epoch", "trainer.max_epochs"),
        (["--ckpt_paht", "x"], "ckpt_paht", "ckpt_path"),
    ],
)  # fmt: skip
def test_an_unknown_option_is_refused_with_the_nearest_valid_name(options, unknown, nearest, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.run(["fit", "--config", str(QUICKSTART), *options, "--print_config"])
    assert ended.value.code == 2
    assert f"The valid name nearest to {unknown!r} is {nearest!r}." in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        ["--model.inner_solver", "Xyzzyqwerty"],
        ["--model.inner_solver.init_args.qqq", "3"],
        ["--model.inner_solver.class_path", "lightning_imaml.inner.Xyzzyqwerty"],
        ["--zzz", "3"],
    ],
    ids=" ".join,
)
def test_a_name_that_is_like_none_gets_no_proposal(options, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.run(["fit", "--config", str(QUICKSTART), *options, "--print_config"])
    assert ended.value.code == 2
    assert "valid name nearest" not in capsys.readouterr().err


@pytest.mark.parametrize("config", [None, QUICKSTART], ids=["defaults", "quickstart"])
def test_checkpoints_are_atomic_by_default(config, capsys):
    source = ["--model", "IMAMLModule", "--data", "GlyphDataModule"] if config is None else ["--config", str(config)]
    with pytest.raises(SystemExit):
        cli.run(["fit", *source, "--print_config"])
    plugins = yaml.safe_load(capsys.readouterr().out)["trainer"]["plugins"]
    assert [plugin["class_path"] for plugin in plugins] == ["lightning_imaml.checkpoints.AtomicCheckpointIO"]


@pytest.mark.parametrize(
    ("written", "misspelt", "nearest"),
    [
        ("lr: 0.3, steps: 8", "lr: 0.3, stepz: 8", "steps"),
        ("val_tasks: 160", "vall_tasks: 160", "val_tasks"),
        ("max_epochs: 8", "max_epoch: 8", "trainer.max_epochs"),
    ],
)
def test_an_unknown_key_of_a_file_is_refused_with_the_nearest_valid_name(written, misspelt, nearest, tmp_path, capsys):
    text = QUICKSTART.read_text()
    assert written in text
    path = tmp_path / "misspelt.yaml"
    path.write_text(text.replace(written, misspelt))
    with pytest.raises(SystemExit) as ended:
        cli.run(["fit", "--config", str(path), "--print_config"])
    assert ended.value.code == 2
    assert f"is {nearest!r}." in capsys.readouterr().err


CHANGES = [
    "--model.init_args.loss", "torch.nn.functional.cross_entropy",
    "--model.init_args.regularizer", "lightning_imaml.regularizers.Proximal",
    "--model.init_args.regularizer.init_args.strength", '{"features.*": 2.0, "*": 0.5}',
    "--model.init_args.regularizer.init_args.learned", "true",
    "--model.init_args.regularizer.init_args.per", "layer",
    "--model.init_args.regularizer.init_args.bounds", "[0.01, 10.0]",
    "--model.init_args.regularizer_lr", "0.5",
    "--model.init_args.inner_solver_lr", "0.25",
    "--model.init_args.eval_inner_solver", "lightning_imaml.inner.HessianFree",
    "--model.init_args.adapt_only", '["classifier.*"]',
    "--model.init_args.lr_scheduler", "torch.optim.lr_scheduler.StepLR",
    "--model.init_args.lr_scheduler.init_args.step_size", "3",
    "--model.init_args.lr_scheduler_monitor", "val/loss",
    "--model.init_args.gradient_clip_val", "2.5",
    "--model.init_args.gradient_clip_algorithm", "value",
    "--model.init_args.accumulate_meta_batches", "2",
    "--model.init_args.chunk_size", "4",
    "--model.init_args.compile", "false",
    "--model.init_args.solve_precision", "trainer",
    "--model.init_args.on_bad_task", "skip",
    "--model.init_args.check_network", "false",
    "--model.init_args.query_loss", "lightning_imaml.losses.ScaledCrossEntropy",
    "--model.init_args.query_loss.init_args.scale", "2.5",
]  # fmt: skip


def test_every_option_of_the_module_is_reachable_and_printed(capsys):
    """So is every option that is added later: the list is that of the constructor."""
    with pytest.raises(SystemExit) as ended:
        cli.run(["fit", "--config", str(QUICKSTART), *CHANGES, "--print_config"])
    assert ended.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]
    options = set(inspect.signature(IMAMLModule).parameters)
    assert set(printed) == options
    given = {option.split(".")[2] for option in CHANGES[::2]}
    assert given | {"backbone", "inner_solver", "estimator", "optimizer"} == options
    assert printed["on_bad_task"] == "skip"
    assert printed["adapt_only"] == ["classifier.*"]
    assert printed["query_loss"]["init_args"] == {"scale": 2.5}
    assert printed["gradient_clip_val"] == 2.5
    expected = {"strength": {"features.*": 2.0, "*": 0.5}, "learned": True, "per": "layer", "bounds": [0.01, 10.0]}
    assert printed["regularizer"]["init_args"] == expected
    assert printed["lr_scheduler"]["init_args"]["step_size"] == 3


def test_the_saved_configuration_reproduces_the_run(small, tmp_path):
    options = ["--model.init_args.accumulate_meta_batches", "2", "--model.init_args.gradient_clip_val", "1.0"]
    first = cli.run(["fit", *small, *options])
    saved = Path(first.trainer.log_dir) / "config.yaml"
    again = cli.run(["fit", "--config", str(saved), "--trainer.logger.init_args.save_dir", str(tmp_path / "again")])
    assert again.model.accumulate_meta_batches == 2
    for (name, one), other in zip(first.model.named_parameters(), again.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, msg=name)
