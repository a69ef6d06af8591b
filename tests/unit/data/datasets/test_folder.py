"""A person's own folder of images: works, or says exactly what to do."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_imaml.data import ImageFolderDataModule

# Uneven classes: how many images each has. One class is empty.
COUNTS = {"ant": 2, "bee": 500, "cat": 9, "dog": 8, "eel": 7, "fox": 6, "gnu": 30, "hen": 0}


@pytest.fixture(scope="module")
def untouched(tmp_path_factory):
    """Greyscale and RGBA mixed, of several sizes, one file corrupt, one class empty."""
    root, random = tmp_path_factory.mktemp("folder") / "animals", np.random.default_rng(0)
    for number, (name, count) in enumerate(COUNTS.items()):
        (root / name).mkdir(parents=True)
        for index in range(count):
            height, width = 6 + index % 3, 6 + index % 2
            shape = (height, width) if index % 2 else (height, width, 4)
            noise = random.integers(0, 20, shape) + 30 * number
            Image.fromarray(noise.astype(np.uint8)).save(root / name / f"{index:03}.png")
    (root / "cat" / "004.png").write_bytes(b"\x89PNG corrupt")
    return root


@pytest.fixture
def root(untouched, tmp_path):
    return shutil.copytree(untouched, tmp_path / "animals")


def module(root, **options):
    settings = {"image_size": 6, "ways": 2, "shots": 1, "queries": 3, "tasks_per_batch": 2, "class_split": (1, 0, 0)}
    return ImageFolderDataModule(root, cache_dir=root.parent / "cache", **{**settings, **options})


def test_each_obstacle_is_named_with_its_remedy(root):
    with pytest.raises(ValueError, match=r"animals/cat/004.png is not .* remove the file, or pass on_broken='skip'"):
        module(root).setup()
    with (
        pytest.warns(UserWarning, match=r"1 of 562 images are left out, .*: .*animals/cat/004.png\."),
        pytest.raises(
            ValueError,
            match=r"at least shots \+ queries = 1 \+ 3 = 4 images; found 2 of 8 classes with fewer: .*'hen' with 0.* "
            r"leave these classes out with small_classes='skip'",
        ),
    ):
        module(root, on_broken="skip").setup()


def test_what_is_left_gives_tasks(root):
    data = module(root, on_broken="skip", small_classes="skip", ways=6)
    with (
        pytest.warns(UserWarning, match="1 of 562 images"),
        pytest.warns(UserWarning, match=r"2 of the 8 train classes are left out, .* than 4 images: 'ant', 'hen'\."),
    ):
        data.setup()
    pool = data._pools["train"]
    assert {label: len(items) for label, items in pool.members.items()} == {
        **{name: count for name, count in COUNTS.items() if count >= 4},
        "cat": 8,
    }
    episode = next(iter(data.train_dataloader())).validate()
    assert episode.support_inputs.shape == (2, 6, 3, 6, 6)
    brightness = (episode.support_inputs.mean(dim=(2, 3, 4)) * 255).sort().values
    levels = torch.tensor([30.0 * number + 10 for number, count in enumerate(COUNTS.values()) if count >= 4])
    assert (brightness - levels).abs().max() < 6  # each image belongs to the class of its folder


def test_a_corrupt_file_that_was_removed(root):
    (root / "cat" / "004.png").unlink()
    lazy, kept = (module(root, small_classes="skip", in_memory=in_memory, shots=2) for in_memory in (False, True))
    for data in (lazy, kept):
        with pytest.warns(UserWarning, match="2 of the 8 train classes are left out"):
            data.setup()
    for one, other in zip(lazy.train_dataloader(), kept.train_dataloader(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_folders_of_splits(root):
    base = root.parent / "splits"
    for split, names in {"train": ["bee", "gnu"], "test": ["dog", "eel"]}.items():
        for name in names:
            shutil.copytree(root / name, base / split / name)
    shutil.make_archive(str(base / "test"), "zip", base / "test")
    shutil.rmtree(base / "test")
    data = module(base)
    data.setup()
    assert {split: list(pool.members) for split, pool in data._pools.items()} == {
        "train": ["bee", "gnu"],
        "test": ["dog", "eel"],
    }
    assert data.val_dataloader() == []
    shutil.copytree(root / "bee", base / "val" / "bee")
    shutil.copytree(root / "gnu", base / "val" / "gnu")
    with pytest.raises(ValueError, match="train and val must not share classes; found 2 in both, such as 'bee', 'gnu'"):
        module(base).setup()


def test_a_folder_beside_the_splits_is_named(root):
    base = root.parent / "splits"
    for split, name in {"train": "bee", "validation": "gnu"}.items():
        shutil.copytree(root / name, base / split / name)
        shutil.copytree(root / "dog", base / split / f"dog of {split}")
    (base / "notes").mkdir()
    with pytest.warns(UserWarning, match="train in .* are taken for splits, so validation beside them is left out. Re"):
        module(base).setup()


def test_a_class_may_be_called_as_a_split_is(root):
    base = root.parent / "vehicles"
    for name, copy in {"bee": "train", "gnu": "bus"}.items():
        shutil.copytree(root / name, base / copy)
    data = module(base)
    data.setup()
    assert {label: len(items) for label, items in data._pools["train"].members.items()} == {"train": 500, "bus": 30}


def test_splits_that_lie_deeper_are_no_classes(root):
    base = root.parent / "around" / "data"
    for split, name in {"train": "bee", "test": "gnu"}.items():
        shutil.copytree(root / name, base / split / name)
    shutil.make_archive(str(root.parent / "packed"), "zip", base)
    for place in (base.parent, root.parent / "packed.zip"):
        with pytest.raises(ValueError, match=r"must lie in root itself; found test, train further inside"):
            module(place).setup()


def test_a_folder_around_the_classes_does_not_matter(root):
    (root / "cat" / "004.png").unlink()
    shutil.make_archive(str(root.parent / "packed"), "zip", root.parent, "animals")
    first, second = (module(place, ways=3, small_classes="skip") for place in (root, root.parent / "packed.zip"))
    for data in (first, second):
        with pytest.warns(UserWarning, match="2 of the 8 train classes are left out"):
            data.setup()
    assert list(first._pools["train"].members) == list(second._pools["train"].members)
    for one, other in zip(first.train_dataloader(), second.train_dataloader(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_split_file(root, tmp_path):
    """As tieredImageNet and CUB are read: a folder of all classes, and a file that splits them."""
    path = tmp_path / "split.csv"
    path.write_text("# source: me\nclass,split\nbee,train\ngnu,train\ndog,test\neel,test\n")
    data = module(root, split_file=path)
    data.setup()
    assert {split: list(pool.members) for split, pool in data._pools.items()} == {
        "train": ["bee", "gnu"],
        "test": ["dog", "eel"],
    }
    for text, message in {
        "class,split\nbee,train\nyak,test\n": r"found 1 .* lacks, such as 'yak' \(it has 'ant'\)",
        "class,split\nbee,train\nbee,test\n": "must name each class once; found 'bee' in train and in test",
        "class,split\nbee,training\n": "train, val or test as split; found .*'training'",
        "bee,train\n": "must have the columns class,split",
    }.items():
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            module(root, split_file=path).setup()
    path.write_text("class,split\nbee,train\ngnu,train\n", encoding="utf-8-sig")  # as spreadsheets save it
    module(root, split_file=path).setup()
    path.write_bytes(b"class,split\nb\xe9e,train\n")
    with pytest.raises(ValueError, match=r"must be encoded in UTF-8; '.*split.csv' is not"):
        module(root, split_file=path).setup()
    with pytest.raises(FileNotFoundError, match=r"split_file must be a CSV file .* found nothing at '.*none.csv'"):
        module(root, split_file=tmp_path / "none.csv").setup()


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"root must be a folder or a .zip archive .*nowhere'"):
        module(tmp_path / "nowhere").setup()
    Image.new("L", (4, 4)).save(tmp_path / "loose.png")
    with pytest.raises(ValueError, match=r"found no image in a folder of .* Put the images of each class into"):
        module(tmp_path).setup()


def test_arguments_are_checked(tmp_path):
    for options, message in (
        ({"channels": 4}, "channels must be 1 or 3"),
        ({"on_broken": "ignore"}, "on_broken must be one of 'raise', 'skip'; found 'ignore'"),
        ({"on_broken": "skip", "in_memory": False}, "Keep the images in memory"),
        ({"small_classes": "drop"}, "small_classes must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            module(tmp_path, **options)
