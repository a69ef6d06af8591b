"""learn2learn's tasksets: the same split into support and query as learn2learn's own, and the same tasks each time."""

from __future__ import annotations

import random
import warnings

import pytest
import torch
from torch.utils.data import TensorDataset

from lightning_imaml.data import TasksetDataModule
from lightning_imaml.data.tasksets import TasksetTasks

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
    random.seed(0)
    torch.manual_seed(0)
    expected = (random.random(), torch.rand(1))
    random.seed(0)
    torch.manual_seed(0)
    source = TasksetTasks(taskset(), "train", shots=1, seed=0)
    source.episode([0, 1], source.shape(0))
    assert (random.random(), torch.rand(1)) == expected


def test_a_taskset_of_few_tasks_repeats_them():
    data = TasksetDataModule(taskset(num_tasks=3), shots=1, tasks_per_batch=3, batches_per_epoch=2)
    first, second = (tasks(episode) for episode in data.train_dataloader())
    assert first == second
    assert len(set(map(repr, first))) == 3


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
