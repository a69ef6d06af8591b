"""Labelled data: which items of a dataset belong to which class."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset
from torchvision.transforms.functional import pil_to_tensor

from lightning_imaml.data.items import Collate, Key, KeyedItems, batch_of, first_of, label_of


class LabelledTensors(TensorDataset):
    """Images held in memory with their labels and the names of their classes.

    A batch of tasks is gathered from it by one indexing operation. Images are kept as bytes, four times smaller than
    floats, and become ``float32`` in [0, 1] when they are fetched.

    Args:
        images: ``[n, C, H, W]``, ``uint8``.
        labels: ``[n]``, integers in ``0 … len(classes)-1``.
        classes: the name of each class.
        items: the name of each image, such as that of its file; None where images have no names.

    Raises:
        TypeError: the images are not ``uint8``.
        ValueError: the lengths disagree, or a label has no name.
    """

    def __init__(
        self, images: Tensor, labels: Tensor, classes: Sequence[str], items: Sequence[str] | None = None
    ) -> None:
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
        if items is not None and len(items) != len(images):
            raise ValueError(f"items must be {len(images)} names, one for each image; found {len(items)}.")
        super().__init__(images, labels)
        self.classes = list(classes)
        self.items = None if items is None else list(items)

    def __getitem__(self, index: Any) -> tuple[Tensor, ...]:
        """Return one image (or several, for a tensor of indices) as ``float32`` in [0, 1], with its label."""
        images, labels = self.tensors
        return images[index].to(torch.float32).div_(255), labels[index]


class TransformedImages(Dataset[Any]):
    """The items of a dataset of n as they are, then all of them under each of k transforms: (1 + k) n items.

    Args:
        source: a map-style dataset of ``(input, label)`` pairs whose inputs are tensors.
        transforms: by name, functions of inputs ``[m, ...]`` that keep their shape.
    """

    def __init__(self, source: Dataset[Any], transforms: Mapping[str, Callable[[Tensor], Tensor]]) -> None:
        self.source, self.transforms = source, dict(transforms)
        self.length: int = len(source)  # type: ignore[arg-type]

    def __len__(self) -> int:
        return (1 + len(self.transforms)) * self.length

    def fetch(self, indices: Tensor) -> Any:
        """The inputs ``[m, ...]`` of these items."""
        inputs = gather(self.source, indices % self.length)
        if not isinstance(inputs, Tensor):
            raise ValueError(
                f"rotations and class_transforms need inputs that are one tensor; found {type(inputs).__name__}. Leave "
                "them out."
            )
        for number, (name, transform) in enumerate(self.transforms.items(), start=1):
            chosen = indices // self.length == number
            if chosen.any():
                changed = transform(inputs[chosen])
                if changed.shape != inputs[chosen].shape:
                    raise ValueError(
                        f"class_transforms must keep the shape of their inputs [n, ...]; found that {name!r} makes "
                        f"{list(changed.shape)} of {list(inputs[chosen].shape)}. Resize or crop all classes alike."
                    )
                inputs[chosen] = changed
        return inputs


def turned(images: Tensor, turns: int) -> Tensor:
    """Images ``[n, C, S, S]`` turned anticlockwise, ``turns`` times by 90 degrees."""
    if images.ndim != 4 or images.shape[-2] != images.shape[-1]:
        raise ValueError(
            f"rotations need square images [C, S, S]; found {list(images.shape[1:])}. Crop the images, or leave "
            "rotations out."
        )
    return torch.rot90(images, turns, dims=(-2, -1))


ROTATIONS = {f"rot{90 * turns}": partial(turned, turns=turns) for turns in (1, 2, 3)}
"""The transforms whose classes ``rotations`` adds."""


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
    def of(
        cls,
        source: Dataset[Any],
        input_key: Key | Sequence[Key] | None = None,
        target_key: Key | None = None,
        collate: Collate | None = None,
    ) -> ClassPool:
        """Group the items of a dataset by class, in the order of first appearance.

        Classes go by their names where the dataset has them: ``classes``, as torchvision's datasets do, or the
        ``ClassLabel`` of a Hugging Face dataset.

        Args:
            source: a map-style dataset; without keys, of ``(input, label)`` pairs.
            input_key: the input's part of an item, or several; see :class:`EpisodicDataModule`.
            target_key: the label's part of an item.
            collate: makes a batch of inputs.
        """
        labels = named_labels(source, target_key)
        if (input_key, target_key, collate) != (None, None, None):
            source = KeyedItems(source, labels, input_key, collate)
        groups: dict[Hashable, list[int]] = {}
        for index, label in enumerate(labels):
            groups.setdefault(label, []).append(index)
        members = {label: np.asarray(indices, dtype=np.int64) for label, indices in groups.items()}
        return cls(source, members, named=all(isinstance(label, str) for label in members))

    def subset(self, classes: Sequence[Hashable]) -> ClassPool:
        """Keep these classes only, in this order."""
        return ClassPool(self.source, {label: self.members[label] for label in classes}, self.named)

    def in_memory(self) -> ClassPool:
        """The same classes, with every item of the source read once and kept as bytes.

        Raises:
            TypeError: an input is neither a PIL image nor a ``uint8`` tensor ``[C, H, W]``.
            ValueError: the images differ in size or channels.
        """
        images = torch.empty(0, dtype=torch.uint8)
        for index in range(len(self.source)):  # type: ignore[arg-type]
            image = _as_bytes(self.source[index][0])
            if index == 0:
                images = torch.empty((len(self.source), *image.shape), dtype=torch.uint8)  # type: ignore[arg-type]
            if image.shape != images.shape[1:]:
                raise ValueError(
                    f"in_memory needs images of one size and number of channels; found {list(images.shape[1:])} for "
                    f"item 0 and {list(image.shape)} for item {index}. Add Resize, and Grayscale or RGB, to the "
                    "dataset's transform."
                )
            images[index] = image
        labels = torch.zeros(len(images), dtype=torch.long)
        for label, items in enumerate(self.members.values()):
            labels[items] = label
        source = LabelledTensors(images, labels, list(map(str, self.members)), self.item_names())
        return ClassPool(source, self.members, self.named)

    def with_transformed(self, transforms: Mapping[str, Callable[[Tensor], Tensor]]) -> ClassPool:
        """These classes, and each of them under each transform as a class of its own, ``<class>/<transform>``."""
        source = TransformedImages(self.source, transforms)
        members = dict(self.members)
        for number, name in enumerate(transforms, start=1):
            members |= {f"{label}/{name}": items + number * source.length for label, items in self.members.items()}
        return ClassPool(source, members, self.named)

    def item_names(self) -> list[str] | None:
        """The name of every item of the source, or None where it has none."""
        names = getattr(self.source, "items", None)
        # Many a dataset has a list ``items`` of something else.
        usable = isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)
        return list(names) if usable and len(set(names)) == len(names) == len(self.source) else None  # type: ignore

    def overlap(self, other: ClassPool) -> list[Hashable]:
        """The classes that both pools hold, as far as that can be told."""
        comparable = _whole(self.source) is _whole(other.source) or (self.named and other.named)
        return [label for label in self.members if label in other.members] if comparable else []


def _whole(source: Any) -> Any:
    """The dataset that a subset is of: labels that are numbers mean the same in all its subsets."""
    while isinstance(source, Subset | KeyedItems):
        source = source.dataset if isinstance(source, Subset) else source.source
    return source


def named_labels(source: Any, target_key: Key | None = None) -> list[Any]:
    """The class of every item of a dataset, by name where the dataset has names.

    The parts of a ``ConcatDataset`` each have their own names for the same numbers.
    """
    if isinstance(source, ConcatDataset):
        return [label for part in source.datasets for label in named_labels(part, target_key)]
    if isinstance(source, Subset):
        inner = named_labels(source.dataset, target_key)
        return [inner[index] for index in source.indices]
    labels, names = read_labels(source, target_key), class_names(source, target_key)
    if names and all(isinstance(label, int) and 0 <= label < len(names) for label in set(labels)):
        return [names[label] for label in labels]
    return labels


def read_labels(source: Dataset[Any], target_key: Key | None = None) -> list[Any]:
    """Find the label of every item of a dataset.

    Looks for the column ``target_key``, as Hugging Face's datasets have them; without a key for ``targets`` or
    ``labels``, as torchvision's have them, or the second tensor of a ``TensorDataset``. Only without these is every
    item read, once.

    Raises:
        TypeError: the dataset has no length, its items are no pairs, or a label cannot be the key of a class.
        ValueError: an item has no part ``target_key``.
    """
    if isinstance(source, Mapping):
        raise TypeError(
            f"a dataset of episodes must be one dataset; found {type(source).__name__} with the keys {list(source)}. "
            "Pass one of its datasets."
        )
    if not hasattr(source, "__len__") or not hasattr(source, "__getitem__"):
        raise TypeError(
            f"a dataset of episodes must be map-style, with __len__ and __getitem__; found {type(source).__name__}. "
            "Read an iterable dataset into a list of (input, label) pairs first."
        )
    found = _stored_labels(source, target_key)
    if found is None:
        found = [label_of(source[index], target_key, source) for index in range(len(source))]
    listed = found.tolist() if isinstance(found, Tensor | np.ndarray) else found
    labels = [label.item() if isinstance(label, Tensor | np.generic) and label.ndim == 0 else label for label in listed]
    for label in labels:
        if not isinstance(label, Hashable) or isinstance(label, Tensor):
            raise TypeError(
                f"labels must be one number or string an item; found {type(label).__name__} in "
                f"{type(source).__name__}. Give each item the one class that it shows."
            )
    return labels


def _stored_labels(source: Any, target_key: Key | None) -> Any:
    """The labels that a dataset holds beside its items, or None."""
    if isinstance(source, TensorDataset):
        return label_of(source.tensors, target_key, source)
    if target_key is not None:
        if target_key not in (getattr(source, "column_names", None) or ()):
            return None
        # Without the transforms of a Hugging Face dataset, which may want the other columns, too.
        plain = source.with_format(None) if hasattr(source, "with_format") else source
        return list(plain[target_key])
    for attribute in ("targets", "labels"):
        found = getattr(source, attribute, None)
        if isinstance(found, Tensor | np.ndarray | list | tuple) and len(found) == len(source):
            return found
    return None


def class_names(source: Any, target_key: Key | None = None) -> list[str]:
    """The names of a dataset's classes, by label, or an empty list."""
    names = getattr(source, "classes", None)
    if target_key is not None:
        # Of a Hugging Face dataset's ClassLabel.
        features = getattr(source, "features", None)
        names = getattr(features.get(target_key), "names", None) if isinstance(features, Mapping) else None
    usable = isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)
    return list(names) if usable and len(set(names)) == len(names) else []  # type: ignore[arg-type]


def gather(source: Any, indices: Tensor) -> Any:
    """Fetch the inputs of these items, stacked along a new first dimension.

    Args:
        source: a map-style dataset of ``(input, label)`` pairs.
        indices: ``[n]``.

    Returns:
        A tensor ``[n, ...]``, or the dict, list or tuple of such tensors that the inputs are made of.

    Raises:
        TypeError: the items have no first part.
        ValueError: the inputs cannot be stacked.
    """
    if isinstance(source, TensorDataset):
        return source[indices][0]
    if isinstance(source, TransformedImages):
        return source.fetch(indices)
    if isinstance(source, KeyedItems):
        inputs = [source[index][0] for index in indices.tolist()]
        return batch_of(inputs, source.collate, source.source)
    return batch_of([first_of(source[index], source) for index in indices.tolist()], None, source)


def _as_bytes(image: Any) -> Tensor:
    """An image as a ``uint8`` tensor ``[C, H, W]``."""
    image = pil_to_tensor(image) if isinstance(image, Image.Image) else image
    if not isinstance(image, Tensor) or image.dtype != torch.uint8 or image.ndim != 3:
        found = f"{image.dtype} {list(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
        raise TypeError(
            f"in_memory keeps images as bytes, so each must be a PIL image or a uint8 tensor [C, H, W]; found {found}. "
            "Leave ToTensor and normalisation out of the dataset's transform; give those to `transform`."
        )
    return image


def shuffle_classes(classes: Sequence[Hashable]) -> list[Hashable]:
    """Put classes into an order that has nothing to do with their meaning and never changes.

    The order is that of the SHA-256 digests of their representations, so it depends on no random generator, on no
    seed and on no order of files: a class never moves from test to training between two runs.
    """
    return sorted(classes, key=lambda label: hashlib.sha256(repr(label).encode()).digest())
