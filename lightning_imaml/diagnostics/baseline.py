"""The network without meta-learning: random weights, adapted to the same tasks by the same solver."""

from __future__ import annotations

import copy

import torch
from torch import nn


def reinitialised(network: nn.Module, seed: int) -> tuple[nn.Module, list[str]]:
    """Copy a network and draw its parameters anew, by the ``reset_parameters`` of its modules.

    Args:
        network: the network; not touched.
        seed: of the new parameters. The global random state is left as it is.

    Returns:
        The copy, in the same mode, and the names of the submodules that have parameters of their own but neither they
        nor a module around them has ``reset_parameters``; with any such name, the copy is not random.
    """
    # Tensors made in inference mode, where test loops run, could not be updated in place by an initialiser.
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
    # After its children: a network's own initialiser has the last word over that of its layers.
    if callable(reset):
        reset()
    if not covered and any(True for _ in module.parameters(recurse=False)):
        missed.append(name or type(module).__name__)
    return missed
