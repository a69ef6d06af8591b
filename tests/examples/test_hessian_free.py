"""The Hessian-free solver reaches gradient descent's stationarity with fewer evaluations."""

from __future__ import annotations

import csv

import hessian_free
import pytest


@pytest.mark.slow  # Conv4-64 as in the documentation, for some seconds.
def test_fewer_evaluations_than_gradient_descent(tmp_path, capsys):
    rows = hessian_free.main(["--tasks", "2", "--strengths", "2.0", "--output", str(tmp_path)])
    descent, *newton = rows
    assert descent["solver"] == "gradient descent"
    assert descent["gradients"] == 16
    assert [row["solver"] for row in newton] == ["Hessian-free, Hessian", "Hessian-free, Gauss-Newton"]
    gauss_newton = newton[1]
    assert gauss_newton["reached"] == 1
    assert gauss_newton["gradients"] + gauss_newton["products"] < 16
    with (tmp_path / "hessian_free.csv").open() as file:
        assert [row["solver"] for row in csv.DictReader(file)] == [row["solver"] for row in rows]
    assert "Gauss-Newton" in capsys.readouterr().out
