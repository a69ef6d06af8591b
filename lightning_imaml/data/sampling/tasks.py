"""Which classes and which images make up a task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.random import PCG64, Generator, SeedSequence
from numpy.typing import NDArray
from torch.utils import _pytree as pytree

from lightning_imaml.data.labelled import ClassPool, gather
from lightning_imaml.episodes import Episode

SPLITS = ("train", "val", "test")

Range = int | tuple[int, int]
"""A whole number, or the lowest and the highest of those to draw from."""


class Shape(NamedTuple):
    """The shape of a task: N classes with K support and Q query samples each; for regression N is one."""

    ways: int
    shots: int
    queries: int


class TaskSource(ABC):
    """Tasks by number, each a function of its number alone."""

    @abstractmethod
    def shape(self, number: int) -> Shape:
        """The shape that belongs to a number."""

    @abstractmethod
    def episode(self, tasks: Sequence[int], shape: Shape) -> Episode:
        """Make tasks of one shape, stacked along the first dimension."""


def random_of(seed: int, split: str, number: int, key: tuple[int, ...] = ()) -> Generator:
    """The random generator of one task.

    NumPy promises the same bits for ever only for its bit generators and for uniform doubles, so nothing else of it may
    be used where numbers are to be the same on every platform (https://numpy.org/neps/nep-0019-rng-policy.html).

    Args:
        seed: the seed of the episodes.
        split: "train", "val" or "test".
        number: the number of the task.
        key: tells generators of the same task apart.
    """
    return Generator(PCG64(SeedSequence([seed, SPLITS.index(split), number], spawn_key=key)))


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


def bounds(value: Range) -> tuple[int, int]:
    """The lowest and the highest number of a range."""
    return (value, value) if isinstance(value, int) else (value[0], value[1])


class ShapeSource:
    """Draws the shape that belongs to a number, each dimension uniformly from its range.

    Args:
        split: "train", "val" or "test".
        ways: classes a task, N, or their range; likewise the others.
        shots: support samples a class, K.
        queries: query samples a class, Q.
        seed: the seed of the episodes.
    """

    def __init__(self, split: str, ways: Range, shots: Range, queries: Range, seed: int) -> None:
        self.split, self.seed = split, seed
        self.ranges = (bounds(ways), bounds(shots), bounds(queries))

    def __call__(self, number: int) -> Shape:
        """The shape of a number."""
        if all(low == high for low, high in self.ranges):
            return Shape(*(low for low, _ in self.ranges))
        uniforms = random_of(self.seed, self.split, number, key=(1,)).random(3).tolist()
        return Shape(*(low + int(u * (high - low + 1)) for u, (low, high) in zip(uniforms, self.ranges, strict=True)))


class ImageTasks(TaskSource):
    """Classification tasks made of items of a dataset.

    Args:
        pool: the classes and their dataset.
    """

    def __init__(self, pool: ClassPool) -> None:
        self.pool = pool
        self.members = list(pool.members.values())

    @abstractmethod
    def draw(self, task: int, shape: Shape) -> NDArray[np.int64]:
        """The items of one task.

        Returns:
            ``[N, K+Q]`` indices into the source: for each class its support images, then its query images.
        """

    def episode(self, tasks: Sequence[int], shape: Shape) -> Episode:
        """Inputs ``[T, N*K, ...]`` and ``[T, N*Q, ...]``, class by class, with their targets."""
        items = torch.from_numpy(np.stack([self.draw(task, shape) for task in tasks]))
        support, query = items[..., : shape.shots], items[..., shape.shots :]
        # One fetch for the whole batch, ordered so that both sets are contiguous views of its result.
        inputs = gather(self.pool.source, torch.cat([support.flatten(), query.flatten()]))
        count, split_at = len(items), support.numel()
        return Episode(
            pytree.tree_map(lambda x: x[:split_at].view(count, -1, *x.shape[1:]), inputs),
            _targets(count, shape.ways, shape.shots),
            pytree.tree_map(lambda x: x[split_at:].view(count, -1, *x.shape[1:]), inputs),
            _targets(count, shape.ways, shape.queries),
        )


class DrawnTasks(ImageTasks):
    """Classification tasks drawn at random: classes without replacement, then their images without replacement.

    Args:
        pool: the classes to draw from.
        split: "train", "val" or "test".
        shapes: gives the shape that belongs to a number.
        seed: the seed of the episodes.
    """

    def __init__(self, pool: ClassPool, split: str, shapes: ShapeSource, seed: int) -> None:
        super().__init__(pool)
        self.split, self.shapes, self.seed = split, shapes, seed

    def shape(self, number: int) -> Shape:
        """The shape that belongs to a number."""
        return self.shapes(number)

    def draw(self, task: int, shape: Shape) -> NDArray[np.int64]:
        """The items of one task, ``[N, K+Q]``."""
        random = random_of(self.seed, self.split, task)
        uniforms: list[list[float]] = random.random((shape.ways, 1 + shape.shots + shape.queries)).tolist()
        classes = draw_distinct([row[0] for row in uniforms], len(self.members))
        return np.stack(
            [
                self.members[label][draw_distinct(row[1:], len(self.members[label]))]
                for label, row in zip(classes, uniforms, strict=True)
            ]
        )


def _targets(tasks: int, ways: int, images: int) -> torch.Tensor:
    return torch.arange(ways).repeat_interleave(images).repeat(tasks, 1)
