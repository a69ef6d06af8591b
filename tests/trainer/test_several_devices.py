"""Two processes train as one does; whatever goes wrong on one of them, none waits for the other."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from conftest import ROOT
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import nn
from two_processes import METHODS, data, free_port, module, torchrun, trainer, weights

from lightning_imaml import IMAMLModule

TESTS = ROOT / "tests"
ROOT = TESTS.parent
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(TESTS)]), "OMP_NUM_THREADS": "1"}


def run(*command: str, environment: dict[str, str] | None = None, timeout: int = 300) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *command], env=ENVIRONMENT | (environment or {}), timeout=timeout, check=False,
        capture_output=True, text=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict[str, Any]]:
    """Of one process alone, of rank 0 of two and of rank 1 of two; all cases in one start, for starting is slow."""
    folder = tmp_path_factory.mktemp("ranks")
    done = run(str(TESTS / "two_processes.py"), str(folder), timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"of{name}.pt") for name in ("1-0", "2-0", "2-1")]


pytestmark = pytest.mark.slow  # Starts processes: the one proof that the meta-gradient is averaged over them.


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_of_8_tasks_take_20_steps_of_one_of_16(results, method):
    alone, first, second = (found["methods"][method] for found in results)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.testing.assert_close(first, alone, rtol=1e-10, atol=1e-12)


def test_the_comparison_fails_without_the_all_reduce(results):
    alone, first, second = (found["without all-reduce"] for found in results)
    assert (first - second).abs().max() > 1e-3
    assert (first - alone).abs().max() > 1e-3


def test_metrics_are_those_of_one_process(results):
    alone, first, second = (found["metrics"] for found in results)
    assert first == second
    assert {"train/accuracy", "train/grad_norm", "val/loss", "val/accuracy_interval95"} <= set(alone)
    assert set(first) == set(alone)
    for name, value in alone.items():
        assert first[name] == pytest.approx(value, rel=1e-4), name


def test_both_monitors_log_the_same_on_every_rank(results):
    alone, first, second = (found["monitors"] for found in results)
    assert first == second
    assert set(first) == set(alone)
    assert 0 < first["meta_gradient/relative_error"] < 2
    assert first["memory/inner_loop_mib"] > 0


def test_the_adaptation_curve_is_over_the_tasks_of_all_ranks(results):
    alone, first, second = (found["curve"] for found in results)
    assert first == second
    assert "test/accuracy_at_9_steps" in alone
    assert first == pytest.approx(alone, rel=1e-5)


def test_spawned_processes_take_the_same_steps(results):
    model = module(**METHODS["first order"])
    run = trainer(1, max_epochs=2, max_steps=20, devices=2, strategy="ddp_spawn")
    run.fit(model, datamodule=data(8))
    torch.testing.assert_close(weights(model), results[0]["methods"]["first order"], rtol=1e-10, atol=1e-12)


def test_the_warning_of_a_task_that_is_left_out_names_the_rank(results):
    for rank, bad in ((0, ([0, 1], [0, 1])), (1, ([0], [0, 1]))):
        warned = results[1 + rank]["warned"]
        assert len(warned) == 2
        for text, tasks in zip(warned, bad, strict=True):
            assert f"for tasks {tasks} of the batch of rank {rank}." in text


def test_bad_tasks_are_left_out_of_the_mean_over_all_ranks(results):
    """Also where a rank has none left, and where no rank has."""
    alone, first, second = (found["skipped"] for found in results)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.testing.assert_close(first, alone, rtol=1e-10, atol=1e-12)


def test_every_task_of_a_meta_step_counts_the_same_whatever_was_left_out(results):
    alone, first, second = (found["skipped in long steps"] for found in results)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.testing.assert_close(first, alone, rtol=1e-10, atol=1e-12)


def test_every_task_counts_the_same_in_an_uneven_last_batch(results):
    alone, first, second = (found["uneven batch"] for found in results)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.testing.assert_close(first, alone, rtol=1e-10, atol=1e-12)


def test_a_bad_task_stops_all_ranks(results):
    _, first, second = results
    assert "found bad ones on ranks [1]" in first["raised"]
    assert "for tasks [1] of the batch of rank 1." in second["raised"]


def test_different_numbers_of_batches_are_refused_on_all_ranks(results):
    _, first, second = results
    assert "must have the same number of training batches; found [3.0, 4.0]" in first["unequal"]
    assert first["unequal"] == second["unequal"]


SHARDED = [FSDPStrategy, ModelParallelStrategy, lambda: DeepSpeedStrategy.__new__(DeepSpeedStrategy)]


@pytest.mark.parametrize("make", SHARDED, ids=["FSDP", "model parallel", "DeepSpeed, which is not installed"])
def test_sharded_strategies_are_refused_with_the_reason(make, monkeypatch):
    run, model, strategy = Trainer(accelerator="cpu", devices=1, logger=False), IMAMLModule(nn.Linear(2, 2)), make()
    model.trainer = run
    monkeypatch.setattr(run._accelerator_connector, "strategy", strategy)
    words = rf"each task adapts its own copy .*; found {type(strategy).__name__}, which shards"
    with pytest.raises(ValueError, match=words):
        model.setup("fit")


def test_statistics_over_ranks_are_refused():
    model = module()
    model.trainer = trainer(2, sync_batchnorm=True)
    with pytest.raises(ValueError, match="sync_batchnorm must be off, since the statistics of a batch are one task's"):
        model.setup("fit")


def test_evaluation_with_loaders_of_unequal_length_is_over_all_tasks(results):
    """Loaders of a person's own: three batches on one rank, one on the other."""
    alone, first, second = (found["uneven evaluation"] for found in results)
    assert first == second
    assert set(first) == set(alone) >= {"val/loss", "val/accuracy", "val/accuracy_interval95"}
    for name, value in alone.items():
        assert first[name] == pytest.approx(value, rel=1e-5), name


def test_each_of_several_loaders_is_judged_over_the_tasks_of_all_ranks(results):
    alone, first, second = (found["several loaders"] for found in results)
    assert first == second
    for stage in ("val", "test"):
        assert {f"{stage}/accuracy_interval95/dataloader_idx_{k}" for k in range(2)} <= set(alone)
    assert first == pytest.approx(alone, rel=1e-5)


def test_prediction_writers_are_told_the_batches_of_their_rank(results):
    alone, *ranks = (found["predicted"] for found in results)
    expected = {number: predictions for (number,), predictions in alone}
    assert sorted(expected) == [0, 1, 2, 3]
    assert [[number for (number,), _ in written] for written in ranks] == [[0, 2], [1, 3]]
    for written in ranks:
        for (number,), predictions in written:
            torch.testing.assert_close(predictions, expected[number])


RESUMED = """
import os, signal, sys, warnings
from pathlib import Path
import torch
from lightning.pytorch import Callback
from torch import nn
from two_processes import data, forked, module, rank, trainer, weights

class Stop(Callback):
    # Saves in the middle of a meta-step, and ends the process as a power cut would.
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.fit_loop.total_batch_idx == 6:
            trainer.save_checkpoint(folder / "stop.ckpt")
            os.kill(os.getpid(), signal.SIGKILL)

def fit(*callbacks, **settings):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 3)).double()
    model = module(backbone=network, accumulate_meta_batches=3)
    torch.manual_seed(1 + rank() + 10 * ("ckpt_path" in settings))  # Every rank's global stream is its own.
    run = trainer(2, *callbacks, max_epochs=-1, max_steps=5)
    run.fit(model, datamodule=data(2, batches_per_epoch=5), **settings)
    return model

def killed():
    torch.save(weights(fit()), folder / f"whole{rank()}.pt")
    fit(Stop())

def resumed():
    torch.save(weights(fit(ckpt_path=folder / "stop.ckpt")), folder / f"resumed{rank()}.pt")

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    assert forked(2, killed) == [-signal.SIGKILL] * 2
    assert forked(2, resumed) == [0, 0]
"""


def test_two_processes_that_are_killed_in_the_middle_of_a_meta_step_go_on_exactly(tmp_path):
    """With dropout: every rank has its own random stream, and its own share of the accumulated gradients."""
    script = tmp_path / "resumed.py"
    script.write_text(RESUMED)
    done = run(str(script), str(tmp_path), timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    shares = torch.load(tmp_path / "stop.ckpt", weights_only=True)["lightning_imaml"]["outer_step"]["shares"]
    first, second = (torch.cat([g.flatten() for g in share["gradients"].values()]) for share in shares)
    assert (first - second).abs().max() > 1e-3
    for rank in range(2):
        found, expected = (torch.load(tmp_path / f"{name}{rank}.pt") for name in ("resumed", "whole"))
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    network = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 3)).double()
    alone = trainer(1, max_epochs=-1, max_steps=3)
    with pytest.warns(UserWarning, match=r"resumed with the 2 processes .*; found 1\. .* are dropped"):
        alone.fit(
            module(backbone=network, accumulate_meta_batches=3),
            datamodule=data(4, batches_per_epoch=5),
            ckpt_path=tmp_path / "stop.ckpt",
        )


EXAMPLE = str(ROOT / "examples" / "multi_gpu.py")


def test_the_example_runs_on_two_nodes_by_the_environment_that_torchrun_sets(tmp_path):
    port = free_port()
    options = ["--accelerator", "cpu", "--devices", "1", "--num_nodes", "2", "--max_steps", "2"]
    command = [sys.executable, EXAMPLE, *options, "--folder", str(tmp_path)]
    nodes = []
    for node in range(2):
        of_node = torchrun(node, 2, port, GROUP_RANK=str(node), LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        nodes.append(subprocess.Popen(command, env=ENVIRONMENT | of_node, **pipes))
    printed = [node.communicate(timeout=200) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], printed
    assert "2 processes, 16 tasks a meta-step" in printed[0][0]
    assert "test/accuracy" in printed[0][0]
    assert (tmp_path / "last.ckpt").is_file()


DIES = """
import os, signal, sys
from two_processes import batches, module, rank, trainer
if __name__ == "__main__":
    model = module()
    def die(batch, batch_idx, step=model.training_step):
        if batch_idx == 1 and rank() == int(sys.argv[1]):
            os.kill(os.getpid(), signal.SIGKILL)
        return step(batch, batch_idx)
    model.training_step = die
    trainer(2, use_distributed_sampler=False).fit(model, batches([[0], [1], [2], [3]]))
"""


def test_a_process_that_dies_takes_the_run_with_it_and_is_named(tmp_path):
    script = tmp_path / "dies.py"
    script.write_text(DIES)
    done = run(str(script), "1", timeout=120)
    assert done.returncode != 0
    told = done.stderr + done.stdout
    assert "every rank must be running for a meta-step; rank 0 of 2 lost another one" in told, told[-3000:]
