"""Characters that training has seen, and others, are tested apart and in the share of the authors' code."""

from __future__ import annotations

import csv

import pytest
import reproduce
import seen_characters
from lightning.pytorch import Trainer
from test_reproduce import pytestmark, run

from lightning_imaml import IMAMLModule
from lightning_imaml.data import OmniglotDataModule

__all__ = ["pytestmark"]


@pytest.mark.parametrize(("seen", "unseen"), seen_characters.SETS.values(), ids=seen_characters.SETS)
def test_characters_come_from_the_splits_that_are_named(omniglot_root, seen, unseen):
    splits = OmniglotDataModule(omniglot_root, rotations=False).configure_splits()
    pool = seen_characters.SomeCharacters(omniglot_root, seen, unseen).configure_splits()["test"]
    assert len(set(pool.members) & set(splits["train"].members)) == seen
    assert len(set(pool.members) & set(splits["test"].members)) == unseen
    assert len(pool.members) == seen + unseen
    for split in ("train", "test"):
        for name in set(pool.members) & set(splits[split].members):
            assert pool.members[name].tolist() == splits[split].members[name].tolist()


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_every_set_is_tested_with_all_weights(omniglot_root, tmp_path, capsys):
    plans = [run(tmp_path / name, epochs=1, seed=seed) for seed, name in enumerate(("one", "two"))]
    for plan in plans:
        reproduce.reproduce(plan)
    weights = [plan.weights for plan in plans]
    assert weights[0].name != weights[1].name
    rows = seen_characters.main(
        [
            "--root",
            str(omniglot_root),
            "--ckpt_path",
            *map(str, weights),
            "--tasks",
            "8",
            "--output",
            str(tmp_path / "rows.csv"),
        ]
    )
    assert [(row["weights"], row["characters"]) for row in rows] == [
        (path.stem, name) for path in weights for name in seen_characters.SETS
    ]
    assert all((row["ways"], row["shots"], row["queries"], row["tasks"]) == (5, 1, 1, 8) for row in rows)
    trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    for path, row in zip(weights, rows[:: len(seen_characters.SETS)], strict=True):
        plain = OmniglotDataModule(omniglot_root, queries=1, test_tasks=8)
        (tested,) = trainer.test(IMAMLModule.load_from_checkpoint(path), plain, verbose=False)
        assert row["characters"] == "unseen"
        assert row["accuracy"] == pytest.approx(100 * tested["test/accuracy"], abs=1e-3)
    assert rows[0]["accuracy"] != rows[len(seen_characters.SETS)]["accuracy"], "the weights matter"
    with (tmp_path / "rows.csv").open() as file:
        assert [float(row["accuracy"]) for row in csv.DictReader(file)] == [row["accuracy"] for row in rows]
    assert f"{weights[1].stem}, authors' share: " in capsys.readouterr().out
