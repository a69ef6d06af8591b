"""Faster ways to run networks of well-known layers: the same results, and no other network takes them."""

from __future__ import annotations

import functools
import subprocess
import sys
import threading

import pytest
import torch
from conftest import class_episode
from dense_curvature import dense
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional as F

from lightning_imaml.curvature import GaussNewton, forward_mode
from lightning_imaml.functional import adapt, meta_gradient
from lightning_imaml.inner import GradientDescent, HessianFree
from lightning_imaml.meta_gradients import FirstOrder
from lightning_imaml.models import MLP, Conv4, ResNet12, WideResNet, add_low_rank_adapters
from lightning_imaml.problems import network as network_rows
from lightning_imaml.problems.network import FlatModel
from lightning_imaml.problems.stock_layers import has_stock_layers_alone
from lightning_imaml.problems.supervised import SupervisedProblem, TaskLoss
from lightning_imaml.regularizers import Proximal

IMAGES = class_episode(2, ways=3, queries=1, shots=2, shape=(1, 12, 12))


def small_conv4(**settings):
    torch.manual_seed(0)
    return Conv4(3, filters=2, image_size=12, **settings)


def three_blocks():
    """A Conv4 whose last images still have several places, so that their order of memory shows."""
    return nn.Sequential(*small_conv4().features[:9], nn.Flatten(), nn.Linear(8, 3))


def every_layer():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2, track_running_stats=False), nn.ELU(), nn.GELU(),
        nn.MaxPool2d(2), nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.LeakyReLU(0.1), nn.SiLU(),
        nn.AvgPool2d(2), nn.Dropout2d(0.5).eval(), nn.Softplus(), nn.AdaptiveAvgPool2d(2), nn.Identity(), nn.Flatten(),
        nn.LayerNorm(16), nn.Sigmoid(), nn.Linear(16, 8), nn.BatchNorm1d(8, track_running_stats=False), nn.Tanh(),
        nn.Dropout(0.5).eval(), nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 3),
    )  # fmt: skip


class Own(nn.Module):
    """A network of a user's own: a part of it is not differentiated, which forward mode would not see."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(144, 4), nn.Linear(4, 3)

    def forward(self, images):
        values = images.flatten(1)
        with torch.no_grad():
            hidden = torch.tanh(self.first(values))
        return self.second(hidden + 0 * self.first(values))


class SubclassedConv4(Conv4):
    """Its forward pass may be any."""


def random_network():
    return nn.Sequential(nn.Flatten(), nn.Linear(144, 8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 3))


def hooked():
    network = small_conv4()
    network.features[0].register_forward_hook(lambda *call: None)
    return network


def with_a_forward_of_its_own():
    network = small_conv4()
    network.classifier.forward = lambda values: F.linear(values, network.classifier.weight.detach())
    return network


def parametrized():
    network = small_conv4()
    nn.utils.parametrize.register_parametrization(network.classifier, "weight", nn.Identity())
    return network


STOCK = {
    "Conv4": small_conv4,
    "support statistics": lambda: small_conv4(norm="support"),
    "max-pool": lambda: Conv4(3, filters=2, image_size=16, downsampling="max-pool"),
    "MLP": lambda: MLP(144, 3),
    "ResNet12": lambda: ResNet12(3, channels=1, widths=(2, 2, 2, 2)),
    "WideResNet": lambda: WideResNet(3, channels=1, depth=10, width=1),
    "adapters": lambda: add_low_rank_adapters(small_conv4(), rank=1),
    "every layer": every_layer,
    "dropout of nothing": lambda: nn.Sequential(nn.Flatten(), nn.Linear(144, 3), nn.Dropout(0.0)),
}
OTHERS = {
    "own": Own,
    "subclass": lambda: SubclassedConv4(3, filters=2, image_size=12),
    "random": random_network,
    "hook": hooked,
    "own forward": with_a_forward_of_its_own,
    "parametrized": parametrized,
    "in place": lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(144, 3)),
}


def problem_of(network, episode=IMAGES, chosen=slice(None)):
    flat = FlatModel(network)
    support = TaskLoss(
        flat, F.cross_entropy, episode.support_inputs[chosen].to(flat.dtype), episode.support_targets[chosen]
    )
    return SupervisedProblem(support, Proximal(0.7), flat.initial(), {})


@pytest.fixture
def passes(monkeypatch):
    """Which passes were in forward mode and took nothing to be differentiated twice."""
    seen = []
    outputs = TaskLoss.outputs

    def spy(self, parameters, first_order_only=False):
        seen.append((forward_ad._current_level >= 0, first_order_only))
        return outputs(self, parameters, first_order_only)

    monkeypatch.setattr(TaskLoss, "outputs", spy)
    return seen


@pytest.mark.parametrize("name", STOCK | OTHERS)
def test_what_counts_as_well_known(name):
    assert has_stock_layers_alone((STOCK | OTHERS)[name]()) == (name in STOCK)


def test_a_network_is_judged_as_it_stands():
    network = random_network()
    assert has_stock_layers_alone(network.eval())
    assert not has_stock_layers_alone(network.train())
    network[2].p = 0.0
    assert has_stock_layers_alone(network)
    handle = network[1].register_full_backward_hook(lambda *call: None)
    assert not has_stock_layers_alone(network)
    handle.remove()
    assert has_stock_layers_alone(network)


@pytest.mark.parametrize("name", ["Conv4", "support statistics", "adapters", "every layer", "parametrized"])
def test_gauss_newton_products_equal_the_dense_matrix(name, passes):
    network = (STOCK | OTHERS)[name]().double()
    problem = problem_of(network)
    flat = problem.support.model
    torch.manual_seed(1)
    point = problem.start() + 0.1 * torch.randn_like(problem.start())
    vector = torch.randn_like(point)
    with torch.no_grad():
        product = GaussNewton().linearize(problem, point).product(vector)
    assert passes == [(False, True), (True, True)] if name in STOCK else passes == [(False, False)]
    for row, inputs, targets, found, direction in zip(
        point, problem.support.inputs, problem.support.targets, product, vector, strict=True
    ):
        matrix = dense(GaussNewton(), F.cross_entropy, network, flat, row, inputs, targets)
        torch.testing.assert_close(found, matrix @ direction, rtol=1e-8, atol=1e-10)


def test_products_of_a_random_network_are_those_of_one_draw():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 2)).double()
    problem = problem_of(network, class_episode(2, ways=2, queries=1, shots=3, shape=(3,)))
    product = GaussNewton().linearize(problem, problem.start()).product
    vectors = torch.eye(problem.start().shape[1], dtype=torch.float64)
    matrix = torch.stack([product(vector.expand(2, -1))[0] for vector in vectors])
    assert not torch.allclose(matrix, 0.7 * torch.eye(len(matrix), dtype=torch.float64))
    torch.testing.assert_close(matrix, matrix.T, rtol=1e-12, atol=1e-12)


def test_a_stopped_derivative_stays_stopped():
    torch.manual_seed(0)
    problem = problem_of(Own().double())
    product = GaussNewton().linearize(problem, problem.start()).product
    vector = problem.support.model.unflatten(torch.randn_like(problem.start()))
    first = {name: part if "first" in name else torch.zeros_like(part) for name, part in vector.items()}
    along = problem.support.model.flatten(first)
    torch.testing.assert_close(product(along), 0.7 * along)  # λ alone.


def test_threads_may_multiply_side_by_side():
    problem = problem_of(small_conv4().double())
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


def test_within_a_forward_mode_of_the_users_own():
    problem = problem_of(small_conv4().double())
    expected = GaussNewton().linearize(problem, problem.start())
    with forward_ad.dual_level():
        found = GaussNewton().linearize(problem, problem.start())
        product = found.product(found.gradient)
    torch.testing.assert_close(product, expected.product(expected.gradient), rtol=1e-10, atol=1e-12)


def test_the_first_product_warns_of_nothing():
    code = """
import warnings
import torch
from lightning_imaml.curvature import GaussNewton
from lightning_imaml.functional import adapt
from lightning_imaml.inner import HessianFree
from lightning_imaml.models import MLP
warnings.simplefilter("error")
solver = HessianFree(1, curvature=GaussNewton())
adapt(MLP(2, 2), torch.rand(2, 4, 2), torch.arange(2).repeat(2, 2), inner_solver=solver)
print("done")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "done\n", done.stderr


def innermost(network, run):
    """Whether each convolution's images had the channels innermost while something ran."""
    seen = []

    def noted(layer, *args):
        images = nn.Conv2d._conv_forward(layer, *args)
        seen.append(images.stride(1) == 1)
        return images

    for layer in network.modules():
        if type(layer) is nn.Conv2d:  # Not by a hook, which would be a reason for the way of all networks.
            layer._conv_forward = functools.partial(noted, layer)
    run()
    return seen


def test_one_task_has_the_channels_last_and_several_do_not():
    network = three_blocks()
    one, both = (problem_of(network, chosen=chosen) for chosen in (slice(1), slice(None)))
    with torch.no_grad():
        assert innermost(network, lambda: one.gradient(one.start())) == [True] * 3
        assert innermost(network, lambda: one.value(one.start())) == [True] * 3
        assert innermost(network, lambda: both.gradient(both.start())) == [False] * 3


def test_the_query_gradient_of_one_task_has_the_channels_last():
    network = three_blocks()
    episode = IMAGES.take(torch.tensor([0]))
    solver = GradientDescent(0.1, 1)
    run = lambda: meta_gradient(network, episode, inner_solver=solver, estimator=FirstOrder())  # noqa: E731
    run()  # The size of a chunk is measured once.
    assert innermost(network, run) == [True] * 9  # One step, the query loss, the residual.


def test_what_is_differentiated_twice_has_not():
    network = three_blocks()
    problem = problem_of(network, chosen=slice(1))
    point = problem.start().requires_grad_()
    assert innermost(network, lambda: problem.gradient(point)) == [False] * 3


@pytest.mark.parametrize("make", [OTHERS["subclass"], lambda: three_blocks().double()], ids=["own", "float64"])
def test_another_network_and_another_dtype_have_not(make):
    network = make()
    problem = problem_of(network, chosen=slice(1))
    with torch.no_grad():
        assert not any(innermost(network, lambda: problem.gradient(problem.start()))[:3])


@pytest.mark.parametrize("name", ["Conv4", "support statistics", "WideResNet", "every layer"])
@pytest.mark.parametrize("solver", [GradientDescent(0.1, 3), HessianFree(2, 2, curvature=GaussNewton())], ids=str)
def test_adaptation_is_that_of_all_networks(name, solver, monkeypatch):
    torch.manual_seed(0)
    network = STOCK[name]()
    asked = []
    for module in (network_rows, forward_mode):
        monkeypatch.setattr(module, "has_stock_layers_alone", lambda _: asked.append(True) or True)
    support = IMAGES.support_inputs, IMAGES.support_targets
    with_it = adapt(network, *support, inner_solver=solver, chunk_size=1)
    assert asked
    for module in (network_rows, forward_mode):
        monkeypatch.setattr(module, "has_stock_layers_alone", lambda _: False)
    without = adapt(network.double(), support[0].double(), support[1], inner_solver=solver, chunk_size=1)
    for parameter, expected in without.parameters.items():
        torch.testing.assert_close(with_it.parameters[parameter].double(), expected, rtol=1e-4, atol=1e-4)


def test_a_loss_gets_images_in_the_order_that_it_knows():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.Conv2d(2, 2, 3, padding=1))
    images = IMAGES.support_inputs[:1]
    targets = images.expand(-1, -1, 2, -1, -1).contiguous()

    def loss(outputs, targets):
        return (outputs.view(len(outputs), -1) - targets.view(len(targets), -1)).square().mean()

    for solver in (GradientDescent(0.1, 2), HessianFree(1, curvature=GaussNewton())):
        adapted = adapt(network, images, targets, loss=loss, inner_solver=solver)
        assert adapted.residual.isfinite().all()
