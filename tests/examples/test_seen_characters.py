"""Characters that training has seen, and others, are tested apart and in the share of the authors' code."""

from __future__ import annotations

import csv

import pytest
import seen_characters
from lightning.pytorch import Trainer

from lightning_imaml import IMAMLModule
from lightning_imaml.data import GlyphDataModule, OmniglotDataModule
from lightning_imaml.inner import GradientDescent
from lightning_imaml.models import Conv4


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


def test_every_set_is_tested_with_every_weights(root, tmp_path, capsys):
    module = IMAMLModule(Conv4(5, filters=4), inner_solver=GradientDescent(lr=0.1, steps=1))
    trainer = Trainer(logger=False, max_steps=0, accelerator="cpu", enable_progress_bar=False)
    trainer.fit(module, GlyphDataModule(queries=1, tasks_per_batch=1, batches_per_epoch=1))
    weights = [tmp_path / f"{name}.ckpt" for name in ("one", "two")]
    for path in weights:
        trainer.save_checkpoint(path)
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
