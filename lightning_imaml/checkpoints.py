"""Write checkpoints that stay whole when the disk is full or the process is killed, and export weights to publish."""

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
# Trainer.test and load_from_checkpoint need these entries.
_MODULE_ENTRIES = (
    "epoch",
    "global_step",
    "pytorch-lightning_version",
    "state_dict",
    "hparams_name",
    "hyper_parameters",
)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write a checkpoint to a file beside its target, and rename that file once it is whole and on the disk.

    Pass it as ``Trainer(plugins=[AtomicCheckpointIO()])``; the command line uses it by default. Lightning's own class
    writes to the folder for temporary files, which may be on another file system. Its move is then a copy, and a full
    disk destroys the file that it overwrites, such as ``last.ckpt``. If a process is killed while it writes, a save an
    hour later or more removes the unfinished file. Addresses with ``://`` go to Lightning's own class.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Save the checkpoint, or leave the target as it was.

        Raises:
            OSError: the disk is full, or the folder cannot be written; the message names the file.
        """
        if "://" in str(path) or storage_options is not None:  # Lightning refuses storage options with a reason.
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
        except (OSError, RuntimeError) as error:  # torch.save wraps errors of the system in a RuntimeError.
            raise OSError(
                f"the folder of a checkpoint must have room for it; found that {target} cannot be written ({error}). "
                "Earlier checkpoints are as they were: make room and resume from the last one."
            ) from error
        finally:
            part.unlink(missing_ok=True)


def export_weights(checkpoint: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Write a small checkpoint to publish: a trained module's weights and settings, and nothing else.

    ``lightning-imaml test --ckpt_path`` and ``load_from_checkpoint`` read it like the whole checkpoint, but training
    cannot resume from it. It leaves out the states of optimizer, schedulers, callbacks and loops, and the settings of
    the data, which name folders of the machine. The file holds plain types only and loads with ``weights_only=True``.

    Args:
        checkpoint: a checkpoint of the Trainer.
        target: the file to write.

    Raises:
        ValueError: ``checkpoint`` has no weights.
        OSError: ``target`` cannot be written.
    """
    whole = torch.load(checkpoint, map_location="cpu", weights_only=True)
    if not isinstance(whole, dict) or "state_dict" not in whole:
        found = sorted(map(str, whole)) if isinstance(whole, dict) else type(whole).__name__
        raise ValueError(
            f"checkpoint must be one of a Trainer, with a state_dict; found {found} in {str(checkpoint)!r}. Pass a "
            "file of ModelCheckpoint or Trainer.save_checkpoint."
        )
    kept = {name: whole[name] for name in _MODULE_ENTRIES if name in whole}
    settings = {name: value for name, value in whole.get("lightning_imaml", {}).items() if name != "outer_step"}
    AtomicCheckpointIO().save_checkpoint({**kept, "lightning_imaml": settings}, target)


def _sync_folder(folder: Path) -> None:
    """Write a renaming to the disk; without this, a power cut may undo it."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # Some network file systems cannot do this, and need not.
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_stale_parts(folder: Path) -> None:
    """Remove unfinished files of killed processes; a file that another run is writing now is younger."""
    for path in folder.glob(".*.part"):
        with contextlib.suppress(OSError):  # Another process removed it, or owns it.
            if _PART.fullmatch(path.name) and time.time() - path.stat().st_mtime > _STALE_SECONDS:
                path.unlink()
