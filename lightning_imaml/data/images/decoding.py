"""Image files decoded to arrays of one size: all at once, kept in a cache, or when they are drawn."""

from __future__ import annotations

import hashlib
import os
import zipfile
import zlib
from collections.abc import Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from lightning_imaml.data.images.cache import Arrays, cached_arrays
from lightning_imaml.data.images.files import ImageFile, ImageReader, open_archive
from lightning_imaml.data.labelled import ClassPool, LabelledTensors

OnBroken = Literal["raise", "skip"]
# zipfile raises a RuntimeError for a file that is encrypted or packed in a way that it does not know.
_BROKEN = (OSError, SyntaxError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error, Image.DecompressionBombError)
_VERSION = 2  # of the decoding: change it together with what decides the pixels, so that old caches are not used
_SHOWN = 5
_ORIENTATION = 0x0112  # the tag of EXIF 2.32, section 4.6.4
_UPRIGHT: Mapping[object, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class Decoding:
    """How a file becomes an array ``[C, size, size]``, turned upright as its EXIF orientation says.

    Attributes:
        size: pixels, the side of the picture.
        channels: 1 for greyscale, 3 for colour; images of another kind are converted, transparency is dropped.
        crop: whether to cut the sides off an image that is not square, instead of squeezing it.
    """

    size: int
    channels: int
    crop: bool = False

    def __call__(self, data: bytes) -> NDArray[np.uint8]:
        """Decode a file, shrinking or enlarging it with Lanczos' filter where it has another size."""
        with Image.open(BytesIO(data)) as opened:
            image: Image.Image = opened
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"it has {image.mode} pixels, which are not 8 bits; convert it")
            image = _upright(image)
            if "transparency" in image.info:
                image = image.convert("RGBA")
            image = image.convert("L" if self.channels == 1 else "RGB")
            if image.size != (self.size, self.size):
                size, filter = (self.size, self.size), Image.Resampling.LANCZOS
                image = ImageOps.fit(image, size, filter) if self.crop else image.resize(size, filter)
            array = np.array(image, dtype=np.uint8)  # A copy, since Pillow's own memory is read-only.
        return np.ascontiguousarray(array[None] if self.channels == 1 else array.transpose(2, 0, 1))


def _upright(image: Image.Image) -> Image.Image:
    """Turn an image as its EXIF orientation says, as Pillow's ``exif_transpose`` does."""
    image.load()  # first, since Pillow turns a TIFF by itself then
    # The pixels may be whole where what a camera wrote beside them is not: Pillow raises many errors for that.
    with suppress(Exception):
        method = _UPRIGHT.get(image.getexif().get(_ORIENTATION))
        return image if method is None else image.transpose(method)
    return image


def read_image(reader: ImageReader, file: ImageFile, decode: Decoding) -> NDArray[np.uint8]:
    """Read one image.

    Returns:
        ``[C, size, size]``.

    Raises:
        ValueError: it cannot be read; the message names it.
    """
    try:
        return decode(reader.read(file))
    except (*_BROKEN, KeyError) as error:
        raise ValueError(
            f"every image must be a readable image file; {file} is not ({error}). Restore or remove the file, or "
            "pass on_broken='skip' to go on without it."
        ) from error


def load_images(
    classes: Mapping[str, Sequence[ImageFile]],
    decode: Decoding,
    *,
    name: str,
    folders: Sequence[Path],
    on_broken: OnBroken = "raise",
) -> ClassPool:
    """Read all images into memory, from the cache if they are there.

    Args:
        classes: the files of each class.
        decode: makes arrays of them.
        name: begins the name of the file in the cache.
        folders: where to look for the cache, see :func:`cached_arrays`.
        on_broken: whether an image that cannot be read stops all, or is left out with a warning.

    Returns:
        The classes in the same order, also those without images.

    Raises:
        ValueError: an image cannot be read; the message names it.
    """
    files = [file for members in classes.values() for file in members]
    labels = np.repeat(np.arange(len(classes)), [len(members) for members in classes.values()])
    key = hashlib.sha256(f"{_VERSION} {decode} {on_broken}".encode())
    for line in _fingerprints(files):
        key.update(line.encode("utf-8", "surrogateescape"))  # names need not be Unicode on Linux
    for label in labels:
        key.update(b"%d " % label)
    arrays = cached_arrays(f"{name}-{key.hexdigest()[:16]}", folders, lambda: _read_all(files, decode, on_broken))
    kept = arrays["kept"]
    if len(kept) < len(files):
        missing = sorted(set(range(len(files))) - set(kept.tolist()))
        more = ", …" if len(missing) > _SHOWN else ""
        named = ", ".join(str(files[index]) for index in missing[:_SHOWN])
        rank_zero_warn(f"{len(missing)} of {len(files)} images are left out, since they cannot be read: {named}{more}.")
    source = LabelledTensors(
        torch.from_numpy(arrays["images"]),
        torch.from_numpy(labels[kept]),
        list(classes),
        [files[index].name for index in kept],
    )
    members: dict[Hashable, NDArray[np.int64]] = {
        label: np.flatnonzero(labels[kept] == index) for index, label in enumerate(classes)
    }
    return ClassPool(source, members, named=True)


def _fingerprints(files: Sequence[ImageFile]) -> list[str]:
    """What tells one copy of the files from another without reading them."""
    lines = []
    sums: dict[Path, dict[str, int]] = {}
    for file in files:
        if file.place.is_dir():
            status = (file.place / file.name).stat() if (file.place / file.name).is_file() else None
            lines.append(f"{file.name} {status and (status.st_size, status.st_mtime_ns)}\n")
            continue
        if file.place not in sums:
            with open_archive(file.place) as archive:
                sums[file.place] = {entry.filename: entry.CRC for entry in archive.infolist()}
        lines.append(f"{file.name} {sums[file.place].get(file.name)}\n")
    return lines


def _read_all(files: Sequence[ImageFile], decode: Decoding, on_broken: OnBroken) -> Arrays:
    images = np.empty((len(files), decode.channels, decode.size, decode.size), dtype=np.uint8)
    with ImageReader() as reader, ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        reader.open(files)

        def read(index: int) -> bool:
            try:
                images[index] = read_image(reader, files[index], decode)
            except ValueError:
                if on_broken == "raise":
                    raise
                return False
            return True

        # In order, so that of several broken images the same one is named each time.
        readable = list(threads.map(read, range(len(files))))
    kept = np.flatnonzero(np.asarray(readable, dtype=bool))
    return {"images": images if len(kept) == len(files) else images[kept], "kept": kept}


class LazyImages(Dataset[tuple[Tensor, int]]):
    """Images that stay on disk and are read when they are drawn: for more data than fits into memory.

    Args:
        classes: the files of each class.
        decode: makes arrays of them.
    """

    def __init__(self, classes: Mapping[str, Sequence[ImageFile]], decode: Decoding) -> None:
        self.files = [file for members in classes.values() for file in members]
        self.targets = [label for label, members in enumerate(classes.values()) for _ in members]
        self.classes = list(classes)
        self.items = [file.name for file in self.files]
        self.decode = decode
        self.reader: ImageReader | None = None
        self.process = 0

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """An image ``[C, size, size]``, ``float32`` in [0, 1], and its label."""
        if self.reader is None or self.process != os.getpid():
            # In each loader worker anew: forked processes that share an open archive would move its file position.
            self.reader, self.process = ImageReader(), os.getpid()
            self.reader.open(self.files)
        image = torch.from_numpy(read_image(self.reader, self.files[index], self.decode))
        return image.to(torch.float32).div_(255), self.targets[index]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "reader": None}
