"""The mean of a number over tasks, right on any number of processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class TaskMean(Metric):
    """The mean over all tasks of all processes of one number a task; NaN where a task's number is NaN.

    ``LightningModule.log(..., sync_dist=True)`` is off where processes have different numbers of tasks: Lightning 2.6
    averages the counts over processes as whole numbers.
    """

    full_state_update = False
    total: Tensor
    tasks: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("total", "tasks"):
            self.add_state(name, torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, values: Tensor) -> None:
        """Add tasks by their numbers, ``[T]``."""
        # Not in place: processes that were spawned with this metric share its first tensors.
        self.total = self.total + values.sum()
        self.tasks = self.tasks + values.numel()

    def compute(self) -> Tensor:
        """The mean; NaN before the first task."""
        return self.total / self.tasks
