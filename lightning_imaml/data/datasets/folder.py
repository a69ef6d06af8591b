"""Few-shot recognition on an image folder of one's own."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from numpy.typing import NDArray

from lightning_imaml.components.checks import require_choice
from lightning_imaml.data.datasets.class_splits import ClassSplit, read_split
from lightning_imaml.data.episodic import EpisodicDataModule
from lightning_imaml.data.images import (
    Classes,
    Decoding,
    LazyImages,
    OnBroken,
    find_classes,
    find_place,
    ignored_files,
    image_names,
    load_images,
)
from lightning_imaml.data.images.cache import default_cache_dir
from lightning_imaml.data.labelled import ClassPool
from lightning_imaml.data.sampling import SPLITS

_SHOWN = 5  # how many kinds of ignored files a message names


class ImageFolderDataModule(EpisodicDataModule):
    """Draws tasks from images that lie in a folder for each class, with any number of images each.

    ``root`` is one of these; images may lie in folders below that of their class, too, unless ``nested`` is set:

    - a folder or zip archive of ``<class>/…``, whose classes are split as ``class_split`` or ``split_file`` says;
    - a folder of ``train``, ``val`` and ``test``, or some of them, each a folder or ``.zip`` archive of ``<class>/…``.
      Other folders beside them are left out, with a warning.

    One more folder around all classes, as most archives have, does not matter. Files that are no images by their
    endings are left out, and counted in a message.
    Images become ``[channels, image_size, image_size]`` with values in [0, 1]: a camera's orientation (EXIF) is
    applied, what is not square loses its sides, greyscale becomes colour or the other way round, and transparency is
    dropped.

    Args:
        root: the folder or archive.
        image_size: pixels, the side of a picture.
        channels: 3 for colour, 1 for greyscale.
        nested: whether a class is the path of the folder that holds its images, such as birds/finch, instead of the
            first folder, birds.
        split_file: a CSV file with the columns ``class,split``: the name of a class's folder, and train, val or test.
            Classes that it does not name are left out.
        on_broken: whether an image that cannot be read stops all, or is left out with a warning.
        in_memory: whether all images are kept in memory, as bytes; else each is read when it is drawn, which needs
            ``num_workers`` and ``on_broken="raise"``.
        cache_dir: where images in memory are kept between runs, decoded; None for ``$XDG_CACHE_HOME/lightning_imaml``
            or ``~/.cache/lightning_imaml``.
        **options: those of :class:`EpisodicDataModule`, apart from the datasets. ``small_classes="skip"`` leaves out
            the classes with too few images.

    Raises:
        FileNotFoundError: in :meth:`setup`, there is no such folder or file.
        ValueError: as for :class:`EpisodicDataModule`; no class is found, or an image cannot be read.
    """

    crop = True
    """Whether an image that is not square loses its sides, instead of being squeezed."""

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        image_size: int = 84,
        channels: int = 3,
        nested: bool = False,
        split_file: str | os.PathLike[str] | None = None,
        on_broken: OnBroken = "raise",
        in_memory: bool = True,
        cache_dir: str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> None:
        # Plain strings: hyperparameters go into checkpoints, which load only plain types by default.
        root = os.fspath(root)
        split_file = None if split_file is None else os.fspath(split_file)
        cache_dir = None if cache_dir is None else os.fspath(cache_dir)
        super().__init__(None, None, None, in_memory=in_memory, **options)
        require_choice("on_broken", on_broken, ("raise", "skip"))
        if on_broken == "skip" and not in_memory:
            raise ValueError(
                "on_broken must be 'raise' where images are read when they are drawn, since a task cannot do without "
                "one; found 'skip' with in_memory=False. Keep the images in memory, or remove the broken ones."
            )
        if channels not in (1, 3) or image_size < 1:
            raise ValueError(
                f"channels must be 1 or 3 and image_size at least 1 pixel; found {channels} and {image_size}."
            )

    def named_split(self) -> ClassSplit | None:
        """The classes of each split by name; None where root has a folder for each split, or ``class_split`` says."""
        file = self.hparams["split_file"]
        return None if file is None else read_split(Path(file).expanduser())

    def find_images(self, root: Path) -> Classes:
        """The image files in root by class, for a split by name or by ``class_split``."""
        _say_ignored([root])
        classes = classes_in(root, self.hparams["nested"])
        _say_deeper(classes)
        return classes

    def configure_splits(self) -> Mapping[str, ClassPool]:
        """Find the classes, split them and read their images."""
        root = Path(self.hparams["root"]).expanduser()
        if (not root.is_dir() and root.suffix != ".zip") or not root.exists():
            raise FileNotFoundError(
                f"root must be a folder or a .zip archive with a folder for each class; found none at "
                f"{str(root)!r}. Check the path."
            )
        split = self.named_split()
        if split is None and (splits := _split_folders(root, self.hparams["nested"])):
            return {name: self._load(classes) for name, classes in splits.items()}
        classes = _required(root, self.find_images(root))
        if split is None:
            first = dict.fromkeys(label.split("/")[0] for label in classes)
            if first.keys() <= set(SPLITS):
                raise ValueError(
                    f"the folders train, val and test must lie in root itself; found {', '.join(first)} further "
                    f"inside {str(root)!r}. Pass the folder around them as root; extract them from an archive."
                )
            return self.split_by_class(self._load(classes))
        missing = [label for labels in split.values() for label in labels if label not in classes]
        if missing:
            raise ValueError(
                f"the split must name folders that root has; found {len(missing)} that {str(root)!r} lacks, such as "
                f"{missing[0]!r} (it has {next(iter(classes))!r}). Use the data that the split is of, and all of it."
            )
        return {name: self._load({label: classes[label] for label in labels}) for name, labels in split.items()}

    def _load(self, classes: Classes) -> ClassPool:
        decode = Decoding(self.hparams["image_size"], self.hparams["channels"], crop=self.crop)
        if self.hparams["in_memory"]:
            folder = self.hparams["cache_dir"]
            return load_images(
                classes,
                decode,
                name="images",
                folders=[Path(folder).expanduser() if folder else default_cache_dir()],
                on_broken=self.hparams["on_broken"],
            )
        source = LazyImages(classes, decode)
        return ClassPool(source, _positions(classes), named=True)


def _split_folders(root: Path, nested: bool) -> dict[str, Classes]:
    """The classes of each split that has a folder or an archive; none if the folders of root are classes."""
    places = {name: place for name in SPLITS if (place := find_place(root, name)) is not None}
    splits = {name: _nested_in_split(name, place) if nested else classes_in(place) for name, place in places.items()}
    if not any(splits.values()):  # A class may be called "train", too: then its folder holds images and no folders.
        return {}
    others = [
        entry.name
        for entry in sorted(root.iterdir())
        if entry.is_dir() and entry.name not in SPLITS and not entry.name.startswith(".") and image_names(entry)
    ]
    if others:
        rank_zero_warn(
            f"{', '.join(splits)} in {str(root)!r} are taken for splits, so {', '.join(others)} beside them is left "
            "out. Rename it if it is a split (the validation classes' folder is val), or remove it."
        )
    _say_ignored(list(places.values()))
    _say_deeper({label: files for classes in splits.values() for label, files in classes.items()})
    return {name: _required(root / name, classes) for name, classes in splits.items()}


def _nested_in_split(name: str, place: Path) -> Classes:
    """The classes by their whole paths, so that those of several splits can be compared."""
    own = f"{name}/"  # which train.zip may have around all of its images
    return find_classes(place, None, own if all(image.startswith(own) for image in image_names(place)) else "")


def classes_in(place: Path, nested: bool = False) -> Classes:
    """The image files of a folder or archive by class, whether or not another folder is around all classes.

    Args:
        place: the folder or archive.
        nested: whether a class is the path of the folder that holds the images, instead of the first folder.
    """
    depth = None if nested else 1
    classes = find_classes(place, depth)
    first = {label.split("/")[0] for label in classes}
    if len(first) == 1:  # a folder around the classes, as in most archives of a folder
        inside = find_classes(place, depth, prefix=f"{first.pop()}/")
        classes = inside if len(inside) > 1 else classes
    return classes


def _say_ignored(places: Sequence[Path]) -> None:
    """Say how many files of which kinds are left out."""
    kinds = sum((ignored_files(place) for place in places), Counter())
    if kinds:
        listed = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(_SHOWN))
        rank_zero_info(
            f"{kinds.total()} files in {', '.join(map(str, places))} are left out, since they are no images by their "
            f"endings or lie in no folder: {listed}{', …' if len(kinds) > _SHOWN else ''}."
        )


def _say_deeper(classes: Classes) -> None:
    """Say where several folders make up one class, which may be meant or not."""
    folders = {(file.place, file.name.rpartition("/")[0]) for files in classes.values() for file in files}
    if len(folders) > len(classes):
        rank_zero_info(
            f"{len(folders)} folders hold images, and the {len(classes)} folders around them, such as "
            f"{next(iter(classes))!r}, are the classes. Pass nested=True if each folder of images is a class."
        )


def _required(place: Path, classes: Classes) -> Classes:
    if not any(classes.values()):
        raise ValueError(
            f"root must have a folder of images for each class; found no image in a folder of {str(place)!r}. "
            "Put the images of each class into a folder of its own."
        )
    return classes


def _positions(classes: Mapping[str, Sequence[object]]) -> dict[Hashable, NDArray[np.int64]]:
    """The positions of each class's items, where all items are listed class by class."""
    members: dict[Hashable, NDArray[np.int64]] = {}
    start = 0
    for label, items in classes.items():
        members[label] = np.arange(start, start + len(items))
        start += len(items)
    return members
