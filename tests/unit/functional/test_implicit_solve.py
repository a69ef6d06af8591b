"""Implicit gradients of fixed points, roots and equilibria: finite differences, closed forms and dense solves."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import scipy.optimize
import torch
from torch import Tensor, nn

from lightning_imaml.functional import solve
from lightning_imaml.inner import Anderson, GradientDescent, HessianFree, Newton
from lightning_imaml.linear import GMRES, BiCGStab, ConjugateGradient, Direct, NormalCG
from lightning_imaml.problems import Equilibrium, FixedPoint, Root

NEWTON = Newton(Direct(), steps=30, tol=1e-12)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Planner(nn.Module):
    """Rewards and logits of transitions of a decision process with S states and A actions."""

    def __init__(self, states: int = 4, actions: int = 3) -> None:
        super().__init__()
        self.rewards = nn.Parameter(draw(states, actions))
        self.logits = nn.Parameter(draw(states, actions, states, seed=1))


@dataclass(frozen=True)
class SoftValue(FixedPoint):
    """V = log Σ_a exp(r + b + γ P V), with a bonus b of each task."""

    discount: float = 0.8

    def start(self, network, inputs):
        return inputs.new_zeros(len(inputs))

    def map(self, solution, network, inputs):
        quality = network.rewards + inputs + self.discount * network.logits.softmax(-1) @ solution
        return quality.logsumexp(dim=-1)


BONUS = draw(3, 4, 3, seed=2)


def loss_of(value: Tensor) -> Tensor:
    return (value * torch.linspace(-1, 2, value.numel(), dtype=value.dtype).view_as(value)).sum()


def value_of(network: nn.Module) -> Tensor:
    return solve(network, SoftValue(), BONUS, inner_solver=NEWTON).value


def differences(function, parameter: Tensor, eps: float = 1e-5) -> Tensor:
    """Central differences of a scalar function in every entry of a parameter."""
    found = torch.zeros_like(parameter)
    for k in range(parameter.numel()):
        entry = parameter.data.view(-1)
        before = entry[k].item()
        sides = []
        for sign in (1, -1):
            entry[k] = before + sign * eps
            sides.append(function())
        entry[k] = before
        found.view(-1)[k] = (sides[0] - sides[1]) / (2 * eps)
    return found


@pytest.mark.parametrize("linear", [GMRES(12), BiCGStab(20), NormalCG(20), Direct()], ids=str)
def test_soft_value_iteration_has_the_gradient_of_finite_differences(linear):
    network = Planner()
    found = solve(network, SoftValue(), BONUS, inner_solver=NEWTON, linear_solver=linear)
    assert found.converged.all()
    loss_of(found.value).backward()
    for parameter in network.parameters():
        expected = differences(
            lambda: loss_of(solve(network, SoftValue(), BONUS, inner_solver=NEWTON).value.detach()), parameter
        )
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-6, atol=1e-7)


def test_the_derivative_of_the_value_in_the_rewards_is_the_discounted_occupancy():
    """d(μᵀV*)/dr = μᵀ(I − γP_π)⁻¹ π: by a dense solve."""
    network, start = Planner(), torch.full((4,), 0.25, dtype=torch.float64)
    value = solve(network, SoftValue(), BONUS[:1], inner_solver=NEWTON).value[0]
    (start @ value).backward()
    kernel = network.logits.detach().softmax(-1)
    policy = (network.rewards.detach() + BONUS[0] + 0.8 * kernel @ value.detach()).softmax(-1)
    moves = torch.einsum("sa,sat->st", policy, kernel)
    visits = torch.linalg.solve((torch.eye(4, dtype=torch.float64) - 0.8 * moves).T, start)
    torch.testing.assert_close(network.rewards.grad, visits[:, None] * policy, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(network.rewards.grad.sum(), torch.tensor(5.0, dtype=torch.float64), rtol=1e-8, atol=0)


SOLVERS = [GradientDescent(1.0, 300, 1e-12), Anderson(5, 60, 1e-12), NEWTON, Newton(GMRES(4), 30, 1e-12)]


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_every_solver_finds_the_same_fixed_point(solver):
    found = solve(Planner(), SoftValue(), BONUS, inner_solver=solver)
    expected = torch.zeros(3, 4, dtype=torch.float64)
    network = Planner()
    for _ in range(300):  # A plain loop.
        quality = (
            network.rewards + BONUS[:, :, :] + 0.8 * torch.einsum("sat,nt->nsa", network.logits.softmax(-1), expected)
        )
        expected = quality.logsumexp(-1)
    torch.testing.assert_close(found.value, expected, rtol=1e-10, atol=1e-10)


def test_anderson_takes_fewer_steps_than_picard():
    picard, anderson = GradientDescent(1.0, 300, tol=1e-10), Anderson(5, 300, 1e-10)
    steps = [solve(Planner(), SoftValue(), BONUS, inner_solver=solver).steps for solver in (picard, anderson)]
    assert (steps[1] < steps[0] / 2).all()


def test_the_tasks_do_not_depend_on_one_another():
    together = solve(Planner(), SoftValue(), BONUS, inner_solver=Anderson(3, 40, 1e-12))
    for k in range(3):
        alone = solve(Planner(), SoftValue(), BONUS[k : k + 1], inner_solver=Anderson(3, 40, 1e-12))
        torch.testing.assert_close(together.value[k], alone.value[0], rtol=1e-12, atol=1e-12)
        assert together.steps[k] == alone.steps[0]


@dataclass(frozen=True)
class Kepler(Root):
    """E − e sin E = M."""

    def start(self, network, inputs):
        return {"anomaly": inputs["mean"].clone()}

    def residual(self, solution, network, inputs):
        anomaly = solution["anomaly"]
        return {"anomaly": anomaly - network.weight[0, 0] * anomaly.sin() - inputs["mean"]}


def test_a_root_has_its_closed_form_gradient_in_parameters_and_inputs():
    network = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(network.weight, 0.6)
    mean = torch.tensor([[0.3], [1.2], [2.5]], dtype=torch.float64, requires_grad=True)
    anomaly = solve(network, Kepler(), {"mean": mean}, inner_solver=NEWTON).value["anomaly"]
    for k in range(3):
        of_task = float(mean.detach()[k])
        root = scipy.optimize.brentq(lambda x, m=of_task: x - 0.6 * np.sin(x) - m, 0, 4, xtol=1e-14)
        assert anomaly[k].item() == pytest.approx(root, rel=1e-10)
    anomaly.sum().backward()
    slope = 1 / (1 - 0.6 * anomaly.detach().cos())
    torch.testing.assert_close(mean.grad, slope, rtol=1e-8, atol=0)
    torch.testing.assert_close(network.weight.grad[0, 0], (slope * anomaly.detach().sin()).sum(), rtol=1e-8, atol=0)


class Filter(nn.Module):
    """The log precision of a quadratic energy."""

    def __init__(self) -> None:
        super().__init__()
        self.log_precision = nn.Parameter(draw(5))


@dataclass(frozen=True)
class Wiener(Root):
    """The gradient of ½‖x − y‖² + ½ xᵀ diag(p) x, whose minimum is y / (1 + p)."""

    def start(self, network, inputs):
        return inputs.clone()

    def residual(self, solution, network, inputs):
        return solution - inputs + network.log_precision.exp() * solution


def test_a_quadratic_energy_has_its_closed_form():
    network, noisy = Filter(), draw(3, 5, seed=4)
    found = solve(network, Wiener(), noisy, inner_solver=NEWTON).value
    loss_of(found).backward()
    leaf = network.log_precision.detach().requires_grad_()
    expected = noisy / (1 + leaf.exp())
    torch.testing.assert_close(found.detach(), expected.detach(), rtol=1e-10, atol=1e-12)
    (gradient,) = torch.autograd.grad(loss_of(expected), leaf)
    torch.testing.assert_close(network.log_precision.grad, gradient, rtol=1e-8, atol=1e-10)


class Features(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(draw(3, seed=5).abs() + 0.5)


@dataclass(frozen=True)
class ProximalTD(Equilibrium):
    """Temporal differences with a stopped target: ½ E[(r + γ φᵀx' − φᵀx)²] + λ/2 ‖φ‖²."""

    stop: bool = False

    def start(self, network, inputs):
        return torch.zeros_like(network.scale)

    def loss(self, live, frozen, network, inputs):
        now, after, reward = inputs
        target = reward + 0.9 * (after * network.scale) @ (frozen.detach() if self.stop else frozen)
        error = target - (now * network.scale) @ live
        return error.square().mean() / 2 + 0.5 * live.square().sum() / 2


TRANSITIONS = draw(2, 8, 3, seed=6), draw(2, 8, 3, seed=7), draw(2, 8, seed=8)


def test_an_equilibrium_has_the_gradient_of_its_dense_solution_and_detach_has_not():
    network = Features()
    found = solve(network, ProximalTD(), TRANSITIONS, inner_solver=NEWTON)
    loss_of(found.value).backward()
    scale = network.scale.detach().requires_grad_()
    now, after, reward = TRANSITIONS
    now, after = now * scale, after * scale
    matrix = now.mT @ (now - 0.9 * after) / 8 + 0.5 * torch.eye(3, dtype=torch.float64)
    expected = torch.linalg.solve(matrix, (now.mT @ reward.unsqueeze(2)).squeeze(2) / 8)
    torch.testing.assert_close(found.value.detach(), expected.detach(), rtol=1e-9, atol=1e-11)
    (gradient,) = torch.autograd.grad(loss_of(expected), scale)
    torch.testing.assert_close(network.scale.grad, gradient, rtol=1e-8, atol=1e-9)
    network.zero_grad()
    picard = GradientDescent(0.5, 3000, tol=1e-12)
    stopped = solve(network, ProximalTD(stop=True), TRANSITIONS, inner_solver=picard)
    torch.testing.assert_close(stopped.value, found.value, rtol=1e-8, atol=1e-9)  # The same solution …
    loss_of(stopped.value).backward()
    assert (network.scale.grad - gradient).norm() > 0.05 * gradient.norm()  # … and another gradient.


def test_backward_again_and_again_and_accumulated():
    network = Planner()
    value = solve(network, SoftValue(), BONUS, inner_solver=NEWTON).value
    loss_of(value).backward(retain_graph=True)
    once = network.rewards.grad.clone()
    loss_of(value).backward()
    torch.testing.assert_close(network.rewards.grad, 2 * once)


def test_memory_does_not_grow_with_the_steps():
    saved: list[int] = []
    for steps in (2, 50):
        kept = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal kept
            kept += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            solve(Planner(), SoftValue(), BONUS, inner_solver=GradientDescent(1.0, steps))
        saved.append(kept)
    assert saved[0] == saved[1]


@dataclass(frozen=True)
class Faulty(FixedPoint):
    kind: str = "shape"

    def start(self, network, inputs):
        return inputs.long() if self.kind == "integers" else inputs.clone()

    def map(self, solution, network, inputs):
        moved = 0.1 * network.rewards.sum() * solution
        faults = {"shape": moved[:1], "dtype": moved.float(), "diverging": 1e200 * moved.exp(), "integers": moved}
        return faults[self.kind]


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("shape", ValueError, "Faulty must give the structure"),
        ("dtype", ValueError, "Faulty must give the structure, shapes and dtype of its solution"),
        ("diverging", FloatingPointError, r"the residual of the inner problem must be finite.*tasks \[0, 1, 2\]"),
        ("integers", ValueError, "start must return floating-point tensors of one dtype; found torch.int64"),
    ],
)  # fmt: skip
def test_what_cannot_be_right_is_refused(kind, error, message):
    with pytest.raises(error, match=message):
        solve(Planner(), Faulty(kind), BONUS, inner_solver=GradientDescent(1.0, 5))


@dataclass(frozen=True)
class Constant(Root):
    def start(self, network, inputs):
        return inputs.clone()

    def residual(self, solution, network, inputs):
        return network.rewards + 0 * inputs


@dataclass(frozen=True)
class Singular(Root):
    def start(self, network, inputs):
        return inputs.clone()

    def residual(self, solution, network, inputs):
        return 0 * (solution - inputs) + 0 * network.rewards


def test_a_condition_without_its_solution_and_a_singular_one_are_told():
    value = solve(Planner(), Constant(), BONUS, inner_solver=GradientDescent(1.0, 1)).value
    with pytest.raises(ValueError, match="Constant must depend on its solution"):
        value.sum().backward()
    value = solve(Planner(), Singular(), BONUS, inner_solver=GradientDescent(1.0, 1)).value
    with pytest.warns(UserWarning, match=r"GMRES should leave little of the implicit system; found .* 1.0e\+00"):
        value.sum().backward()


def test_solvers_that_do_not_fit_say_so():
    with pytest.raises(TypeError, match=r"HessianFree: the inner problem must minimise.*Use Newton or Anderson"):
        solve(Planner(), SoftValue(), BONUS, inner_solver=HessianFree(3))
    value = solve(Planner(), SoftValue(), BONUS, inner_solver=NEWTON, linear_solver=ConjugateGradient()).value
    with pytest.raises(ValueError, match=r"ConjugateGradient: the operator must be symmetric.*Use GMRES\(\)"):
        value.sum().backward()
    with pytest.raises(ValueError, match="the network must have a trainable parameter"):
        solve(nn.Identity(), SoftValue(), BONUS, inner_solver=NEWTON)
