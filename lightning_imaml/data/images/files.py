"""Image files in folders and zip archives, by class: found and read."""

from __future__ import annotations

import os
import zipfile
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path, PurePosixPath
from typing import NamedTuple

ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")


class ImageFile(NamedTuple):
    """A file in a folder or in a zip archive: the place, and the file's path inside it with forward slashes."""

    place: Path
    name: str

    def __str__(self) -> str:
        return f"{self.place}/{self.name}"


Classes = dict[str, list[ImageFile]]
"""The image files of each class, both in order."""


def find_place(root: Path, name: str) -> Path | None:
    """The folder ``name`` or else the archive ``name.zip`` in ``root``, or None."""
    if (root / name).is_dir():
        return root / name
    archive = root / f"{name}.zip"
    return archive if archive.is_file() else None


def find_classes(place: Path, depth: int | None = 1, prefix: str = "") -> Classes:
    """Find the image files of a folder or zip archive by class.

    Args:
        place: the folder or archive.
        depth: how many folders make up the name of a class; deeper ones do not matter. None for all of them: the class
            is the path of the folder that holds the images.
        prefix: look in this folder of the archive only.

    Returns:
        The classes, sorted; those of empty folders have no files, and are left out where ``depth`` is None.
    """
    classes: Classes = {}
    for name in sorted(_names(place)):
        if not name.startswith(prefix):
            continue
        parts = name.removeprefix(prefix).split("/")
        if len(parts) <= (depth or 1) or _hidden(parts):
            continue
        is_image = name.lower().endswith(ENDINGS)
        if depth is None and not is_image:
            continue
        files = classes.setdefault("/".join(parts[: depth or -1]), [])
        if is_image:
            files.append(ImageFile(place, name))
    return dict(sorted(classes.items()))


def _hidden(parts: Sequence[str]) -> bool:
    return any(part.startswith((".", "__MACOSX")) for part in parts)


def ignored_files(place: Path) -> Counter[str]:
    """What :func:`find_classes` leaves out: how many files of each ending, and how many images in no folder."""
    kinds: Counter[str] = Counter()
    for name in _names(place):
        parts = name.split("/")
        if not parts[-1] or _hidden(parts):
            continue
        if not name.lower().endswith(ENDINGS):
            kinds[PurePosixPath(name).suffix.lower() or "without an ending"] += 1
        elif len(parts) == 1:
            kinds["in no folder"] += 1
    return kinds


def image_names(place: Path) -> list[str]:
    """The paths of the image files in a folder or archive."""
    return [name for name in _names(place) if name.lower().endswith(ENDINGS) and not name.startswith("__MACOSX")]


def _names(place: Path) -> list[str]:
    """All paths in a folder or archive, those of folders with a slash at the end."""
    if place.is_dir():
        found = []
        for folder, folders, files in os.walk(place, followlinks=True, onerror=_raise):
            # A link to a folder that it lies in would show the same images again and again.
            folders[:] = [name for name in folders if not _leads_back(Path(folder, name))]
            inside = Path(folder).relative_to(place).as_posix()
            inside = "" if inside == "." else f"{inside}/"
            found += [inside, *(inside + file for file in files)]
        return found
    with open_archive(place) as archive:
        return list(dict.fromkeys(archive.namelist()))  # an archive may hold a file twice


def _raise(error: OSError) -> None:
    """Stop at a folder that cannot be read, which ``os.walk`` would leave out in silence."""
    raise error


def _leads_back(folder: Path) -> bool:
    return folder.is_symlink() and folder.parent.resolve().is_relative_to(folder.resolve())


def open_archive(place: Path) -> zipfile.ZipFile:
    """Open a zip archive.

    Raises:
        ValueError: it is none, or not a whole one.
    """
    try:
        return zipfile.ZipFile(place)
    except zipfile.BadZipFile as error:
        raise ValueError(
            f"an archive must be a whole .zip file; {str(place)!r} is not ({error}). Fetch it anew, or remove it."
        ) from error


class ImageReader:
    """Reads files; archives stay open until the end of the ``with`` block."""

    def __init__(self) -> None:
        self.stack = ExitStack()
        self.archives: dict[Path, zipfile.ZipFile] = {}

    def __enter__(self) -> ImageReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def open(self, files: Sequence[ImageFile]) -> None:
        """Open the archives that these files are in."""
        for place in {file.place for file in files}:
            if not place.is_dir():
                self.archives[place] = self.stack.enter_context(open_archive(place))

    def read(self, file: ImageFile) -> bytes:
        """The content of a file."""
        archive = self.archives.get(file.place)
        return (file.place / file.name).read_bytes() if archive is None else archive.read(file.name)
