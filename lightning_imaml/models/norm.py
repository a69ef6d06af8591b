"""Normalisation layers, by the protocol that they imply."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import nn

Norm = Literal["batch", "group", "layer", "none"]
"""What a network normalises by.

- ``"batch"``: the statistics of the batch at hand, in training and in evaluation, as in MAML and iMAML. Predictions
  on a query set then depend on all of it: the transductive protocol.
- ``"group"``: groups of at most eight channels of one sample, each sample by itself: the inductive protocol.
- ``"layer"``: all channels of one sample: inductive.
- ``"none"``: nothing: inductive.
"""

NORMS = ("batch", "group", "layer", "none")


def norm_layer(norm: Norm, channels: int, images: bool = True) -> nn.Module:
    """Make a layer for ``channels`` channels.

    Args:
        norm: what to normalise by.
        channels: channels of its input.
        images: whether the input is ``[n, channels, height, width]``, or else ``[n, channels]``.

    Raises:
        ValueError: ``norm`` is none of the four, or the channels cannot be grouped.
    """
    if norm == "batch":
        batch_norm = nn.BatchNorm2d if images else nn.BatchNorm1d
        return batch_norm(channels, track_running_stats=False)
    if norm == "group":
        if channels % 2:
            raise ValueError(
                f"norm='group' needs an even number of channels, for a group of one is constant; found {channels}. "
                "Use an even width, or norm='layer'."
            )
        return nn.GroupNorm(channels // math.gcd(channels, 8), channels)
    if norm == "layer":
        return nn.GroupNorm(1, channels)
    if norm == "none":
        return nn.Identity()
    raise ValueError(f"norm must be one of {', '.join(map(repr, NORMS))}; found {norm!r}. The papers use 'batch'.")


def use_batch_statistics(module: nn.Module) -> nn.Module:
    """Make every BatchNorm layer of ``module`` use the statistics of the batch at hand, always.

    Tasks that adapt side by side must not overwrite one another's running statistics. This removes them, in place; it
    is the papers' protocol.

    Returns:
        The module itself.
    """
    for layer in module.modules():
        if isinstance(layer, torch.nn.modules.batchnorm._BatchNorm):
            layer.track_running_stats = False
            layer.running_mean = layer.running_var = layer.num_batches_tracked = None
    return module
