"""The indefiniteness example: what it calls indefinite is, and its rows are comparable."""

from __future__ import annotations

import csv
import math

import indefiniteness
import pytest
import torch
from torch.func import functional_call, hessian
from torch.nn import functional as F

from lightning_imaml.curvature import Hessian
from lightning_imaml.data import GlyphDataModule
from lightning_imaml.diagnostics.reference import ExactReference
from lightning_imaml.functional import adapt
from lightning_imaml.linear import Direct
from lightning_imaml.meta_gradients import Implicit


@pytest.fixture
def example(monkeypatch):
    """The experiment with a network small enough for dense matrices."""
    monkeypatch.setattr(indefiniteness, "FILTERS", 2)
    monkeypatch.setattr(indefiniteness, "VALIDATION_TASKS", 8)
    monkeypatch.setattr(indefiniteness, "REFERENCE", ExactReference(steps=4, linear_steps=10, direct_limit=0))
    return indefiniteness


def smallest_eigenvalues(example, model, episode):
    """Of the dense matrices ∇²L(φ) + 2 I, where 16 gradient steps end."""
    rows = adapt(
        model,
        episode.support_inputs,
        episode.support_targets,
        inner_solver=example.INNER_SOLVER,
        regularizer=example.REGULARIZER,
    ).parameters
    names = list(rows)

    def loss(flat, inputs, targets):
        pieces = torch.split(flat, [rows[name][0].numel() for name in names])
        named = {name: piece.view_as(rows[name][0]) for name, piece in zip(names, pieces, strict=True)}
        return F.cross_entropy(functional_call(model, named, (inputs,)), targets)

    smallest = []
    for task in range(episode.tasks):
        flat = torch.cat([rows[name][task].flatten() for name in names])
        dense = hessian(loss)(flat, episode.support_inputs[task], episode.support_targets[task])
        smallest.append(torch.linalg.eigvalsh(dense)[0].item() + 2.0)
    return torch.tensor(smallest)


@pytest.mark.parametrize("direct_limit", [512, 0], ids=["eigenvalues", "lanczos"])
def test_tasks_called_indefinite_have_a_negative_eigenvalue(example, monkeypatch, direct_limit):
    """Against the eigenvalues of the dense matrix, on a network where some tasks are indefinite and some are not."""
    monkeypatch.setattr(example, "REFERENCE", ExactReference(tol=0.0, linear_steps=60, direct_limit=direct_limit))
    model = example.network(0).double()
    episode = next(iter(GlyphDataModule(queries=1, tasks_per_batch=8).train_dataloader()))
    episode = episode._replace(
        support_inputs=episode.support_inputs.double(), query_inputs=episode.query_inputs.double()
    )
    negative = smallest_eigenvalues(example, model, episode) < 0
    reference = example.exact(model, episode, steps=16)
    found = reference.linear.indefinite
    assert found.any()
    assert not negative.all()
    assert not (found & ~negative).any()
    if direct_limit:
        assert torch.equal(found, negative)
    row = example.probe(model, episode, example.METHODS["gauss_newton"], reference)
    assert row["indefinite_share"] == found.double().mean()


def test_a_direct_solve_of_the_exact_system_has_no_error(example, monkeypatch):
    """The method that solves the reference's own system is the reference."""
    monkeypatch.setattr(example, "REFERENCE", ExactReference(tol=0.0))
    model = example.network(0).double()
    episode = next(iter(GlyphDataModule(queries=1, tasks_per_batch=2).train_dataloader()))
    episode = episode._replace(
        support_inputs=episode.support_inputs.double(), query_inputs=episode.query_inputs.double()
    )
    row = example.probe(model, episode, Implicit(Direct(), Hessian()), example.exact(model, episode, steps=16))
    assert row["relative_error"] < 1e-8
    assert row["linear_residual"] < 1e-8


def test_rows_picture_and_table(example, tmp_path):
    sizes = ["--steps", "2", "--every", "1", "--tasks", "2", "--probe-tasks", "1"]
    rows = example.main([*sizes, "--output", str(tmp_path)])
    assert [(row["method"], row["step"]) for row in rows] == [(m, s) for m in example.METHODS for s in range(3)]
    starts = [row for row in rows if row["step"] == 0]
    # All begin with the same network, and are probed on the same tasks.
    for quantity in ("indefinite_share", "accuracy"):
        assert len({row[quantity] for row in starts}) == 1
    # Then they part.
    assert len({row["relative_error"] for row in starts}) == len(starts)
    for row in rows:
        assert math.isnan(row["linear_residual"]) == (row["method"] == "first_order")
        if row["method"] == "minres":  # Its residual never grows.
            assert row["linear_residual"] <= 1 + 1e-6
    assert (tmp_path / "indefiniteness.png").read_bytes().startswith(b"\x89PNG")
    with (tmp_path / "indefiniteness.csv").open() as file:
        saved = list(csv.DictReader(file))
    assert [float(row["accuracy"]) for row in saved] == [row["accuracy"] for row in rows]
    # A method's rows do not depend on which others run, and the seed decides them.
    alone = example.main([*sizes, "--methods", "minres", "--output", str(tmp_path)])
    assert alone == [row for row in rows if row["method"] == "minres"]


def test_the_probe_cannot_have_more_tasks_than_a_batch(example, capsys):
    with pytest.raises(SystemExit):
        example.main(["--tasks", "2", "--probe-tasks", "3"])
    assert "--probe-tasks must be from 1 to --tasks=2; found 3" in capsys.readouterr().err
