"""Prepare the solve of a batch of tasks: checks, chunks, precision."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_imaml.components.checks import require
from lightning_imaml.episodes import Episode, clone_inference_tensors
from lightning_imaml.functional.settings import Settings
from lightning_imaml.parameters.layout import Layout
from lightning_imaml.problems.checks import is_cross_entropy, require_probabilities, require_task_dimension
from lightning_imaml.problems.chunks import default_chunk_size
from lightning_imaml.problems.first_use import check_network
from lightning_imaml.problems.network import FlatModel
from lightning_imaml.problems.second_derivatives import named_missing_derivatives
from lightning_imaml.problems.supervised import LossFunction, SupervisedProblem, TaskLoss
from lightning_imaml.problems.support_set import concat_support
from lightning_imaml.runtime.attention import plain_attention
from lightning_imaml.runtime.eager import force_eager
from lightning_imaml.runtime.precision import default_dtype, full_float32

# Cache per network: the owner (a regulariser or a solver), the layout, and the names and shapes that the owner learns.
_needed: weakref.WeakKeyDictionary[nn.Module, dict[str, tuple[object, Layout, dict[str, list[int]]]]]
_needed = weakref.WeakKeyDictionary()


class Solve:
    """A network and its settings, checked once against an episode.

    Args:
        model: the network.
        episode: the tasks.
        settings: the settings of the solve.
        differentiated_steps: how many inner steps the estimator differentiates.

    Attributes:
        network: the network over rows of parameters.

    Raises:
        ValueError: an argument does not fit, see the message.
    """

    def __init__(self, model: nn.Module, episode: Episode, settings: Settings, differentiated_steps: int = 0) -> None:
        self.settings = settings
        self.differentiated_steps = differentiated_steps
        self.network = flat = _network(model, settings)
        self._episode = episode
        episode.validate()
        _require_fitting(flat, episode)
        require_task_dimension(flat, episode.support_inputs)
        self.support_classes = classes_of("support_targets", episode.support_targets, settings.loss)
        if episode.query_targets is episode.support_targets and settings.query_loss is settings.loss:
            # Adaptation alone has no query set; checking it again would make the host wait for the device twice.
            self.query_classes = self.support_classes
        else:
            self.query_classes = classes_of("query_targets", episode.query_targets, settings.query_loss)
        if settings.strengths is not None:
            _require_learned("strengths", settings.strengths, settings.regularizer, "init", flat)
        if settings.rates is not None:
            _require_learned("rates", settings.rates, settings.inner_solver, "rates", flat)

    def chunks(self, episode: Episode) -> Iterator[tuple[SupervisedProblem, TaskLoss]]:
        """The inner problem and the query loss of each chunk of tasks; call it within :meth:`precision`."""
        flat, settings = self.network, self.settings
        initial, state = flat.initial(), flat.state() if flat.shared else None
        regularizer = settings.regularizer.for_layout(flat.layout)
        strengths = settings.regularizer.init(flat) if settings.strengths is None else settings.strengths
        rates = settings.inner_solver.rates(flat) if settings.rates is None else settings.rates
        strengths, rates = _in_dtype_of(flat, strengths), _in_dtype_of(flat, rates)
        query_inputs, support_rows = concat_support(flat.module, episode.support_inputs, episode.query_inputs)
        size = settings.chunk_size or default_chunk_size(
            flat, episode.support_inputs, episode.tasks, query_inputs, self.differentiated_steps
        )
        if settings.check_network:
            check_network(flat, episode.support_inputs, batched=min(size, episode.tasks) > 1)
        for part in episode._replace(query_inputs=query_inputs).split(size):
            tasks = Episode(*flat.cast(clone_inference_tensors(tuple(part))))
            support = TaskLoss(
                flat, settings.loss, tasks.support_inputs, tasks.support_targets, self.support_classes, state
            )
            query = TaskLoss(
                flat,
                settings.query_loss,
                tasks.query_inputs,
                tasks.query_targets,
                self.query_classes,
                state,
                support_rows,
            )
            yield SupervisedProblem(support, regularizer, initial, strengths, rates), query

    def _one_task(self) -> TaskLoss:
        """The loss of the first task on its support set."""
        inputs, targets = pytree.tree_map(
            lambda t: t[:1], (self._episode.support_inputs, self._episode.support_targets)
        )
        return TaskLoss(self.network, self.settings.loss, *self.network.cast((inputs, targets)))

    @contextmanager
    def precision(self) -> Iterator[None]:
        """Set PyTorch up for a solve, and put its settings and the network's state back afterwards.

        This leaves inference mode, which cannot differentiate, and autocast, whose bf16 products are wrong by 5e-3.
        """
        flat = self.network
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(plain_attention())
            stack.enter_context(force_eager())
            stack.enter_context(flat.isolated())
            stack.enter_context(named_missing_derivatives(self._one_task))
            if self.settings.full_precision:
                stack.enter_context(torch.autocast(flat.device.type, enabled=False))
                stack.enter_context(full_float32())
            if flat.dtype != flat.stored_dtype:  # New tensors inside the network must fit.
                stack.enter_context(default_dtype(flat.dtype))
            yield


def _network(model: nn.Module, settings: Settings) -> FlatModel:
    flat = FlatModel(model, settings.compile, adapt_only=settings.adapt_only)
    return flat.with_dtype(torch.promote_types(flat.dtype, torch.float32)) if settings.full_precision else flat


def _require_fitting(flat: FlatModel, episode: Episode) -> None:
    """Raise a ValueError unless the inputs have the network's device and dtype."""
    for name in ("support_inputs", "query_inputs"):
        for leaf in pytree.tree_leaves(getattr(episode, name)):
            device, dtype = f"on the backbone's device {flat.device}", f"of the backbone's dtype {flat.stored_dtype}"
            require(
                leaf.device == flat.device, None, name, device, str(leaf.device), "Move one of them with .to(device)."
            )
            fits = leaf.dtype == flat.stored_dtype or not leaf.is_floating_point()
            remedy = f"Convert the episode with .to({flat.stored_dtype}), or the backbone with .to({leaf.dtype})."
            require(fits, None, name, dtype, leaf.dtype, remedy)


def _require_learned(argument: str, given: Mapping[str, Tensor], owner: object, method: str, flat: FlatModel) -> None:
    """Raise a ValueError unless ``given`` has the names and shapes that a regulariser or a solver learns."""
    last = _needed.setdefault(flat.module, {})
    if argument not in last or last[argument][0] is not owner or last[argument][1] != flat.layout:
        # Cached, since the first values of a matrix take longer than the rest of the preparation.
        last[argument] = owner, flat.layout, _shapes(getattr(owner, method)(flat))
    found, needed = _shapes(given), last[argument][2]
    requirement = f"tensors of the names and shapes that {type(owner).__name__} learns, {needed}"
    remedy = f"Take those of its method {method}, or leave {argument} out."
    require(found == needed, None, argument, requirement, found, remedy)


def _shapes(tree: Mapping[str, Tensor]) -> dict[str, list[int]]:
    return {name: list(value.shape) for name, value in sorted(tree.items())}


def _in_dtype_of(flat: FlatModel, learned: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # The learned values of a module may have more bits than its network.
    return {name: value.to(flat.dtype) for name, value in learned.items()}


def classes_of(name: str, targets: Any, loss: LossFunction) -> int | None:
    """The number of outputs that class-index targets need; None where the loss does not take class indices."""
    if not is_cross_entropy(loss) or not isinstance(targets, Tensor):
        return None
    if targets.is_floating_point():
        require_probabilities(name, targets)
        return None
    ignored = loss.ignore_index if isinstance(loss, nn.CrossEntropyLoss) else -100
    kept = targets.where(targets != ignored, 0)
    lowest, highest = torch.stack([kept.min(), kept.max()]).tolist()
    require(lowest >= 0, None, name, "class indices from 0", lowest, "Relabel each task's classes to 0 … N-1.")
    return int(highest) + 1
