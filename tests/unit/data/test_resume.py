"""Training sees each task once: across epochs, resumes and processes, under a real Trainer."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import TensorDataset

from lightning_imaml.data.episodic import EpisodicDataModule

# Lightning 2.6 uses a name that torch 2.14 has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")


class Recorder(LightningModule):
    """Notes which batches it is given: item i of the data is the number i, so a batch is a list of items."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.weight = nn.Parameter(torch.zeros(1))
        self.seen = {"train": [], "val": [], "test": [], "predict": []}
        self.fail_at = None

    def note(self, stage, batch):
        self.seen[stage].append(tuple(batch.query_inputs.flatten().tolist()))

    def training_step(self, batch, batch_idx):
        if self.fail_at == len(self.seen["train"]):
            raise KeyboardInterrupt
        self.note("train", batch)
        self.optimizers().step()

    def validation_step(self, batch, batch_idx):
        self.note("val", batch)

    def test_step(self, batch, batch_idx):
        self.note("test", batch)

    def predict_step(self, batch, batch_idx):
        self.note("predict", batch)
        return batch_idx

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def episodes(**options):
    data = TensorDataset(torch.arange(400.0), torch.arange(400) % 40)
    settings = {"ways": 3, "queries": 2, "tasks_per_batch": 2, "batches_per_epoch": 5, "val_tasks": 6, "test_tasks": 7}
    return EpisodicDataModule(data, **{**settings, **options})


def trainer(tmp_path, *callbacks, **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    if not any(isinstance(callback, ModelCheckpoint) for callback in callbacks):
        quiet["enable_checkpointing"] = False
    return Trainer(default_root_dir=tmp_path, callbacks=list(callbacks), **{**quiet, **options})


def uninterrupted(tmp_path, steps, **options):
    module = Recorder()
    trainer(tmp_path, max_steps=steps).fit(module, datamodule=episodes(**options))
    return module.seen["train"]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    return uninterrupted(tmp_path_factory.mktemp("whole"), 17)


def test_training_never_repeats_a_batch(whole_run):
    assert len(whole_run) == len(set(whole_run)) == 17


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [3, 5, 8])
def test_resume_goes_on_where_the_run_stopped(tmp_path, whole_run, stop, workers):
    first, second = Recorder(), Recorder()
    interrupted = trainer(tmp_path, max_steps=stop)
    interrupted.fit(first, datamodule=episodes(num_workers=workers))
    interrupted.save_checkpoint(tmp_path / "stop.ckpt")
    trainer(tmp_path, max_steps=17).fit(
        second, datamodule=episodes(num_workers=workers), ckpt_path=tmp_path / "stop.ckpt"
    )
    assert first.seen["train"] + second.seen["train"] == whole_run


@pytest.mark.filterwarnings(
    "ignore:Using ModelCheckpoint with manual optimization:UserWarning",
    "ignore:Be aware that when using `ckpt_path`:UserWarning",
)
def test_resume_from_a_checkpoint_saved_while_training(tmp_path, whole_run):
    first, second = Recorder(), Recorder()
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=7, save_top_k=-1)
    trainer(tmp_path, saver, max_steps=9).fit(first, datamodule=episodes())
    trainer(tmp_path, max_steps=17).fit(second, datamodule=episodes(), ckpt_path=tmp_path / "step=7.ckpt")
    assert first.seen["train"][:7] + second.seen["train"] == whole_run


class SaveOnError(Callback):
    def __init__(self, path):
        self.path = path

    def on_exception(self, trainer, module, exception):
        trainer.save_checkpoint(self.path)


def test_a_batch_that_failed_halfway_is_run_again(tmp_path, whole_run):
    first, second = Recorder(), Recorder()
    first.fail_at = 6
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        trainer(tmp_path, SaveOnError(tmp_path / "error.ckpt"), max_steps=17).fit(first, datamodule=episodes())
    trainer(tmp_path, max_steps=17).fit(second, datamodule=episodes(), ckpt_path=tmp_path / "error.ckpt")
    assert first.seen["train"] + second.seen["train"] == whole_run


def test_resume_twice(tmp_path, whole_run):
    seen = []
    for begin, end in ((0, 4), (4, 11), (11, 17)):
        module = Recorder()
        part = trainer(tmp_path, max_steps=end)
        part.fit(module, datamodule=episodes(), ckpt_path=tmp_path / f"{begin}.ckpt" if begin else None)
        part.save_checkpoint(tmp_path / f"{end}.ckpt")
        seen += module.seen["train"]
    assert seen == whole_run


def test_a_reloaded_loader_and_a_second_fit_go_on(tmp_path, whole_run):
    module, data = Recorder(), episodes()
    fitter = trainer(tmp_path, max_epochs=2, reload_dataloaders_every_n_epochs=1)
    fitter.fit(module, datamodule=data)
    fitter.fit_loop.max_epochs = 3
    fitter.fit(module, datamodule=data)
    assert module.seen["train"] == whole_run[:15]


def test_evaluation_sees_the_same_tasks_each_time(tmp_path):
    module, data = Recorder(), episodes(eval_tasks_per_batch=4)
    runner = trainer(tmp_path, max_epochs=2, num_sanity_val_steps=0)
    runner.fit(module, datamodule=data)
    first, second = module.seen["val"][:2], module.seen["val"][2:]
    assert first == second
    runner.test(module, datamodule=data, verbose=False)
    runner.predict(module, datamodule=data, return_predictions=False)
    assert module.seen["test"] == module.seen["predict"]
    assert sum(map(len, module.seen["test"])) == 7 * 3 * 2


def test_overfit_batches_repeats_the_first_batches(tmp_path, whole_run):
    module = Recorder()
    runner = trainer(tmp_path, max_epochs=2, overfit_batches=2, limit_val_batches=0)
    with pytest.warns(UserWarning, match="requested to overfit"):
        runner.fit(module, datamodule=episodes())
    assert module.seen["train"] == whole_run[:2] * 2


def test_training_without_validation_classes(tmp_path):
    module = Recorder()
    with pytest.warns(UserWarning, match="Total length of `list`"):
        trainer(tmp_path, max_steps=2).fit(module, datamodule=episodes(class_split=(0.8, 0.0, 0.2)))
    assert len(module.seen["train"]) == 2
    assert not module.seen["val"]


class WriteSeen(Callback):
    """Each process leaves what it saw in a file of its own."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_end(self, trainer, module):
        module.sampler = type(trainer.train_dataloader.sampler).__name__
        torch.save((module.sampler, module.seen), self.folder / f"rank{trainer.global_rank}.pt")


def test_two_processes_draw_the_batch_of_one(tmp_path, whole_run):
    """Under real DDP: Lightning leaves the samplers alone, and the ranks' tasks make up one process's batches."""
    writer = WriteSeen(tmp_path)
    options = {"strategy": "ddp_fork", "devices": 2, "max_steps": 7, "num_sanity_val_steps": 0}
    module, data = Recorder(), episodes(tasks_per_batch=1, val_tasks=3)
    trainer(tmp_path, writer, **options).fit(module, datamodule=data)
    (sampler, first), (_, second) = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    assert sampler == "EndlessSampler"
    assert [a + b for a, b in zip(first["train"], second["train"], strict=True)] == whole_run[:7]
    # Three tasks on two ranks: as many batches on each, and each task once.
    assert len(first["val"]) == len(second["val"])
    alone = Recorder()
    trainer(tmp_path).validate(alone, datamodule=episodes(tasks_per_batch=1, val_tasks=3), verbose=False)
    items = sorted(item for batch in first["val"] + second["val"] for item in batch)
    assert items == sorted(item for batch in alone.seen["val"] for item in batch)
