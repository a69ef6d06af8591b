"""Begin a training at the weights of another, such as published ones."""

from __future__ import annotations

from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class StartFrom(Callback):
    """Load weights before the first meta-step; a training that goes on from its own checkpoint keeps those.

    Args:
        checkpoint: of the same network; its settings are left out.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Load the weights."""
        if trainer.ckpt_path is None:
            weights = torch.load(self.checkpoint, map_location=pl_module.device, weights_only=True)["state_dict"]
            pl_module.load_state_dict(weights)
