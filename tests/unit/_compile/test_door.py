"""compile=True: the same results, nothing stale, and a way on where nothing can be compiled."""

from __future__ import annotations

import gc
import weakref
from dataclasses import dataclass

import pytest
import torch
from conftest import TanhNet, class_episode, regression_episode
from torch import nn
from torch.nn import functional as F

from lightning_imaml._compile import door, splitting
from lightning_imaml.callbacks import LiveTensorBytes
from lightning_imaml.curvature import GaussNewton, Hessian
from lightning_imaml.episodes import Episode
from lightning_imaml.functional import adapt, meta_gradient
from lightning_imaml.inner import GradientDescent, HessianFree, Nesterov, TorchOptimizer
from lightning_imaml.linear import ConjugateGradient
from lightning_imaml.meta_gradients import FirstOrder, Implicit, Reptile, Truncated, Unrolled
from lightning_imaml.models import Conv4
from lightning_imaml.regularizers import Proximal, Regularizer

EPISODE = regression_episode()
SETTINGS = {"loss": F.mse_loss, "inner_solver": GradientDescent(0.1, 4), "regularizer": Proximal(1.5)}


@pytest.fixture(autouse=True)
def empty_cache():
    door._kept.clear()


@pytest.fixture
def recorded(monkeypatch):
    """Record and cut graphs, but run them as they are: what the compiler adds is seconds."""
    graphs = []

    def keep(graph):
        graphs.append(graph)
        return graph

    monkeypatch.setattr(splitting, "_inductor", keep)
    return graphs


def same(a, b, rtol=1e-10, atol=1e-12):
    torch.testing.assert_close(a.loss, b.loss, rtol=rtol, atol=atol)
    assert a.grads.keys() == b.grads.keys()
    for name in a.grads:
        torch.testing.assert_close(a.grads[name], b.grads[name], rtol=rtol, atol=atol)
    for name, value in a.adapted.parameters.items():
        torch.testing.assert_close(value, b.adapted.parameters[name], rtol=rtol, atol=atol)


@pytest.mark.parametrize(
    "estimator",
    [Implicit(), Implicit(curvature=GaussNewton()), Unrolled(), Truncated(2), FirstOrder(), Reptile()],
    ids=["hessian", "gauss_newton", "unrolled", "truncated", "first_order", "reptile"],
)
@pytest.mark.parametrize(
    "solver",
    [GradientDescent(0.1, 4), Nesterov(0.1, 4), HessianFree(2), TorchOptimizer(torch.optim.SGD, 3, {"lr": 0.1})],
    ids=["gd", "nesterov", "hessian_free", "sgd"],
)
def test_recorded_graphs_give_the_same(recorded, tanh_net, solver, estimator):
    if isinstance(estimator, (Unrolled, Truncated)) and isinstance(solver, (HessianFree, TorchOptimizer)):
        pytest.skip("these solvers have no derivative")
    learned = not isinstance(estimator, (FirstOrder, Reptile))
    settings = SETTINGS | {"inner_solver": solver, "estimator": estimator, "regularizer": Proximal(1.5, learned)}
    plain = meta_gradient(tanh_net, EPISODE, **settings)
    for _ in range(2):
        same(plain, meta_gradient(tanh_net, EPISODE, compile=True, **settings))
    assert recorded


@pytest.fixture
def runs(monkeypatch):
    """Record and cut graphs, run them as they are, and count how often each runs."""
    counts: dict = {}

    def keep(graph):
        counts[graph] = 0

        def counted(*tensors):
            counts[graph] += 1
            return graph(*tensors)

        return counted

    monkeypatch.setattr(splitting, "_inductor", keep)
    return counts


def runs_with(counts, operation) -> int:
    """How often graphs with an operation have run."""
    found = (graph for graph in counts if any(operation in str(node.target) for node in graph.graph.nodes))
    return sum(counts[graph] for graph in found)


class Body(TanhNet):
    """A head on features that end with an operation of their own, which the compiler does not fuse."""

    def forward(self, inputs):
        return self.out(self.features(inputs).sort(dim=-1).values)

    def features(self, inputs):
        return torch.tanh(self.hidden(inputs))


class Dropped(Body):
    def features(self, inputs):
        return F.dropout(super().features(inputs), 0.5)


class InPlace(Body):
    """Adds something of the head to the features in place."""

    def forward(self, inputs):
        features = self.features(inputs).sort(dim=-1).values
        features.add_(self.out.bias.sum())
        return self.out(features)


class InPlaceBody(Body):
    """In place, but before the head has a say."""

    def features(self, inputs):
        return self.hidden(inputs).relu_()


def adapted_head(net, episode, compile):
    support = episode.support_inputs, episode.support_targets
    solver = GradientDescent(0.1, 9)
    return adapt(net, *support, loss=F.mse_loss, inner_solver=solver, adapt_only=["out.*"], compile=compile).parameters


@pytest.mark.parametrize("kind", [Body, InPlaceBody, InPlace])
def test_features_are_computed_once_where_the_head_alone_adapts(kind, runs):
    """Once to compile and once for the batch; the residual takes what the steps take."""
    torch.manual_seed(0)
    net = kind().double()
    for seed, count in ((0, 2), (1, 3)):
        episode = regression_episode(seed=seed)
        torch.testing.assert_close(adapted_head(net, episode, True), adapted_head(net, episode, False))
        assert runs_with(runs, "sort") == count
    assert max(runs.values()) == 1 + 2 * (9 + 1)


def test_features_that_change_from_step_to_step_are_computed_in_each(runs):
    torch.manual_seed(0)
    adapted_head(Dropped().double(), EPISODE, True)
    assert runs_with(runs, "sort") >= 9 + 1


def test_what_is_computed_once_is_differentiated_through_every_step(runs):
    torch.manual_seed(0)
    net = Body().double()
    settings = {"loss": F.mse_loss, "adapt_only": ["out.*"], "inner_solver": Nesterov(0.1, 4), "estimator": Unrolled()}
    plain, compiled = (meta_gradient(net, EPISODE, compile=compile, **settings) for compile in (False, True))
    same(plain, compiled)
    assert plain.grads["hidden.weight"].abs().max() > 1e-4


@pytest.mark.parametrize("chunk_size", [None, 1])
def test_recorded_convolutions_give_the_same(recorded, chunk_size):
    """With weights that the rows hold in another order, and a network of one task that needs no batching."""
    net = Conv4(3, filters=2, image_size=9).double()
    episode = Episode(*[t.double() if t.is_floating_point() else t for t in class_episode(2, 3, shape=(1, 9, 9))])
    settings = {"estimator": Implicit(curvature=GaussNewton()), "inner_solver": GradientDescent(0.1, 3)}
    plain = meta_gradient(net, episode, **settings)
    same(plain, meta_gradient(net, episode, compile=True, chunk_size=chunk_size, **settings), rtol=1e-8)
    targets = [node.target for graph in recorded for node in graph.graph.nodes]
    assert any(target is torch.ops.aten.convolution.default for target in targets) == (chunk_size == 1)


def test_what_the_vector_does_not_change_is_computed_once(recorded, tanh_net):
    problem = {"estimator": Implicit(ConjugateGradient(5), Hessian())} | SETTINGS
    meta_gradient(tanh_net, EPISODE, compile=True, **problem)
    before, after = recorded[-2:]

    def count(graph, operation):
        return sum(node.target is operation for node in graph.graph.nodes)

    products = (torch.ops.aten.mm.default, torch.ops.aten.bmm.default)
    forward, backward, twice = 2, 3, 4
    assert sum(count(before, product) for product in products) == forward + backward
    assert sum(count(after, product) for product in products) <= forward + backward + twice


def test_unrolled_steps_are_compiled_with_their_derivative(tanh_net):
    settings = SETTINGS | {"inner_solver": GradientDescent(0.1, 2), "estimator": Unrolled()}
    plain = meta_gradient(tanh_net, EPISODE, **settings)
    same(plain, meta_gradient(tanh_net, EPISODE, compile=True, **settings))
    assert any(kept.compiled is not None for kept in door._kept.values())


def convolution() -> tuple[nn.Module, Episode]:
    net = nn.Sequential(nn.Conv2d(2, 3, (3, 2)), nn.Tanh(), nn.Flatten(), nn.Linear(9, 3)).double()
    images = class_episode(2, 3, shape=(2, 5, 2))
    return net, Episode(*[t.double() if t.is_floating_point() else t for t in images])


@pytest.mark.slow  # The compiler itself, twice: recorded graphs alone were right where its gradients were not.
@pytest.mark.parametrize("case", ["head", "convolution"])
def test_compiled_strengths_and_step_sizes_of_each_weight_have_the_eager_gradients(case):
    torch.manual_seed(0)
    net, episode = convolution() if case == "convolution" else (TanhNet().double(), EPISODE)
    settings = {
        "loss": F.cross_entropy if case == "convolution" else F.mse_loss,
        "inner_solver": GradientDescent(0.1, 2, learned=True, per="parameter"),
        "regularizer": Proximal(1.5, learned=True, per="parameter"),
        "estimator": Unrolled(),
        "adapt_only": ["out.*"] if case == "head" else None,
    }
    plain, compiled = (meta_gradient(net, episode, compile=compile, **settings) for compile in (False, True))
    assert all(kept.compiled is not None for kept in door._kept.values())
    same(plain, compiled)


def test_without_a_compiler_one_warning_and_the_same_results(monkeypatch, tanh_net):
    def broken(graph):
        raise RuntimeError("no C++ compiler\nand a long story")

    monkeypatch.setattr(splitting, "_inductor", broken)
    plain = meta_gradient(tanh_net, EPISODE, **SETTINGS)
    with pytest.warns(UserWarning, match=r"compile=True must have .* found RuntimeError: no C\+\+ compiler\. ") as seen:
        again = meta_gradient(tanh_net, EPISODE, compile=True, **SETTINGS)
    assert len(seen) == 1
    same(plain, again)
    same(plain, meta_gradient(tanh_net, EPISODE, compile=True, **SETTINGS))


def test_a_network_that_cannot_be_recorded_runs_as_it_is(recorded):
    class Branching(TanhNet):
        def forward(self, inputs):
            return super().forward(inputs) if inputs.sum() > -1e9 else inputs

    net = Branching().double()
    plain = meta_gradient(net, EPISODE, chunk_size=1, **SETTINGS)
    with pytest.warns(UserWarning, match="Going on without compiling"):
        same(plain, meta_gradient(net, EPISODE, chunk_size=1, compile=True, **SETTINGS))


def test_settings_that_cannot_be_told_apart_are_refused(tanh_net):
    @dataclass
    class Thawed(Regularizer):
        def penalty(self, parameters, initial, strengths):
            return (parameters - initial).square().sum(dim=1)

    with pytest.raises(TypeError, match=r"must be hashable with compile=True.*Make a dataclass of your own frozen"):
        meta_gradient(tanh_net, EPISODE, compile=True, **SETTINGS | {"regularizer": Thawed()})


def test_nothing_is_stale(recorded):
    """New weights, buffers, frozen parameters, modes, losses: each is seen."""

    class Net(TanhNet):
        def __init__(self):
            super().__init__()
            self.dropout = nn.Dropout(0.5)
            self.out.bias.requires_grad_(False)
            self.register_buffer("scale", torch.tensor(1.0))

        def forward(self, inputs):
            return super().forward(self.dropout(inputs)) * self.scale

    net = Net().double().eval()

    def check(**changed):
        settings = SETTINGS | changed
        same(meta_gradient(net, EPISODE, **settings), meta_gradient(net, EPISODE, compile=True, **settings))

    check()
    count = len(recorded)
    with torch.no_grad():
        for tensor in (net.scale, net.out.bias, net.hidden.weight):
            tensor.add_(0.3)
            check()
    assert len(recorded) == count
    check(loss=F.huber_loss)
    assert len(recorded) > count
    count = len(recorded)
    other = Net().double().eval()
    same(meta_gradient(other, EPISODE, **SETTINGS), meta_gradient(other, EPISODE, compile=True, **SETTINGS))
    assert len(recorded) > count
    count = len(recorded)
    net.out.bias.requires_grad_(True)
    net.eval()
    check()


def test_a_memory_counter_sees_everything(recorded, tanh_net):
    meta_gradient(tanh_net, EPISODE, compile=True, **SETTINGS)
    assert recorded
    peaks = []
    for compiled in (False, True):
        with LiveTensorBytes() as live:
            meta_gradient(tanh_net, EPISODE, compile=compiled, **SETTINGS)
        peaks.append(live.peak)
    assert peaks[0] == peaks[1] > 0


def test_the_cache_does_not_keep_the_owner_of_a_loss(recorded, tanh_net):
    """A LightningModule with a loss of its own, and through it its Trainer and its data."""

    class Owner:
        def loss(self, outputs, targets):
            return F.mse_loss(outputs, targets)

    owner = Owner()
    known = weakref.ref(owner)
    for _ in range(2):
        meta_gradient(tanh_net, EPISODE, compile=True, **SETTINGS | {"loss": owner.loss})
    assert len(recorded) == 4  # Once: the step, the query's gradient, the product's two parts.
    del owner
    gc.collect()
    assert known() is None


def test_what_is_compiled_goes_with_its_network(recorded, tanh_net):
    meta_gradient(tanh_net, EPISODE, compile=True, **SETTINGS)
    before = list(door._kept)
    meta_gradient(TanhNet().double(), EPISODE, compile=True, **SETTINGS)
    assert len(recorded) == 8
    gc.collect()
    assert list(door._kept) == before


def test_networks_may_go_while_another_is_forgotten(recorded, monkeypatch):
    networks, network_of = [TanhNet().double() for _ in range(2)], door._network
    for k in range(2):
        meta_gradient(networks[k], EPISODE, compile=True, **SETTINGS)

    def collect(key):
        networks.clear()
        return network_of(key)

    monkeypatch.setattr(door, "_network", collect)
    door._forget_collected()
    assert not door._kept


def test_the_cache_is_bounded(recorded, monkeypatch, tanh_net):
    monkeypatch.setattr(door, "_MOST_KEPT", 4)
    for tasks in range(1, 5):
        part = Episode(*[t[:tasks] for t in EPISODE])
        meta_gradient(tanh_net, part, compile=True, **SETTINGS)
    assert len(door._kept) <= 4


def test_adapt_in_inference_mode(recorded, tanh_net):
    settings = {name: SETTINGS[name] for name in ("loss", "inner_solver", "regularizer")}
    plain = adapt(tanh_net, EPISODE.support_inputs, EPISODE.support_targets, **settings)
    with torch.inference_mode():
        found = adapt(tanh_net, EPISODE.support_inputs, EPISODE.support_targets, compile=True, **settings)
    assert recorded
    for name, value in plain.parameters.items():
        torch.testing.assert_close(found.parameters[name], value, rtol=1e-10, atol=1e-12)
