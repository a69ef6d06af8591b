"""The protocol that few-shot results belong to, in words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from lightning_imaml.episodes import Episode


@dataclass(frozen=True)
class Protocol:
    """How tasks were made and adapted to; ``str`` gives it in words.

    Attributes:
        support: samples a task in the support set.
        query: samples a task in the query set.
        ways: classes a task; None for regression.
        inner_steps: the most inner steps; None for a solver that does not say.
        batch_statistics: whether a BatchNorm layer normalises by the statistics of the batch at test time. Predictions
            then depend on the whole query set: the transductive protocol. All other norms are inductive.
    """

    support: int
    query: int
    ways: int | None
    inner_steps: int | None
    batch_statistics: bool

    @classmethod
    def of(cls, module: Any, episode: Episode) -> Protocol:
        """Read the protocol off an ``IMAMLModule`` and one of its episodes."""
        targets = episode.support_targets
        classes = isinstance(targets, torch.Tensor) and not targets.is_floating_point()
        return cls(
            support=pytree.tree_leaves(targets)[0].shape[1],
            query=pytree.tree_leaves(episode.query_targets)[0].shape[1],
            ways=int(targets.max()) + 1 if classes else None,
            inner_steps=getattr(module.inner_solver, "steps", None),
            batch_statistics=any(
                isinstance(layer, _BatchNorm) and layer.running_mean is None for layer in module.backbone.modules()
            ),
        )

    def __str__(self) -> str:
        if self.ways is None:
            words = [f"{self.support} support and {self.query} query samples a task"]
        else:
            words = [f"{self.ways}-way {_each(self.support, self.ways)}-shot"]
            words.append(f"{_each(self.query, self.ways)} queries a class")
        if self.inner_steps is not None:
            words.append(f"{self.inner_steps} inner steps")
        words.append("batch statistics (transductive)" if self.batch_statistics else "inductive")
        return ", ".join(words)


def _each(samples: int, ways: int) -> str:
    """Samples a class: a whole number in the usual, balanced task."""
    return f"{samples / ways:.3g}"
