"""Which classes of a dataset are for training, validation and test: files with the columns ``class,split``."""

from __future__ import annotations

import csv
from collections.abc import Hashable, Sequence
from importlib.resources import files
from pathlib import Path

from lightning_imaml.data.sampling import SPLITS

ClassSplit = dict[str, list[str]]
"""The names of the classes of "train", "val" and "test"."""


def shipped_split(name: str) -> ClassSplit:
    """A split of the literature, from a file of this package that names its source."""
    resource = files("lightning_imaml.data.datasets") / "splits" / f"{name}.csv"
    return parse_split(resource.read_text(encoding="utf-8"), str(resource))


def read_split(path: Path) -> ClassSplit:
    """Read a split from a CSV file with a header line ``class,split``; lines that begin with # are comments.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not such a file, or a class is in two splits.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"split_file must be a CSV file with the columns class,split; found nothing at {str(path)!r}."
        )
    try:
        text = path.read_text(encoding="utf-8-sig")  # spreadsheets write a byte order mark
    except UnicodeDecodeError as error:
        raise ValueError(
            f"split_file must be encoded in UTF-8; {str(path)!r} is not ({error}). Save it as UTF-8."
        ) from error
    return parse_split(text, str(path))


def parse_split(text: str, origin: str) -> ClassSplit:
    """Read a split from the text of such a file."""
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    rows = list(csv.DictReader(lines))
    split: ClassSplit = {name: [] for name in SPLITS}
    owners: dict[str, str] = {}
    for row in rows:
        label, part = row.get("class"), row.get("split")
        if label is None or part not in SPLITS:
            raise ValueError(
                f"{origin!r} must have the columns class,split with train, val or test as split; found {row}."
            )
        if owners.setdefault(label, part) != part or label in split[part]:
            raise ValueError(
                f"{origin!r} must name each class once; found {label!r} in {owners[label]} and in {part}. Keep one."
            )
        split[part].append(label)
    if not rows:
        raise ValueError(f"{origin!r} must have the columns class,split and a line for each class; found no line.")
    return {name: labels for name, labels in split.items() if labels}


def require_same_classes(what: str, expected: Sequence[str], found: Sequence[Hashable], remedy: str) -> None:
    """Raise a ValueError unless the data has exactly the classes of a split."""
    missing = [label for label in expected if label not in set(found)]
    unknown = [label for label in found if label not in set(expected)]
    if missing or unknown:
        words = [
            f"{len(some)} {kind}, such as {some[0]!r}"
            for kind, some in (("missing", missing), ("unknown", unknown))
            if some
        ]
        raise ValueError(
            f"{what} must have exactly the {len(expected)} classes of its split; found {' and '.join(words)}. {remedy}"
        )
