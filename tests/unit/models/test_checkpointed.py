"""Checkpointed layers: the same values and derivatives in less memory; torch.utils.checkpoint is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import TanhNet, class_episode, regression_episode
from torch import nn
from torch.func import functional_call, vmap
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_imaml._compile import door, splitting
from lightning_imaml.callbacks import LiveTensorBytes
from lightning_imaml.curvature import GaussNewton, Hessian
from lightning_imaml.episodes import Episode
from lightning_imaml.functional import adapt, meta_gradient, predict
from lightning_imaml.inner import GradientDescent
from lightning_imaml.linear import ConjugateGradient
from lightning_imaml.meta_gradients import FirstOrder, Implicit, Unrolled
from lightning_imaml.models import Checkpointed
from lightning_imaml.regularizers import Proximal

WIDTH, WAYS = 4, 3
ESTIMATORS = {
    "hessian": Implicit(ConjugateGradient(3), Hessian()),
    "gauss_newton": Implicit(ConjugateGradient(3), GaussNewton()),
    "unrolled": Unrolled(),
    "first_order": FirstOrder(),
}
SETTINGS = {"inner_solver": GradientDescent(0.05, 3), "regularizer": Proximal(1.5)}


def block(channels):
    return nn.Sequential(
        nn.Conv2d(channels, WIDTH, 3, padding=1),
        nn.BatchNorm2d(WIDTH, track_running_stats=False),
        nn.Tanh(),
        nn.Conv2d(WIDTH, WIDTH, 3, padding=1),
        nn.Dropout(0.2),
        nn.Tanh(),
    )


def networks(depth=6):
    """A network and the same with its blocks checkpointed."""
    torch.manual_seed(0)
    blocks = [block(1 if k == 0 else WIDTH) for k in range(depth)]
    plain = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTH, WAYS)).double()
    saving = copy.deepcopy(plain)
    for k in range(depth):
        saving[k] = Checkpointed(saving[k])
    return plain, saving


def images():
    episode = class_episode(2, WAYS, shots=2, shape=(1, 8, 8))
    return Episode(*(part.double() if part.is_floating_point() else part for part in episode))


def measure(network, **settings):
    torch.manual_seed(1)
    with LiveTensorBytes() as live:
        result = meta_gradient(network, images(), **SETTINGS | settings)
    return result, live.peak


@pytest.mark.parametrize("chunk_size", [1, 2])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_same_meta_gradient_in_less_memory(name, chunk_size):
    """Dropout included, whose random numbers come again."""
    (plain, full), (saving, less) = (
        measure(network, estimator=ESTIMATORS[name], chunk_size=chunk_size) for network in networks()
    )
    for expected, found in zip(plain.grads.values(), saving.grads.values(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert less < (0.85 if name == "first_order" else 0.75) * full


@pytest.mark.parametrize("batched", [False, True])
def test_first_and_second_derivatives_against_finite_differences(batched):
    torch.manual_seed(0)
    layer = Checkpointed(nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2), nn.Tanh())).double()
    names = [name for name, _ in layer.named_parameters()]
    many = (2,) if batched else ()
    rows = [torch.randn(*many, *p.shape, dtype=torch.float64, requires_grad=True) for p in layer.parameters()]
    inputs = torch.randn(*many, 4, 2, dtype=torch.float64, requires_grad=True)

    def outputs(inputs, *rows):
        return functional_call(layer, dict(zip(names, rows, strict=True)), (inputs,))

    function = vmap(outputs) if batched else outputs
    assert torch.autograd.gradcheck(function, (inputs, *rows))
    assert torch.autograd.gradgradcheck(function, (inputs, *rows))


def test_random_numbers_of_a_network_in_evaluation_come_again():
    """As of dropout that stays on to tell how sure a network is."""

    class Always(nn.Linear):
        def forward(self, inputs):
            return F.dropout(super().forward(inputs), 0.5, training=True).square()

    layer, inputs = Always(3, 8).double().eval(), torch.randn(4, 3).double()
    gradients = []
    for network in (layer, Checkpointed(layer).eval()):
        torch.manual_seed(0)
        gradients += torch.autograd.grad(network(inputs).sum(), layer.weight)
    torch.testing.assert_close(*gradients)


class Tied(nn.Module):
    """Two layers with one weight, one of which stands in the network twice."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.again, self.second.weight = self.first, self.first.weight

    def forward(self, inputs):
        return self.again(torch.tanh(self.second(torch.tanh(self.first(inputs)))))


@pytest.mark.parametrize("chunk_size", [1, 2])
def test_tied_weights_and_a_layer_that_stands_in_it_twice(chunk_size):
    torch.manual_seed(0)
    plain = nn.Sequential(Tied(), nn.Linear(3, 2)).double()
    saving = copy.deepcopy(plain)
    weight, saving[0] = saving[0].first.weight, Checkpointed(saving[0])
    settings = {"loss": F.mse_loss, "chunk_size": chunk_size, **SETTINGS}
    expected, found = (meta_gradient(net, regression_episode(tasks=2), **settings).grads for net in (plain, saving))
    for ours, theirs in zip(found.values(), expected.values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    assert saving[0].module.first.weight is saving[0].module.second.weight is weight


def test_inputs_that_are_not_differentiable():
    """Indices, and more than one input."""

    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(5, 3)
            self.out = nn.Linear(3, 2)
            self.register_buffer("scale", torch.tensor(2))

        def forward(self, words, weights):
            return self.out((self.embedding(words) * weights.unsqueeze(-1)).mean(dim=-2)) * self.scale

    class Net(nn.Module):
        def __init__(self, wrap):
            super().__init__()
            torch.manual_seed(0)
            self.words = wrap(Words())

        def forward(self, inputs):
            return self.words(*inputs)

    torch.manual_seed(0)
    inputs = torch.randint(0, 5, (2, 4, 6)), torch.rand(2, 4, 6).double()
    targets = torch.randint(0, 2, (2, 4))
    for chunk_size in (1, 2):
        plain, saving = (
            meta_gradient(
                Net(wrap).double(), Episode(inputs, targets, inputs, targets), chunk_size=chunk_size, **SETTINGS
            )
            for wrap in (lambda layer: layer, Checkpointed)
        )
        for expected, found in zip(plain.grads.values(), saving.grads.values(), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_evaluation_and_the_default_chunk_size():
    outcomes = []
    for network in networks(2):
        with torch.inference_mode():
            episode = images()
            adapted = adapt(network.eval(), episode.support_inputs, episode.support_targets, **SETTINGS)
            outcomes.append(predict(network, adapted.parameters, episode.query_inputs))
    torch.testing.assert_close(*outcomes, rtol=1e-10, atol=1e-12)


def test_recorded_graphs_give_the_same(monkeypatch):
    graphs = []
    monkeypatch.setattr(splitting, "_inductor", lambda graph: graphs.append(graph) or graph)
    door._kept.clear()
    network = networks(2)[1].eval()
    plain, recorded = (meta_gradient(network, images(), compile=compile, **SETTINGS) for compile in (False, True))
    assert graphs
    for name, expected in plain.grads.items():
        torch.testing.assert_close(recorded.grads[name], expected, rtol=1e-8, atol=1e-12)


class TorchCheckpoint(TanhNet):
    def forward(self, inputs):
        return self.out(checkpoint(lambda x: torch.tanh(self.hidden(x)), inputs, use_reentrant=False))


@pytest.mark.parametrize("chunk_size", [None, 1, 4])
def test_pytorchs_own_checkpoint_is_refused(chunk_size):
    """It would take the initial weights when it computes again, and give a wrong gradient without a word."""
    network, episode = TorchCheckpoint().double(), regression_episode()
    with pytest.raises(RuntimeError, match="checkpoint, which would compute the layers of TorchCheckpoint again"):
        meta_gradient(network, episode, loss=F.mse_loss, chunk_size=chunk_size)


def test_what_the_refusal_prevents(monkeypatch):
    monkeypatch.setattr(
        "lightning_imaml.problems.network.disable_saved_tensors_hooks", lambda message: torch.enable_grad()
    )
    wrong = TorchCheckpoint().double()
    with pytest.raises(ValueError, match="'weight' of Linear 'hidden' has another one"):  # The check sees it, too.
        meta_gradient(wrong, regression_episode(), loss=F.mse_loss, chunk_size=1)
    monkeypatch.setattr("lightning_imaml.functional.preparation.check_network", lambda *_, **__: None)
    right = TanhNet().double()
    right.load_state_dict(wrong.state_dict())
    errors = []
    for steps in (1, 4):
        found, expected = (
            meta_gradient(
                network,
                regression_episode(),
                loss=F.mse_loss,
                inner_solver=GradientDescent(0.1, steps),
                estimator=FirstOrder(),
                chunk_size=1,
            ).grads["hidden.weight"]
            for network in (wrong, right)
        )
        errors.append(float((found - expected).norm() / expected.norm()))
    assert min(errors) > 1e-3


def test_hooks_around_everything_are_no_matter(tanh_net):
    plain = meta_gradient(tanh_net, regression_episode(), loss=F.mse_loss, chunk_size=1)
    with torch.autograd.graph.save_on_cpu():
        found = meta_gradient(tanh_net, regression_episode(), loss=F.mse_loss, chunk_size=1)
    for name, expected in plain.grads.items():
        torch.testing.assert_close(found.grads[name], expected)
