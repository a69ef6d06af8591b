"""Checks of outputs, targets and losses that PyTorch would take, and answer with a wrong number."""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from lightning_imaml.problems.network import FlatModel
from lightning_imaml.runtime.random_states import random_states, set_random_states

# Those that average over all entries, and that PyTorch broadcasts.
_ENTRYWISE = (F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss)
_ENTRYWISE_CLASSES = (nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss)
_DIFFERENCES = (torch.sub, Tensor.sub, Tensor.__sub__, Tensor.__rsub__)
_seen: weakref.WeakKeyDictionary[Any, set[tuple[Any, Any]]] = weakref.WeakKeyDictionary()
"""The shapes of outputs and targets that were compared without broadcasting, by the owner of a loss."""
_REGRESSION = "For regression pass loss=torch.nn.functional.mse_loss."


def is_cross_entropy(loss: object) -> bool:
    """Whether a loss is PyTorch's cross-entropy."""
    return loss is F.cross_entropy or isinstance(loss, nn.CrossEntropyLoss)


def require_probabilities(name: str, targets: Tensor) -> None:
    """Raise a ValueError unless floating targets ``[T, n, C, ...]`` of cross-entropy are probabilities of classes."""
    if targets.ndim > 2 and bool(((targets >= 0).all() & ((targets.sum(dim=2) - 1).abs() < 1e-2).all()).item()):
        return
    raise ValueError(
        f"{name} of cross-entropy must be class indices [tasks, samples] of an integer dtype, or probabilities of "
        f"classes [tasks, samples, classes] that sum to 1; found {targets.dtype} of shape {list(targets.shape)} that "
        f"are not. {_REGRESSION} Convert class indices with .long()."
    )


def require_fitting_outputs(loss: object, outputs: Any, targets: Any) -> None:
    """Raise a ValueError unless outputs ``[T, n, ...]`` have the shape that a loss of PyTorch needs."""
    if not isinstance(outputs, Tensor) or not isinstance(targets, Tensor):
        return
    shape = list(outputs.shape[1:])
    if is_cross_entropy(loss) and (outputs.ndim < 3 or outputs.shape[2] < 2):
        raise ValueError(
            f"the backbone must have at least two outputs for each sample, [n, classes], for cross-entropy; found "
            f"{shape}. Give it one output for each way; for a single output pass a loss such as "
            f"torch.nn.functional.binary_cross_entropy_with_logits. {_REGRESSION}"
        )
    if (loss in _ENTRYWISE or isinstance(loss, _ENTRYWISE_CLASSES)) and outputs.shape != targets.shape:
        raise ValueError(_broadcast(shape, list(targets.shape[1:])))


def _broadcast(outputs: list[int], targets: list[int]) -> str:
    return (
        f"outputs and targets of a task must have the same shape, since PyTorch would broadcast them; found {outputs} "
        f"and {targets}. Give the targets the shape of the outputs, as .unsqueeze(-1) does for a single output."
    )


class _NoBroadcast(TorchFunctionMode):
    """Refuses to compare a task's whole outputs with its whole targets where that makes more entries of them."""

    def __init__(self, outputs: Any, targets: Any) -> None:
        super().__init__()
        self.both = outputs, targets

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _ENTRYWISE or func in _DIFFERENCES:
            first, second = [*args, *(kwargs or {}).values()][:2]
            if {id(first), id(second)} == {id(part) for part in self.both}:
                outputs, targets = self.both
                joint = math.prod(torch.broadcast_shapes(outputs.shape, targets.shape))  # type: ignore[no-untyped-call]
                if joint > max(outputs.numel(), targets.numel()):
                    raise ValueError(_broadcast(list(outputs.shape), list(targets.shape)))
        return func(*args, **(kwargs or {}))


def checked(loss: Callable[[Any, Any], Any], owner: Any) -> Callable[[Any, Any], Tensor]:
    """The loss of a task, which raises unless it gives a tensor, and, at new shapes, where it broadcasts.

    Args:
        loss: takes a task's outputs ``[n, ...]`` and targets ``[n, ...]``.
        owner: what stays the same where the loss is bound anew in each step.
    """

    def of_task(outputs: Any, targets: Any) -> Tensor:
        if not isinstance(outputs, Tensor) or not isinstance(targets, Tensor) or outputs.shape == targets.shape:
            return _require_tensor(loss(outputs, targets))
        shapes = outputs.shape, targets.shape
        try:
            seen = _seen.setdefault(owner, set())
        except TypeError:  # Neither hashable nor weakly referenced: not worth a look in every step.
            seen = {shapes}
        with contextlib.nullcontext() if shapes in seen else _NoBroadcast(outputs, targets):
            value = _require_tensor(loss(outputs, targets))
        seen.add(shapes)
        return value

    return of_task


def _require_tensor(value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(
            f"loss must return a tensor, with its graph; found {type(value).__name__}. Return the one that is to be "
            "minimised, without .item()."
        )
    return value


def require_task_dimension(flat: FlatModel, inputs: Any) -> None:
    """Raise a ValueError where the network takes ``[n, ...]`` inputs of a task for a single sample.

    So it is where the dimension of tasks is missing. Layers such as ``nn.Linear`` and ``nn.Conv2d`` take a single
    sample too, but not twice as many. Asked only where inputs look like it: a number a sample, or one sample a task.
    """
    leaves = pytree.tree_leaves(inputs)
    if len(leaves) != 1 or not leaves[0].is_floating_point() or (leaves[0].ndim > 2 and leaves[0].shape[1] > 1):
        return
    states = random_states(flat.device)
    try:
        reason = _error(flat, pytree.tree_map(lambda t: torch.cat([t[:1], t[:1]], dim=1), inputs))
        if reason is None or _error(flat, pytree.tree_map(lambda t: t[:1], inputs)) is not None:
            return  # It takes samples; or it does not even take these, and will say so by itself.
    finally:
        set_random_states(states, flat.device)
    shape = list(leaves[0].shape)
    raise ValueError(
        f"support_inputs must have shape [tasks, samples, ...]; found {shape}, where the backbone takes the inputs of "
        f"a task, {shape[1:]}, for a single sample, since it does not take twice as many ({reason}). For a single "
        "task, add a leading dimension to all parts of the episode with .unsqueeze(0)."
    )


def _error(flat: FlatModel, inputs: Any) -> Exception | None:
    """What the network raises for one task's inputs ``[1, n, ...]``."""
    try:
        with torch.no_grad():
            flat(flat.initial().unsqueeze(0), flat.cast(inputs))
    except Exception as error:
        return error
    return None
