"""mini-ImageNet: layouts on a small made-up copy, counts and pixels on the real one."""

from __future__ import annotations

import csv
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

from lightning_imaml.data import MiniImageNetDataModule, mini_imagenet
from lightning_imaml.data.datasets.class_splits import shipped_split
from lightning_imaml.data.datasets.mini_imagenet import find_split

REAL = ROOT.parent / "shared" / "data" / "mini-imagenet"
needs_data = pytest.mark.skipif(not REAL.is_dir(), reason="mini-ImageNet is not in ../shared/data/mini-imagenet")
SMALL = {"train": ["n01", "n02", "n03"], "val": ["n04", "n05"], "test": ["n06", "n07"]}


@pytest.fixture(autouse=True)
def cache(monkeypatch):
    with tempfile.TemporaryDirectory() as folder:  # half a gigabyte, which pytest would keep
        monkeypatch.setenv("XDG_CACHE_HOME", folder)
        yield Path(folder)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    root, random = tmp_path_factory.mktemp("tree"), np.random.default_rng(0)
    for split, classes in SMALL.items():
        for label in classes:
            (root / split / label).mkdir(parents=True)
            for index in range(4):
                image = random.integers(0, 256, (84, 84, 3), dtype=np.uint8)
                Image.fromarray(image).save(root / split / label / f"{label}{index:08}.jpg")
    return root


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(mini_imagenet, "shipped_split", lambda name: SMALL)


def lay_out(tree, root, layout):
    """Put a copy of the data under ``root`` in one of the layouts that people have."""
    for split, classes in SMALL.items():
        if layout == "folders":
            shutil.copytree(tree / split, root / split)
        elif layout == "zips":
            shutil.make_archive(str(root / split), "zip", tree, split)
        elif layout == "zips without a folder":
            shutil.make_archive(str(root / split), "zip", tree / split)
        else:
            with (root / f"{split}.csv").open("w", newline="", encoding="utf-8-sig") as file:  # as spreadsheets write
                writer = csv.writer(file)
                writer.writerow(("filename", "label"))
                for label in classes:
                    writer.writerows((path.name, label) for path in sorted((tree / split / label).iterdir()))
            (root / "images").mkdir(exist_ok=True)
            for path in (tree / split).glob("*/*.jpg"):
                shutil.copy(path, root / "images")
    if layout == "tables and a zip":
        shutil.make_archive(str(root / "images"), "zip", root, "images")
        shutil.rmtree(root / "images")


def module(root, **options):
    return MiniImageNetDataModule(root, **{"ways": 2, "shots": 1, "queries": 2, "tasks_per_batch": 2, **options})


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("layout", ["folders", "zips", "zips without a folder", "tables", "tables and a zip"])
def test_layouts_give_the_same_data(tree, tmp_path, layout):
    reference = module(tree)
    lay_out(tree, tmp_path, layout)
    data = module(tmp_path)
    for split in ("train", "test"):
        episode, expected = (next(iter(getattr(d, f"{split}_dataloader")())).validate() for d in (data, reference))
        assert episode.support_inputs.shape[1:] == (2, 3, 84, 84)
        for part, other in zip(episode, expected, strict=True):
            assert torch.equal(part, other)
    assert {split: list(pool.members) for split, pool in data._pools.items()} == SMALL


@pytest.mark.usefixtures("small")
def test_pictures_that_a_table_lists_and_nobody_has(tree, tmp_path):
    lay_out(tree, tmp_path, "tables")
    (tmp_path / "images" / "n0100000002.jpg").unlink()
    with pytest.raises(ValueError, match=r"images/n0100000002\.jpg is not"):
        module(tmp_path).setup()
    with pytest.warns(UserWarning, match="1 of 12 images are left out"):
        module(tmp_path, on_broken="skip").setup()
    (tmp_path / "val.csv").write_text("file,class\nx,y\n")
    with pytest.raises(ValueError, match=r"val.csv' must have the columns filename,label; found \['file', 'class'\]"):
        find_split(tmp_path, "val")


def test_other_classes_are_refused(tree):
    with pytest.raises(
        ValueError, match=r"exactly the 64 classes .* found 64 missing, such as 'n01532829' and 3 unknown"
    ):
        module(tree).setup()


def test_nothing_found(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"where train was not found \(an empty folder\)"):
        module(tmp_path).setup()
    with pytest.raises(FileNotFoundError, match="no such folder"):
        module(tmp_path / "nowhere").setup()


def test_its_split_is_its_own(tmp_path):
    with pytest.raises(ValueError, match="class_split must be left out, since MiniImageNetDataModule has a split"):
        module(tmp_path, class_split=(0.5, 0.25, 0.25))


@needs_data
@pytest.mark.parametrize(("split", "classes", "images"), [("train", 64, 300), ("val", 16, 100), ("test", 20, 300)])
def test_real_classes(split, classes, images):
    """The counts of the paper, and the very classes of Ravi and Larochelle's own tables."""
    found = find_split(REAL, split)
    with (REAL / f"{split}.csv").open() as file:
        theirs = {row["label"] for row in csv.DictReader(file)}
    assert set(found) == theirs == set(shipped_split("mini_imagenet")[split])
    assert [len(files) for files in found.values()] == [images] * classes


@needs_data
@pytest.mark.slow  # Reads 26,800 photographs: that their pixels are the literature's can be told from all only.
def test_real_pixels():
    data = MiniImageNetDataModule(REAL, shots=5, eval_tasks_per_batch=2, test_tasks=4)
    data.setup()
    images = data._pools["train"].source.tensors[0]
    assert images.shape == (19_200, 3, 84, 84)
    values = images.to(torch.float32).div_(255)
    # Lee et al. (2019) over the training classes; here is half of the images.
    assert values.mean(dim=(0, 2, 3)).tolist() == pytest.approx(mini_imagenet.MEAN, abs=0.01)
    assert values.std(dim=(0, 2, 3)).tolist() == pytest.approx(mini_imagenet.STD, abs=0.01)
    episode = next(iter(data.test_dataloader())).validate()
    assert episode.support_inputs.shape == (2, 25, 3, 84, 84)
    assert episode.query_inputs.shape == (2, 75, 3, 84, 84)
