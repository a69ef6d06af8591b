"""Labelled data: which items of a dataset belong to which class."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset, default_collate


class LabelledTensors(TensorDataset):
    """Images held in memory with their labels and the names of their classes.

    A batch of tasks is gathered from it by one indexing operation. Images are kept as bytes, four times smaller than
    floats, and become ``float32`` in [0, 1] when they are fetched.

    Args:
        images: ``[n, C, H, W]``, ``uint8``.
        labels: ``[n]``, integers in ``0 … len(classes)-1``.
        classes: the name of each class.

    Raises:
        TypeError: the images are not ``uint8``.
        ValueError: the lengths disagree, or a label has no name.
    """

    def __init__(self, images: Tensor, labels: Tensor, classes: Sequence[str]) -> None:
        if images.dtype != torch.uint8:
            raise TypeError(
                f"images must be uint8, 0 to 255; found {images.dtype}. For data in another type use a TensorDataset."
            )
        if labels.ndim != 1 or len(labels) != len(images):
            raise ValueError(f"labels must have shape [{len(images)}], one for each image; found {list(labels.shape)}.")
        if len(labels) and not (labels.min() >= 0 and labels.max() < len(classes)):
            raise ValueError(
                f"labels must lie in 0 … {len(classes) - 1}, one name in `classes` for each; "
                f"found {int(labels.min())} … {int(labels.max())}. Renumber the labels, or name every class."
            )
        super().__init__(images, labels)
        self.classes = list(classes)

    def __getitem__(self, index: Any) -> tuple[Tensor, ...]:
        """Return one image (or several, for a tensor of indices) as ``float32`` in [0, 1], with its label."""
        images, labels = self.tensors
        return images[index].to(torch.float32).div_(255), labels[index]


@dataclass(frozen=True)
class ClassPool:
    """The classes of one split and the items of a dataset that show them.

    Attributes:
        source: a map-style dataset of ``(input, label)`` pairs.
        members: for each class, the indices of its items in ``source``. The order of the classes matters: episodes
            are drawn by position.
        named: whether the keys of ``members`` are names. Names mean the same class in every dataset, numbers do not:
            two datasets may both count from zero.
    """

    source: Dataset[Any]
    members: Mapping[Hashable, NDArray[np.int64]]
    named: bool

    @classmethod
    def of(cls, source: Dataset[Any]) -> ClassPool:
        """Group the items of a dataset by class, in the order of first appearance.

        Classes go by their names where the dataset has them (``classes``, as torchvision's datasets do).
        """
        labels = read_labels(source)
        names = class_names(source)
        if names and all(isinstance(label, int) and 0 <= label < len(names) for label in set(labels)):
            labels = [names[label] for label in labels]
        groups: dict[Hashable, list[int]] = {}
        for index, label in enumerate(labels):
            groups.setdefault(label, []).append(index)
        members = {label: np.asarray(indices, dtype=np.int64) for label, indices in groups.items()}
        return cls(source, members, named=all(isinstance(label, str) for label in members))

    def subset(self, classes: Sequence[Hashable]) -> ClassPool:
        """Keep these classes only, in this order."""
        return ClassPool(self.source, {label: self.members[label] for label in classes}, self.named)

    def overlap(self, other: ClassPool) -> list[Hashable]:
        """The classes that both pools hold, as far as that can be told."""
        comparable = self.source is other.source or (self.named and other.named)
        return [label for label in self.members if label in other.members] if comparable else []


def read_labels(source: Dataset[Any]) -> list[Any]:
    """Find the label of every item of a dataset.

    Looks for ``targets`` or ``labels``, as torchvision's datasets have them, or the second tensor of a
    ``TensorDataset``; only without these is every item read, once.

    Raises:
        TypeError: the dataset has no length, or a label cannot be the key of a class.
    """
    if not hasattr(source, "__len__") or not hasattr(source, "__getitem__"):
        raise TypeError(
            f"a dataset of episodes must be map-style, with __len__ and __getitem__; found {type(source).__name__}. "
            "Read an iterable dataset into a list of (input, label) pairs first."
        )
    found = _stored_labels(source)
    if found is None:
        found = [source[index][1] for index in range(len(source))]
    listed = found.tolist() if isinstance(found, Tensor | np.ndarray) else found
    labels = [label.item() if isinstance(label, Tensor | np.generic) and label.ndim == 0 else label for label in listed]
    for label in labels:
        if not isinstance(label, Hashable) or isinstance(label, Tensor):
            raise TypeError(
                f"labels must be one number or string an item; found {type(label).__name__} in "
                f"{type(source).__name__}. Give each item the one class that it shows."
            )
    return labels


def _stored_labels(source: Any) -> Any:
    """The labels that a dataset holds beside its items, or None."""
    if isinstance(source, Subset):
        inner = read_labels(source.dataset)
        return [inner[index] for index in source.indices]
    if isinstance(source, TensorDataset):
        return source.tensors[1]
    for attribute in ("targets", "labels"):
        found = getattr(source, attribute, None)
        if isinstance(found, Tensor | np.ndarray | list | tuple) and len(found) == len(source):
            return found
    return None


def class_names(source: Any) -> list[str]:
    """The names of a dataset's classes, by label, or an empty list."""
    if isinstance(source, Subset):
        return class_names(source.dataset)
    names = getattr(source, "classes", None)
    usable = isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)
    return list(names) if usable and len(set(names)) == len(names) else []  # type: ignore[arg-type]


def gather(source: Any, indices: Tensor) -> Any:
    """Fetch the inputs of these items, stacked along a new first dimension.

    Args:
        source: a map-style dataset of ``(input, label)`` pairs.
        indices: ``[n]``.

    Returns:
        A tensor ``[n, ...]``, or the dict, list or tuple of such tensors that the inputs are made of.
    """
    if isinstance(source, TensorDataset):
        return source[indices][0]
    return default_collate([source[index][0] for index in indices.tolist()])


def shuffle_classes(classes: Sequence[Hashable]) -> list[Hashable]:
    """Put classes into an order that has nothing to do with their meaning and never changes.

    The order is that of the SHA-256 digests of their representations, so it depends on no random generator, on no
    seed and on no order of files: a class never moves from test to training between two runs.
    """
    return sorted(classes, key=lambda label: hashlib.sha256(repr(label).encode()).digest())
