"""Convolution and batch normalisation of small images as matrix products, the form that compiles best.

``vmap`` turns a convolution whose weights differ between tasks into a grouped convolution, for which there is no fast
kernel when a group has a few small images. Here a convolution becomes shifted slices and one matrix product a task,
with channels last: the compiler fuses the copies of the slices, and a batched matrix product remains.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.modules.utils import _pair
from torch.overrides import TorchFunctionMode


class MatrixForm(TorchFunctionMode):
    """Compute 2-d convolutions and batch normalisations over batch statistics in their matrix form within the block.

    Grouped convolutions, padding by name and normalisation by running statistics keep PyTorch's form.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Compute the same value in the matrix form, where there is one."""
        form = _FORMS.get(func)
        result = NotImplemented if form is None else form(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {})) if result is NotImplemented else result


def _conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    if groups != 1 or isinstance(padding, str) or input.ndim != 4:
        return NotImplemented
    (down, right), (above, left), (dh, dw) = _pair(stride), _pair(padding), _pair(dilation)
    images, channels, height, width = input.shape
    filters, _, kh, kw = weight.shape
    rows = (height + 2 * above - dh * (kh - 1) - 1) // down + 1
    columns = (width + 2 * left - dw * (kw - 1) - 1) // right + 1
    # Pad to whole strides and cut into one image for each phase of the stride, so that every shift is a plain block.
    # The derivative at a pixel then sums over the shifts that reach it, instead of over all shifts.
    tall, wide = rows + (dh * (kh - 1)) // down, columns + (dw * (kw - 1)) // right
    below, beyond = tall * down - height - above, wide * right - width - left
    padded = F.pad(input.permute(0, 2, 3, 1), (0, 0, left, beyond, above, below))
    phases = [p.unbind(3) for p in padded.reshape(images, tall, down, wide, right, channels).unbind(2)]
    shifted = [
        phases[i % down][j % right][:, i // down : i // down + rows, j // right : j // right + columns]
        for i in range(0, kh * dh, dh)
        for j in range(0, kw * dw, dw)
    ]
    patches = torch.stack(shifted, dim=3).reshape(images * rows * columns, kh * kw * channels)
    output = patches @ weight.permute(0, 2, 3, 1).reshape(filters, kh * kw * channels).t()
    if bias is not None:
        output = output + bias
    return output.reshape(images, rows, columns, filters).permute(0, 3, 1, 2)


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    if not training or running_mean is not None or input.ndim < 3:
        return NotImplemented
    over = [0, *range(2, input.ndim)]
    shape = [1, -1] + [1] * (input.ndim - 2)
    centred = input - input.mean(over, keepdim=True)
    scale = (centred.square().mean(over, keepdim=True) + eps).rsqrt()
    if weight is not None:
        scale = scale * weight.view(shape)
    return centred * scale if bias is None else centred * scale + bias.view(shape)


_FORMS: dict[Any, Callable[..., Any]] = {torch.conv2d: _conv2d, F.batch_norm: _batch_norm}
