"""Convolutions of a single task with the channels innermost, as a CPU's run fastest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class ChannelsLast(TorchFunctionMode):
    """Within the block, 2-d convolutions take their weights with the channels innermost, and give images like that.

    The first derivative is faster too, the second slower: enter it where nothing is differentiated twice.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Move the channels of a convolution's weight."""
        return (_conv2d if func is torch.conv2d else func)(*args, **(kwargs or {}))


def _conv2d(input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    moved = weight.permute(0, 2, 3, 1)
    # Through a single dimension: a copy of one channel could keep the strides of the other order, and its images too.
    return torch.conv2d(input, moved.reshape(-1).view(moved.shape).permute(0, 3, 1, 2), *args, **kwargs)
