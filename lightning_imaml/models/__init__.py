"""Backbones of the few-shot papers."""

from lightning_imaml.models.conv4 import Conv4, use_batch_statistics

__all__ = ["Conv4", "use_batch_statistics"]
