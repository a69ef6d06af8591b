"""mini-ImageNet: few-shot recognition of photographs."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_imaml.components.checks import require_choice
from lightning_imaml.data.datasets.class_splits import require_same_classes, shipped_split
from lightning_imaml.data.episodic import EpisodicDataModule
from lightning_imaml.data.images import (
    Classes,
    Decoding,
    ImageFile,
    OnBroken,
    find_classes,
    find_place,
    image_names,
    load_images,
)
from lightning_imaml.data.images.cache import default_cache_dir
from lightning_imaml.data.labelled import ClassPool
from lightning_imaml.data.sampling import SPLITS

SIZE = 84  # pixels, the side of a picture
MEAN = (0.4721, 0.4533, 0.4100)
"""The mean of each channel over the training classes, with images in [0, 1] (Lee et al., 2019, MetaOptNet)."""
STD = (0.2772, 0.2678, 0.2845)
"""The standard deviation of each channel, likewise."""


class MiniImageNetDataModule(EpisodicDataModule):
    """Photographs of 100 classes of ImageNet (Vinyals et al., 2016), 600 each, in the split of Ravi and Larochelle.

    64 classes are for training, 16 for validation and 20 for test, as ``[3, 84, 84]`` pictures with values in [0, 1].
    Pictures of another size are squeezed or stretched to 84×84 pixels with Lanczos' filter, as in MAML's preparation.
    To normalise them, pass ``transform=torchvision.transforms.v2.Normalize(mini_imagenet.MEAN, mini_imagenet.STD)``.

    ``root`` has one of these layouts; ImageNet's terms do not allow to download it here:

    - folders ``train``, ``val`` and ``test``, or archives ``train.zip`` …, with ``<class>/*.jpg`` inside (in an archive
      also ``train/<class>/*.jpg``), classes by their WordNet ids, such as n01532829;
    - Ravi and Larochelle's: ``train.csv``, ``val.csv`` and ``test.csv`` with the columns ``filename,label``, and all
      pictures in a folder ``images`` or an archive ``images.zip``.

    The pictures are read once, in about ten seconds, and then kept in one file a split beside the data or, where that
    cannot be written, in the cache folder (``$XDG_CACHE_HOME/lightning_imaml`` or ``~/.cache/lightning_imaml``); in
    memory they take 21 kB each.

    Args:
        root: the folder with the data.
        on_broken: whether an image that cannot be read stops all, or is left out with a warning.
        **options: those of :class:`EpisodicDataModule`, apart from the datasets and ``class_split``.

    Raises:
        FileNotFoundError: in :meth:`setup`, the data is not there.
        ValueError: as for :class:`EpisodicDataModule`; a split has other classes than it should, or an image cannot be
            read.
    """

    fixed_split = True

    def __init__(self, root: str | os.PathLike[str], *, on_broken: OnBroken = "raise", **options: Any) -> None:
        # A plain string: hyperparameters go into checkpoints, which load only plain types by default.
        root = os.fspath(root)
        super().__init__(None, None, None, **options)
        require_choice("on_broken", on_broken, ("raise", "skip"))
        self.root = Path(root).expanduser()

    def configure_splits(self) -> Mapping[str, ClassPool]:
        """Read the pictures of each split."""
        split, pools = shipped_split("mini_imagenet"), {}
        for name in SPLITS:
            classes = find_split(self.root, name)
            require_same_classes(
                f"the {name} split in {str(self.root)!r}",
                split[name],
                list(classes),
                "Use the classes and the split of Ravi and Larochelle; for others, use ImageFolderDataModule.",
            )
            pools[name] = load_images(
                classes,
                Decoding(SIZE, channels=3),
                name=f"mini-imagenet-{name}",
                folders=[self.root, default_cache_dir()],
                on_broken=self.hparams["on_broken"],
            )
        return pools


def find_split(root: Path, split: str) -> Classes:
    """Find the pictures of one split in any layout.

    Raises:
        FileNotFoundError: there is no such layout.
    """
    images, table = find_place(root, "images"), root / f"{split}.csv"
    if images is not None and table.is_file():
        return _listed(images, table)
    place = find_place(root, split)
    if place is None:
        held = ", ".join(sorted(entry.name for entry in root.iterdir())[:10]) if root.is_dir() else "no such folder"
        raise FileNotFoundError(
            "root must hold mini-ImageNet as folders or .zip files train, val and test, or as images (a folder or "
            f"images.zip) with train.csv, val.csv and test.csv; root is {str(root)!r}, where {split} was not found "
            f"({held or 'an empty folder'}). Pass the folder that holds the data as root."
        )
    inside = f"{split}/"
    nested = not place.is_dir() and all(name.startswith(inside) for name in image_names(place))
    return find_classes(place, prefix=inside if nested else "")


def _listed(images: Path, table: Path) -> Classes:
    """The pictures that a table lists, by class."""
    where = {name.rpartition("/")[2]: name for name in image_names(images)}
    classes: Classes = {}
    with table.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets write a byte order mark
        for row in csv.DictReader(file):
            if "filename" not in row or "label" not in row:
                raise ValueError(f"{str(table)!r} must have the columns filename,label; found {list(row)}.")
            # One that is not there is a broken image: named, or left out, when it is read.
            name = where.get(row["filename"], row["filename"])
            classes.setdefault(row["label"], []).append(ImageFile(images, name))
    return {label: sorted(files) for label, files in sorted(classes.items())}
