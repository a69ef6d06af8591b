"""Draw episodes: support images, query images and predictions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from matplotlib.figure import Figure
from torch import Tensor

from lightning_imaml.components import metric_names as names
from lightning_imaml.components.checks import require_at_least_one
from lightning_imaml.diagnostics.interface import require_interface
from lightning_imaml.episodes import Episode
from lightning_imaml.metrics import is_classification


class EpisodeGrid(Callback):
    """Draw the support and query images of the first tasks, with the adapted network's predictions.

    Each class has a row: its support images, then its query images with the predicted class above, green where it is
    right and red where it is wrong. After every validation and test, the picture goes to ``<trainer.log_dir>/
    episodes_<stage>.png`` and to every logger that takes pictures: TensorBoard's has ``add_figure``, W&B's has
    ``log_image``. Rank zero draws its own tasks.

    Args:
        tasks: how many tasks of the first batch to draw.
        queries: the most query images of a class.

    Raises:
        ValueError: ``tasks`` or ``queries`` is below one.
        TypeError: the batch holds no images ``[T, n, 1 or 3, H, W]`` with class indices.
    """

    def __init__(self, tasks: int = 2, queries: int = 5) -> None:
        for name, value in (("tasks", tasks), ("queries", queries)):
            require_at_least_one(name, value, "Remove the callback to switch it off.")
        self.tasks = tasks
        self.queries = queries
        self._folder = Path()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that the module predicts query sets."""
        require_interface(self, pl_module, ("inner_solver", "adapt", "predict_step"))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the folder to write to."""
        # log_dir is a collective operation: every rank must read it, also one without a batch.
        self._folder = Path(trainer.log_dir or trainer.default_root_dir)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the folder to write to."""
        self.on_validation_start(trainer, pl_module)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Draw the first batch."""
        if not trainer.sanity_checking:
            self._record(trainer, pl_module, batch, batch_idx, dataloader_idx, "val")

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Draw the first batch."""
        self._record(trainer, pl_module, batch, batch_idx, dataloader_idx, "test")

    def _record(self, trainer: Trainer, module: Any, batch: Any, batch_idx: int, loader: int, stage: str) -> None:
        if batch_idx or loader or not trainer.is_global_zero:
            return
        episode = Episode.of(batch)
        episode = episode.take(torch.arange(min(self.tasks, episode.tasks), device=module.device))
        with trainer.precision_plugin.val_step_context():
            predictions = module.predict_step(episode, 0)
        _check(episode, predictions)
        figure = draw_episodes(episode, predictions.argmax(dim=-1), self.queries)
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"episodes_{stage}.png"
        figure.savefig(path, dpi=100)
        for logger in trainer.loggers:
            tag = names.of_stage(stage, "episodes")
            if hasattr(logger, "log_image"):
                logger.log_image(tag, [str(path)], step=trainer.global_step)
                continue
            experiment = getattr(logger, "experiment", None)
            if experiment is not None and hasattr(experiment, "add_figure"):
                experiment.add_figure(tag, figure, trainer.global_step)


def _check(episode: Episode, predictions: Any) -> None:
    images = episode.support_inputs
    drawable = isinstance(images, Tensor) and images.ndim == 5 and images.shape[2] in (1, 3)
    if not drawable or not is_classification(predictions, episode.query_targets):
        found = list(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(
            f"EpisodeGrid: inputs must be images [T, n, 1 or 3, height, width] with class indices; found "
            f"{found}. Remove the callback."
        )


def draw_episodes(episode: Episode, predicted: Tensor, queries: int) -> Figure:
    """Draw tasks below one another, with a row for each class.

    Args:
        episode: the tasks.
        predicted: class indices of the query images, ``[T, n]``.
        queries: the most query images of a class.
    """
    ways = int(torch.cat([episode.support_targets, episode.query_targets], dim=1).max()) + 1
    shots = int((episode.support_targets[0] == 0).sum())
    columns = shots + queries
    figure = Figure(figsize=(0.9 * columns + 0.6, 1.05 * ways * episode.tasks + 0.4), layout="constrained")
    cells = figure.subplots(episode.tasks * ways, columns, squeeze=False)
    for cell in cells.flat:
        cell.set_axis_off()
    for task in range(episode.tasks):
        for label in range(ways):
            row = cells[task * ways + label]
            support = episode.support_inputs[task][episode.support_targets[task] == label][:shots]
            for cell, image in zip(row, support, strict=False):
                _show(cell, image, f"class {label}", "black")
            asked = episode.query_targets[task] == label
            answers = predicted[task][asked].tolist()
            for cell, image, answer in zip(row[shots:], episode.query_inputs[task][asked], answers, strict=False):
                _show(cell, image, f"→ {answer}", "green" if answer == label else "red")
    figure.suptitle("support images, then query images with predictions", fontsize="small")
    return figure


def _show(cell: Any, image: Tensor, title: str, colour: str) -> None:
    pixels = image.detach().float().cpu()
    low, high = pixels.min(), pixels.max()
    pixels = (pixels - low) / (high - low).clamp(min=1e-12)
    cell.imshow(pixels.permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1)
    cell.set_title(title, fontsize="x-small", color=colour)
