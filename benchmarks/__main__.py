"""The package against other code on the same tasks: speed, agreement, and how much of the machine is used.

Sides that compute the same gradient run in one process, in turns; the times are medians, the ratios those of medians.
Implicit: a plain loop over tasks, TorchOpt and the package, eager and compiled. Unrolled (MAML): higher, learn2learn
and the package. Before that all sides are compared in float64, so that nobody is fast by being wrong. λ is 100, so that
every system is definite and all sides do the same work: at the paper's 2 a plain loop stops at negative curvature, in
about half of the tasks, where TorchOpt goes on.

    python -m benchmarks --omniglot PATH --mini-imagenet PATH    # without a path: random images of that size
    python -m benchmarks --device cuda                           # on a GPU; the package takes all tasks at once there
    python -m benchmarks --check docs/results/benchmark.csv      # status 1 where a ratio is worse than recorded
    python -m benchmarks --overhead      # instead: a training step under Lightning against the bare meta-gradient
    python -m benchmarks --kernels       # instead: the convolutions alone, a floor under eager code that calls them
    python -m benchmarks --scaling       # instead: time a task against tasks a batch, ways and shots, and width
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from matplotlib.figure import Figure

from benchmarks import kernels, overhead, regression, scaling
from benchmarks.sides import Row, Side, operations, package, save
from benchmarks.workloads import WORKLOADS, Workload
from lightning_imaml import Episode
from lightning_imaml.runtime.precision import full_float32

PEERS = {
    "implicit": {"sequential loop": "sequential", "TorchOpt": "torchopt_imaml"},
    "unrolled": {"higher": "higher_maml", "learn2learn": "learn2learn_maml"},
}


def sides(gradient: str) -> dict[str, Side]:
    """All that compute one kind of gradient and are installed."""
    found: dict[str, Side] = {}
    for name, module in PEERS[gradient].items():
        try:
            found[name] = importlib.import_module(f"benchmarks.peers.{module}").meta_gradient
        except ModuleNotFoundError as error:
            print(f"without {name}: {error}; pip install '.[benchmarks]'")
    return found | {"lightning_imaml": package(gradient), "compiled": package(gradient, compile=True)}


def disagreement(workload: Workload, episode: Episode, sides: dict[str, Side]) -> dict[str, float]:
    """‖g − g₀‖ / ‖g₀‖ in float64 on two tasks, with the first side's gradient as g₀, on the device of the episode."""
    model = workload.network().double().to(episode.support_inputs.device)
    double = Episode(*(part[:2].double() if part.is_floating_point() else part[:2] for part in episode))
    found = {
        name: torch.cat([g.flatten() for g in side(model, double, workload.settings).values()])
        for name, side in sides.items()
    }
    first = next(iter(found.values()))
    return {name: float((g - first).norm() / first.norm()) for name, g in found.items()}


def seconds(work: Callable[[], object], device: str) -> float:
    """The wall time of a piece of work, until the device has done it."""
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def gemm_rate(device: str) -> float:
    """The rate of float32 matrix products, in floating-point operations a second: the best of some sizes."""
    best = 0.0
    for size in (512, 1024, 2048, *((4096, 8192) if device == "cuda" else ())):
        a = torch.rand(size, size, device=device)
        for _ in range(8):
            best = max(best, 2 * size**3 / seconds(lambda a=a: a @ a, device))  # type: ignore[misc]
    return best


def measure(name: str, workload: Workload, episode: Episode, gradient: str, repeats: int, device: str) -> list[Row]:
    """Compare and time all sides on one workload."""
    contenders, model = sides(gradient), workload.network().to(device)
    work = operations(workload, episode, gradient)
    episode = Episode(*(part.to(device) for part in episode))
    errors = disagreement(workload, episode, contenders)
    times: dict[str, list[float]] = {side: [] for side in contenders}
    with full_float32():  # All sides: a GPU's default for convolutions is shorter.
        for side in contenders.values():  # To warm up, and to compile.
            side(model, episode, workload.settings)
        rate = gemm_rate(device)
        for _ in range(repeats):
            for side, run in contenders.items():
                times[side].append(seconds(lambda run=run: run(model, episode, workload.settings), device))  # type: ignore[misc]
        rate = max(rate, gemm_rate(device))
    medians = {side: statistics.median(values) / workload.tasks for side, values in times.items()}
    fastest_peer = min((medians[peer] for peer in PEERS[gradient] if peer in medians), default=float("nan"))
    return [
        {
            "workload": name,
            "gradient": gradient,
            "side": side,
            "ms_a_task": float(f"{1e3 * median:.4g}"),
            "times_as_fast_as_fastest_peer": round(fastest_peer / median, 2),
            "share_of_gemm_rate": round(work / median / rate, 3),
            "gflop_a_task": round(work / 1e9, 3),
            "gemm_gflops": round(rate / 1e9, 1),
            "relative_difference_float64": errors[side],
        }
        for side, median in medians.items()
    ]


def draw(rows: list[Row]) -> Figure:
    """A bar for each side of each workload."""
    groups = list(dict.fromkeys((row["workload"], row["gradient"]) for row in rows))
    figure = Figure(figsize=(4 * len(groups), 3.6), layout="constrained")
    for axes, group in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups, strict=True):
        mine = [row for row in rows if (row["workload"], row["gradient"]) == group]
        bars = axes.barh([row["side"] for row in mine], [row["ms_a_task"] for row in mine], color="C0")
        axes.bar_label(bars, [f"{row['ms_a_task']:.3g} ms" for row in mine], padding=3)
        axes.invert_yaxis()
        axes.margins(x=0.25)
        axes.set(title=f"{group[0]}, {group[1]}", xlabel="ms a task")
    return figure


def main(args: list[str] | None = None) -> list[Row]:
    """Run the comparison, print it and save it."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--omniglot", type=Path, help="the folder of Omniglot")
    parser.add_argument("--mini-imagenet", type=Path, help="the folder of mini-ImageNet")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--gradients", nargs="+", choices=PEERS, default=list(PEERS))
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--overhead", action="store_true", help=overhead.__doc__.splitlines()[0])
    kind.add_argument("--kernels", action="store_true", help=kernels.__doc__.splitlines()[0])
    kind.add_argument("--scaling", action="store_true", help=scaling.__doc__.splitlines()[0])
    kind.add_argument("--check", type=Path, metavar="FILE", help="compare the ratios with those of this benchmark.csv")
    parser.add_argument("--tolerance", type=float, default=0.2, help="with --check: how far below is not worse yet")
    parser.add_argument("--compile", action="store_true", help="with --overhead and --scaling: compiled")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of the comparison of sides")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("results"))
    options = parser.parse_args(args)
    if options.device == "cuda":
        if options.scaling or options.kernels or options.overhead or options.check:
            parser.error("--device cuda is for the comparison of sides alone, whose recorded ratios are of a CPU")
        if not torch.cuda.is_available():
            parser.error("--device cuda must have a GPU that PyTorch can use; found none")
    recorded = regression.read(options.check) if options.check else None  # Now: --output may write to the same file.
    options.output.mkdir(parents=True, exist_ok=True)
    roots = {"omniglot": options.omniglot, "mini-imagenet": options.mini_imagenet}
    if options.scaling:
        return scaling.run(options.repeats, options.compile, options.output)
    if options.kernels:
        return kernels.run(options.workloads, roots, options.repeats, options.output)
    if options.overhead:
        return overhead.run(options.workloads, roots, options.repeats, options.compile, options.output)
    where = f"{torch.get_num_threads()} threads" if options.device == "cpu" else torch.cuda.get_device_name()
    print(f"{where}, torch {torch.__version__}, float32; ms a task")
    rows: list[Row] = []
    for name in options.workloads:
        workload = WORKLOADS[name]
        root = roots[workload.data]
        episode = workload.episode(root)
        for gradient in options.gradients:
            print(f"\n{name} ({'real' if root else 'random'} images, {workload.tasks} tasks), {gradient}")
            for row in measure(name, workload, episode, gradient, options.repeats, options.device):
                rows.append(row)
                print(
                    f"{row['side']:>17}: {row['ms_a_task']:8.4g} ms, {row['times_as_fast_as_fastest_peer']:5.2f} times "
                    f"as fast as the fastest peer, {row['share_of_gemm_rate']:4.0%} of the GEMM rate, "
                    f"differs by {row['relative_difference_float64']:.0e}",
                    flush=True,
                )
            save(rows, options.output / "benchmark.csv")
    draw(rows).savefig(options.output / "benchmark.png", dpi=120)
    if recorded is not None:
        regression.check(regression.milliseconds(rows), recorded, options.tolerance)
    return rows


if __name__ == "__main__":
    main()
