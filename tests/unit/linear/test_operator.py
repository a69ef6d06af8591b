"""What a solver is given: symmetric or not, its transpose, its preconditioner."""

from __future__ import annotations

import pytest
import torch

from lightning_imaml.linear import GMRES, ConjugateGradient, Direct, LinearOperator, MinRes, Neumann

SKEWED = torch.tensor([[[2.0, 1.0], [0.0, 3.0]], [[4.0, -1.0], [2.0, 1.0]]], dtype=torch.float64)
RHS = torch.tensor([[1.0, 2.0], [3.0, -1.0]], dtype=torch.float64)


def times(matrix: torch.Tensor):
    return lambda vector: (matrix @ vector.unsqueeze(2)).squeeze(2)


def skewed() -> LinearOperator:
    return LinearOperator(times(SKEWED), symmetric=False, transposed_product=times(SKEWED.mT))


@pytest.mark.parametrize("solver", [ConjugateGradient(2), MinRes(2), Neumann(2)], ids=str)
def test_a_solver_of_symmetric_systems_refuses_another_one_and_names_one_that_can(solver):
    with pytest.raises(ValueError, match=rf"{type(solver).__name__}: the operator must be symmetric.*Use GMRES\(\)"):
        solver.solve(skewed(), RHS)
    assert GMRES().solve(skewed(), RHS).converged.all()  # The remedy works.


def test_the_transpose_is_solved_as_by_pytorch():
    solution = Direct().solve(skewed().transpose, RHS)
    torch.testing.assert_close(solution.value, torch.linalg.solve(SKEWED.mT, RHS))
    twice = Direct().solve(skewed().transpose.transpose, RHS)
    torch.testing.assert_close(twice.value, torch.linalg.solve(SKEWED, RHS))


def test_a_symmetric_operator_is_its_own_transpose():
    operator = LinearOperator(times(SKEWED + SKEWED.mT))
    assert operator.transpose is operator


def test_a_transpose_that_is_not_known_is_asked_for():
    with pytest.raises(ValueError, match="transposed_product must be given where symmetric=False"):
        _ = LinearOperator(times(SKEWED), symmetric=False).transpose


def test_the_operator_brings_the_preconditioner():
    matrix = torch.diag(torch.tensor([1.0, 1e4], dtype=torch.float64)).expand(2, 2, 2)
    exact = LinearOperator(times(matrix), preconditioner=times(torch.linalg.inv(matrix)))
    solution = ConjugateGradient(1, preconditioner="regularizer").solve(exact, RHS)
    torch.testing.assert_close(solution.value, torch.linalg.solve(matrix, RHS))
    with pytest.raises(ValueError, match="must have a regulariser with a matrix"):
        ConjugateGradient(1, preconditioner="regularizer").solve(times(matrix), RHS)
