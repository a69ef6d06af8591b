"""MAML by higher."""

from __future__ import annotations

import higher
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.workloads import Settings
from lightning_imaml import Episode


def meta_gradient(model: nn.Module, episode: Episode, settings: Settings) -> dict[str, Tensor]:
    """Back-propagation through all inner steps."""
    names = [name for name, _ in model.named_parameters()]
    total = [torch.zeros_like(p) for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=settings.lr)
    for task in range(episode.tasks):
        with higher.innerloop_ctx(model, optimizer, copy_initial_weights=False) as (net, steps):
            for _ in range(settings.steps):
                steps.step(F.cross_entropy(net(episode.support_inputs[task]), episode.support_targets[task]))
            loss = F.cross_entropy(net(episode.query_inputs[task]), episode.query_targets[task])
            gradient = torch.autograd.grad(loss, list(net.parameters(time=0)))
        for t, g in zip(total, gradient, strict=True):
            t += g / episode.tasks
    return dict(zip(names, total, strict=True))
