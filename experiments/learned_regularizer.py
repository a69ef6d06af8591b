r"""A family of tasks whose best λ is known, weight by weight: does learning find it?

Hierarchical linear regression: a task has weights w ~ N(θ₀, diag(τ²)) and n support points y = xᵀw + σε, with x and ε
standard normal. The best predictor from the support set is the posterior mean of w, the minimiser of

    1/n ‖y − Xφ‖² + Σ_j λ_j/2 (φ_j − θ₀_j)²,    λ_j = 2σ² / (n τ_j²).

So the proximal inner problem with this λ, one for each weight, and θ = θ₀ has the least expected query loss of all: it
is what a learned ``Proximal(per="parameter")`` must find, from meta-gradients alone. A single λ cannot be as good. The
best single λ is found apart, by a search over the closed form on as many tasks as are tested on.

    python experiments/learned_regularizer.py
"""

from __future__ import annotations

import argparse
import functools
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from _tables import Row, save
from lightning.pytorch import Callback, LightningModule, Trainer
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from lightning_imaml import Episode, IMAMLModule
from lightning_imaml.inner import HessianFree
from lightning_imaml.linear import Direct
from lightning_imaml.meta_gradients import Implicit
from lightning_imaml.regularizers import Proximal

SPLITS = ("train", "search", "test")


@dataclass(frozen=True)
class Family(Dataset[Episode]):
    """Batches of tasks; batch b is a function of (seed, split, b) alone.

    Attributes:
        best: λ, ``[D]``, from which τ follows.
        shots: support points n of a task.
        queries: query points of a task.
        tasks: tasks a batch.
        batches: the number of batches.
        noise: σ.
        split: "train", "search" or "test".
        seed: the seed of the tasks.
    """

    best: Tensor
    shots: int
    queries: int
    tasks: int
    batches: int
    noise: float
    split: str
    seed: int

    def __len__(self) -> int:
        return self.batches

    def __getitem__(self, batch: int) -> Episode:
        """Inputs ``[T, n, D]`` and targets ``[T, n, 1]``; θ₀ is 1 everywhere."""
        generator = torch.Generator().manual_seed((self.seed * len(SPLITS) + SPLITS.index(self.split)) * 2**32 + batch)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        size = len(self.best)
        spread = (2 * self.noise**2 / (self.shots * self.best)).sqrt()
        weights = 1 + spread.unsqueeze(1) * normal(self.tasks, size, 1)
        x = normal(self.tasks, self.shots + self.queries, size)
        y = x @ weights + self.noise * normal(self.tasks, self.shots + self.queries, 1)
        return Episode(x[:, : self.shots], y[:, : self.shots], x[:, self.shots :], y[:, self.shots :])


def losses(episode: Episode, theta: Tensor, strengths: Tensor) -> Tensor:
    """The query loss of every task at the exact solution for θ and λ, ``[D]`` each: ``[T]``; by a dense solve."""
    x, y, xq, yq = episode
    matrix = 2 / x.shape[1] * x.mT @ x + torch.diag(strengths)
    rhs = 2 / x.shape[1] * x.mT @ y + (strengths * theta).unsqueeze(1)
    return (xq @ torch.linalg.solve(matrix, rhs) - yq).square().mean(dim=(1, 2))


def best_scalar(episode: Episode) -> float:
    """The single λ with the least mean loss for θ₀, by golden-section search over its logarithm."""
    theta = torch.ones(episode.support_inputs.shape[2], dtype=torch.float64)

    def mean(logarithm: float) -> float:
        return float(losses(episode, theta, torch.full_like(theta, math.exp(logarithm))).mean())

    low, high, ratio = math.log(1e-3), math.log(1e3), (math.sqrt(5) - 1) / 2
    while high - low > 1e-4:
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, right) if mean(left) < mean(right) else (left, high)
    return math.exp((low + high) / 2)


class Trace(Callback):
    """Keep λ after every meta-step."""

    def __init__(self) -> None:
        self.strengths: list[Tensor] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """Keep λ."""
        self.strengths.append(pl_module.strengths["log_strength"].detach().exp().clone())  # type: ignore[operator,index]


def learn(family: Family, regularizer: Proximal, lr: float) -> tuple[Tensor, Tensor]:
    """Meta-train.

    Returns:
        θ, ``[D]``, and λ after every meta-step, ``[steps, ...]``.
    """
    size = len(family.best)
    model = nn.Linear(size, 1, bias=False, dtype=torch.float64)
    nn.init.zeros_(model.weight)
    module = IMAMLModule(
        model,
        loss=F.mse_loss,
        inner_solver=HessianFree(steps=1, cg_steps=size),  # Newton's method: one step solves a quadratic.
        estimator=Implicit(Direct()),
        regularizer=regularizer,
        optimizer=functools.partial(torch.optim.Adam, lr=lr),
        lr_scheduler=functools.partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=len(family)),
    )
    trace = Trace()
    # On so small a network a CPU is fastest.
    trainer = Trainer(
        accelerator="cpu", devices=1, max_epochs=1, logger=False, callbacks=[trace], log_every_n_steps=len(family),
        enable_checkpointing=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(family, batch_size=None))
    return model.weight.detach()[0], torch.stack(trace.strengths)


def draw(best: Tensor, trace: Tensor, rows: list[Row], noise: float) -> Figure:
    """λ over training beside the best, and the test loss of each λ."""
    figure = Figure(figsize=(12, 4), layout="constrained")
    axes, bars = figure.subplots(1, 2, width_ratios=(3, 2))
    for j, value in enumerate(best):
        axes.semilogy(range(1, len(trace) + 1), trace[:, j], color=f"C{j % 10}")
        axes.axhline(float(value), color=f"C{j % 10}", linestyle=":", linewidth=1)
    axes.set(title="λ of each weight (dotted: the best, in closed form)", xlabel="meta-steps", ylabel="λ")
    means = [float(row["test_mse"]) - noise**2 for row in rows]
    widths = [float(row["interval95"]) for row in rows]
    bars.bar([str(row["regularizer"]).replace(" ", "\n") for row in rows], means, yerr=widths, capsize=3)
    bars.set(title="Test MSE above the noise (95 %)")
    return figure


def main(args: list[str] | None = None) -> tuple[list[Row], list[Row]]:
    """Learn, compare on new tasks, print and save.

    Returns:
        The test losses, and λ weight by weight.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=int, default=6)
    parser.add_argument("--lowest", type=float, default=0.2, help="the smallest best λ; they are log-spaced")
    parser.add_argument("--highest", type=float, default=5.0, help="the largest best λ")
    parser.add_argument("--noise", type=float, default=1.0, help="σ")
    parser.add_argument("--shots", type=int, default=10, help="support points of a task")
    parser.add_argument("--queries", type=int, default=20, help="query points of a task")
    parser.add_argument("--tasks", type=int, default=512, help="tasks a meta-step")
    parser.add_argument("--meta-steps", type=int, default=600)
    parser.add_argument("--meta-lr", type=float, default=0.05, help="of Adam, falling to 0 by half a cosine")
    parser.add_argument("--test-tasks", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("results"))
    options = parser.parse_args(args)

    best = torch.logspace(math.log10(options.lowest), math.log10(options.highest), options.features).double()
    sizes = {"shots": options.shots, "queries": options.queries, "noise": options.noise, "seed": options.seed}
    training = Family(best, tasks=options.tasks, batches=options.meta_steps, split="train", **sizes)
    search, test = (
        Family(best, tasks=options.test_tasks, batches=1, split=split, **sizes)[0] for split in ("search", "test")
    )
    theta, trace = learn(training, Proximal(1.0, learned=True, per="parameter"), options.meta_lr)
    scalar_theta, scalar_trace = learn(training, Proximal(1.0, learned=True), options.meta_lr)
    scalar = best_scalar(search)
    ones = torch.ones_like(best)
    judged = {
        "fixed scalar": losses(test, ones, ones),
        "best scalar": losses(test, ones, scalar * ones),
        "learned scalar": losses(test, scalar_theta, scalar_trace[-1] * ones),
        "learned diagonal": losses(test, theta, trace[-1]),
        "best diagonal": losses(test, ones, best),
    }
    width = 1.96 / math.sqrt(options.test_tasks)
    rows: list[Row] = []
    for name, values in judged.items():
        gain = judged["best scalar"] - values
        rows.append(
            {
                "regularizer": name, "test_mse": values.mean().item(), "interval95": width * values.std().item(),
                "below_best_scalar": gain.mean().item(), "below_interval95": width * gain.std().item(),
            }
        )  # fmt: skip
    found: list[Row] = [
        {"weight": j, "best": float(one), "learned": float(other), "relative_error": float(other / one - 1)}
        for j, (one, other) in enumerate(zip(best, trace[-1], strict=True))
    ]
    save(rows, options.output / "learned_regularizer_test.csv")
    save(found, options.output / "learned_regularizer.csv")
    draw(best, trace, rows, options.noise).savefig(options.output / "learned_regularizer.png", dpi=120)
    print(f"\nbest single λ {scalar:.3f}, learned single λ {float(scalar_trace[-1]):.3f}\n")
    print(f"{'weight':>6}{'best λ':>10}{'learned λ':>11}{'error':>8}")
    for row in found:
        print(f"{row['weight']:>6}{row['best']:>10.3f}{row['learned']:>11.3f}{row['relative_error']:>8.1%}")
    print(f"\n{'λ':<18}{'test MSE':>19}{'below the best scalar by':>28}")
    for row in rows:
        print(
            f"{row['regularizer']:<18}{row['test_mse']:>10.4f} ± {row['interval95']:.4f}"
            f"{row['below_best_scalar']:>19.4f} ± {row['below_interval95']:.4f}"
        )
    return rows, found


if __name__ == "__main__":
    main()
