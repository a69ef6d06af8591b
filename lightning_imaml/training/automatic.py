"""What belongs to Lightning's automatic optimization, and what stands in its place here."""

from __future__ import annotations

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau


def refuse_automatic(trainer: Trainer) -> None:
    """Refuse what the Trainer does in automatic optimization only, with the argument that does it here.

    Raises:
        MisconfigurationException: the Trainer is to clip or to accumulate gradients.
    """
    own = "the module does this itself, by manual optimization"
    if trainer.gradient_clip_val:
        raise MisconfigurationException(
            f"gradient_clip_val must not be the Trainer's, since {own}; found {trainer.gradient_clip_val}. Pass "
            f"gradient_clip_val={trainer.gradient_clip_val} to the IMAMLModule instead."
        )
    if trainer.accumulate_grad_batches != 1:
        raise MisconfigurationException(
            f"accumulate_grad_batches must be 1, since {own}; found {trainer.accumulate_grad_batches}. Pass "
            f"accumulate_meta_batches={trainer.accumulate_grad_batches} to the IMAMLModule instead."
        )
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    if any(isinstance(callback, GradientAccumulationScheduler) for callback in callbacks):
        raise MisconfigurationException(
            f"GradientAccumulationScheduler must not be among the callbacks, since {own}; found one. Remove it, and "
            "pass accumulate_meta_batches=... to the IMAMLModule: one number for all epochs."
        )


def require_known_schedulers(module: LightningModule) -> None:
    """Raise a TypeError for schedulers that are not PyTorch's, unless ``lr_scheduler_step`` says how they step."""
    if type(module).lr_scheduler_step is not LightningModule.lr_scheduler_step:
        return
    for config in module.trainer.lr_scheduler_configs:
        scheduler: object = config.scheduler
        if not isinstance(scheduler, (LRScheduler, ReduceLROnPlateau)):
            kind = type(scheduler)
            raise TypeError(
                f"a scheduler must be one of torch.optim.lr_scheduler; found {kind.__module__}.{kind.__qualname__}. "
                "Override lr_scheduler_step(self, scheduler, metric) to say how it steps."
            )
