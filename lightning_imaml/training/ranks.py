"""Messages between the processes ("ranks") of a training."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, distributed

_PATIENCE = datetime.timedelta(seconds=30)


def numbers_of_all_ranks(trainer: Trainer, *numbers: float) -> list[list[float]]:
    """Every rank's numbers, rank by rank.

    Raises:
        RuntimeError: another rank does not answer.
    """
    if trainer.world_size == 1:  # No message, and no wait for the device in every step.
        return [list(numbers)]
    # By a sum: Lightning's all_gather warns of what PyTorch deprecates, and would be differentiable for nothing.
    table = torch.zeros(trainer.world_size, len(numbers), device=trainer.strategy.root_device)
    table[trainer.global_rank] = torch.tensor(numbers)
    with _all_running(trainer):  # Reading it, too: a backend that does not block tells of its errors only then.
        found: list[list[float]] = torch.as_tensor(trainer.strategy.reduce(table, reduce_op="sum")).tolist()
    return found


def sum_over_ranks(trainer: Trainer, mine: Tensor) -> Tensor:
    """The sum of every rank's tensor.

    Raises:
        RuntimeError: another rank does not answer.
    """
    with _all_running(trainer):
        return torch.as_tensor(trainer.strategy.reduce(mine, reduce_op="sum"))


@contextmanager
def _all_running(trainer: Trainer) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # Those of torch.distributed's backends are RuntimeErrors, DistBackendError too.
        raise RuntimeError(
            f"every rank must be running for a meta-step; rank {trainer.global_rank} of {trainer.world_size} lost "
            f"another one ({error}). That process has died or was killed: its own output, or the system's log of "
            "processes killed for memory, says why. Resume from the last checkpoint."
        ) from error


def open_gathering(trainer: Trainer) -> Any:
    """A group of all processes for :func:`gather`; None where there is only one. Call it on all ranks.

    A group of its own, over the CPU: a checkpoint may be saved where the ranks are at different places, after an error
    or in a signal handler, and a message there must not be taken for one of the training.
    """
    if trainer.world_size == 1 or not distributed.is_initialized() or not distributed.is_gloo_available():
        return None
    return distributed.new_group(backend="gloo", timeout=_PATIENCE)


def gather(trainer: Trainer, group: Any, mine: dict[str, Any]) -> list[dict[str, Any]] | None:
    """Every rank's object on rank zero, an empty list on the others.

    Returns:
        None where not all ranks answer within half a minute.
    """
    if trainer.world_size == 1:
        return [mine]
    if group is None:
        return None
    found: list[Any] = [None] * trainer.world_size if trainer.is_global_zero else []
    try:
        distributed.monitored_barrier(group, timeout=_PATIENCE)
        distributed.gather_object(mine, found if trainer.is_global_zero else None, dst=0, group=group)
    except RuntimeError:
        return None
    return found
