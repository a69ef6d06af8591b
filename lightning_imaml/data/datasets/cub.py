"""CUB-200-2011: few-shot recognition of birds."""

from __future__ import annotations

from pathlib import Path

from lightning_imaml.data.datasets.class_splits import ClassSplit, shipped_split
from lightning_imaml.data.datasets.folder import ImageFolderDataModule, classes_in
from lightning_imaml.data.images import Classes


class CUBDataModule(ImageFolderDataModule):
    """Photographs of 200 kinds of birds (Wah et al., 2011), 11,788 in all, in the split of Chen et al.

    Of the classes in order, every second is for training, and of the others every second for validation and for test
    (`A Closer Look at Few-shot Classification <https://arxiv.org/abs/1904.04232>`_, ICLR 2019): 100, 50 and 50 classes,
    as ``[3, 84, 84]`` pictures with values in [0, 1], whose longer sides are cut off. For another of CUB's splits pass
    ``split_file``.

    ``root`` holds the folder ``images`` of the extracted ``CUB_200_2011.tgz``, itself or in ``CUB_200_2011``, or the
    folders of the classes, such as 001.Black_footed_Albatross. CUB overlaps with ImageNet: do not test networks on it
    that were trained there.

    Args:
        root: the folder.
        **options: those of :class:`ImageFolderDataModule` and :class:`EpisodicDataModule`, apart from the datasets and
            ``class_split``.

    Raises:
        FileNotFoundError: in :meth:`setup`, there is no such folder.
        ValueError: as for :class:`ImageFolderDataModule`; a class of the split is not there.
    """

    fixed_split = True

    def named_split(self) -> ClassSplit:
        """The 100, 50 and 50 classes, unless ``split_file`` names others."""
        return super().named_split() or shipped_split("cub")

    def find_images(self, root: Path) -> Classes:
        """The image files of each class."""
        places = [place for place in (root / "images", root / "CUB_200_2011" / "images") if place.is_dir()]
        return classes_in(places[0] if places else root)
