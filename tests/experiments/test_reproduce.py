"""Tables 2 and 3: what is published gives the number of the table, and a call goes on where the last one stopped."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import _results
import pytest
import reproduce
import torch
import yaml
from _progress import Progress
from lightning.pytorch.callbacks import Timer

from lightning_imaml import IMAMLModule, __version__, cli
from lightning_imaml.checkpoints import export_weights
from lightning_imaml.models import Conv4

COLUMNS = (
    "table,dataset,method,ways,shots,accuracy,interval95,tasks,meta_steps,minutes,cores,seed,torch,commit,protocol"
)
pytestmark = [
    pytest.mark.filterwarnings("ignore:(?s)Using ModelCheckpoint with manual optimization"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Experiment logs directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch"),
]


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def run(folder: Path, epochs: int = 2, **changes) -> reproduce.Run:
    """Two meta-steps, an epoch each, on the embedded letters with a tiny network."""
    folder.mkdir(exist_ok=True)
    tiny = {
        "model": {
            "class_path": "lightning_imaml.IMAMLModule",
            "init_args": {
                "backbone": {"class_path": "lightning_imaml.models.Conv4", "init_args": {"ways": 5, "filters": 4}},
                "inner_solver": {
                    "class_path": "lightning_imaml.inner.GradientDescent", "init_args": {"lr": 0.3, "steps": 2},
                },
            },
        },
        "data": {
            "class_path": "lightning_imaml.data.GlyphDataModule",
            "init_args": {"ways": 5, "shots": 1, "tasks_per_batch": 2, "batches_per_epoch": 1, "val_tasks": 4},
        },
        "trainer": {
            "accelerator": "cpu", "devices": 1, "num_sanity_val_steps": 0, "log_every_n_steps": 1,
            "enable_progress_bar": False, "enable_model_summary": False,
            "logger": {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "logs"}},
            "callbacks": [
                {
                    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                    "init_args": {"monitor": "val/accuracy", "mode": "max", "filename": "best"},
                },
                {
                    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                    "init_args": {"filename": "last", "enable_version_counter": False},
                },
                {"class_path": "lightning_imaml.callbacks.LearningCurve"},
            ],
        },
    }  # fmt: skip
    (folder / "letters.yaml").write_text(yaml.safe_dump(tiny))
    (folder / "epochs.yaml").write_text(yaml.safe_dump({"trainer": {"max_epochs": epochs}}))
    configs = [folder / "letters.yaml", folder / "epochs.yaml"]
    settings = {"budget": 10.0, "tasks": 20, "output": folder / "results", "logs": folder / "logs", **changes}
    return reproduce.Run(2, "letters", "imaml_gd", 5, 1, configs, **settings)


def accuracy_of_test(plan, *options: str) -> float:
    metrics = cli.run(["test", *plan.options("check"), "--data.test_tasks", "20", *options]).trainer.callback_metrics
    return 100 * float(metrics["test/accuracy"])


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A run and its row, which two tests read."""
    plan = run(tmp_path_factory.mktemp("published"))
    return plan, reproduce.reproduce(plan)


@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # Each run has a folder of its own.
@pytest.mark.filterwarnings("ignore:(?s)Be aware that when using `ckpt_path`, callbacks used to create")
def test_the_published_weights_give_the_published_number(published):
    plan, row = published
    output = plan.output
    assert ",".join(row) == COLUMNS
    assert (row["table"], row["dataset"], row["method"], row["ways"], row["shots"]) == (2, "letters", "imaml_gd", 5, 1)
    assert (row["tasks"], row["meta_steps"], row["seed"]) == (20, 2, 0)
    assert 0 < row["minutes"] < 10
    assert row["protocol"].startswith("5-way 1-shot, 5 queries a class, 2 inner steps, batch statistics")
    assert "trained with shots 1, queries 5, tasks a step 2, on " in row["protocol"]
    assert rows(output / "results.csv") == [{name: str(value) for name, value in row.items()}]

    weights = torch.load(plan.weights, weights_only=True)
    assert not {"optimizer_states", "callbacks", "loops", "datamodule_hyper_parameters"} & set(weights)
    assert str(output.parent).encode() not in plan.weights.read_bytes(), "nothing of the machine"
    (best,) = (plan.logs / plan.name / "fit" / "checkpoints").glob("best*.ckpt")
    assert accuracy_of_test(plan, "--ckpt_path", str(best)) == pytest.approx(row["accuracy"], abs=1e-3)
    assert accuracy_of_test(plan) != pytest.approx(row["accuracy"], abs=1e-3), "the weights matter"

    curve = rows(output / "curves" / f"{plan.name}.csv")
    assert [point["meta_steps"] for point in curve] == ["1", "2"]
    assert float(curve[0]["minutes"]) < float(curve[1]["minutes"]) <= row["minutes"] + 0.01
    assert (output / "curves" / f"{plan.name}_training.csv").is_file()
    card = plan.weights.with_suffix(".md").read_text()
    assert f"{row['accuracy']:.2f} ± {row['interval95']:.2f} % over 20 tasks" in card
    assert f"--ckpt_path docs/results/weights/{plan.weights.name}" in card
    assert f"| {row['accuracy']:.2f} ± {row['interval95']:.2f} |" in (output / "tables.md").read_text()
    assert (output / "learning_curves.png").stat().st_size > 10_000


@pytest.mark.slow  # A process that never trained, as whoever downloads the weights has it, imports all of PyTorch.
def test_another_process_gets_the_published_number(published, tmp_path):
    plan, row = published
    given = [text for path in plan.configs for text in ("--config", str(path))]
    command = ["test", *given, "--data.test_tasks", "20", "--ckpt_path", str(plan.weights)]
    done = subprocess.run(
        [sys.executable, "-m", "lightning_imaml", *command], capture_output=True, text=True, cwd=tmp_path, timeout=600,
        check=False, env={**os.environ, "PYTHONPATH": str(reproduce.ROOT), "COLUMNS": "200"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    (told,) = [line for line in done.stdout.splitlines() if "test/accuracy " in line]
    assert 100 * float(told.replace("│", "|").split("|")[2]) == pytest.approx(row["accuracy"], abs=1e-3)


@pytest.mark.slow  # Reads all of Omniglot, and tests 600 tasks: the command of the documentation must be ready to run.
def test_an_entry_of_table_2(tmp_path, omniglot_root):
    small = {
        "model": {"init_args": {"backbone": {"init_args": {"filters": 4}}, "compile": False}},
        "data": {"init_args": {"batches_per_epoch": 2, "val_tasks": 4, "eval_tasks_per_batch": 50}},
        "trainer": {"max_epochs": 1, "enable_model_summary": False},
    }
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(small))
    options = {
        "table": 2, "method": "reptile", "ways": 5, "shots": 5, "budget": 5, "tasks": 600, "root": omniglot_root,
        "config": tmp_path / "small.yaml", "output": tmp_path / "out", "logs": tmp_path / "logs",
    }  # fmt: skip
    row = reproduce.main([text for name, value in options.items() for text in (f"--{name}", str(value))])
    assert row["protocol"].startswith("5-way 5-shot, 5 queries a class, 5 inner steps")
    assert "trained with shots 10, queries 1, tasks a step 8, on 4800 classes of 20 images" in row["protocol"]
    assert row["protocol"].endswith("omniglot_5way_1shot_reptile + omniglot_5way_5shot + omniglot_reptile + small")
    assert (row["meta_steps"], row["tasks"]) == (2, 600)
    assert 20 < row["accuracy"] <= 100
    assert (tmp_path / "out" / "weights" / "omniglot_5way_5shot_reptile_small_seed0.ckpt").is_file()


def test_it_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    def weights(plan):
        return torch.load(plan.logs / plan.name / "fit" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]

    whole, parts = run(tmp_path / "whole", epochs=3), run(tmp_path / "parts", epochs=3)
    reproduce.train(whole)

    def stop(self, trainer, *_):
        if trainer.global_step == 2:
            raise RuntimeError("stopped")

    with monkeypatch.context() as patched:
        patched.setattr(Progress, "on_train_batch_end", stop)
        with pytest.raises(RuntimeError, match="stopped"):
            reproduce.train(parts)
    resumed = reproduce.train(parts).trainer
    assert resumed.global_step == 3
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(parts)[name], value, rtol=0, atol=0, msg=name)
    (progress,) = [callback for callback in resumed.callbacks if isinstance(callback, Progress)]
    assert [point["meta_steps"] for point in progress.points] == [1, 2, 3]
    assert [p["minutes"] for p in progress.points] == sorted(p["minutes"] for p in progress.points)


def test_the_minutes_of_earlier_calls_count(tmp_path, monkeypatch):
    plan = run(tmp_path, epochs=1)
    reproduce.train(plan)
    monkeypatch.setattr(Timer, "load_state_dict", lambda self, state: setattr(self, "_offset", 600.0))
    spent = reproduce.train(run(tmp_path, epochs=5))
    assert spent.trainer.global_step == 1, "no minute is left"
    monkeypatch.setattr(Timer, "load_state_dict", lambda self, state: setattr(self, "_offset", 300.0))
    going = reproduce.train(run(tmp_path, epochs=2))
    assert going.trainer.global_step == 2
    assert 5 < reproduce.minutes(going.trainer) < 10


@pytest.mark.parametrize("configured", [None, {"minutes": 30}], ids=["none", "another"])
def test_the_budget_is_that_of_the_call(configured, tmp_path):
    plan = run(tmp_path, budget=1571.5)
    (tmp_path / "epochs.yaml").write_text(yaml.safe_dump({"trainer": {"max_epochs": 1, "max_time": configured}}))
    (timer,) = [c for c in reproduce.train(plan).trainer.callbacks if isinstance(c, Timer)]
    assert timer.time_remaining() + timer.time_elapsed() == pytest.approx(60 * 1571.5)


def test_without_a_validation_there_is_nothing_to_publish(tmp_path):
    with pytest.raises(RuntimeError, match="Raise --budget"):
        reproduce.reproduce(run(tmp_path, budget=0.0))


@pytest.mark.parametrize("ways", [5, 20])
def test_the_weights_of_the_papers_network_are_small(ways, tmp_path):
    module = IMAMLModule(Conv4(ways))
    whole = {
        "state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams), "pytorch-lightning_version": "2.6",
        "lightning_imaml": {"loss": "l", "data": {}, "outer_step": {"seed": 1}}, "optimizer_states": [torch.zeros(9)],
    }  # fmt: skip
    torch.save(whole, tmp_path / "whole.ckpt")
    export_weights(tmp_path / "whole.ckpt", tmp_path / "small.ckpt")
    assert (tmp_path / "small.ckpt").stat().st_size < 500_000
    small = torch.load(tmp_path / "small.ckpt", weights_only=True)
    assert small.keys() == whole.keys() - {"optimizer_states"}
    assert small["lightning_imaml"] == {"loss": "l", "data": {}}
    for name, value in module.state_dict().items():
        assert torch.equal(small["state_dict"][name], value)


def test_what_is_no_checkpoint_is_not_exported(tmp_path):
    torch.save({"weights": 1}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"checkpoint must be one of a Trainer.*found \['weights'\]"):
        export_weights(tmp_path / "other.pt", tmp_path / "small.ckpt")
    assert not (tmp_path / "small.ckpt").exists()


def result(accuracy: float, **changes) -> dict:
    row = dict.fromkeys(COLUMNS.split(","), "x")
    row |= {"table": 2, "dataset": "omniglot", "method": "maml", "ways": 5, "shots": 1, "seed": 0, "meta_steps": 10}
    return {**row, "accuracy": accuracy, "interval95": 0.3, **changes}


def test_rows_are_added_and_a_repeated_test_replaces_its_own(tmp_path):
    path = tmp_path / "results.csv"
    for row in (result(90.0), result(91.0, meta_steps=20), result(92.0, method="reptile"), result(93.0)):
        _results.add_row(row, path)
    assert path.read_text().splitlines()[0] == COLUMNS
    assert [row["accuracy"] for row in rows(path)] == ["91.0", "92.0", "93.0"]


def test_the_tables_have_both_numbers(tmp_path):
    _results.add_row(result(98.123), tmp_path / "results.csv")
    _results.add_row(result(80.0, protocol="1 step; a + paper_some"), tmp_path / "results.csv")
    text = _results.tables(_results.read(tmp_path / "results.csv"), _results.read(_results.PUBLISHED))
    assert "| MAML | here | 98.12 ± 0.30 | – | – | – |" in text
    assert "| MAML | here, the paper's λ and steps | 80.00 ± 0.30 | – | – | – |" in text
    assert text.count("the paper's λ") == 1
    assert "| MAML | published | 98.7 ± 0.4 | 99.9 ± 0.1 | 95.8 ± 0.3 | 98.9 ± 0.2 |" in text
    assert "| iMAML, Hessian-free | published | 99.50 ± 0.26 | 99.74 ± 0.11 | 96.18 ± 0.36 | 99.14 ± 0.1 |" in text
    assert "| iMAML, Hessian-free | published | 49.30 ± 1.88 |" in text
    for number in ("hypertorch | 96.71 |", "run by a user | 98.204 |", "Betty | 98.68 |"):
        assert number in text


def test_the_curves_of_a_setting_share_their_panels():
    def curve(method: str, ways: int, means: list[float]) -> list[dict[str, str]]:
        of_run = {"dataset": "omniglot", "method": method, "ways": ways, "shots": 1, "variant": "", "seed": 0}
        points = [{"meta_steps": 10 * k, "minutes": k / 2, "accuracy": m, "interval95": 1} for k, m in enumerate(means)]
        return [{name: str(value) for name, value in {**of_run, **point}.items()} for point in points]

    figure = _results.draw([curve("maml", 5, [50.0, 90.0]), curve("reptile", 5, [60.0]), curve("maml", 20, [70.0])])
    drawn = [[line.get_xydata().tolist() for line in axes.lines] for axes in figure.axes]
    assert drawn == [
        [[[0, 50], [10, 90]], [[0, 60]]], [[[0, 50], [0.5, 90]], [[0, 60]]], [[[0, 70]]], [[[0, 70]]],
    ]  # fmt: skip
    assert [text.get_text() for text in figure.axes[1].get_legend().get_texts()] == ["MAML", "Reptile"]
    again = _results.draw([curve("maml", 5, [50.0]), curve("maml", 5, [60.0]), curve("reptile", 5, [70.0])])
    assert [line.get_linestyle() for line in again.axes[0].lines] == ["-", "--", "-"], "runs of a method are told apart"
    near = _results.draw([curve("maml", 5, [60.0, 98.0, 99.0])]).axes[0]
    low, middle, high = (near.transData.transform((0, accuracy))[1] for accuracy in (60, 98, 99))
    assert (high - middle) / (middle - low) > 0.1, "on a plain scale a fortieth"


@pytest.mark.parametrize(
    ("table", "method", "ways", "shots"),
    [
        *((2, method, *setting) for method in _results.METHODS for setting in reproduce.SETTINGS[2]),
        *((3, method, 5, 1) for method in _results.METHODS),
    ],
)
def test_every_entry_of_the_tables_has_its_configuration(table, method, ways, shots, capsys):
    configs = reproduce.configurations(table, method, ways, shots)
    with pytest.raises(SystemExit) as ended:
        cli.run(["fit", *(text for path in configs for text in ("--config", str(path))), "--print_config"])
    assert ended.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    settings, data = printed["model"]["init_args"], printed["data"]["init_args"]
    solver, backbone = settings["inner_solver"]["init_args"], settings["backbone"]["init_args"]
    assert (backbone["ways"], data["ways"]) == (ways, ways)
    assert shots == (data["shots"] if data["eval_shots"] is None else data["eval_shots"])
    assert data["shots"] == (10 if method == "reptile" else shots)
    if method == "imaml_gd":
        assert solver["steps"] == {(2, 5): 5, (2, 20): 25, (3, 5): 10}[table, ways]
    photographs = {
        "channels": 3,
        "filters": 32,
        "image_size": 84,
        "downsampling": "max-pool",
        "norm": "batch",
        "ways": 5,
    }
    assert table == 2 or backbone == photographs
    wanted = "OmniglotDataModule" if table == 2 else "MiniImageNetDataModule"
    assert printed["data"]["class_path"].endswith(wanted)
    # The schedule ends with the last epoch, unless the budget ends before.
    steps = printed["trainer"]["max_epochs"] * data["batches_per_epoch"]
    assert settings["lr_scheduler"]["init_args"]["T_max"] == steps
    # What parses is also what can be built.
    built = Conv4(**backbone)
    assert built.classifier.out_features == ways


@pytest.mark.parametrize(
    ("file", "ways", "solver"),
    [
        ("paper_5way_imaml_gd", 5, {"lr": 0.1, "steps": 16}),
        ("paper_20way_imaml_gd", 20, {"lr": 0.1, "steps": 25}),
        ("paper_imaml_hf", 20, {"steps": 4, "cg_steps": 5}),
    ],
)
def test_the_papers_own_settings(file, ways, solver, capsys):
    configs = [*reproduce.configurations(2, file[-8:], ways, 1), reproduce.CONFIGS / "paper" / f"{file}.yaml"]
    with pytest.raises(SystemExit):
        cli.run(["fit", *(text for path in configs for text in ("--config", str(path))), "--print_config"])
    settings = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]
    assert settings["regularizer"]["init_args"]["strength"] == 2.0
    assert settings["estimator"]["init_args"]["linear_solver"]["init_args"]["max_iter"] == 5
    assert settings["inner_solver"]["init_args"].items() >= solver.items()
    assert settings["backbone"]["init_args"]["ways"] == ways


@pytest.mark.parametrize("tuned", sorted((reproduce.CONFIGS / "tuned").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_settings_of_long_trainings_keep_a_moving_average(tuned, capsys):
    table, ways = 3 if "mini_imagenet" in tuned.stem else 2, 20 if "20way" in tuned.stem else 5
    method = next((name for name in _results.METHODS if name in tuned.stem), "maml")
    common = [tuned.with_stem("omniglot_more_classes")] if "after omniglot_more_classes" in tuned.read_text() else []
    configs = [*reproduce.configurations(table, method, ways, 1), *common, tuned]
    with pytest.raises(SystemExit):
        cli.run(["fit", *(text for path in configs for text in ("--config", str(path))), "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    callbacks = [callback["class_path"].rpartition(".")[2] for callback in printed["trainer"]["callbacks"]]
    assert callbacks.count("ModelCheckpoint") == 2, "those of the plain configuration stay"
    assert callbacks[-1] == "EMAWeightAveraging"
    assert printed["data"]["init_args"]["eval_queries"] == (1 if table == 2 else 15)


def test_cards_of_published_weights_name_their_configurations():
    """From the root of the repository, whose files they are; and the newest model of every entry has one."""
    results = reproduce.ROOT / "docs" / "results"
    rows = _results.read(results / "results.csv")
    number = {id(r): f"{float(r['accuracy']):.2f} ± {float(r['interval95']):.2f} %" for r in rows}
    texts = {card: card.read_text() for card in sorted((results / "weights").glob("*.md"))}
    for row in {(r["table"], r["method"], r["ways"], r["shots"]): r for r in rows}.values():
        assert any(row["protocol"] in text and number[id(row)] in text for text in texts.values()), row
    newest = {r["protocol"]: r for r in rows}
    for card, text in texts.items():
        (row,) = (row for protocol, row in newest.items() if f"| {protocol} |" in text)
        assert number[id(row)] in text, card
        named = [after for word, after in pairwise(text.split()) if word in ("--config", "--ckpt_path")]
        assert len(named) >= 2
        assert all((reproduce.ROOT / name).is_file() for name in named), card


def test_every_difference_belongs_to_an_entry():
    entries = [(2, m, *s) for m in _results.METHODS for s in reproduce.SETTINGS[2]]
    entries += [(3, m, 5, 1) for m in _results.METHODS]
    used = {path for entry in entries for path in reproduce.configurations(*entry)}
    assert used >= set((reproduce.CONFIGS / "settings").glob("*.yaml"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--table", "3", "--ways", "20"], "must be a setting of table 3, 5-way 1-shot; found (20, 1)"),
        (["--table", "2", "--tasks", "100"], "--tasks must be at least 600"),
    ],
)
def test_what_the_tables_do_not_have_is_refused(options, said, capsys):
    with pytest.raises(SystemExit):
        reproduce.main([*options, "--method", "maml", "--root", "none", "--budget", "1"])
    assert said in capsys.readouterr().err


def test_the_commit_is_that_of_the_code_or_else_the_version(tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    assert reproduce.commit() == f"version {__version__}"
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "code.py").write_text("1")

    def git(*command):
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(["git", *who, *command], cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    for command in (("init",), ("add", "."), ("commit", "-m", "first")):
        git(*command)
    head = git("rev-parse", "--short", "HEAD").strip()
    (tmp_path / "README.md").write_text("no code")
    assert reproduce.commit() == head
    (tmp_path / "experiments" / "code.py").write_text("2")
    assert reproduce.commit() == f"{head}+changes"
