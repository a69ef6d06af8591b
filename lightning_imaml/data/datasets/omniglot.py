"""Omniglot: few-shot recognition of handwritten characters."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torchvision.datasets import Omniglot

from lightning_imaml.components.checks import require_choice
from lightning_imaml.data.episodic import EpisodicDataModule
from lightning_imaml.data.images import Classes, Decoding, OnBroken, find_classes, find_place, load_images
from lightning_imaml.data.images.cache import default_cache_dir
from lightning_imaml.data.labelled import ClassPool, shuffle_classes

PARTS = ("images_background", "images_evaluation")
SPLIT_SIZES = {"train": 1200, "val": 100, "test": 323}  # characters
DRAWINGS = 20  # of each character
SIZE = 28  # pixels, the side of a picture


class OmniglotDataModule(EpisodicDataModule):
    """Handwritten characters of 50 alphabets, 20 drawings each (Lake, Salakhutdinov and Tenenbaum, 2015).

    All 1,623 characters of the background and the evaluation part as ``[1, 28, 28]`` pictures with ink 1 and paper 0,
    shrunk from 105 pixels with Lanczos' filter as in MAML (Finn et al., 2017). The characters are put into a fixed
    random order, which depends on no seed: the first 1,200 are for training, the next 100 for validation and the last
    323 for test, the proportions of Santoro et al. (2016). In training, each character turned by 90, 180 and 270
    degrees is a class of its own: 4,800 training classes.

    The data is looked for in ``root`` and in ``root/omniglot-py``, where torchvision puts it: ``images_background`` and
    ``images_evaluation``, each as a folder or else as a zip file, with ``<part>/<alphabet>/<character>/*.png`` inside.
    It is read once, in seconds, and then kept in one file beside the data or, where that cannot be written, in the
    cache folder (``$XDG_CACHE_HOME/lightning_imaml`` or ``~/.cache/lightning_imaml``).

    Args:
        root: the folder with the data.
        download: fetch the data with torchvision when it is not there.
        rotations: whether the turned characters are training classes.
        on_broken: whether an image that cannot be read stops all, or is left out with a warning.
        **options: those of :class:`EpisodicDataModule`, apart from the datasets and ``class_split``; a class has 20
            images.

    Raises:
        FileNotFoundError: in :meth:`setup`, the data is not there.
        ValueError: as for :class:`EpisodicDataModule`; the data is incomplete, or an image cannot be read.
    """

    fixed_split = True

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        download: bool = False,
        rotations: bool = True,
        on_broken: OnBroken = "raise",
        **options: Any,
    ) -> None:
        # A plain string: hyperparameters go into checkpoints, which load only plain types by default.
        root = os.fspath(root)
        super().__init__(None, None, None, rotations=rotations, **options)
        require_choice("on_broken", on_broken, ("raise", "skip"))
        self.root = Path(root).expanduser()

    def prepare_data(self) -> None:
        """Download what is not there, if asked to."""
        if not self.hparams["download"]:
            return
        for part in PARTS:
            if find_part(self.root, part) is None:
                Omniglot(str(self.root), background=part == "images_background", download=True)

    def configure_splits(self) -> Mapping[str, ClassPool]:
        """Read the drawings and split the characters."""
        pool = load_omniglot(self.root, self.hparams["on_broken"])
        order = shuffle_classes(list(pool.members))
        pools, start = {}, 0
        for split, count in SPLIT_SIZES.items():
            pools[split] = pool.subset(order[start : start + count])
            start += count
        return pools


def find_part(root: Path, part: str) -> Path | None:
    """The folder or else the zip file of one part of the data, or None."""
    return find_place(root / "omniglot-py", part) or find_place(root, part)


def load_omniglot(root: Path, on_broken: OnBroken = "raise") -> ClassPool:
    """Read both parts of Omniglot, from the cache if there is one.

    Returns:
        1,623 classes ``<alphabet>/<character>`` of pictures ``[1, 28, 28]`` with ink 1.

    Raises:
        FileNotFoundError: a part is not there.
        ValueError: characters or drawings are missing, or an image cannot be read.
    """
    places = {part: find_part(root, part) for part in PARTS}
    found = {part: place for part, place in places.items() if place is not None}
    if len(found) < len(PARTS):
        missing = ", ".join(part for part, place in places.items() if place is None)
        held = ", ".join(sorted(entry.name for entry in root.iterdir())[:10]) if root.is_dir() else "no such folder"
        raise FileNotFoundError(
            f"root must hold Omniglot's {' and '.join(PARTS)}, each as a folder or a .zip file, itself or in a folder "
            f"omniglot-py; root is {str(root)!r}, where {missing} was not found ({held or 'an empty folder'}). "
            "Pass download=True to fetch it, or the folder that holds the data as root."
        )
    classes: Classes = {}
    for part, place in found.items():
        classes |= find_classes(place, depth=2, prefix="" if place.is_dir() else f"{part}/")
    expected = sum(SPLIT_SIZES.values())
    uneven = [name for name, files in classes.items() if len(files) != DRAWINGS]
    if len(classes) != expected or uneven:
        example = f", among them {uneven[0]} with {len(classes[uneven[0]])}" if uneven else ""
        raise ValueError(
            f"Omniglot must have {expected} characters with {DRAWINGS} drawings each; found {len(classes)} "
            f"characters, {len(uneven)} of them with another number of drawings{example}, in "
            f"{' and '.join(map(str, found.values()))}. The copy is incomplete: remove it and pass download=True."
        )
    folders = [next(iter(found.values())).parent, default_cache_dir()]
    pool = load_images(classes, Decoding(SIZE, channels=1), name="omniglot", folders=folders, on_broken=on_broken)
    pool.source.tensors[0].bitwise_not_()  # type: ignore[attr-defined]  # 255 - x: ink is black in the files
    return pool
