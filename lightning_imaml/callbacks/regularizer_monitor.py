"""Log the learned strengths and step sizes."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_imaml.components import metric_names as names
from lightning_imaml.diagnostics.interface import require_interface
from lightning_imaml.inner import StepSizes
from lightning_imaml.parameters.layout import Layout
from lightning_imaml.problems.network import FlatModel
from lightning_imaml.regularizers import MatrixProximal
from lightning_imaml.training.meta_steps import row_number
from lightning_imaml.training.schedule import EveryNSteps, record


class RegularizerMonitor(Callback):
    """Log the strengths of the regulariser and the step sizes of the inner solver, layer by layer.

    The monitor logs in a due step, before the step changes the values:

    - ``regularizer/strength``: the mean of λ over all adapted parameters; for a matrix, the mean of its diagonal. Where
      the values differ, ``regularizer/strength/<layer>`` is the mean of each layer. A regulariser of your own logs the
      means of its learned strengths, ``regularizer/<name>``.
    - ``inner_solver/lr`` and ``inner_solver/lr/<layer>``: the means of the step sizes, where they are learned.
    - a histogram of each layer whose own values differ, with a logger that has histograms (TensorBoard's).

    Args:
        every_n_steps: how often, in optimizer steps.

    Raises:
        ValueError: ``every_n_steps`` is below one.
        TypeError: in ``setup``, the module has no regulariser.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        self.every_n_steps = every_n_steps
        self._schedule = EveryNSteps(every_n_steps)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that the module has the settings to log."""
        require_interface(self, pl_module, ("regularizer", "strengths", "inner_solver", "rates", "adapt_only"))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Log, if due."""
        if not self._schedule.due(trainer.global_step):
            return
        means: dict[str, float] = {}
        histograms: dict[str, Tensor] = {}
        with torch.no_grad():
            for name, values, layout in _values(pl_module):
                means[name] = float(values.mean())
                if layout is None or not _differ(values):
                    continue
                for layer, own in _by_layer(values, layout).items():
                    means[f"{name}/{layer}"] = float(own.mean())
                    if _differ(own):
                        histograms[f"{name}/{layer}"] = own
        if not means:
            return
        record(trainer, means, reduce_op="mean")
        if trainer.is_global_zero:
            step = row_number(trainer)
            for logger in trainer.loggers:
                add = getattr(getattr(logger, "experiment", None), "add_histogram", None)
                if add is not None:
                    for name, values in histograms.items():
                        add(name, values.float().cpu(), step)


def _values(module: Any) -> list[tuple[str, Tensor, Layout | None]]:
    """The values to log, with their names: ``[D]`` with a layout, or of any shape with None."""
    flat = FlatModel(module.backbone, adapt_only=module.adapt_only)
    row = flat.initial().unsqueeze(0)
    found: list[tuple[str, Tensor, Layout | None]] = []
    regularizer = module.regularizer.for_layout(flat.layout)
    if isinstance(regularizer, MatrixProximal):
        found.append((names.STRENGTH, regularizer.diagonal(row, module.strengths), flat.layout))
    else:
        found += [(names.REGULARIZER + name, value, None) for name, value in module.strengths.items()]
    if isinstance(module.inner_solver, StepSizes) and module.inner_solver.learned:
        sizes = torch.ones_like(row[0]) * module.inner_solver.step_sizes(flat, module.rates, row)
        found.append((names.STEP_SIZE, sizes, flat.layout))
    return found


def _differ(values: Tensor) -> bool:
    return bool((values != values[0]).any())


def _by_layer(values: Tensor, layout: Layout) -> dict[str, Tensor]:
    parts: dict[str, list[Tensor]] = {}
    for name, part in layout.unflatten(values).items():
        parts.setdefault(name.rpartition(".")[0] or name, []).append(part.flatten())
    return {layer: torch.cat(own) for layer, own in parts.items()}
