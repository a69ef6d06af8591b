"""Modules that have moved are found where they were first, too."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

import lightning_imaml.data
from lightning_imaml.data import datasets, images, sampling

MOVED = {
    datasets: [
        "cifar_fs", "class_splits", "cub", "folder", "glyphs", "mini_imagenet", "omniglot", "regression", "tasksets",
        "tiered_imagenet",
    ],
    images: ["augmentation", "cache"],
    sampling: ["batching", "episode_list"],
}  # fmt: skip


@pytest.mark.parametrize(("room", "name"), [(room, name) for room, names in MOVED.items() for name in names])
def test_a_module_has_both_paths(room, name):
    module = importlib.import_module(f"{room.__name__}.{name}")
    assert importlib.import_module(f"lightning_imaml.data.{name}") is module
    assert getattr(lightning_imaml.data, name) is module


def test_constants_are_found_in_a_fresh_process():
    code = """
from lightning_imaml.data import mini_imagenet
from lightning_imaml.data.images import Decoding
from lightning_imaml.data.mini_imagenet import MEAN, STD
from lightning_imaml.data.sampling import Shape, TaskSource

assert (mini_imagenet.MEAN, mini_imagenet.STD) == (MEAN, STD)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
