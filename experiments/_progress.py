"""Accuracy on the validation tasks against meta-steps and minutes, over all calls that a training takes."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.trainer.states import TrainerFn


def minutes(trainer: Trainer) -> float:
    """The minutes of training so far, validation and earlier calls included; ``max_time`` must be set."""
    timer = next(callback for callback in trainer.callbacks if isinstance(callback, Timer))
    return timer.time_elapsed() / 60


class Progress(Callback):
    """Note every validation of a fit; a resumed fit goes on from the points of its checkpoint.

    Attributes:
        points: rows of "meta_steps", "minutes", "accuracy" and "interval95" (per cent).
        devices: the names of what was trained on: "cpu", or that of a GPU.
    """

    def __init__(self) -> None:
        self.points: list[dict[str, float]] = []
        self.devices: list[str] = []

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the accuracy."""
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        device = pl_module.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        if name not in self.devices:
            self.devices.append(name)
        metrics = trainer.callback_metrics
        self.points.append(
            {
                "meta_steps": trainer.global_step,
                "minutes": minutes(trainer),
                "accuracy": 100 * float(metrics["val/accuracy"]),
                "interval95": 100 * float(metrics["val/accuracy_interval95"]),
            }
        )

    def state_dict(self) -> dict[str, Any]:
        """The points and the devices, as plain numbers and text."""
        return {"points": self.points, "devices": self.devices}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the points of a checkpoint."""
        self.points = list(state_dict["points"])
        # Older checkpoints, all of a CPU, do not say.
        self.devices = list(state_dict.get("devices", ["cpu"]))
