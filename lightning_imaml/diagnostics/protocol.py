"""The protocol of few-shot results, in words."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils import _pytree as pytree

from lightning_imaml.diagnostics.interface import evaluation_solver
from lightning_imaml.episodes import Episode
from lightning_imaml.functional.deployment import uses_batch_statistics
from lightning_imaml.problems.support_set import reads_support

Span = tuple[float, float]
"""The lowest and the highest value of a number that may differ from task to task."""


@dataclass(frozen=True)
class Protocol:
    """How tasks were made, and how the network adapted to them; ``str`` gives it in words.

    Attributes:
        support: samples of a class in the support set, or of a task for regression.
        query: samples of a class in the query set, or of a task for regression.
        ways: classes a task; None for regression.
        inner_steps: the most inner steps in evaluation; None for a solver without a field ``steps``.
        batch_statistics: whether a BatchNorm layer normalises by the statistics of the batch at test time. Predictions
            then depend on the whole query set: the transductive protocol. All other norms are inductive.
        support_statistics: whether a layer normalises by the statistics of the support set.
    """

    support: Span
    query: Span
    ways: Span | None
    inner_steps: int | None
    batch_statistics: bool
    support_statistics: bool

    @classmethod
    def of(cls, module: Any, episode: Episode) -> Protocol:
        """Read the protocol off an ``IMAMLModule`` and one of its episodes."""
        targets = episode.support_targets
        classes = has_class_indices(targets)
        ways = int(targets.max()) + 1 if classes else 1
        support, query = (pytree.tree_leaves(part)[0].shape[1] / ways for part in (targets, episode.query_targets))
        return cls(
            support=(support, support),
            query=(query, query),
            ways=(ways, ways) if classes else None,
            inner_steps=getattr(evaluation_solver(module), "steps", None),
            batch_statistics=uses_batch_statistics(module.backbone),
            support_statistics=reads_support(module.backbone),
        )

    def joined(self, other: Protocol) -> Protocol:
        """The protocol of an evaluation with tasks of both protocols."""
        return replace(
            self,
            support=_span(self.support, other.support),
            query=_span(self.query, other.query),
            ways=None if self.ways is None or other.ways is None else _span(self.ways, other.ways),
        )

    def __str__(self) -> str:
        if self.ways is None:
            words = [f"{_words(self.support)} support and {_words(self.query)} query samples a task"]
        else:
            words = [f"{_words(self.ways)}-way {_words(self.support)}-shot"]
            words.append(f"{_words(self.query)} queries a class")
        if self.inner_steps is not None:
            words.append(f"{self.inner_steps} inner steps")
        inductive = "support statistics (inductive)" if self.support_statistics else "inductive"
        words.append("batch statistics (transductive)" if self.batch_statistics else inductive)
        return ", ".join(words)


def has_class_indices(targets: Any) -> bool:
    """Whether targets are class indices, ``[T, n]``."""
    return isinstance(targets, torch.Tensor) and not targets.is_floating_point()


def _span(one: Span, other: Span) -> Span:
    return min(one[0], other[0]), max(one[1], other[1])


def _words(span: Span) -> str:
    """One number where all tasks agree, or the range."""
    low, high = (f"{value:.0f}" if value == round(value) else f"{value:.3g}" for value in span)
    return low if low == high else f"{low} to {high}"
