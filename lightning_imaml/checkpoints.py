"""Checkpoints that a full disk or a crash cannot tear."""

from __future__ import annotations

import contextlib
import os
import re
import time
import uuid
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

_PART = re.compile(r"\..+\.[0-9a-f]{32}\.part")
_STALE_SECONDS = 3600.0


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write a checkpoint beside its place, and move it there once it is whole and on the disk.

    ``Trainer(plugins=[AtomicCheckpointIO()])``. Lightning's own writes to the folder for temporary files, which may be
    on another file system: the move is a copy then, and a full disk tears the file that it overwrites, such as
    ``last.ckpt``. What a process that was killed had written so far is removed by the first save an hour later. The
    command line uses this class by default. For files that the operating system sees; other addresses go to Lightning's
    own.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Save, or leave everything as it was.

        Raises:
            OSError: the disk is full, or the folder cannot be written; the message names the file.
        """
        if "://" in str(path) or storage_options is not None:  # Options are refused there, with the reason.
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale_parts(target.parent)
        part = target.with_name(f".{target.name}.{uuid.uuid4().hex}.part")
        try:
            with part.open("xb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            part.replace(target)
            _sync_folder(target.parent)
        except (OSError, RuntimeError) as error:  # torch.save wraps what the system says.
            raise OSError(
                f"the folder of a checkpoint must have room for it; found that {target} cannot be written ({error}). "
                "Earlier checkpoints are as they were: make room and resume from the last one."
            ) from error
        finally:
            part.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Bring a renaming to the disk; without it, a power cut may bring the old name back."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # Some network file systems cannot, and need not.
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_stale_parts(folder: Path) -> None:
    """Remove what killed processes left; what another run writes at this moment is younger."""
    for path in folder.glob(".*.part"):
        with contextlib.suppress(OSError):  # Another process was faster, or the file is not ours to remove.
            if _PART.fullmatch(path.name) and time.time() - path.stat().st_mtime > _STALE_SECONDS:
                path.unlink()
