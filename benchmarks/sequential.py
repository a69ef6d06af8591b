"""One meta-step of Omniglot's Conv4-64 against a plain sequential loop over tasks.

The loop is what published implementations do: adapt one task at a time, rebuild the gradient's graph in every Hessian
product, read every step size of conjugate gradient on the host. Both sides take the same steps on the same tasks, and
their meta-gradients are compared, so that nobody is fast by being wrong.

    python -m benchmarks.sequential --root PATH   # without --root: random images of Omniglot's size
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from lightning_imaml import Episode
from lightning_imaml.data import OmniglotDataModule
from lightning_imaml.functional import meta_gradient
from lightning_imaml.inner import GradientDescent
from lightning_imaml.linear import ConjugateGradient
from lightning_imaml.meta_gradients import Implicit
from lightning_imaml.models import Conv4
from lightning_imaml.regularizers import Proximal


def sequential(
    model: nn.Module, episode: Episode, lr: float, steps: int, cg_steps: int, strength: float
) -> dict[str, Tensor]:
    """The iMAML meta-gradient, one task after the other, with plain PyTorch."""
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
        for _ in range(steps):
            gradient = torch.autograd.grad(loss_at(phi, *support), phi)
            with torch.no_grad():
                for p, g, t in zip(phi, gradient, theta, strict=True):
                    p -= lr * (g + strength * (p - t))
        query = (episode.query_inputs[task], episode.query_targets[task])
        b = list(torch.autograd.grad(loss_at(phi, *query), phi))
        x = [torch.zeros_like(v) for v in b]
        r, p = [v.clone() for v in b], [v.clone() for v in b]
        rr = dot(r, r)
        for _ in range(cg_steps):
            gradient = torch.autograd.grad(loss_at(phi, *support), phi, create_graph=True)
            product = torch.autograd.grad(gradient, phi, p)
            product = [h + strength * v for h, v in zip(product, p, strict=True)]
            curvature = dot(p, product)
            if curvature <= 0:
                break
            alpha = rr / curvature
            x = [a + alpha * v for a, v in zip(x, p, strict=True)]
            r = [a - alpha * v for a, v in zip(r, product, strict=True)]
            rr, previous = dot(r, r), rr
            p = [a + rr / previous * v for a, v in zip(r, p, strict=True)]
        for t, u in zip(total, x, strict=True):
            t += strength * u / episode.tasks
    return dict(zip(names, total, strict=True))


def omniglot_episode(root: Path | None, tasks: int, ways: int, shots: int, queries: int) -> Episode:
    """Real training tasks, or random images where there is no data."""
    if root is None:
        targets = torch.arange(ways)
        support, query = targets.repeat_interleave(shots), targets.repeat_interleave(queries)
        return Episode(
            torch.rand(tasks, ways * shots, 1, 28, 28),
            support.expand(tasks, -1).contiguous(),
            torch.rand(tasks, ways * queries, 1, 28, 28),
            query.expand(tasks, -1).contiguous(),
        )
    data = OmniglotDataModule(root, ways=ways, shots=shots, queries=queries, tasks_per_batch=tasks)
    data.setup("fit")
    return next(iter(data.train_dataloader()))


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, help="the folder of the Omniglot archives")
    parser.add_argument("--tasks", type=int, default=16)
    parser.add_argument("--queries", type=int, default=1, help="query images a class")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    lr, steps, cg_steps, strength = 0.1, 16, 5, 2.0
    model = Conv4(5)
    episode = omniglot_episode(arguments.root, arguments.tasks, 5, 1, arguments.queries)
    estimator = Implicit(ConjugateGradient(cg_steps))
    settings = {"inner_solver": GradientDescent(lr, steps), "regularizer": Proximal(strength), "estimator": estimator}

    def by_loop(model: nn.Module, episode: Episode) -> dict[str, Tensor]:
        return sequential(model, episode, lr, steps, cg_steps, strength)

    def by_package(model: nn.Module, episode: Episode) -> dict[str, Tensor]:
        return meta_gradient(model, episode, **settings).grads

    def compiled(model: nn.Module, episode: Episode) -> dict[str, Tensor]:
        return meta_gradient(model, episode, compile=True, **settings).grads

    sides = {"sequential loop": by_loop, "lightning_imaml": by_package, "the same, compiled": compiled}
    differences: dict[str, list[float]] = {name: [] for name in list(sides)[1:]}
    # In float64 the two must agree; in float32 the inner loop and conjugate gradient amplify rounding.
    for dtype in (torch.float64, torch.float32):
        model = model.to(dtype)
        episode = Episode(*[part.to(dtype) if part.is_floating_point() else part for part in episode])
        loop, *others = (torch.cat([g.flatten() for g in side(model, episode).values()]) for side in sides.values())
        for name, other in zip(differences, others, strict=True):
            differences[name].append(((other - loop).norm() / loop.norm()).item())
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(arguments.repeats):
        for name, side in sides.items():
            start = time.perf_counter()
            side(model, episode)
            times[name].append(time.perf_counter() - start)
    data = "real Omniglot" if arguments.root else "random images"
    print(f"{data}, 5-way 1-shot, {arguments.queries} queries a class, {arguments.tasks} tasks, Conv4-64, float32")
    print(f"{steps} GD steps, {cg_steps} CG steps; {torch.get_num_threads()} threads, torch {torch.__version__}")
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, median in medians.items():
        print(f"{name:>20}: {1e3 * median / arguments.tasks:7.1f} ms a task")
    for name, (double, single) in differences.items():
        ratio = medians["sequential loop"] / medians[name]
        print(f"{name:>20}: {ratio:.2f} times as fast; differs by {double:.1e} in float64, {single:.1e} in float32")


if __name__ == "__main__":
    main()
