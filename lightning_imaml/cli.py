"""The command line: ``lightning-imaml fit | validate | test | predict``, a LightningCLI."""

from __future__ import annotations

import warnings
from typing import Any

from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import LightningCLI

# Importing the families registers their members, so that configurations can name them without their module.
from lightning_imaml import callbacks, curvature, data, inner, linear, meta_gradients, models, regularizers  # noqa: F401
from lightning_imaml.module import IMAMLModule


def run(args: list[str] | dict[str, Any] | None = None) -> LightningCLI:
    """Run the command line in this process.

    With ``--ckpt_path``, the checkpoint's own settings of the module win over the command line's, as in any
    LightningCLI. To keep what ``predict`` returns, add a ``lightning.pytorch.callbacks.BasePredictionWriter``.

    Args:
        args: arguments as on the command line; None takes the process's own.

    Returns:
        The LightningCLI, with its ``trainer``, ``model`` and ``datamodule``.
    """
    # Episodes of memory-resident data need no workers; Lightning's advice to add some does not fit them.
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    # Scripts pass their own options on in ``args``, and mean it.
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter is intended.*")
    return LightningCLI(
        IMAMLModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        seed_everything_default=0,
        save_config_kwargs={"overwrite": True},
        # The module has its own optimizer and lr_scheduler: one way to set them.
        auto_configure_optimizers=False,
        args=args,
    )


def main() -> None:
    """What the ``lightning-imaml`` command calls."""
    run()
