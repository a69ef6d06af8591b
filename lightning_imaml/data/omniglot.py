"""Omniglot: few-shot recognition of handwritten characters."""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Iterator, Mapping
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torchvision.datasets import Omniglot

from lightning_imaml.data.cache import Arrays, cached_arrays, default_cache_dir
from lightning_imaml.data.episodic import EpisodicDataModule
from lightning_imaml.data.labelled import ClassPool, LabelledTensors, shuffle_classes

PARTS = ("images_background", "images_evaluation")
SPLIT_SIZES = {"train": 1200, "val": 100, "test": 323}  # characters
DRAWINGS = 20  # of each character
SIZE = 28  # pixels, the side of a picture
_VERSION = 1  # of the reading: change it together with what decides the pixels, so that old caches are not used


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
        ways: classes a task, N.
        shots: support images a class, K.
        queries: query images a class, Q, in training; ``shots + queries`` can be at most 20.
        eval_shots: support images a class in validation and test; None for the same as ``shots``.
        eval_queries: query images a class in validation and test; None for the same as ``queries``.
        tasks_per_batch: tasks a training batch of one process.
        batches_per_epoch: training batches an epoch.
        val_tasks: the number of validation tasks, over all processes.
        test_tasks: the number of test tasks, over all processes.
        eval_tasks_per_batch: at most so many tasks a batch in validation and test; None for ``tasks_per_batch``.
        seed: the seed of the episodes.
        num_workers: loader processes; the pictures are in memory, so 0 is best.
        download: fetch the data with torchvision when it is not there.

    Raises:
        FileNotFoundError: in :meth:`setup`, the data is not there.
        ValueError: as for :class:`EpisodicDataModule`; the data is incomplete, or an image cannot be read.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        ways: int = 5,
        shots: int = 1,
        queries: int = 15,
        eval_shots: int | None = None,
        eval_queries: int | None = None,
        tasks_per_batch: int = 16,
        batches_per_epoch: int = 100,
        val_tasks: int = 160,
        test_tasks: int = 600,
        eval_tasks_per_batch: int | None = None,
        seed: int = 0,
        num_workers: int = 0,
        download: bool = False,
    ) -> None:
        # A plain string: hyperparameters go into checkpoints, which load only plain types by default.
        root = os.fspath(root)
        super().__init__(
            ways=ways,
            shots=shots,
            queries=queries,
            eval_shots=eval_shots,
            eval_queries=eval_queries,
            tasks_per_batch=tasks_per_batch,
            batches_per_epoch=batches_per_epoch,
            val_tasks=val_tasks,
            test_tasks=test_tasks,
            eval_tasks_per_batch=eval_tasks_per_batch,
            seed=seed,
            num_workers=num_workers,
        )
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
        arrays = load_omniglot(self.root)
        position = {name: index for index, name in enumerate(arrays["names"].tolist())}
        order = [str(name) for name in shuffle_classes(list(position))]
        pools, start = {}, 0
        for split, count in SPLIT_SIZES.items():
            names = order[start : start + count]
            images = arrays["images"][[position[name] for name in names]]
            if split == "train":
                images = np.concatenate([np.rot90(images, turns, axes=(-2, -1)) for turns in range(4)])
                names = names + [f"{name}/rot{90 * turns}" for turns in (1, 2, 3) for name in names]
            pools[split] = ClassPool.of(
                LabelledTensors(
                    torch.from_numpy(np.ascontiguousarray(images)).reshape(-1, 1, SIZE, SIZE),
                    torch.arange(len(names)).repeat_interleave(DRAWINGS),
                    names,
                )
            )
            start += count
        return pools


def find_part(root: Path, part: str) -> Path | None:
    """The folder or else the zip file of one part of the data, or None."""
    for folder in (root / "omniglot-py", root):
        if (folder / part).is_dir():
            return folder / part
        if (folder / f"{part}.zip").is_file():
            return folder / f"{part}.zip"
    return None


def load_omniglot(root: Path) -> Arrays:
    """Read both parts of Omniglot, from the cache if there is one.

    Returns:
        "images" ``[1623, 20, 28, 28]`` ``uint8`` with ink 255, and "names" ``[1623]``, ``<alphabet>/<character>``.

    Raises:
        FileNotFoundError: a part is not there.
        ValueError: characters or drawings are missing, or an image cannot be read.
    """
    places = {part: find_part(root, part) for part in PARTS}
    found = [place for place in places.values() if place is not None]
    if len(found) < len(PARTS):
        missing = ", ".join(part for part, place in places.items() if place is None)
        held = ", ".join(sorted(entry.name for entry in root.iterdir())[:10]) if root.is_dir() else "no such folder"
        raise FileNotFoundError(
            f"root must hold Omniglot's {' and '.join(PARTS)}, each as a folder or a .zip file, itself or in a folder "
            f"omniglot-py; root is {str(root)!r}, where {missing} was not found ({held or 'an empty folder'}). "
            "Pass download=True to fetch it, or the folder that holds the data as root."
        )
    key = hashlib.sha256(f"{_VERSION} {SIZE}".encode())
    for place in found:
        for line in _listing(place):
            key.update(line.encode())
    folders = [found[0].parent, default_cache_dir()]
    return cached_arrays(f"omniglot-{key.hexdigest()[:16]}", folders, lambda: _read_parts(found))


def _listing(place: Path) -> Iterator[str]:
    """What tells one copy of the data from another without reading it."""
    if place.is_dir():
        for path in sorted(place.glob("*/*/*.png")):
            status = path.stat()
            yield f"{path.relative_to(place).as_posix()} {status.st_size} {status.st_mtime_ns}\n"
    else:
        with zipfile.ZipFile(place) as archive:
            for entry in archive.infolist():
                yield f"{entry.filename} {entry.CRC}\n"


def _read_parts(places: list[Path]) -> Arrays:
    drawings: dict[str, list[NDArray[np.uint8]]] = {}
    for place in places:
        for name, file, origin in _files(place):
            drawings.setdefault(name, []).append(_read_image(file, origin))
    expected = sum(SPLIT_SIZES.values())
    uneven = [name for name, images in drawings.items() if len(images) != DRAWINGS]
    if len(drawings) != expected or uneven:
        example = f", among them {uneven[0]} with {len(drawings[uneven[0]])}" if uneven else ""
        raise ValueError(
            f"Omniglot must have {expected} characters with {DRAWINGS} drawings each; found {len(drawings)} "
            f"characters, {len(uneven)} of them with another number of drawings{example}, in "
            f"{' and '.join(map(str, places))}. The copy is incomplete: remove it and pass download=True."
        )
    names = sorted(drawings)
    return {"images": np.stack([np.stack(drawings[name]) for name in names]), "names": np.asarray(names)}


def _files(place: Path) -> Iterator[tuple[str, BinaryIO, str]]:
    """The drawings of one part, in order: "<alphabet>/<character>", the open file and where it is."""
    if place.is_dir():
        for path in sorted(place.glob("*/*/*.png")):
            with path.open("rb") as file:
                yield f"{path.parent.parent.name}/{path.parent.name}", file, str(path)
    else:
        with zipfile.ZipFile(place) as archive:
            for member in sorted(archive.namelist()):
                part, *character, drawing = member.split("/")
                if part == place.stem and len(character) == 2 and drawing.endswith(".png"):
                    yield "/".join(character), BytesIO(archive.read(member)), f"{place}/{member}"


def _read_image(file: BinaryIO, origin: str) -> NDArray[np.uint8]:
    try:
        with Image.open(file) as image:
            small = image.convert("L").resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(
            f"every Omniglot image must be a readable PNG; {origin} is not ({error}). Remove the damaged copy and pass "
            "download=True, or restore the file."
        ) from error
    return np.asarray(ImageOps.invert(small), dtype=np.uint8)
