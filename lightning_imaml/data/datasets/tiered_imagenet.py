"""tieredImageNet: few-shot recognition of photographs of categories that no training class belongs to."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lightning_imaml.data.datasets.class_splits import ClassSplit, shipped_split
from lightning_imaml.data.datasets.folder import ImageFolderDataModule, classes_in
from lightning_imaml.data.images import Classes, find_place
from lightning_imaml.data.sampling import SPLITS


class TieredImageNetDataModule(ImageFolderDataModule):
    """Photographs of 608 classes of ImageNet, split by category (`Ren et al., 2018 <https://arxiv.org/abs/1803.00676>`_).

    351 classes of 20 categories are for training, 97 of 6 for validation and 160 of 8 for test: 448,695, 124,261 and
    206,209 images, as ``[3, 84, 84]`` pictures with values in [0, 1]. Pictures of another size are squeezed to 84×84
    pixels with Lanczos' filter.

    ``root`` has one of these layouts; ImageNet's terms do not allow to download it here:

    - a folder for each class by its WordNet id, such as n01530575, or a ``.zip`` archive of such; other classes, as
      ImageNet's training folder has them, are left out;
    - folders or archives ``train``, ``val`` and ``test`` of such; a class that is in several of them, as in ImageNet's
      own ``train`` and ``val``, is read from the first.

    Args:
        root: the folder or archive.
        in_memory: whether all images are kept in memory, as bytes: 16 GB of them. Else each is read when it is drawn,
            which needs ``num_workers``.
        **options: those of :class:`ImageFolderDataModule` and :class:`EpisodicDataModule`, apart from the datasets and
            ``class_split``.

    Raises:
        FileNotFoundError: in :meth:`setup`, there is no such folder.
        ValueError: as for :class:`ImageFolderDataModule`; a class of the split is not there.
    """

    fixed_split = True
    crop = False

    def __init__(self, root: str | os.PathLike[str], *, in_memory: bool = False, **options: Any) -> None:
        super().__init__(root, in_memory=in_memory, **options)

    def named_split(self) -> ClassSplit:
        """The 351, 97 and 160 classes, unless ``split_file`` names others."""
        return super().named_split() or shipped_split("tiered_imagenet")

    def find_images(self, root: Path) -> Classes:
        """The image files of each class, in any layout."""
        classes: Classes = {}
        for name in reversed(SPLITS):
            if (place := find_place(root, name)) is not None:
                classes |= classes_in(place)
        return classes or super().find_images(root)
