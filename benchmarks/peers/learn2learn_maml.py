"""MAML by learn2learn."""

from __future__ import annotations

import learn2learn
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.workloads import Settings
from lightning_imaml import Episode


def meta_gradient(model: nn.Module, episode: Episode, settings: Settings) -> dict[str, Tensor]:
    """Back-propagation through all inner steps."""
    maml = learn2learn.algorithms.MAML(model, lr=settings.lr)
    total = [torch.zeros_like(p) for p in model.parameters()]
    for task in range(episode.tasks):
        learner = maml.clone()
        for _ in range(settings.steps):
            learner.adapt(F.cross_entropy(learner(episode.support_inputs[task]), episode.support_targets[task]))
        loss = F.cross_entropy(learner(episode.query_inputs[task]), episode.query_targets[task])
        for t, g in zip(total, torch.autograd.grad(loss, list(model.parameters())), strict=True):
            t += g / episode.tasks
    return dict(zip((name for name, _ in model.named_parameters()), total, strict=True))
