"""The common base of solvers, estimators, curvatures and regularisers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Component:
    """A frozen dataclass of plain settings, which a weights-only checkpoint may hold.

    Every subclass, a user's own too, is registered with ``torch.serialization.add_safe_globals`` when it is defined, so
    that ``load_from_checkpoint`` restores it without unpickling arbitrary code.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        torch.serialization.add_safe_globals([cls])


def require(condition: bool, owner: object, argument: str, requirement: str, found: object, remedy: str) -> None:
    """Raise a ValueError that names the argument, the requirement, what was found and the remedy."""
    if not condition:
        raise ValueError(f"{type(owner).__name__}: {argument} must be {requirement}; found {found!r}. {remedy}")


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
