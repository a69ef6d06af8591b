"""The protocol that few-shot results belong to, in words."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from lightning_imaml.diagnostics.interface import evaluation_solver
from lightning_imaml.episodes import Episode
from lightning_imaml.problems.support_set import reads_support

Span = tuple[float, float]
"""The lowest and the highest of a number that may differ from task to task."""


@dataclass(frozen=True)
class Protocol:
    """How tasks were made and adapted to; ``str`` gives it in words.

    Attributes:
        support: samples of a class in the support set, or of a task for regression.
        query: samples of a class in the query set, or of a task for regression.
        ways: classes a task; None for regression.
        inner_steps: the most inner steps in evaluation; None for a solver that does not say.
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
        classes = isinstance(targets, torch.Tensor) and not targets.is_floating_point()
        ways = int(targets.max()) + 1 if classes else 1
        support, query = (pytree.tree_leaves(part)[0].shape[1] / ways for part in (targets, episode.query_targets))
        return cls(
            support=(support, support),
            query=(query, query),
            ways=(ways, ways) if classes else None,
            inner_steps=getattr(evaluation_solver(module), "steps", None),
            batch_statistics=any(
                isinstance(layer, _BatchNorm) and layer.running_mean is None for layer in module.backbone.modules()
            ),
            support_statistics=reads_support(module.backbone),
        )

    def joined(self, other: Protocol) -> Protocol:
        """The protocol of an evaluation that holds tasks of both."""
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


def _span(one: Span, other: Span) -> Span:
    return min(one[0], other[0]), max(one[1], other[1])


def _words(span: Span) -> str:
    """A whole number in the usual, balanced task."""
    low, high = (f"{value:.0f}" if value == round(value) else f"{value:.3g}" for value in span)
    return low if low == high else f"{low} to {high}"
