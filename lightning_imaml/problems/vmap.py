"""A function of one task, applied to a batch of tasks."""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.func import vmap
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils import _pytree as pytree

from lightning_imaml.components.checks import first_line
from lightning_imaml.runtime.random_states import random_states, set_random_states

_batched: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()
"""Whether functions of an owner could be batched when they last ran."""


def vmap_tasks(function: Callable[..., Any], owner: Any, *trees: Any) -> Any:
    """Apply a function of one task to all tasks: at once where it can be batched, else one after the other.

    Args:
        function: takes the trees without their first dimension.
        owner: what the function belongs to; it is remembered if it cannot be batched.
        trees: pytrees of tensors ``[T, ...]``.

    Returns:
        The stacked results, ``[T, ...]``.
    """
    first = pytree.tree_leaves(trees)[0]
    known = _remembered(owner)
    recording = get_proxy_mode() is not None
    if recording and known is False and first.shape[0] > 1:  # As many copies of the network would be compiled.
        raise NotImplementedError("tasks that go one at a time; chunk_size=1 compiles a single one")
    if first.shape[0] == 1 or known is False:  # One task needs no batching rules.
        return _in_turn(function, first.shape[0], trees)
    if recording:  # What the recording for the compiler cannot do says nothing of plain PyTorch.
        return vmap(function, randomness="different")(*trees)
    # Not of a known one: on a GPU, it would wait for the device in every step.
    random = None if known else random_states(first.device)
    try:
        results = vmap(function, randomness="different")(*trees)
    except torch.OutOfMemoryError as error:
        raise torch.OutOfMemoryError(f"{error} Lower chunk_size, so that fewer tasks go at once.") from error
    except Exception as error:
        if random is not None:  # As a process would go on that knows already.
            set_random_states(random, first.device)
        results = _in_turn(function, first.shape[0], trees)  # Raises by itself what is wrong with the function.
        _remember(owner, False)
        warnings.warn(
            f"{getattr(owner, '__name__', type(owner).__name__)} must consist of operations that torch.func.vmap can "
            f"batch; found {first_line(error)}. Going on one task at a time, which is slower.",
            stacklevel=2,
        )
    else:
        if known is None:
            _remember(owner, True)
    return results


def go_in_turn(owner: Any) -> None:
    """Take one task after the other from now on, for functions of this owner."""
    _remember(owner, False)


def _remembered(owner: Any) -> bool | None:
    with contextlib.suppress(TypeError):  # Neither hashable nor weakly referenced is no error, only forgotten.
        return _batched.get(owner)
    return None


def _remember(owner: Any, batched: bool) -> None:
    with contextlib.suppress(TypeError):
        _batched[owner] = batched


def _in_turn(function: Callable[..., Any], tasks: int, trees: tuple[Any, ...]) -> Any:
    if tasks == 1:  # Without the copies.
        return pytree.tree_map(lambda t: t.unsqueeze(0), function(*pytree.tree_map(lambda t: t.squeeze(0), trees)))
    leaves, structure = pytree.tree_flatten(trees)
    results = [
        function(*pytree.tree_unflatten(task, structure))
        for task in zip(*(leaf.unbind(0) for leaf in leaves), strict=True)
    ]
    return pytree.tree_map(lambda *parts: torch.stack(parts), *results)
