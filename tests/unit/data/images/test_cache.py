"""The cache of arrays: it may cost time, but never stops a run or gives wrong data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lightning_imaml.data.images.cache import cached_arrays, default_cache_dir


class Builder:
    def __init__(self):
        self.calls = 0

    def __call__(self):
        self.calls += 1
        return {"images": np.arange(1000), "names": np.array(["a", "bé"])}


def check(arrays):
    assert arrays["images"].tolist() == list(range(1000))
    assert arrays["names"].tolist() == ["a", "bé"]


def test_arrays_are_built_once(tmp_path):
    build = Builder()
    for _ in range(2):
        check(cached_arrays("key", [tmp_path / "new" / "folder"], build))
    assert build.calls == 1
    assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == ["key.npz"]


@pytest.mark.parametrize("damage", ["empty", "garbage", "half", "flipped bit", "plain array"])
def test_a_damaged_file_is_built_again(tmp_path, damage):
    build = Builder()
    cached_arrays("key", [tmp_path], build)
    path = tmp_path / "key.npz"
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    if damage == "plain array":
        with path.open("wb") as file:
            np.save(file, np.arange(3))
    else:
        path.write_bytes(
            {"empty": b"", "garbage": b"not an archive", "half": whole[: len(whole) // 2], "flipped bit": flipped}[
                damage
            ]
        )
    check(cached_arrays("key", [tmp_path], build))
    assert build.calls == 2
    assert path.read_bytes() == whole


def test_the_next_folder_is_used_when_one_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    build = Builder()
    for _ in range(2):
        check(cached_arrays("key", [tmp_path / "file", tmp_path / "second"], build))
    assert build.calls == 1


def test_a_read_only_folder_is_left_alone(tmp_path):
    """Also by root, whom the file system would let write there."""
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    check(cached_arrays("key", [closed, tmp_path / "open"], Builder()))
    assert not list(closed.iterdir())
    assert (tmp_path / "open" / "key.npz").is_file()


def test_without_a_folder_to_write_to(tmp_path):
    (tmp_path / "file").write_text("in the way")
    check(cached_arrays("key", [tmp_path / "file"], Builder()))


def test_a_write_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(np, "savez", full)
    check(cached_arrays("key", [tmp_path], Builder()))
    assert not list(tmp_path.iterdir())


def test_default_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "lightning_imaml"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_dir() == Path.home() / ".cache" / "lightning_imaml"
