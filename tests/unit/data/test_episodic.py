"""The episodic data module over any labelled dataset."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, Subset, TensorDataset, random_split

from lightning_imaml.data import EpisodicDataModule, LabelledTensors
from lightning_imaml.data.labelled import ClassPool, gather, named_labels, read_labels, shuffle_classes
from lightning_imaml.data.sampling import DrawnTasks, Shape, ShapeSource, draw_distinct

CLASSES, EACH = 40, 10


def numbered():
    """Item i of the data is the number i and shows class i % 40."""
    count = CLASSES * EACH
    return TensorDataset(torch.arange(count), torch.arange(count) % CLASSES)


class Named(Dataset):
    """A map-style dataset without stored labels, whose inputs are dicts."""

    def __init__(self, classes, each=5):
        self.items = [({"x": torch.tensor([float(i)]), "i": i}, name) for i, name in enumerate(classes * each)]
        self.reads = 0

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        self.reads += 1
        return self.items[index]


def module(train=None, **options):
    return EpisodicDataModule(numbered() if train is None else train, **{"queries": 3, "tasks_per_batch": 4, **options})


def split_loader(data, split):
    return {"train": data.train_dataloader, "val": data.val_dataloader, "test": data.test_dataloader}[split]()


def tasks(episode):
    return list(zip(*(part.flatten(1).tolist() for part in episode), strict=True))


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_draws_are_distinct_and_in_range(size):
    for _ in range(20):
        drawn = draw_distinct(torch.rand(min(size, 7)).tolist(), size)
        assert len(set(drawn)) == len(drawn)
        assert set(drawn) <= set(range(size))


def test_draws_are_uniform():
    counts = torch.zeros(4, 4)
    generator = torch.Generator().manual_seed(0)
    for _ in range(4000):
        first, second = draw_distinct(torch.rand(2, generator=generator).tolist(), 4)
        counts[first, second] += 1
    expected = 4000 / 12  # ordered pairs of four
    off_diagonal = counts[~torch.eye(4, dtype=torch.bool)]
    assert counts.diagonal().sum() == 0
    assert ((off_diagonal - expected) ** 2 / expected).sum() < 31.3  # chi-square, 11 degrees of freedom, p = 0.001


def test_an_episode_is_the_same_for_ever():
    """Pinned numbers: a change here breaks the reproducibility of published results."""
    data = DrawnTasks(ClassPool.of(numbered()), "test", ShapeSource("test", 2, 1, 2, seed=3), seed=3)
    assert data.draw(5, data.shape(5)).tolist() == [[47, 167, 287], [266, 186, 346]]


@pytest.mark.parametrize("split", ["train", "val", "test"])
@pytest.mark.parametrize(("ways", "shots", "queries"), [(2, 1, 1), (5, 2, 3), (6, 4, 6)])
def test_an_episode_is_a_task(split, ways, shots, queries):
    loader = split_loader(module(ways=ways, shots=shots, queries=queries), split)
    episode = next(iter(loader)).validate()
    assert episode.support_inputs.shape == (4, ways * shots)
    assert episode.query_inputs.shape == (4, ways * queries)
    for row in range(4):
        support, query = episode.support_inputs[row], episode.query_inputs[row]
        assert not set(support.tolist()) & set(query.tolist())
        assert len(set(support.tolist()) | set(query.tolist())) == ways * (shots + queries)
        for inputs, targets, each in (
            (support, episode.support_targets[row], shots),
            (query, episode.query_targets[row], queries),
        ):
            assert targets.bincount(minlength=ways).tolist() == [each] * ways
            shown = {(int(target), int(item) % CLASSES) for item, target in zip(inputs, targets, strict=True)}
            assert len(shown) == ways  # one class of the data for each target
        both = torch.cat([support, query]) % CLASSES
        assert len(both.unique()) == ways  # and the same one in both sets


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_episodes_do_not_depend_on_the_workers(split):
    settings = {"batches_per_epoch": 3, "val_tasks": 9, "test_tasks": 9}
    runs = [
        [tasks(episode) for episode in split_loader(module(num_workers=workers, **settings), split)]
        for workers in (0, 1, 2)
    ]
    assert runs[0] == runs[1] == runs[2]


def test_episodes_differ_by_index_seed_and_split():
    pool = ClassPool.of(numbered())
    shape = Shape(5, 1, 3)
    drawn = {
        tuple(DrawnTasks(pool, split, ShapeSource(split, *shape, seed), seed).draw(index, shape).flatten().tolist())
        for split in ("train", "val", "test")
        for seed in (0, 1)
        for index in range(50)
    }
    assert len(drawn) == 300


@pytest.mark.parametrize("workers", [0, 1])
def test_passes_outside_a_trainer_go_on(workers):
    loader = module(batches_per_epoch=3, num_workers=workers).train_dataloader()
    longer = module(batches_per_epoch=6).train_dataloader()
    passes = [tasks(episode) for _ in range(2) for episode in loader]
    assert len(loader) == 3
    assert passes == [tasks(episode) for episode in longer]


def test_evaluation_repeats_its_tasks():
    data = module(val_tasks=10, eval_shots=2, eval_queries=1)
    first, second = ([tasks(episode) for episode in data.val_dataloader()] for _ in range(2))
    assert first == second
    assert sorted(map(len, first)) == [3, 3, 4]
    evaluation, training = next(iter(data.val_dataloader())), next(iter(data.train_dataloader()))
    assert (evaluation.support_inputs.shape[1], evaluation.query_inputs.shape[1]) == (10, 5)
    assert (training.support_inputs.shape[1], training.query_inputs.shape[1]) == (5, 15)


def on_rank(data, rank, world):
    """Let a data module believe that it is one of several processes."""
    data.trainer = SimpleNamespace(
        distributed_sampler_kwargs={"num_replicas": world, "rank": rank},
        fit_loop=SimpleNamespace(
            epoch_loop=SimpleNamespace(batch_progress=SimpleNamespace(total=SimpleNamespace(processed=2)))
        ),
    )
    return data


def test_ranks_share_out_the_global_batch():
    one = [tasks(e) for e in on_rank(module(tasks_per_batch=6), 0, 1).train_dataloader()]
    ranks = [[tasks(e) for e in on_rank(module(tasks_per_batch=2), r, 3).train_dataloader()] for r in range(3)]
    assert len(one) == 100
    assert one == [a + b + c for a, b, c in zip(*ranks, strict=True)]


def test_ranks_are_known_without_a_trainer(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    shares = []
    for rank in range(2):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        shares.append(tasks(next(iter(module(tasks_per_batch=2).train_dataloader()))))
    monkeypatch.undo()
    assert shares[0] + shares[1] == tasks(next(iter(module(tasks_per_batch=4).train_dataloader())))


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("per_batch", [1, 2, 4])
@pytest.mark.parametrize("count", [5, 7, 8, 13])
def test_evaluation_shares_out_each_task_once(world, per_batch, count):
    settings = {"test_tasks": count, "eval_tasks_per_batch": per_batch}
    alone = [task for episode in module(**settings).test_dataloader() for task in tasks(episode)]
    ranks = [[tasks(e) for e in on_rank(module(**settings), r, world).test_dataloader()] for r in range(world)]
    assert len({len(batches) for batches in ranks}) == 1  # or a collective operation would hang
    assert sorted(task for batches in ranks for batch in batches for task in batch) == sorted(alone)
    assert len(alone) == count
    assert max(len(batch) for batches in ranks for batch in batches) <= max(2, per_batch)


def test_one_dataset_is_split_by_class():
    data = module()
    data.setup()
    pools = data._pools
    shares = {name: set(pool.members) for name, pool in pools.items()}
    assert {name: len(classes) for name, classes in shares.items()} == {"train": 26, "val": 6, "test": 8}
    assert set().union(*shares.values()) == set(range(CLASSES))
    other = module(seed=7)
    other.setup()
    assert {name: set(pool.members) for name, pool in other._pools.items()} == shares
    data.setup("test")
    assert data._pools is pools


def test_order_of_classes_does_not_depend_on_their_listing():
    names = [f"class{i}" for i in range(30)]
    assert shuffle_classes(names) == shuffle_classes(names[::-1]) != sorted(names)


def test_general_datasets_are_read_item_by_item():
    source = Named(["a", "b", "c", "d"])
    data = module(source, ways=2, queries=2, class_split=(1, 0, 0))
    data.setup()
    assert source.reads == len(source)
    episode = next(iter(data.train_dataloader())).validate()
    assert episode.support_inputs["x"].shape == (4, 2, 1)
    assert episode.query_inputs["i"].shape == (4, 4)
    assert data.val_dataloader() == []


@pytest.mark.parametrize("kind", ["targets", "labels"])
@pytest.mark.parametrize("form", [list, torch.tensor])
def test_stored_labels_are_found_without_reading(kind, form):
    source = Named(["a", "b"], each=2)
    setattr(source, kind, form([4, 5, 4, 5]))
    assert read_labels(source) == [4, 5, 4, 5]
    assert named_labels(Subset(source, [1, 2])) == [5, 4]
    assert named_labels(ConcatDataset([Subset(source, [1]), source])) == [5, 4, 5, 4, 5]
    assert source.reads == 0


def test_class_names_come_from_the_dataset():
    source = Named(["x"], each=4)
    source.targets, source.classes = [0, 1, 0, 1], ["cat", "dog"]
    pool = ClassPool.of(source)
    assert {name: items.tolist() for name, items in pool.members.items()} == {"cat": [0, 2], "dog": [1, 3]}
    assert pool.named
    assert list(ClassPool.of(Subset(source, [1, 3])).members) == ["dog"]


def test_joined_datasets_keep_their_own_names():
    """Both count from zero, and mean other classes by it."""
    parts = [Named(["x"], each=4), Named(["x"], each=4)]
    for part, names in zip(parts, (["cat", "dog"], ["yak", "cat"]), strict=True):
        part.targets, part.classes = [0, 1, 0, 1], names
    pool = ClassPool.of(Subset(ConcatDataset(parts), range(1, 8)))
    assert {name: items.tolist() for name, items in pool.members.items()} == {
        "dog": [0, 2],
        "cat": [1, 4, 6],
        "yak": [3, 5],
    }


def test_labelled_tensors_become_floats():
    source = LabelledTensors(torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1, 1), torch.arange(3), "abc")
    image, label = source[1]
    assert image.item() == pytest.approx(0.2)
    assert label == 1
    assert gather(source, torch.tensor([2, 0])).flatten().tolist() == [1, 0]
    assert list(ClassPool.of(source).members) == ["a", "b", "c"]


def test_hyperparameters_are_saved_without_the_data():
    hparams = module(ways=3, seed=4).hparams
    assert (hparams.ways, hparams.shots, hparams.seed) == (3, 1, 4)
    assert "train" not in hparams


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ways": 1}, "ways must be a whole number of at least 2; found 1"),
        ({"shots": 0}, "shots must be a whole number of at least 1; found 0"),
        ({"queries": 2.5}, "queries must be a whole number of at least 1; found 2.5"),
        ({"eval_shots": 0}, "eval_shots must be"),
        ({"eval_queries": 0}, "eval_queries must be"),
        ({"tasks_per_batch": 0}, "tasks_per_batch must be"),
        ({"eval_tasks_per_batch": 0}, "eval_tasks_per_batch must be"),
        ({"batches_per_epoch": -1}, "batches_per_epoch must be"),
        ({"val_tasks": 0}, "val_tasks must be"),
        ({"test_tasks": 0}, "test_tasks must be"),
        ({"seed": -1}, "seed must be a whole number of at least 0; found -1"),
        ({"num_workers": -1}, "num_workers must be"),
        ({"class_split": (0.5, 0.4, 0.2)}, "class_split must be three shares"),
        ({"class_split": (1.5, -0.5, 0.0)}, "class_split must be three shares"),
        ({"class_split": (0.5, 0.5)}, "class_split must be three shares"),
    ],
)
def test_arguments_are_checked_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        module(**options)


def test_too_few_classes():
    with pytest.raises(
        ValueError, match=r"the val split must have at least 7 classes \(ways=7\); found 6\. Lower ways"
    ):
        module(ways=7).setup()


def test_too_few_images():
    source = TensorDataset(torch.arange(62), torch.tensor([0] * 2 + [1] * 20 + [2] * 20 + [3] * 20))
    with pytest.raises(
        ValueError, match=r"shots \+ queries = 1 \+ 3 = 4 images; found 1 of 4 classes with fewer: 0 with 2\. Lower"
    ):
        module(source, ways=2, class_split=(1, 0, 0)).setup()
    with pytest.raises(ValueError, match=r"found 26 of 26 .* with 10, .*, … *\. Lower shots or queries"):
        module(queries=10).setup()


def test_shared_classes_are_refused_by_name():
    with pytest.raises(ValueError, match="train and test must not share classes; found 1 in both, such as 'c'"):
        EpisodicDataModule(Named(["a", "b", "c"]), test=Named(["c", "d"]), ways=2, queries=3).setup()


def test_numbers_of_two_datasets_are_not_compared():
    data = EpisodicDataModule(numbered(), test=numbered(), queries=3)
    data.setup()
    assert list(data._pools) == ["train", "test"]
    same = numbered()
    with pytest.raises(ValueError, match="must not share classes; found 40 in both, such as 0, 1, 2, 3, 4, …"):
        EpisodicDataModule(same, test=same, queries=3).setup()


@pytest.mark.parametrize("in_memory", [False, True])
def test_numbers_of_two_subsets_of_one_dataset_are_compared(in_memory):
    """``random_split`` shares out the images, not the classes."""
    images = TensorDataset(torch.zeros(80, 1, 2, 2, dtype=torch.uint8), torch.arange(80) % 8)
    settings = {"ways": 2, "queries": 3, "in_memory": in_memory}
    halves = random_split(images, [40, 40], generator=torch.Generator().manual_seed(0))
    nested = Subset(halves[1], range(40))
    with pytest.raises(ValueError, match="train and val must not share classes; found 8 in both"):
        EpisodicDataModule(halves[0], nested, **settings).setup()
    apart = [Subset(images, [i for i in range(80) if (i % 8 < 5) == first]) for first in (True, False)]
    EpisodicDataModule(*apart, **settings).setup()


def test_a_split_without_classes():
    with pytest.raises(ValueError, match="classes for test to draw its tasks from; found only train, val"):
        module(class_split=(0.5, 0.5, 0)).test_dataloader()
    with pytest.raises(ValueError, match="found None for all three"):
        EpisodicDataModule().setup()


def test_test_data_alone_is_enough():
    data = EpisodicDataModule(test=numbered(), queries=3, test_tasks=4)
    assert len(data.test_dataloader()) == 1


def test_fewer_tasks_than_processes():
    with pytest.raises(ValueError, match="test_tasks must be at least the number of processes, 3; found 2"):
        on_rank(module(test_tasks=2), 0, 3).test_dataloader()


class Ragged(Dataset):
    targets = [index % 10 for index in range(50)]  # noqa: RUF012

    def __init__(self, kind):
        self.kind = kind

    def __len__(self):
        return 50

    def __getitem__(self, index):
        return self.kind(index), self.targets[index]


@pytest.mark.parametrize("kind", [lambda index: torch.zeros(3, 8, 8 + index), lambda _: Image.new("L", (8, 8))])
def test_inputs_that_cannot_be_stacked(kind):
    data = module(Ragged(kind), ways=2, queries=2, class_split=(1, 0, 0))
    with pytest.raises(ValueError, match=r"the inputs of Ragged must be tensors of one shape, .* Resize and ToTensor"):
        next(iter(data.train_dataloader()))


class Stream(IterableDataset):
    def __iter__(self):
        return iter([])


def test_datasets_that_cannot_be_indexed():
    with pytest.raises(TypeError, match="must be map-style, with __len__ and __getitem__; found Stream"):
        module(Stream()).setup()
    with pytest.raises(TypeError, match="labels must be one number or string an item; found list"):
        module(TensorDataset(torch.zeros(8), torch.zeros(8, 2))).setup()


def test_labelled_tensors_are_checked():
    images = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
    with pytest.raises(TypeError, match="images must be uint8, 0 to 255; found torch"):
        LabelledTensors(images.float(), torch.arange(2), "ab")
    with pytest.raises(ValueError, match=r"labels must have shape \[2\], one for each image; found \[3\]"):
        LabelledTensors(images, torch.arange(3), "abc")
    with pytest.raises(ValueError, match=r"labels must lie in 0 … 0, .*; found 0 … 1"):
        LabelledTensors(images, torch.arange(2), "a")
