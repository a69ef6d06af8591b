"""The common base of solvers, estimators, curvatures and regularisers."""

from __future__ import annotations

from typing import Any

import torch


class Component:
    """A frozen dataclass of plain settings, which a weights-only checkpoint may hold.

    The definition of a subclass, also of a user's own, registers it with ``torch.serialization.add_safe_globals``, so
    that ``load_from_checkpoint`` restores it without unpickling arbitrary code.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        torch.serialization.add_safe_globals([cls])
