"""Data modules that draw few-shot episodes."""

import sys

from lightning_imaml.data.base import PerSample, TaskDataModule
from lightning_imaml.data.datasets import (
    cifar_fs,
    class_splits,
    cub,
    folder,
    glyphs,
    mini_imagenet,
    omniglot,
    regression,
    tasksets,
    tiered_imagenet,
)
from lightning_imaml.data.datasets.cifar_fs import CifarFSDataModule
from lightning_imaml.data.datasets.cub import CUBDataModule
from lightning_imaml.data.datasets.folder import ImageFolderDataModule
from lightning_imaml.data.datasets.glyphs import GlyphDataModule
from lightning_imaml.data.datasets.mini_imagenet import MiniImageNetDataModule
from lightning_imaml.data.datasets.omniglot import OmniglotDataModule
from lightning_imaml.data.datasets.regression import (
    LinearRegressionDataModule,
    RegressionDataModule,
    SinusoidDataModule,
)
from lightning_imaml.data.datasets.tasksets import TasksetDataModule
from lightning_imaml.data.datasets.tiered_imagenet import TieredImageNetDataModule
from lightning_imaml.data.episodic import EpisodicDataModule
from lightning_imaml.data.images import augmentation, cache
from lightning_imaml.data.images.augmentation import Affine, RandomAffine
from lightning_imaml.data.labelled import ClassPool, LabelledTensors
from lightning_imaml.data.sampling import batching, episode_list

# Modules that have moved are found at their first path, too: ``from lightning_imaml.data.mini_imagenet import MEAN``.
for _moved in (
    augmentation, batching, cache, cifar_fs, class_splits, cub, episode_list, folder, glyphs, mini_imagenet, omniglot,
    regression, tasksets, tiered_imagenet,
):  # fmt: skip
    sys.modules[f"{__name__}.{_moved.__name__.rpartition('.')[2]}"] = _moved

__all__ = [
    "Affine",
    "CUBDataModule",
    "CifarFSDataModule",
    "ClassPool",
    "EpisodicDataModule",
    "GlyphDataModule",
    "ImageFolderDataModule",
    "LabelledTensors",
    "LinearRegressionDataModule",
    "MiniImageNetDataModule",
    "OmniglotDataModule",
    "PerSample",
    "RandomAffine",
    "RegressionDataModule",
    "SinusoidDataModule",
    "TaskDataModule",
    "TasksetDataModule",
    "TieredImageNetDataModule",
]
