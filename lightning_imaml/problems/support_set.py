"""Networks that see which rows of their input are a task's support set.

A layer that normalises by the statistics of the support set makes the outputs for a query sample depend on the support
set, but not on the other query samples. So the network takes both sets together, the support set first, and the
statistics are part of one differentiable forward pass: no buffer holds them between two passes, and every derivative
through them is exact.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

_rows: ContextVar[int | None] = ContextVar("support_rows", default=None)


class SupportLayer(nn.Module):
    """The base of layers whose outputs for any sample depend on the task's support set."""

    @property
    def support_rows(self) -> int | None:
        """How many of the first rows are the support set; None where all are."""
        return _rows.get()

    @abstractmethod
    def frozen(self, inputs: Tensor) -> nn.Module:
        """A plain layer with the statistics of these support samples ``[s, ...]``, for a network to deploy."""


def current_support_rows() -> int:
    """What :func:`support_rows` was last told: to be told again where a layer is computed again."""
    return _rows.get() or 0


def reads_support(network: nn.Module) -> bool:
    """Whether a network needs the support set to predict."""
    return any(isinstance(layer, SupportLayer) for layer in network.modules())


@contextmanager
def support_rows(count: int) -> Iterator[None]:
    """Within the block, the first ``count`` rows of a network's input are the support set; 0 means all of them."""
    token = _rows.set(count or None)
    try:
        yield
    finally:
        _rows.reset(token)


def require_support_inputs(network: nn.Module, support_inputs: Any) -> None:
    """Raise a ValueError where a network needs the support set to predict and does not get it."""
    if support_inputs is None and reads_support(network):
        raise ValueError(
            f"support_inputs must be given, since {type(network).__name__} normalises by the statistics of the support "
            "set (SupportNorm); found None. Pass the inputs that the parameters were adapted to."
        )


def concat_support(network: nn.Module, support_inputs: Any, inputs: Any) -> tuple[Any, int]:
    """Put the support sets before other samples of the same tasks, where the network needs them to predict.

    Args:
        network: the network.
        support_inputs: ``[T, s, ...]``.
        inputs: ``[T, n, ...]``.

    Returns:
        The inputs ``[T, s + n, ...]`` and s; the other samples alone and 0 where the network does not need it.

    Raises:
        ValueError: the support sets are lacking, or they are not of the same tasks.
    """
    if not reads_support(network):
        return inputs, 0
    require_support_inputs(network, support_inputs)
    kinds = [[(t.shape[0], *t.shape[2:]) for t in pytree.tree_leaves(tree)] for tree in (support_inputs, inputs)]
    if kinds[0] != kinds[1]:
        raise ValueError(
            f"support_inputs must be [T, s, ...] for inputs [T, n, ...]; found, leaving out s and n, {kinds[0]} and "
            f"{kinds[1]}. Pass the support sets of the same tasks."
        )
    both = pytree.tree_map(lambda *pair: torch.cat(pair, dim=1), support_inputs, inputs)
    return both, pytree.tree_leaves(support_inputs)[0].shape[1]
