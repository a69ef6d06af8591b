"""CIFAR-FS: few-shot recognition of the classes of CIFAR-100."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchvision.datasets import CIFAR100

from lightning_imaml.data.datasets.class_splits import require_same_classes, shipped_split
from lightning_imaml.data.episodic import EpisodicDataModule
from lightning_imaml.data.labelled import ClassPool, LabelledTensors


class CifarFSDataModule(EpisodicDataModule):
    """All 60,000 images of CIFAR-100, in the class split of `Bertinetto et al. <https://arxiv.org/abs/1805.08136>`_.

    64 classes are for training, 16 for validation and 20 for test, 600 images each: those of CIFAR-100's training part,
    then those of its test part, as ``[3, 32, 32]`` pictures with values in [0, 1].

    Args:
        root: the folder with torchvision's ``cifar-100-python``.
        download: fetch the data with torchvision when it is not there.
        **options: those of :class:`EpisodicDataModule`, apart from the datasets and ``class_split``.

    Raises:
        FileNotFoundError: in :meth:`setup`, the data is not there.
        ValueError: as for :class:`EpisodicDataModule`; the data has other classes than it should.
    """

    fixed_split = True

    def __init__(self, root: str | os.PathLike[str], *, download: bool = False, **options: Any) -> None:
        # A plain string: hyperparameters go into checkpoints, which load only plain types by default.
        root = os.fspath(root)
        super().__init__(None, None, None, **options)
        self.root = Path(root).expanduser()

    def prepare_data(self) -> None:
        """Download the data, if asked to."""
        if self.hparams["download"]:
            CIFAR100(str(self.root), download=True)

    def configure_splits(self) -> Mapping[str, ClassPool]:
        """Read the images and split the classes."""
        try:
            parts = [CIFAR100(str(self.root), train=train) for train in (True, False)]
        except RuntimeError as error:  # torchvision's word for missing or damaged files
            raise FileNotFoundError(
                f"root must hold CIFAR-100 as torchvision keeps it, in a folder cifar-100-python; root is "
                f"{str(self.root)!r} ({error}). Pass download=True to fetch it."
            ) from error
        names = list(parts[0].classes)
        split = shipped_split("cifar_fs")
        wanted = [label for labels in split.values() for label in labels]
        require_same_classes(f"CIFAR-100 in {str(self.root)!r}", wanted, names, "Fetch it anew with download=True.")
        images = torch.from_numpy(np.concatenate([part.data for part in parts])).permute(0, 3, 1, 2).contiguous()
        items = [
            f"{part}/{index}" for part, data in zip(("train", "test"), parts, strict=True) for index in range(len(data))
        ]
        pool = ClassPool.of(
            LabelledTensors(images, torch.tensor([label for part in parts for label in part.targets]), names, items)
        )
        return {name: pool.subset(labels) for name, labels in split.items()}
