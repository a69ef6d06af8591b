"""Omniglot: layouts on a small made-up copy, counts on the real one."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

from lightning_imaml.data import OmniglotDataModule, omniglot
from lightning_imaml.data.images import decoding
from lightning_imaml.data.labelled import gather

REAL = ROOT.parent / "shared" / "data" / "omniglot"
PARTS = {"images_background": ["Latin", "Greek"], "images_evaluation": ["Runes"]}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Three alphabets of four characters with twenty drawings each, black ink on white."""
    root = tmp_path_factory.mktemp("tree")
    random = np.random.default_rng(0)
    number = 0
    for part, alphabets in PARTS.items():
        for alphabet in alphabets:
            for character in range(1, 5):
                number += 1
                folder = root / part / alphabet / f"character{character:02}"
                folder.mkdir(parents=True)
                for drawing in range(1, 21):
                    paper = np.full((105, 105), 255, dtype=np.uint8)
                    top, left = random.integers(0, 60, 2)
                    paper[top : top + 40, left : left + 8] = 0
                    Image.fromarray(paper).convert("1").save(folder / f"{number:04}_{drawing:02}.png")
    return root


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(omniglot, "SPLIT_SIZES", {"train": 6, "val": 3, "test": 3})


def lay_out(tree, root, layout):
    """Put a copy of the data under ``root`` in one of the layouts that people have."""
    base = root / "omniglot-py" if layout.startswith("torchvision") else root
    base.mkdir(exist_ok=True)
    for part in PARTS:
        if layout.endswith("zips"):
            shutil.make_archive(str(base / part), "zip", tree, part)
        else:
            shutil.copytree(tree / part, base / part)


def module(root, **options):
    return OmniglotDataModule(root, **{"ways": 3, "queries": 4, "tasks_per_batch": 2, **options})


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("layout", ["folders", "zips", "torchvision folders", "torchvision zips"])
def test_layouts_give_the_same_data(tree, tmp_path, layout):
    reference = next(iter(module(tree).train_dataloader()))
    lay_out(tree, tmp_path, layout)
    episode = next(iter(module(tmp_path).train_dataloader())).validate()
    assert episode.support_inputs.shape == (2, 3, 1, 28, 28)
    for part, other in zip(episode, reference, strict=True):
        assert torch.equal(part, other)


@pytest.mark.usefixtures("small")
def test_splits_and_rotations(tree):
    data = module(tree)
    data.setup()
    names = {split: list(pool.members) for split, pool in data._pools.items()}
    assert {split: len(classes) for split, classes in names.items()} == {"train": 24, "val": 3, "test": 3}
    upright = names["train"][:6]
    assert len({*upright, *names["val"], *names["test"]}) == 12
    assert names["train"][6:] == [f"{name}/rot{turn}" for turn in (90, 180, 270) for name in upright]
    pool = data._pools["train"]

    def images(name):
        return gather(pool.source, torch.from_numpy(pool.members[name]))

    for turns in range(4):
        turned = images(names["train"][6 * turns + 2])
        assert torch.equal(turned, torch.rot90(images(upright[2]), turns, dims=(-2, -1)))


@pytest.mark.usefixtures("small")
def test_ink_is_one(tree):
    inputs = next(iter(module(tree).test_dataloader())).support_inputs
    assert inputs.max() == 1
    assert inputs.min() == 0
    assert inputs.mean() < 0.1


@pytest.mark.usefixtures("small")
def test_read_once(tree, tmp_path, monkeypatch):
    lay_out(tree, tmp_path, "zips")
    module(tmp_path).setup()
    assert [path.suffix for path in tmp_path.iterdir()].count(".npz") == 1

    def never(*arguments):
        raise AssertionError("read again")

    monkeypatch.setattr(decoding, "_read_all", never)
    module(tmp_path, seed=3).setup()


def test_nothing_found(tmp_path):
    with pytest.raises(
        FileNotFoundError,
        match=r"'.*nowhere', where images_background, images_evaluation was not found "
        r"\(no such folder\)\. Pass download=True",
    ):
        module(tmp_path / "nowhere").setup()
    with pytest.raises(FileNotFoundError, match="an empty folder"):
        module(tmp_path).setup()


def test_one_part_missing(tree, tmp_path):
    shutil.copytree(tree / "images_background", tmp_path / "images_background")
    with pytest.raises(FileNotFoundError, match=r"images_evaluation was not found \(images_background\)"):
        module(tmp_path).setup()


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("layout", ["folders", "zips"])
def test_a_broken_image_is_named(tree, tmp_path, layout):
    copy = tmp_path / "copy"
    copy.mkdir()
    lay_out(tree, copy, "folders")
    (copy / "images_background" / "Greek" / "character02" / "0006_03.png").write_bytes(b"\x89PNG broken")
    if layout == "zips":
        lay_out(copy, tmp_path, "zips")
        copy = tmp_path
    with pytest.raises(ValueError, match=r"readable image .*images_background.*/Greek/character02/0006_03.png is not"):
        module(copy).setup()


def test_an_incomplete_copy(tree, tmp_path):
    lay_out(tree, tmp_path, "folders")
    with pytest.raises(ValueError, match=r"must have 1623 characters with 20 drawings each; found 12 characters, 0 of"):
        module(tmp_path).setup()


@pytest.mark.usefixtures("small")
def test_a_missing_drawing(tree, tmp_path):
    lay_out(tree, tmp_path, "folders")
    (tmp_path / "images_evaluation" / "Runes" / "character01" / "0009_20.png").unlink()
    with pytest.raises(ValueError, match=r"1 of them with .* among them Runes/character01 with 19"):
        module(tmp_path).setup()


@pytest.mark.usefixtures("small")
def test_download_fetches_what_is_missing(tree, tmp_path, monkeypatch):
    calls = []

    def fetch(root, background, download):
        part = "images_background" if background else "images_evaluation"
        calls.append((root, part, download))
        shutil.copytree(tree / part, Path(root) / "omniglot-py" / part)

    monkeypatch.setattr(omniglot, "Omniglot", fetch)
    module(tmp_path).prepare_data()
    assert not calls
    for _ in range(2):
        data = module(tmp_path, download=True)
        data.prepare_data()
        data.setup()
    assert calls == [(str(tmp_path), part, True) for part in PARTS]


def test_root_goes_into_checkpoints_as_text(tmp_path):
    assert module(tmp_path).hparams.root == str(tmp_path)


@pytest.mark.skipif(not REAL.is_dir(), reason="Omniglot is not in ../shared/data/omniglot")
def test_real_omniglot(tmp_path):
    for part in PARTS:  # links, so that the cache is not put beside the data
        (tmp_path / f"{part}.zip").symlink_to(REAL / f"{part}.zip")
    data = OmniglotDataModule(tmp_path)
    data.setup()
    counts = {split: {len(items) for items in pool.members.values()} for split, pool in data._pools.items()}
    assert counts == {"train": {20}, "val": {20}, "test": {20}}
    names = {split: set(pool.members) for split, pool in data._pools.items()}
    upright = {name for name in names["train"] if "/rot" not in name}
    assert (len(names["train"]), len(upright), len(names["val"]), len(names["test"])) == (4800, 1200, 100, 323)
    assert len(upright | names["val"] | names["test"]) == 1623
    assert len({name.split("/")[0] for name in upright | names["val"] | names["test"]}) == 50
    episode = next(iter(data.test_dataloader())).validate()
    assert episode.query_inputs.shape == (15, 75, 1, 28, 28)  # 600 tasks in 38 batches of 15 or 16
    assert 0.03 < episode.query_inputs.mean() < 0.2
