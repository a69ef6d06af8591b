"""Float32 in all its bits: parameters that stay in it, and PyTorch's settings that let inputs be rounded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


def _settings() -> list[Any]:
    """What has a setting ``fp32_precision`` of its own, since PyTorch 2.9."""
    cuda, cudnn, mkldnn = torch.backends.cuda, torch.backends.cudnn, torch.backends.mkldnn
    operations = [cuda.matmul, *(getattr(part, name, None) for part, name in (
        (cudnn, "conv"), (cudnn, "rnn"), (mkldnn, "matmul"), (mkldnn, "conv"), (mkldnn, "rnn")
    ))]  # fmt: skip
    return [operation for operation in operations if hasattr(operation, "fp32_precision")]


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make new tensors in this dtype where none is said."""
    outside = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(outside)


@contextmanager
def full_float32() -> Iterator[None]:
    """Compute without TF32 (10 bits, PyTorch's default for convolutions on a GPU) and without bfloat16 in their place.

    Afterwards every setting is as before, the older ones (``allow_tf32``, ``torch.set_float32_matmul_precision``) and
    those that took their place in PyTorch 2.9 (``fp32_precision``). PyTorch refuses to read an older one that
    contradicts its successor, so inside they agree where they all agreed outside.
    """
    operations = _settings()
    saved = [operation.fp32_precision for operation in operations]
    matmul = _if_readable(torch.get_float32_matmul_precision)
    convolution = _if_readable(lambda: torch.backends.cudnn.allow_tf32)
    try:
        if matmul is not None:
            torch.set_float32_matmul_precision("highest")
        if convolution is not None:
            torch.backends.cudnn.allow_tf32 = False
        for operation in operations:
            operation.fp32_precision = "ieee"
        yield
    finally:
        if convolution is not None:
            torch.backends.cudnn.allow_tf32 = convolution
        if matmul is not None:
            torch.set_float32_matmul_precision(matmul)
        for operation, precision in zip(operations, saved, strict=True):
            operation.fp32_precision = "none"
            if operation.fp32_precision != precision:  # Not inherited from a setting for all operations.
                operation.fp32_precision = precision


def _if_readable(setting: Callable[[], Any]) -> Any:
    """An older setting; None where the newer ones contradict it."""
    try:
        return setting()
    except RuntimeError:
        return None
