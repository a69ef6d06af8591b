"""Ways, shots and queries from ranges: every task drawn alike, tasks of one shape together, nothing padded."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import TensorDataset

from lightning_imaml.data import EpisodicDataModule
from lightning_imaml.data.sampling import Shape, ShapeSource
from lightning_imaml.data.sampling.batching import EvaluationBatches

RANGES = {"ways": (2, 4), "shots": (1, 3), "queries": (2, 3)}


def module(**options):
    data = TensorDataset(torch.arange(400), torch.arange(400) % 40)
    return EpisodicDataModule(data, **{**RANGES, "tasks_per_batch": 4, "batches_per_epoch": 60, **options})


def on_rank(data, rank, world):
    data.trainer = SimpleNamespace(
        distributed_sampler_kwargs={"num_replicas": world, "rank": rank},
        fit_loop=SimpleNamespace(
            epoch_loop=SimpleNamespace(batch_progress=SimpleNamespace(total=SimpleNamespace(processed=3)))
        ),
    )
    return data


def shape_of(episode):
    ways = int(episode.support_targets.max()) + 1
    return (ways, episode.support_targets.shape[1] // ways, episode.query_targets.shape[1] // ways)


def tasks(episode):
    return [tuple(map(tuple, task)) for task in zip(*(part.tolist() for part in episode), strict=True)]


def test_every_shape_comes_as_often():
    source = ShapeSource("train", (2, 4), 1, (2, 3), seed=0)
    counts = Counter(source(number) for number in range(6000))
    assert set(counts) == {Shape(ways, 1, queries) for ways in (2, 3, 4) for queries in (2, 3)}
    assert sum((count - 1000) ** 2 / 1000 for count in counts.values()) < 20.5  # chi-square, 5 d. f., p = 0.001
    other = ShapeSource("train", (2, 4), 1, (2, 3), seed=1)
    assert [source(number) for number in range(20)] != [other(number) for number in range(20)]


def test_training_batches_are_tasks_of_one_shape():
    shapes = set()
    for episode in module().train_dataloader():
        shapes.add(shape_of(episode.validate()))
        ways, shots, queries = shape_of(episode)
        for support, query in zip(episode.support_inputs, episode.query_inputs, strict=True):
            assert len(set(support.tolist()) | set(query.tolist())) == ways * (shots + queries)
        assert (episode.support_targets == torch.arange(ways).repeat_interleave(shots)).all()
    assert len(shapes) > 9
    assert all(2 <= w <= 4 and 1 <= k <= 3 and 2 <= q <= 3 for w, k, q in shapes)


def test_ranks_share_out_training_and_its_shapes():
    one = [tasks(e) for e in on_rank(module(tasks_per_batch=4), 0, 1).train_dataloader()]
    ranks = [[tasks(e) for e in on_rank(module(tasks_per_batch=2), rank, 2).train_dataloader()] for rank in range(2)]
    assert one == [a + b for a, b in zip(*ranks, strict=True)]


@pytest.mark.parametrize("per_batch", [2, 7])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_is_the_same_list_however_it_is_batched(per_batch, world):
    settings = {"test_tasks": 50, "eval_tasks_per_batch": per_batch}
    alone = [task for episode in module(test_tasks=50).test_dataloader() for task in tasks(episode)]
    ranks = [list(on_rank(module(**settings), rank, world).test_dataloader()) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    assert max(episode.tasks for batches in ranks for episode in batches) <= per_batch
    found = [task for batches in ranks for episode in batches for task in tasks(episode.validate())]
    assert sorted(found) == sorted(alone)
    assert len(set(alone)) == 50
    assert len({tuple(map(len, task)) for task in alone}) > 9


class Shapes:
    """A task source that only has shapes."""

    def __init__(self, numbers):
        self.numbers = numbers

    def shape(self, number):
        return Shape(2, self.numbers[number], 1)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("per_batch", [1, 2, 5])
@pytest.mark.parametrize("numbers", [[1, 1, 1, 1, 1], [1, 2, 1, 2, 2, 1, 1], [1, 1, 1, 1, 1, 1, 2, 3]])
def test_batches_hold_each_task_once_and_can_be_shared_out(numbers, per_batch, world):
    batches = list(EvaluationBatches(Shapes(numbers), len(numbers), per_batch, world).batches)
    assert len(batches) % world == 0
    assert sorted(task for group, _ in batches for task in group) == list(range(len(numbers)))
    assert all({numbers[task] for task in group} == {shape.shots} for group, shape in batches)


def test_shapes_that_cannot_be_shared_out():
    with pytest.raises(ValueError, match=r"3 tasks must be batches of one shape each.* 2 processes; found 3 shapes"):
        EvaluationBatches(Shapes([1, 2, 3]), 3, 4, 2)


def test_evaluation_has_ranges_of_its_own():
    data = module(eval_ways=5, eval_shots=(1, 2), eval_queries=1)
    shapes = {shape_of(episode) for episode in data.val_dataloader()}
    assert shapes == {(5, 1, 1), (5, 2, 1)}


def test_the_largest_task_must_fit():
    with pytest.raises(ValueError, match=r"val split must have at least 7 classes \(ways=7\); found 6"):
        module(ways=(2, 7)).setup()
    with pytest.raises(ValueError, match=r"shots \+ queries = 8 \+ 3 = 11 images"):
        module(shots=(1, 8)).setup()


@pytest.mark.parametrize("value", [(4, 2), (1, 3), (2,), (2, 3, 4), (2, 2.5)])
def test_ranges_are_checked(value):
    with pytest.raises(ValueError, match="ways must be a whole number, or the lowest and the highest of a range"):
        module(ways=value)
