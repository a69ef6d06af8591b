"""The sinusoid example: what it compares with is what it says, and it learns."""

from __future__ import annotations

import csv
import math

import numpy as np
import pytest
import sinusoid


def test_the_least_error_without_adaptation_is_the_variance_over_tasks():
    """By summation over a fine grid of amplitudes, phases and inputs."""

    def midpoints(low, high, count):
        return low + (high - low) * (np.arange(count) + 0.5) / count

    amplitude = midpoints(0.1, 5, 50).reshape(-1, 1, 1)
    phase = midpoints(0, math.pi, 50).reshape(1, -1, 1)
    y = amplitude * np.sin(midpoints(-5, 5, 200).reshape(1, 1, -1) - phase)
    assert sinusoid.least_unadapted_error() == pytest.approx(y.var(axis=(0, 1)).mean(), rel=1e-3)


def run(folder, *options):
    return sinusoid.main([*options, "--test-tasks", "100", "--output", str(folder)])


def table(rows):
    return {(row["network"], row["steps"]): row["mse"] for row in rows}


@pytest.mark.parametrize("method", ["maml", "fomaml", "reptile"])  # iMAML has a longer test below.
def test_every_method_learns_to_adapt(tmp_path, method):
    options = "--method", method, "--meta-steps", "150", "--meta-lr", "3e-3"
    rows = run(tmp_path, *options)
    found = table(rows)
    assert found["meta-learned", 10] < found["meta-learned", 0]
    assert found["meta-learned", 10] < 0.9 * found["random", 10]
    with (tmp_path / f"sinusoid_{method}.csv").open() as file:
        saved = list(csv.DictReader(file))
    assert table([{**row, "steps": int(row["steps"]), "mse": float(row["mse"])} for row in saved]) == found
    assert (tmp_path / f"sinusoid_{method}.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_seed_gives_the_same_table(tmp_path):
    first, again, other = (run(tmp_path, "--meta-steps", "3", "--seed", seed) for seed in "001")
    assert first == again != other


@pytest.mark.slow  # Below what any network can reach without adapting takes some hundred meta-steps.
def test_adaptation_beats_the_best_predictor_that_does_not_adapt(tmp_path):
    rows = run(tmp_path, "--meta-steps", "1000")
    found = {(row["network"], row["steps"]): (row["mse"], row["interval95"]) for row in rows}
    least = sinusoid.least_unadapted_error()
    mse, interval = found["meta-learned", 0]
    assert mse + interval > least
    mse, interval = found["meta-learned", 10]
    assert mse + interval < least
    assert mse < found["meta-learned", 0][0]
    assert mse < 0.9 * found["random", 10][0]
