"""What a training notes of itself beside its weights: its validations, and what it ran on."""

from types import SimpleNamespace

import pytest
import reproduce
import torch
from _progress import Progress
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.trainer.states import TrainerFn

from lightning_imaml import Episode


def note(progress, device):
    timer = Timer(duration={"minutes": 5})
    timer._offset = 90.0
    trainer = SimpleNamespace(
        state=SimpleNamespace(fn=TrainerFn.FITTING), sanity_checking=False, global_step=7, callbacks=[timer],
        callback_metrics={"val/accuracy": torch.tensor(0.5), "val/accuracy_interval95": torch.tensor(0.25)},
    )  # fmt: skip
    progress.on_validation_end(trainer, SimpleNamespace(device=torch.device(device)))


def test_a_training_that_changes_devices_names_them_in_order(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"card {device.index}")
    first = Progress()
    for device in ("cuda:0", "cuda:0"):
        note(first, device)
    resumed = Progress()
    resumed.load_state_dict(first.state_dict())
    note(resumed, "cpu")
    assert resumed.devices == ["card 0", "cpu"]
    assert resumed.points == 3 * [{"meta_steps": 7, "minutes": 1.5, "accuracy": 50.0, "interval95": 25.0}]


def test_checkpoints_of_before_are_of_a_cpu():
    progress = Progress()
    progress.load_state_dict({"points": []})
    assert progress.devices == ["cpu"]


@pytest.mark.parametrize(
    ("devices", "said"),
    [
        (["cpu"], "20 images; a"),
        (["card"], "20 images, on card; a"),
        (["card", "cpu"], "20 images, on card and cpu; a"),
    ],
)
def test_the_protocol_names_what_is_no_cpu(devices, said, tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, "Protocol", SimpleNamespace(of=lambda *_: "tested so"))
    monkeypatch.setattr(Episode, "of", lambda batch: batch)
    pool = SimpleNamespace(members={"a": range(20)})
    data = SimpleNamespace(
        test_dataloader=lambda: [None], tasks=lambda split: SimpleNamespace(pool=pool),
        hparams={"shots": 1, "queries": 1, "tasks_per_batch": 2},
    )  # fmt: skip
    tested = SimpleNamespace(datamodule=data, model=SimpleNamespace(device=torch.device("cpu")))
    run = reproduce.Run(2, "omniglot", "maml", 5, 1, [tmp_path / "a.yaml"], 1.0)
    assert reproduce.protocol(run, tested, devices).endswith(said)
