"""Image files: found by class, decoded alike from folders and archives, named where they are broken."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import shutil
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_imaml.data.images import Decoding, ImageFile, LazyImages, decoding, find_classes, load_images

COLOUR = Decoding(8, channels=3)


def save(path, array, mode=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array, dtype=np.uint8), mode).save(path, **options)


@pytest.fixture
def tree(tmp_path):
    """Two classes, one of them with a folder inside; a class without images; files that are no images of a class."""
    root, random = tmp_path / "tree", np.random.default_rng(0)
    for name in ("cat/1.png", "cat/2.PNG", "dog/a/3.png", "dog/b/4.png"):
        save(root / name, random.integers(0, 256, (8, 8, 3)))
    (root / "cat" / "notes.txt").write_text("no image")
    (root / "empty").mkdir()
    save(root / "stray.png", np.zeros((8, 8, 3)))
    save(root / ".hidden" / "5.png", np.zeros((8, 8, 3)))
    return root


def load(classes, cache, decode=COLOUR, **options):
    return load_images(classes, decode, name="test", folders=[cache], **options)


def pixels(pool, index):
    return pool.source.tensors[0][index].numpy()


@pytest.mark.parametrize("packed", [False, True])
def test_classes_are_found(tree, tmp_path, packed):
    place = tree
    if packed:
        place = tmp_path / "tree.zip"
        shutil.make_archive(str(place.with_suffix("")), "zip", tree)
    classes = find_classes(place)
    assert {label: [file.name for file in files] for label, files in classes.items()} == {
        "cat": ["cat/1.png", "cat/2.PNG"],
        "dog": ["dog/a/3.png", "dog/b/4.png"],
        "empty": [],
    }
    pool = load(classes, tmp_path / "cache")
    assert {label: items.tolist() for label, items in pool.members.items()} == {
        "cat": [0, 1],
        "dog": [2, 3],
        "empty": [],
    }
    for index, name in enumerate(pool.item_names()):
        expected = np.asarray(Image.open(tree / name)).transpose(2, 0, 1)
        assert np.array_equal(pixels(pool, index), expected)


def test_two_folders_can_make_up_a_class(tree):
    assert [*find_classes(tree, depth=2)] == ["dog/a", "dog/b"]


def test_greyscale_transparency_and_palettes_become_colour(tmp_path):
    grey = np.arange(64).reshape(8, 8)
    colour = np.stack([grey, grey + 1, grey + 2], axis=-1)
    save(tmp_path / "c" / "1grey.png", grey)
    save(tmp_path / "c" / "2rgba.png", np.concatenate([colour, np.full((8, 8, 1), 9)], axis=-1))
    palette = Image.fromarray(np.asarray(colour, dtype=np.uint8)).quantize(64)
    palette.save(tmp_path / "c" / "3palette.png", transparency=bytes([0, 128, 255]))
    pool = load(find_classes(tmp_path), tmp_path)
    assert np.array_equal(pixels(pool, 0), np.stack([grey] * 3))
    assert np.array_equal(pixels(pool, 1), colour.transpose(2, 0, 1))
    assert np.array_equal(pixels(pool, 2), np.asarray(palette.convert("RGB")).transpose(2, 0, 1))
    alone = load(find_classes(tmp_path), tmp_path, Decoding(8, channels=1))
    assert np.array_equal(pixels(alone, 0), grey[None])


def test_other_sizes_are_squeezed_or_cropped(tmp_path):
    wide = np.zeros((8, 16, 3))
    wide[:, 4:12] = 255  # the middle square is white
    save(tmp_path / "c" / "1.png", wide)
    assert pixels(load(find_classes(tmp_path), tmp_path, Decoding(8, 3, crop=True)), 0).min() == 255
    squeezed = pixels(load(find_classes(tmp_path), tmp_path, Decoding(8, 3)), 0)
    assert squeezed[:, :, 0].max() < 128 < squeezed[:, :, 4].min()


def break_file(tree, how):
    path = tree / "dog" / "a" / "3.png"
    if how == "half":
        path.write_bytes(path.read_bytes()[:60])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "text":
        path.write_text("not an image")
    else:  # 16 bits
        Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 900).save(path)


@pytest.mark.parametrize("how", ["half", "empty", "text", "16 bits"])
def test_a_broken_image_is_named_or_left_out(tree, tmp_path, how):
    break_file(tree, how)
    classes = find_classes(tree)
    with pytest.raises(ValueError, match=r"tree/dog/a/3.png is not \(.*\)\. Restore or remove .* on_broken='skip'"):
        load(classes, tmp_path)
    for _ in range(2):  # read, then from the cache
        with pytest.warns(UserWarning, match="1 of 4 images are left out, since they cannot be read: .*dog/a/3.png"):
            pool = load(classes, tmp_path, on_broken="skip")
    assert {label: items.tolist() for label, items in pool.members.items()} == {"cat": [0, 1], "dog": [2], "empty": []}
    assert pool.item_names() == ["cat/1.png", "cat/2.PNG", "dog/b/4.png"]
    assert pool.source.tensors[1].tolist() == [0, 0, 1]
    with pytest.raises(ValueError, match=r"tree/dog/a/3.png is not"):
        load(classes, tmp_path)  # the cache of the other way to go on is not used


def test_a_damaged_archive_names_its_file(tree, tmp_path):
    path = tmp_path / "tree.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name in ("cat/1.png", "dog/a/3.png"):
            archive.write(tree / name, name)
    content = bytearray(path.read_bytes())
    content[content.index(b"dog/a/3.png") + 60] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"tree.zip/dog/a/3.png is not \(Bad CRC"):
        load(find_classes(path), tmp_path / "cache")
    missing = {"cat": [ImageFile(path, "cat/1.png"), ImageFile(path, "cat/9.png")]}
    with pytest.raises(ValueError, match=r"tree.zip/cat/9.png is not"):
        load(missing, tmp_path / "cache")


def test_an_archive_that_is_none_is_named(tmp_path):
    path = tmp_path / "tree.zip"
    path.write_bytes(b"PK half a download")
    with pytest.raises(ValueError, match=r"must be a whole .zip file; '.*tree.zip' is not \(.*\)\. Fetch it anew"):
        find_classes(path)


def test_a_file_that_is_twice_in_an_archive_counts_once(tree, tmp_path):
    path = tmp_path / "tree.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("cat/1.png", "cat/2.PNG"):
            archive.write(tree / name, name)
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.write(tree / "cat" / "1.png", "cat/1.png")
    assert [file.name for file in find_classes(path)["cat"]] == ["cat/1.png", "cat/2.PNG"]


def test_links_in_circles_count_once(tree):
    (tree / "cat" / "self").symlink_to(tree / "cat")
    (tree / "dog" / "all").symlink_to(tree)
    outside = tree.parent / "outside"
    save(outside / "6.png", np.zeros((8, 8, 3)))
    (tree / "cat" / "more").symlink_to(outside)
    found = {label: [file.name for file in files] for label, files in find_classes(tree).items()}
    assert found["cat"] == ["cat/1.png", "cat/2.PNG", "cat/more/6.png"]
    assert found["dog"] == ["dog/a/3.png", "dog/b/4.png"]


def test_a_folder_that_cannot_be_read_is_named(tree, monkeypatch):
    scandir = os.scandir

    def refusing(path):
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(PermissionError, match=r"Permission denied: '.*tree/dog'"):
        find_classes(tree)


def test_names_that_are_not_unicode(tree, tmp_path):
    os.rename(tree / "cat", os.fsencode(tree) + b"/caf\xe9")  # noqa: PTH104 - a path of bytes
    classes = find_classes(tree)
    assert [os.fsencode(label) for label in classes] == [b"caf\xe9", b"dog", b"empty"]
    assert len(load(classes, tmp_path / "cache").source) == 4


def test_the_cache_follows_the_files(tree, tmp_path, monkeypatch):
    first = load(find_classes(tree), tmp_path)
    monkeypatch.setattr(decoding, "_read_all", None)
    again = load(find_classes(tree), tmp_path)  # not read
    assert torch.equal(again.source.tensors[0], first.source.tensors[0])
    monkeypatch.undo()
    save(tree / "cat" / "1.png", np.full((8, 8, 3), 7))
    assert (pixels(load(find_classes(tree), tmp_path), 0) == 7).all()


@pytest.mark.parametrize("packed", [False, True])
def test_images_can_stay_on_disk(tree, tmp_path, packed):
    place = tree
    if packed:
        place = tmp_path / "tree.zip"
        shutil.make_archive(str(place.with_suffix("")), "zip", tree)
    classes = find_classes(place)
    lazy, pool = LazyImages(classes, COLOUR), load(classes, tmp_path / "cache")
    lazy[0]
    for source in (lazy, pickle.loads(pickle.dumps(lazy))):  # as a loader worker gets it
        assert len(source) == 4
        for index in range(4):
            image, label = source[index]
            assert torch.equal(image, pool.source[index][0])
            assert label == pool.source[index][1]
    assert (lazy.classes, lazy.items) == (pool.source.classes, pool.source.items)
    if not packed:
        break_file(tree, "half")
        with pytest.raises(ValueError, match=r"dog/a/3\.png is not"):
            lazy[2]


def test_a_forked_worker_opens_the_archive_anew(tree, tmp_path):
    """Processes that share an open file share its position too."""
    place = tmp_path / "tree.zip"
    shutil.make_archive(str(place.with_suffix("")), "zip", tree)
    lazy = LazyImages(find_classes(place), COLOUR)
    image, _ = lazy[0]
    mine = lazy.reader
    fork = multiprocessing.get_context("fork")
    answers = fork.SimpleQueue()

    def work():
        there, _ = lazy[0]
        answers.put((torch.equal(there, image), lazy.reader is mine))

    worker = fork.Process(target=work)
    worker.start()
    worker.join()
    assert answers.get() == (True, False)
    lazy[1]
    assert lazy.reader is mine  # and stays open in one process
