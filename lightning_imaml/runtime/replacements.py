"""Functions of PyTorch in a form that can be differentiated twice and batched over tasks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


class Replacements(TorchFunctionMode):
    """Within the block, functions whose derivatives PyTorch lacks, batches or computes wrongly have formulas of others.

    The list is in the documentation (``docs/networks.md``), with what each of them is for. Values and first derivatives
    are those of the originals, except at kinks, where the derivative is one of the two of either side.

    Attributes:
        used: whether any function has been replaced.
    """

    def __init__(self) -> None:
        super().__init__()
        self.used = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Replace the function's form, not its value."""
        form = FORMS.get(func)
        result = NotImplemented if form is None else form(*args, **(kwargs or {}))
        if result is NotImplemented:
            return func(*args, **(kwargs or {}))
        self.used = True
        return result


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    if padding_idx is None or max_norm is not None or scale_grad_by_freq:
        return NotImplemented
    found = F.embedding(input, weight)
    padding = (input == padding_idx % weight.shape[0]).unsqueeze(-1)
    return torch.where(padding, found.detach(), found)


def _embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Any:
    if max_norm is not None or scale_grad_by_freq or (per_sample_weights is not None and mode != "sum"):
        return NotImplemented
    found = F.embedding(input, weight)  # [bags, n, D], or [n, D] of all bags.
    if per_sample_weights is not None:
        found = found * per_sample_weights.unsqueeze(-1)
    member = torch.ones_like(input, dtype=torch.bool)
    if padding_idx is not None:
        member = input != padding_idx % weight.shape[0]
    if input.ndim == 1:
        if offsets is None:
            return NotImplemented
        begin = offsets[:-1] if include_last_offset else offsets
        place = torch.arange(input.shape[0], device=input.device)
        # An entry is of the last bag that begins at it or before it.
        bag = (place.unsqueeze(1) >= begin).sum(dim=1) - 1
        member = member & (bag == torch.arange(begin.shape[0], device=input.device).unsqueeze(1))
        found = found.unsqueeze(0)
    kept, count = member.unsqueeze(-1), member.sum(dim=1).unsqueeze(-1)
    if mode == "max":
        highest = torch.where(kept, found, -torch.inf).max(dim=1).values
        return torch.where(count > 0, highest, 0.0)
    total = torch.where(kept, found, 0.0).sum(dim=1)
    return total if mode == "sum" else total / count.clamp(min=1)


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    over = [k for k in range(v.ndim) if k != dim % v.ndim] if dim != -1 else None
    norm: Tensor = vector_norm(v, dim=over, keepdim=True)
    return v * (g / norm)


def _hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    return _stored(input, F.relu6(input + 3) / 6, inplace)


def _rrelu(
    input: Tensor, lower: float = 1.0 / 8, upper: float = 1.0 / 3, training: bool = False, inplace: bool = False
) -> Any:
    return NotImplemented if training else _stored(input, F.leaky_relu(input, (lower + upper) / 2), inplace)


def _multi_margin_loss(
    input: Tensor,
    target: Tensor,
    p: int = 1,
    margin: float = 1.0,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Any:
    if input.ndim != 2 or size_average is not None or reduce is not None:
        return NotImplemented
    excess = (margin - input.gather(1, target.unsqueeze(1)) + input).clamp(min=0) ** p
    if weight is not None:
        excess = excess * weight[target].unsqueeze(1)
    others = torch.arange(input.shape[1], device=input.device) != target.unsqueeze(1)
    losses = torch.where(others, excess, 0.0).mean(dim=1)
    return losses if reduction == "none" else losses.sum() if reduction == "sum" else losses.mean()


def _stored(input: Tensor, value: Tensor, inplace: bool) -> Tensor:
    return input.copy_(value) if inplace else value


FORMS: dict[Any, Callable[..., Any]] = {
    F.embedding: _embedding,
    F.embedding_bag: _embedding_bag,
    torch._weight_norm: _weight_norm,
    F.hardsigmoid: _hardsigmoid,
    F.rrelu: _rrelu,
    F.multi_margin_loss: _multi_margin_loss,
}
"""What stands for each function; NotImplemented where the function itself is right."""
