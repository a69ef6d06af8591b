"""The convolutions of a meta-gradient alone: a floor under eager code that calls them, and what it leaves possible.

Without a compiler, a meta-gradient with PyTorch's automatic differentiation calls PyTorch's convolutions, forward and
backward, as often as its inner steps and Hessian products need. Here these calls are recorded from the package, which
computes nothing twice, for several numbers of tasks at a time; each is timed alone, in a loop, with everything warm, in
both memory formats; the fastest of all is summed over the calls. Nothing else is in the sum: no normalisation, no
ReLU, no copies, no Python. A plain loop over tasks, timed in the same run, over this floor is more than any eager
implementation on these kernels can gain; one that convolves otherwise, by matrix products, has another floor. Beside it
stands what the same convolutions take within the package, as a profiler sees them: there, images and weights come from
other operations, not warm from the call before.
"""

from __future__ import annotations

import re
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.peers import sequential
from benchmarks.sides import Row, package, save
from benchmarks.workloads import WORKLOADS, Workload
from lightning_imaml import Episode

_CONVOLUTIONS = (torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default)


class Convolutions(TorchDispatchMode):
    """Count the calls of convolutions by their arguments.

    Attributes:
        calls: how often each; tensors are noted as their ``torch.Size``, lists as plain tuples.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[tuple[Any, ...]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note a call and make it."""
        if func in _CONVOLUTIONS:
            self.calls[(func, *map(_noted, args))] += 1
        return func(*args, **(kwargs or {}))


def _noted(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return argument.shape
    return tuple(argument) if isinstance(argument, list) else argument


def _argument(noted: Any, layout: torch.memory_format) -> Any:
    if isinstance(noted, torch.Size):
        return torch.rand(noted).contiguous(memory_format=layout if len(noted) == 4 else torch.contiguous_format)
    return list(noted) if isinstance(noted, tuple) else noted


def seconds(call: tuple[Any, ...]) -> float:
    """The shortest time of a call, in either memory format."""
    func, *noted = call
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        arguments = [_argument(each, layout) for each in noted]
        found.append(shortest(partial(func, *arguments)))
    return min(found)


def timed(work: Callable[[], object]) -> float:
    """The seconds of a piece of work."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def shortest(work: Callable[[], object]) -> float:
    """The shortest of the times that fit into 30 ms, ten or more."""
    work()
    times: list[float] = []
    while len(times) < 10 or sum(times) < 0.03:
        times.append(timed(work))
    return min(times)


def floor(workload: Workload, episode: Episode, chunk_sizes: Sequence[int]) -> float:
    """Seconds a task of convolutions alone, with the best of some numbers of tasks at a time."""
    found = []
    for size in chunk_sizes:
        with Convolutions() as noted:
            part = Episode(*(tensor[:size] for tensor in episode))
            package("implicit", chunk_size=size)(workload.network(), part, workload.settings)
        found.append(sum(count * seconds(call) for call, count in noted.calls.items()) / size)
    return min(found)


def within(workload: Workload, episode: Episode) -> float:
    """Seconds a task of convolutions within the package, as PyTorch's profiler sees them."""
    model, side = workload.network(), package("implicit")
    side(model, episode, workload.settings)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        side(model, episode, workload.settings)
    convolutions = (event for event in profiled.key_averages() if re.match("aten::.*convolution", event.key))
    return sum(event.self_cpu_time_total for event in convolutions) / 1e6 / episode.tasks


def run(names: Sequence[str], roots: dict[str, Path | None], repeats: int, output: Path) -> list[Row]:
    """Print and save the floor and the plain loop for some workloads."""
    rows: list[Row] = []
    for name in names:
        workload = WORKLOADS[name]
        episode, model = workload.episode(roots[workload.data]), workload.network()
        one = Episode(*(tensor[:1] for tensor in episode))
        sizes = [size for size in (1, 2, 4, 8, 16) if size <= workload.tasks]
        plain = partial(timed, partial(sequential.meta_gradient, model, one, workload.settings))
        plain()  # To warm up.
        # The machine's speed changes: half of the loop's times are taken before the floor, half after.
        loop = [plain() for _ in range(repeats)]
        convolutions = floor(workload, episode, sizes)
        inside = within(workload, episode)
        loop += [plain() for _ in range(repeats)]
        row: Row = {
            "workload": name,
            "plain_loop_ms_a_task": round(1e3 * statistics.median(loop), 2),
            "convolutions_ms_a_task": round(1e3 * convolutions, 2),
            "convolutions_within_the_package_ms_a_task": round(1e3 * inside, 2),
            "eager_gains_less_than": round(statistics.median(loop) / convolutions, 2),
        }
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        rows.append(row)
    save(rows, output / "kernels.csv")
    return rows
