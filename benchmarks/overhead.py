"""A training step under Lightning's Trainer against the bare meta-gradient of the same tasks.

After every training step, the bare call runs on the same batch and network, so that both sides take turns. A step is
all that the Trainer does from one batch to the next: loading, the module's meta-gradient, the optimizer, logging. The
Trainer has its defaults, but for the progress bar, the validation and the number of steps. Loading is timed by itself,
in this process (no loader workers).
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

from benchmarks.sides import Row, save
from benchmarks.workloads import WORKLOADS, Workload
from lightning_imaml import Episode, IMAMLModule
from lightning_imaml.curvature import GaussNewton
from lightning_imaml.functional import meta_gradient
from lightning_imaml.inner import GradientDescent
from lightning_imaml.linear import ConjugateGradient
from lightning_imaml.meta_gradients import Implicit
from lightning_imaml.regularizers import Proximal

WARM_UP = 2  # Steps that are not counted.


class Timed:
    """Batches, and the seconds that each took to come."""

    def __init__(self, batches: Iterable[Episode]) -> None:
        self.batches = batches
        self.seconds: list[float] = []

    def __iter__(self) -> Iterator[Episode]:
        iterator = iter(self.batches)
        while True:
            start = time.perf_counter()
            batch = next(iterator, None)
            self.seconds.append(time.perf_counter() - start)
            if batch is None:
                return
            yield batch


class Turns(Callback):
    """Times every training step, and the bare meta-gradient after it."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = settings
        self.steps: list[float] = []
        self.bare: list[float] = []
        self._resumed: float | None = None

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Take the step's time, then that of the bare call."""
        now = time.perf_counter()
        if self._resumed is not None:
            self.steps.append(now - self._resumed)
        start = time.perf_counter()
        meta_gradient(pl_module.backbone, Episode.of(batch), **self.settings)
        self._resumed = time.perf_counter()
        self.bare.append(self._resumed - start)


def measure(workload: Workload, root: Path | None, repeats: int, compile: bool) -> Row:
    """The medians of both sides and of loading."""
    steps = WARM_UP + repeats + 1  # The first step has no beginning.
    data = itertools.repeat(workload.episode(None), steps) if root is None else workload.loader(root, steps)
    batches = Timed(data)
    given = workload.settings
    settings = {
        "inner_solver": GradientDescent(given.lr, given.steps),
        "estimator": Implicit(ConjugateGradient(given.cg_steps), GaussNewton()),
        "regularizer": Proximal(given.strength),
        "compile": compile,
    }
    turns = Turns(settings)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator="cpu",
            max_steps=steps,
            callbacks=[turns],
            default_root_dir=folder,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(IMAMLModule(workload.network(), **settings), train_dataloaders=batches)
    step, bare, loading = (
        statistics.median(times[WARM_UP:]) for times in (turns.steps, turns.bare, batches.seconds[:steps])
    )
    return {
        "training_step_ms": 1e3 * step,
        "bare_meta_gradient_ms": 1e3 * bare,
        "ratio": step / bare,
        "loading_ms": 1e3 * loading,
        "loading_share": loading / step,
    }


def run(names: list[str], roots: Mapping[str, Path | None], repeats: int, compile: bool, output: Path) -> list[Row]:
    """Measure workloads, print them and save them."""
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {'compiled' if compile else 'eager'}")
    rows: list[Row] = []
    for name in names:
        workload = WORKLOADS[name]
        root = roots[workload.data]
        row = {"workload": name, **measure(workload, root, repeats, compile)}
        rows.append(row)
        print(
            f"{name} ({'real' if root else 'random'} images, {workload.tasks} tasks): {row['training_step_ms']:.1f} ms "
            f"a training step, {row['bare_meta_gradient_ms']:.1f} ms the bare meta-gradient, ratio {row['ratio']:.3f}; "
            f"loading {row['loading_ms']:.2f} ms, {row['loading_share']:.2%} of a step",
            flush=True,
        )
        save(rows, output / "overhead.csv")
    return rows
