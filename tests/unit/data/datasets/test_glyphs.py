"""Printed letters."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import matplotlib
import pytest
import torch
from PIL import ImageFont

from lightning_imaml.data import GlyphDataModule, glyphs
from lightning_imaml.data.datasets.glyphs import MIN_FACES, load_glyphs


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("glyphs")
    load_glyphs(folder)
    return folder


def test_enough_letters_in_enough_faces(cache):
    letters = load_glyphs(cache)
    images, labels = letters.tensors
    assert 1_300 <= len(letters.classes) <= 1_450
    assert images.shape[1:] == (1, 28, 28)
    counts = labels.bincount()
    assert counts.min() >= MIN_FACES
    assert counts.max() <= 16
    assert {"A", "g", "ß", "Ω", "Ж"} <= set(letters.classes)
    assert not {"Α", "А"} & set(letters.classes)  # Greek and Cyrillic: drawn like the Latin one


def test_no_picture_is_blank_or_shown_twice(cache):
    images, labels = load_glyphs(cache).tensors
    shown = defaultdict(set)
    for image, label in zip(images.numpy(), labels.tolist(), strict=True):
        shown[image.tobytes()].add(label)
    assert len(shown) == len(images)
    assert bytes(28 * 28) not in shown


def test_letters_are_centred_ink(cache):
    letters = load_glyphs(cache)
    ink = letters.tensors[0][:, 0].float() / 255
    assert ink[:, 0].sum() == ink[:, :, 0].sum() == 0  # a margin of paper
    rows, columns = ink.amax(2) > 0, ink.amax(1) > 0
    for lit in (rows, columns):
        before, after = lit.int().argmax(1), lit.flip(1).int().argmax(1)
        assert (before - after).abs().max() <= 1


def test_splits_share_no_letter_and_no_picture(cache):
    data = GlyphDataModule(cache_dir=cache)
    data.setup()
    assert sum(len(pool.members) for pool in data._pools.values()) == len(load_glyphs(cache).classes)
    items = [{index for items in pool.members.values() for index in items.tolist()} for pool in data._pools.values()]
    assert len(set().union(*items)) == sum(map(len, items))


def test_the_split_does_not_depend_on_the_seed(cache):
    first, second = GlyphDataModule(cache_dir=cache), GlyphDataModule(cache_dir=cache, seed=1)
    first.setup()
    second.setup()
    assert list(first._pools["test"].members) == list(second._pools["test"].members)
    one, other = (next(iter(data.train_dataloader())) for data in (first, second))
    assert not torch.equal(one.support_inputs, other.support_inputs)


def test_default_episodes(cache):
    data = GlyphDataModule(cache_dir=cache)
    episode = next(iter(data.train_dataloader())).validate()
    assert episode.support_inputs.shape == (16, 5, 1, 28, 28)
    assert episode.query_inputs.shape == (16, 25, 1, 28, 28)
    assert episode.query_inputs.dtype == torch.float32
    assert 0 <= episode.query_inputs.min() < episode.query_inputs.max() <= 1
    assert data.hparams.cache_dir == str(cache)


def test_too_many_images_a_letter(cache):
    with pytest.raises(ValueError, match=r"must have at least shots \+ queries = 5 \+ 8 = 13 images; .* with 12"):
        GlyphDataModule(shots=5, queries=8, cache_dir=cache).setup()


def test_a_letter_that_a_face_lacks_ink_for_is_blank():
    path = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    assert not glyphs.render(" ", ImageFont.truetype(str(path), 96)).any()


def test_the_cache_is_used(cache, monkeypatch):
    def never(paths):
        raise AssertionError("drawn again")

    monkeypatch.setattr(glyphs, "render_letters", never)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache / "elsewhere"))
    load_glyphs(cache)
    with pytest.raises(AssertionError, match="drawn again"):
        GlyphDataModule().setup()
