"""The rooms of the package, from the bottom of the stack to its top."""

from __future__ import annotations

import re
from pathlib import Path

# Each room may import from the rooms before it.
ROOMS = [
    "_version", "components", "runtime", "parameters", "linear", "_compile", "regularizers", "episodes", "problems",
    "losses", "curvature", "inner", "meta_gradients", "functional", "metrics", "training", "checkpoints", "diagnostics",
    "module", "callbacks", "data", "models", "cli", "allocator",
]  # fmt: skip


def room_of(path: str | Path) -> str:
    """The room of a file in ``lightning_imaml``."""
    return re.sub(r"\.py$", "", Path(path).parts[Path(path).parts.index("lightning_imaml") + 1])
