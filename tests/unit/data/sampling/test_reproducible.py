"""The same tasks, hash for hash: on any number of workers and processes, and after a resume in the middle of an epoch.

All that could upset it is on: ways, shots and queries from ranges, rotated classes, images kept as bytes.
"""

from __future__ import annotations

import hashlib

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from lightning_imaml.data import EpisodicDataModule, LabelledTensors

STEPS, EPOCH = 13, 5


def episodes(**options):
    count = 40 * 8
    pixels = (torch.arange(count * 16) * 7919).remainder(256).to(torch.uint8).view(count, 1, 4, 4)
    data = LabelledTensors(pixels, torch.arange(count) % 40, [f"class {k}" for k in range(40)])
    settings = {
        "ways": (2, 5),
        "shots": (1, 3),
        "queries": (1, 4),
        "rotations": True,
        "tasks_per_batch": 4,
        "batches_per_epoch": EPOCH,
        "val_tasks": 24,
        "test_tasks": 30,
        "seed": 11,
    }
    return EpisodicDataModule(data, **{**settings, **options})


def hashes(episode):
    """One digest a task, of everything in it."""
    return [
        hashlib.sha256(
            b"".join(bytes(str(list(part.shape)), "ascii") + part.numpy().tobytes() for part in task)
        ).hexdigest()
        for task in zip(*episode, strict=True)
    ]


class Recorder(LightningModule):
    """Keeps the digests of the tasks that it is given."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.weight = nn.Parameter(torch.zeros(1))
        self.seen = {"train": [], "val": [], "test": []}

    def training_step(self, batch, batch_idx):
        self.seen["train"].append(hashes(batch))
        self.optimizers().step()

    def validation_step(self, batch, batch_idx):
        self.seen["val"].append(hashes(batch))

    def test_step(self, batch, batch_idx):
        self.seen["test"].append(hashes(batch))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class WriteSeen(Callback):
    """Each process leaves what it saw in a file of its own."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_end(self, trainer, module):
        torch.save(module.seen, self.folder / f"rank{trainer.global_rank}.pt")


def trainer(folder, *callbacks, **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    settings = {"max_steps": STEPS, "num_sanity_val_steps": 0, "enable_checkpointing": False, **quiet, **options}
    return Trainer(default_root_dir=folder, callbacks=list(callbacks), **settings)


def run(folder, **options):
    module, data = Recorder(), episodes(**options)
    runner = trainer(folder)
    runner.fit(module, datamodule=data)
    runner.test(module, datamodule=data, verbose=False)
    return module.seen


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return run(tmp_path_factory.mktemp("reference"))


def flat(batches):
    return [task for batch in batches for task in batch]


def test_the_list_is_of_different_tasks(reference):
    assert len(reference["train"]) == STEPS
    assert len(set(flat(reference["train"]))) == STEPS * 4
    per_pass = len(reference["val"]) // (STEPS // EPOCH)
    assert len(set(flat(reference["val"]))) == 24
    assert reference["val"][:per_pass] == reference["val"][per_pass:]
    assert len(set(flat(reference["test"]))) == 30


def test_the_list_is_the_same_for_ever(reference):
    """Pinned digests: a change here breaks the reproducibility of published results."""
    lists = {stage: "".join(flat(tasks)).encode() for stage, tasks in reference.items()}
    digests = {stage: hashlib.sha256(tasks).hexdigest()[:16] for stage, tasks in lists.items()}
    assert digests == PINNED


@pytest.mark.parametrize("workers", [1, 2])
def test_with_loader_workers(tmp_path, reference, workers):
    assert run(tmp_path, num_workers=workers) == reference


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [3, 7])
def test_after_a_resume_in_the_middle_of_an_epoch(tmp_path, reference, stop, workers):
    assert stop % EPOCH
    first, second = Recorder(), Recorder()
    interrupted = trainer(tmp_path, max_steps=stop)
    interrupted.fit(first, datamodule=episodes(num_workers=workers))
    interrupted.save_checkpoint(tmp_path / "stop.ckpt")
    trainer(tmp_path).fit(second, datamodule=episodes(num_workers=workers), ckpt_path=tmp_path / "stop.ckpt")
    assert first.seen["train"] + second.seen["train"] == reference["train"]


@pytest.mark.parametrize("workers", [0, 1])
def test_on_two_processes(tmp_path, reference, workers):
    """Under real DDP over gloo: the two processes together see what one sees."""
    module, data = Recorder(), episodes(tasks_per_batch=2, eval_tasks_per_batch=4, num_workers=workers)
    trainer(tmp_path, WriteSeen(tmp_path), strategy="ddp_fork", devices=2).fit(module, datamodule=data)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    assert [a + b for a, b in zip(first["train"], second["train"], strict=True)] == reference["train"]
    assert len(first["val"]) == len(second["val"])
    assert sorted(flat(first["val"] + second["val"])) == sorted(flat(reference["val"]))


PINNED = {"train": "4f5f7a5fd5e729ad", "val": "0b0a20251645a5d1", "test": "8116795c11cb410d"}
