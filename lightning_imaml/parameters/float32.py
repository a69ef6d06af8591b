"""Parameters that stay in float32."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Float32Parameters(nn.ParameterDict):
    """Parameters that stay in float32 when the module is converted to 16 bits, as by the Trainer's ``bf16-true``.

    A step of 0.001 in log λ is less than half the distance between two bfloat16 numbers near one, so bfloat16 would
    round every such step away.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Float32Parameters:
        def at_least_float32(tensor: Tensor) -> Tensor:
            converted = fn(tensor)
            shorter = converted.is_floating_point() and converted.dtype.itemsize < torch.float32.itemsize
            return tensor.to(converted.device, torch.float32) if shorter else converted

        super()._apply(at_least_float32, recurse)  # type: ignore[no-untyped-call]
        return self
