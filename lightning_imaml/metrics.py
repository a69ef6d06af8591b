"""Accuracy over few-shot tasks and its confidence interval."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


def is_classification(outputs: Any, targets: Any) -> bool:
    """Whether these are logits ``[T, n, ways]`` and class indices ``[T, n]``."""
    return (
        isinstance(outputs, Tensor)
        and isinstance(targets, Tensor)
        and not targets.is_floating_point()
        and outputs.ndim == 3
        and outputs.shape[:2] == targets.shape
    )


class EpisodicAccuracy(Metric):
    """The mean over tasks of each task's accuracy on its query set, a fraction in 0 … 1.

    Every task counts the same, whatever its number of queries; sums are reduced over processes, so uneven shares are
    right.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    total: Tensor
    squares: Tensor
    tasks: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("total", "squares", "tasks"):
            self.add_state(name, torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Add tasks.

        Args:
            outputs: logits ``[T, n, ways]``.
            targets: class indices ``[T, n]``.
        """
        if not is_classification(outputs, targets):
            raise ValueError(
                f"{type(self).__name__} takes logits [tasks, samples, ways] and class indices [tasks, samples]; found "
                f"{list(outputs.shape)} and {list(targets.shape)} {targets.dtype}. For other targets, return metrics "
                "that suit them from IMAMLModule.configure_metrics."
            )
        accuracy = (outputs.argmax(dim=-1) == targets).float().mean(dim=1)
        # Not in place: processes that were spawned with this metric share its first tensors.
        self.total = self.total + accuracy.sum()
        self.squares = self.squares + accuracy.square().sum()
        self.tasks = self.tasks + accuracy.numel()

    def compute(self) -> Tensor:
        """The mean accuracy; NaN before the first task."""
        return self.total / self.tasks


class EpisodicInterval95(EpisodicAccuracy):
    """Half the width of the 95 % interval of :class:`EpisodicAccuracy`.

    1.96 s/√T, with s the standard deviation over the T tasks; 0 for a single task, which has no deviation.
    """

    def compute(self) -> Tensor:
        """Half the interval's width, in the accuracy's unit."""
        variance = (self.squares - self.total.square() / self.tasks).clamp(min=0) / (self.tasks - 1).clamp(min=1)
        return 1.96 * (variance / self.tasks).sqrt()
