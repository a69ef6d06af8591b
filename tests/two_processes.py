"""What test_several_devices.py runs on one process and on two; rank r leaves its results in ``<folder>/of<W>-<r>.pt``.

python two_processes.py FOLDER
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_imaml import Episode, IMAMLModule
from lightning_imaml.callbacks import AdaptationCurve, MetaGradientErrorMonitor, PeakMemoryMonitor
from lightning_imaml.curvature import GaussNewton
from lightning_imaml.data import EpisodicDataModule
from lightning_imaml.inner import GradientDescent
from lightning_imaml.linear import ConjugateGradient, Direct
from lightning_imaml.meta_gradients import FirstOrder, Implicit, Reptile, Truncated, Unrolled
from lightning_imaml.regularizers import Proximal
from lightning_imaml.training.outer_step import OuterStep

LEARNED = {"regularizer": Proximal(0.5, learned=True), "regularizer_lr": 0.05}
METHODS: dict[str, dict[str, Any]] = {
    "Hessian": {"estimator": Implicit(ConjugateGradient(5))},
    "Gauss-Newton": {"estimator": Implicit(ConjugateGradient(5), GaussNewton())},
    "direct": {"estimator": Implicit(Direct())},
    "first order": {"estimator": FirstOrder()},
    "Reptile": {"estimator": Reptile()},
    "unrolled": {"estimator": Unrolled()},
    "truncated": {"estimator": Truncated(2)},
    "implicit, learned strength": {"estimator": Implicit(ConjugateGradient(5), GaussNewton()), **LEARNED},
    "unrolled, learned strength": {"estimator": Unrolled(), **LEARNED},
    "implicit, a strength for each weight of the head": {
        "estimator": Implicit(ConjugateGradient(5), GaussNewton()),
        "adapt_only": ["2.*"],
        **LEARNED,
        "regularizer": Proximal(0.5, learned=True, per="parameter"),
    },
    "unrolled, learned step sizes": {
        "estimator": Unrolled(),
        "inner_solver": GradientDescent(0.1, 4, learned=True, per="layer"),
        **LEARNED,
    },
    "accumulated and clipped": {"accumulate_meta_batches": 2, "gradient_clip_val": 0.05},
}


def torchrun(rank: int, processes: int, port: str, **others: str) -> dict[str, str]:
    """The environment that torchrun gives to a process of one node."""
    return {
        "TORCHELASTIC_RUN_ID": "test", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(processes),
        "RANK": str(rank), "GROUP_RANK": "0", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(processes), **others,
    }  # fmt: skip


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def forked(processes: int, run: Callable[[], None]) -> list[int]:
    """Run something on each rank, as torchrun would, and return the exit codes (negative: the signal).

    The ranks are forks of this process, for a process that imports PyTorch anew takes longer than most of the runs.
    """
    children, port = [], free_port()
    for number in range(processes):
        child = os.fork()
        if not child:
            code = 1
            try:
                if processes > 1:
                    os.environ |= torchrun(number, processes, port)
                run()
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def module(**settings: Any) -> IMAMLModule:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    defaults = {"backbone": network, "inner_solver": GradientDescent(0.1, 4), "regularizer": Proximal(0.5)}
    return IMAMLModule(**defaults | settings)


def data(tasks: int, **settings: Any) -> EpisodicDataModule:
    """Classes apart by their mean, in float64."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(800) % 40
    centres = torch.randn(40, 4, generator=generator, dtype=torch.float64)
    inputs = centres[labels] + 0.5 * torch.randn(800, 4, generator=generator, dtype=torch.float64)
    sizes = {"ways": 3, "shots": 2, "queries": 3, "batches_per_epoch": 20, "val_tasks": 7, "test_tasks": 7}
    return EpisodicDataModule(TensorDataset(inputs, labels), tasks_per_batch=tasks, **sizes | settings)


def trainer(processes: int, *callbacks: Any, **settings: Any) -> Trainer:
    strategy = DDPStrategy(process_group_backend="gloo") if processes > 1 else "auto"
    defaults = {
        "max_epochs": 1, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
        "enable_model_summary": False, "log_every_n_steps": 1, "limit_val_batches": 0,
    }  # fmt: skip
    options = {"accelerator": "cpu", "devices": processes, "strategy": strategy, "callbacks": list(callbacks)}
    return Trainer(**defaults | options | settings)


def weights(model: nn.Module) -> torch.Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


def episodes(tasks: list[int], bad: tuple[int, ...] = ()) -> Episode:
    """Tasks that are a function of their number; the bad ones hold a NaN."""

    def draw(task: int, samples: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(1000 * task + samples)
        inputs = torch.randn(samples, 4, generator=generator, dtype=torch.float64)
        return inputs + (torch.nan if task in bad else 0), torch.arange(samples) % 3

    support, query = zip(*[draw(t, 6) for t in tasks], strict=True), zip(*[draw(t, 9) for t in tasks], strict=True)
    (xs, ys), (xq, yq) = support, query
    return Episode(torch.stack(xs), torch.stack(ys), torch.stack(xq), torch.stack(yq))


def batches(shares: list[list[int]], bad: tuple[int, ...] = ()) -> DataLoader[Any]:
    """One list of task numbers for each batch, for this rank."""
    return DataLoader([episodes(share, bad) for share in shares], batch_size=None)


def methods(processes: int) -> dict[str, torch.Tensor]:
    found = {}
    for name, settings in METHODS.items():
        model = module(**settings)
        tasks = 16 // processes // settings.get("accumulate_meta_batches", 1)
        steps = {"max_epochs": 2, "max_steps": 20}
        trainer(processes, **steps).fit(model, datamodule=data(tasks))
        found[name] = weights(model)
    return found


def without_all_reduce(processes: int) -> torch.Tensor:
    """What the comparison finds if the gradients are not averaged."""
    accumulate = OuterStep.accumulate

    def alone(self: Any, surrogate: Any, tasks: int, counts: list[int], due: bool) -> None:
        with self.trainer.strategy.block_backward_sync():
            accumulate(self, surrogate, tasks, counts, due)

    model = module(**METHODS["first order"])
    try:
        if processes > 1:
            OuterStep.accumulate = alone  # type: ignore[method-assign]
        trainer(processes, max_steps=20).fit(model, datamodule=data(16 // processes))
    finally:
        OuterStep.accumulate = accumulate  # type: ignore[method-assign]
    return weights(model)


def metrics(processes: int) -> dict[str, float]:
    """Seven validation tasks: one rank has more than the other, in batches of unequal size."""
    run = trainer(processes, max_steps=3, limit_val_batches=1.0, use_distributed_sampler=True)
    run.fit(module(), datamodule=data(16 // processes, eval_tasks_per_batch=2, batches_per_epoch=3))
    names = ("train/", "val/")
    return {k: float(v) for k, v in run.callback_metrics.items() if k.startswith(names)}


def monitors(processes: int) -> dict[str, float]:
    error = MetaGradientErrorMonitor(every_n_steps=1, tasks=2)
    run = trainer(processes, error, PeakMemoryMonitor(every_n_steps=1), max_steps=2)
    run.fit(module(), datamodule=data(4))
    return {k: float(v) for k, v in run.callback_metrics.items() if k.startswith(("meta_gradient/", "memory/"))}


def curve(processes: int, folder: Path) -> dict[str, float]:
    """Seven test tasks through the callback that adapts them anew."""
    run = trainer(processes, AdaptationCurve([0, 2, 9]), default_root_dir=folder / f"of{processes}")
    return dict(run.test(module(), datamodule=data(16 // processes, eval_tasks_per_batch=2), verbose=False)[0])


def skipped(processes: int) -> torch.Tensor:
    """Task 2 is bad, then 4 and 5, a rank's whole batch, then all of a meta-step."""
    shares = [[[0, 1], [2, 3]], [[4, 5], [6, 7]], [[8, 9], [10, 11]], [[12, 13], [14, 15]]]
    mine = [share[rank()] if processes > 1 else [*share[0], *share[1]] for share in shares]
    bad = (2, 4, 5, 8, 9, 10, 11)
    if processes == 1:  # What it must equal, without the code under test.
        mine = [kept for share in mine if (kept := [task for task in share if task not in bad])]
    model = module(on_bad_task="skip")
    run = trainer(processes, use_distributed_sampler=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.fit(model, batches(mine, bad if processes > 1 else ()))
    assert run.global_step == 3, run.global_step
    WARNED[:] = [str(each.message) for each in caught if "left out of the meta-gradient" in str(each.message)]
    return weights(model)


WARNED: list[str] = []


def uneven_batch(processes: int) -> torch.Tensor:
    """Rank 0 has three tasks in its last batch, rank 1 has one."""
    shares = [[[0, 1], [2, 3]], [[4, 5, 6], [7]]]
    mine = [share[rank()] if processes > 1 else [*share[0], *share[1]] for share in shares]
    model = module()
    trainer(processes, use_distributed_sampler=False).fit(model, batches(mine))
    return weights(model)


def skipped_in_long_steps(processes: int) -> torch.Tensor:
    """As above with two batches a meta-step, which are not of the same number of sound tasks; one is left over."""
    shares = [[[0, 1], [2, 3]], [[4, 5], [6, 7]], [[8, 9], [10, 11]], [[12, 13], [14, 15]], [[16, 17], [18, 19]]]
    bad = (2, 4, 5, 8, 9, 10, 11, 19)
    model = module(on_bad_task="skip", accumulate_meta_batches=2 if processes > 1 else 1)
    if processes == 1:  # Each meta-step's tasks in one batch.
        tasks = [[task for part in shares[k : k + 2] for share in part for task in share] for k in (0, 2, 4)]
        data = batches([[task for task in step if task not in bad] for step in tasks])
    else:
        data = batches([share[rank()] for share in shares], bad)
    run = trainer(processes, use_distributed_sampler=False)
    run.fit(model, data)
    assert run.global_step == 3, run.global_step
    return weights(model)


def uneven_evaluation(processes: int) -> dict[str, float]:
    shares = [[[0, 1], [2], [3, 4, 5]], [[6, 7]]]
    mine = shares[rank()] if processes > 1 else [*shares[0], *shares[1]]
    run = trainer(processes, use_distributed_sampler=False, limit_val_batches=1.0)
    return dict(run.validate(module(), batches(mine), verbose=False)[0])


def several_loaders(processes: int) -> dict[str, float]:
    """Two loaders of unequal length, with a sanity check, validation in a fit and a test; the ranks' tasks differ."""
    shares = [([[0, 1], [2]], [[3, 4, 5]]), ([[6, 7], [8]], [[9]])]

    def loaders() -> list[DataLoader[Any]]:
        return [batches(shares[rank()][k] if processes > 1 else [*shares[0][k], *shares[1][k]]) for k in range(2)]

    run = trainer(processes, use_distributed_sampler=False, limit_val_batches=1.0, max_steps=2)
    model = module()
    run.fit(model, batches([[20 + rank()], [22 + rank()]] if processes > 1 else [[20, 21], [22, 23]]), loaders())
    validated = {name: float(value) for name, value in run.callback_metrics.items() if name.startswith("val/")}
    for tested in run.test(model, loaders(), verbose=False):
        validated |= tested
    return validated


def predicted(processes: int) -> list[Any]:
    """What a writer is told of: the batches' numbers with their predictions."""
    writer = Written("epoch")
    trainer(processes, writer).predict(module(), datamodule=data(2, test_tasks=8), return_predictions=False)
    return writer.written


class Written(BasePredictionWriter):
    """Keeps what it is told."""

    def write_on_epoch_end(self, trainer: Any, pl_module: Any, predictions: Any, batch_indices: Any) -> None:
        """Keep the numbers and the predictions of all batches."""
        self.written = list(zip(*batch_indices, predictions, strict=True))


def error_of(run: Any, *args: Any, **settings: Any) -> str:
    try:
        run(*args, **settings)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def main(folder: Path, processes: int) -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found: dict[str, Any] = {
        "methods": methods(processes),
        "without all-reduce": without_all_reduce(processes),
        "metrics": metrics(processes),
        "monitors": monitors(processes),
        "curve": curve(processes, folder),
        "skipped": skipped(processes),
        "warned": WARNED,
        "uneven evaluation": uneven_evaluation(processes),
        "several loaders": several_loaders(processes),
        "predicted": predicted(processes),
        "uneven batch": uneven_batch(processes),
        "skipped in long steps": skipped_in_long_steps(processes),
    }
    if processes > 1:
        bad = batches([[0, 1], [2, 3]], (3,) if rank() else ())
        found["raised"] = error_of(trainer(processes, use_distributed_sampler=False).fit, module(), bad)
        unequal = batches([[0]] * (3 + rank()))
        found["unequal"] = error_of(trainer(processes, use_distributed_sampler=False).fit, module(), unequal)
    torch.save(found, folder / f"of{processes}-{rank()}.pt")


if __name__ == "__main__":
    for count in (1, 2):
        codes = forked(count, lambda count=count: main(Path(sys.argv[1]), count))  # type: ignore[misc]
        assert codes == [0] * count, codes
