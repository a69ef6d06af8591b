"""The examples that a newcomer reads: each runs, small, and does what it says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import custom_backbone
import learn2learn_interop
import mini_imagenet
import multi_gpu
import numpy as np
import omniglot
import pytest
import quickstart
import torch
import without_lightning
from conftest import ROOT
from lightning.pytorch import Trainer
from PIL import Image

from lightning_imaml import IMAMLModule
from lightning_imaml.data import GlyphDataModule
from lightning_imaml.models import Conv4


def test_quickstart_writes_its_curve_and_tests_the_best_checkpoint(tmp_path, capsys):
    options = f"""--model.backbone.init_args.filters 4 --data.tasks_per_batch 2 --data.batches_per_epoch 2
        --data.val_tasks 4 --data.test_tasks 20 --trainer.max_epochs 1 --trainer.log_every_n_steps 1
        --trainer.logger.init_args.save_dir {tmp_path}"""
    found = quickstart.main(options.split())
    assert found["test/accuracy_before"] < found["test/accuracy"]
    told = dict(re.findall(r"^The (.+): (.+)$", capsys.readouterr().out, flags=re.MULTILINE))
    assert Path(told["learning curve"]).read_bytes().startswith(b"\x89PNG")
    assert Path(told["best checkpoint"]).is_file()


def test_a_backbone_of_ones_own_is_built_for_the_ways_of_the_data():
    found = custom_backbone.main(["--ways", "3", "--meta-steps", "60", "--test-tasks", "40"])
    assert found["test/accuracy_before"] == pytest.approx(1 / 3, abs=0.1)
    assert found["test/accuracy"] > 0.6


def test_the_plain_loop_takes_the_steps_of_the_trainer():
    steps, tasks = 3, 2
    model, before, after = without_lightning.main([f"--meta-steps={steps}", f"--tasks={tasks}", "--test-tasks=20"])
    assert before != after
    torch.manual_seed(0)
    module = IMAMLModule(
        Conv4(ways=5, filters=16),
        inner_solver=without_lightning.INNER_SOLVER,
        estimator=without_lightning.ESTIMATOR,
        regularizer=without_lightning.REGULARIZER,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=3e-3),
    )
    data = GlyphDataModule(ways=5, queries=5, tasks_per_batch=tasks, batches_per_epoch=steps, test_tasks=20)
    trainer = Trainer(max_epochs=1, limit_val_batches=0, accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.fit(module, datamodule=data)
    for name, parameter in module.backbone.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), parameter, rtol=1e-4, atol=1e-5)
    (tested,) = trainer.test(module, datamodule=data, verbose=False)
    assert after == pytest.approx(tested["test/accuracy"], abs=1e-6)


def test_the_plain_loop_learns():
    _, before, after = without_lightning.main(["--meta-steps", "40", "--test-tasks", "100"])
    assert after > before + 0.03


@pytest.mark.filterwarnings("ignore")  # Of learn2learn's old dependencies.
def test_a_taskset_and_a_network_of_learn2learn_learn():
    pytest.importorskip("learn2learn", reason="learn2learn is an extra: requirements/learn2learn.txt")
    found = learn2learn_interop.main(["--meta-steps", "30", "--test-tasks", "40", "--ways", "3"])
    assert found["test/accuracy"] > 0.6 > 0.45 > found["test/accuracy_before"]


def test_without_learn2learn_its_example_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "learn2learn", None)
    monkeypatch.setitem(sys.modules, "learn2learn.vision.models", None)
    with pytest.raises(SystemExit, match="needs learn2learn: pip install") as ended:
        learn2learn_interop.main([])
    (requirements,) = re.findall(r"-r (\S+)", str(ended.value))
    assert (ROOT / requirements).is_file()


@pytest.mark.slow  # Reads all of Omniglot.
def test_omniglot_tests_its_best_checkpoint(tmp_path, omniglot_root, capsys):
    small = "--filters 8 --meta-steps 12 --validate-every 6 --test-tasks 40"
    found = omniglot.main(["--root", str(omniglot_root), "--output", str(tmp_path / "out"), *small.split()])
    assert found["test/accuracy"] > 0.3 > found["test/accuracy_before"]
    best = torch.load(tmp_path / "out" / "best.ckpt", weights_only=True)
    assert best["global_step"] in (6, 12)
    assert f"The best checkpoint: {tmp_path / 'out' / 'best.ckpt'}" in capsys.readouterr().out


def test_mini_imagenet_learns_from_photographs(tmp_path, monkeypatch):
    """From made-up ones, in which a colour tells the class."""
    random = np.random.default_rng(0)
    split = {name: [f"n{3 * k + number:02}" for k in range(3)] for number, name in enumerate(("train", "val", "test"))}
    for name, labels in split.items():
        for label in labels:
            (tmp_path / name / label).mkdir(parents=True)
            colour = random.integers(0, 256, 3)
            for k in range(6):
                pixels = (0.8 * colour + 0.2 * random.integers(0, 256, (84, 84, 3))).astype(np.uint8)
                Image.fromarray(pixels).save(tmp_path / name / label / f"{k}.png")
    monkeypatch.setattr("lightning_imaml.data.mini_imagenet.shipped_split", lambda name: split)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    small = "--ways 3 --queries 2 --filters 4 --meta-steps 8 --test-tasks 12"
    found = mini_imagenet.main(["--root", str(tmp_path), *small.split()])
    assert found["test/accuracy"] > 0.6 > 0.45 > found["test/accuracy_before"]


@pytest.mark.slow  # Starts three processes: the example's first command must give what one process gives.
def test_two_processes_get_the_numbers_of_one(tmp_path):
    """Of the same global batches, up to rounding."""
    told, weights = {}, {}
    for devices in ("1", "2"):
        command = [sys.executable, multi_gpu.__file__, "--accelerator", "cpu", "--tasks", "4"]
        done = subprocess.run(
            [*command, "--max_steps", "2", "--devices", devices, "--folder", str(tmp_path / devices)],
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
            timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        assert f"{devices} processes, 4 tasks a meta-step, 2 meta-steps" in done.stdout
        told[devices] = dict(re.findall(r"^(test/\w+): (.+)$", done.stdout, flags=re.MULTILINE))
        weights[devices] = torch.load(tmp_path / devices / "last.ckpt", weights_only=True)["state_dict"]
    for name in ("test/accuracy", "test/loss"):
        assert float(told["1"][name]) == pytest.approx(float(told["2"][name]), abs=2e-3)
    for name, value in weights["1"].items():
        # A bias before BatchNorm has a gradient of rounding alone, of which Adam makes whole steps.
        if value.ndim > 1 or "classifier" in name:
            torch.testing.assert_close(weights["2"][name], value, rtol=1e-4, atol=1e-6)
