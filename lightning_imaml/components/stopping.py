"""Stopping rules that solvers share."""

from __future__ import annotations

from torch import Tensor

from lightning_imaml.components.checks import require


def require_check_every(owner: object, check_every: int) -> None:
    """Raise a ValueError unless this is a number of steps."""
    require(check_every >= 1, owner, "check_every", "at least 1", check_every, "Use 1 to look in every step.")


def all_done(active: Tensor, steps: int, check_every: int) -> bool:
    """Whether no task is active any more: asked, since the host waits for the device then, every few steps only.

    Args:
        active: ``[T]``.
        steps: the steps so far.
        check_every: after how many steps to look.
    """
    return steps % check_every == 0 and not active.any()
