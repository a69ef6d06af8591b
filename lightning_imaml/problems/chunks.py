"""How many tasks go through the engine at once, where the user does not say."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils import _pytree as pytree

from lightning_imaml.episodes import clone_inference_tensors
from lightning_imaml.problems.network import FlatModel

# What a processor's caches can hold of a chunk: with more, batching saves less than the traffic with memory costs.
_CPU_BYTES = 16 * 2**20
# Compiled convolutions of several tasks are matrix products. Where fewer than these fit, tasks are so large that the
# library's own convolution, of one task at a time, is faster.
_FEWEST_COMPILED = 8
# On other devices memory is the limit: a share of all of it, so that the choice does not depend on what else runs.
_DEVICE_SHARE = 0.25
# What is held at once, in units of what one forward pass keeps: for a Hessian product, for each inner step that is
# differentiated, and for the query gradient. Measured with live tensors on Conv4: 6.4, 2.8 and 2.
_PRODUCT, _STEP, _QUERY = 8, 3, 3

_known: weakref.WeakKeyDictionary[nn.Module, dict[Hashable, int]] = weakref.WeakKeyDictionary()


def default_chunk_size(
    model: FlatModel, inputs: Any, tasks: int, query_inputs: Any = None, differentiated_steps: int = 0
) -> int:
    """The number of tasks to take at once: small tasks in batches, large ones few at a time.

    Args:
        model: the network.
        inputs: ``[T, n, ...]``, of the support sets.
        tasks: T.
        query_inputs: ``[T, n, ...]``, of the query sets, where they are differentiated too.
        differentiated_steps: how many inner steps the estimator differentiates.
    """
    work = _bytes_of_a_task(model, inputs)
    if model.device.type == "cuda":
        total = torch.cuda.get_device_properties(model.device).total_memory
        query = 0 if query_inputs is None else _QUERY * _bytes_of_a_task(model, query_inputs)
        need = max((_PRODUCT + _STEP * differentiated_steps) * work, query)
        most = int(total * _DEVICE_SHARE) // max(1, need)
    elif model.device.type == "cpu":
        most = _CPU_BYTES // max(1, work)
        if model.compile and most < _FEWEST_COMPILED:
            most = 1
    else:
        most = tasks
    return even_chunk_size(tasks, most)


def even_chunk_size(tasks: int, most: int) -> int:
    """A size of chunks of at most ``most`` tasks, the same for all of them where that takes at most twice as many.

    With ``compile=True`` a last chunk of another size would cost another compilation.
    """
    most = min(max(1, most), tasks)
    divisor = next(size for size in range(most, 0, -1) if tasks % size == 0)
    return divisor if 2 * divisor > most else -(-tasks // -(-tasks // most))


def _bytes_of_a_task(model: FlatModel, inputs: Any) -> int:
    """About what the graph of one task's forward pass keeps, its parameters included."""
    one = pytree.tree_map(lambda t: t[:1], inputs)
    key = (
        tuple((t.shape, t.dtype) for t in pytree.tree_leaves(one)),
        model.names,
        model.shared,
        model.dtype,
        model.device,
    )
    known = _known.setdefault(model.module, {})
    if key not in known:
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            kept[tensor.data_ptr()] = max(tensor.nbytes, kept.get(tensor.data_ptr(), 0))
            return tensor.detach()  # The tensor itself would refer to its own graph, which nothing would free then.

        # The random state stays, so that a resumed run, which measures again, goes on like one that was never stopped.
        devices = [model.device] if model.device.type == "cuda" else []
        row = model.initial().unsqueeze(0)
        with (
            torch.random.fork_rng(devices),
            torch.inference_mode(False),
            torch.enable_grad(),
            # A network that differentiates by itself refuses the hooks. What it keeps stays unknown but for its rows.
            contextlib.suppress(RuntimeError),
            saved_tensors_hooks(pack, lambda t: t),
        ):
            # Copies, since a forward pass may write to the network's buffers.
            # What is shared counts as differentiable, as it is in the meta-gradient.
            state = {name: t.clone().requires_grad_(name in model.shared) for name, t in model.state().items()}
            # Held, since what is freed gives its address to another.
            outputs = model(row.clone().requires_grad_(), model.cast(clone_inference_tensors(one)), state)
            del outputs
        known[key] = sum(kept.values()) or row.nbytes
    return known[key]
