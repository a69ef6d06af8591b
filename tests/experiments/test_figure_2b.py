"""Figure 2(b), made small: what it counts is what theory says."""

from __future__ import annotations

import csv
from itertools import pairwise

import figure_2b
import pytest
import torch

WAYS, FILTERS = 3, 4


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("figure_2b")
    settings = f"--ways {WAYS} --shots 2 --queries 2 --filters {FILTERS} --steps 4 8 16 --last-steps 2 --cg-steps 3"
    rows = figure_2b.main([*settings.split(), "--repeats", "1", "--output", str(folder)])
    return folder, rows


def column(rows, method, name):
    return [row[name] for row in rows if str(row["method"]).startswith(method)]


def gradient_flops():
    """Forward, and backward twice that, but for the images, which need no gradient."""
    images, layers = 2 * WAYS, []
    for side, channels in ((14, 1), (7, FILTERS), (4, FILTERS), (2, FILTERS)):
        layers.append(2 * images * side**2 * FILTERS * channels * 9)
    layers.append(2 * images * 4 * FILTERS * WAYS)
    return 3 * sum(layers) - layers[0]


def test_the_numbers_and_the_picture_are_saved(saved):
    folder, rows = saved
    with (folder / "figure_2b.csv").open(newline="") as file:
        assert [list(row.values()) for row in csv.DictReader(file)] == [list(map(str, row.values())) for row in rows]
    assert (folder / "figure_2b.png").stat().st_size > 0
    assert len(rows) == 4 * 3
    assert all(row["seconds"] > 0 for row in rows)


def test_computation_is_what_the_layers_cost(saved):
    """A task's gradients at the steps, of the query loss and for the residual; what each method adds grows or not."""
    rows, gradient = saved[1], gradient_flops() / 1e9
    first_order = column(rows, "first order", "gflop")
    assert first_order == pytest.approx([(steps + 2) * gradient for steps in (4, 8, 16)], rel=1e-12)
    for method in ("iMAML", "truncated"):
        added = [a - b for a, b in zip(column(rows, method, "gflop"), first_order, strict=True)]
        assert added == pytest.approx([added[0]] * 3, rel=1e-9)
        assert added[0] > 0
    unrolled = [a - b for a, b in zip(column(rows, "MAML", "gflop"), first_order, strict=True)]
    assert unrolled == pytest.approx([steps / 4 * unrolled[0] for steps in (4, 8, 16)], rel=1e-9)
    assert unrolled[0] > 4 * gradient


def test_memory_grows_for_maml_alone(saved):
    rows = saved[1]
    for method in ("iMAML", "truncated", "first order"):
        peaks = column(rows, method, "peak_mib")
        assert max(peaks) <= 1.01 * min(peaks)
    first, second = (b - a for a, b in pairwise(column(rows, "MAML", "peak_mib")))
    assert second == pytest.approx(2 * first, rel=0.01)
    assert first > 0


def test_the_peak_is_what_the_work_adds():
    kept = torch.ones(256)
    assert figure_2b.peak_bytes(lambda: (kept + 1) * 2, torch.device("cpu")) == 2 * 1024
