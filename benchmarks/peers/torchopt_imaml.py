"""iMAML by TorchOpt's implicit module, as in its own example."""

from __future__ import annotations

import torch
import torchopt
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.workloads import Settings
from lightning_imaml import Episode


def meta_gradient(model: nn.Module, episode: Episode, settings: Settings) -> dict[str, Tensor]:
    """The implicit meta-gradient; its conjugate gradient does not stop at negative curvature."""
    solve = torchopt.linear_solve.solve_cg(maxiter=settings.cg_steps, rtol=0.0, atol=0.0)

    class Inner(torchopt.nn.ImplicitMetaGradientModule, linear_solve=solve):
        def __init__(self, meta: nn.Module) -> None:
            super().__init__()
            self.meta = meta
            self.net = torchopt.module_clone(meta, by="deepcopy", detach_buffers=True)

        def objective(self, inputs: Tensor, targets: Tensor) -> Tensor:
            loss = F.cross_entropy(self.net(inputs), targets)
            pull = sum((p - m).square().sum() for p, m in zip(self.parameters(), self.meta_parameters(), strict=True))
            return loss + settings.strength / 2 * pull

        def solve(self, inputs: Tensor, targets: Tensor) -> None:
            parameters = tuple(self.parameters())
            optimizer = torch.optim.SGD(parameters, lr=settings.lr)
            with torch.enable_grad():
                for _ in range(settings.steps):
                    optimizer.zero_grad()
                    self.objective(inputs, targets).backward(inputs=parameters)
                    optimizer.step()

    for parameter in model.parameters():
        parameter.grad = None
    for task in range(episode.tasks):
        inner = Inner(model)
        inner.solve(episode.support_inputs[task], episode.support_targets[task])
        loss = F.cross_entropy(inner.net(episode.query_inputs[task]), episode.query_targets[task])
        (loss / episode.tasks).backward()
    found = {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}
    for parameter in model.parameters():
        parameter.grad = None
    return found
