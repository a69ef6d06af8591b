"""tieredImageNet and CUB: their splits against the papers' numbers and rule, on made-up pictures."""

from __future__ import annotations

import csv
from importlib.resources import files
from itertools import combinations

import pytest
from PIL import Image

from lightning_imaml.data import CUBDataModule, TieredImageNetDataModule
from lightning_imaml.data.datasets.class_splits import shipped_split

COUNTS = {
    "tiered_imagenet": (351, 97, 160),
    "cub": (100, 50, 50),
    "cifar_fs": (64, 16, 20),
    "mini_imagenet": (64, 16, 20),
}
SETTINGS = {"image_size": 4, "queries": 1, "tasks_per_batch": 2, "num_workers": 0}


def save(place, *names, shade=0):
    """Two pictures a class, whose brightness tells the folder that they lie in."""
    for number, name in enumerate(names):
        (place / name).mkdir(parents=True)
        for index in range(2):
            Image.new("L", (8, 4), number % 200 + shade).save(place / name / f"{index}.png")


@pytest.mark.parametrize("name", COUNTS)
def test_splits_are_disjoint_and_of_the_papers_sizes(name):
    split = shipped_split(name)
    assert tuple(len(set(labels)) for labels in split.values()) == COUNTS[name]
    assert list(split) == ["train", "val", "test"]
    for one, other in combinations(split.values(), 2):
        assert not set(one) & set(other)


def test_no_category_of_tiered_imagenet_is_in_two_splits():
    """What the split is made for: 34 categories, 20 to train, 6 to validate and 8 to test."""
    text = (files("lightning_imaml.data.datasets") / "splits" / "tiered_imagenet.csv").read_text()
    rows = list(csv.DictReader(line for line in text.splitlines() if not line.startswith("#")))
    categories = {part: {row["category"] for row in rows if row["split"] == part} for part in ("train", "val", "test")}
    assert [len(found) for found in categories.values()] == [20, 6, 8]
    assert len(set.union(*categories.values())) == 34
    assert all(row["class"][0] == row["category"][0] == "n" and len(row["class"]) == 9 for row in rows)


def test_cub_is_split_by_the_rule_of_chen_et_al():
    split = shipped_split("cub")
    names = sorted(label for labels in split.values() for label in labels)
    assert [int(name.partition(".")[0]) for name in names] == list(range(1, 201))
    rule = {0: "train", 1: "val", 2: "train", 3: "test"}
    assert all(name in split[rule[index % 4]] for index, name in enumerate(names))


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """The classes of tieredImageNet and one more."""
    root = tmp_path_factory.mktemp("imagenet")
    save(root, *sorted(label for labels in shipped_split("tiered_imagenet").values() for label in labels), "n99999999")
    return root


def test_tiered_imagenet_from_a_folder_of_all_classes(imagenet):
    data = TieredImageNetDataModule(imagenet, **SETTINGS)
    data.setup()
    found = {name: list(pool.members) for name, pool in data._pools.items()}
    assert found == shipped_split("tiered_imagenet")
    episode = next(iter(data.test_dataloader())).validate()
    assert episode.support_inputs.shape == (2, 5, 3, 4, 4)


def test_tiered_imagenet_from_folders_of_splits(imagenet, tmp_path):
    """Also those that ImageNet itself has, whose validation folder holds other images of the same classes."""
    split = shipped_split("tiered_imagenet")
    labels = sorted(label for labels in split.values() for label in labels)
    (tmp_path / "train").symlink_to(imagenet)
    save(tmp_path / "val", *labels[:3], shade=50)
    (tmp_path / "test").mkdir()
    Image.new("L", (8, 4)).save(tmp_path / "test" / "of no class.png")
    data = TieredImageNetDataModule(tmp_path, **SETTINGS)
    data.setup()
    assert {name: list(pool.members) for name, pool in data._pools.items()} == split
    pool = next(pool for pool in data._pools.values() if labels[2] in pool.members)
    assert (pool.source[int(pool.members[labels[2]][0])][0] * 255).round().unique().tolist() == [2]


def test_what_tiered_imagenet_lacks_is_named(tmp_path):
    save(tmp_path, "n01530575", "n01531178")
    with pytest.raises(ValueError, match=r"found 606 that .* lacks, such as 'n01532829' \(it has 'n01530575'\)"):
        TieredImageNetDataModule(tmp_path, **SETTINGS).setup()
    with pytest.raises(ValueError, match="class_split must be left out, since TieredImageNetDataModule has a split"):
        TieredImageNetDataModule(tmp_path, class_split=(1, 0, 0))


@pytest.mark.parametrize("inside", ["images", "CUB_200_2011/images", ""])
def test_cub_as_it_is_extracted(tmp_path, inside):
    root = tmp_path / "birds"
    save(root / inside, *(label for labels in shipped_split("cub").values() for label in labels))
    if inside:
        (root / inside).parent.joinpath("attributes").mkdir()
    data = CUBDataModule(root, cache_dir=tmp_path / "cache", **SETTINGS)
    data.setup()
    assert {name: list(pool.members) for name, pool in data._pools.items()} == shipped_split("cub")
    assert data._pools["val"].source.tensors[0].shape == (100, 3, 4, 4)


def test_another_split_of_cub(tmp_path):
    save(tmp_path / "images", "001.a", "002.b", "003.c", "004.d")
    (tmp_path / "split.csv").write_text("class,split\n001.a,train\n002.b,train\n003.c,test\n004.d,test\n")
    data = CUBDataModule(tmp_path, split_file=tmp_path / "split.csv", ways=2, cache_dir=tmp_path / "cache", **SETTINGS)
    data.setup()
    assert {name: list(pool.members) for name, pool in data._pools.items()} == {
        "train": ["001.a", "002.b"],
        "test": ["003.c", "004.d"],
    }
