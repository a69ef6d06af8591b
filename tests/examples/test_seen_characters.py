"""Characters that training has seen, and others, are tested apart and in the share of the authors' code."""

from __future__ import annotations

import csv

import pytest
import reproduce
import seen_characters
from test_reproduce import pytestmark, run

from lightning_imaml.data import OmniglotDataModule

__all__ = ["pytestmark"]


@pytest.fixture
def root(omniglot_root, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return omniglot_root


@pytest.mark.parametrize(("seen", "unseen"), seen_characters.SETS.values(), ids=seen_characters.SETS)
def test_characters_come_from_the_splits_that_are_named(root, seen, unseen):
    splits = OmniglotDataModule(root, rotations=False).configure_splits()
    pool = seen_characters.SomeCharacters(root, seen, unseen).configure_splits()["test"]
    assert len(set(pool.members) & set(splits["train"].members)) == seen
    assert len(set(pool.members) & set(splits["test"].members)) == unseen
    assert len(pool.members) == seen + unseen
    for split in ("train", "test"):
        for name in set(pool.members) & set(splits[split].members):
            assert pool.members[name].tolist() == splits[split].members[name].tolist()


def test_the_shares_are_those_of_the_authors_code():
    assert seen_characters.SETS["authors' share"] == (310, 423 - 310)


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_every_set_is_tested_with_every_weights(root, tmp_path, capsys):
    plans = [run(tmp_path / name, epochs=1) for name in ("one", "two")]
    for plan in plans:
        reproduce.reproduce(plan)
    weights = [plan.weights.rename(tmp_path / f"{plan.output.parent.name}.ckpt") for plan in plans]
    rows = seen_characters.main(
        ["--root", str(root), "--ckpt_path", *map(str, weights), "--tasks", "8", "--output", str(tmp_path / "rows.csv")]
    )
    assert [(row["weights"], row["characters"]) for row in rows] == [
        (path.stem, name) for path in weights for name in seen_characters.SETS
    ]
    of_each = [[row["accuracy"] for row in rows if row["weights"] == path.stem] for path in weights]
    assert of_each[0] == of_each[1]  # The same weights and the same tasks.
    assert all(0 <= row["accuracy"] <= 100 and row["tasks"] == 8 for row in rows)
    with (tmp_path / "rows.csv").open() as file:
        assert [float(row["accuracy"]) for row in csv.DictReader(file)] == [row["accuracy"] for row in rows]
    assert "310 + 113 characters" in capsys.readouterr().out
