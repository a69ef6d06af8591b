"""Draw how test accuracy depends on the number of inner steps."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from matplotlib.figure import Figure
from torch import Tensor
from torchmetrics import MetricCollection

from lightning_imaml import functional
from lightning_imaml.components import metric_names as names
from lightning_imaml.components.checks import require
from lightning_imaml.diagnostics.interface import evaluation_solver, require_interface
from lightning_imaml.episodes import Episode
from lightning_imaml.metrics import TaskMean, accuracy_of_tasks, ignore_index_of, is_classification


class AdaptationCurve(Callback):
    """Adapt every test task with several numbers of inner steps, also more than in training, and draw the results.

    Rank zero writes two files to ``trainer.log_dir``, over the tasks of all ranks: ``adaptation_curve.png``, and
    ``adaptation_curve.csv`` with the columns ``inner_steps``, ``accuracy`` (``loss`` where the targets are not classes)
    and ``interval95``, half the width of the mean's 95 % interval. The means are logged as
    ``test/accuracy_at_<n>_steps``. Where a task diverges with that many steps, the mean is NaN.

    The test takes as many more inner steps as the sum of these numbers.

    Args:
        steps: the numbers of inner steps, with 0 for the network before adaptation. None takes 0, 1, 2, 4, … up to four
            times the inner solver's number.

    Raises:
        ValueError: ``steps`` is empty or holds a negative number; in use, the test has several dataloaders.
        TypeError: in ``setup``, the inner solver has no field ``steps``.
    """

    def __init__(self, steps: list[int] | None = None) -> None:
        valid = steps is None or (len(steps) > 0 and min(steps) >= 0)
        require(valid, self, "steps", "numbers of inner steps, 0 or more", steps, "Leave it out for 0, 1, 2, 4, ….")
        self.steps = steps
        self._points: dict[int, MetricCollection] = {}
        self._quantity = "accuracy"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that the module can adapt with another number of steps."""
        require_interface(self, pl_module, ("inner_solver", "eval_inner_solver", "adapt", "outer_loss"))
        solver = evaluation_solver(pl_module)
        if "steps" not in getattr(solver, "__dataclass_fields__", {}):
            raise TypeError(
                f"AdaptationCurve: the inner solver of evaluation must be a dataclass with a field 'steps'; found "
                f"{type(solver).__name__}. Use a solver of lightning_imaml.inner, or remove the callback."
            )

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a curve."""
        loaders = len(trainer.num_test_batches)
        requirement = "1, since there is one curve"
        require(loaders <= 1, self, "the number of dataloaders", requirement, loaders, "Test them one after the other.")
        solver_steps: int = evaluation_solver(pl_module).steps
        powers = [2**k for k in range(16) if 2**k <= 4 * solver_steps]
        numbers = {0, solver_steps, *powers} if self.steps is None else set(self.steps)
        point = MetricCollection({"mean": TaskMean(), "interval95": TaskMean(interval95=True)}).to(pl_module.device)
        self._points = {steps: point.clone() for steps in sorted(numbers)}

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Adapt the batch's tasks with every number of steps."""
        episode = Episode.of(batch)
        with trainer.precision_plugin.test_step_context():
            for steps, point in self._points.items():
                point.update(self._measure(pl_module, episode, steps))

    def _measure(self, module: Any, episode: Episode, steps: int) -> Tensor:
        """The accuracy or the loss of every task, ``[T]``."""
        if steps:
            solver = dataclasses.replace(evaluation_solver(module), steps=steps)
            try:
                adapted = module.adapt(episode.support_inputs, episode.support_targets, inner_solver=solver)
            except FloatingPointError:
                return torch.full((episode.tasks,), torch.nan, device=module.device)
            parameters = adapted.parameters
        else:
            trainable = ((name, p.detach()) for name, p in module.backbone.named_parameters() if p.requires_grad)
            parameters = {name: p.expand(episode.tasks, *p.shape) for name, p in trainable}
        losses, outputs = functional.evaluate(
            module.backbone,
            parameters,
            episode.query_inputs,
            episode.query_targets,
            loss=module.outer_loss,
            support_inputs=episode.support_inputs,
            chunk_size=module.chunk_size,
        )
        if not is_classification(outputs, episode.query_targets):
            self._quantity = "loss"
            return losses
        return accuracy_of_tasks(outputs, episode.query_targets, ignore_index_of(module))

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log, and write both files."""
        computed = ((steps, point.compute()) for steps, point in self._points.items())
        points = [(steps, found["mean"].item(), found["interval95"].item()) for steps, found in computed]
        for steps, mean, _ in points:
            pl_module.log(names.at_steps("test", self._quantity, steps), mean)
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # Every rank must read log_dir: it is collective.
        if not trainer.is_global_zero:
            return
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "adaptation_curve.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("inner_steps", self._quantity, "interval95"))
            writer.writerows(points)
        trained: int = pl_module.inner_solver.steps  # type: ignore[union-attr,assignment]
        draw_curve(points, self._quantity, trained).savefig(folder / "adaptation_curve.png", dpi=120)


def draw_curve(points: list[Any], quantity: str, trained: int) -> Figure:
    """Draw (inner steps, mean, half-width) points; a dotted line marks the number of steps in training."""
    steps, means, widths = zip(*points, strict=True)
    figure = Figure(figsize=(5.0, 3.4), layout="constrained")
    axes = figure.add_subplot()
    axes.errorbar(steps, means, yerr=widths, marker="o", markersize=3, capsize=2)
    axes.axvline(trained, linestyle=":", color="grey", label=f"in training: {trained}")
    axes.set_xscale("symlog", linthresh=1)
    axes.set_xticks(steps, labels=[str(s) for s in steps], minor=False)
    axes.set(title="Query sets of the test tasks (95 %)", xlabel="inner steps", ylabel=quantity)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return figure
