"""Computation and memory of one meta-gradient against the number of inner steps.

Figure 2(b) of the iMAML paper (Rajeswaran et al., 2019, https://arxiv.org/abs/1909.04630): Conv4-64 on 20-way 5-shot
Omniglot, by default with one query image a class, on the same inner problem (gradient descent on L + R) for

    iMAML            conjugate gradient on the exact Hessian, at the solution
    MAML             back-propagation through all inner steps
    truncated        back-propagation through the last steps alone
    first order      the query gradient at the solution

One task at a time, in float32. Measured for each method and each number of steps:

    gflop            floating-point operations of a task, counted operation by operation
    seconds          wall time a task: the median of the repeats, with the methods in turns
    peak_mib         the most memory that the meta-gradient takes beside network and data: the exact bytes of live
                     tensors on a CPU, those that PyTorch's allocator has handed out on a GPU

    python experiments/figure_2b.py --root PATH    # Omniglot; without --root: the embedded letters
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from _tables import Row, save
from matplotlib.figure import Figure
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from lightning_imaml import Episode
from lightning_imaml.callbacks import LiveTensorBytes
from lightning_imaml.data import EpisodicDataModule, GlyphDataModule, OmniglotDataModule
from lightning_imaml.diagnostics.nested_peaks import CudaAllocated, PeakCounter
from lightning_imaml.functional import meta_gradient
from lightning_imaml.inner import GradientDescent
from lightning_imaml.linear import ConjugateGradient
from lightning_imaml.meta_gradients import Estimator, FirstOrder, Implicit, Truncated, Unrolled
from lightning_imaml.models import Conv4
from lightning_imaml.regularizers import Proximal

PANELS = {
    "gflop": "Computation: GFLOP a task",
    "seconds": "Computation: seconds a task",
    "peak_mib": "Memory: peak MiB",
}


def methods(inner_steps: int, cg_steps: int, last_steps: int) -> dict[str, Estimator]:
    """Each method's estimator, by name."""
    return {
        f"iMAML, {cg_steps} CG steps": Implicit(ConjugateGradient(cg_steps)),
        "MAML": Unrolled(),
        f"truncated, last {last_steps} steps": Truncated(min(inner_steps, last_steps)),
        "first order": FirstOrder(),
    }


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """The most bytes that a piece of work holds at once, beside what was there before."""
    counting: AbstractContextManager[PeakCounter]
    counting = nullcontext(CudaAllocated(device)) if device.type == "cuda" else LiveTensorBytes()
    with counting as counter:
        counter.reset_peak()
        before = counter.peak
        work()
        return counter.peak - before


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """The wall time of a piece of work, to the end of what it leaves to a GPU."""
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def measure(model: nn.Module, episode: Episode, options: argparse.Namespace) -> list[Row]:
    """A row for each number of inner steps and each method, printed as they come."""
    device = torch.device(options.device)
    one = pytree.tree_map(lambda tensor: tensor[:1], episode)
    rows: list[Row] = []
    for steps in options.steps:
        runs = {
            method: functools.partial(
                meta_gradient,
                model,
                inner_solver=GradientDescent(options.lr, steps),
                estimator=estimator,
                regularizer=Proximal(options.strength),
                chunk_size=1,
            )
            for method, estimator in methods(steps, options.cg_steps, options.last_steps).items()
        }
        counted: dict[str, Row] = {}
        for method, run in runs.items():  # Which warms up, too.
            with FlopCounterMode(display=False) as counter:
                run(one)
            peak = peak_bytes(functools.partial(run, one), device)
            counted[method] = {"gflop": counter.get_total_flops() / 1e9, "peak_mib": peak / 2**20}
        times: dict[str, list[float]] = {method: [] for method in runs}
        for _ in range(options.repeats):
            for method, run in runs.items():
                times[method].append(seconds(functools.partial(run, episode), device) / episode.tasks)
        for method, found in counted.items():
            row = {"method": method, "inner_steps": steps, "seconds": statistics.median(times[method]), **found}
            rows.append(row)
            print("{method:<28}{inner_steps:>12}{gflop:>10.3f}{seconds:>10.3f}{peak_mib:>11.1f}".format(**row))
    return rows


def draw(rows: list[Row]) -> Figure:
    """One panel for each measured quantity, one curve for each method."""
    figure = Figure(figsize=(15, 4.2), layout="constrained")
    for axes, (quantity, title) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
        for method in dict.fromkeys(row["method"] for row in rows):
            points = [(row["inner_steps"], row[quantity]) for row in rows if row["method"] == method]
            axes.loglog(*zip(*points, strict=True), "o-", markersize=3, label=method)
        axes.set(title=title, xlabel="inner steps")
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize="small")
    return figure


def main(args: list[str] | None = None) -> list[Row]:
    """Run the measurements, print them and save them with their picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, help="the folder of Omniglot; without it, the embedded letters")
    parser.add_argument("--steps", type=int, nargs="+", default=[2**k for k in range(8)], help="inner steps")
    parser.add_argument("--ways", type=int, default=20)
    parser.add_argument("--shots", type=int, default=5)
    parser.add_argument("--queries", type=int, default=1, help="query images a class")
    parser.add_argument("--tasks", type=int, default=1, help="tasks that are timed; one is counted")
    parser.add_argument("--filters", type=int, default=64)
    parser.add_argument("--lr", type=float, default=0.1, help="of the inner gradient steps")
    parser.add_argument("--strength", type=float, default=2.0, help="λ")
    parser.add_argument("--cg-steps", type=int, default=5, help="of iMAML")
    parser.add_argument("--last-steps", type=int, default=5, help="that truncated back-propagation goes through")
    parser.add_argument("--repeats", type=int, default=3, help="for the median of the seconds")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("results"))
    options = parser.parse_args(args)
    sizes = {
        "ways": options.ways,
        "shots": options.shots,
        "queries": options.queries,
        "tasks_per_batch": options.tasks,
        "seed": options.seed,
    }
    data: EpisodicDataModule = OmniglotDataModule(options.root, **sizes) if options.root else GlyphDataModule(**sizes)
    data.setup("fit")
    episode = pytree.tree_map(lambda tensor: tensor.to(options.device), next(iter(data.train_dataloader())))
    torch.manual_seed(options.seed)
    model = Conv4(options.ways, filters=options.filters).to(options.device)
    print(f"Conv4-{options.filters}, {options.ways}-way {options.shots}-shot, {torch.get_num_threads()} threads")
    print(f"{'method':<28}{'inner steps':>12}{'GFLOP':>10}{'seconds':>10}{'peak MiB':>11}")
    rows = measure(model, episode, options)
    save(rows, options.output / "figure_2b.csv")
    draw(rows).savefig(options.output / "figure_2b.png", dpi=120)
    return rows


if __name__ == "__main__":
    main()
