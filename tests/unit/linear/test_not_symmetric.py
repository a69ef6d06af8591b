"""Solvers of systems that are not symmetric, against SciPy, dense solves and a fixed point of dynamic programming."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from torch import Tensor

from lightning_imaml.linear import GMRES, BiCGStab, ConjugateGradient, LinearOperator, NormalCG


def skewed(tasks: int, size: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(tasks, size, size, generator=generator, dtype=torch.float64)
    return noise / size**0.5 + 2 * torch.eye(size, dtype=torch.float64)


def operator_of(matrix: Tensor) -> LinearOperator:
    def times(matrix: Tensor):
        return lambda v: (matrix @ v.unsqueeze(2)).squeeze(2)

    return LinearOperator(times(matrix), symmetric=False, transposed_product=times(matrix.mT))


def rhs(tasks: int, size: int) -> Tensor:
    return torch.randn(tasks, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def true_residual(matrix: Tensor, b: Tensor, x: Tensor) -> Tensor:
    return (b - (matrix @ x.unsqueeze(2)).squeeze(2)).norm(dim=1) / b.norm(dim=1)


SOLVERS = [GMRES(12), GMRES(60, restart=5), BiCGStab(40), NormalCG(40), GMRES(60, 8, 1e-10), BiCGStab(60, 1e-10)]


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_the_dense_solution_is_reached(solver):
    matrix, b = skewed(3, 12), rhs(3, 12)
    found = solver.solve(operator_of(matrix), b)
    torch.testing.assert_close(found.value, torch.linalg.solve(matrix, b), rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(found.residual, true_residual(matrix, b, found.value), rtol=1e-3, atol=1e-13)


@pytest.mark.parametrize("steps", [1, 2, 5, 9])
def test_gmres_takes_the_iterates_of_scipy(steps):
    matrix, b = skewed(3, 12), rhs(3, 12)
    found = GMRES(steps).solve(operator_of(matrix), b)
    for i in range(3):
        expected, _ = scipy.sparse.linalg.gmres(
            matrix[i].numpy(), b[i].numpy(), rtol=0, atol=0, restart=steps, maxiter=1
        )
        np.testing.assert_allclose(found.value[i].numpy(), expected, rtol=1e-9, atol=1e-12)
    assert found.steps.tolist() == [steps + 1] * 3


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_restarted_gmres_takes_the_iterates_of_scipy(steps):
    matrix, b = skewed(2, 12), rhs(2, 12)
    found = GMRES(3 * steps, restart=steps).solve(operator_of(matrix), b)
    for i in range(2):
        expected, _ = scipy.sparse.linalg.gmres(
            matrix[i].numpy(), b[i].numpy(), rtol=0, atol=0, restart=steps, maxiter=3
        )
        np.testing.assert_allclose(found.value[i].numpy(), expected, rtol=1e-8, atol=1e-11)
    assert found.steps.tolist() == [3 * steps + 3] * 2


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_bicgstab_takes_the_iterates_of_scipy(steps):
    matrix, b = skewed(3, 12), rhs(3, 12)
    found = BiCGStab(steps).solve(operator_of(matrix), b)
    for i in range(3):
        expected, _ = scipy.sparse.linalg.bicgstab(matrix[i].numpy(), b[i].numpy(), rtol=0, atol=0, maxiter=steps)
        np.testing.assert_allclose(found.value[i].numpy(), expected, rtol=1e-8, atol=1e-11)
    assert found.steps.tolist() == [2 * steps + 1] * 3


@pytest.mark.parametrize("steps", [1, 3, 6])
def test_normal_cg_takes_the_iterates_of_lsqr(steps):
    matrix, b = skewed(3, 12), rhs(3, 12)
    found = NormalCG(steps).solve(operator_of(matrix), b)
    for i in range(3):
        expected = scipy.sparse.linalg.lsqr(matrix[i].numpy(), b[i].numpy(), atol=0, btol=0, iter_lim=steps)[0]
        np.testing.assert_allclose(found.value[i].numpy(), expected, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("solver", [GMRES(30, None, 1e-6), BiCGStab(30, 1e-6), NormalCG(60, 1e-8)], ids=str)
def test_each_task_stops_by_itself_and_a_finished_one_stays(solver):
    matrix = torch.stack([torch.eye(12, dtype=torch.float64) * 3, skewed(1, 12)[0], skewed(1, 12, 4)[0]])
    b = torch.cat([rhs(2, 12), torch.zeros(1, 12, dtype=torch.float64)])
    found = solver.solve(operator_of(matrix), b)
    assert found.steps[2] == 0
    assert found.steps[0] < found.steps[1]
    assert found.converged.tolist() == [True, True, True] or isinstance(solver, NormalCG)
    alone = [solver.solve(operator_of(matrix[i : i + 1]), b[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(found.value, torch.cat([one.value for one in alone]), rtol=1e-10, atol=1e-12)
    assert found.steps.tolist() == [int(one.steps) for one in alone]


@pytest.mark.parametrize("solver", [GMRES(6), BiCGStab(6), NormalCG(6)], ids=str)
def test_a_singular_system_and_a_product_that_is_not_finite_are_told(solver):
    matrix = torch.stack([torch.diag(torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64)), skewed(1, 3)[0]])
    b = torch.ones(2, 3, dtype=torch.float64)
    found = solver.solve(operator_of(matrix), b)
    assert found.value.isfinite().all()
    assert found.converged.tolist() == [False, True]
    torch.testing.assert_close(found.residual, true_residual(matrix, b, found.value), rtol=1e-3, atol=1e-12)
    matrix[0, 0, 0] = torch.nan
    broken = solver.solve(operator_of(matrix), b)
    assert broken.residual[0].isnan()
    assert broken.converged.tolist() == [False, True]


def test_a_rotation_stops_bicgstab_and_not_gmres():
    """bᵀAb = 0: the first division of BiCGSTAB is by zero."""
    matrix = torch.tensor([[[0.0, 1.0], [-1.0, 0.0]]], dtype=torch.float64)
    b = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    stopped = BiCGStab(10).solve(operator_of(matrix), b)
    assert not stopped.converged
    assert stopped.indefinite
    torch.testing.assert_close(stopped.residual, torch.ones(1, dtype=torch.float64))
    found = GMRES(2).solve(operator_of(matrix), b)
    torch.testing.assert_close(found.value, torch.tensor([[0.0, 1.0]], dtype=torch.float64))


def test_soft_value_iteration_takes_six_products():
    """A = I − γ P_π of 20 random decision processes of 10 states, 5 actions and discount 0.9."""
    generator = torch.Generator().manual_seed(0)
    kernel = torch.rand(20, 10, 5, 10, generator=generator, dtype=torch.float64)
    kernel, rewards = kernel / kernel.sum(-1, keepdim=True), torch.rand(20, 10, 5, generator=generator).double()
    values = torch.zeros(20, 10, dtype=torch.float64)
    for _ in range(400):
        quality = rewards + 0.9 * torch.einsum("tsan,tn->tsa", kernel, values)
        values = quality.logsumexp(dim=-1)
    policy = quality.softmax(dim=-1)
    system = torch.eye(10, dtype=torch.float64) - 0.9 * torch.einsum("tsa,tsan->tsn", policy, kernel)
    found = GMRES(5).solve(operator_of(system).transpose, torch.full((20, 10), 0.1, dtype=torch.float64))
    assert found.steps.tolist() == [6] * 20
    assert (found.residual <= 1e-3).all()
    with pytest.raises(ValueError, match="must be symmetric"):
        ConjugateGradient(5).solve(operator_of(system), values)


@pytest.mark.parametrize(
    ("solver", "settings", "message"),
    [
        (GMRES, {"max_iter": 0}, "max_iter must be at least 1"),
        (GMRES, {"restart": 0}, "restart must be at least 1 or"),
        (BiCGStab, {"rtol": -1.0}, "rtol must be zero or positive"), (NormalCG, {"check_every": 0}, "check_every"),
    ],
)  # fmt: skip
def test_settings_are_checked(solver, settings, message):
    with pytest.raises(ValueError, match=message):
        solver(**settings)
