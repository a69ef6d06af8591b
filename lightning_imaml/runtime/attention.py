"""Attention in a form that can be differentiated twice and batched over tasks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch.backends import mha
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextmanager
def plain_attention() -> Iterator[None]:
    """Let PyTorch compute attention by matrix products within the block, and put its settings back afterwards.

    Its fused kernels have no second derivative, and on CPU no batching rule either. The fast path of
    ``nn.MultiheadAttention`` and ``nn.TransformerEncoderLayer`` in evaluation has no derivative at all, and is taken
    since vmap hides that its inputs require one.
    """
    fast = mha.get_fastpath_enabled()
    mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        mha.set_fastpath_enabled(fast)
