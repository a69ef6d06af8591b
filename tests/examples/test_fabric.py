from __future__ import annotations

import os
import subprocess
import sys

import fabric
import pytest
import torch
from conftest import ROOT


def test_it_learns_on_one_device(capsys):
    accuracy = fabric.main(["--accelerator", "cpu", "--meta-steps", "20", "--tasks", "4", "--test-tasks", "20"])
    assert accuracy > 0.3  # Chance is 0.2.
    told = capsys.readouterr().out
    assert "meta-step 20: query loss" in told
    assert "5-way 1-shot on unseen letters" in told


def test_two_processes_equal_one_with_both_batches(tmp_path):
    paths = [str(ROOT), str(ROOT / "tests"), str(ROOT / "examples"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    for processes in (1, 2):
        command = [sys.executable, str(ROOT / "tests" / "fabric_processes.py"), str(tmp_path), str(processes)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
    one, first, second = (torch.load(tmp_path / f"of{name}.pt") for name in ("1-0", "2-0", "2-1"))
    assert torch.equal(first["weights"], second["weights"])
    torch.testing.assert_close(first["weights"], one["weights"], rtol=1e-10, atol=1e-12)
    assert first["accuracy"] == second["accuracy"] == pytest.approx(one["accuracy"])
