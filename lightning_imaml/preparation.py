"""What happens before a batch of tasks is solved: checks, chunks, precision."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from lightning_imaml.arguments import require_at_least_one
from lightning_imaml.attention import plain_attention
from lightning_imaml.chunks import default_chunk_size
from lightning_imaml.episodes import Episode, ordinary
from lightning_imaml.float32 import default_dtype, full_float32
from lightning_imaml.inner import InnerSolver
from lightning_imaml.layout import Layout
from lightning_imaml.regularizers import Regularizer
from lightning_imaml.support_set import joined
from lightning_imaml.tasks import FlatModel, InnerProblem, LossFunction, TaskLoss

# What was last asked of a network's regulariser and solver: whose it is, of which parameters, and names and shapes.
_needed: weakref.WeakKeyDictionary[nn.Module, dict[str, tuple[object, Layout, dict[str, list[int]]]]]
_needed = weakref.WeakKeyDictionary()


def prepare(
    model: nn.Module,
    episode: Episode,
    loss: LossFunction,
    outer_loss: LossFunction,
    inner_solver: InnerSolver,
    regularizer: Regularizer,
    strengths: Mapping[str, Tensor] | None,
    rates: Mapping[str, Tensor] | None,
    adapt_only: Sequence[str] | None,
    chunk_size: int | None,
    compile: bool,
    full_precision: bool,
    differentiated_steps: int = 0,
) -> tuple[FlatModel, Callable[[Episode], Iterator[tuple[InnerProblem, TaskLoss]]]]:
    """Check everything once; what is returned with the network cuts an episode into chunks of tasks."""
    check_chunk_size(chunk_size)
    flat = FlatModel(model, compile, adapt_only=adapt_only)
    if full_precision and flat.dtype.itemsize < torch.float32.itemsize:
        flat = FlatModel(model, compile, torch.float32, adapt_only)
    episode.validate()
    for name in ("support_inputs", "query_inputs"):
        for leaf in pytree.tree_leaves(getattr(episode, name)):
            if leaf.device != flat.device:
                raise ValueError(
                    f"{name} must be on the backbone's device {flat.device}; found {leaf.device}. Move one of them "
                    "with .to(device)."
                )
            if leaf.is_floating_point() and leaf.dtype != flat.stored_dtype:
                raise ValueError(
                    f"{name} must have the backbone's dtype {flat.stored_dtype}; found {leaf.dtype}. "
                    f"Convert the episode with .to({flat.stored_dtype}), or the backbone with .to({leaf.dtype})."
                )
    support_classes = classes_of("support_targets", episode.support_targets, loss)
    if episode.query_targets is episode.support_targets and outer_loss is loss:
        query_classes = support_classes  # Adaptation alone, without a query set; the host waits for a device only once.
    else:
        query_classes = classes_of("query_targets", episode.query_targets, outer_loss)
    if strengths is not None:
        _require_learned("strengths", strengths, regularizer, "init", flat)
    if rates is not None:
        _require_learned("rates", rates, inner_solver, "rates", flat)

    def chunks(episode: Episode) -> Iterator[tuple[InnerProblem, TaskLoss]]:
        # Made when the solves begin, outside inference mode.
        values = regularizer.init(flat) if strengths is None else _in_dtype_of(flat, strengths)
        step_sizes = inner_solver.rates(flat) if rates is None else _in_dtype_of(flat, rates)
        initial, state = flat.initial(), flat.state() if flat.shared else None
        query_inputs, support_rows = joined(model, episode.support_inputs, episode.query_inputs)
        size = chunk_size or default_chunk_size(
            flat, episode.support_inputs, episode.tasks, query_inputs, differentiated_steps
        )
        for part in episode._replace(query_inputs=query_inputs).split(size):
            tasks = Episode(*flat.cast(ordinary(tuple(part))))
            support = TaskLoss(flat, loss, tasks.support_inputs, tasks.support_targets, support_classes, state)
            query = TaskLoss(
                flat, outer_loss, tasks.query_inputs, tasks.query_targets, query_classes, state, support_rows
            )
            yield InnerProblem(support, regularizer, initial, values, step_sizes), query

    return flat, chunks


def _require_learned(argument: str, given: Mapping[str, Tensor], owner: object, method: str, flat: FlatModel) -> None:
    """Raise a ValueError unless these are what a regulariser or a solver learns, by name and shape."""
    last = _needed.setdefault(flat.module, {})
    if argument not in last or last[argument][0] is not owner or last[argument][1] != flat.layout:
        # Not in every step: the first values of a matrix take longer than the rest of the preparation.
        last[argument] = owner, flat.layout, _shapes(getattr(owner, method)(flat))
    found, needed = _shapes(given), last[argument][2]
    if found != needed:
        raise ValueError(
            f"{argument} must hold tensors of the names and shapes that {type(owner).__name__} learns, {needed}; found "
            f"{found}. Start from those of its method {method}, or leave {argument} out for them."
        )


def _shapes(tree: Mapping[str, Tensor]) -> dict[str, list[int]]:
    return {name: list(value.shape) for name, value in sorted(tree.items())}


def _in_dtype_of(flat: FlatModel, learned: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # Those of a module may have more bits than its network.
    return {name: value.to(flat.dtype) for name, value in learned.items()}


def classes_of(name: str, targets: Any, loss: LossFunction) -> int | None:
    """How many outputs class-index targets need; None where the loss does not take class indices."""
    if loss is not F.cross_entropy and not isinstance(loss, nn.CrossEntropyLoss):
        return None
    if not isinstance(targets, Tensor) or targets.is_floating_point():
        return None
    ignored = loss.ignore_index if isinstance(loss, nn.CrossEntropyLoss) else -100
    kept = targets.where(targets != ignored, 0)
    lowest, highest = torch.stack([kept.min(), kept.max()]).tolist()
    if lowest < 0:
        raise ValueError(
            f"{name} must be class indices from 0; found {lowest}. Relabel each task's classes to 0 … N-1."
        )
    return int(highest) + 1


def check_chunk_size(chunk_size: int | None) -> None:
    """Raise a ValueError for chunks of nothing."""
    if chunk_size is not None:
        require_at_least_one("chunk_size", chunk_size, "None chooses it from the size of a task.")


@contextmanager
def precision(flat: FlatModel, full: bool) -> Iterator[None]:
    """Leave inference mode, which cannot differentiate, and autocast: a bf16 Hessian product is wrong by 5e-3."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(plain_attention())
        if full:
            stack.enter_context(torch.autocast(flat.device.type, enabled=False))
            stack.enter_context(full_float32())
        if flat.dtype != flat.stored_dtype:  # What the network makes anew must fit, too.
            stack.enter_context(default_dtype(flat.dtype))
        yield
