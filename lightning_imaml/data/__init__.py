"""Data modules that draw few-shot episodes."""

from lightning_imaml.data.augmentation import Affine, RandomAffine
from lightning_imaml.data.base import PerSample, TaskDataModule
from lightning_imaml.data.cifar_fs import CifarFSDataModule
from lightning_imaml.data.cub import CUBDataModule
from lightning_imaml.data.episodic import EpisodicDataModule
from lightning_imaml.data.folder import ImageFolderDataModule
from lightning_imaml.data.glyphs import GlyphDataModule
from lightning_imaml.data.labelled import ClassPool, LabelledTensors
from lightning_imaml.data.mini_imagenet import MiniImageNetDataModule
from lightning_imaml.data.omniglot import OmniglotDataModule
from lightning_imaml.data.regression import LinearRegressionDataModule, RegressionDataModule, SinusoidDataModule
from lightning_imaml.data.tasksets import TasksetDataModule
from lightning_imaml.data.tiered_imagenet import TieredImageNetDataModule

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
