"""The benchmarks at tiny size: what they time happens in turns, and what they print is saved."""

from __future__ import annotations

import csv
import statistics
from itertools import pairwise

import pytest
import torch
from conftest import ROOT
from torch import nn
from torch.nn import functional as F

from benchmarks import first_use, kernels, overhead, regression, scaling, stock_layers
from benchmarks.__main__ import main
from benchmarks.workloads import WORKLOADS, Settings, Workload
from lightning_imaml.problems import network

TINY = Workload("omniglot", 2, 1, 1, 2, Settings(steps=2, cg_steps=2), filters=2)


def numbers(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_overhead(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(WORKLOADS, "omniglot-5-1", TINY)
    calls = []
    bare = overhead.meta_gradient

    def spy(model, episode, **settings):
        calls.append(next(model.parameters()).detach().clone())
        return bare(model, episode, **settings)

    monkeypatch.setattr(overhead, "meta_gradient", spy)
    (row,) = main(["--overhead", "--workloads", "omniglot-5-1", "--repeats", "3", "--output", str(tmp_path)])
    assert len(calls) == overhead.WARM_UP + 3 + 1
    # In turns with training: every call sees other weights.
    assert not any(torch.equal(a, b) for a, b in pairwise(calls))
    assert row["ratio"] == row["training_step_ms"] / row["bare_meta_gradient_ms"]
    assert 0 < row["loading_ms"] < row["training_step_ms"]
    assert row["loading_share"] == pytest.approx(row["loading_ms"] / row["training_step_ms"])
    assert numbers(tmp_path / "overhead.csv") == [{name: str(value) for name, value in row.items()}]
    assert f"ratio {row['ratio']:.3f}" in capsys.readouterr().out


def test_batches_are_timed(monkeypatch):
    ticks = iter(range(100))
    monkeypatch.setattr(overhead.time, "perf_counter", lambda: next(ticks) ** 2)
    timed = overhead.Timed("ab")
    assert list(timed) == ["a", "b"]
    assert timed.seconds == [1 - 0, 9 - 4, 25 - 16]
    assert statistics.median(timed.seconds) == 5


def test_scaling(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(scaling, "BASE", TINY)
    monkeypatch.setattr(scaling, "TASKS", (1, 2))
    monkeypatch.setattr(scaling, "SIZES", ((2, 1), (2, 2)))
    monkeypatch.setattr(scaling, "FILTERS", (2, 4))
    rows = main(["--scaling", "--repeats", "1", "--output", str(tmp_path)])
    assert [(row["varied"], row["value"], row["x"]) for row in rows] == [
        ("tasks", "1", 1), ("tasks", "2", 2), ("ways x shots", "2 x 1", 2), ("ways x shots", "2 x 2", 4),
        ("filters", "2", 2), ("filters", "4", 4),
    ]  # fmt: skip
    assert all(row["ms_a_task"] > 0 for row in rows)
    work = [row["gflop_a_task"] for row in rows]
    assert work[0] == work[1] == work[2] == work[4], "one task's, whatever the batch"
    assert work[3] == pytest.approx(2 * work[2], rel=0.2), "twice the support images, the same queries"
    assert work[5] > 2.5 * work[4]
    assert numbers(tmp_path / "scaling.csv") == [{name: str(value) for name, value in row.items()} for row in rows]
    assert (tmp_path / "scaling.png").stat().st_size > 0
    assert "2 x 2" in capsys.readouterr().out


def test_convolutions_are_counted():
    images, weights = torch.rand(2, 3, 8, 8), torch.rand(4, 3, 3, 3, requires_grad=True)
    with kernels.Convolutions() as noted:
        for _ in range(3):
            torch.relu(F.conv2d(images, weights, stride=2)).sum().backward()
    counts = {call[0]: count for call, count in noted.calls.items()}
    assert counts == {torch.ops.aten.convolution.default: 3, torch.ops.aten.convolution_backward.default: 3}
    assert all(kernels.seconds(call) > 0 for call in noted.calls)


def test_kernels(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(WORKLOADS, "omniglot-5-1", TINY)
    monkeypatch.setattr(kernels, "seconds", lambda call: 1e-3)
    (row,) = main(["--kernels", "--workloads", "omniglot-5-1", "--repeats", "1", "--output", str(tmp_path)])
    # Every layer once in each inner step, the linearisation and the query loss, forward and backward, and in the
    # products: more than 4 x 2 x 4 calls; two tasks at a time share them.
    assert 16 <= row["convolutions_ms_a_task"] < 100
    assert row["eager_gains_less_than"] == pytest.approx(
        row["plain_loop_ms_a_task"] / row["convolutions_ms_a_task"], abs=0.01
    )
    assert row["convolutions_within_the_package_ms_a_task"] > 0
    assert numbers(tmp_path / "kernels.csv") == [{name: str(value) for name, value in row.items()}]
    assert "eager_gains_less_than" in capsys.readouterr().out


def test_one_kind_at_a_time():
    with pytest.raises(SystemExit):
        main(["--scaling", "--overhead"])


RECORDED = ROOT / "docs" / "results" / "benchmark.csv"
LOOP, TORCHOPT, EAGER = (("w", "implicit", side) for side in ("sequential loop", "TorchOpt", "lightning_imaml"))


def test_the_recorded_ratios_are_no_worse_than_themselves(capsys):
    recorded = regression.read(RECORDED)
    regression.check(recorded, recorded, tolerance=0.0)
    assert len(capsys.readouterr().out.splitlines()) == sum(side in regression.OURS for _, _, side in recorded)


def test_another_machine_is_not_worse_and_a_slower_side_is(capsys):
    recorded = {LOOP: 50.0, TORCHOPT: 70.0, EAGER: 25.0}
    regression.check({key: 3 * time for key, time in recorded.items()}, recorded, tolerance=0.0)
    regression.check({**recorded, EAGER: 30.0}, recorded, tolerance=0.2)
    with pytest.raises(SystemExit, match=r"^1 of 1 ratios are more than 20% below"):
        regression.check({**recorded, EAGER: 32.0}, recorded, tolerance=0.2)
    assert capsys.readouterr().out.count("WORSE") == 1


def test_ratios_are_to_the_fastest_side_that_both_tables_have():
    recorded = {LOOP: 50.0, TORCHOPT: 40.0, EAGER: 20.0}
    assert regression.ratios({LOOP: 60.0, EAGER: 20.0}, recorded) == {EAGER: (3.0, 2.5)}
    assert regression.ratios({**recorded, LOOP: 10.0}, recorded) == {EAGER: (0.5, 2.0)}


def test_nothing_to_compare_is_no_success():
    with pytest.raises(SystemExit, match="nothing to compare"):
        regression.check({EAGER: 1.0, LOOP: 1.0}, {EAGER: 1.0}, tolerance=0.5)


def test_the_command_compares_its_table(monkeypatch, tmp_path):
    """With the recorded times in the place of a measurement: the package is as fast, then half as fast."""
    factor = 1.0

    def measured(name, workload, episode, gradient, repeats, device):
        rows = [row for row in numbers(RECORDED) if (row["workload"], row["gradient"]) == (name, gradient)]
        for row in rows:
            row |= {key: float(value) for key, value in row.items() if key not in ("workload", "gradient", "side")}
            row["ms_a_task"] *= factor if row["side"] in regression.OURS else 1
        return rows

    monkeypatch.setattr("benchmarks.__main__.measure", measured)
    table = tmp_path / "benchmark.csv"  # Also the one that is written.
    table.write_text(RECORDED.read_text())
    args = ["--workloads", "omniglot-5-1", "--check", str(table), "--output", str(tmp_path)]
    main(args)
    factor = 2.0
    with pytest.raises(SystemExit, match="below the recorded ones"):
        main(args)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--scaling"], "comparison of sides alone"), (["--overhead"], "comparison of sides alone"),
        (["--kernels"], "comparison of sides alone"), (["--check", "some.csv"], "comparison of sides alone"),
        ([], "must have a GPU"),
    ],
)  # fmt: skip
def test_what_does_not_run_on_a_gpu_says_so(options, message, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        main(["--device", "cuda", *options])
    assert message in capsys.readouterr().err


def test_well_known_layers(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(WORKLOADS, "omniglot-5-1", TINY)
    monkeypatch.setattr(stock_layers, "keep_freed_memory", lambda: None)
    asked, seconds = [], iter([9.0, 9.0] + [4.0, 2.0] * 2)

    def timed(work):
        asked.append(network.has_stock_layers_alone(nn.Linear(1, 1)))
        work()
        return next(seconds)

    monkeypatch.setattr(stock_layers, "works", lambda workload: {"some work": lambda: None})
    monkeypatch.setattr(stock_layers, "timed", timed)
    (row,) = stock_layers.main(["--workloads", "omniglot-5-1", "--repeats", "2", "--output", str(tmp_path)])
    assert asked == [False, True] * 3, "in turns"
    assert row["ratio"] == 2.0
    assert numbers(tmp_path / "stock_layers.csv") == [{name: str(value) for name, value in row.items()}]
    assert "some work" in capsys.readouterr().out


def test_what_is_timed_of_well_known_layers_runs():
    for work in stock_layers.works(TINY).values():
        assert work() is not None


def test_the_first_use(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(WORKLOADS, "omniglot-5-1", TINY)
    checks = []
    monkeypatch.setattr(first_use, "check_network", lambda flat, _: checks.append(bool(flat.traits.checked)))
    seconds = iter([9.0] * 3 + [1.0, 0.5, 4.0] * 2)
    monkeypatch.setattr(first_use, "timed", lambda work: (work(), next(seconds))[1])
    (row,) = first_use.main(["--workloads", "omniglot-5-1", "--repeats", "2", "--output", str(tmp_path)])
    assert len(checks) == 6, "in turns, three times"
    assert row["check_over_meta_step"] == 0.25
    assert numbers(tmp_path / "first_use.csv") == [{name: str(value) for name, value in row.items()}]
    assert "check_over_meta_step 0.25" in capsys.readouterr().out
