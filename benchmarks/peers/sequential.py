"""iMAML as a plain sequential loop over tasks.

What published implementations do: adapt one task at a time, rebuild the gradient's graph in every Hessian product, read
every step size of conjugate gradient on the host.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from benchmarks.workloads import Settings
from lightning_imaml import Episode


def meta_gradient(model: nn.Module, episode: Episode, settings: Settings) -> dict[str, Tensor]:
    """The implicit meta-gradient, one task after the other, with plain PyTorch."""
    names = [name for name, _ in model.named_parameters()]
    theta = [p.detach() for p in model.parameters()]
    total = [torch.zeros_like(p) for p in theta]

    def loss_at(parameters: list[Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
        outputs = functional_call(model, dict(zip(names, parameters, strict=True)), (inputs,))
        return F.cross_entropy(outputs, targets)

    def dot(a: list[Tensor], b: list[Tensor]) -> float:
        return sum((x * y).sum() for x, y in zip(a, b, strict=True)).item()

    for task in range(episode.tasks):
        support = (episode.support_inputs[task], episode.support_targets[task])
        phi = [p.clone().requires_grad_() for p in theta]
        for _ in range(settings.steps):
            gradient = torch.autograd.grad(loss_at(phi, *support), phi)
            with torch.no_grad():
                for p, g, t in zip(phi, gradient, theta, strict=True):
                    p -= settings.lr * (g + settings.strength * (p - t))
        query = (episode.query_inputs[task], episode.query_targets[task])
        b = list(torch.autograd.grad(loss_at(phi, *query), phi))
        x = [torch.zeros_like(v) for v in b]
        r, p = [v.clone() for v in b], [v.clone() for v in b]
        rr = dot(r, r)
        for _ in range(settings.cg_steps):
            gradient = torch.autograd.grad(loss_at(phi, *support), phi, create_graph=True)
            product = torch.autograd.grad(gradient, phi, p)
            product = [h + settings.strength * v for h, v in zip(product, p, strict=True)]
            curvature = dot(p, product)
            if curvature <= 0:
                break
            alpha = rr / curvature
            x = [a + alpha * v for a, v in zip(x, p, strict=True)]
            r = [a - alpha * v for a, v in zip(r, product, strict=True)]
            rr, previous = dot(r, r), rr
            p = [a + rr / previous * v for a, v in zip(r, p, strict=True)]
        for t, u in zip(total, x, strict=True):
            t += settings.strength * u / episode.tasks
    return dict(zip(names, total, strict=True))
