"""Predict with adapted networks, and evaluate them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from lightning_imaml.components.checks import require
from lightning_imaml.functional.preparation import classes_of
from lightning_imaml.functional.settings import check_chunk_size
from lightning_imaml.problems import first_use
from lightning_imaml.problems.chunks import default_chunk_size
from lightning_imaml.problems.network import FlatModel
from lightning_imaml.problems.supervised import LossFunction, TaskLoss
from lightning_imaml.problems.support_set import concat_support
from lightning_imaml.runtime.attention import plain_attention
from lightning_imaml.runtime.eager import force_eager


def predict(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    inputs: Any,
    *,
    support_inputs: Any = None,
    chunk_size: int | None = None,
    check_network: bool = True,
) -> Any:
    """Outputs of T adapted networks.

    Args:
        model: the network that was adapted.
        parameters: ``Adapted.parameters``, name → ``[T, ...]``.
        inputs: ``[T, n, ...]``.
        support_inputs: the inputs that the parameters were adapted to, ``[T, s, ...]``. A network that normalises by
            their statistics needs them (:class:`lightning_imaml.models.SupportNorm`); others ignore them.
        chunk_size: the most tasks at once; None chooses it from the size of a task.
        check_network: as for :func:`adapt`.

    Returns:
        ``[T, n, ...]``, computed in the dtype of ``parameters``.

    Raises:
        ValueError: the inputs have more or fewer tasks than the parameters; or the network needs the support inputs,
            and they are missing or do not fit.
    """
    flat = _network_of(model, parameters, "inputs", inputs)
    return predict_rows(flat, flat.flatten(parameters), inputs, support_inputs, chunk_size, check_network)


def evaluate(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    inputs: Any,
    targets: Any,
    *,
    loss: LossFunction = F.cross_entropy,
    support_inputs: Any = None,
    chunk_size: int | None = None,
    check_network: bool = True,
) -> tuple[Tensor, Any]:
    """Losses and outputs of T adapted networks, without gradients.

    Args:
        model: the network that was adapted.
        parameters: ``Adapted.parameters``, name → ``[T, ...]``.
        inputs: ``[T, n, ...]``.
        targets: ``[T, n]`` or ``[T, n, ...]``.
        loss: ``loss(outputs, targets) -> scalar`` for one task.
        support_inputs: the inputs that the parameters were adapted to, see :func:`predict`.
        chunk_size: the most tasks at once; None chooses it from the size of a task.
        check_network: as for :func:`adapt`.

    Returns:
        The losses ``[T]`` and the outputs ``[T, n, ...]``.

    Raises:
        ValueError: the targets do not fit the outputs, or :func:`predict` raises.
    """
    flat = _network_of(model, parameters, "targets", targets)
    _require_same_tasks(parameters, "inputs", inputs)
    with torch.no_grad():
        outputs = predict_rows(flat, flat.flatten(parameters), inputs, support_inputs, chunk_size, check_network)
        targets = flat.cast(targets)
        task_loss = TaskLoss(flat, loss, inputs, targets, classes_of("targets", targets, loss))
        return task_loss.from_outputs(task_loss.check(outputs)), outputs


def predict_rows(
    flat: FlatModel,
    rows: Tensor,
    inputs: Any,
    support_inputs: Any = None,
    chunk_size: int | None = None,
    check: bool = True,
) -> Any:
    """Outputs ``[T, n, ...]`` of the networks whose parameters are rows ``[T, D]``, see :func:`predict`."""
    check_chunk_size(chunk_size)
    inputs, support = concat_support(flat.module, flat.cast(support_inputs), flat.cast(inputs))
    with plain_attention(), force_eager(), flat.isolated():
        size = chunk_size or default_chunk_size(flat, inputs, rows.shape[0])
        if check:
            first_use.check_network(flat, inputs, support, batched=min(size, rows.shape[0]) > 1)
        pieces = [
            flat(rows[k : k + size], pytree.tree_map(lambda t, k=k: t[k : k + size], inputs), support=support)
            for k in range(0, rows.shape[0], size)
        ]
    return pytree.tree_map(lambda *leaves: torch.cat(leaves), *pieces)


def _network_of(model: nn.Module, parameters: Mapping[str, Tensor], name: str, tree: Any) -> FlatModel:
    """The network with the adapted parameters in its rows; raises a ValueError unless ``tree`` has the same tasks."""
    _require_same_tasks(parameters, name, tree)
    return FlatModel(model, dtype=next(iter(parameters.values())).dtype, adapt_only=tuple(parameters))


def _require_same_tasks(parameters: Mapping[str, Tensor], name: str, tree: Any) -> None:
    parts = (pytree.tree_leaves(part) for part in (dict(parameters), tree))
    found = [sorted({leaf.shape[0] if leaf.ndim else 0 for leaf in leaves}) for leaves in parts]
    same = found[0] == found[1] and len(found[0]) == 1
    remedy = f"Pass the {name} of the tasks that the parameters were adapted to, with .unsqueeze(0) for one task."
    require(same, None, f"parameters and {name}", "of the same number T of tasks, [T, ...] each", found, remedy)
