"""Tasks of learn2learn as episodes; learn2learn itself is not imported."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_imaml.data.base import TaskDataModule, require_whole
from lightning_imaml.data.sampling import SPLITS, Shape, TaskSource, random_of
from lightning_imaml.episodes import Episode


class TasksetTasks(TaskSource):
    """Tasks of a learn2learn ``Taskset``, each a function of (seed, split, number) alone.

    learn2learn draws from Python's global random generator, so two runs or two loader workers see other tasks there.
    Here the generators of Python, NumPy and PyTorch are seeded for each task, and put back.

    Args:
        taskset: a ``learn2learn.data.Taskset`` whose tasks have the same number of samples of each class.
        split: "train", "val" or "test".
        shots: support samples a class; the others are the query set.
        seed: the seed of the episodes.
    """

    def __init__(self, taskset: Any, split: str, shots: int, seed: int) -> None:
        self.taskset, self.split, self.shots, self.seed = taskset, split, shots, seed
        self._shape: Shape | None = None

    def shape(self, number: int) -> Shape:
        """The shape of all tasks: that of the first."""
        if self._shape is None:
            _, labels = self._sample(0)
            ways, counts = torch.unique(labels, return_counts=True)
            queries = int(counts.min()) - self.shots
            if queries < 1:
                raise ValueError(
                    f"shots must leave query samples of every class of a taskset; found shots={self.shots} and "
                    f"{int(counts.min())} samples of a class. Lower shots, or raise k of the taskset's KShots."
                )
            self._shape = Shape(len(ways), self.shots, queries)
        return self._shape

    def episode(self, tasks: Sequence[int], shape: Shape) -> Episode:
        """Classes in the order of their labels; of each, the first samples are the support set, as in learn2learn."""
        parts = [self._partition(task, shape) for task in tasks]
        inputs = torch.stack(parts).unflatten(1, (shape.ways, -1))  # type: ignore[no-untyped-call]
        classes = torch.arange(shape.ways)
        return Episode(
            inputs[:, :, : shape.shots].flatten(1, 2),
            classes.repeat_interleave(shape.shots).repeat(len(tasks), 1),
            inputs[:, :, shape.shots :].flatten(1, 2),
            classes.repeat_interleave(shape.queries).repeat(len(tasks), 1),
        )

    def _partition(self, task: int, shape: Shape) -> Tensor:
        """The samples of a task, class by class."""
        inputs, labels = self._sample(task)
        counts = torch.unique(labels, return_counts=True)[1].tolist()
        if counts != [shape.shots + shape.queries] * shape.ways:
            raise ValueError(
                f"all tasks of a taskset must have {shape.ways} classes with {shape.shots + shape.queries} samples, as "
                f"its first task has; found {counts} in task {task}. Use KShots with a fixed k, with replacement if "
                "classes are small."
            )
        return inputs[torch.argsort(labels, stable=True)]

    def _sample(self, task: int) -> tuple[Tensor, Tensor]:
        # A taskset of n tasks repeats them; one without end (-1) has a fresh one for each number.
        number = task % self.taskset.num_tasks if self.taskset.num_tasks > 0 else task
        # A uniform double has 53 random bits.
        drawn = int(float(random_of(self.seed, self.split, number).random()) * 2**53)
        state, of_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - what transforms draw from
        try:
            with torch.random.fork_rng(devices=[]):
                random.seed(drawn)
                np.random.seed(drawn % 2**32)  # noqa: NPY002
                torch.manual_seed(drawn)
                inputs, labels = self.taskset.get_task(self.taskset.sample_task_description())
        finally:
            random.setstate(state)
            np.random.set_state(of_numpy)  # noqa: NPY002
        return inputs, labels


class TasksetDataModule(TaskDataModule):
    """Draws the tasks of learn2learn's tasksets, such as those of ``learn2learn.vision.benchmarks.get_tasksets``.

    A taskset says by its own transforms (``NWays``, ``KShots``) how many classes and samples a task has; ``shots`` of
    each class become the support set and the others the query set, as ``learn2learn.data.partition_task`` does it.

    Args:
        train: the taskset to train on.
        val: the taskset of the validation tasks.
        test: the taskset of the test tasks.
        shots: support samples a class.
        **options: those of :class:`TaskDataModule`.

    Raises:
        TypeError: something else than a taskset was passed.
        ValueError: an argument is out of its range; when tasks are drawn, they differ in shape.
    """

    def __init__(self, train: Any = None, val: Any = None, test: Any = None, *, shots: int = 1, **options: Any) -> None:
        super().__init__(**options)
        require_whole("shots", shots, 1)
        given = {name: taskset for name, taskset in zip(SPLITS, (train, val, test), strict=True) if taskset is not None}
        for name, taskset in given.items():
            if not all(hasattr(taskset, part) for part in ("num_tasks", "get_task", "sample_task_description")):
                raise TypeError(
                    f"{name} must be a learn2learn Taskset; found {type(taskset).__name__}. For a dataset of "
                    "(input, label) pairs, use EpisodicDataModule."
                )
        if not given:
            raise ValueError("train, val or test must be a taskset; found None for all three. Pass at least one.")
        self._sources = {
            name: TasksetTasks(taskset, name, shots, self.hparams["seed"]) for name, taskset in given.items()
        }

    def tasks(self, split: str) -> TaskSource | None:
        """The tasks of a split."""
        return self._sources.get(split)
