"""Faster ways to run networks of well-known layers against the way of all others, on a CPU, uncompiled, in turns.

The faster ways are convolutions with the channels innermost, for tasks that go one at a time, and Gauss-Newton products
by forward-mode differentiation. The tasks are random images; the times are medians, without a first call of each side.

    python -m benchmarks.stock_layers [--workloads omniglot-20-5]
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import torch

from benchmarks.kernels import timed
from benchmarks.sides import Row, save
from benchmarks.workloads import WORKLOADS, Workload
from lightning_imaml.curvature import GaussNewton
from lightning_imaml.functional import adapt, meta_gradient
from lightning_imaml.inner import GradientDescent, HessianFree
from lightning_imaml.linear import ConjugateGradient
from lightning_imaml.meta_gradients import FirstOrder, Implicit
from lightning_imaml.regularizers import Proximal
from lightning_imaml.runtime.memory import keep_freed_memory


def works(workload: Workload) -> dict[str, Callable[[], object]]:
    """What is measured of a workload."""
    network, episode, settings = workload.network(), workload.episode(None), workload.settings
    support, regularizer = (episode.support_inputs, episode.support_targets), Proximal(2.0)
    descent = GradientDescent(settings.lr, steps=5)
    newton = HessianFree(steps=2, cg_steps=2, curvature=GaussNewton())
    implicit = Implicit(ConjugateGradient(settings.cg_steps), GaussNewton())
    return {
        "adapt, gradient descent": lambda: adapt(network, *support, inner_solver=descent, regularizer=regularizer),
        "adapt, Hessian-free": lambda: adapt(network, *support, inner_solver=newton, regularizer=regularizer),
        "first-order meta-gradient": lambda: meta_gradient(
            network, episode, inner_solver=descent, estimator=FirstOrder(), regularizer=regularizer
        ),
        "implicit, Gauss-Newton": lambda: meta_gradient(
            network, episode, inner_solver=descent, estimator=implicit, regularizer=regularizer
        ),
    }


def measure(work: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Seconds of the way of all networks and of the faster ways."""
    own: list[float] = []
    faster: list[float] = []
    for _ in range(1 + repeats):
        with ExitStack() as stack:
            for module in ("problems.network", "curvature.forward_mode"):
                stack.enter_context(mock.patch(f"lightning_imaml.{module}.has_stock_layers_alone", return_value=False))
            own.append(timed(work))
        faster.append(timed(work))
    return statistics.median(own[1:]), statistics.median(faster[1:])


def main(args: list[str] | None = None) -> list[Row]:
    """Run the comparison, print it and save it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("results"))
    options = parser.parse_args(args)
    keep_freed_memory()
    rows: list[Row] = []
    print(f"CPU, {torch.get_num_threads()} threads, torch {torch.__version__}, float32, uncompiled")
    for name in options.workloads:
        for kind, work in works(WORKLOADS[name]).items():
            own, faster = measure(work, options.repeats)
            rows.append(
                {
                    "workload": name, "work": kind, "own_ms_a_task": round(own / WORKLOADS[name].tasks * 1e3, 2),
                    "faster_ms_a_task": round(faster / WORKLOADS[name].tasks * 1e3, 2), "ratio": round(own / faster, 3),
                }
            )  # fmt: skip
            print(f"{name:<18}{kind:<28}{' '.join(f'{value:>10}' for value in list(rows[-1].values())[2:])}")
    options.output.mkdir(parents=True, exist_ok=True)
    save(rows, options.output / "stock_layers.csv")
    return rows


if __name__ == "__main__":
    main()
