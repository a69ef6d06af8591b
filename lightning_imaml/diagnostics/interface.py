"""Check that a module has the interface that a callback needs."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule


def require_interface(callback: object, module: LightningModule, names: tuple[str, ...]) -> None:
    """Check that the module has the attributes of ``IMAMLModule`` that the callback reads.

    Raises:
        TypeError: an attribute is missing; the message names it.
    """
    missing = [name for name in names if not hasattr(module, name)]
    if missing:
        raise TypeError(
            f"{type(callback).__name__} needs a module with the interface of IMAMLModule; found "
            f"{type(module).__name__}, which lacks {', '.join(missing)}. "
            "Subclass lightning_imaml.IMAMLModule, or remove the callback."
        )


def evaluation_solver(module: Any) -> Any:
    """The inner solver that adapts in evaluation."""
    return module.eval_inner_solver or module.inner_solver
