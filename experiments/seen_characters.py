"""Accuracy on characters of Omniglot that a network has seen in training, on others, and on the authors' mixture.

Of the 423 test characters in the code that the iMAML authors released, 310 are in its training split as well. So
weights that were trained on this package's split are tested here three times: on the 323 characters of its test split,
on as many of its training split, and on 113 of the former with 310 of the latter.

    python experiments/seen_characters.py --root PATH --ckpt_path FILE
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch
from _tables import Row, save
from lightning.pytorch import Trainer

from lightning_imaml import IMAMLModule
from lightning_imaml.data import ClassPool, OmniglotDataModule

SETS = {"unseen": (0, 323), "seen": (323, 0), "authors' share": (310, 113)}
"""By name: how many characters of the training split and how many of the test split."""


class SomeCharacters(OmniglotDataModule):
    """Test tasks of some characters of the training split and some of the test split, in one pool and none turned."""

    def __init__(self, root: Path, seen: int, unseen: int, **options: int) -> None:
        super().__init__(root, **options)
        self.seen, self.unseen = seen, unseen

    def configure_splits(self) -> Mapping[str, ClassPool]:
        """One split, for test."""
        splits = super().configure_splits()
        train, test = splits["train"], splits["test"]
        members = dict([*train.members.items()][: self.seen] + [*test.members.items()][: self.unseen])
        return {"test": ClassPool(train.source, members, named=True)}


def main(args: list[str] | None = None) -> list[Row]:
    """Test on each set of characters; print the accuracies and save them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="the folder of the data")
    parser.add_argument("--ckpt_path", type=Path, nargs="+", required=True, help="weights that reproduce.py published")
    parser.add_argument("--queries", type=int, default=1, help="a class; the papers have one")
    parser.add_argument("--tasks", type=int, default=2000)
    parser.add_argument("--output", type=Path, default=Path("results/seen_characters.csv"))
    options = parser.parse_args(args)

    trainer = Trainer(devices=1, logger=False, enable_checkpointing=False)
    rows: list[Row] = []
    for path in options.ckpt_path:
        # Once for all sets: a module that is loaded again is compiled again.
        module = IMAMLModule.load_from_checkpoint(path, map_location="cpu")
        shape = torch.load(path, weights_only=True)["lightning_imaml"]["data"] | {"queries": options.queries}
        for name, (seen, unseen) in SETS.items():
            data = SomeCharacters(options.root, seen, unseen, test_tasks=options.tasks, **shape)
            (tested,) = trainer.test(module, datamodule=data, verbose=False)
            row: Row = {"weights": path.stem, **shape, "tasks": options.tasks}
            row |= {"characters": name, "seen": seen, "unseen": unseen}
            row |= {key: round(100 * tested[f"test/{key}"], 4) for key in ("accuracy", "accuracy_interval95")}
            print("{weights}, {characters}: {accuracy:.2f} ± {accuracy_interval95:.2f} %".format(**row))
            rows.append(row)
    save(rows, options.output)
    return rows


if __name__ == "__main__":
    main()
