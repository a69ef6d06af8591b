"""The loaders that every data module of episodes has."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor, distributed, nn
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, DistributedSampler

from lightning_imaml.data.sampling import SPLITS, Range, TaskSource, random_of
from lightning_imaml.data.sampling.batching import EndlessSampler, EpisodeDataset, EvaluationBatches, TrainingBatches
from lightning_imaml.episodes import Episode
from lightning_imaml.training.hyperparameters import PlainHyperparameters, without_configs

# The module is named apart so that the command line takes one by its class path, such as torchvision's transforms.
Transform = nn.Module | Callable[[Tensor], Tensor]
"""Takes samples ``[n, ...]`` and gives as many."""


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


class TaskDataModule(PlainHyperparameters, LightningDataModule):
    """The base of all data modules here: loaders of endless training tasks and of fixed evaluation tasks.

    A subclass says in :meth:`tasks` where the tasks of a split come from.

    Args:
        tasks_per_batch: tasks a training batch of one process.
        batches_per_epoch: training batches an epoch.
        val_tasks: the number of validation tasks, over all processes.
        test_tasks: the number of test tasks, over all processes.
        eval_tasks_per_batch: at most so many tasks a batch in validation and test; None for ``tasks_per_batch``.
        transform: applied to the inputs of every batch, on the device of the training: ``[n, ...]`` for the support
            samples of all tasks of a batch, then likewise for the query samples. It is called by the Trainer only.
        train_transform: likewise, in training only and before ``transform``. What it draws from PyTorch's random
            generator depends on ``seed`` and on the number of the batch alone; see :class:`RandomAffine`, which
            takes whole batches, and :class:`PerSample`.
        seed: the seed of the episodes.
        num_workers: loader processes; 0 is best for data in memory.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        *,
        tasks_per_batch: int = 16,
        batches_per_epoch: int = 100,
        val_tasks: int = 160,
        test_tasks: int = 600,
        eval_tasks_per_batch: int | None = None,
        transform: Transform | None = None,
        train_transform: Transform | None = None,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        per_batch = tasks_per_batch if eval_tasks_per_batch is None else eval_tasks_per_batch
        require_whole("tasks_per_batch", tasks_per_batch, 1)
        require_whole("batches_per_epoch", batches_per_epoch, 1)
        require_whole("val_tasks", val_tasks, 1)
        require_whole("test_tasks", test_tasks, 1)
        require_whole("eval_tasks_per_batch", per_batch, 1)
        require_whole("seed", seed, 0)
        require_whole("num_workers", num_workers, 0)
        # Datasets and functions are code, and no hyper-parameters of a checkpoint.
        self.save_hyperparameters(ignore=[*SPLITS, "transform", "train_transform", "class_transforms", "collate"])
        self.transform, self.train_transform = transform, train_transform
        if transform is not None or train_transform is not None:
            # Only where it has something to do: Lightning would prefer it to the same hook of a person's own module.
            self.on_after_batch_transfer = self._apply_transforms  # type: ignore[method-assign]

    @abstractmethod
    def tasks(self, split: str) -> TaskSource | None:
        """Where the tasks of "train", "val" or "test" come from; None for a split without data."""

    def evaluation_tasks(self, split: str) -> int:
        """The number of tasks of "val" or "test", over all processes."""
        return int(self.hparams[f"{split}_tasks"])

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

    def _loader(
        self, episodes: EpisodeDataset, sampler: DistributedSampler[int], numbered: bool = False
    ) -> EpisodeLoader:
        workers = self.hparams["num_workers"]
        return EpisodeLoader(
            episodes,
            # An item is a batch already. Lightning follows the numbers of items of loaders that join them only.
            batch_size=1 if numbered else None,
            collate_fn=_only if numbered else None,
            sampler=sampler,
            num_workers=workers,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=workers > 0,
        )

    def _source(self, split: str) -> TaskSource:
        source = self.tasks(split)
        if source is None:
            found = [name for name in SPLITS if self.tasks(name) is not None]
            raise ValueError(
                f"there must be classes for {split} to draw its tasks from; found only {', '.join(found)}. "
                f"Pass `{split}`, or pass `train` alone to have its classes split."
            )
        return source

    def train_dataloader(self) -> EpisodeLoader:
        """Batches of fresh training tasks, ``batches_per_epoch`` a pass."""
        (world, rank), source = self._processes(), self._source("train")
        batches = self.hparams["batches_per_epoch"] * world
        episodes = EpisodeDataset(source, TrainingBatches(source, self.hparams["tasks_per_batch"], batches, world))
        sampler = EndlessSampler(episodes, num_replicas=world, rank=rank, batches_done=self._batches_done)
        return self._loader(episodes, sampler)

    def _eval_dataloader(self, split: str, numbered: bool = False) -> EpisodeLoader:
        (world, rank), source, tasks = self._processes(), self._source(split), self.evaluation_tasks(split)
        if tasks < world:
            raise ValueError(
                f"{split}_tasks must be at least the number of processes, {world}; found {tasks}. "
                f"Raise {split}_tasks, or evaluate with fewer devices."
            )
        per_batch = self.hparams["eval_tasks_per_batch"] or self.hparams["tasks_per_batch"]
        episodes = EpisodeDataset(source, EvaluationBatches(source, tasks, per_batch, world))
        sampler: DistributedSampler[int] = DistributedSampler(episodes, num_replicas=world, rank=rank, shuffle=False)
        return self._loader(episodes, sampler, numbered)

    def val_dataloader(self) -> EpisodeLoader | list[EpisodeLoader]:
        """The validation tasks, the same each time; an empty list when there are no validation classes."""
        return [] if self.tasks("val") is None else self._eval_dataloader("val")

    def test_dataloader(self) -> EpisodeLoader:
        """The test tasks, the same each time."""
        return self._eval_dataloader("test")

    def predict_dataloader(self) -> EpisodeLoader:
        """The test tasks.

        The ``batch_indices`` of Lightning's ``BasePredictionWriter`` are ``[b]`` for batch b of all processes'; its
        tasks are ``predict_dataloader().dataset.batches[b]``, with their shape.
        """
        return self._eval_dataloader("test", numbered=True)

    def _apply_transforms(self, batch: Any, dataloader_idx: int) -> Any:
        """Apply the transforms, on the device of the training; the Trainer calls this."""
        batch = Episode.of(batch)
        if self.train_transform is not None and self.trainer is not None and self.trainer.training:
            world, rank = self._processes()
            number = (self._batches_done() or 0) * world + rank
            batch = _with_seed(self.hparams["seed"], number, self.train_transform, batch)
        return batch if self.transform is None else _transformed(self.transform, batch)


def _only(items: list[Episode]) -> Episode:
    """The one item of a list, for loader processes too."""
    (item,) = items
    return item


def require_whole(name: str, value: object, minimum: int) -> None:
    """Raise a ValueError unless an argument is a whole number of at least ``minimum``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ValueError(f"{name} must be a whole number of at least {minimum}; found {value!r}.")


def require_range(name: str, value: object, minimum: int) -> None:
    """Raise a ValueError unless an argument is a whole number of at least ``minimum``, or a range of such."""
    value = without_configs(value)
    if isinstance(value, tuple | list):
        if len(value) != 2 or not all(isinstance(v, int) for v in value) or not minimum <= value[0] <= value[1]:
            raise ValueError(
                f"{name} must be a whole number, or the lowest and the highest of a range, from {minimum} on; "
                f"found {value!r}."
            )
    else:
        require_whole(name, value, minimum)


def split_setting(hparams: Mapping[str, Any], split: str, name: str) -> Range:
    """The ``ways``, ``shots`` or ``queries`` of a split's tasks: ``eval_<name>`` in evaluation, unless it is None."""
    of_evaluation = None if split == "train" else hparams[f"eval_{name}"]
    value: Range = hparams[name] if of_evaluation is None else of_evaluation
    return value


def _with_seed(seed: int, number: int, transform: Transform, batch: Episode) -> Episode:
    # Uniform doubles have 53 random bits, which a seed of PyTorch can hold.
    drawn = int(float(random_of(seed, "train", number, key=(2,)).random()) * 2**53)
    devices = {leaf.device for leaf in pytree.tree_leaves(batch.support_inputs)} - {torch.device("cpu")}
    kind = next(iter(devices)).type if devices else "cuda"
    with torch.random.fork_rng(devices=list(devices), device_type=kind):
        torch.manual_seed(drawn)
        return _transformed(transform, batch)


def _transformed(transform: Transform, batch: Episode) -> Episode:
    def apply(inputs: Tensor) -> Tensor:
        outputs = transform(inputs.flatten(0, 1))
        if not isinstance(outputs, Tensor) or len(outputs) != inputs.shape[0] * inputs.shape[1]:
            found = list(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
            raise ValueError(
                f"transform and train_transform must give a sample for each of the {inputs.shape[0] * inputs.shape[1]} "
                f"in [n, ...]; found {found}. For a transform of a single sample, use PerSample(transform)."
            )
        return outputs.reshape(*inputs.shape[:2], *outputs.shape[1:])

    return batch._replace(
        support_inputs=pytree.tree_map(apply, batch.support_inputs),
        query_inputs=pytree.tree_map(apply, batch.query_inputs),
    )


class PerSample(nn.Module):
    """Apply a transform to one sample at a time, each with random numbers of its own.

    Most random transforms of torchvision turn, crop or colour a whole batch alike.

    Args:
        transform: takes a sample ``[...]``, such as an image ``[C, H, W]``, and gives another.
    """

    def __init__(self, transform: Transform) -> None:
        super().__init__()
        self.transform = transform

    def forward(self, samples: Tensor) -> Tensor:
        """``[n, ...]`` to ``[n, ...]``."""
        return torch.stack([self.transform(sample) for sample in samples])
