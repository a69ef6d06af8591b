"""Tables 2 and 3 of iMAML (arXiv 1909.04630), measured: Omniglot and mini-ImageNet.

One call trains one method in one setting by the package's own command line, from the configurations in ``configs/``;
keeps the weights that were best on validation classes; tests them on test classes; adds a row to
``docs/results/results.csv`` and draws the tables and the learning curves of all rows anew. A second call with the same
arguments goes on from the last checkpoint, and the minutes of earlier calls count towards the budget; what a call that
was killed had done since its last checkpoint, one an epoch, counts as not done.

    python experiments/reproduce.py --table 2 --method imaml_gd --ways 5 --shots 1 --root OMNIGLOT --budget 60
    python experiments/reproduce.py --table 3 --method maml --ways 5 --shots 1 --root MINI_IMAGENET --budget 120

The configurations are that of the method, ``configs/omniglot_5way_1shot_<method>.yaml``, and the differences in
``configs/settings`` that belong to the setting. ``--config FILE…`` adds more differences, such as another λ.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from _progress import Progress, minutes
from _results import DATASETS, METHODS, Row, add_row, model_card, redraw
from _tables import save
from filelock import FileLock
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.utilities import rank_zero_info

from lightning_imaml import Episode, __version__, cli
from lightning_imaml.checkpoints import export_weights
from lightning_imaml.diagnostics.protocol import Protocol
from lightning_imaml.runtime.memory import keep_freed_memory

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"
RESUME = Path("last.ckpt")
SETTINGS = {2: ((5, 1), (5, 5), (20, 1), (20, 5)), 3: ((5, 1),)}


@dataclass(frozen=True)
class Run:
    """One method in one setting.

    Attributes:
        table: of the paper.
        dataset: its name.
        method: one of ``METHODS``.
        ways: classes a task.
        shots: support images a class.
        configs: configuration files, each a difference to those before it; they decide all that is not named here.
        budget: minutes of training, over all calls.
        root: the folder of the data; None where the data needs none.
        seed: of the initial weights and the training tasks. The test tasks are the same for all seeds.
        tasks: the number of test tasks.
        variant: names what was added to the configurations of the table; empty for nothing.
        output: the folder of results, tables and weights.
        logs: the folder of checkpoints and logs.
        start: a checkpoint whose weights training begins with; None for random ones.
    """

    table: int
    dataset: str
    method: str
    ways: int
    shots: int
    configs: Sequence[Path]
    budget: float
    root: Path | None = None
    seed: int = 0
    tasks: int = 1000
    variant: str = ""
    output: Path = ROOT / "docs" / "results"
    logs: Path = Path("logs") / "reproduce"
    start: Path | None = None

    @property
    def name(self) -> str:
        """Names the files of this run."""
        parts = (self.dataset, f"{self.ways}way", f"{self.shots}shot", self.method, self.variant, f"seed{self.seed}")
        return "_".join(part for part in parts if part)

    @property
    def weights(self) -> Path:
        """The weights to publish."""
        return self.output / "weights" / f"{self.name}.ckpt"

    def options(self, stage: str) -> list[str]:
        """What both ``fit`` and ``test`` get: configurations, data and a folder that stays the same in every call."""
        where = {"save_dir": self.logs, "name": self.name, "version": stage}
        logger = [text for key, value in where.items() for text in (f"--trainer.logger.init_args.{key}", str(value))]
        root = [] if self.root is None else ["--data.root", str(self.root)]
        return [*(text for path in self.configs for text in ("--config", str(path))), *root, *logger]


def configurations(table: int, method: str, ways: int, shots: int) -> list[Path]:
    """The configuration of a method, and those of the differences in ``configs/settings`` that a setting has."""
    dataset = DATASETS[table]
    names = (f"{dataset}_{ways}way_{shots}shot", f"{dataset}_{ways}way_{method}", f"{dataset}_{method}")
    differences = [CONFIGS / "settings" / f"{name}.yaml" for name in names]
    return [CONFIGS / f"omniglot_5way_1shot_{method}.yaml", *(path for path in differences if path.is_file())]


def train(run: Run) -> LightningCLI:
    """Train for what is left of the budget, from the last checkpoint if there is one."""
    resume = run.logs / run.name / "fit" / "checkpoints" / RESUME
    hours, seconds = divmod(round(60 * run.budget), 3600)
    return cli.run(
        [
            "fit", *run.options("fit"),
            "--seed_everything", str(run.seed), "--data.seed", str(run.seed),
            "--trainer.max_time", f"{hours // 24:02}:{hours % 24:02}:{seconds // 60:02}:{seconds % 60:02}",
            "--trainer.callbacks+", "_progress.Progress",
            *(["--trainer.callbacks+", "_start.StartFrom", "--trainer.callbacks.checkpoint", str(run.start)]
              if run.start else []),
            *(["--ckpt_path", str(resume)] if resume.is_file() else []),
        ]
    )  # fmt: skip


def reproduce(run: Run) -> Row:
    """Train, choose by validation, publish the weights, test what is published, and add the row to the tables."""
    revision = commit()  # Now: a repository may move on while this code trains.
    trainer = train(run).trainer
    best = trainer.checkpoint_callback.best_model_path
    if not best:
        raise RuntimeError(
            f"the budget must reach the first validation, which writes the first checkpoint; found none after "
            f"{minutes(trainer):.1f} minutes. Raise --budget, or lower data.batches_per_epoch."
        )
    export_weights(best, run.weights)
    # A batch is of no effect on a task. Over so few tasks, what a compiler saves hardly ever pays for its minute.
    how = [
        "--data.test_tasks", str(run.tasks), "--data.eval_tasks_per_batch", "20", "--model.compile", "false"
    ]  # fmt: skip
    tested = cli.run(["test", *run.options("test"), *how, "--ckpt_path", str(run.weights)])
    metrics = {name: 100 * float(value) for name, value in tested.trainer.callback_metrics.items()}
    progress = next(callback for callback in trainer.callbacks if isinstance(callback, Progress))
    row: Row = {
        "table": run.table, "dataset": run.dataset, "method": run.method, "ways": run.ways, "shots": run.shots,
        "accuracy": round(metrics["test/accuracy"], 4), "interval95": round(metrics["test/accuracy_interval95"], 4),
        "tasks": run.tasks, "meta_steps": trainer.global_step, "minutes": round(minutes(trainer), 2),
        "cores": torch.get_num_threads(), "seed": run.seed, "torch": torch.__version__, "commit": revision,
        "protocol": protocol(run, tested, progress.devices),
    }  # fmt: skip
    keep_curves(run, trainer.log_dir, progress)
    configs = [path.relative_to(ROOT) if path.is_relative_to(ROOT) else path.name for path in run.configs]
    command = " ".join(
        ["lightning-imaml test", *(f"--config {path}" for path in configs), *(["--data.root PATH"] if run.root else []),
         *how, f"--ckpt_path docs/results/weights/{run.weights.name}"]
    )  # fmt: skip
    run.weights.with_suffix(".md").write_text(model_card(row, run.weights, command))
    with FileLock(run.logs / "results.lock"):  # Several methods may be measured at a time.
        add_row(row, run.output / "results.csv")
        redraw(run.output)
    return row


def protocol(run: Run, tested: LightningCLI, trained_on: Sequence[str]) -> str:
    """What the accuracy of a test depends on, in words, and what else than a CPU it was trained on."""
    data = tested.datamodule
    of_test = Protocol.of(tested.model, Episode.of(next(iter(data.test_dataloader()))))
    members = data.tasks("train").pool.members
    of_training = (
        f"trained with shots {data.hparams['shots']}, queries {data.hparams['queries']}, tasks a step "
        f"{data.hparams['tasks_per_batch']}, on {len(members)} classes of "
        f"{statistics.median(map(len, members.values())):.0f} images"
    )
    start = "" if run.start is None else f", beginning with {run.start.name}"
    device = "" if set(trained_on) <= {"cpu"} else f", on {' and '.join(trained_on)}"
    device += "" if tested.model.device.type == "cpu" else f"; tested on {tested.model.device.type}"
    return f"{of_test}; {of_training}{start}{device}; {' + '.join(path.stem for path in run.configs)}"


def keep_curves(run: Run, log_dir: str | None, progress: Progress) -> None:
    """Copy the curves of a training to the results: accuracy by steps and minutes, and what the monitors measured."""
    of_run = {"table": run.table, "dataset": run.dataset, "method": run.method, "ways": run.ways, "shots": run.shots,
              "variant": run.variant, "seed": run.seed}  # fmt: skip
    curves = run.output / "curves"
    save([{**of_run, **point} for point in progress.points], curves / f"{run.name}.csv")
    for suffix in ("csv", "png"):
        drawn = Path(log_dir or "") / f"learning_curve.{suffix}"
        if drawn.is_file():
            shutil.copy(drawn, curves / f"{run.name}_training.{suffix}")


def commit() -> str:
    """The commit of this code, marked where the code differs from it; the version where there is no repository."""

    def git(*command: str) -> str:
        return subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "lightning_imaml", "experiments", "configs")
        return git("rev-parse", "--short", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return f"version {__version__}"


def main(args: list[str] | None = None) -> Row:
    """Measure one entry of a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=int, choices=DATASETS, required=True)
    parser.add_argument("--method", choices=METHODS, required=True)
    parser.add_argument("--ways", type=int, default=5)
    parser.add_argument("--shots", type=int, default=1)
    parser.add_argument("--root", type=Path, required=True, help="the folder of the data")
    parser.add_argument("--budget", type=float, required=True, help="minutes of training, over all calls")
    parser.add_argument(
        "--config",
        type=Path,
        nargs="+",
        action="extend",
        default=[],
        help="more differences to the configurations, in this order; the last one's name is kept: put it in configs/",
    )
    parser.add_argument(
        "--start",
        type=Path,
        metavar="CHECKPOINT",
        help="begin with these weights, such as docs/results/weights/*.ckpt; of any number of ways",
    )
    parser.add_argument("--tasks", type=int, default=1000, help="test tasks, 600 or more")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Run.output)
    parser.add_argument("--logs", type=Path, default=Run.logs)
    options = parser.parse_args(args)
    setting = (options.ways, options.shots)
    if setting not in SETTINGS[options.table]:
        there = ", ".join(f"{ways}-way {shots}-shot" for ways, shots in SETTINGS[options.table])
        parser.error(f"--ways and --shots must be a setting of table {options.table}, {there}; found {setting}")
    if options.tasks < 600:
        parser.error(f"--tasks must be at least 600, as for all results here; found {options.tasks}")
    keep_freed_memory()
    extra = [path.resolve() for path in options.config]
    row = reproduce(
        Run(
            options.table, DATASETS[options.table], options.method, *setting,
            [*configurations(options.table, options.method, *setting), *extra], options.budget, options.root,
            options.seed, options.tasks, extra[-1].stem if extra else "", options.output, options.logs, options.start,
        )
    )  # fmt: skip
    rank_zero_info(f"{row['accuracy']:.2f} ± {row['interval95']:.2f} % after {row['meta_steps']} meta-steps")
    return row


if __name__ == "__main__":
    main()
