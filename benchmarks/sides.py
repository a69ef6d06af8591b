"""The package as one side of a comparison, and what its work is."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.workloads import Settings, Workload
from lightning_imaml import Episode
from lightning_imaml.functional import meta_gradient
from lightning_imaml.inner import GradientDescent
from lightning_imaml.linear import ConjugateGradient
from lightning_imaml.meta_gradients import Estimator, Implicit, Unrolled
from lightning_imaml.regularizers import NoRegularizer, Proximal, Regularizer

Side = Callable[[nn.Module, Episode, Settings], dict[str, Tensor]]
Row = dict[str, str | int | float]


def package(gradient: str, chunk_size: int | None = None, compile: bool = False) -> Side:
    """The package with the settings' solvers."""

    def side(model: nn.Module, episode: Episode, settings: Settings) -> dict[str, Tensor]:
        estimator: Estimator = Implicit(ConjugateGradient(settings.cg_steps)) if gradient == "implicit" else Unrolled()
        regularizer: Regularizer = Proximal(settings.strength) if gradient == "implicit" else NoRegularizer()
        return meta_gradient(
            model,
            episode,
            inner_solver=GradientDescent(settings.lr, settings.steps),
            estimator=estimator,
            regularizer=regularizer,
            chunk_size=chunk_size,
            compile=compile,
        ).grads

    return side


def operations(workload: Workload, episode: Episode, gradient: str) -> float:
    """Floating-point operations of one task's meta-gradient, counted."""
    one = Episode(*(part[:1] for part in episode))
    with FlopCounterMode(display=False) as counter:
        package(gradient, chunk_size=1)(workload.network(), one, workload.settings)
    return float(counter.get_total_flops())


def save(rows: Sequence[Row], path: Path) -> None:
    """Write a CSV file."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
