"""Parameters that stay in float32."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Float32Parameters(nn.ParameterDict):
    """Parameters that a conversion of the module to 16 bits leaves in float32, such as the Trainer's ``bf16-true``.

    A step of 0.001 in log λ is less than half the distance of two bfloat16 numbers near one: it would be rounded away,
    every time.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Float32Parameters:
        def kept(tensor: Tensor) -> Tensor:
            found = fn(tensor)
            shorter = found.is_floating_point() and found.dtype.itemsize < torch.float32.itemsize
            return tensor.to(found.device, torch.float32) if shorter else found

        super()._apply(kept, recurse)  # type: ignore[no-untyped-call]
        return self
