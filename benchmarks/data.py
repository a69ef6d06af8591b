"""How fast episodes are ready and served, against how fast training uses them up; both in one process.

A meta-step is that of the paper's network, with few inner steps, so that training is as hungry as it gets: more steps
make the ratios larger. Serving is timed in this process (no loader workers), one batch after the other. On CPU both run
in one thread and are measured in CPU seconds, which other work on the machine does not change; on a GPU, wall time.

    python -m benchmarks.data --omniglot PATH --mini-imagenet PATH [--device cuda] [--compile]
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.utils import _pytree as pytree

from lightning_imaml.curvature import GaussNewton
from lightning_imaml.data import EpisodicDataModule, MiniImageNetDataModule, OmniglotDataModule
from lightning_imaml.functional import meta_gradient
from lightning_imaml.inner import GradientDescent
from lightning_imaml.linear import ConjugateGradient
from lightning_imaml.meta_gradients import Implicit
from lightning_imaml.models import Conv4
from lightning_imaml.regularizers import Proximal

Clock = Callable[[], float]


def seconds(work: Callable[[], object], repeats: int, clock: Clock) -> float:
    """The median time of a piece of work, after one run to warm up."""
    work()
    times = []
    for _ in range(repeats):
        start = clock()
        work()
        times.append(clock() - start)
    return statistics.median(times)


def set_up(name: str, make: Callable[[], EpisodicDataModule], cache: Path) -> EpisodicDataModule:
    """Set a data module up with an empty cache and with a full one, and print how long both took."""
    os.environ["XDG_CACHE_HOME"] = str(cache)
    for when in ("the first time", "from the cache"):
        wall, cpu = time.perf_counter(), time.process_time()
        data = make()
        data.setup()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        print(f"{name}: ready {when} in {wall:.2f} s, {cpu:.2f} s of CPU", flush=True)
    return data


def compare(name: str, data: EpisodicDataModule, model: nn.Module, options: argparse.Namespace) -> float:
    """Print how many batches a second are served and used; gives the ratio."""
    batches = iter(data.train_dataloader())
    clock = time.process_time if options.device == "cpu" else time.perf_counter
    serving = seconds(lambda: next(batches), 20 * options.repeats, clock)
    device = torch.device(options.device)
    episode = pytree.tree_map(lambda tensor: tensor.to(device), next(batches))
    model = model.to(device)

    def step() -> None:
        result = meta_gradient(
            model,
            episode,
            inner_solver=GradientDescent(lr=0.1, steps=options.steps),
            estimator=Implicit(ConjugateGradient(max_iter=options.cg_steps), GaussNewton()),
            regularizer=Proximal(0.5),
            compile=options.compile,
        )
        result.loss.sum().item()  # waits for the device

    using = seconds(step, options.repeats, clock)
    tasks = episode.tasks
    print(
        f"{name}: {tasks / serving:.0f} tasks a second served, {tasks / using:.1f} used by training: "
        f"{using / serving:.0f} times as fast ({1e3 * serving:.1f} and {1e3 * using:.0f} ms a batch of {tasks})"
    )
    return using / serving


def links(root: Path, folder: Path) -> Path:
    """A folder with links to what is in ``root``, so that no cache lies beside the data."""
    folder.mkdir()
    for entry in root.resolve().iterdir():
        if entry.suffix != ".npz":
            (folder / entry.name).symlink_to(entry)
    folder.chmod(0o555)
    return folder


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--omniglot", type=Path, help="the folder of Omniglot")
    parser.add_argument("--mini-imagenet", type=Path, help="the folder of mini-ImageNet")
    parser.add_argument("--steps", type=int, default=5, help="inner gradient steps")
    parser.add_argument("--cg-steps", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu", help="where training runs")
    parser.add_argument("--compile", action="store_true", help="train compiled")
    options = parser.parse_args()
    if options.omniglot is None and options.mini_imagenet is None:
        parser.error("give the folder of at least one dataset")
    if options.device == "cpu":
        torch.set_num_threads(1)
    print(
        f"{torch.get_num_threads()} threads, training on {options.device}, {options.steps} GD steps, "
        f"{options.cg_steps} CG steps, {'compiled' if options.compile else 'eager'}, torch {torch.__version__}"
    )
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        if options.omniglot is not None:
            root = links(options.omniglot, place / "omniglot")
            settings = {"ways": 5, "shots": 1, "queries": 1, "tasks_per_batch": 16, "batches_per_epoch": 10_000}
            data = set_up("Omniglot, 32,460 images", lambda: OmniglotDataModule(root, **settings), place)
            compare("Omniglot 5-way 1-shot, 1 query, Conv4-64", data, Conv4(5), options)
        if options.mini_imagenet is not None:
            root = links(options.mini_imagenet, place / "mini-imagenet")
            settings = {"ways": 5, "shots": 5, "queries": 15, "tasks_per_batch": 4, "batches_per_epoch": 10_000}
            data = set_up("mini-ImageNet", lambda: MiniImageNetDataModule(root, **settings), place)
            model = Conv4(5, channels=3, filters=32, image_size=84, downsampling="max-pool")
            compare("mini-ImageNet 5-way 5-shot, 15 queries, Conv4-32", data, model, options)


if __name__ == "__main__":
    main()
