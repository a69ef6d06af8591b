"""Few-shot classification tasks from any labelled dataset."""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import Dataset

from lightning_imaml.components.checks import require_choice
from lightning_imaml.data.base import TaskDataModule, Transform, require_range, split_setting
from lightning_imaml.data.items import Collate, Key
from lightning_imaml.data.labelled import ROTATIONS, ClassPool, shuffle_classes
from lightning_imaml.data.sampling import SPLITS, DrawnTasks, ImageTasks, Range, ShapeSource, bounds
from lightning_imaml.data.sampling.episode_list import ListedTasks, read_episodes, write_episodes

_SHARES = (0.64, 0.16, 0.20)  # of the classes: those of mini-ImageNet and CIFAR-FS
_SHOWN = 5  # how many of the offending classes an error names


class EpisodicDataModule(TaskDataModule):
    """Draws few-shot classification tasks from map-style datasets of ``(input, label)`` pairs, or of dicts by key.

    A task has N classes ("ways"), K support images ("shots") and Q query images of each. Every task is a function of
    the seed, the split and its number alone, whatever the number of loader workers or processes. Training draws fresh
    tasks for as long as it goes on, also after a resume in the middle of an epoch; validation and test see the same
    tasks each time. With W processes the tasks are shared out among them: ``tasks_per_batch`` is for one process.

    Where N, K or Q is a range ``(lowest, highest)``, it is drawn uniformly. All tasks of a training step have the same
    shape, drawn for the step; each task of an evaluation has its own, and tasks of the same shape come in one batch, so
    that nothing is ever padded. A network for a range of ways needs outputs for the highest, ``self.hparams.ways[1]``.

    Classes, not images, are what the splits must not share. From one dataset the classes are split in a fixed random
    order that does not depend on ``seed``, so that a checkpoint is never tested on classes that it was trained on. The
    classes of several datasets are checked by name, where the datasets have names (``classes``, or labels that are
    strings), and by number between subsets of one dataset, as ``random_split`` makes them; labels that are numbers
    cannot be compared between other datasets.

    Example:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> data = TensorDataset(torch.randn(600, 8), torch.arange(600) % 30)
        >>> episodes = EpisodicDataModule(data, ways=5, shots=1, queries=4, tasks_per_batch=2)
        >>> next(iter(episodes.train_dataloader())).query_inputs.shape
        torch.Size([2, 20, 8])

    Args:
        train: the labelled dataset to train on; without ``val`` and ``test`` its classes are split three ways.
        val: labelled dataset of the validation classes.
        test: labelled dataset of the test classes.
        ways: classes a task, N, or their range; likewise the next five.
        shots: support images a class, K.
        queries: query images a class, Q, in training.
        eval_ways: classes a task in validation and test; None for the same as ``ways``.
        eval_shots: support images a class in validation and test; None for the same as ``shots``.
        eval_queries: query images a class in validation and test; None for the same as ``queries``.
        tasks_per_batch: tasks a training batch of one process.
        batches_per_epoch: training batches an epoch.
        val_tasks: the number of validation tasks, over all processes.
        test_tasks: the number of test tasks, over all processes.
        eval_tasks_per_batch: at most so many tasks a batch in validation and test; None for ``tasks_per_batch``.
        episodes: a file of :meth:`save_episodes`; its tasks take the place of drawn ones in validation and test, for
            the splits that it holds.
        class_split: the shares of training, validation and test classes when only ``train`` is given.
        small_classes: what to do with a class that has too few images for a task: stop with an error that names it, or
            leave it out with a warning.
        rotations: whether in training each class turned by 90, 180 and 270 degrees is a class of its own.
        class_transforms: transforms under which each training class is one more class, by the name that its own gets:
            ``{"mirrored": torchvision.transforms.v2.functional.hflip}`` adds a class ``<class>/mirrored`` for each.
            They take samples ``[n, ...]``, keep their shape and draw no random numbers; :class:`Affine` is one.
        in_memory: whether to read all images of the given datasets once, and keep them as bytes.
        input_key: which part of an item is the input, where items are no pairs: the key of a dict, the place in a tuple
            (its first part, unless said), or several of these, which give a dict or a tuple of inputs.
        target_key: likewise the label.
        collate: makes a batch ``[n, ...]`` of the inputs of n items where they cannot be stacked as they are, such as
            ``functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)`` of sequences. It is called with the
            inputs of a whole batch of tasks. None for PyTorch's ``default_collate``.
        transform: applied to the inputs of every batch, on the device, see :class:`TaskDataModule`.
        train_transform: likewise, in training only and before ``transform``: random augmentation.
        seed: the seed of the episodes.
        num_workers: loader processes; 0 is best for data in memory.

    Raises:
        ValueError: an argument is out of its range; in :meth:`setup`, a split has too few classes, a class has too few
            images, or two splits share a class.
    """

    fixed_split = False
    """Whether the split of the classes belongs to the dataset, so that ``class_split`` has no place."""

    def __init__(
        self,
        train: Dataset[Any] | None = None,
        val: Dataset[Any] | None = None,
        test: Dataset[Any] | None = None,
        *,
        ways: Range = 5,
        shots: Range = 1,
        queries: Range = 15,
        eval_ways: Range | None = None,
        eval_shots: Range | None = None,
        eval_queries: Range | None = None,
        tasks_per_batch: int = 16,
        batches_per_epoch: int = 100,
        val_tasks: int = 160,
        test_tasks: int = 600,
        eval_tasks_per_batch: int | None = None,
        episodes: str | os.PathLike[str] | None = None,
        class_split: Sequence[float] = _SHARES,
        small_classes: Literal["raise", "skip"] = "raise",
        rotations: bool = False,
        class_transforms: Mapping[str, Transform] | None = None,
        in_memory: bool = False,
        input_key: Key | Sequence[Key] | None = None,
        target_key: Key | None = None,
        collate: Collate | None = None,
        transform: Transform | None = None,
        train_transform: Transform | None = None,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        # A plain string: hyperparameters go into checkpoints, which load only plain types by default.
        episodes = None if episodes is None else os.fspath(episodes)
        super().__init__(
            tasks_per_batch=tasks_per_batch,
            batches_per_epoch=batches_per_epoch,
            val_tasks=val_tasks,
            test_tasks=test_tasks,
            eval_tasks_per_batch=eval_tasks_per_batch,
            transform=transform,
            train_transform=train_transform,
            seed=seed,
            num_workers=num_workers,
        )
        for name, value, minimum in (
            ("ways", ways, 2),
            ("shots", shots, 1),
            ("queries", queries, 1),
            ("eval_ways", ways if eval_ways is None else eval_ways, 2),
            ("eval_shots", shots if eval_shots is None else eval_shots, 1),
            ("eval_queries", queries if eval_queries is None else eval_queries, 1),
        ):
            require_range(name, value, minimum)
        if len(class_split) != 3 or min(class_split) < 0 or abs(sum(class_split) - 1) > 1e-6:
            raise ValueError(
                "class_split must be three shares (train, val, test), none negative, with the sum 1; "
                f"found {tuple(class_split)}."
            )
        if self.fixed_split and tuple(class_split) != _SHARES:
            raise ValueError(
                f"class_split must be left out, since {type(self).__name__} has a split of its own; found "
                f"{tuple(class_split)}. For another split, pass the data to EpisodicDataModule."
            )
        require_choice("small_classes", small_classes, ("raise", "skip"))
        self.class_transforms = dict(class_transforms or {})
        if rotations and (twice := sorted(self.class_transforms.keys() & ROTATIONS.keys())):
            raise ValueError(
                f"class_transforms must have other names than the rotations {sorted(ROTATIONS)}; found {twice}. "
                "Rename them, or set rotations=False."
            )
        given: dict[str, Any] = {"input_key": input_key, "target_key": target_key, "collate": collate}
        named = [name for name, value in given.items() if value is not None]
        if named and train is val is test is None:
            raise ValueError(
                f"{named[0]} must come with a dataset that is passed; found none for {type(self).__name__}. Leave it "
                "out, or pass the dataset to EpisodicDataModule."
            )
        if collate is not None and in_memory:
            raise ValueError(
                "collate must be left out with in_memory=True, which keeps images of one size; found both. Set "
                "in_memory=False."
            )
        self._datasets, self._items = (train, val, test), given
        self._pools: dict[str, ClassPool] = {}
        self._lists: dict[str, ListedTasks] = {}

    def configure_splits(self) -> Mapping[str, ClassPool]:
        """Return the classes of each split that there is data for; the method to override for a dataset of one's own.

        Returns:
            "train", "val" and "test", or some of them, with a :class:`ClassPool` each.
        """
        given = {name: data for name, data in zip(SPLITS, self._datasets, strict=True) if data is not None}
        if not given:
            raise ValueError(
                "train, val or test must be a dataset of (input, label) pairs; found None for all three. "
                "Pass at least one, or use a data module that brings its own, such as GlyphDataModule."
            )
        pools = {name: self._usable(name, ClassPool.of(data, **self._items)) for name, data in given.items()}
        _require_disjoint(pools)  # In memory, it cannot be seen any more that two are subsets of one dataset.
        if self.hparams["in_memory"]:
            pools = {name: pool.in_memory() for name, pool in pools.items()}
        return self.split_by_class(pools["train"]) if list(pools) == ["train"] else pools

    def split_by_class(self, pool: ClassPool) -> dict[str, ClassPool]:
        """Share the classes of one pool out to the three splits, as ``class_split`` says; empty splits are left out."""
        pool = self._usable("train", pool)
        classes: list[Hashable] = shuffle_classes(list(pool.members))
        train, val, _ = self.hparams["class_split"]
        first, second = round(len(classes) * train), round(len(classes) * (train + val))
        parts = (classes[:first], classes[first:second], classes[second:])
        shares = zip(SPLITS, parts, self.hparams["class_split"], strict=True)
        return {name: pool.subset(part) for name, part, share in shares if share > 0}

    def setup(self, stage: str | None = None) -> None:
        """Find the classes and check that every task can be drawn; all splits at once, the first time only."""
        if self._pools:
            return
        pools = {name: self._usable(name, pool) for name, pool in self.configure_splits().items()}
        _require_disjoint(pools)
        transforms = (ROTATIONS if self.hparams["rotations"] else {}) | self.class_transforms
        if transforms and "train" in pools:
            pools["train"] = pools["train"].with_transformed(transforms)
        for name, pool in pools.items():
            self._check_pool(name, pool)
        if self.hparams["episodes"] is not None:
            self._lists = read_episodes(Path(self.hparams["episodes"]).expanduser(), pools)
        self._pools = pools

    def _largest(self, split: str) -> tuple[int, int, int]:
        """The largest ways, shots and queries of a split."""
        ways, shots, queries = (
            bounds(split_setting(self.hparams, split, name))[1] for name in ("ways", "shots", "queries")
        )
        return ways, shots, queries

    def _usable(self, split: str, pool: ClassPool) -> ClassPool:
        """Leave small classes out, if that is wanted."""
        _, shots, queries = self._largest(split)
        small = [label for label, items in pool.members.items() if len(items) < shots + queries]
        if not small or self.hparams["small_classes"] == "raise":
            return pool
        rank_zero_warn(
            f"{len(small)} of the {len(pool.members)} {split} classes are left out, since they have fewer than "
            f"{shots + queries} images: {_some(small)}."
        )
        return pool.subset([label for label in pool.members if label not in set(small)])

    def _check_pool(self, split: str, pool: ClassPool) -> None:
        ways, shots, queries = self._largest(split)
        if len(pool.members) < ways:
            raise ValueError(
                f"the {split} split must have at least {ways} classes (ways={ways}); found {len(pool.members)}. "
                "Lower ways, or give this split more classes."
            )
        short = {label: len(items) for label, items in pool.members.items() if len(items) < shots + queries}
        if short:
            found = _some([f"{label!r} with {count}" for label, count in short.items()], quote=False)
            raise ValueError(
                f"each {split} class must have at least shots + queries = {shots} + {queries} = {shots + queries} "
                f"images; found {len(short)} of {len(pool.members)} classes with fewer: {found}. "
                "Lower shots or queries, or leave these classes out with small_classes='skip'."
            )

    def tasks(self, split: str) -> ImageTasks | None:
        """The tasks of a split, listed in ``episodes`` or else drawn."""
        self.setup()  # so that a loader can also be had without a Trainer
        if split in self._lists:
            return self._lists[split]
        if split not in self._pools:
            return None
        ways, shots, queries = (split_setting(self.hparams, split, name) for name in ("ways", "shots", "queries"))
        shapes = ShapeSource(split, ways, shots, queries, self.hparams["seed"])
        return DrawnTasks(self._pools[split], split, shapes, self.hparams["seed"])

    def evaluation_tasks(self, split: str) -> int:
        """The number of tasks of "val" or "test": as many as ``episodes`` lists, or else ``<split>_tasks``."""
        return len(self._lists[split]) if split in self._lists else super().evaluation_tasks(split)

    def save_episodes(self, path: str | os.PathLike[str]) -> None:
        """Write the validation and test tasks to a JSON file, so that others can be tested on the very same.

        The file holds, for each task, the names of its classes and of its support and query images; where the dataset
        has no names for its images, their index in the dataset. Pass it as ``episodes`` to read it.

        Raises:
            ValueError: there are neither validation nor test classes.
        """
        tasks = {split: source for split in ("val", "test") if (source := self.tasks(split)) is not None}
        if not tasks:
            raise ValueError("there must be validation or test classes to save tasks of; found only train. Pass test.")
        written = {split: (source, self.evaluation_tasks(split)) for split, source in tasks.items()}
        write_episodes(Path(path).expanduser(), written)


def _require_disjoint(pools: Mapping[str, ClassPool]) -> None:
    """Raise a ValueError if two splits share a class."""
    for (name, pool), (other_name, other) in combinations(pools.items(), 2):
        if shared := pool.overlap(other):
            raise ValueError(
                f"{name} and {other_name} must not share classes; found {len(shared)} in both, "
                f"such as {_some(shared)}. Leave them out of one of the two, or pass a single dataset as `train` "
                "to have its classes split."
            )


def _some(found: Sequence[Any], quote: bool = True) -> str:
    """The first few of a list, in words."""
    shown = ", ".join(repr(item) if quote else str(item) for item in found[:_SHOWN])
    return shown if len(found) <= _SHOWN else f"{shown}, …"
