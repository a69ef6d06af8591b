"""The examples on the paper's theory, made small: each main() runs, and what it measures is what theory says."""

from __future__ import annotations

import csv
import importlib
from itertools import pairwise

import pytest
import torch
from conftest import ROOT

EXAMPLES = ROOT / "experiments"


@pytest.fixture
def example(monkeypatch):
    """Import an example by name, as if it ran as a script."""
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module


def numbers(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def small(tmp_path, text):
    return [*text.split(), "--output", str(tmp_path)]


def test_regression_tasks_have_the_prescribed_hessian_and_the_exact_meta_gradient(example):
    """∇²L from torch.func.hessian; φ* and dφ*/dθ from differentiating the closed form in θ."""
    torch.manual_seed(0)
    tasks = example("_synthetic").RegressionTasks.draw(tasks=3, samples=8, features=5, condition=40.0)
    episode, theta = tasks.episode, tasks.model.weight.detach().flatten()
    eye = torch.eye(5, dtype=torch.float64)
    for i in range(3):
        x, y, query, targets = (part[i] for part in episode)

        def loss(phi, x=x, y=y):
            return (x @ phi - y[:, 0]).square().mean()

        hessian = torch.func.hessian(loss)(theta)
        torch.testing.assert_close(tasks.hessian()[i], hessian)
        eigenvalues = torch.linalg.eigvalsh(hessian + tasks.strength * eye)
        torch.testing.assert_close(eigenvalues, torch.logspace(-1, 0, 5, base=40.0, dtype=torch.float64))

        def outer(theta, x=x, y=y, query=query, targets=targets):
            rows = torch.cat([(2 / len(x)) ** 0.5 * x, tasks.strength**0.5 * eye])
            values = torch.cat([(2 / len(x)) ** 0.5 * y[:, 0], tasks.strength**0.5 * theta])
            phi = torch.linalg.pinv(rows) @ values  # A ridge regression towards θ.
            return (query @ phi - targets[:, 0]).square().mean()

        torch.testing.assert_close(tasks.exact()[i], torch.func.grad(outer)(theta))


def test_samples_must_determine_the_task(example):
    with pytest.raises(ValueError, match="samples must be at least the number of features, 5; found 4"):
        example("_synthetic").RegressionTasks.draw(tasks=1, samples=4, features=5, condition=10.0)


def test_figure_2a(example, tmp_path):
    figure_2a = example("figure_2a")
    settings = "--tasks 2 --features 8 --samples 10 --condition 10 --steps 1 4 16 64 256 --cg-steps 2 8 --last-steps 3"
    rows = figure_2a.main(small(tmp_path, settings))
    assert (tmp_path / "figure_2a.png").stat().st_size > 0
    saved = numbers(tmp_path / "figure_2a.csv")
    assert [list(map(str, row.values())) for row in rows] == [list(row.values()) for row in saved]

    def errors(solver, method):
        return [row["relative_error"] for row in rows if (row["solver"], row["method"]) == (solver, method)]

    for solver in ("GradientDescent", "Nesterov"):
        exact, maml = errors(solver, "iMAML, 8 CG steps"), errors(solver, "MAML")
        assert exact == sorted(exact, reverse=True)
        assert exact[-1] < 1e-8
        assert maml[-1] < 1e-8
        # What too few CG steps or too short a way back leave does not go away with inner steps.
        for method in ("iMAML, 2 CG steps", "truncated, last 3 steps"):
            assert errors(solver, method)[-1] > 1e-3
    costs = {
        (row["method"], row["inner_steps"]): row["gradient_computations"] for row in rows if row["solver"] == "Nesterov"
    }
    assert costs["iMAML, 2 CG steps", 16] == 16 + 2 + 2 * 2
    assert costs["MAML", 16] == 16 + 1 + 2 * 16
    assert costs["truncated, last 3 steps", 16] == 16 + 1 + 2 * 3
    assert costs["truncated, last 3 steps", 1] == costs["MAML", 1] == 4


def test_table_1(example, tmp_path, capsys):
    settings = "--tasks 2 --features 6 --samples 8 --conditions 10 40 160 --condition 10 --steps 4 8 16 32 --cg-steps 6"
    slopes, compute, memory = example("table_1").main(small(tmp_path, settings))
    assert slopes["GradientDescent"] == pytest.approx(1.0, abs=0.15)
    assert slopes["Nesterov"] == pytest.approx(0.5, abs=0.15)
    assert f"{slopes['Nesterov']:.3f}" in capsys.readouterr().out
    assert len(compute) == len(numbers(tmp_path / "table_1_steps.csv")) == 6
    assert len(memory) == len(numbers(tmp_path / "table_1_memory.csv")) == 24
    assert (tmp_path / "table_1.png").stat().st_size > 0

    def column(method, solver, name):
        return [row[name] for row in memory if (row["method"], row["solver"]) == (method, solver)]

    for solver in ("GradientDescent", "Nesterov"):
        assert len(set(column("iMAML", solver, "peak_bytes"))) == 1
        unrolled = column("MAML", solver, "peak_bytes")
        growth = [b - a for a, b in pairwise(unrolled)]
        assert growth[2] == pytest.approx(2 * growth[1], rel=0.1)
        assert growth[1] > 0
        for method in ("iMAML", "MAML"):
            errors = column(method, solver, "relative_error")
            assert errors == sorted(errors, reverse=True)


def test_table_1_says_when_a_solver_does_not_arrive(example, tmp_path):
    with pytest.raises(RuntimeError, match="did not come within 1e-300 of the solution; use a larger δ or smaller κ"):
        example("table_1").main(small(tmp_path, "--tasks 1 --features 3 --samples 4 --conditions 3 --goal 1e-300"))


def test_error_bound(example, tmp_path):
    settings = "--tasks 2 --features 5 --samples 12 --steps 1 8 64 --cg-steps 1 3"
    rows = example("error_bound").main(small(tmp_path, settings))
    assert len(rows) == len(numbers(tmp_path / "error_bound.csv")) == 2 * 2 * 3 * 3
    assert (tmp_path / "error_bound.png").stat().st_size > 0
    assert max(row["error"] / row["sharp_bound"] for row in rows) <= 1
    assert all(row["sharp_bound"] <= row["bound"] for row in rows)
    for problem in ("quadratic", "logistic"):
        mine = [row for row in rows if row["problem"] == problem and row["task"] == 0]
        direct = [row for row in mine if row["linear_solver"] == "direct"]
        deltas = [row["delta"] for row in direct]
        assert deltas == sorted(deltas, reverse=True)
        assert max(row["delta_prime"] for row in direct) < 1e-12
        # With the inner problem solved, what is left is the linear solver's.
        last = [row for row in mine if row["inner_steps"] == 64 and row["linear_solver"] == "CG, 1 steps"]
        assert last[0]["error"] == pytest.approx(last[0]["delta_prime"], rel=0.1)


@pytest.mark.parametrize("seed", range(3))
def test_the_constants_of_the_logistic_problem_bound_what_they_should(example, seed):
    """μ, L, ρ and B against Hessians and gradients of PyTorch's own loss at random points."""
    torch.manual_seed(seed)
    problem = example("error_bound").logistic(features=4, samples=9, strength=0.2)
    x, y, query, targets = (part[0] for part in problem.episode)

    def loss(phi, x=x, y=y):
        return problem.loss(x @ phi, y[:, 0])

    def outer(phi):
        return loss(phi, query, targets)

    start = problem.model.weight.detach().flatten()
    inner = torch.func.grad(loss)(problem.solution) + problem.strength * (problem.solution - start)
    assert inner.norm() < 1e-12
    points = torch.randn(6, 4, dtype=torch.float64) * 2
    hessians = [torch.func.hessian(loss)(point) for point in points]
    for point, hessian in zip(points, hessians, strict=True):
        torch.testing.assert_close(problem.hessian(point), hessian)
        torch.testing.assert_close(problem.query_gradient(point), torch.func.grad(outer)(point))
        assert torch.linalg.eigvalsh(hessian)[0] + problem.strength >= problem.convexity
        assert torch.linalg.eigvalsh(torch.func.hessian(outer)(point))[-1] <= problem.smoothness
        assert torch.func.grad(outer)(point).norm() <= problem.slope_bound
        for other, another in zip(points, hessians, strict=True):
            change = torch.linalg.matrix_norm(hessian - another, ord=2)
            assert change <= problem.hessian_lipschitz * (point - other).norm() + 1e-14
