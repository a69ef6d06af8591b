"""Evaluation tasks as a file, so that several libraries can be compared on the very same tasks."""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_imaml.data.labelled import ClassPool
from lightning_imaml.data.sampling.tasks import ImageTasks, Shape

FORMAT = "few-shot episodes 1"


class ListedTasks(ImageTasks):
    """Tasks that were read from a file.

    Args:
        pool: the classes that the tasks are made of.
        listed: for each task, its shape and its items ``[N, K+Q]``.
    """

    def __init__(self, pool: ClassPool, listed: list[tuple[Shape, NDArray[np.int64]]]) -> None:
        super().__init__(pool)
        self.listed = listed

    def __len__(self) -> int:
        return len(self.listed)

    def shape(self, number: int) -> Shape:
        """The shape of a task."""
        return self.listed[number][0]

    def draw(self, task: int, shape: Shape) -> NDArray[np.int64]:
        """The items of one task, ``[N, K+Q]``."""
        return self.listed[task][1]


def write_episodes(path: Path, tasks: Mapping[str, tuple[ImageTasks, int]]) -> None:
    """Write the first tasks of some splits.

    Args:
        path: the JSON file. Its ``splits`` hold, by split, a list of tasks, each with ``classes`` (N names),
            ``support`` (N lists of K images) and ``query`` (N lists of Q images).
        tasks: for each split, where its tasks come from and how many to write.

    Raises:
        TypeError: the label of a class is neither a number nor a string.
    """
    splits = {}
    for split, (source, count) in tasks.items():
        owner = {int(item): label for label, items in source.pool.members.items() for item in items}
        names = source.pool.item_names()
        splits[split] = [_entry(source, task, owner, names) for task in range(count)]
    lines = [f'"{split}": [\n' + ",\n".join(map(json.dumps, entries)) + "\n]" for split, entries in splits.items()]
    path.write_text(f'{{"format": "{FORMAT}", "splits": {{\n' + ",\n".join(lines) + "\n}}\n", encoding="utf-8")


def _entry(source: ImageTasks, task: int, owner: Mapping[int, Hashable], names: list[str] | None) -> dict[str, Any]:
    shape = source.shape(task)
    items = source.draw(task, shape).tolist()
    classes = [owner[row[0]] for row in items]
    for label in classes:
        if not isinstance(label, int | str):
            raise TypeError(
                f"the labels of classes must be numbers or strings to be written; found {type(label).__name__}. "
                "Give the dataset a list `classes` of names."
            )
    named = items if names is None else [[names[item] for item in row] for row in items]
    return {
        "classes": classes,
        "support": [row[: shape.shots] for row in named],
        "query": [row[shape.shots :] for row in named],
    }


def read_episodes(path: Path, pools: Mapping[str, ClassPool]) -> dict[str, ListedTasks]:
    """Read the tasks of a file and find their images in the data.

    Args:
        path: a file of :func:`write_episodes`.
        pools: the classes of each split.

    Returns:
        The tasks of each split that the file holds.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not such a file, it holds tasks of another split than "val" and "test", or it names a class or
            an image that the data does not have.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']!r}")
        splits = dict(content["splits"])
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"episodes must be a file of save_episodes; found nothing at {str(path)!r}. Leave it out to draw the tasks."
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"episodes must be a JSON file of the format {FORMAT!r}; {str(path)!r} is not ({error}). Write it with "
            "save_episodes."
        ) from error
    evaluated = [split for split in pools if split != "train"]  # training never ends, a list does
    missing = [split for split in splits if split not in evaluated]
    if missing:
        raise ValueError(
            f"episodes must hold tasks of the evaluation splits that the data has ({', '.join(evaluated)}); found "
            f"{', '.join(missing)} in {str(path)!r}. Pass the data of that split, or leave it out of the file."
        )
    for split, entries in splits.items():
        if not isinstance(entries, list) or not entries:
            raise ValueError(
                f"episodes must hold a list of at least one task for a split; found {entries!r} for {split} in "
                f"{str(path)!r}. Leave the split out of the file to draw its tasks."
            )
    return {split: _listed(path, split, entries, pools[split]) for split, entries in splits.items()}


def _listed(path: Path, split: str, entries: list[dict[str, Any]], pool: ClassPool) -> ListedTasks:
    names = pool.item_names()
    members = {
        label: {(item if names is None else names[item]): item for item in items.tolist()}
        for label, items in pool.members.items()
    }
    listed = []
    for number, entry in enumerate(entries):
        try:
            rows = [
                [members[label][image] for image in [*support, *query]]
                for label, support, query in zip(entry["classes"], entry["support"], entry["query"], strict=True)
            ]
            items = np.asarray(rows, dtype=np.int64)  # refuses rows of different lengths
            shape = Shape(len(rows), len(entry["support"][0]), len(entry["query"][0]))
            if items.shape != (shape.ways, shape.shots + shape.queries) or len(np.unique(items)) < items.size:
                raise ValueError("classes with different numbers of images, or an image twice")
            if min(shape) < 1:
                raise ValueError("no support or no query images")
            if len(set(entry["classes"])) < shape.ways:
                raise ValueError("a class twice")
        except (KeyError, ValueError, TypeError, IndexError) as error:
            raise ValueError(
                f"each task in {str(path)!r} must name classes and images that the {split} split has, as many images "
                f"for each of its classes; found {error} in task {number}. Use the dataset that the file was written "
                "for, in the same version."
            ) from error
        listed.append((shape, items))
    return ListedTasks(pool, listed)
