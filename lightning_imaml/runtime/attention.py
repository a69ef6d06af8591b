"""Attention in a form that can be differentiated twice and batched over tasks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch.backends import mha
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextmanager
def plain_attention() -> Iterator[None]:
    """Let PyTorch compute attention by matrix products within the block, and put its settings back afterwards.

    PyTorch's fused attention kernels have no second derivative, and on CPU they have no batching rule either. In
    evaluation mode, ``nn.MultiheadAttention`` and ``nn.TransformerEncoderLayer`` take a fast path that has no
    derivative at all: they see no input that requires a gradient, since vmap hides it.
    """
    fast = mha.get_fastpath_enabled()
    mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        mha.set_fastpath_enabled(fast)
