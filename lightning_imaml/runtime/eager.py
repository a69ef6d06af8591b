"""Compiled parts of a network, run without their compiler."""

from __future__ import annotations

import contextlib
import sys

import torch


def force_eager() -> contextlib.AbstractContextManager[object]:
    """Within the block, run what ``torch.compile`` has wrapped as plain PyTorch.

    Its compiled code can be differentiated once, and it holds no batching rules.
    """
    if "torch._dynamo.eval_frame" not in sys.modules:  # Nothing has been compiled, and to import it takes seconds.
        return contextlib.nullcontext()
    stance: contextlib.AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return stance
