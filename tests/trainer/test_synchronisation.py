"""How often the host waits for the device within a solve, and that the results do not depend on it."""

from __future__ import annotations

import dataclasses
from math import ceil

import pytest
import torch
from conftest import TanhNet, regression_episode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_imaml.inner import GradientDescent, HessianFree, Nesterov, TorchOptimizer
from lightning_imaml.linear import ConjugateGradient, Direct, MinRes, Neumann
from lightning_imaml.problems.network import FlatModel
from lightning_imaml.problems.supervised import SupervisedProblem, TaskLoss
from lightning_imaml.regularizers import FullProximal, KroneckerProximal, LowRankProximal, Proximal

ATEN = torch.ops.aten
# Those whose result, or its shape, the host has to know.
WAITING = {
    ATEN._local_scalar_dense, ATEN.item, ATEN.is_nonzero, ATEN.equal, ATEN.nonzero, ATEN.masked_select,
    ATEN._linalg_check_errors,
}  # fmt: skip
LINE_SEARCH = 12


class Waits(TorchDispatchMode):
    """Count the operations for which the host would wait for a device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        masks = func.overloadpacket is ATEN.index and any(i is not None and i.dtype == torch.bool for i in args[1])
        self.count += masks or func.overloadpacket in WAITING
        return func(*args, **(kwargs or {}))


@pytest.fixture
def problem():
    torch.manual_seed(0)
    episode, flat = regression_episode(), FlatModel(TanhNet().double())
    support = TaskLoss(flat, F.mse_loss, episode.support_inputs, episode.support_targets)
    return SupervisedProblem(support, Proximal(2.0), flat.initial(), {})


def inner(solver, problem):
    with Waits() as waits:
        solution = solver.solve(problem, problem.start())
    return solution, waits.count


def linear(solver):
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(3, 10, 10, generator=generator, dtype=torch.float64)
    matrix, rhs = root @ root.mT + torch.eye(10), torch.randn(3, 10, generator=generator, dtype=torch.float64)
    rhs[0] = matrix[0, 0]  # Done after other numbers of iterations than the others.
    matrix[0] = torch.eye(10)
    with Waits() as waits:
        solution = solver.solve(lambda v: (matrix @ v.unsqueeze(2)).squeeze(2), rhs)
    return solution, waits.count


def test_what_is_counted():
    with Waits() as waits:
        x = torch.ones(3)
        bool(x.any()), float(x[0]), x[x > 0], x.nonzero(), torch.equal(x, x)
        x[torch.tensor([0])], x.sum(), torch.where(x > 0, x, 0)
    assert waits.count == 5


INNER = [
    GradientDescent(0.2, 60),
    Nesterov(0.2, 60),
    TorchOptimizer(torch.optim.SGD, 60, {"lr": 0.2, "momentum": 0.1}),
]
LINEAR = [ConjugateGradient(30), ConjugateGradient(30, jacobi_probes=2), MinRes(30)]


def kind(solver):
    return type(solver).__name__


@pytest.mark.parametrize("solver", INNER, ids=kind)
def test_inner_loops_without_tolerance_never_wait(problem, solver):
    assert inner(solver, problem)[1] == 0


@pytest.mark.parametrize("solver", [*LINEAR, Neumann(30), Neumann(30, rtol=1e-3), Direct()], ids=repr)
def test_linear_solvers_without_tolerance_never_wait(solver):
    assert linear(solver)[1] == 0


@pytest.mark.parametrize("regularizer", [FullProximal(), KroneckerProximal(), LowRankProximal(rank=2)], ids=kind)
def test_matrices_never_wait(problem, regularizer):
    strengths, row = regularizer.init(problem.support.model), problem.start()
    bound = regularizer.for_layout(problem.support.model.layout)
    with Waits() as waits:
        bound.solve(bound.multiply(row, strengths), strengths)
    assert waits.count == 0


@pytest.mark.parametrize("solver", INNER, ids=kind)
@pytest.mark.parametrize("tol", [1e-3, 1e-30])
def test_inner_loops_wait_at_the_cadence_and_give_the_same(problem, solver, tol):
    solver = dataclasses.replace(solver, tol=tol)
    expected, waits = inner(solver, problem)
    taken = int(expected.steps.max())
    assert (taken < solver.steps) == (tol == 1e-3)
    # Each task's gradient is small before the step that it does not take.
    assert waits == min(solver.steps, taken + 1)
    for every in (2, 7, 60, 1000):
        found, waits = inner(dataclasses.replace(solver, check_every=every), problem)
        assert waits == min(ceil((taken + 1) / every), solver.steps // every) <= ceil(solver.steps / every)
        assert torch.equal(found.parameters, expected.parameters)
        assert torch.equal(found.steps, expected.steps)


@pytest.mark.parametrize("solver", LINEAR, ids=repr)
@pytest.mark.parametrize("rtol", [1e-3, 1e-300])
def test_linear_solvers_wait_at_the_cadence_and_give_the_same(solver, rtol):
    solver = dataclasses.replace(solver, rtol=rtol)
    expected, waits = linear(solver)
    assert 1 <= waits < solver.max_iter
    assert len(set(expected.steps.tolist())) > 1
    for every in (2, 7, 30, 1000):
        found, fewer = linear(dataclasses.replace(solver, check_every=every))
        assert fewer <= ceil(waits / every)
        for name, value in expected._asdict().items():
            assert torch.equal(getattr(found, name), value), name


def test_an_early_exit_saves_products():
    calls = []

    def matvec(v):
        calls.append(v)
        return 3 * v

    for solver in (ConjugateGradient(50, rtol=1e-6), MinRes(50, rtol=1e-6)):
        calls.clear()
        assert solver.solve(matvec, torch.ones(2, 4)).converged.all()
        assert len(calls) <= 2


@pytest.mark.parametrize("tol", [0.0, 1e-6])
def test_hessian_free_waits_at_the_cadence_and_gives_the_same(problem, tol):
    """Its line search looks after every so many tries, whatever the tolerance, since looking saves forward passes."""
    solver = HessianFree(15, tol=tol)
    expected, waits = inner(solver, problem)
    taken = int(expected.steps.max())
    steps = taken + (taken < solver.steps)
    assert (taken < solver.steps) == (tol > 0)
    assert steps <= waits <= steps * LINE_SEARCH
    for every in (3, LINE_SEARCH, 1000):
        found, fewer = inner(dataclasses.replace(solver, check_every=every), problem)
        tries = ceil(steps / every) * every * (LINE_SEARCH - 1) // every
        assert fewer <= min(waits, tries + (ceil(steps / every) if tol else 0))
        assert torch.equal(found.parameters, expected.parameters)
        assert torch.equal(found.steps, expected.steps)
    assert fewer == 0


@pytest.mark.parametrize("make", [lambda n: GradientDescent(0.1, 5, check_every=n), lambda n: MinRes(check_every=n)])
def test_a_cadence_below_one_is_refused(make):
    with pytest.raises(ValueError, match=r"check_every must be at least 1; found 0\. Use 1"):
        make(0)
