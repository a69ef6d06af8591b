"""The episode: a batch of few-shot tasks."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


class Episode(NamedTuple):
    """A batch of T tasks, each with a support set to adapt to and a query set to be judged on.

    A named tuple, so that data loaders collate, pin and move it, and Lightning reads its batch size as T.

    Attributes:
        support_inputs: ``[T, N*K, ...]`` for N ways and K shots; a tensor, or a dict, list or tuple of tensors.
        support_targets: ``[T, N*K]`` class indices in ``0 … N-1``, or ``[T, N*K, ...]`` regression targets.
        query_inputs: ``[T, N*Q, ...]``, of the same structure as ``support_inputs``.
        query_targets: ``[T, N*Q]`` or ``[T, N*Q, ...]``.
    """

    support_inputs: Any
    support_targets: Any
    query_inputs: Any
    query_targets: Any

    @property
    def tasks(self) -> int:
        """The number of tasks T."""
        return int(pytree.tree_leaves(self.support_targets)[0].shape[0])

    def split(self, chunk_size: int | None) -> list[Episode]:
        """Cut into episodes of at most ``chunk_size`` tasks, as views; None keeps all tasks together."""
        if chunk_size is None or chunk_size >= self.tasks:
            return [self]
        starts = range(0, self.tasks, chunk_size)
        return [pytree.tree_map(lambda t, s=s: t[s : s + chunk_size], self) for s in starts]

    def validate(self) -> Episode:
        """Check that the four parts describe the same tasks.

        Returns:
            The episode itself.

        Raises:
            TypeError: a part holds something that is not a tensor.
            ValueError: a part is empty, or the parts disagree on the number of tasks or of samples a task.
        """
        samples: dict[str, int] = {}
        for name, part in self._asdict().items():
            for leaf in pytree.tree_leaves(part):
                if not isinstance(leaf, Tensor):
                    raise TypeError(
                        f"Episode.{name} must hold tensors only; found {type(leaf).__name__}. "
                        "Convert it with torch.as_tensor, or leave it out of the episode."
                    )
                if leaf.ndim < 2 or 0 in leaf.shape[:2]:
                    raise ValueError(
                        f"Episode.{name} must have shape [tasks, samples, ...] with at least one of each; "
                        f"found {list(leaf.shape)}. For a single task, add a leading dimension with .unsqueeze(0)."
                    )
                if leaf.shape[0] != self.tasks:
                    raise ValueError(
                        f"Episode.{name} must have the same number of tasks as support_targets ({self.tasks}); "
                        f"found {leaf.shape[0]}. Stack the same tasks in all four parts."
                    )
                if samples.setdefault(name, leaf.shape[1]) != leaf.shape[1]:
                    raise ValueError(
                        f"the tensors of Episode.{name} must agree on the number of samples a task; "
                        f"found {samples[name]} and {leaf.shape[1]}."
                    )
        for part in ("support", "query"):
            inputs, targets = samples[f"{part}_inputs"], samples[f"{part}_targets"]
            if inputs != targets:
                raise ValueError(
                    f"Episode.{part}_targets must have one target for each {part} input; found {targets} targets for "
                    f"{inputs} inputs a task. Shapes are [tasks, samples, ...] for both."
                )
        return self


def ordinary(tree: Any) -> Any:
    """Replace inference-mode tensors, which autograd refuses, by ordinary copies; other tensors stay as they are."""
    return pytree.tree_map_only(torch.Tensor, lambda t: t.clone() if t.is_inference() else t, tree)
