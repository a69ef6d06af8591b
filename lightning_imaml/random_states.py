"""The random states that a computation on one device draws from."""

from __future__ import annotations

import torch
from torch import Tensor


def random_states(device: torch.device) -> list[Tensor]:
    """The states of PyTorch's generators on the CPU and, for a GPU, on the device."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def set_random_states(states: list[Tensor], device: torch.device) -> None:
    """Put states of :func:`random_states` back, also on a machine without that GPU."""
    torch.set_rng_state(states[0].cpu())
    if device.type == "cuda" and len(states) > 1:
        torch.cuda.set_rng_state(states[1].cpu(), device)
