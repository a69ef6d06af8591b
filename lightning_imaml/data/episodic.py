"""Few-shot episodes from any labelled dataset."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from itertools import combinations
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import distributed
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lightning_imaml.data.labelled import ClassPool, shuffle_classes
from lightning_imaml.data.sampling import SPLITS, EndlessSampler, EpisodeDataset
from lightning_imaml.episodes import Episode

_SHOWN = 5  # how many of the offending classes an error names


class EpisodeLoader(DataLoader[Episode]):
    """A data loader that tells Lightning that training can go on in the middle of an epoch.

    Lightning takes a loader with these two methods for a resumable one. There is nothing to save in them: the
    trainer's own count of batches, which is in every checkpoint, says where the sampler goes on.
    """

    def state_dict(self) -> dict[str, Any]:
        """Nothing: see the class."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing: see the class."""


class EpisodicDataModule(LightningDataModule):
    """Draws few-shot classification tasks from map-style datasets of ``(input, label)`` pairs.

    A task has N classes ("ways"), K support images ("shots") and Q query images of each. Every task is a function of
    the seed, the split and its number alone, whatever the number of loader workers or processes. Training draws fresh
    tasks for as long as it goes on, also after a resume in the middle of an epoch; validation and test see the same
    tasks each time. With W processes the tasks are shared out among them: ``tasks_per_batch`` is for one process.

    Classes, not images, are what the splits must not share. From one dataset the classes are split in a fixed random
    order that does not depend on ``seed``, so that a checkpoint is never tested on classes that it was trained on. The
    classes of several datasets are checked by name, where the datasets have names (``classes``, or labels that are
    strings); labels that are numbers cannot be compared between datasets.

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
        ways: classes a task, N.
        shots: support images a class, K.
        queries: query images a class, Q, in training.
        eval_shots: support images a class in validation and test; None for the same as ``shots``.
        eval_queries: query images a class in validation and test; None for the same as ``queries``.
        tasks_per_batch: tasks a training batch of one process.
        batches_per_epoch: training batches an epoch.
        val_tasks: the number of validation tasks, over all processes.
        test_tasks: the number of test tasks, over all processes.
        eval_tasks_per_batch: at most so many tasks a batch in validation and test; None for ``tasks_per_batch``.
        class_split: the shares of training, validation and test classes when only ``train`` is given.
        seed: the seed of the episodes.
        num_workers: loader processes; 0 is best for data in memory.

    Raises:
        ValueError: an argument is out of its range; in :meth:`setup`, a split has too few classes, a class has too few
            images, or two splits share a class.
    """

    def __init__(
        self,
        train: Dataset[Any] | None = None,
        val: Dataset[Any] | None = None,
        test: Dataset[Any] | None = None,
        *,
        ways: int = 5,
        shots: int = 1,
        queries: int = 15,
        eval_shots: int | None = None,
        eval_queries: int | None = None,
        tasks_per_batch: int = 16,
        batches_per_epoch: int = 100,
        val_tasks: int = 160,
        test_tasks: int = 600,
        eval_tasks_per_batch: int | None = None,
        class_split: Sequence[float] = (0.64, 0.16, 0.20),
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        for name, value, minimum in (
            ("ways", ways, 2),
            ("shots", shots, 1),
            ("queries", queries, 1),
            ("eval_shots", shots if eval_shots is None else eval_shots, 1),
            ("eval_queries", queries if eval_queries is None else eval_queries, 1),
            ("tasks_per_batch", tasks_per_batch, 1),
            ("batches_per_epoch", batches_per_epoch, 1),
            ("val_tasks", val_tasks, 1),
            ("test_tasks", test_tasks, 1),
            ("eval_tasks_per_batch", tasks_per_batch if eval_tasks_per_batch is None else eval_tasks_per_batch, 1),
            ("seed", seed, 0),
            ("num_workers", num_workers, 0),
        ):
            if not isinstance(value, int) or value < minimum:
                raise ValueError(f"{name} must be a whole number of at least {minimum}; found {value!r}.")
        if len(class_split) != 3 or min(class_split) < 0 or abs(sum(class_split) - 1) > 1e-6:
            raise ValueError(
                "class_split must be three shares (train, val, test), none negative, with the sum 1; "
                f"found {tuple(class_split)}."
            )
        self.save_hyperparameters(ignore=["train", "val", "test"])
        self._datasets = (train, val, test)
        self._pools: dict[str, ClassPool] = {}

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
        pools = {name: ClassPool.of(data) for name, data in given.items()}
        return self.split_by_class(pools["train"]) if list(pools) == ["train"] else pools

    def split_by_class(self, pool: ClassPool) -> dict[str, ClassPool]:
        """Share the classes of one pool out to the three splits, as ``class_split`` says; empty splits are left out."""
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
        pools = dict(self.configure_splits())
        for name, pool in pools.items():
            self._check_pool(name, pool)
        for (name, pool), (other_name, other) in combinations(pools.items(), 2):
            if shared := pool.overlap(other):
                raise ValueError(
                    f"{name} and {other_name} must not share classes; found {len(shared)} in both, "
                    f"such as {_some(shared)}. Leave them out of one of the two, or pass a single dataset as `train` "
                    "to have its classes split."
                )
        self._pools = pools

    def _images(self, split: str, name: str) -> int:
        """The ``shots`` or ``queries`` of a split's tasks."""
        of_evaluation = None if split == "train" else self.hparams[f"eval_{name}"]
        return int(self.hparams[name] if of_evaluation is None else of_evaluation)

    def _check_pool(self, split: str, pool: ClassPool) -> None:
        ways, shots, queries = self.hparams["ways"], self._images(split, "shots"), self._images(split, "queries")
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
                "Lower shots or queries, or leave these classes out."
            )

    def _pool(self, split: str) -> ClassPool:
        self.setup()  # so that a loader can also be had without a Trainer
        if split not in self._pools:
            raise ValueError(
                f"there must be classes for {split} to draw its tasks from; found only {', '.join(self._pools)}. "
                f"Pass `{split}`, or pass `train` alone to have its classes split."
            )
        return self._pools[split]

    def _processes(self) -> tuple[int, int]:
        """How many processes share the tasks, and which of them this is."""
        if self.trainer is not None:
            sharing = self.trainer.distributed_sampler_kwargs  # None where there is one process only
            return (sharing["num_replicas"], sharing["rank"]) if sharing else (1, 0)
        if distributed.is_available() and distributed.is_initialized():
            return distributed.get_world_size(), distributed.get_rank()
        return 1, 0

    def _batches_done(self) -> int | None:
        # `processed` and not `ready`: a batch that failed halfway is counted as ready and is run again on a resume.
        if self.trainer is None:
            return None
        done: int = self.trainer.fit_loop.epoch_loop.batch_progress.total.processed  # type: ignore[attr-defined]
        return done

    def _episodes(self, split: str, tasks: int, batches: int) -> EpisodeDataset:
        return EpisodeDataset(
            self._pool(split),
            split,
            ways=self.hparams["ways"],
            shots=self._images(split, "shots"),
            queries=self._images(split, "queries"),
            tasks=tasks,
            batches=batches,
            seed=self.hparams["seed"],
        )

    def _loader(self, episodes: EpisodeDataset, sampler: DistributedSampler[int]) -> EpisodeLoader:
        workers = self.hparams["num_workers"]
        return EpisodeLoader(
            episodes,
            batch_size=None,  # an item is a batch already
            sampler=sampler,
            num_workers=workers,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=workers > 0,
        )

    def train_dataloader(self) -> EpisodeLoader:
        """Batches of fresh training tasks, ``batches_per_epoch`` a pass."""
        world, rank = self._processes()
        batches = self.hparams["batches_per_epoch"] * world
        episodes = self._episodes("train", batches * self.hparams["tasks_per_batch"], batches)
        sampler = EndlessSampler(episodes, num_replicas=world, rank=rank, batches_done=self._batches_done)
        return self._loader(episodes, sampler)

    def _eval_dataloader(self, split: str) -> EpisodeLoader:
        (world, rank), tasks = self._processes(), self.hparams[f"{split}_tasks"]
        if tasks < world:
            raise ValueError(
                f"{split}_tasks must be at least the number of processes, {world}; found {tasks}. "
                f"Raise {split}_tasks, or evaluate with fewer devices."
            )
        per_batch = self.hparams["eval_tasks_per_batch"] or self.hparams["tasks_per_batch"]
        # The same number of batches for each process, none of them empty: a process with one more would wait for the
        # others for ever. So nearly even batches, and with one task a batch some may have to hold two.
        rounds = min(-(-tasks // (world * per_batch)), tasks // world)
        episodes = self._episodes(split, tasks, rounds * world)
        return self._loader(episodes, DistributedSampler(episodes, num_replicas=world, rank=rank, shuffle=False))

    def val_dataloader(self) -> EpisodeLoader | list[EpisodeLoader]:
        """The validation tasks, the same each time; an empty list when there are no validation classes."""
        self.setup()
        return self._eval_dataloader("val") if "val" in self._pools else []

    def test_dataloader(self) -> EpisodeLoader:
        """The test tasks, the same each time."""
        return self._eval_dataloader("test")

    def predict_dataloader(self) -> EpisodeLoader:
        """The test tasks."""
        return self._eval_dataloader("test")


def _some(found: Sequence[Any], quote: bool = True) -> str:
    """The first few of a list, in words."""
    shown = ", ".join(repr(item) if quote else str(item) for item in found[:_SHOWN])
    return shown if len(found) <= _SHOWN else f"{shown}, …"
