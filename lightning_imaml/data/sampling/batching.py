"""Which tasks come together in a batch, and which process takes which batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Sized
from itertools import pairwise
from typing import Protocol

from torch.utils.data import Dataset, DistributedSampler

from lightning_imaml.data.sampling.tasks import Shape, TaskSource
from lightning_imaml.episodes import Episode

Batch = tuple[Sequence[int], Shape]
"""The numbers of tasks, and the shape that they share."""


class Batches(Protocol):
    """What an :class:`EpisodeDataset` asks for its batches."""

    def __len__(self) -> int:
        """The number of batches."""

    def __getitem__(self, batch: int) -> Batch:
        """Batch b."""


class EpisodeDataset(Dataset[Episode]):
    """A map-style dataset whose items are batches of tasks.

    Args:
        source: makes tasks.
        batches: says which tasks come together.
    """

    def __init__(self, source: TaskSource, batches: Batches) -> None:
        self.source, self.batches = source, batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, batch: int) -> Episode:
        """Return batch b."""
        return self.source.episode(*self.batches[batch])


class TrainingBatches:
    """The endless sequence of training batches; its length is that of one epoch.

    Batch b holds tasks ``b*T … (b+1)*T - 1``. With W processes, the W batches of one step share a shape, which is drawn
    by the number of the step: so their processes have the same work, and W processes draw what one would.

    Args:
        source: makes tasks.
        tasks: tasks a batch, T.
        batches: batches an epoch, of all processes together.
        world: the number of processes, W.
    """

    def __init__(self, source: TaskSource, tasks: int, batches: int, world: int) -> None:
        self.source, self.tasks, self.batches, self.world = source, tasks, batches, world

    def __len__(self) -> int:
        return self.batches

    def __getitem__(self, batch: int) -> Batch:
        return range(batch * self.tasks, (batch + 1) * self.tasks), self.source.shape(batch // self.world)


class EvaluationBatches:
    """A fixed number of tasks, those of the same shape batched together.

    The number of batches is a multiple of the number of processes, and none is empty: a process with one batch more
    would wait for the others for ever. So batches are nearly even, and where there are hardly more tasks than processes
    some batches hold more than ``per_batch``.

    Args:
        source: makes tasks.
        tasks: the number of tasks.
        per_batch: the number of tasks that a batch should not exceed.
        world: the number of processes.

    Raises:
        ValueError: there are so few tasks of so many shapes that they cannot be shared out.
    """

    def __init__(self, source: TaskSource, tasks: int, per_batch: int, world: int) -> None:
        groups: dict[Shape, list[int]] = {}
        for task in range(tasks):
            groups.setdefault(source.shape(task), []).append(task)
        shapes = sorted(groups)
        counts = _shared_out([len(groups[shape]) for shape in shapes], per_batch, world)
        if counts is None:
            raise ValueError(
                f"the evaluation's {tasks} tasks must be batches of one shape each, as many for each of {world} "
                f"processes; found {len(groups)} shapes. Raise the number of tasks, or evaluate with fewer devices."
            )
        self.batches: list[Batch] = []
        for shape, count in zip(shapes, counts, strict=True):
            group = groups[shape]
            edges = [len(group) * k // count for k in range(count + 1)]
            self.batches += [(group[a:b], shape) for a, b in pairwise(edges)]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, batch: int) -> Batch:
        return self.batches[batch]


def _shared_out(sizes: Sequence[int], per_batch: int, world: int) -> list[int] | None:
    """Into how many batches to cut groups of these sizes, so that the sum is a multiple of ``world``."""
    counts = [-(-size // per_batch) for size in sizes]
    total = sum(counts)
    most = sum(sizes) // world * world
    target = min(-(-total // world) * world, most)
    while total < target:  # cut the group with the largest batches once more
        largest = max(range(len(sizes)), key=lambda k: sizes[k] / counts[k] if counts[k] < sizes[k] else 0)
        counts[largest] += 1
        total += 1
    while total > target:  # join in the group with the smallest batches
        joined = [k for k in range(len(sizes)) if counts[k] > 1]
        if not joined:
            return None
        counts[min(joined, key=lambda k: sizes[k] / counts[k])] -= 1
        total -= 1
    return counts if target else None


class EndlessSampler(DistributedSampler[int]):
    """Numbers the batches of training from the first to the last step of a run, across epochs and resumes.

    With W processes, global batch g is made of the items ``g*W … (g+1)*W - 1`` of the dataset, one for each process:
    the same tasks as one process with W times the batch size would draw.

    A subclass of ``DistributedSampler``, because that is what Lightning takes to be sharded already and leaves alone.

    Args:
        dataset: the dataset of one epoch's batches, of all processes together.
        num_replicas: the number of processes, W.
        rank: which of them this is.
        batches_done: says how many global batches came before the pass that starts now; None for "as many as this
            sampler has numbered", which is right outside of a Trainer.
    """

    def __init__(self, dataset: Sized, *, num_replicas: int, rank: int, batches_done: Callable[[], int | None]) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, shuffle=False)  # type: ignore[arg-type]
        self.batches_done = batches_done
        self.numbered = 0

    def __iter__(self) -> Iterator[int]:
        # Asked once, when the first number is wanted: later, loader workers run ahead of the training step; earlier, a
        # loader with workers calls iter() twice for one pass.
        done = self.batches_done()
        first = self.numbered if done is None else done
        self.numbered = first + self.num_samples
        yield from range(first * self.num_replicas + self.rank, self.numbered * self.num_replicas, self.num_replicas)
