"""The states of the random generators that a computation on one device draws from."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def random_states(device: torch.device) -> list[Tensor]:
    """The states of PyTorch's generators on the CPU and, for a GPU, on the device."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def set_random_states(states: list[Tensor], device: torch.device) -> None:
    """Restore what :func:`random_states` returned, also on a machine without that GPU."""
    torch.set_rng_state(states[0].cpu())
    if device.type == "cuda" and len(states) > 1:
        torch.cuda.set_rng_state(states[1].cpu(), device)


def seed_random_states(device: torch.device, *numbers: int) -> None:
    """Seed these generators by numbers that name a stream: a run's seed, a rank, a batch."""
    # Seeds that differ by one may give similar streams; hashes of them differ everywhere.
    name = " ".join(map(str, numbers)).encode()
    seed = int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "big")
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
