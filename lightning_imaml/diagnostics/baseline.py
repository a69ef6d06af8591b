"""The baseline without meta-learning: the same network with random weights."""

from __future__ import annotations

import copy

import torch
from torch import nn


def reinitialised(network: nn.Module, seed: int) -> tuple[nn.Module, list[str]]:
    """Copy a network and draw new parameters by the ``reset_parameters`` of its modules.

    Args:
        network: the network, which stays unchanged.
        seed: the seed of the new parameters. The global random state stays unchanged.

    Returns:
        The copy, in the same mode; and the names of submodules with parameters of their own for which neither they nor
        a module around them has ``reset_parameters``. With any such name, the copy is not random.
    """
    # Test loops run in inference mode, whose tensors an initialiser cannot write to in place.
    with torch.inference_mode(False), torch.random.fork_rng(), torch.no_grad():
        fresh = copy.deepcopy(network)
        torch.manual_seed(seed)
        return fresh, _reset(fresh, "", covered=False)


def _reset(module: nn.Module, name: str, covered: bool) -> list[str]:
    reset = getattr(module, "reset_parameters", None)
    covered = covered or callable(reset)
    missed = []
    for child_name, child in module.named_children():
        missed += _reset(child, f"{name}.{child_name}".lstrip("."), covered)
    # Reset a module after its children, so that a network's own initialiser overrides those of its layers.
    if callable(reset):
        reset()
    if not covered and any(True for _ in module.parameters(recurse=False)):
        missed.append(name or type(module).__name__)
    return missed
