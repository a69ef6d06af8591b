"""Which classes and which images make up an episode."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sized

import numpy as np
import torch
from numpy.random import PCG64, Generator, SeedSequence
from numpy.typing import NDArray
from torch.utils import _pytree as pytree
from torch.utils.data import Dataset, DistributedSampler

from lightning_imaml.data.labelled import ClassPool, gather
from lightning_imaml.episodes import Episode

SPLITS = ("train", "val", "test")


def draw_distinct(uniforms: list[float], size: int) -> list[int]:
    """Turn k uniform numbers of [0, 1) into k distinct integers of ``0 … size-1``.

    The first k steps of a Fisher-Yates shuffle (Knuth, The Art of Computer Programming, vol. 2, algorithm P), with
    the positions that were swapped kept in a dict, so that the cost does not grow with ``size``.
    """
    moved: dict[int, int] = {}
    chosen = []
    for step, uniform in enumerate(uniforms):
        pick = step + int(uniform * (size - step))
        chosen.append(moved.get(pick, pick))
        moved[pick] = moved.get(step, step)
    return chosen


class EpisodeDataset(Dataset[Episode]):
    """A map-style dataset whose items are batches of tasks.

    Task i of a split is a function of (seed, split, i) and of nothing else. NumPy promises the same bits for ever only
    for its bit generators and for uniform doubles, so nothing else of its random module is used here
    (https://numpy.org/neps/nep-0019-rng-policy.html).

    Item b holds the tasks ``b*tasks // batches … (b+1)*tasks // batches - 1``: the first ``batches`` items share
    ``tasks`` tasks out as evenly as possible, and the items after them go on with fresh tasks without end.

    Args:
        pool: the classes to draw from.
        split: "train", "val" or "test".
        ways: classes a task, N.
        shots: support images a class, K.
        queries: query images a class, Q.
        tasks: the number of tasks in the first ``batches`` items.
        batches: the length of the dataset.
        seed: the seed of the episodes.
    """

    def __init__(
        self,
        pool: ClassPool,
        split: str,
        *,
        ways: int,
        shots: int,
        queries: int,
        tasks: int,
        batches: int,
        seed: int,
    ) -> None:
        self.source = pool.source
        self.members = list(pool.members.values())
        self.ways = ways
        self.shots = shots
        self.queries = queries
        self.tasks = tasks
        self.batches = batches
        self.entropy = (seed, SPLITS.index(split))

    def __len__(self) -> int:
        return self.batches

    def __getitem__(self, batch: int) -> Episode:
        """Return batch b: inputs ``[T, N*K, ...]`` and ``[T, N*Q, ...]``, class by class, with their targets."""
        first, end = (edge * self.tasks // self.batches for edge in (batch, batch + 1))
        items = torch.from_numpy(np.stack([self.draw(task) for task in range(first, end)]))
        support, query = items[..., : self.shots], items[..., self.shots :]
        # One fetch for the whole batch, ordered so that both sets are contiguous views of its result.
        inputs = gather(self.source, torch.cat([support.flatten(), query.flatten()]))
        tasks, split_at = len(items), support.numel()
        return Episode(
            pytree.tree_map(lambda x: x[:split_at].view(tasks, -1, *x.shape[1:]), inputs),
            self._targets(tasks, self.shots),
            pytree.tree_map(lambda x: x[split_at:].view(tasks, -1, *x.shape[1:]), inputs),
            self._targets(tasks, self.queries),
        )

    def draw(self, task: int) -> NDArray[np.int64]:
        """The items of one task.

        Returns:
            ``[N, K+Q]`` indices into the source: for each class its support images, then its query images.
        """
        images = self.shots + self.queries
        random = Generator(PCG64(SeedSequence([*self.entropy, task])))
        uniforms: list[list[float]] = random.random((self.ways, 1 + images)).tolist()
        classes = draw_distinct([row[0] for row in uniforms], len(self.members))
        return np.stack(
            [
                self.members[label][draw_distinct(row[1:], len(self.members[label]))]
                for label, row in zip(classes, uniforms, strict=True)
            ]
        )

    def _targets(self, tasks: int, images: int) -> torch.Tensor:
        return torch.arange(self.ways).repeat_interleave(images).repeat(tasks, 1)


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
