"""Linear solvers against SciPy and dense solves."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from torch import Tensor

from lightning_imaml.linear import ConjugateGradient, Direct, MinRes, Neumann


def spd(tasks: int, size: int, seed: int = 0, condition: float = 50.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(tasks, size, size, generator=generator, dtype=torch.float64))
    values = torch.linspace(1, condition, size, dtype=torch.float64)
    return (q * values) @ q.mT


def matvec_of(matrix: Tensor):
    return lambda v: (matrix @ v.unsqueeze(2)).squeeze(2)


def _keep(iterates: list[np.ndarray]):
    return lambda x: iterates.append(x.copy())


def rhs(tasks: int, size: int) -> Tensor:
    return torch.randn(tasks, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("steps", [1, 2, 5, 9])
def test_cg_takes_the_iterates_of_scipy(steps):
    matrix, b = spd(3, 12), rhs(3, 12)
    ours = ConjugateGradient(max_iter=steps).solve(matvec_of(matrix), b)
    for i in range(3):
        iterates: list[np.ndarray] = []
        scipy.sparse.linalg.cg(matrix[i].numpy(), b[i].numpy(), rtol=0, atol=0, maxiter=steps, callback=_keep(iterates))
        np.testing.assert_allclose(ours.value[i].numpy(), iterates[steps - 1], rtol=1e-10, atol=1e-12)
    assert ours.steps.tolist() == [steps] * 3
    true = (b - matvec_of(matrix)(ours.value)).norm(dim=1) / b.norm(dim=1)
    torch.testing.assert_close(ours.residual, true, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("solver", [ConjugateGradient(max_iter=60, rtol=1e-12), MinRes(60, 1e-12), Direct()])
def test_solvers_reach_the_dense_solution(solver):
    matrix, b = spd(3, 12), rhs(3, 12)
    solution = solver.solve(matvec_of(matrix), b)
    torch.testing.assert_close(solution.value, torch.linalg.solve(matrix, b), rtol=1e-9, atol=1e-11)
    assert solution.converged.all()
    assert not solution.indefinite.any()


def badly_scaled(tasks: int, size: int) -> Tensor:
    scale = torch.logspace(0, 2, size, dtype=torch.float64)
    return scale[:, None] * spd(tasks, size, condition=3.0) * scale


def test_jacobi_estimates_the_diagonal():
    matrix = badly_scaled(2, 10)
    inverse = ConjugateGradient(jacobi_probes=4000, damping=0.5)._jacobi(matvec_of(matrix), rhs(2, 10))
    true = matrix.diagonal(dim1=1, dim2=2) + 0.5
    large = true > true.mean(dim=1, keepdim=True) / 10
    torch.testing.assert_close(1 / inverse[large], true[large], rtol=0.1, atol=0)
    torch.testing.assert_close(1 / inverse[:, 0], (1 / inverse).amin(dim=1))


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_preconditioned_cg_takes_the_iterates_of_scipy(steps):
    matrix, b = badly_scaled(3, 12), rhs(3, 12)
    solver = ConjugateGradient(max_iter=steps, jacobi_probes=8)
    ours, inverse = solver.solve(matvec_of(matrix), b), solver._jacobi(matvec_of(matrix), b)
    for i in range(3):
        iterates: list[np.ndarray] = []
        scipy.sparse.linalg.cg(
            matrix[i].numpy(), b[i].numpy(), rtol=0, atol=0, maxiter=steps, M=np.diag(inverse[i].numpy()),
            callback=_keep(iterates),
        )  # fmt: skip
        np.testing.assert_allclose(ours.value[i].numpy(), iterates[steps - 1], rtol=1e-9, atol=1e-12)
    assert ours.steps.tolist() == [8 + steps] * 3
    true = (b - matvec_of(matrix)(ours.value)).norm(dim=1) / b.norm(dim=1)
    torch.testing.assert_close(ours.residual, true, rtol=1e-8, atol=1e-12)


def test_jacobi_solves_a_diagonal_system_at_once_and_a_badly_scaled_one_sooner():
    diagonal = torch.diag_embed(torch.rand(2, 12, dtype=torch.float64) + 0.1)
    state = torch.get_rng_state()
    once = ConjugateGradient(max_iter=1, jacobi_probes=1).solve(matvec_of(diagonal), rhs(2, 12))
    assert (once.residual < 1e-12).all()
    assert torch.equal(state, torch.get_rng_state())
    matrix, b = badly_scaled(3, 40), rhs(3, 40)
    plain, jacobi = (
        ConjugateGradient(max_iter=400, rtol=1e-8, jacobi_probes=probes).solve(matvec_of(matrix), b)
        for probes in (0, 10)
    )
    assert jacobi.converged.all()
    torch.testing.assert_close(jacobi.value, torch.linalg.solve(matrix, b), rtol=1e-4, atol=1e-8)
    assert (jacobi.steps < plain.steps).all()


def test_jacobi_on_a_singular_or_indefinite_system_stays_finite():
    matrix, b = torch.cat([symmetric(2, 8), torch.zeros(1, 8, 8, dtype=torch.float64)]), rhs(3, 8)
    solution = ConjugateGradient(max_iter=8, jacobi_probes=3).solve(matvec_of(matrix), b)
    assert solution.value.isfinite().all()
    assert solution.residual.isfinite().all()
    assert solution.indefinite[2]


def symmetric(tasks: int, size: int) -> Tensor:
    matrix = torch.randn(tasks, size, size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return matrix + matrix.mT


@pytest.mark.parametrize("steps", [1, 2, 5, 9])
def test_minres_takes_the_iterates_of_scipy_on_indefinite_systems(steps):
    matrix, b = symmetric(3, 12), rhs(3, 12)
    ours = MinRes(max_iter=steps).solve(matvec_of(matrix), b)
    for i in range(3):
        iterates: list[np.ndarray] = []
        scipy.sparse.linalg.minres(
            matrix[i].numpy(), b[i].numpy(), rtol=1e-300, maxiter=steps, callback=_keep(iterates)
        )
        np.testing.assert_allclose(ours.value[i].numpy(), iterates[steps - 1], rtol=1e-8, atol=1e-10)
    true = (b - matvec_of(matrix)(ours.value)).norm(dim=1) / b.norm(dim=1)
    torch.testing.assert_close(ours.residual, true, rtol=1e-8, atol=1e-10)


def test_minres_solves_indefinite_systems_and_tells_them_apart():
    matrix, b = torch.cat([symmetric(2, 8), spd(1, 8)]), rhs(3, 8)
    solution = MinRes(max_iter=40, rtol=1e-10).solve(matvec_of(matrix), b)
    torch.testing.assert_close(solution.value, torch.linalg.solve(matrix, b), rtol=1e-7, atol=1e-8)
    assert solution.converged.all()
    assert solution.indefinite.tolist() == [True, True, False]


def test_minres_ends_at_the_least_residual_of_a_singular_system():
    matrix = torch.diag(torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64)).unsqueeze(0)
    solution = MinRes(max_iter=10, rtol=1e-12).solve(matvec_of(matrix), torch.ones(1, 3, dtype=torch.float64))
    assert solution.value.isfinite().all()
    assert not solution.converged.item()
    torch.testing.assert_close(solution.residual, torch.tensor([3.0], dtype=torch.float64).rsqrt(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("step", [None, 1 / 60])
def test_neumann_is_the_series(step):
    matrix, b = spd(3, 12), rhs(3, 12)
    solution = Neumann(terms=7, step=step).solve(matvec_of(matrix), b)
    largest = torch.linalg.eigvalsh(matrix)[:, -1]
    if step is None:  # Its own estimate is below 2/λ_max, and not far below 1/λ_max.
        long = Neumann(terms=4000, rtol=1e-8).solve(matvec_of(matrix), b)
        assert long.converged.all()
        torch.testing.assert_close(long.value, torch.linalg.solve(matrix, b), rtol=1e-5, atol=1e-7)
        assert solution.steps.tolist() == [12] * 3
    else:
        assert (step < 2 / largest).all()
        power, total = b.clone(), torch.zeros_like(b)
        for _ in range(7):
            total, power = total + step * power, power - step * matvec_of(matrix)(power)
        torch.testing.assert_close(solution.value, total, rtol=1e-10, atol=1e-12)
        assert solution.steps.tolist() == [7] * 3
    true = (b - matvec_of(matrix)(solution.value)).norm(dim=1) / b.norm(dim=1)
    torch.testing.assert_close(solution.residual, true, rtol=1e-9, atol=1e-12)


def test_a_neumann_series_that_grows_is_stopped():
    matrix, b = torch.cat([spd(1, 6, condition=10.0), -spd(1, 6)]), rhs(2, 6)
    solution = Neumann(terms=50, step=0.15, rtol=1e-3).solve(matvec_of(matrix), b)
    assert solution.converged.tolist() == [True, False]
    assert solution.indefinite.tolist() == [False, True]
    assert solution.value.isfinite().all()
    assert solution.residual[1].item() == 1.0


def test_damping_is_added_to_the_diagonal():
    matrix, b = spd(2, 8), rhs(2, 8)
    solution = ConjugateGradient(max_iter=40, rtol=1e-12, damping=3.0).solve(matvec_of(matrix), b)
    dense = torch.linalg.solve(matrix + 3.0 * torch.eye(8, dtype=torch.float64), b)
    torch.testing.assert_close(solution.value, dense, rtol=1e-9, atol=1e-11)


def test_every_task_stops_by_itself():
    easy = torch.eye(10, dtype=torch.float64).expand(1, -1, -1) * 2
    matrix, b = torch.cat([easy, spd(1, 10)]), rhs(2, 10)
    solution = ConjugateGradient(max_iter=30, rtol=1e-10).solve(matvec_of(matrix), b)
    assert solution.steps[0] == 1
    assert solution.steps[1] >= 9
    assert solution.converged.all()
    torch.testing.assert_close(solution.value, torch.linalg.solve(matrix, b), rtol=1e-8, atol=1e-9)


def test_iterations_after_the_solution_do_not_make_a_definite_system_indefinite():
    """As with a regulariser alone, where the support loss is flat: each iteration squares what rounding left."""
    b = torch.ones(1, 2)
    for diagonal in (torch.tensor([0.01, 0.01]), torch.tensor([1e-3, 1.0])):
        solution = ConjugateGradient(max_iter=20).solve(lambda v, d=diagonal: d * v, b)
        assert not solution.indefinite.any()
        assert solution.converged.all()
        torch.testing.assert_close(solution.value, b / diagonal, rtol=1e-5, atol=0)


def test_negative_curvature_keeps_the_iterate_and_says_so():
    indefinite = torch.diag(torch.tensor([4.0, 1.0, -2.0], dtype=torch.float64))
    matrix = torch.stack([indefinite, torch.eye(3, dtype=torch.float64)])
    b = torch.tensor([[1.0, 1.0, 0.5], [1.0, 2.0, 3.0]], dtype=torch.float64)
    solution = ConjugateGradient(max_iter=10).solve(matvec_of(matrix), b)
    assert solution.indefinite.tolist() == [True, False]
    assert solution.converged.tolist() == [False, True]
    assert solution.value.isfinite().all()
    # The kept iterate is that of the positive steps alone.
    before = ConjugateGradient(max_iter=int(solution.steps[0]) - 1).solve(matvec_of(matrix[:1]), b[:1])
    torch.testing.assert_close(solution.value[0], before.value[0])
    torch.testing.assert_close(solution.value[1], b[1])


def test_indefinite_from_the_first_direction_gives_zero_and_says_so():
    b = torch.ones(1, 3, dtype=torch.float64)
    solution = ConjugateGradient().solve(lambda v: -v, b)
    assert solution.indefinite.item()
    assert not solution.converged.item()
    assert solution.value.eq(0).all()
    assert solution.residual.item() == 1.0


@pytest.mark.parametrize("solver", [ConjugateGradient(max_iter=4), MinRes(max_iter=4), Neumann(4, step=0.01)])
def test_a_zero_right_hand_side_is_solved_without_a_step(solver):
    solution = solver.solve(matvec_of(spd(2, 5)), torch.zeros(2, 5, dtype=torch.float64))
    assert solution.steps.tolist() == [0, 0]
    assert solution.converged.all()
    assert solution.value.eq(0).all()


@pytest.mark.parametrize("solver", [ConjugateGradient(max_iter=4), MinRes(max_iter=4), Neumann(4), Direct()])
def test_a_product_or_a_right_hand_side_that_is_not_finite_is_not_called_solved(solver):
    matrix, b = spd(2, 5), rhs(2, 5)
    matrix[0, 0, 0] = torch.nan
    solution = solver.solve(matvec_of(matrix), b)
    assert solution.residual.isfinite().tolist() == [False, True]
    assert not solution.converged[0]
    b[1, 2] = torch.nan
    solution = solver.solve(matvec_of(spd(2, 5)), b)
    assert solution.residual.isfinite().tolist() == [True, False]


def test_a_finished_task_is_not_touched_by_later_products():
    """Its product may overflow once the task is over; the value must stay."""
    matrix, b = torch.cat([3 * torch.eye(6, dtype=torch.float64).unsqueeze(0), spd(1, 6)]), rhs(2, 6)
    calls = 0

    def matvec(v: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        product = matvec_of(matrix)(v)
        if calls > 1:
            product[0] = float("nan")
        return product

    solution = ConjugateGradient(max_iter=6, rtol=1e-12).solve(matvec, b)
    torch.testing.assert_close(solution.value[0], b[0] / 3)
    assert solution.converged.all()
    torch.testing.assert_close(solution.value[1], torch.linalg.solve(matrix[1], b[1]), rtol=1e-8, atol=1e-9)


def test_direct_solves_indefinite_systems_and_says_so():
    matrix = torch.diag(torch.tensor([1.0, -2.0], dtype=torch.float64)).unsqueeze(0)
    solution = Direct().solve(matvec_of(matrix), torch.ones(1, 2, dtype=torch.float64))
    torch.testing.assert_close(solution.value, torch.tensor([[1.0, -0.5]], dtype=torch.float64))
    assert solution.indefinite.item()
    assert solution.converged.item()


SINGULAR = [ConjugateGradient(20), MinRes(20), Neumann(20), Direct()]


@pytest.mark.parametrize("solver", SINGULAR, ids=lambda solver: type(solver).__name__)
def test_a_singular_system_ends_with_an_honest_status_and_leaves_the_others_alone(solver):
    """b has a part outside the range of diag(2, 0): no x can bring the residual below ‖(0, 1)‖ / ‖(1, 1)‖."""
    matrix = torch.diag_embed(torch.tensor([[2.0, 0.0], [2.0, 1.0]], dtype=torch.float64))
    solution = solver.solve(matvec_of(matrix), torch.ones(2, 2, dtype=torch.float64))
    assert solution.value.isfinite().all()
    residual = (1 - (matrix @ solution.value.unsqueeze(2)).squeeze(2)).norm(dim=1) / 2**0.5
    torch.testing.assert_close(solution.residual, residual, rtol=1e-6, atol=1e-12)
    assert not solution.converged[0]
    assert residual[0] >= 0.5**0.5 - 1e-12
    torch.testing.assert_close(solution.value[1], torch.tensor([0.5, 1.0], dtype=torch.float64), rtol=1e-3, atol=0)


def test_neumann_estimates_its_step_also_where_b_has_nothing_of_the_largest_eigenvalue():
    matrix = torch.diag(torch.tensor([100.0, 1.0, 1.5, 2.0], dtype=torch.float64)).unsqueeze(0)
    b = torch.tensor([[1e-8, 1.0, 1.0, 1.0]], dtype=torch.float64)
    solution = Neumann(4000, rtol=1e-6).solve(matvec_of(matrix), b)
    assert solution.converged.all()
    torch.testing.assert_close(solution.value, torch.linalg.solve(matrix, b), rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"max_iter": 0}, "max_iter must be at least 1; found 0"),
        ({"rtol": -1.0}, "rtol must be zero or positive; found -1.0"),
        ({"damping": -0.5}, "damping must be zero or positive; found -0.5"),
    ],
)
def test_bad_settings_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        ConjugateGradient(**arguments)
