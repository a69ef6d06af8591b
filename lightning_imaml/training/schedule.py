"""When a monitor is due, and where its numbers go."""

from __future__ import annotations

import torch
from lightning.pytorch import Trainer

from lightning_imaml.components.checks import require_at_least_one
from lightning_imaml.training.meta_steps import row_number


class EveryNSteps:
    """True once in each ``n`` optimizer steps: at the last of them, so at steps n, 2n, … counted from one.

    Lightning's ``log_every_n_steps`` counts the same way, so equal intervals fall on the same step. Steps are those of
    ``trainer.global_step``, so with accumulation over several batches only the first batch of a due step counts.

    Args:
        n: the interval in optimizer steps.

    Raises:
        ValueError: ``n`` is below one.
    """

    def __init__(self, n: int) -> None:
        require_at_least_one("every_n_steps", n, "Remove the callback to switch it off.")
        self.n = n
        self._last: int | None = None

    def due(self, step: int) -> bool:
        """Whether the work is due before the optimizer step that follows ``step`` finished ones."""
        # Several optimizers advance the count by more than one: compare intervals, not remainders. What ran before a
        # resume is not known; an interval that began in the middle is simply waited out.
        interval = (step + 1) // self.n
        last, self._last = self._last, interval
        return interval > (last if last is not None else step // self.n)


def record(trainer: Trainer, metrics: dict[str, float], reduce_op: str) -> None:
    """Send numbers to the loggers and to ``trainer.callback_metrics`` at this very step.

    ``LightningModule.log`` would repeat the number at every later logging step until the next one is measured, and
    drop it where ``log_every_n_steps`` does not fall on the step. Call it on all ranks, with the same names.

    Args:
        trainer: the trainer, during fit.
        metrics: name to number.
        reduce_op: how ranks combine: ``"mean"`` or ``"max"``.
    """
    device = trainer.strategy.root_device
    # float32: MPS has no float64. A memory size in MiB or a relative error needs no more digits.
    values = torch.tensor(list(metrics.values()), dtype=torch.float32, device=device)
    reduced = trainer.strategy.reduce(values, reduce_op=reduce_op)
    numbers = dict(zip(metrics, torch.as_tensor(reduced).tolist(), strict=True))
    trainer.callback_metrics.update({name: torch.tensor(number) for name, number in numbers.items()})
    for logger in trainer.loggers:
        logger.log_metrics(numbers, step=row_number(trainer))
