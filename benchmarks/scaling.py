"""Time a task against tasks a batch, ways and shots, and width of the network.

5-way 1-shot Omniglot's settings and Conv4-64 otherwise, on random images of that size. All points run in one process,
in turns; the times are medians.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from matplotlib.figure import Figure

from benchmarks.sides import Row, operations, package, save
from benchmarks.workloads import Settings, Workload

BASE = Workload("omniglot", 5, 1, 1, 16, Settings())
TASKS = (1, 2, 4, 8, 16, 32, 64)
SIZES = ((5, 1), (5, 5), (20, 1), (20, 5))
FILTERS = (8, 16, 32, 64, 128)
PANELS = {"tasks": "tasks a batch", "ways x shots": "support images a task", "filters": "filters of Conv4"}


def points() -> Iterator[tuple[str, str, float, Workload]]:
    """What is varied, to what, where on the axis, and the workload."""
    for tasks in TASKS:
        yield "tasks", str(tasks), tasks, dataclasses.replace(BASE, tasks=tasks)
    for ways, shots in SIZES:
        workload = dataclasses.replace(BASE, ways=ways, shots=shots)
        yield "ways x shots", f"{ways} x {shots}", ways * shots, workload
    for filters in FILTERS:
        yield "filters", str(filters), filters, dataclasses.replace(BASE, filters=filters)


def draw(rows: list[Row]) -> Figure:
    """One panel for each thing that is varied."""
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    for axes, (varied, label) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
        mine = [row for row in rows if row["varied"] == varied]
        axes.loglog([row["x"] for row in mine], [row["ms_a_task"] for row in mine], "o-")
        for row in mine:
            axes.annotate(row["value"], (row["x"], row["ms_a_task"]), xytext=(4, 4), textcoords="offset points")
        axes.set(xlabel=label, ylabel="ms a task")
        axes.grid(alpha=0.3)
    return figure


def run(repeats: int, compile: bool, output: Path) -> list[Row]:
    """Measure all points, print them, and save them with their picture."""
    side = package("implicit", compile=compile)
    measured = [
        (varied, value, x, workload, workload.network(), workload.episode(None))
        for varied, value, x, workload in points()
    ]
    times: list[list[float]] = [[] for _ in measured]
    for repeat in range(repeats + 1):
        for (*_, workload, network, episode), found in zip(measured, times, strict=True):
            start = time.perf_counter()
            side(network, episode, workload.settings)
            if repeat:  # The first one warms up, and compiles.
                found.append((time.perf_counter() - start) / workload.tasks)
    rows: list[Row] = []
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {'compiled' if compile else 'eager'}")
    print(f"{'varied':<14}{'value':>8}{'ms a task':>12}{'GFLOP a task':>14}{'GFLOP/s':>10}")
    for (varied, value, x, workload, _, episode), found in zip(measured, times, strict=True):
        seconds, work = statistics.median(found), operations(workload, episode, "implicit") / 1e9
        row: Row = {"varied": varied, "value": value, "x": x, "ms_a_task": 1e3 * seconds, "gflop_a_task": work}
        rows.append(row)
        print(f"{varied:<14}{value:>8}{1e3 * seconds:>12.2f}{work:>14.3f}{work / seconds:>10.1f}")
    save(rows, output / "scaling.csv")
    draw(rows).savefig(output / "scaling.png", dpi=120)
    return rows
