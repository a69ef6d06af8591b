"""Draw the metrics of a fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from lightning_imaml.components import metric_names as names
from lightning_imaml.diagnostics.curves import draw, drawn_metrics, write_csv
from lightning_imaml.training.schedule import EveryNSteps


class LearningCurve(Callback):
    """Collect the metrics of a fit and draw them: ``learning_curve.png`` and, with the numbers, ``learning_curve.csv``.

    There are panels for the loss, the accuracy before and after adaptation with its 95 % interval, the error of the
    meta-gradient (``MetaGradientErrorMonitor``) and memory (``PeakMemoryMonitor``); a panel appears if its metrics were
    logged. Place the callback after the monitors in the list of callbacks, or it sees their numbers one step late. It
    shows the first of several validation dataloaders. Rank zero writes both files to ``trainer.log_dir`` after every
    validation, at the end of fit and when training fails. A resumed fit continues the curve of its checkpoint.

    Args:
        every_n_steps: how often to take the training metrics, in optimizer steps; None takes the trainer's
            ``log_every_n_steps``. A metric that the module logs less often shows its last value. All numbers of
            monitors and validations are taken.

    Raises:
        ValueError: ``every_n_steps`` is below one.
    """

    def __init__(self, every_n_steps: int | None = None) -> None:
        self.every_n_steps = every_n_steps
        # For None, the start of the fit replaces this interval by the trainer's.
        self._schedule = EveryNSteps(1 if every_n_steps is None else every_n_steps)
        self._points: dict[str, list[tuple[int, float]]] = {}
        self._seen: dict[str, Tensor] = {}
        self._directory: Path | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the folder to write to, and how often to read."""
        # log_dir is a collective operation: every rank must read it, and after an exception some may have stopped.
        self._directory = Path(trainer.log_dir or trainer.default_root_dir)
        if self.every_n_steps is None:
            self._schedule = EveryNSteps(max(1, int(getattr(trainer, "log_every_n_steps", 1))))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take new numbers of monitors and, if due, the training metrics."""
        due = self._schedule.due(trainer.global_step - 1)
        prefixes = (names.META_GRADIENT, names.MEMORY, *((names.TRAINING,) if due else ()))
        self._collect(trainer, prefixes)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the validation metrics and save."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._collect(trainer, (names.VALIDATION,))
            self._save(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save."""
        self._save(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save the points so far."""
        self._save(trainer)

    def state_dict(self) -> dict[str, Any]:
        """The points so far, as plain numbers."""
        return {"points": {name: list(curve) for name, curve in self._points.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the points of a checkpoint."""
        self._points = {name: [(s, v) for s, v in curve] for name, curve in state_dict["points"].items()}

    def _collect(self, trainer: Trainer, prefixes: tuple[str, ...]) -> None:
        if not trainer.is_global_zero:
            return
        logged = trainer.callback_metrics
        metrics = {name.removesuffix(names.of_loader(0)): value for name, value in logged.items()}
        for name in _DRAWN:
            # The Trainer keeps a monitor's last number; a new number is another tensor, even of the same value.
            if name.startswith(prefixes) and name in metrics and metrics[name] is not self._seen.get(name):
                self._seen[name] = metrics[name]
                self._points.setdefault(name, []).append((trainer.global_step, float(metrics[name])))

    def _save(self, trainer: Trainer) -> None:
        if not trainer.is_global_zero or not self._points or self._directory is None:
            return
        self._directory.mkdir(parents=True, exist_ok=True)
        write_csv(self._points, self._directory / "learning_curve.csv")
        draw(self._points).savefig(self._directory / "learning_curve.png", dpi=120)


_DRAWN = drawn_metrics()
