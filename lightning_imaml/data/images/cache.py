"""Arrays kept on disk between runs."""

from __future__ import annotations

import os
import stat
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Arrays = dict[str, NDArray[Any]]

_ANY_WRITE = stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH


def default_cache_dir() -> Path:
    """The folder for what can be made again: ``$XDG_CACHE_HOME/lightning_imaml``, or under ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path("~/.cache").expanduser()) / "lightning_imaml"


def cached_arrays(name: str, folders: Sequence[Path], build: Callable[[], Arrays]) -> Arrays:
    """Read arrays from the first folder that has them, or build them and keep them in the first that can be written.

    A file that is damaged is built again, and without a folder to write to the arrays are built each time: a cache
    may cost time, but never stops a run.

    Args:
        name: the name of the file without its ending. It must change with everything that the arrays depend on.
        folders: where to look, in order of preference.
        build: makes the arrays.

    Returns:
        The arrays by name.
    """
    for folder in folders:
        arrays = _read(folder / f"{name}.npz")
        if arrays is not None:
            return arrays
    arrays = build()
    for folder in folders:
        if _write(folder / f"{name}.npz", arrays):
            break
    return arrays


def _read(path: Path) -> Arrays | None:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files}  # a zip archive: each array is checked by its CRC
    except Exception:  # missing or damaged: there is no list of what a damaged archive can raise
        return None


def _write(path: Path, arrays: Arrays) -> bool:
    """Write under another name first, so that another process finds the whole file or none."""
    part = path.with_name(f"{path.stem}-{uuid.uuid4().hex}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.parent.stat().st_mode & _ANY_WRITE:
            return False  # marked read-only, which would not stop root
        with part.open("xb") as file:
            np.savez(file, **arrays)
        part.replace(path)
    except OSError:
        with suppress(OSError):
            part.unlink()
        return False
    return True
