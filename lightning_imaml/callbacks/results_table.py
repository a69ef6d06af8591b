"""Print what a fit or a test achieved, with the protocol that it belongs to."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console
from rich.table import Table
from torch import nn

from lightning_imaml.callbacks.baseline import reinitialised
from lightning_imaml.callbacks.interface import require_interface
from lightning_imaml.callbacks.protocol import Protocol
from lightning_imaml.episodes import Episode
from lightning_imaml.functional import adapt, predict
from lightning_imaml.metrics import EpisodicAccuracy, EpisodicInterval95

# Without "backbone": configure_model may build it after the callbacks' setup.
_NEEDED = ("inner_solver", "regularizer", "strengths", "inner_loss", "chunk_size")


class ResultsTable(Callback):
    """Print a table at the end of fit (of its last validation), of validate and of test.

    Rows: the network after adaptation, with its 95 % interval over tasks, and before; in a test of a classifier also
    the same network with random weights, adapted to the same tasks by the same solver: what meta-learning is worth.
    Other metrics that the module logs with an interval, as ``metrics.with_intervals`` names them, have columns of their
    own. The caption names the protocol. Where the module logs no accuracy, as in regression, the table shows the loss.

    Args:
        baseline: whether to test the network with random weights; it takes as long as the test itself.
        seed: of the random weights.

    Raises:
        TypeError: in ``setup``, if the module lacks what the baseline needs.
    """

    def __init__(self, baseline: bool = True, seed: int = 0) -> None:
        self.baseline = baseline
        self.seed = seed
        self._network: nn.Module | None = None
        self._accuracy = EpisodicAccuracy()
        self._interval = EpisodicInterval95()
        self._protocol: Protocol | None = None
        self._tasks = 0
        self._diverged = False
        self._note = ""
        self._table: Table | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that the module has what the table needs."""
        require_interface(self, pl_module, _NEEDED)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count tasks."""
        self._begin()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count tasks."""
        self._see(pl_module, Episode.of(batch))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the table for the end of fit, or print it if this validation stands alone."""
        if not trainer.sanity_checking:
            self._table = self._build(trainer, "val")
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._print(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the last validation."""
        self._print(trainer)

    def on_test_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Make the network with random weights."""
        self._begin()
        if self.baseline:
            network, fixed = reinitialised(pl_module.backbone, self.seed)
            if fixed:
                self._note = f"No row for random weights: {', '.join(fixed)} cannot be drawn anew (no reset_parameters)"
            else:
                self._network = network
        for metric in (self._accuracy, self._interval):
            metric.reset()
            metric.to(pl_module.device)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Adapt the network with random weights to the same tasks."""
        episode = Episode.of(batch)
        self._see(pl_module, episode)
        if self._network is None or not _has_class_indices(episode):
            return
        try:
            adapted = adapt(
                self._network,
                episode.support_inputs,
                episode.support_targets,
                loss=pl_module.inner_loss,
                inner_solver=pl_module.inner_solver,
                regularizer=pl_module.regularizer,
                strengths=dict(pl_module.strengths),
                rates=dict(pl_module.rates),
                adapt_only=pl_module.adapt_only,
                chunk_size=pl_module.chunk_size,
            )
        except FloatingPointError:
            # The learned network is tested all the same.
            self._diverged = True
            return
        with torch.no_grad(), trainer.precision_plugin.test_step_context():
            logits = predict(
                self._network,
                adapted.parameters,
                episode.query_inputs,
                support_inputs=episode.support_inputs,
                chunk_size=pl_module.chunk_size,
            )
        self._accuracy.update(logits, episode.query_targets)
        self._interval.update(logits, episode.query_targets)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the test."""
        self._table = self._build(trainer, "test")
        self._network = None
        self._print(trainer)

    def _begin(self) -> None:
        self._tasks, self._protocol, self._note, self._network, self._diverged = 0, None, "", None, False

    def _see(self, module: Any, episode: Episode) -> None:
        self._tasks += episode.tasks
        protocol = Protocol.of(module, episode)
        self._protocol = protocol if self._protocol is None else self._protocol.joined(protocol)

    def _build(self, trainer: Trainer, stage: str) -> Table:
        """The table of a finished evaluation; collective, for all ranks."""
        metrics = {
            name.removeprefix(f"{stage}/"): float(value)
            for name, value in trainer.callback_metrics.items()
            if name.startswith(f"{stage}/")
        }
        counted = torch.tensor([float(self._tasks), float(self._diverged)], device=trainer.strategy.root_device)
        tasks, diverged = torch.as_tensor(trainer.strategy.reduce(counted, reduce_op="sum")).tolist()
        caption = [f"{self._protocol}, {tasks:.0f} tasks"]
        table = Table(title=f"{_TITLES[stage]} results", caption_justify="left")
        if "accuracy" not in metrics:
            table.add_column("network")
            table.add_column("loss", justify="right")
            table.add_row("after adaptation", f"{metrics['loss']:.4g}" if "loss" in metrics else "–")
        else:
            table.add_column("network")
            table.add_column("accuracy (%)", justify="right")
            others = [name for name in metrics if f"{name}_interval95" in metrics and name != "accuracy"]
            for name in others:
                table.add_column(name.replace("_", " "), justify="right")
            for when, suffix in (("after", ""), ("before", "_before")):
                if f"accuracy{suffix}" not in metrics:
                    continue
                accuracy = _percent(metrics[f"accuracy{suffix}"], metrics.get(f"accuracy_interval95{suffix}"))
                values = (_with_interval(metrics, name, suffix) for name in others)
                table.add_row(f"{when} adaptation", accuracy, *values)
            if diverged:
                self._note = "No row for random weights: their adaptation diverged"
            elif self._network is not None:
                baseline = _percent(float(self._accuracy.compute()), float(self._interval.compute()))
                table.add_row("random weights, after adaptation", baseline)
            caption.append("± is the 95 % interval of the mean over tasks")
            caption += [self._note] if self._note else []
        table.caption = ".\n".join(caption) + "."
        return table

    def _print(self, trainer: Trainer) -> None:
        table, self._table = self._table, None
        if table is not None and trainer.is_global_zero:
            Console().print(table)


_TITLES = {"val": "Validation", "test": "Test"}


def _has_class_indices(episode: Episode) -> bool:
    targets = episode.query_targets
    return isinstance(targets, torch.Tensor) and not targets.is_floating_point()


def _with_interval(metrics: dict[str, float], name: str, suffix: str) -> str:
    value, interval = metrics.get(name + suffix), metrics.get(f"{name}_interval95{suffix}")
    # What a module logs by itself, it may log after adaptation only.
    return "–" if value is None or interval is None else f"{value:.4g} ± {interval:.2g}"


def _percent(accuracy: float, interval: float | None) -> str:
    return f"{100 * accuracy:.2f}" + ("" if interval is None else f" ± {100 * interval:.2f}")
