"""Print the results of a fit or a test, with their protocol."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console
from rich.table import Table
from torch import nn

from lightning_imaml.components import metric_names as names
from lightning_imaml.components.checks import require_at_least_one
from lightning_imaml.diagnostics.baseline import reinitialised
from lightning_imaml.diagnostics.interface import require_interface
from lightning_imaml.diagnostics.protocol import Protocol, has_class_indices
from lightning_imaml.episodes import Episode
from lightning_imaml.functional import adapt, predict
from lightning_imaml.metrics import EpisodicAccuracy, EpisodicInterval95, ignore_index_of

# "backbone" is missing here, since configure_model may build it after the callbacks' setup.
_NEEDED = ("eval_inner_solver", "solve_settings", "chunk_size")


@dataclass
class _LoaderResults:
    """The tasks of one dataloader, and the results of the network with random weights on them."""

    protocol: Protocol | None = None
    tasks: int = 0
    baseline_tasks: int = 0
    diverged: bool = False
    accuracy: EpisodicAccuracy = field(default_factory=EpisodicAccuracy)
    interval: EpisodicInterval95 = field(default_factory=EpisodicInterval95)

    def count(self, module: Any, episode: Episode) -> None:
        """Count the tasks of a batch."""
        self.tasks += episode.tasks
        protocol = Protocol.of(module, episode)
        self.protocol = protocol if self.protocol is None else self.protocol.joined(protocol)


class ResultsTable(Callback):
    """Print a table of results at the end of fit (for its last validation), of validate and of test.

    The rows show the network after adaptation, with its 95 % interval over tasks, and before. A test of a classifier
    also has a row for the same network with random weights, adapted to the same tasks by the same solver; it shows what
    meta-learning gains. Other metrics that the module logs with an interval, by the names of
    ``metrics.with_intervals``, have their own columns. The caption names the protocol. Where the module logs no
    accuracy, as in regression, the table shows the loss. Each of several dataloaders has its own table.

    Args:
        baseline: whether to test the network with random weights; it takes as long as the test itself.
        seed: the seed of the random weights.
        baseline_tasks: about how many tasks of a test the network with random weights gets, from the first on; None
            gives it all.

    Raises:
        ValueError: ``baseline_tasks`` is below 1.
        TypeError: in ``setup``, the module lacks what the baseline needs.
    """

    def __init__(self, baseline: bool = True, seed: int = 0, baseline_tasks: int | None = None) -> None:
        if baseline_tasks is not None:
            remedy = "None is for all tasks; for no baseline, give baseline=False."
            require_at_least_one("baseline_tasks", baseline_tasks, remedy)
        self.baseline = baseline
        self.seed = seed
        self.baseline_tasks = baseline_tasks
        self._network: nn.Module | None = None
        self._loaders: list[_LoaderResults] = []
        self._note = ""
        self._tables: list[Table] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that the module has what the table needs."""
        require_interface(self, pl_module, _NEEDED)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count tasks."""
        self._begin(trainer.num_val_batches)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Count tasks."""
        self._loaders[dataloader_idx].count(pl_module, Episode.of(batch))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the tables for the end of fit, or print them if this validation stands alone."""
        if not trainer.sanity_checking:
            self._tables = self._build(trainer, "val")
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._print(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the last validation."""
        self._print(trainer)

    def on_test_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Make the network with random weights."""
        self._begin(trainer.num_test_batches)
        if self.baseline:
            network, fixed = reinitialised(pl_module.backbone, self.seed)
            if fixed:
                self._note = f"No row for random weights: {', '.join(fixed)} cannot be drawn anew (no reset_parameters)"
            else:
                self._network = network
        for loader in self._loaders:
            loader.accuracy.to(pl_module.device)
            loader.interval.to(pl_module.device)
            loader.accuracy.ignore_index = loader.interval.ignore_index = ignore_index_of(pl_module)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Adapt the network with random weights to the same tasks."""
        episode, loader = Episode.of(batch), self._loaders[dataloader_idx]
        loader.count(pl_module, episode)
        if self._network is None or not has_class_indices(episode.query_targets):
            return
        # Every rank takes its share of these tasks.
        if self.baseline_tasks is not None and loader.baseline_tasks * trainer.world_size >= self.baseline_tasks:
            return
        loader.baseline_tasks += episode.tasks
        try:
            adapted = adapt(
                self._network,
                episode.support_inputs,
                episode.support_targets,
                # Compiling would take longer than the few tasks of a test.
                **pl_module.solve_settings(pl_module.eval_inner_solver) | {"compile": False},
            )
        except FloatingPointError:
            # The test of the learned network goes on.
            loader.diverged = True
            return
        with torch.no_grad(), trainer.precision_plugin.test_step_context():
            logits = predict(
                self._network,
                adapted.parameters,
                episode.query_inputs,
                support_inputs=episode.support_inputs,
                chunk_size=pl_module.chunk_size,
            )
        loader.accuracy.update(logits, episode.query_targets)
        loader.interval.update(logits, episode.query_targets)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the test."""
        self._tables = self._build(trainer, "test")
        self._network = None
        self._print(trainer)

    def _begin(self, batches: list[Any]) -> None:
        """Start new results; ``batches`` holds the number of batches of every dataloader."""
        self._loaders, self._note, self._network = [_LoaderResults() for _ in batches], "", None

    def _build(self, trainer: Trainer, stage: str) -> list[Table]:
        """The tables of a finished evaluation; every rank must call this, since it reduces over ranks."""
        if len(self._loaders) == 1:
            return [self._table(trainer, stage, "", self._loaders[0], f"{_TITLES[stage]} results")]
        return [
            self._table(trainer, stage, names.of_loader(k), loader, f"{_TITLES[stage]} results, dataloader {k}")
            for k, loader in enumerate(self._loaders)
        ]

    def _table(self, trainer: Trainer, stage: str, place: str, loader: _LoaderResults, title: str) -> Table:
        metrics = {
            name.removeprefix(names.of_stage(stage, "")).removesuffix(place): float(value)
            for name, value in trainer.callback_metrics.items()
            if name.startswith(names.of_stage(stage, "")) and name.endswith(place)
        }
        counted = torch.tensor(
            [float(loader.tasks), float(loader.baseline_tasks), float(loader.diverged)],
            device=trainer.strategy.root_device,
        )
        tasks, of_baseline, diverged = torch.as_tensor(trainer.strategy.reduce(counted, reduce_op="sum")).tolist()
        caption, note = [f"{loader.protocol}, {tasks:.0f} tasks"], self._note
        table = Table(title=title, caption_justify="left")
        if names.EVALUATION_ACCURACY not in metrics:
            table.add_column("network")
            table.add_column("loss", justify="right")
            table.add_row("after adaptation", f"{metrics[names.LOSS]:.4g}" if names.LOSS in metrics else "–")
        else:
            table.add_column("network")
            table.add_column("accuracy (%)", justify="right")
            others = [
                name for name in metrics if name + names.INTERVAL in metrics and name != names.EVALUATION_ACCURACY
            ]
            for name in others:
                table.add_column(name.replace("_", " "), justify="right")
            for when, suffix in (("after", ""), ("before", names.BEFORE)):
                name = names.EVALUATION_ACCURACY
                if name + suffix not in metrics:
                    continue
                accuracy = _percent(metrics[name + suffix], metrics.get(name + names.INTERVAL + suffix))
                values = (_with_interval(metrics, name, suffix) for name in others)
                table.add_row(f"{when} adaptation", accuracy, *values)
            if diverged:
                note = "No row for random weights: their adaptation diverged"
            elif self._network is not None:
                baseline = _percent(float(loader.accuracy.compute()), float(loader.interval.compute()))
                which = "" if of_baseline == tasks else f", {of_baseline:.0f} tasks"
                table.add_row(f"random weights, after adaptation{which}", baseline)
            caption.append("± is the 95 % interval of the mean over tasks")
            caption += [note] if note else []
        table.caption = ".\n".join(caption) + "."
        return table

    def _print(self, trainer: Trainer) -> None:
        tables, self._tables = self._tables, []
        if trainer.is_global_zero:
            for table in tables:
                Console().print(table)


_TITLES = {"val": "Validation", "test": "Test"}


def _with_interval(metrics: dict[str, float], name: str, suffix: str) -> str:
    value, interval = metrics.get(name + suffix), metrics.get(name + names.INTERVAL + suffix)
    # A module may log its own metrics only after adaptation.
    return "–" if value is None or interval is None else f"{value:.4g} ± {interval:.2g}"


def _percent(accuracy: float, interval: float | None) -> str:
    return f"{100 * accuracy:.2f}" + ("" if interval is None else f" ± {100 * interval:.2f}")
