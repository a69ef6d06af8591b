"""The check of a network's first use against a meta-step, and what a later call of it costs; in turns, uncompiled.

The tasks are random images; the times are medians, without a first call of each side.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.kernels import timed
from benchmarks.sides import Row, save
from benchmarks.workloads import WORKLOADS, Workload
from lightning_imaml.functional import meta_gradient
from lightning_imaml.inner import GradientDescent
from lightning_imaml.problems.first_use import check_network
from lightning_imaml.problems.network import FlatModel
from lightning_imaml.regularizers import Proximal


def sides(workload: Workload) -> dict[str, Callable[[], object]]:
    """The check, a later call of it, and a meta-step."""
    network, episode, settings = workload.network(), workload.episode(None), workload.settings
    flat, descent = FlatModel(network), GradientDescent(settings.lr, settings.steps)

    def check() -> None:
        flat.traits.checked.clear()
        check_network(flat, episode.support_inputs)

    return {
        "check": check,
        "later": lambda: check_network(flat, episode.support_inputs),
        "meta_step": lambda: meta_gradient(
            network, episode, inner_solver=descent, regularizer=Proximal(settings.strength)
        ),
    }


def main(args: list[str] | None = None) -> list[Row]:
    """Run the comparison, print it and save it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("results"))
    options = parser.parse_args(args)
    options.output.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for name in options.workloads:
        works = sides(WORKLOADS[name])
        seconds: dict[str, list[float]] = {side: [] for side in works}
        for _ in range(1 + options.repeats):
            for side, work in works.items():
                seconds[side].append(timed(work))
        median = {side: statistics.median(times[1:]) for side, times in seconds.items()}
        milliseconds: Row = {f"{side}_ms": round(1e3 * time, 3) for side, time in median.items()}
        ratio = round(median["check"] / median["meta_step"], 3)
        rows.append({"workload": name, **milliseconds, "check_over_meta_step": ratio, "torch": torch.__version__})
        print(", ".join(f"{key} {value}" for key, value in rows[-1].items()))
    save(rows, options.output / "first_use.csv")
    return rows


if __name__ == "__main__":
    main()
