"""The default dtype, and the PyTorch settings that let float32 operations round their inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


def _settings() -> list[Any]:
    """The operations with a setting ``fp32_precision`` of their own, which PyTorch has since 2.9."""
    cuda, cudnn, mkldnn = torch.backends.cuda, torch.backends.cudnn, torch.backends.mkldnn
    operations = [cuda.matmul, *(getattr(part, name, None) for part, name in (
        (cudnn, "conv"), (cudnn, "rnn"), (mkldnn, "matmul"), (mkldnn, "conv"), (mkldnn, "rnn")
    ))]  # fmt: skip
    return [operation for operation in operations if hasattr(operation, "fp32_precision")]


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Let ``dtype`` be the default dtype of new tensors in the enclosed code."""
    outside = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(outside)


@contextmanager
def full_float32() -> Iterator[None]:
    """Let float32 operations keep all bits of their inputs in the enclosed code, without TF32 and bfloat16.

    TF32 has 10 bits, and PyTorch uses it for convolutions on a GPU by default. Afterwards every setting is as before:
    the older ones (``allow_tf32``, ``torch.set_float32_matmul_precision``) and ``fp32_precision``, which replaces them
    since PyTorch 2.9. PyTorch refuses to read an older setting that contradicts its successor, so the older ones are
    set too where they can be read.
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
            if operation.fp32_precision != precision:  # It is this operation's own, not inherited.
                operation.fp32_precision = precision


def _if_readable(setting: Callable[[], Any]) -> Any:
    """The value of an older setting; None where a newer one contradicts it, which PyTorch refuses to read."""
    try:
        return setting()
    except RuntimeError:
        return None
