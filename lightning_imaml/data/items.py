"""Items of a dataset: which part of one is the input and which the label, and how inputs become a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.data import Dataset, default_collate

Key = str | int
"""A part of an item: the key of a dict, or the place in a tuple."""

# The module is named apart so that the command line takes one by its class path.
Collate = nn.Module | Callable[[list[Any]], Any]
"""Takes the inputs of n items, gives a tensor ``[n, ...]``, or a dict, list or tuple of such."""


class KeyedItems(Dataset[Any]):
    """The items of another dataset as ``(input, label)`` pairs.

    Args:
        source: a map-style dataset.
        targets: the label of every item.
        input_key: the input's part of an item, or several that make a dict or a tuple; None for the first of a tuple.
        collate: makes a batch of inputs; None for PyTorch's ``default_collate``.
    """

    def __init__(
        self,
        source: Dataset[Any],
        targets: list[Any],
        input_key: Key | Sequence[Key] | None = None,
        collate: Collate | None = None,
    ) -> None:
        self.source, self.targets, self.input_key, self.collate = source, targets, input_key, collate
        self.items = getattr(source, "items", None)  # Their names, where they have some.

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        """One item's input and label."""
        return self.input(self.source[index]), self.targets[index]

    def input(self, item: Any) -> Any:
        """The input of an item."""
        key = self.input_key
        if key is None:
            return first_of(item, self.source)
        if isinstance(key, str | int):
            return _with_tensors(part_of(item, key, "input_key", self.source))
        parts = {name: _with_tensors(part_of(item, name, "input_key", self.source)) for name in key}
        return parts if isinstance(item, Mapping) else tuple(parts.values())


def part_of(item: Any, key: Key, argument: str, source: object) -> Any:
    """A part of an item by its key, the value of ``argument``.

    Raises:
        ValueError: the item has no such part; the message says which it has.
    """
    if isinstance(item, Mapping) and key in item:
        return item[key]
    if isinstance(item, tuple | list) and isinstance(key, int) and -len(item) <= key < len(item):
        return item[key]
    raise ValueError(
        f"{argument} must name a part of the items of {type(source).__name__}; found {key!r}, and items that are "
        f"{_described(item)}. Name one of these."
    )


def label_of(item: Any, target_key: Key | None, source: object) -> Any:
    """The label of an item.

    Raises:
        TypeError: there is no key, and the item is no pair.
        ValueError: the item has no such part.
    """
    if target_key is not None:
        return part_of(item, target_key, "target_key", source)
    if not isinstance(item, tuple | list) or len(item) != 2:
        raise _no_pair(item, source)
    return item[1]


def first_of(item: Any, source: object) -> Any:
    """The first part of an item.

    Raises:
        TypeError: it has none.
    """
    if not isinstance(item, tuple | list) or not item:
        raise _no_pair(item, source)
    return item[0]


def _no_pair(item: Any, source: object) -> TypeError:
    named = isinstance(item, Mapping | tuple | list)
    remedy = "Say which part is the input and which the class with input_key=... and target_key=..."
    return TypeError(
        f"the items of {type(source).__name__} must be (input, label) pairs; found items that are {_described(item)}. "
        f"{remedy if named else 'Return both from the dataset'}, in EpisodicDataModule."
    )


def _described(item: Any) -> str:
    if isinstance(item, Mapping):
        return f"dicts with the keys {list(item)}"
    if isinstance(item, tuple | list):
        return f"{type(item).__name__}s of {len(item)} parts ({', '.join(type(part).__name__ for part in item)})"
    return type(item).__name__


def _with_tensors(value: Any) -> Any:
    """A list of numbers, as Hugging Face's datasets give them, as a tensor; other values as they are."""
    leaves = pytree.tree_leaves(value) if isinstance(value, list) else []
    if not leaves or not all(isinstance(leaf, int | float) for leaf in leaves):
        return value
    try:
        return torch.tensor(value)
    except ValueError:  # rows of different lengths
        return value


def batch_of(inputs: list[Any], collate: Collate | None, source: object) -> Any:
    """The inputs of n items as a batch.

    Returns:
        A tensor ``[n, ...]``, or the dict, list or tuple of such tensors that the inputs are made of.

    Raises:
        ValueError: they cannot be stacked, or ``collate`` gives something else.
    """
    if collate is None:
        try:
            batch = default_collate(inputs)
        except (TypeError, ValueError, RuntimeError) as error:
            raise _unstackable(inputs, source, str(error)) from error
    else:
        batch = collate(inputs)
        batch = dict(batch) if isinstance(batch, Mapping) else batch  # Such as a tokenizer's own kind.
    leaves = pytree.tree_leaves(batch)
    if leaves and all(isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == len(inputs) for leaf in leaves):
        return batch
    found = [list(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__ for leaf in leaves[:3]]
    if collate is None:
        raise _unstackable(inputs, source, f"a batch of {len(inputs)} becomes {found}")
    raise ValueError(
        f"collate must give tensors [n, ...] for the inputs of n items, or a dict, list or tuple of such; found "
        f"{found} for {len(inputs)} items. Pad and stack them along a new first dimension."
    )


def _unstackable(inputs: list[Any], source: object, reason: str) -> ValueError:
    leaves = pytree.tree_leaves(inputs)
    tensors = all(isinstance(value, Tensor) and value.ndim for value in inputs)
    if any(isinstance(leaf, Image.Image) or (isinstance(leaf, Tensor) and leaf.ndim > 2) for leaf in leaves):
        remedy = (
            "Give the dataset a transform with Resize and ToTensor; PIL images of one size can also be kept as they "
            "are with in_memory=True."
        )
    elif any(isinstance(leaf, str) for leaf in leaves):
        remedy = "Pass collate=..., which makes tensors of a list of texts, such as lambda texts: tokenizer(texts)."
    elif tensors and len({value.shape[1:] for value in inputs}) == 1:
        remedy = "Pass collate=functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True), which pads them."
    else:
        remedy = "Pass collate=..., a function that pads a list of inputs to one shape and stacks them."
    return ValueError(
        f"the inputs of {type(source).__name__} must be tensors of one shape, or dicts, lists or tuples of such; they "
        f"cannot be stacked ({reason}). {remedy}"
    )
