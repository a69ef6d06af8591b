"""Checkpoints as files: whole or not there, free of code, and what they restore."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from interrupted_runs import data, each_step, module, trainer, weights
from torch import nn

from lightning_imaml import IMAMLModule
from lightning_imaml.checkpoints import AtomicCheckpointIO


@pytest.mark.parametrize("fails", ["write", "sync", "rename"])
def test_a_failed_write_leaves_earlier_checkpoints_and_no_part(tmp_path, monkeypatch, fails):
    saver, target = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    saver.save_checkpoint({"step": 1}, target)
    saver.save_checkpoint({"step": 0}, tmp_path / "first.ckpt")

    def full(*args):
        if fails == "write":
            args[1].write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    owner, name = {"write": (torch, "save"), "sync": (os, "fsync"), "rename": (Path, "replace")}[fails]
    monkeypatch.setattr(owner, name, full)
    with pytest.raises(OSError, match=r"must have room for it; found that .*last\.ckpt cannot be written .*No space"):
        saver.save_checkpoint({"step": 2}, target)
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first.ckpt", "last.ckpt"]
    assert torch.load(target) == {"step": 1}


def test_what_a_killed_process_left_is_removed_an_hour_later(tmp_path):
    ours, fresh = (tmp_path / f".last.ckpt.{digit * 32}.part" for digit in "ab")
    foreign = tmp_path / ".notes.part"
    for path in (ours, fresh, foreign):
        path.write_text("torn")
    for path in (ours, foreign):
        os.utime(path, (0, 0))
    AtomicCheckpointIO().save_checkpoint({}, tmp_path / "last.ckpt")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([fresh.name, foreign.name, "last.ckpt"])


def test_the_renaming_is_brought_to_the_disk(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(Path(f"/proc/self/fd/{descriptor}").readlink()))
    AtomicCheckpointIO().save_checkpoint({}, tmp_path / "last.ckpt")
    assert synced[0].name.endswith(".part")
    assert synced[1:] == [tmp_path]


@pytest.mark.filterwarnings("ignore:.*Using ModelCheckpoint with manual", "ignore:Checkpoint directory .* is not empty")
def test_our_checkpoints_are_moved_within_their_folder(tmp_path, monkeypatch):
    """So never copied from one file system to another; Lightning's own way goes through the temporary folder."""
    moved = []
    replace = Path.replace
    monkeypatch.setattr(
        Path, "replace", lambda self, to: (moved.append((self.parent, to.parent)), replace(self, to))[1]
    )
    run = trainer(tmp_path, each_step(tmp_path), plugins=[AtomicCheckpointIO()], max_steps=1)
    run.fit(module(), datamodule=data())
    assert moved
    assert all(source == target == tmp_path for source, target in moved)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        AtomicCheckpointIO().save_checkpoint({}, tmp_path / "file" / "model.ckpt")


def test_options_that_are_not_used_are_refused(tmp_path):
    with pytest.raises(TypeError, match="`storage_options` arg is not supported for `AtomicCheckpointIO`"):
        AtomicCheckpointIO().save_checkpoint({}, tmp_path / "last.ckpt", storage_options={"anon": True})


def test_a_checkpoint_restores_settings_without_unpickling_code(tmp_path):
    model = module(gradient_clip_val=1.0, on_bad_task="skip", solve_precision="trainer", regularizer_lr=0.1)
    run = trainer(tmp_path, max_steps=1)
    run.fit(model, datamodule=data())
    run.save_checkpoint(tmp_path / "model.ckpt")
    network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.0), nn.Linear(4, 2))
    loaded = IMAMLModule.load_from_checkpoint(tmp_path / "model.ckpt", backbone=network, weights_only=True)
    torch.testing.assert_close(weights(loaded), weights(model), rtol=0, atol=0)
    for name in ("inner_solver", "estimator", "regularizer", "gradient_clip_val", "on_bad_task", "solve_precision"):
        assert getattr(loaded, name) == getattr(model, name), name
    assert loaded.regularizer_lr == 0.1
