"""Adapting a part of a ResNet-12 against adapting all of it: time and memory, in one process, in turns.

The images are random, at mini-ImageNet's size; the times are medians. On CPU one thread is measured in CPU seconds and
memory in the exact bytes of live tensors, on a GPU in wall time and what PyTorch's allocator has handed out.

    python -m benchmarks.partial [--device cuda]
"""

from __future__ import annotations

import argparse
import copy
import csv
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from lightning_imaml import Episode
from lightning_imaml.callbacks import LiveTensorBytes
from lightning_imaml.curvature import GaussNewton
from lightning_imaml.functional import adapt, meta_gradient
from lightning_imaml.inner import GradientDescent
from lightning_imaml.linear import ConjugateGradient
from lightning_imaml.meta_gradients import Implicit
from lightning_imaml.models import ResNet12, add_low_rank_adapters
from lightning_imaml.regularizers import Proximal

PARTS: dict[str, tuple[str, ...] | None] = {
    "all": None,
    "last block and head": ("features.3.*", "classifier.*"),
    "adapters of rank 4": ("*.down.*", "*.up.*"),
    "head": ("classifier.*",),
}
Row = dict[str, str | int | float]


def images(options: argparse.Namespace) -> Episode:
    """Random tasks of 5 ways and 1 shot."""
    torch.manual_seed(0)
    labels = torch.arange(5)
    shape = (3, options.image_size, options.image_size)
    support, query = labels, labels.repeat_interleave(options.queries)
    tasks = options.tasks
    parts = (
        torch.rand(tasks, 5, *shape),
        support.repeat(tasks, 1),
        torch.rand(tasks, len(query), *shape),
        query.repeat(tasks, 1),
    )
    return Episode(*(part.to(options.device) for part in parts))


def timed(work: Callable[[], object], device: str) -> float:
    """Seconds of a piece of work."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    start = clock()
    work()
    if device != "cpu":
        torch.cuda.synchronize()
    return clock() - start


def peak(work: Callable[[], object], device: str) -> float:
    """The most memory in MiB that a piece of work holds at once, besides what is there before."""
    if device == "cpu":
        with LiveTensorBytes() as live:
            work()
        return live.peak / 2**20
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def works(
    network: nn.Module, episode: Episode, part: str, options: argparse.Namespace
) -> dict[str, Callable[[], object]]:
    """What is measured of a part."""
    settings = {
        "inner_solver": GradientDescent(lr=0.01, steps=options.steps),
        "regularizer": Proximal(0.5),
        "adapt_only": PARTS[part],
        "chunk_size": options.chunk_size,
    }
    estimator = Implicit(ConjugateGradient(max_iter=options.cg_steps), GaussNewton())
    return {
        "adapt": lambda: adapt(network, episode.support_inputs, episode.support_targets, **settings),
        "meta_gradient": lambda: meta_gradient(network, episode, estimator=estimator, **settings),
    }


def main(args: list[str] | None = None) -> list[Row]:
    """Run the comparison, print it and save it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tasks", type=int, default=2)
    parser.add_argument("--queries", type=int, default=3, help="query images a class")
    parser.add_argument("--image-size", type=int, default=84)
    parser.add_argument("--widths", type=int, nargs=4, default=[64, 160, 320, 640], help="filters of the four blocks")
    parser.add_argument("--steps", type=int, default=5, help="inner gradient steps")
    parser.add_argument("--cg-steps", type=int, default=5)
    parser.add_argument("--chunk-size", type=int, default=1, help="tasks at once")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("results"))
    options = parser.parse_args(args)
    if options.device == "cpu":
        torch.set_num_threads(1)
    torch.manual_seed(0)
    plain = ResNet12(5, widths=options.widths)
    adapted = add_low_rank_adapters(copy.deepcopy(plain), rank=4)
    episode = images(options)
    measured = {
        (part, name): work
        for part in PARTS
        for name, work in works(
            (adapted if "adapters" in part else plain).to(options.device), episode, part, options
        ).items()
    }
    memory = {key: peak(work, options.device) for key, work in measured.items()}  # Also warms up.
    times: dict[tuple[str, str], list[float]] = {key: [] for key in measured}
    for _ in range(options.repeats):
        for key, work in measured.items():
            times[key].append(timed(work, options.device))
    where = "CPU, 1 thread" if options.device == "cpu" else torch.cuda.get_device_name()
    rows: list[Row] = []
    print(f"{where}, torch {torch.__version__}, ResNet-12, {options.tasks} tasks, {options.steps} steps, float32")
    print(f"{'':<22}{'':<15}{'s a task':>10}{'of all':>8}{'MiB':>9}{'of all':>8}")
    for part, name in measured:
        seconds = statistics.median(times[part, name]) / options.tasks
        share = seconds * options.tasks / statistics.median(times["all", name])
        rows.append(
            {
                "adapted": part, "work": name, "seconds_a_task": round(seconds, 4), "time_of_all": round(share, 3),
                "peak_mib": round(memory[part, name], 1),
                "memory_of_all": round(memory[part, name] / memory["all", name], 3),
            }
        )  # fmt: skip
        row = rows[-1]
        print(
            f"{part:<22}{name:<15}{row['seconds_a_task']:>10}{row['time_of_all']:>8}{row['peak_mib']:>9}"
            f"{row['memory_of_all']:>8}"
        )
    options.output.mkdir(parents=True, exist_ok=True)
    with (options.output / "partial.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return rows


if __name__ == "__main__":
    main()
