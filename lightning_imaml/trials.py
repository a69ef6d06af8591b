"""Trials of faster ways to run a network, which not every network can take."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from lightning_imaml.random_states import random_states, set_random_states

_found: weakref.WeakKeyDictionary[nn.Module, dict[Hashable, bool]] = weakref.WeakKeyDictionary()


def gives_the_same(network: nn.Module, key: Hashable, trial: Callable[[], tuple[Any, Any]]) -> bool:
    """Whether a faster way gives what a network's own way gives; tried once for each key, unseen by counters.

    It does not for a network that draws random numbers, which draws others the second time, nor for one with an
    operation that the faster way lacks.

    Args:
        network: what is run.
        key: the way, and all that the answer may depend on.
        trial: gives tensors the faster way, and the same ones the network's own way; raises a RuntimeError where the
            faster way lacks an operation.
    """
    known = _found.setdefault(network, {})
    if key not in known:
        device = next(network.parameters()).device
        states = random_states(device)  # A resumed run, which tries again, goes on like one that was never stopped.
        try:
            with torch.no_grad(), _disable_current_modes():
                found, expected = map(pytree.tree_leaves, trial())
                known[key] = all(map(_close, found, expected))
        except RuntimeError:
            known[key] = False
        finally:
            set_random_states(states, device)
    return known[key]


def _close(found: Tensor, expected: Tensor) -> bool:
    if not expected.is_floating_point():
        return torch.equal(found, expected)
    # In another order of summation, rounding is that of the largest numbers.
    room = torch.finfo(expected.dtype).eps ** 0.5
    return torch.allclose(found, expected, rtol=0, atol=room * expected.abs().max().item())
