"""Is the paper's linear system positive definite? The experiment behind the module's default curvature.

iMAML (https://arxiv.org/abs/1909.04630) solves (∇²L(φ) + λ I) u = ∇Q(φ) for every task by a few steps of conjugate
gradient (CG), which presume a positive definite matrix. With the paper's settings for Omniglot 5-way 1-shot (Conv4-64,
λ = 2, 16 gradient steps at 0.1, 5 CG steps, Adam at 1e-3) this trains the same network on the same tasks by

    hessian        the exact Hessian and CG, as in the paper
    damped         the same with damping 22, what the authors' released code amounts to at λ = 2 and its other
                   defaults: its matrix 2 I + H/(λ + 10) is (H + λ I + 22 I)/12
    gauss_newton   the Gauss-Newton matrix and CG, the default of IMAMLModule
    minres         the exact Hessian and 5 steps of MINRES, which needs no definite matrix
    first_order    no linear system

and records on a probe, a few training tasks that are the same for every method and never trained on, in float64:

    indefinite_share           the share of tasks whose matrix ∇²L(φ) + λ I, with the exact Hessian where the 16 steps
                               end, has a negative eigenvalue: the reference's Lanczos process (MINRES) from ∇Q(φ)
                               meets a pivot that is not positive. That proves it; what lies outside the Krylov
                               space is missed.
    linear_residual            ‖b − A u‖ / ‖b‖ of the method's own system as its solver reports it, the mean over tasks
    relative_error             ‖g − g*‖ / ‖g*‖ of the method's meta-gradient g. The reference g* takes the same 16
                               steps, and solves the system with the exact Hessian to a residual of 1e-3.
    reference_linear_residual  the largest residual of a task that the reference reached; hollow points in the picture
                               missed 1e-3
    reference_inner_residual   the largest ‖∇_φ G‖ of a task at the reference's φ
    accuracy                   on validation classes after adaptation, with its 95 % interval

The reference is not the paper's exact meta-gradient, whose φ is a stationary point of the inner problem. More steps do
not lead to one: --reference-steps 500 shows ‖∇_φ G‖ after 500 steps.

    python experiments/indefiniteness.py                                                   # the embedded letters
    python experiments/indefiniteness.py --root PATH --steps 300 --every 50 --tasks 16     # Omniglot
"""

from __future__ import annotations

import argparse
import copy
import csv
import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import nn

from lightning_imaml import Episode
from lightning_imaml.curvature import GaussNewton, Hessian
from lightning_imaml.data import EpisodicDataModule, GlyphDataModule, OmniglotDataModule
from lightning_imaml.diagnostics.reference import ExactReference
from lightning_imaml.functional import MetaGradient, adapt, evaluate, meta_gradient
from lightning_imaml.inner import GradientDescent
from lightning_imaml.linear import ConjugateGradient, MinRes
from lightning_imaml.meta_gradients import Estimator, FirstOrder, Implicit
from lightning_imaml.metrics import EpisodicAccuracy, EpisodicInterval95
from lightning_imaml.models import Conv4
from lightning_imaml.regularizers import Proximal

METHODS: dict[str, Estimator] = {
    "hessian": Implicit(ConjugateGradient(max_iter=5), Hessian()),
    "damped": Implicit(ConjugateGradient(max_iter=5, damping=22.0), Hessian()),
    "gauss_newton": Implicit(ConjugateGradient(max_iter=5), GaussNewton()),
    "minres": Implicit(MinRes(max_iter=5), Hessian()),
    "first_order": FirstOrder(),
}
WAYS, FILTERS = 5, 64
INNER_SOLVER, REGULARIZER = GradientDescent(lr=0.1, steps=16), Proximal(2.0)
REFERENCE = ExactReference(steps=INNER_SOLVER.steps, tol=0.0, linear_steps=600, rtol=1e-3)
VALIDATION_TASKS = 64

Row = dict[str, str | int | float]
PANELS = {
    "indefinite_share": ("Tasks with an indefinite exact system", "share", "linear"),
    "linear_residual": ("Residual of the method's own system", "‖b − A u‖ / ‖b‖", "log"),
    "relative_error": ("Meta-gradient against the exact solve", "‖g − g*‖ / ‖g*‖ (hollow: g* not converged)", "log"),
    "accuracy": ("Accuracy on unseen classes (95 %)", "accuracy", "linear"),
}


def network(seed: int) -> nn.Module:
    """The same first weights for every method."""
    torch.manual_seed(seed)
    return Conv4(WAYS, filters=FILTERS)


def gradient(model: nn.Module, episode: Episode, estimator: Estimator) -> MetaGradient:
    """The meta-gradient with the paper's inner loop."""
    return meta_gradient(model, episode, inner_solver=INNER_SOLVER, estimator=estimator, regularizer=REGULARIZER)


def exact(model: nn.Module, episode: Episode, steps: int) -> MetaGradient:
    """The reference after ``steps`` inner steps."""
    reference = dataclasses.replace(REFERENCE, steps=steps)
    return reference.meta_gradient(model, episode, inner_solver=INNER_SOLVER, regularizer=REGULARIZER)


def probe(model: nn.Module, episode: Episode, estimator: Estimator, reference: MetaGradient) -> Row:
    """What the probe tasks tell of the linear system and the meta-gradient."""
    # In float32, rounding would grow in the inner loop and count as an error of the method.
    result = gradient(copy.deepcopy(model).double(), episode, estimator)
    error = REFERENCE.compare(result.grads, reference)
    return {
        "indefinite_share": error.indefinite,
        "linear_residual": math.nan if result.linear is None else result.linear.residual.mean().item(),
        "relative_error": error.relative_error,
        "reference_linear_residual": error.linear_residual,
        "reference_inner_residual": error.inner_residual,
    }


def validate(model: nn.Module, data: EpisodicDataModule) -> Row:
    """The accuracy on the validation tasks after adaptation."""
    accuracy, interval = EpisodicAccuracy(), EpisodicInterval95()
    for episode in data.val_dataloader():
        parameters = adapt(
            model,
            episode.support_inputs,
            episode.support_targets,
            inner_solver=INNER_SOLVER,
            regularizer=REGULARIZER,
        ).parameters
        _, outputs = evaluate(model, parameters, episode.query_inputs, episode.query_targets)
        accuracy.update(outputs, episode.query_targets)
        interval.update(outputs, episode.query_targets)
    return {"accuracy": accuracy.compute().item(), "accuracy_interval95": interval.compute().item()}


def run(data: EpisodicDataModule, options: argparse.Namespace) -> Iterator[Row]:
    """Train by each method, and give a row for each probe."""
    first = Episode(*(part[: options.probe_tasks] for part in next(iter(data.train_dataloader()))))
    probed = Episode(*(part.double() if part.is_floating_point() else part for part in first))
    at_start = exact(network(options.seed), probed, options.reference_steps)
    for name in options.methods:
        model, estimator = network(options.seed), METHODS[name]
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        batches = iter(data.train_dataloader())
        next(batches)  # The probe is never trained on.
        for step in range(options.steps + 1):
            if step % options.every == 0:
                reference = exact(model, probed, options.reference_steps) if step else at_start
                found = probe(model, probed, estimator, reference) | validate(model, data)
                yield {"method": name, "step": step, **found}
            if step < options.steps:
                grads = gradient(model, next(batches), estimator).grads
                for parameter_name, parameter in model.named_parameters():
                    parameter.grad = grads[parameter_name]
                optimizer.step()


def draw(rows: list[Row]) -> Figure:
    """One panel for each measured quantity, one curve for each method."""
    figure = Figure(figsize=(10, 7), layout="constrained")
    for axes, (quantity, (title, unit, scale)) in zip(figure.subplots(2, 2).flat, PANELS.items(), strict=True):
        for index, name in enumerate(dict.fromkeys(row["method"] for row in rows)):
            mine = [row for row in rows if row["method"] == name and not math.isnan(float(row[quantity]))]
            steps, values = [row["step"] for row in mine], [row[quantity] for row in mine]
            widths = [row["accuracy_interval95"] for row in mine] if quantity == "accuracy" else None
            axes.errorbar(steps, values, widths, color=f"C{index}", marker="o", markersize=4, capsize=2, label=name)
            if quantity == "relative_error":
                doubtful = [row for row in mine if row["reference_linear_residual"] > REFERENCE.rtol]
                points = [row["step"] for row in doubtful], [row[quantity] for row in doubtful]
                axes.plot(*points, "o", color=f"C{index}", markerfacecolor="white")
        axes.set(title=title, xlabel="meta-steps", ylabel=unit, yscale=scale)
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize="small")
    return figure


def main(args: list[str] | None = None) -> list[Row]:
    """Run the experiment, print its rows as they come, and save table and picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, help="the folder of Omniglot; without it, the embedded letters")
    parser.add_argument("--steps", type=int, default=60, help="meta-steps of each method")
    parser.add_argument("--every", type=int, default=30, help="meta-steps between two probes")
    parser.add_argument("--tasks", type=int, default=8, help="tasks a meta-step")
    parser.add_argument("--probe-tasks", type=int, default=2, help="tasks of the probe, at most those of a meta-step")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument(
        "--reference-steps", type=int, default=REFERENCE.steps, help="inner steps of the reference instead of the 16"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("results"))
    options = parser.parse_args(args)
    if not 1 <= options.probe_tasks <= options.tasks:
        parser.error(f"--probe-tasks must be from 1 to --tasks={options.tasks}; found {options.probe_tasks}")

    settings = {
        "ways": WAYS,
        "shots": 1,
        "queries": 1,
        "eval_queries": 5,
        "tasks_per_batch": options.tasks,
        "batches_per_epoch": options.steps + 1,
        "val_tasks": VALIDATION_TASKS,
        "seed": options.seed,
    }
    data = OmniglotDataModule(options.root, **settings) if options.root else GlyphDataModule(**settings)
    options.output.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    with (options.output / "indefiniteness.csv").open("w", newline="") as file:
        for row in run(data, options):
            if not rows:
                writer = csv.DictWriter(file, row)
                writer.writeheader()
                print("  ".join(f"{name:>12}" for name in row))
            rows.append(row)
            writer.writerow(row)
            file.flush()  # A long run that is cut off keeps what it found.
            cells = (f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values())
            print("  ".join(f"{cell:>{max(12, len(name))}}" for cell, name in zip(cells, row, strict=True)), flush=True)
    draw(rows).savefig(options.output / "indefiniteness.png", dpi=120)
    return rows


if __name__ == "__main__":
    main()
