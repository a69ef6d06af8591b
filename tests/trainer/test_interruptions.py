"""Whatever stops a run, it goes on from its last checkpoint to the weights of an uninterrupted run, bit for bit."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from interrupted_runs import data, each_step, module, trainer, weights
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_imaml import IMAMLModule
from lightning_imaml.checkpoints import AtomicCheckpointIO

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*Using ModelCheckpoint with manual optimization",
    "ignore:.*The dirpath has changed",
    "ignore:Checkpoint directory .* exists and is not empty",
    "ignore:Be aware that when using `ckpt_path`",
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Tensor:
    model = module()
    trainer(tmp_path_factory.mktemp("whole")).fit(model, datamodule=data())
    return weights(model)


KILLED = """
import os, random, signal, sys
from pathlib import Path
import torch
from interrupted_runs import data, each_step, module, trainer, weights

def one_life(folder, kill_at, instant):
    '''A run that resumes, and kills itself at a step: in the training step, or while it writes its checkpoint.'''
    torch.set_num_threads(1)
    model, saver = module(), each_step(folder)
    run = trainer(folder, saver)
    def kill(*args, **kwargs):
        if run.global_step >= kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
    if instant == "step":
        step = model.training_step
        model.training_step = lambda *args: (kill(), step(*args))[1]
    elif instant == "optimizer":
        clip = model.on_before_optimizer_step
        model.on_before_optimizer_step = lambda *args: (kill(), clip(*args))[1]
    else:
        import lightning.fabric.plugins.io.torch_io as io
        save = io._atomic_save
        def torn(checkpoint, path):
            if run.global_step >= kill_at:
                import fsspec.implementations.local as local
                local.LocalFileOpener.commit = kill
            save(checkpoint, path)
        io._atomic_save = torn
    last = Path(folder) / "last.ckpt"
    run.fit(model, datamodule=data(), ckpt_path=last if last.exists() else None)
    torch.save(weights(model), Path(folder) / "weights.pt")

if __name__ == "__main__":
    folder, kills = Path(sys.argv[1]), int(sys.argv[2])
    choose = random.Random(0)
    done = 0
    for run in range(kills):
        steps = sorted(choose.sample(range(13), 2))
        own = folder / str(run)
        for kill_at in [*steps, 99]:
            child = os.fork()
            if not child:
                try:
                    one_life(own, kill_at, choose.choice(["step", "optimizer", "writing"]))
                finally:
                    os._exit(0)
            status = os.waitpid(child, 0)[1]
            done += os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    print("killed", done, "times")
"""


@pytest.mark.slow  # Twenty runs, each killed twice: that a kill costs nothing is a claim about every instant.
def test_twenty_runs_killed_and_resumed_end_where_an_uninterrupted_one_does(tmp_path, whole):
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), str(tmp_path / "runs"), "20"], timeout=300, check=False,
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "killed 40 times" in done.stdout, done.stdout[-500:] + done.stderr[-2000:]
    for run in range(20):
        found = torch.load(tmp_path / "runs" / str(run) / "weights.pt")
        torch.testing.assert_close(found, whole, rtol=0, atol=0)


class At(Callback):
    """Does something at the start of one training batch, once."""

    def __init__(self, batch: int, action):
        self.batch, self.action = batch, action

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.fit_loop.total_batch_idx == self.batch:
            self.action()


@pytest.mark.parametrize(("accumulate", "batch"), [(1, 1), (1, 4), (3, 3), (3, 4), (3, 6)])
def test_sigterm_saves_and_the_resumed_run_ends_the_same(tmp_path, batch, accumulate):
    """Also in the middle of a meta-step: the gradients accumulated so far are part of the checkpoint."""
    expected, first, second = (module(accumulate_meta_batches=accumulate) for _ in range(3))
    trainer(tmp_path, max_steps=6).fit(expected, datamodule=data())
    saver = ModelCheckpoint(tmp_path, filename="stopped", save_on_exception=True, every_n_train_steps=10**6)
    stop = At(batch, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises((SystemExit, BaseException)) as ended:
        trainer(tmp_path, saver, stop, max_steps=6).fit(first, datamodule=data())
    assert "SIGTERM" in type(ended.value).__name__
    (checkpoint,) = tmp_path.glob("*.ckpt")
    trainer(tmp_path, max_steps=6).fit(second, datamodule=data(), ckpt_path=checkpoint)
    torch.testing.assert_close(weights(second), weights(expected), rtol=0, atol=0)


class Seen(Callback):
    def __init__(self):
        self.batches = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches.append((trainer.current_epoch, batch_idx))


class ByEpoch(IMAMLModule):
    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)]


@pytest.mark.parametrize("settings", [{}, {"limit_val_batches": 0}, {"val_check_interval": 2}], ids=str)
@pytest.mark.parametrize("saved", ["after the last batch", "at the end of the epoch", "after the fit"])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("epochs", [True, False], ids=["max_epochs", "max_steps"])
def test_a_resume_between_epochs_begins_the_next_one(tmp_path, epochs, accumulate, saved, settings):
    """With the batches that its meta-steps have without an interruption, and the same steps of schedules by epoch."""
    steps = 5 if accumulate == 1 else 3

    def until(count: int, *callbacks: Callback) -> Trainer:
        limit = {"max_epochs": count, "max_steps": -1} if epochs else {"max_steps": count * steps}
        return trainer(tmp_path, *callbacks, **limit, **settings)

    expected, first, second = (module(accumulate_meta_batches=accumulate, kind=ByEpoch) for _ in range(3))
    whole, rest = Seen(), Seen()
    until(3, whole).fit(expected, datamodule=data())
    saver = {
        "after the last batch": ModelCheckpoint(tmp_path, filename="stop", every_n_train_steps=steps),
        "at the end of the epoch": ModelCheckpoint(
            tmp_path, filename="stop", every_n_epochs=1, save_on_train_epoch_end=True
        ),
    }
    part = until(1, *([saver[saved]] if saved in saver else []))
    part.fit(first, datamodule=data())
    if saved == "after the fit":
        part.save_checkpoint(tmp_path / "stop.ckpt")
    until(3, rest).fit(second, datamodule=data(), ckpt_path=tmp_path / "stop.ckpt")
    assert rest.batches == whole.batches[5:]
    torch.testing.assert_close(weights(second), weights(expected), rtol=0, atol=0)


def test_a_checkpoint_that_cannot_hold_the_accumulated_gradients_says_so(tmp_path):
    """An error in the middle of adding a batch's gradient to the others: what is in ``.grad`` is not known."""
    model, calls = module(accumulate_meta_batches=3), []

    def fails(loss, backward=model.manual_backward):
        calls.append(loss)
        if len(calls) == 5:  # In the second meta-step.
            raise OSError("in the backward pass")
        backward(loss)

    model.manual_backward = fails
    saver = ModelCheckpoint(tmp_path, filename="stopped", save_on_exception=True, every_n_train_steps=10**6)
    with (
        pytest.warns(UserWarning, match="saved without these gradients"),
        pytest.raises(OSError, match="in the backward pass"),
    ):
        trainer(tmp_path, saver).fit(model, datamodule=data())
    (checkpoint,) = tmp_path.glob("*.ckpt")
    assert "shares" not in torch.load(checkpoint, weights_only=True)["lightning_imaml"]["outer_step"]
    trainer(tmp_path, max_steps=3).fit(module(accumulate_meta_batches=3), datamodule=data(), ckpt_path=checkpoint)


class StopAfter(Callback):
    """Ends training after a batch, also in the middle of a meta-step."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.should_stop = batch_idx == 3


def test_another_trainer_saves_what_a_fit_left_in_the_middle_of_a_meta_step(tmp_path):
    model, other = module(accumulate_meta_batches=3), trainer(tmp_path)
    fitted = trainer(tmp_path, StopAfter())
    fitted.fit(model, datamodule=data())
    fitted.save_checkpoint(tmp_path / "fitted.ckpt")
    other.validate(model, datamodule=data(), verbose=False)
    other.save_checkpoint(tmp_path / "other.ckpt")
    found, without = (torch.load(tmp_path / f"{name}.ckpt", weights_only=True) for name in ("fitted", "other"))
    assert "shares" in found["lightning_imaml"]["outer_step"]
    assert "shares" not in without["lightning_imaml"]["outer_step"]


@pytest.mark.parametrize(
    ("kept", "said"),
    [(None, None), ({}, None), ({"outer_step": {"random": torch.zeros(1)}}, "found one of an earlier version")],
    ids=["none of ours", "no outer step", "another outer step"],
)
def test_a_checkpoint_of_an_earlier_version_goes_on(tmp_path, kept, said):
    part = trainer(tmp_path, max_steps=2)
    part.fit(module(), datamodule=data())
    part.save_checkpoint(tmp_path / "new.ckpt")
    checkpoint = torch.load(tmp_path / "new.ckpt", weights_only=True)
    del checkpoint["lightning_imaml"]
    torch.save(checkpoint | ({} if kept is None else {"lightning_imaml": kept}), tmp_path / "old.ckpt")
    run = trainer(tmp_path, max_steps=3)
    with pytest.warns(UserWarning, match=said) if said else contextlib.nullcontext():
        run.fit(module(), datamodule=data(), ckpt_path=tmp_path / "old.ckpt")
    assert run.global_step == 3


def test_every_batch_rank_and_run_draws_numbers_of_its_own(tmp_path):
    def drawn(run: int, rank: int) -> list[float]:
        numbers = []

        class Draws(IMAMLModule):
            global_rank = rank

            def meta_gradient(self, *args, **settings):
                numbers.append(torch.rand(()).item())
                return super().meta_gradient(*args, **settings)

        model = module(kind=Draws)
        torch.manual_seed(run)
        trainer(tmp_path, max_steps=3).fit(model, datamodule=data())
        return numbers

    found = [drawn(run, rank) for run, rank in ((0, 0), (0, 1), (1, 0))]
    assert len({number for numbers in found for number in numbers}) == 9
    assert drawn(0, 1) == found[1]


@pytest.mark.parametrize("stop", [2, 5, 7])
def test_dropout_goes_on_with_the_masks_of_an_uninterrupted_run(tmp_path, stop):
    expected, first, second = (module(dropout=0.5) for _ in range(3))
    seed_everything(1, verbose=False)
    trainer(tmp_path, max_steps=9).fit(expected, datamodule=data())
    seed_everything(1, verbose=False)
    part = trainer(tmp_path, max_steps=stop)
    part.fit(first, datamodule=data())
    part.save_checkpoint(tmp_path / "stop.ckpt")
    seed_everything(2, verbose=False)
    trainer(tmp_path, max_steps=9).fit(second, datamodule=data(), ckpt_path=tmp_path / "stop.ckpt")
    torch.testing.assert_close(weights(second), weights(expected), rtol=0, atol=0)


class Validated(Callback):
    def __init__(self):
        self.at = []

    def on_validation_start(self, trainer, pl_module):
        self.at.append(trainer.global_step)


@pytest.mark.parametrize(
    "settings",
    [
        {"val_check_interval": 2, "check_val_every_n_epoch": None},
        {"val_check_interval": 5, "check_val_every_n_epoch": None},
        {"val_check_interval": 2},
        {"val_check_interval": 0.4},
    ],
    ids=str,
)
@pytest.mark.parametrize("stop", [1, 2, 3, 4, 5])
def test_validation_by_meta_steps_goes_on_after_a_resume(tmp_path, settings, stop):
    """Epochs of five batches, which are two meta-steps of two and one of the last."""
    whole, first, second = Validated(), Validated(), Validated()
    trainer(tmp_path, whole, max_steps=8, **settings).fit(module(accumulate_meta_batches=2), datamodule=data())
    part = trainer(tmp_path, first, max_steps=stop, **settings)
    part.fit(module(accumulate_meta_batches=2), datamodule=data())
    part.save_checkpoint(tmp_path / "stop.ckpt")
    rest = trainer(tmp_path, second, max_steps=8, **settings)
    rest.fit(module(accumulate_meta_batches=2), datamodule=data(), ckpt_path=tmp_path / "stop.ckpt")
    assert len(whole.at) > 0
    assert first.at + second.at == whole.at


class FullDisk(Callback):
    """From a step on, no file of this process can grow as large as a checkpoint: the write fails near its end."""

    def __init__(self, step: int, folder: Path):
        self.step, self.folder = step, folder
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            size = (self.folder / "last.ckpt").stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (size - 100, self.before[1]))

    def on_exception(self, trainer, pl_module, exception):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


@pytest.mark.parametrize(
    ("plugins", "said"),
    [([], "File too large"), ([AtomicCheckpointIO()], r"must have room for it; found that .*\.ckpt cannot be written")],
    ids=["Lightning's", "ours"],
)
def test_a_full_disk_loses_no_earlier_checkpoint(tmp_path, plugins, said, whole):
    run = trainer(tmp_path, FullDisk(6, tmp_path), each_step(tmp_path), plugins=plugins)
    with pytest.raises(OSError, match=said):
        run.fit(module(), datamodule=data())
    kept = sorted(path.name for path in tmp_path.iterdir())
    assert kept == ["last.ckpt", "step=5.ckpt", "step=6.ckpt"]  # Nothing that is torn, either.
    for name in kept:
        assert torch.load(tmp_path / name, weights_only=True)["global_step"] in (5, 6)
    again = module()
    trainer(tmp_path).fit(again, datamodule=data(), ckpt_path=tmp_path / "last.ckpt")
    torch.testing.assert_close(weights(again), whole, rtol=0, atol=0)


def test_a_loader_worker_that_dies_is_named():
    class Dies(torch.utils.data.Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            os.kill(os.getpid(), signal.SIGKILL)

    loader = DataLoader(Dies(), batch_size=None, num_workers=1)
    with pytest.raises(RuntimeError, match=r"DataLoader worker \(pid.*exited unexpectedly|killed by signal"):
        trainer(Path()).fit(module(), loader)
