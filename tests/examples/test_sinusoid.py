"""The sinusoid example: its tasks are what the paper says, and it learns."""

from __future__ import annotations

import csv
import math

import numpy as np
import pytest
import sinusoid
import torch


def batches(split="train", seed=0, tasks=50):
    return sinusoid.Sinusoids(split, batches=3, tasks=tasks, shots=10, queries=10, seed=seed)


def test_tasks_are_sinusoids_of_the_papers_ranges():
    """y = a sin x + b cos x fits each task exactly, support and query alike, with A and p in their ranges."""
    episode = batches()[1].validate()
    x = torch.cat([episode.support_inputs, episode.query_inputs], dim=1).double()
    y = torch.cat([episode.support_targets, episode.query_targets], dim=1).double()
    assert x.shape == y.shape == (50, 20, 1)
    assert x.min() >= -5
    assert x.max() <= 5
    waves = torch.cat([x.sin(), x.cos()], dim=2)
    fit = torch.linalg.lstsq(waves, y).solution
    torch.testing.assert_close(waves @ fit, y, rtol=0, atol=1e-5)
    a, b = fit[:, 0, 0], fit[:, 1, 0]
    amplitude, phase = torch.hypot(a, b), torch.atan2(-b, a)
    assert 0.1 <= amplitude.min() < 0.7
    assert 4.4 < amplitude.max() <= 5
    assert 0 <= phase.min() < 0.4
    assert math.pi - 0.4 < phase.max() <= math.pi


def test_tasks_are_a_function_of_seed_split_and_index():
    first = batches()[1]
    assert all(torch.equal(a, b) for a, b in zip(first, batches()[1], strict=True))
    for other in (batches()[2], batches("test")[1], batches(seed=1)[1]):
        assert not torch.equal(first.support_inputs, other.support_inputs)


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


@pytest.mark.parametrize("method", ["imaml", "maml", "fomaml", "reptile"])
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
