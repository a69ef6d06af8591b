"""Begin a training at the weights of another, such as published ones."""

from __future__ import annotations

from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor


class StartFrom(Callback):
    """Load weights before the first meta-step; a training that goes on from its own checkpoint keeps those.

    Where only the number of ways differs, every class of the new head begins with the mean of the old head's classes.

    Args:
        checkpoint: of the same network, but for its ways; its settings are left out.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Load the weights."""
        if trainer.ckpt_path is None:
            weights = torch.load(self.checkpoint, map_location=pl_module.device, weights_only=True)["state_dict"]
            wanted = pl_module.state_dict()
            fitted = {name: with_ways_of(wanted.get(name, weight), weight) for name, weight in weights.items()}
            pl_module.load_state_dict(fitted)


def with_ways_of(wanted: Tensor, weight: Tensor) -> Tensor:
    """The mean over classes, for each class, where the first dimension alone differs; else the weight as it is."""
    if wanted.shape == weight.shape or wanted.shape[1:] != weight.shape[1:]:
        return weight
    return weight.mean(0, keepdim=True).expand_as(wanted)
