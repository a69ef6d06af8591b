"""Image folders: classes that are paths of several folders; what is left out is said."""

from __future__ import annotations

import logging
import shutil

import numpy as np
import pytest
from PIL import Image

from lightning_imaml.data import ImageFolderDataModule

CLASSES = ["birds/finch", "birds/wren", "cars/bus", "cars/van"]


@pytest.fixture
def root(tmp_path):
    for number, name in enumerate(CLASSES):
        (tmp_path / "root" / name).mkdir(parents=True)
        for index in range(4):
            pixels = np.full((6, 6), 40 * number + index, dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "root" / name / f"{index}.png")
    return tmp_path / "root"


def pools(root, **options):
    settings = {"image_size": 6, "channels": 1, "ways": 2, "shots": 1, "queries": 3, "class_split": (1, 0, 0)}
    data = ImageFolderDataModule(root, cache_dir=root.parent / "cache", **settings | options)
    data.setup()
    return data._pools


def members(pool):
    return {label: sorted(pool.source.items[index] for index in items) for label, items in pool.members.items()}


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_class_is_the_path_of_its_folder(root, in_memory):
    found = members(pools(root, nested=True, ways=4, in_memory=in_memory)["train"])
    assert found == {name: [f"{name}/{index}.png" for index in range(4)] for name in found}
    assert sorted(found) == CLASSES


def test_without_it_the_first_folder_is_the_class(root, caplog):
    with caplog.at_level(logging.INFO):
        found = members(pools(root)["train"])
    assert {label: len(names) for label, names in found.items()} == {"birds": 8, "cars": 8}
    said = "4 folders hold images, and the 2 folders around them, such as 'birds', are the classes. Pass nested=True"
    assert [said in record.message for record in caplog.records] == [True]
    caplog.clear()
    with caplog.at_level(logging.INFO):
        pools(root, nested=True)
    assert not caplog.records


def test_an_archive_with_a_folder_around(root):
    shutil.make_archive(str(root.parent / "packed"), "zip", root.parent, "root")
    found = pools(root.parent / "packed.zip", nested=True, ways=4)["train"]
    assert sorted(found.members) == CLASSES


def test_flat_classes_are_the_same_either_way(root):
    for name in CLASSES:
        shutil.move(root / name, root / name.replace("/", "-"))
    for name in ("birds", "cars"):
        (root / name).rmdir()
    flat, nested = (pools(root, nested=nested, ways=4)["train"] for nested in (False, True))
    assert members(flat) == members(nested)
    assert list(flat.members) == list(nested.members)


def test_splits_by_folder_and_by_file(root):
    base = root.parent / "splits"
    shutil.copytree(root / "birds", base / "train" / "birds")
    shutil.copytree(root / "cars", base / "test" / "cars")
    found = pools(base, nested=True)
    assert {split: sorted(pool.members) for split, pool in found.items()} == {
        "train": ["birds/finch", "birds/wren"],
        "test": ["cars/bus", "cars/van"],
    }
    table = root.parent / "split.csv"
    table.write_text("class,split\nbirds/finch,train\ncars/van,train\ncars/bus,test\nbirds/wren,test\n")
    found = pools(root, nested=True, split_file=table)
    assert {split: list(pool.members) for split, pool in found.items()} == {
        "train": ["birds/finch", "cars/van"],
        "test": ["cars/bus", "birds/wren"],
    }
    around = root.parent / "around"
    shutil.copytree(base, around / "data")
    with pytest.raises(ValueError, match="must lie in root itself; found test, train further inside"):
        pools(around, nested=True)
    # Archives with the split's own folder inside: the same names.
    shutil.make_archive(str(base / "train"), "zip", base, "train")
    shutil.rmtree(base / "train")
    assert sorted(pools(base, nested=True)["train"].members) == ["birds/finch", "birds/wren"]
    shutil.copytree(root / "birds" / "wren", base / "test" / "birds" / "wren")
    with pytest.raises(ValueError, match="must not share classes; found 1 in both, such as 'birds/wren'"):
        pools(base, nested=True)


def test_images_beside_folders_are_a_class_of_their_own(root):
    shutil.copytree(root / "cars" / "bus", root / "cars", dirs_exist_ok=True)
    assert "cars" in pools(root, nested=True, ways=5)["train"].members


def messages(caplog, root, **options):
    caplog.clear()
    with caplog.at_level(logging.INFO):
        pools(root, **options)
    return [record.message for record in caplog.records if "left out" in record.message]


@pytest.mark.parametrize("packed", [False, True])
def test_ignored_files_are_counted_by_kind(root, caplog, packed):
    assert messages(caplog, root) == []
    for name in ("birds/finch/1.HEIC", "birds/finch/2.heic", "cars/notes.txt", "LICENSE", ".DS_Store"):
        (root / name).write_bytes(b"something")
    shutil.copy(root / "cars" / "bus" / "0.png", root / "loose.png")
    place = root
    if packed:
        place = root.parent / "packed.zip"
        shutil.make_archive(str(place.with_suffix("")), "zip", root)
    (message,) = messages(caplog, place)
    said, _, kinds = message.partition(": ")
    assert said == f"5 files in {place} are left out, since they are no images by their endings or lie in no folder"
    assert kinds.startswith("2 .heic, ")
    assert sorted(kinds.rstrip(".").split(", ")) == ["1 .txt", "1 in no folder", "1 without an ending", "2 .heic"]


def test_ignored_files_of_splits_are_one_message(root, caplog):
    base = root.parent / "splits"
    shutil.copytree(root / "birds", base / "train")
    shutil.copytree(root / "cars", base / "test")
    (base / "README.md").write_text("about the splits")
    for split in ("train", "test"):
        for kind in ("avif", "heic", "json", "md", "svg", "txt"):
            (base / split / f"file.{kind}").write_text("something")
    (message,) = messages(caplog, base)
    assert message.startswith(f"12 files in {base / 'train'}, {base / 'test'} are left out")
    assert message.count("2 .") == 5
    assert message.endswith(", ….")
