"""learn2learn's tasksets: the same split into support and query as learn2learn's own, and the same tasks each time."""

from __future__ import annotations

import importlib
import random
import warnings

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from PIL import Image
from torch.utils.data import TensorDataset

from lightning_imaml import IMAMLModule
from lightning_imaml.data import TasksetDataModule
from lightning_imaml.data.datasets.tasksets import TasksetTasks

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Of its old dependencies.
    learn2learn = pytest.importorskip("learn2learn", reason="learn2learn is an extra: requirements/learn2learn.txt")


def taskset(ways=3, samples=5, num_tasks=-1, offset=0):
    """As the tutorials of learn2learn build one."""
    data = learn2learn.data.MetaDataset(TensorDataset(torch.arange(200.0) + offset, torch.arange(200) % 20))
    transforms = learn2learn.data.transforms
    return learn2learn.data.Taskset(
        data,
        task_transforms=[
            transforms.NWays(data, ways),
            transforms.KShots(data, samples),
            transforms.LoadData(data),
            transforms.RemapLabels(data),
            transforms.ConsecutiveLabels(data),
        ],
        num_tasks=num_tasks,
    )


def tasks(episode):
    return list(zip(*(part.tolist() for part in episode), strict=True))


def test_support_and_query_are_those_of_learn2learn(monkeypatch):
    source, seeds = TasksetTasks(taskset(), "train", shots=2, seed=0), []
    seed = random.seed
    monkeypatch.setattr(random, "seed", lambda value: (seeds.append(value), seed(value)))
    shape = source.shape(0)
    episode = source.episode([4, 5, 6], shape).validate()
    assert shape == (3, 2, 3)
    for row, value in enumerate(seeds[-3:]):
        seed(value)
        data, labels = taskset()[0]
        (support, support_labels), (query, query_labels) = learn2learn.data.partition_task(data, labels, shots=2)
        assert torch.equal(episode.support_inputs[row], support)
        assert torch.equal(episode.support_targets[row], support_labels)
        assert torch.equal(episode.query_inputs[row], query)
        assert torch.equal(episode.query_targets[row], query_labels)
    assert len(set(seeds)) == 4  # that of task 0 for the shape, and one each


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_tasks_are_the_same_each_time_and_on_any_worker(split):
    def drawn(workers):
        random.seed(workers)
        data = TasksetDataModule(
            *(taskset(offset=200 * k) for k in range(3)),
            shots=1,
            tasks_per_batch=2,
            batches_per_epoch=4,
            val_tasks=5,
            test_tasks=5,
            num_workers=workers,
        )
        return [tasks(episode) for episode in getattr(data, f"{split}_dataloader")()]

    assert drawn(0) == drawn(1) == drawn(2)
    assert len({task[0][0] for batch in drawn(0) for task in batch}) > 3


def test_the_global_random_state_is_left_alone():
    def seed():
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        torch.manual_seed(0)

    def drawn():
        return random.random(), np.random.random(), torch.rand(1)  # noqa: NPY002

    seed()
    expected = drawn()
    seed()
    source = TasksetTasks(taskset(), "train", shots=1, seed=0)
    source.episode([0, 1], source.shape(0))
    assert drawn() == expected


def test_transforms_that_draw_from_numpy_are_a_function_of_the_task():
    def noisy(task):
        for sample in task:
            sample.transforms.append(lambda pair: (pair[0] + np.random.random(), pair[1]))  # noqa: NPY002
        return task

    tasks = taskset()
    tasks.task_transforms.append(noisy)
    source = TasksetTasks(tasks, "train", shots=1, seed=0)
    first, second = (source.episode([task], source.shape(0)).support_inputs for task in (3, 4))
    assert torch.equal(source.episode([3], source.shape(0)).support_inputs, first)
    assert not torch.equal(first % 1, second % 1)


def test_a_taskset_of_few_tasks_repeats_them():
    data = TasksetDataModule(taskset(num_tasks=3), shots=1, tasks_per_batch=3, batches_per_epoch=2)
    first, second = (tasks(episode) for episode in data.train_dataloader())
    assert first == second
    assert len(set(map(repr, first))) == 3


def test_the_tasksets_of_its_benchmarks_feed_the_module(tmp_path):
    """From ``get_tasksets``, whose CIFAR-FS is a folder of images: here made up, a noisy pattern for each class."""
    generator = torch.Generator().manual_seed(0)
    for split, classes in (("train", 6), ("val", 4), ("test", 4)):
        for label in range(classes):
            folder = tmp_path / "cifarfs" / "processed" / split / f"{split}{label}"
            folder.mkdir(parents=True)
            pattern = torch.rand(8, 8, 3, generator=generator)
            for k in range(6):
                pixels = 200 * pattern + 50 * torch.rand(8, 8, 3, generator=generator)
                Image.fromarray(pixels.byte().numpy()).save(folder / f"{k}.png")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tasksets = importlib.import_module("learn2learn.vision.benchmarks").get_tasksets(
            "cifarfs", train_ways=3, train_samples=4, test_ways=3, test_samples=4, root=str(tmp_path)
        )
    data = TasksetDataModule(*tasksets, shots=2, tasks_per_batch=4, batches_per_epoch=3, val_tasks=4, test_tasks=4)
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        episode = next(iter(loader))
        assert episode.support_inputs.shape == episode.query_inputs.shape == (4, 6, 3, 8, 8)
        # Images and labels belong together: the nearest support images of a query image are those of its class.
        centres = episode.support_inputs.flatten(2).unflatten(1, (3, 2)).mean(dim=2)
        nearest = torch.cdist(episode.query_inputs.flatten(2), centres).argmin(dim=2)
        assert torch.equal(nearest, episode.query_targets)
    module = IMAMLModule(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 3)))
    run = Trainer(max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu",
                  devices=1, enable_model_summary=False)  # fmt: skip
    run.fit(module, datamodule=data)
    assert run.global_step == 3
    (tested,) = run.test(module, datamodule=data, verbose=False)
    assert tested["test/accuracy"] > 0.9 > tested["test/accuracy_before"]


def test_what_does_not_fit_is_explained():
    with pytest.raises(ValueError, match=r"found shots=5 and 5 samples of a class\. Lower shots"):
        next(iter(TasksetDataModule(taskset(), shots=5).train_dataloader()))
    with pytest.raises(TypeError, match="train must be a learn2learn Taskset; found TensorDataset"):
        TasksetDataModule(TensorDataset(torch.zeros(2)))
    with pytest.raises(ValueError, match="train, val or test must be a taskset"):
        TasksetDataModule()
    with pytest.raises(ValueError, match="classes for test to draw its tasks from; found only train"):
        TasksetDataModule(taskset()).test_dataloader()

    class Growing:
        num_tasks, sizes = -1, iter(range(4, 9))

        def sample_task_description(self):
            return next(self.sizes)

        def get_task(self, size):
            return torch.zeros(3 * size), torch.arange(3).repeat(size)

    with pytest.raises(ValueError, match=r"3 classes with 4 samples, .* found \[5, 5, 5\] in task 0"):
        next(iter(TasksetDataModule(Growing(), shots=1).train_dataloader()))
