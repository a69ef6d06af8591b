"""Recorded graphs whose derivative is the network's own, and those whose derivative is not."""

from __future__ import annotations

import pytest
import torch
from conftest import TanhNet, regression_episode
from torch import nn
from torch.nn import functional as F

from lightning_imaml._compile import splitting
from lightning_imaml._compile.recording import _waves, require_own_derivative
from lightning_imaml.episodes import Episode
from lightning_imaml.functional import meta_gradient
from lightning_imaml.inner import GradientDescent
from lightning_imaml.linear import ConjugateGradient
from lightning_imaml.meta_gradients import Implicit, Unrolled
from lightning_imaml.regularizers import Proximal

EPISODE = regression_episode()
SETTINGS = {
    "loss": F.mse_loss,
    "inner_solver": GradientDescent(0.1, 4),
    "regularizer": Proximal(1.5),
    "estimator": Unrolled(),
}


@pytest.fixture
def recorded(monkeypatch):
    """Record and cut graphs, but run them as they are: what the compiler adds is seconds."""
    graphs = []
    monkeypatch.setattr(splitting, "_inductor", lambda graph: graphs.append(graph) or graph)
    return graphs


def same(a, b):
    torch.testing.assert_close(a.loss, b.loss, rtol=1e-10, atol=1e-12)
    for name in a.grads:
        torch.testing.assert_close(a.grads[name], b.grads[name], rtol=1e-10, atol=1e-12)


class Rounded(torch.autograd.Function):
    """With the derivative of the identity."""

    generate_vmap_rule = True

    @staticmethod
    def forward(values):
        return (4 * values).round() / 4

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def averaged(features):
    with torch.no_grad():
        scale = features.square().mean().sqrt()
    return features / scale


CUTS = {
    "detach": lambda features: features * features.detach(),
    "no_grad": averaged,
    "straight through": lambda features: features + (features.sign() - features).detach(),
    "autograd.Function": Rounded.apply,
}


@pytest.mark.parametrize("start", ["drawn", "zero head"])
@pytest.mark.parametrize("tasks", [1, 4])
@pytest.mark.parametrize("cut", CUTS)
def test_steps_through_a_network_that_cuts_its_gradient_are_not_compiled(cut, tasks, start, recorded):
    """What a recorded graph cannot know of, and a start at which it would not show."""

    class Cut(TanhNet):
        def forward(self, inputs):
            return self.out(CUTS[cut](torch.tanh(self.hidden(inputs))))

    torch.manual_seed(0)
    net = Cut().double()
    if start == "zero head":
        nn.init.zeros_(net.out.weight)
    episode = Episode(*[t[:tasks] for t in EPISODE])
    plain = meta_gradient(net, episode, **SETTINGS)
    with pytest.warns(UserWarning, match=r"another derivative, as where .*\. Going on without compiling") as seen:
        found = meta_gradient(net, episode, compile=True, **SETTINGS)
    assert len(seen) == 1
    same(plain, found)
    recorded.clear()
    settings = SETTINGS | {"estimator": Implicit(ConjugateGradient(5))}
    same(*(meta_gradient(net, episode, compile=compile, **settings) for compile in (False, True)))
    # All of it, for what is implicit is not differentiated once more; the residual had the steps' gradient compiled.
    assert len(recorded) == 3


@pytest.mark.parametrize(
    ("own", "recorded", "same"), [(100, 100, True), (100, 100.1, False), (10, 10, False)],
    ids=["a small one at one point", "another slope at all", "a large one"],
)  # fmt: skip
def test_a_small_kink_at_one_of_the_points_is_no_other_derivative(own, recorded, same):
    """As where rounding decides on which side of a ReLU's kink a unit is."""
    at = torch.ones(1, dtype=torch.float64)
    kink = at * (1 + 0.1 * _waves(at)) + 0.01 * _waves(at)  # The first point that is tried.
    before = torch.nextafter(kink, at)

    def compare():
        require_own_derivative(
            lambda x: [recorded * x + torch.relu(x - before)], lambda x: [own * x + torch.relu(x - kink)],
            [at.requires_grad_()], 1e-16,
        )  # fmt: skip

    if same:
        compare()
    else:
        with pytest.raises(NotImplementedError, match="another derivative"):
            compare()


def test_the_comparison_takes_no_random_numbers_from_the_code_after_it():
    at = torch.ones(3, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    require_own_derivative(lambda x: [F.dropout(x)], lambda x: [F.dropout(x)], [at], 1e-16)
    assert torch.equal(torch.rand(1), expected)


def test_no_slope_at_all_is_the_same_slope():
    at = torch.ones(1, dtype=torch.float64, requires_grad=True)
    require_own_derivative(lambda x: [0 * x], lambda x: [x - x], [at], 1e-16)


def test_steps_through_dropout_are_compiled_with_their_derivative(recorded):
    """Random numbers alone do not tell the two apart."""
    net = nn.Sequential(TanhNet(outputs=4), nn.Dropout(0.5), nn.Linear(4, 2)).double()
    meta_gradient(net, EPISODE, compile=True, **SETTINGS)
    (step, *_) = recorded
    assert any("bernoulli" in str(node.target) for node in step.graph.nodes)


def test_a_derivative_that_cannot_be_compiled_is_known_before_it_is_needed(monkeypatch, tanh_net):
    """PyTorch compiles a derivative when it first is taken."""

    def fail(gradient):
        raise RuntimeError("no kernel")

    def without_derivative(graph):
        def compiled(*tensors):
            results = graph(*tensors)
            for result in results:
                if result.requires_grad:
                    result.register_hook(fail)
            return results

        return compiled

    monkeypatch.setattr(splitting, "_inductor", without_derivative)
    plain = meta_gradient(tanh_net, EPISODE, **SETTINGS)
    with pytest.warns(UserWarning, match=r"found RuntimeError: no kernel\. Going on without compiling") as seen:
        same(plain, meta_gradient(tanh_net, EPISODE, compile=True, **SETTINGS))
    assert len(seen) == 1
