"""The interface of inner problems is enough for the implicit gradient, whatever the condition F is."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_imaml.inner import InnerSolution, InnerSolver
from lightning_imaml.linear import ConjugateGradient, Direct, LinearOperator
from lightning_imaml.meta_gradients import Implicit
from lightning_imaml.problems.base import InnerProblem, Linearization
from lightning_imaml.problems.network import FlatModel
from lightning_imaml.problems.supervised import TaskLoss

T, D = 3, 4


def times(matrix: Tensor, rows: Tensor) -> Tensor:
    return (matrix @ rows.unsqueeze(2)).squeeze(2)


@dataclass(frozen=True, eq=False)
class Affine(InnerProblem):
    """F_i(φ) = M_i φ − N θ, with matrices M_i that are not symmetric."""

    network: FlatModel
    matrices: Tensor
    mixing: Tensor
    initial: Tensor
    rates = {}  # noqa: RUF012

    @property
    def tasks(self) -> int:
        return len(self.matrices)

    @property
    def rows(self) -> FlatModel:
        return self.network

    def start(self) -> Tensor:
        return self.initial.expand(self.tasks, -1).contiguous()

    def residual(self, parameters: Tensor) -> Tensor:
        return times(self.matrices, parameters) - self.mixing @ self.initial

    def linearize(self, parameters: Tensor, curvature: object) -> Linearization:
        product = LinearOperator(
            lambda v: times(self.matrices, v), symmetric=False, transposed_product=lambda v: times(self.matrices.mT, v)
        )
        return Linearization(parameters.new_zeros(self.tasks), self.residual(parameters), product)

    def pull_back(self, parameters: Tensor, u: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return (u @ self.mixing).sum(dim=0), {}

    def meta_parameters(self) -> dict[str, Tensor]:
        return {}

    def with_meta_parameters(self, initial, values):
        return replace(self, initial=initial)


@dataclass(frozen=True)
class Solved(InnerSolver):
    """Solves an affine problem at once, by PyTorch."""

    steps: int = 1
    tol: float = 0.0

    def solve(self, problem, parameters, differentiable_steps=0):
        return InnerSolution(torch.linalg.solve(problem.matrices, problem.mixing @ problem.initial), torch.ones(T))


@pytest.fixture
def given() -> tuple[Affine, TaskLoss]:
    torch.manual_seed(0)
    network = FlatModel(nn.Linear(D, 1, bias=False).double())
    draw = dict(dtype=torch.float64)  # noqa: C408
    matrices = torch.randn(T, D, D, **draw) + 4 * torch.eye(D, **draw)
    problem = Affine(network, matrices, torch.randn(D, D, **draw), torch.randn(D, **draw))
    return problem, TaskLoss(network, F.mse_loss, torch.randn(T, 5, D, **draw), torch.randn(T, 5, 1, **draw))


def test_the_implicit_gradient_of_any_condition_is_that_of_autograd_through_its_solution(given):
    problem, query = given
    found = Implicit(Direct()).estimate(problem, query, Solved())
    theta = problem.initial.clone().requires_grad_()
    solutions = torch.linalg.solve(problem.matrices, problem.mixing @ theta)
    loss = (torch.einsum("tnd,td->tn", query.inputs, solutions) - query.targets.squeeze(2)).square().mean(dim=1)
    (expected,) = torch.autograd.grad(loss.sum(), theta)
    torch.testing.assert_close(found.initial, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.residual, torch.zeros(T, dtype=torch.float64), rtol=0, atol=1e-12)


def test_a_solver_that_cannot_solve_the_system_says_so(given):
    with pytest.raises(ValueError, match="ConjugateGradient: the operator must be symmetric"):
        Implicit(ConjugateGradient()).estimate(*given, Solved())


def test_the_residual_norm_has_no_graph(given):
    problem, _ = given
    point = problem.start().requires_grad_()
    norm = problem.residual_norm(point)
    torch.testing.assert_close(norm, problem.residual(point).detach().norm(dim=1))
    assert not norm.requires_grad
