"""What training logs, by name."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.optimizer import Optimizer

from lightning_imaml.components import metric_names as names
from lightning_imaml.functional import MetaGradient
from lightning_imaml.metrics import accuracy_of_tasks, is_classification


def learning_rates(optimizer: Optimizer) -> dict[str, float]:
    """The learning rate of the first group of parameters, and that of each further group by its name or number."""
    rates = {names.LEARNING_RATE: float(optimizer.param_groups[0]["lr"])}
    for number, group in enumerate(optimizer.param_groups, 1):
        name = group.get("name", f"group{number}")
        if number > 1 or "name" in group:
            rates[f"{names.LEARNING_RATE}/{name}"] = float(group["lr"])
    return rates


def training_values(
    result: MetaGradient, targets: Any, before: Any, ignore_index: int | None = None
) -> dict[str, Tensor]:
    """What is logged of a meta-step: means over its tasks, by name.

    Args:
        result: the meta-gradient of the tasks that were good.
        targets: the query targets of all tasks of the batch.
        before: the unadapted network's outputs for them; None where they were not computed.
        ignore_index: the class index that the accuracies leave out besides the negative ones.
    """
    values = {names.OUTER_LOSS: result.loss.mean(), names.INNER_RESIDUAL: result.adapted.residual.mean()}
    if isinstance(targets, Tensor) and is_classification(result.query_outputs, targets[result.tasks]):
        targets = targets[result.tasks]
        values[names.ACCURACY] = accuracy_of_tasks(result.query_outputs, targets, ignore_index).mean()
        if before is not None:
            values[names.ACCURACY_BEFORE] = accuracy_of_tasks(before[result.tasks], targets, ignore_index).mean()
    if result.linear is not None:
        values[names.LINEAR_RESIDUAL] = result.linear.residual.mean()
        values[names.LINEAR_STEPS] = result.linear.steps.float().mean()
        values[names.INDEFINITE] = result.linear.indefinite.float().mean()
    return values
