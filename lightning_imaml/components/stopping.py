"""Stopping rules that solvers share."""

from __future__ import annotations

from torch import Tensor


def all_done(active: Tensor, steps: int, check_every: int) -> bool:
    """Whether the host looked in this step and found that no task is active.

    The host waits for the device when it looks, so it looks in every ``check_every``-th step only.

    Args:
        active: which tasks still run, ``[T]``.
        steps: the steps so far.
        check_every: after how many steps to look.
    """
    return steps % check_every == 0 and not active.any()
