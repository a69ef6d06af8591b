"""Faster ways to run a network: taken where they give the same, and nowhere else."""

from __future__ import annotations

import threading

import pytest
import torch
from conftest import class_episode
from torch import nn
from torch.func import functional_call, hessian, jacrev
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from lightning_imaml import curvature, tasks
from lightning_imaml.channels_last import ChannelsLast
from lightning_imaml.curvature import GaussNewton
from lightning_imaml.functional import adapt
from lightning_imaml.inner import GradientDescent, HessianFree
from lightning_imaml.models import Conv4
from lightning_imaml.regularizers import Proximal
from lightning_imaml.tasks import FlatModel, InnerProblem, TaskLoss
from lightning_imaml.trials import gives_the_same

IMAGES = class_episode(2, ways=3, queries=1, shots=2, shape=(1, 12, 12))


class ViewNet(nn.Module):
    """Flattens by ``view``, which images with the channels innermost do not have."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 4, 3), nn.Linear(400, 3)

    def forward(self, images):
        return self.head(torch.relu(self.conv(images)).view(len(images), -1))


class Cubed(torch.autograd.Function):
    """A user's own function without a derivative in forward mode."""

    generate_vmap_rule = True

    @staticmethod
    def forward(values):
        return values**3

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, slope):
        return 3 * ctx.saved_tensors[0] ** 2 * slope


class CubedNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, values):
        return self.second(Cubed.apply(self.first(values)))


class StoppedNet(nn.Module):
    """A part of it is not differentiated, which forward mode does not see."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, values):
        with torch.no_grad():
            hidden = torch.tanh(self.first(values))
        return self.second(hidden + 0 * self.first(values))


def problem_of(network, episode, chosen=slice(None)):
    flat = FlatModel(network)
    dtype = flat.dtype
    support = TaskLoss(flat, F.cross_entropy, episode.support_inputs[chosen].to(dtype), episode.support_targets[chosen])
    return InnerProblem(support, Proximal(0.7), flat.initial(), {})


def product_and_matrix(network, episode):
    """Gauss-Newton products of two tasks, and the matrices from PyTorch's own Jacobian and Hessian."""
    problem = problem_of(network, episode)
    flat = problem.support.model
    point = problem.start() + 0.1 * torch.randn_like(problem.start())
    vector = torch.randn_like(point)
    with torch.no_grad():
        product = GaussNewton().linearize(problem, point).product(vector)
    matrices = []
    for row, inputs, targets in zip(point, problem.support.inputs, problem.support.targets, strict=True):

        def outputs(p, inputs=inputs):
            return functional_call(network, flat.unflatten(p), (inputs,))

        out = outputs(row)
        jacobian = jacrev(outputs)(row).flatten(0, 1)
        bend = hessian(lambda o, targets=targets: F.cross_entropy(o, targets))(out).reshape(out.numel(), -1)
        matrices.append(jacobian.T @ bend @ jacobian + 0.7 * torch.eye(len(row), dtype=row.dtype))
    return product, vector, matrices


@pytest.mark.parametrize(
    ("network", "shape", "forward"),
    [
        (Conv4(3, filters=2, image_size=12), (1, 12, 12), True),
        (CubedNet(), (3,), False),
    ],
    ids=["batch norm", "no forward derivative"],
)
def test_gauss_newton_products_equal_the_dense_matrix(network, shape, forward, monkeypatch):
    torch.manual_seed(0)
    answers = []
    monkeypatch.setattr(curvature, "gives_the_same", lambda *args: answers.append(gives_the_same(*args)) or answers[-1])
    ways = 3 if len(shape) > 1 else 2
    product, vector, matrices = product_and_matrix(
        network.double(), class_episode(2, ways=ways, queries=1, shots=2, shape=shape)
    )
    assert answers == [forward]
    for found, matrix, direction in zip(product, matrices, vector, strict=True):
        torch.testing.assert_close(found, matrix @ direction, rtol=1e-9, atol=1e-11)


def test_products_of_a_random_network_are_those_of_one_draw():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 2)).double()
    problem = problem_of(network, class_episode(2, ways=2, queries=1, shots=3, shape=(3,)))
    point = problem.start()
    vectors = torch.eye(point.shape[1], dtype=torch.float64)
    product = GaussNewton().linearize(problem, point).product
    matrix = torch.stack([product(vector.expand(2, -1))[0] for vector in vectors])
    torch.testing.assert_close(matrix, matrix.T, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(product(vectors[:2]), product(vectors[:2]), rtol=0, atol=0)


def test_threads_may_multiply_side_by_side():
    torch.manual_seed(0)
    problem = problem_of(Conv4(3, filters=2, image_size=12).double(), IMAGES)
    linearization = GaussNewton().linearize(problem, problem.start())
    expected, found = linearization.product(linearization.gradient), []

    def multiply():
        found.extend(linearization.product(linearization.gradient) for _ in range(20))

    threads = [threading.Thread(target=multiply) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 80
    for product in found:
        torch.testing.assert_close(product, expected, rtol=1e-12, atol=1e-14)


def test_a_stopped_derivative_stays_stopped():
    torch.manual_seed(0)
    network = StoppedNet().double()
    problem = problem_of(network, class_episode(2, ways=2, queries=1, shots=2, shape=(3,)))
    product = GaussNewton().linearize(problem, problem.start()).product
    vector = problem.support.model.unflatten(torch.randn_like(problem.start()))
    first = {name: part if "first" in name else torch.zeros_like(part) for name, part in vector.items()}
    along = problem.support.model.flatten(first)
    torch.testing.assert_close(product(along), 0.7 * along)  # λ alone.


def layouts(network, run):
    """Whether each convolution's images had the channels innermost while something ran."""
    seen = []
    hooks = [
        layer.register_forward_hook(lambda *call: seen.append(call[-1].stride(-3) == 1))
        for layer in network.modules()
        if isinstance(layer, nn.Conv2d)
    ]
    run()
    for hook in hooks:
        hook.remove()
    return seen


def test_one_task_has_the_channels_innermost_and_several_do_not():
    network = nn.Sequential(*Conv4(3, filters=2, image_size=12).features[:9], nn.Flatten(), nn.Linear(8, 3))
    one, both = (problem_of(network, IMAGES, chosen) for chosen in (slice(1), slice(None)))
    with torch.no_grad():
        one.gradient(one.start())
        again = layouts(network, lambda: one.gradient(one.start()))
        batched = layouts(network, lambda: both.gradient(both.start()))
        value = layouts(network, lambda: one.value(one.start()))
    assert again == value == [True] * 3
    assert not any(batched)


def test_what_is_differentiated_twice_does_not():
    network = nn.Sequential(*Conv4(3, filters=2, image_size=12).features[:9], nn.Flatten(), nn.Linear(8, 3))
    problem = problem_of(network, IMAGES, slice(1))
    point = problem.start().requires_grad_()
    assert layouts(network, lambda: problem.gradient(point)) == [False] * 3


@pytest.mark.parametrize("solver", [GradientDescent(0.1, 3), HessianFree(2, curvature=GaussNewton())], ids=str)
def test_adaptation_is_that_without_it(solver, monkeypatch):
    torch.manual_seed(0)
    network = Conv4(3, filters=4, image_size=12)
    with_it = adapt(network, IMAGES.support_inputs, IMAGES.support_targets, inner_solver=solver, chunk_size=1)
    monkeypatch.setattr(tasks, "gives_the_same", lambda *_: False)
    monkeypatch.setattr(curvature, "gives_the_same", lambda *_: False)
    double = network.double()
    without = adapt(double, IMAGES.support_inputs.double(), IMAGES.support_targets, inner_solver=solver, chunk_size=1)
    for name, expected in without.parameters.items():
        torch.testing.assert_close(with_it.parameters[name].double(), expected, rtol=1e-4, atol=1e-4)


def test_a_network_that_cannot_is_left_as_it_is():
    network = ViewNet()
    problem = problem_of(network, class_episode(1, ways=3, queries=1, shots=2, shape=(1, 12, 12)))
    with torch.no_grad():
        gradient = problem.gradient(problem.start())
        assert layouts(network, lambda: problem.gradient(problem.start())) == [False]
    with pytest.raises(RuntimeError, match="view"), ChannelsLast():
        network(problem.support.inputs[0])
    named = {name: p.squeeze(0) for name, p in problem.support.model.unflatten(gradient).items()}
    F.cross_entropy(network(problem.support.inputs[0]), problem.support.targets[0]).backward()
    torch.testing.assert_close(named, {name: p.grad for name, p in network.named_parameters()})


def test_a_trial_takes_no_random_numbers():
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Dropout(0.5), nn.Flatten(), nn.Linear(200, 3))
    problem = problem_of(network, IMAGES, slice(1))
    states = []
    for _ in range(2):  # The second time without the trial.
        torch.manual_seed(0)
        with torch.no_grad():
            problem.gradient(problem.start())
            GaussNewton().linearize(problem, problem.start())
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_a_trial_is_made_once_and_says_no_where_outputs_differ():
    network, runs = nn.Linear(1, 1), []

    def give(faster, own):
        return lambda: runs.append(own) or (torch.full((2,), faster), torch.full((2,), own))

    for _ in range(2):
        assert gives_the_same(network, "equal", give(1.0 + 1e-5, 1.0))
        assert not gives_the_same(network, "other", give(1.01, 1.0))
        assert not gives_the_same(network, "whole numbers", give(2, 1))
    assert len(runs) == 3


def test_counters_do_not_see_a_trial():
    problem = problem_of(Conv4(3, filters=2, image_size=12), IMAGES)
    counts = []
    for _ in range(2):  # The second time without the trial.
        with FlopCounterMode(display=False) as counter:
            GaussNewton().linearize(problem, problem.start())
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
