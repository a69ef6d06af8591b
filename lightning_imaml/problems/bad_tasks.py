"""Find the tasks of a batch whose numbers are NaN, infinite or about to be."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, distributed

REMEDY = "Check these tasks' inputs and the loss for NaN, lower the inner learning rate, or use a stronger regulariser."


def limit(dtype: torch.dtype) -> float:
    """The largest size of a sound number: the square root of the dtype's largest, beyond which norms overflow."""
    return float(torch.finfo(dtype).max ** 0.5)


def sound(values: Tensor) -> Tensor:
    """Which values are neither NaN nor infinite nor beyond the limit, element by element."""
    return values.abs() <= limit(values.dtype)  # NaN compares false.


def find(quantities: Mapping[str, Tensor]) -> Tensor:
    """Which tasks are bad by any of these quantities, ``[T]`` each: ``[T]``."""
    return ~torch.stack([sound(values) for values in quantities.values()]).all(dim=0)


def describe(quantities: Mapping[str, Tensor], tasks: Tensor) -> str:
    """Say for every bad task which quantity is bad, by the first such quantity, and on which rank it was.

    Args:
        quantities: their names and their values, ``[T]``.
        tasks: the T tasks' indices in the batch, ``[T]``.
    """
    several = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
    whose = f" of rank {distributed.get_rank()}" if several else ""
    parts, told = [], torch.zeros_like(tasks, dtype=torch.bool)
    for name, values in quantities.items():
        bad = ~sound(values) & ~told
        told |= bad
        if bad.any():
            size = f" and at most {limit(values.dtype):.1e}" if values[bad].isfinite().any() else ""
            found, numbers = values[bad].tolist(), tasks[bad].tolist()
            parts.append(f"{name} must be finite{size}; found {found} for tasks {numbers} of the batch{whose}.")
    return " ".join([*parts, REMEDY])
