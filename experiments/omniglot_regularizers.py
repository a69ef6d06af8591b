"""Omniglot 5-way 1-shot with λ fixed and learned: for the model, for each layer, for each weight.

All variants take the same meta-steps on the same tasks from the same weights, with the network, the solvers and the
rates of ``configs/omniglot_5way_1shot_imaml_gd.yaml``. The weights after the last step are judged on the same test
tasks, so that the difference to the fixed λ is one task by task. What is done is kept in the output folder: a second
call with the same options goes on from there.

    python experiments/omniglot_regularizers.py --root PATH --minutes 30    # for each variant and seed
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from _tables import Row, save
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from matplotlib.figure import Figure
from torch import Tensor

from lightning_imaml import IMAMLModule
from lightning_imaml.curvature import GaussNewton
from lightning_imaml.data import OmniglotDataModule
from lightning_imaml.inner import GradientDescent
from lightning_imaml.linear import ConjugateGradient
from lightning_imaml.meta_gradients import Implicit
from lightning_imaml.models import Conv4
from lightning_imaml.problems.network import FlatModel
from lightning_imaml.regularizers import Proximal

FIXED = "scalar, fixed"
VARIANTS: dict[str, dict[str, Any]] = {
    FIXED: {},
    "scalar, learned": {"learned": True},
    "per layer": {"learned": True, "per": "layer"},
    "per weight": {"learned": True, "per": "parameter"},
}
_TRIAL = 20


class Clock(Callback):
    """Time every training step after the first."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """Note the time."""
        self.ends.append(time.perf_counter())

    def seconds(self) -> float:
        """The median time of a step."""
        return statistics.median(b - a for a, b in zip(self.ends, self.ends[1:], strict=False))


def module_of(variant: str, options: argparse.Namespace, steps: int) -> IMAMLModule:
    """The module of a variant, with the weights of its seed."""
    settings = VARIANTS[variant]
    bounds = {"bounds": tuple(options.bounds)} if settings else {}
    return IMAMLModule(
        Conv4(5, filters=options.filters),
        inner_solver=GradientDescent(lr=0.2, steps=5),
        estimator=Implicit(ConjugateGradient(max_iter=5), GaussNewton()),
        regularizer=Proximal(options.strength, **settings, **bounds),
        regularizer_lr=options.regularizer_lr,
        optimizer=functools.partial(torch.optim.Adam, lr=options.meta_lr),
        lr_scheduler=functools.partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=steps),
        compile=options.compile,
    )


def data_of(options: argparse.Namespace, seed: int, steps: int) -> OmniglotDataModule:
    """The tasks of a seed, one epoch of all meta-steps."""
    return OmniglotDataModule(
        options.root, ways=5, shots=1, queries=2, eval_queries=5, tasks_per_batch=options.tasks,
        batches_per_epoch=steps, test_tasks=options.test_tasks, seed=seed,
    )  # fmt: skip


def train(
    variant: str, options: argparse.Namespace, seed: int, steps: int, folder: Path | None = None
) -> tuple[IMAMLModule, float]:
    """Train a variant; with a folder, keep checkpoints there and go on from the last one.

    Returns:
        The module and the median seconds of a meta-step.
    """
    seed_everything(seed, verbose=False)
    module, data, clock = module_of(variant, options, steps), data_of(options, seed, steps), Clock()
    callbacks: list[Callback] = [clock]
    if folder is not None:
        callbacks.append(ModelCheckpoint(folder, save_last=True, save_top_k=0, every_n_train_steps=options.save_every))
    trainer = Trainer(
        max_steps=steps, devices=1, logger=False, callbacks=callbacks, enable_model_summary=False, limit_val_batches=0,
        enable_checkpointing=folder is not None, log_every_n_steps=50,
    )  # fmt: skip
    last = None if folder is None else folder / "last.ckpt"
    trainer.fit(module, datamodule=data, ckpt_path=str(last) if last is not None and last.is_file() else None)
    return module, clock.seconds() if len(clock.ends) > 1 else math.nan


def accuracies(module: IMAMLModule, data: OmniglotDataModule) -> Tensor:
    """The accuracy of every test task: ``[T]``."""
    trainer = Trainer(devices=1, logger=False, enable_model_summary=False, enable_checkpointing=False)
    data.setup("test")
    outputs = torch.cat([part.cpu() for part in trainer.predict(module, data.test_dataloader()) or []])
    targets = torch.cat([episode.query_targets for episode in data.test_dataloader()])
    return (outputs.argmax(dim=-1) == targets).double().mean(dim=1)


def strengths(module: IMAMLModule) -> dict[str, Tensor]:
    """λ of every parameter, by name."""
    flat = FlatModel(module.backbone)
    with torch.no_grad():
        row = flat.initial().unsqueeze(0)
        diagonal = module.regularizer.for_layout(flat.layout).diagonal(row, module.strengths)  # type: ignore[attr-defined]
    return {name: value.cpu() for name, value in flat.unflatten(diagonal).items()}


def run(variant: str, options: argparse.Namespace, seed: int, steps: int) -> dict[str, Any]:
    """Train and judge a variant, or read what an earlier call found."""
    folder = options.output / f"{variant.replace(', ', '_').replace(' ', '_')}_seed{seed}_steps{steps}"
    done = folder / "result.pt"
    if not done.is_file():
        module, seconds = train(variant, options, seed, steps, folder)
        found = {
            "accuracies": accuracies(module, data_of(options, seed, steps)),
            "strengths": strengths(module),
            "seconds": seconds,
        }
        torch.save(found, done)
    result: dict[str, Any] = torch.load(done)
    return result


def table(found: dict[str, list[dict[str, Any]]], steps: int) -> list[Row]:
    """Accuracy, and the difference to the fixed λ, with 95 % intervals over the tasks of all seeds."""

    def interval(values: Tensor) -> float:
        return float(1.96 * values.std() / math.sqrt(len(values)))

    joined = {name: torch.cat([result["accuracies"] for result in results]) for name, results in found.items()}
    rows: list[Row] = []
    for name, values in joined.items():
        gain = values - joined[FIXED] if FIXED in joined else torch.full_like(values, torch.nan)
        every = torch.cat([value.flatten() for result in found[name] for value in result["strengths"].values()])
        rows.append(
            {
                "regularizer": name, "seeds": len(found[name]), "meta_steps": steps, "test_tasks": len(values),
                "accuracy": 100 * float(values.mean()), "interval95": 100 * interval(values),
                "gain_over_fixed": 100 * float(gain.mean()), "gain_interval95": 100 * interval(gain),
                "lowest_strength": float(every.min()), "median_strength": float(every.median()),
                "highest_strength": float(every.max()),
                "seconds_a_step": statistics.median(result["seconds"] for result in found[name]),
            }
        )  # fmt: skip
    return rows


def draw(rows: list[Row], found: dict[str, list[dict[str, Any]]], start: float) -> Figure:
    """Accuracies, and the median of λ in every parameter."""
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(2, 3))
    means, widths = [row["accuracy"] for row in rows], [row["interval95"] for row in rows]
    left.errorbar([str(row["regularizer"]) for row in rows], means, widths, fmt="o", capsize=4)
    left.set(title="Test accuracy (95 %)", ylabel="%")
    left.tick_params(axis="x", rotation=20)
    for name, results in found.items():
        medians = {key: float(value.median()) for key, value in results[0]["strengths"].items()}
        right.semilogy(list(medians), list(medians.values()), "o-", markersize=3, label=name)
    right.axhline(start, color="grey", linestyle=":", label="first λ")
    right.set(title="λ after training: median in each parameter", ylabel="λ")
    right.tick_params(axis="x", rotation=80, labelsize="x-small")
    right.legend(fontsize="small")
    return figure


def main(args: list[str] | None = None) -> list[Row]:
    """Train what is not done yet, compare, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="the folder of Omniglot")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--meta-steps", type=int, default=3000, help="of every variant and seed")
    parser.add_argument("--minutes", type=float, help="choose --meta-steps for this time a variant, by a trial")
    parser.add_argument("--tasks", type=int, default=8, help="tasks a meta-step")
    parser.add_argument("--filters", type=int, default=64, help="of Conv4")
    parser.add_argument("--strength", type=float, default=0.02, help="λ, and its first value")
    parser.add_argument("--bounds", type=float, nargs=2, default=[1e-4, 10.0], help="of learned λ")
    parser.add_argument("--meta-lr", type=float, default=0.003, help="of Adam, falling to 0 by half a cosine")
    parser.add_argument("--regularizer-lr", type=float, default=0.01, help="the same for learned λ")
    parser.add_argument("--test-tasks", type=int, default=2000)
    parser.add_argument("--save-every", type=int, default=250, help="meta-steps between checkpoints")
    parser.add_argument("--compile", action="store_true", help="train compiled")
    parser.add_argument("--output", type=Path, default=Path("results/omniglot_regularizers"))
    options = parser.parse_args(args)

    steps = options.meta_steps
    if options.minutes is not None:
        slowest = max(train(variant, options, 0, _TRIAL)[-1] for variant in options.variants)
        steps = max(1, int(60 * options.minutes / slowest))
        print(f"{slowest:.3f} s a meta-step, so {steps} of them; to go on, give --meta-steps {steps}.", flush=True)
    found: dict[str, list[dict[str, Any]]] = {}
    for variant in options.variants:
        found[variant] = [run(variant, options, seed, steps) for seed in options.seeds]
        rows = table(found, steps)
        save(rows, options.output / "omniglot_regularizers.csv")
        last = rows[-1]
        print(
            f"{variant:<16}{last['accuracy']:>8.2f} ± {last['interval95']:.2f} %, over the fixed λ "
            f"{last['gain_over_fixed']:+.2f} ± {last['gain_interval95']:.2f}, λ from {last['lowest_strength']:.2g} to "
            f"{last['highest_strength']:.2g}, {last['seconds_a_step']:.3f} s a meta-step",
            flush=True,
        )
    draw(rows, found, options.strength).savefig(options.output / "omniglot_regularizers.png", dpi=120)
    return rows


if __name__ == "__main__":
    main()
