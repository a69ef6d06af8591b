"""A process that keeps the memory it frees against one that has glibc's defaults: time and page faults of a meta-step.

What a process has set in its allocator cannot be set back to the defaults, so that each side is a process of its own
here; they take turns, one of each in every round, and the ratio is that of the medians over all rounds. The tasks are
random images of Omniglot's size, the network is Conv4-64, on a CPU.

    python -m benchmarks.allocator [--rounds 3]
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.sides import Row, package, save
from benchmarks.workloads import WORKLOADS, Workload
from lightning_imaml.runtime.memory import keep_freed_memory

SIDES = ("default", "kept")


def measure(workload: Workload, compile: bool, repeats: int) -> dict[str, float]:
    """Seconds and page faults of one meta-gradient, after two that are not counted, and this process's peak so far."""
    network, episode = workload.network(), workload.episode(None)
    meta_gradient = package("implicit", compile=compile)
    seconds, faults = [], []
    for _ in range(2 + repeats):
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
        meta_gradient(network, episode, workload.settings)
        seconds.append(time.perf_counter() - start)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # Linux gives KiB.
    return {"seconds": statistics.median(seconds[2:]), "faults": statistics.median(faults[2:]), "peak_mib": peak}


def one_process(side: str, name: str, compile: bool, repeats: int) -> dict[str, float]:
    """Measure one side in a process of its own."""
    options = ["--side", side, "--workload", name, "--repeats", str(repeats), *(["--compile"] if compile else [])]
    command = [sys.executable, "-m", "benchmarks.allocator", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(args: list[str] | None = None) -> list[Row]:
    """Run the comparison, print it and save it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="processes of each side")
    parser.add_argument("--repeats", type=int, default=5, help="meta-gradients a process")
    parser.add_argument(
        "--workloads", nargs="+", choices=WORKLOADS, default=["omniglot-5-1", "omniglot-20-1", "omniglot-20-5"]
    )
    parser.add_argument("--output", type=Path, default=Path("results"))
    one = parser.add_argument_group("one side, which the comparison starts")
    one.add_argument("--side", choices=SIDES)
    one.add_argument("--workload", choices=WORKLOADS)
    one.add_argument("--compile", action="store_true")
    options = parser.parse_args(args)
    if options.side:
        if options.side == "kept" and not keep_freed_memory():
            parser.error("it must be glibc's malloc, without settings of the user: unset MALLOC_* and GLIBC_TUNABLES")
        print(json.dumps(measure(WORKLOADS[options.workload], options.compile, options.repeats)))
        return []
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, Conv4-64, float32")
    print(f"{'':<15}{'':<10}{'default ms':>11}{'kept ms':>9}{'ratio':>7}{'faults':>9}{'kept':>6}{'MiB':>7}{'kept':>7}")
    rows: list[Row] = []
    for name in options.workloads:
        for compile in (False, True):
            runs: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
            for _ in range(options.rounds):
                for side in SIDES:
                    runs[side].append(one_process(side, name, compile, options.repeats))
            default, kept = ({key: statistics.median(run[key] for run in runs[side]) for key in runs[side][0]}
                             for side in SIDES)  # fmt: skip
            rows.append({
                "workload": name, "compiled": compile, "default_ms": round(1000 * default["seconds"], 1),
                "kept_ms": round(1000 * kept["seconds"], 1), "ratio": round(default["seconds"] / kept["seconds"], 2),
                "default_faults": round(default["faults"]), "kept_faults": round(kept["faults"]),
                "default_peak_mib": round(default["peak_mib"]), "kept_peak_mib": round(kept["peak_mib"]),
            })  # fmt: skip
            _, _, *numbers = rows[-1].values()
            widths = (11, 9, 7, 9, 6, 7, 7)
            line = "".join(f"{number:>{width}}" for number, width in zip(numbers, widths, strict=True))
            print(f"{name:<15}{'compiled' if compile else 'eager':<10}{line}", flush=True)
    options.output.mkdir(parents=True, exist_ok=True)
    save(rows, options.output / "allocator.csv")
    return rows


if __name__ == "__main__":
    main()
