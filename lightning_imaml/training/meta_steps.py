"""Makes the Trainer count meta-steps where it counts batches: validation, rows of the loggers, estimated steps."""

from __future__ import annotations

import math
import sys
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_imaml.training.ranks import open_gathering


def row_number(trainer: Trainer) -> int:
    """The number, from 0, of the meta-step that goes on: that of its row in the loggers.

    Lightning keeps it to itself. It numbers by it what ``log`` is given, which rows of a callback's own must match.
    """
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


def begin_next_epoch(trainer: Trainer) -> bool:
    """Where a checkpoint was saved after an epoch's last batch, begin the next one; call it in ``on_train_start``.

    Lightning 2.6 goes on in the finished epoch: it calls ``on_train_epoch_end`` again, and where that epoch did not end
    with a validation it first takes a batch more, so that all later meta-steps would be of other batches.

    Returns:
        Whether the checkpoint was saved in ``on_train_batch_end`` of that batch, as ``every_n_train_steps`` does it.
        Lightning takes the epoch for finished then, so that neither its last validation nor ``on_train_epoch_end``
        ever comes.
    """
    loop: Any = trainer.fit_loop
    epochs, batches = loop.epoch_progress, loop.epoch_loop.batch_progress
    of_epochs = {epochs.total.ready, epochs.total.started, epochs.total.processed}
    ended = len(of_epochs) == 1 and epochs.total.completed >= epochs.total.processed - 1
    if not loop.epoch_loop.restarting or not batches.is_last_batch or not ended:
        return False
    before_epoch_end: bool = loop.epoch_loop.restarted_on_train_batch_end
    if loop.restarted_on_epoch_end:
        epochs.increment_completed()
    if before_epoch_end:  # Else Lightning would count the batch in the epoch that begins, and leave its first one out.
        batches.increment_completed()
        loop.epoch_loop.reset_restart_stage()
    loop.reset_restart_stage()
    batches.reset_on_run()
    return before_epoch_end


class MetaSteps(Callback):
    """What an :class:`~lightning_imaml.IMAMLModule` brings along where a batch need not be a meta-step.

    In manual optimization the Trainer takes every batch for a step. Where ``accumulate_meta_batches`` batches are one:

    - a whole ``val_check_interval`` counts the meta-steps of an epoch, or with ``check_val_every_n_epoch=None`` those
      of the run (``trainer.global_step``); a fraction is of the epoch's meta-steps, rounded down, at least one. An
      epoch's last meta-step counts, also where it has fewer batches;
    - ``log_every_n_steps`` counts meta-steps, and a row of the loggers has the number of its meta-step, from 0;
    - ``trainer.estimated_stepping_batches``, the length of many schedules, is in meta-steps.

    Validation by the clock, and at the end of an iterable dataset of unknown length, stay as they are.

    Args:
        batches: the batches of a meta-step.

    Attributes:
        group: of all processes, see :func:`~lightning_imaml.training.ranks.gather`. It is kept here since the module
            must stay one that can be copied and pickled.
    """

    def __init__(self, batches: int) -> None:
        self.batches = batches
        self._log_every: int | None = None
        self._steps = 0
        self.group: Any = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Tell the Trainer how many batches a step has, which its own argument must not in manual optimization."""
        if stage != "fit":
            return
        if self.batches == getattr(pl_module, "accumulate_meta_batches", 1):
            trainer.accumulate_grad_batches = self.batches
            self._log_every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        else:  # The Trainer keeps it from an earlier fit of another module. A new list: the hook goes through the old.
            trainer.callbacks = [  # type: ignore[attr-defined]
                callback
                for callback in trainer.callbacks  # type: ignore[attr-defined]
                if callback is not self
            ]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the interval, and go on where a checkpoint was saved.

        Raises:
            ValueError: an epoch has fewer meta-steps than the interval, so that it would never come.
        """
        self.group = open_gathering(trainer)
        of_epoch = trainer.num_training_batches / self.batches
        interval = getattr(trainer, "val_check_interval", None)  # None by the clock.
        within = trainer.check_val_every_n_epoch is not None and trainer.enable_validation
        if within and isinstance(interval, int) and interval > math.ceil(min(of_epoch, sys.maxsize)):
            raise ValueError(
                f"val_check_interval must be at most the meta-steps of an epoch; found {interval} meta-steps of "
                f"{self.batches} batches, and {trainer.num_training_batches} batches an epoch. Lower it, or set "
                "check_val_every_n_epoch=None to count across epochs."
            )
        # ``processed``: a batch that failed halfway is counted as ready and is run again on a resume.
        progress: Any = trainer.fit_loop.epoch_loop.batch_progress
        self._plan_validation(trainer, progress.current.processed, progress.is_last_batch)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Number the coming rows of the loggers by the meta-steps that were taken."""
        self._restore_logging(trainer)
        self._steps = trainer.global_step
        trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Validate now, or not; write a row only of a meta-step that was taken."""
        stepped = trainer.global_step > self._steps
        self._plan_validation(trainer, batch_idx + 1, trainer.is_last_batch, stepped)
        if not stepped:
            trainer.log_every_n_steps = 0  # type: ignore[attr-defined]

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the Trainer back as it was."""
        self._restore(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the Trainer back as it was."""
        self._restore(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the Trainer back as it was, also where there was nothing to train."""
        self._restore(trainer)

    def _restore(self, trainer: Trainer) -> None:
        trainer.accumulate_grad_batches = 1
        self._restore_logging(trainer)

    def _restore_logging(self, trainer: Trainer) -> None:
        if self._log_every is not None:
            trainer.log_every_n_steps = self._log_every  # type: ignore[attr-defined]

    def _plan_validation(self, trainer: Trainer, done: int, last: bool, stepped: bool = True) -> None:
        """Make the Trainer validate after these batches of the epoch or not, by the interval that it compares with."""
        if trainer.val_check_batch is None or trainer.val_check_batch == math.inf:  # By the clock; at an unknown end.
            return
        interval = trainer.val_check_interval
        if not isinstance(interval, int):
            interval = max(1, int(math.ceil(trainer.num_training_batches / self.batches) * interval))
        ends = done % self.batches == 0 or last
        if trainer.check_val_every_n_epoch is None:
            due = ends and stepped and trainer.global_step % interval == 0
        else:
            due = ends and math.ceil(done / self.batches) % interval == 0
        trainer.val_check_batch = 1 if due else sys.maxsize


def gathering_group(trainer: Trainer) -> Any:
    """The group of all processes that :class:`MetaSteps` opened; None without it, as in a search of the Tuner."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return next((callback.group for callback in callbacks if isinstance(callback, MetaSteps)), None)
