"""A network's state after every public call is what it was before, and no task sees what another one writes."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from conftest import regression_episode
from torch import nn
from torch.nn import functional as F

from lightning_imaml import Episode, IMAMLModule
from lightning_imaml.functional import adapt, evaluate, meta_gradient, predict
from lightning_imaml.inner import GradientDescent
from lightning_imaml.linear import Direct
from lightning_imaml.meta_gradients import FirstOrder, Implicit, Unrolled
from lightning_imaml.problems.isolation import Snapshot
from lightning_imaml.regularizers import NoRegularizer, Proximal

LR, STEPS = 0.1, 3
PLAIN = {"loss": F.mse_loss, "inner_solver": GradientDescent(LR, STEPS), "regularizer": NoRegularizer()}
UNROLLED = PLAIN | {"estimator": Unrolled()}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)
        self.double()

    def hidden(self, x):
        return torch.tanh(self.a(x))

    def forward(self, x):
        return self.b(self.hidden(x))


class StoresBuffer(Net):
    """Sets a buffer, and uses it in the same call."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(4).double())

    def forward(self, x):
        h = self.hidden(x)
        self.seen = h.mean(0)
        return self.b(h - self.seen)


class WritesBuffer(StoresBuffer):
    """The same in place."""

    def forward(self, x):
        h = self.hidden(x)
        self.seen.copy_(x.detach().mean() + torch.zeros(4).double())
        return self.b(h - self.seen)


class StoresAttributes(Net):
    def __init__(self):
        super().__init__()
        self.history, self.cache, self.last, self.count = [], {}, None, 0

    def forward(self, x):
        h = self.hidden(x)
        self.history.append(h)
        self.cache["h"] = h
        self.last, self.count = h, self.count + 1
        self.made_later = x
        return self.b(self.last)


class WritesATensor(Net):
    """A counter that no buffer holds."""

    def __init__(self):
        super().__init__()
        self.calls = torch.zeros(())

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


class FillsAnEmptyBuffer(Net):
    def __init__(self):
        super().__init__()
        self.register_buffer("mask", None)

    def forward(self, x):
        if self.mask is None:
            self.mask = torch.ones_like(x[0])
        return super().forward(x * self.mask)


WRITING = [StoresBuffer, WritesBuffer, StoresAttributes, WritesATensor, FillsAnEmptyBuffer]


def state_of(network):
    attributes = {
        (name, key): value.copy() if isinstance(value, (dict, list)) else value
        for name, layer in network.named_modules()
        for key, value in vars(layer).items()
    }
    return attributes, {name: t.clone() for name, t in network.state_dict().items()}


def require_unchanged(network, before):
    attributes, values = before
    now, tensors = state_of(network)
    assert now.keys() == attributes.keys()
    for key, value in attributes.items():
        if isinstance(value, dict):
            assert list(value) == list(now[key])
            assert all(now[key][k] is v for k, v in value.items())
        else:
            assert now[key] is value or now[key] == value, key
    assert all(torch.equal(tensors[name], t) for name, t in values.items())
    copy.deepcopy(network)
    torch.save(network.state_dict(), io.BytesIO())


def plain_loop(network, episode, estimator):
    """One deep copy a task with plain autograd: the meta-gradient of gradient descent without a regulariser."""
    total = {}
    for task in range(episode.tasks):
        net = copy.deepcopy(network)
        theta = dict(net.named_parameters())
        phi = {name: p.clone() for name, p in theta.items()}
        for _ in range(STEPS):
            loss = F.mse_loss(
                torch.func.functional_call(net, phi, episode.support_inputs[task]), episode.support_targets[task]
            )
            unrolled = isinstance(estimator, Unrolled)
            slopes = torch.autograd.grad(loss, list(phi.values()), create_graph=unrolled, materialize_grads=True)
            phi = {name: p - LR * g for (name, p), g in zip(phi.items(), slopes, strict=True)}
        loss = F.mse_loss(torch.func.functional_call(net, phi, episode.query_inputs[task]), episode.query_targets[task])
        by = theta if unrolled else phi
        for name, g in zip(theta, torch.autograd.grad(loss, list(by.values()), materialize_grads=True), strict=True):
            total[name] = total.get(name, 0) + g / episode.tasks
    return total


@pytest.mark.filterwarnings("ignore:.*must consist of operations:UserWarning")
@pytest.mark.parametrize("estimator", [FirstOrder(), Unrolled()], ids=str)
@pytest.mark.parametrize("kind", WRITING)
def test_a_network_that_writes_is_right_and_stays_as_it_was(kind, estimator):
    network, episode = kind(), regression_episode()
    expected, before = plain_loop(network, episode, estimator), state_of(network)
    turned = Episode(*(t.flip(0) for t in episode))
    for tasks, size in ((episode, None), (episode, 4), (episode, 1), (episode, 3), (turned, 2)):
        found = meta_gradient(network, tasks, estimator=estimator, chunk_size=size, **PLAIN)
        require_unchanged(network, before)
        for name, g in expected.items():
            torch.testing.assert_close(found.grads[name], g, rtol=1e-9, atol=1e-12)


@pytest.mark.filterwarnings("ignore:.*must consist of operations:UserWarning")
@pytest.mark.parametrize("kind", WRITING)
def test_every_public_call_leaves_a_network_as_it_was(kind):
    network, episode = kind(), regression_episode()
    before = state_of(network)
    module = IMAMLModule(network, loss=F.mse_loss, inner_solver=GradientDescent(0.1, 2))
    require_unchanged(network, before)
    adapted = adapt(network, episode.support_inputs, episode.support_targets, **PLAIN).parameters
    require_unchanged(network, before)
    outputs = predict(network, adapted, episode.query_inputs)
    require_unchanged(network, before)
    loss, again = evaluate(network, adapted, episode.query_inputs, episode.query_targets, loss=F.mse_loss)
    require_unchanged(network, before)
    module.adapt(episode.support_inputs, episode.support_targets)
    require_unchanged(network, before)
    module.meta_gradient(episode)
    require_unchanged(network, before)
    for task in range(episode.tasks):
        net = copy.deepcopy(network)
        net.load_state_dict({**net.state_dict(), **{name: value[task] for name, value in adapted.items()}})
        torch.testing.assert_close(outputs[task], net(episode.query_inputs[task]), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(outputs, again)
    torch.testing.assert_close(loss, (outputs - episode.query_targets).square().mean((1, 2)))


class Counts(Net):
    """Warms up: its outputs depend on how often it has been called."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.calls += 1
        return super().forward(x) * self.calls


class Remembers(Net):
    def __init__(self):
        super().__init__()
        self.last = 0.0

    def forward(self, x):
        h = self.hidden(x)
        out = self.b(h + self.last)
        self.last = h.detach().mean(0)
        return out


class Clamps(Net):
    def forward(self, x):
        with torch.no_grad():
            self.a.weight.clamp_(-0.1, 0.1)
        return super().forward(x)


class ClampsData(Net):
    def forward(self, x):
        self.a.weight.data.clamp_(-0.1, 0.1)
        return super().forward(x)


@pytest.mark.parametrize("size", [1, None])
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Counts, "found Counts '', which writes 'calls' and reads it"),
        (Remembers, "found Remembers '', which writes 'last' and reads it"),
        (Clamps, "'weight' of Linear 'a'"),
        (ClampsData, "'weight' of Linear 'a'"),
    ],
)
def test_state_that_is_carried_from_call_to_call_is_refused_by_name(kind, words, size):
    network, episode = kind(), regression_episode()
    before = state_of(network)
    with pytest.raises(ValueError, match=words):
        adapt(network, episode.support_inputs, episode.support_targets, chunk_size=size, **PLAIN)
    require_unchanged(network, before)


def test_the_remedy_of_a_counter_works():
    network, episode = Counts().eval(), regression_episode()
    network.calls += 3
    found = meta_gradient(network, episode, estimator=Unrolled(), **PLAIN)
    expected = plain_loop(network, episode, Unrolled())
    for name, g in expected.items():
        torch.testing.assert_close(found.grads[name], g, rtol=1e-9, atol=1e-12)


@pytest.mark.filterwarnings("ignore:.*torch.nn.utils.spectral_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("make", [nn.utils.parametrizations.spectral_norm, nn.utils.spectral_norm])
def test_power_iterations_are_refused_and_their_remedy_works(make):
    network, episode = Net(), regression_episode()
    make(network.a)
    with torch.no_grad():  # Old spectral norms keep the weight that they computed last, which deepcopy must stand.
        network(episode.support_inputs[0])
    before = state_of(network)
    with pytest.raises(ValueError, match=r"Call backbone.get_submodule\('(.*)'\).eval") as refusal:
        adapt(network, episode.support_inputs, episode.support_targets, **PLAIN)
    require_unchanged(network, before)
    eval(str(refusal.value).split("Call ")[1].split(", which")[0], {"backbone": network})
    for size in (None, 1):
        found = meta_gradient(network, episode, estimator=Unrolled(), chunk_size=size, **PLAIN)
        for name, g in plain_loop(network, episode, Unrolled()).items():
            torch.testing.assert_close(found.grads[name], g, rtol=1e-9, atol=1e-12)


class Auxiliary(Net):
    """Stores a term that its loss is to read."""

    def forward(self, x):
        h = self.hidden(x)
        self.penalty = h.square().mean()
        return self.b(h)


@pytest.mark.parametrize("size", [1, None])
@pytest.mark.parametrize(
    "combine",
    [lambda loss, term: loss + term, lambda loss, term: 0.1 * term + loss, lambda loss, term: torch.add(loss, term),
     lambda loss, term: loss * float(term), lambda loss, term: torch.stack([loss, term]).sum()],
)  # fmt: skip
def test_a_loss_that_reads_what_forward_stored_is_told_that_it_sees_outputs_alone(combine, size):
    network, episode = Auxiliary(), regression_episode()
    settings = PLAIN | {"loss": lambda outputs, targets: combine(F.mse_loss(outputs, targets), network.penalty)}
    with pytest.raises(RuntimeError, match=r"reads 'penalty', which Auxiliary.forward stores"):
        adapt(network, episode.support_inputs, episode.support_targets, chunk_size=size, **settings)
    assert not hasattr(network, "penalty")


def test_the_remedy_of_a_stored_term_works():
    class Returned(Net):
        def forward(self, x):
            h = self.hidden(x)
            return self.b(h), h.square().mean().expand(1)

    network, episode = Returned(), regression_episode()
    settings = UNROLLED | {"loss": lambda outputs, targets: F.mse_loss(outputs[0], targets) + outputs[1].sum()}
    alone, together = (meta_gradient(network, episode, chunk_size=size, **settings).grads for size in (1, None))
    for name, g in alone.items():
        torch.testing.assert_close(together[name], g, rtol=1e-9, atol=1e-12)


def test_a_change_after_the_check_is_put_back_too():
    class Late(Net):
        def __init__(self):
            super().__init__()
            self.register_buffer("stored", torch.zeros(3).double())
            self.open = [False]

        def forward(self, x):
            if self.open[0]:
                self.stored = x.mean(0)
            return super().forward(x)

    network, episode = Late(), regression_episode()
    expected = meta_gradient(network, episode, **UNROLLED).grads
    network.open[0] = True
    before = state_of(network)
    for _ in range(2):
        found = meta_gradient(network, episode, **UNROLLED).grads
        require_unchanged(network, before)
        torch.testing.assert_close(found, expected)


def test_hooks_and_parametrizations_stay():
    network, episode = Net(), regression_episode()
    nn.utils.parametrizations.weight_norm(network.a)
    hook = network.b.register_forward_hook(lambda layer, inputs, outputs: outputs * 2)
    before = state_of(network)
    meta_gradient(network, episode, **UNROLLED)
    require_unchanged(network, before)
    assert hook.id in network.b._forward_hooks
    assert nn.utils.parametrize.is_parametrized(network.a)


def test_implicit_gradients_of_a_writing_network_are_those_of_a_silent_one():
    class Silent(StoresBuffer):
        def forward(self, x):
            h = self.hidden(x)
            return self.b(h - h.mean(0))

    settings = PLAIN | {"regularizer": Proximal(3.0), "estimator": Implicit(Direct())}
    found, expected = (meta_gradient(kind(), regression_episode(), **settings) for kind in (StoresBuffer, Silent))
    torch.testing.assert_close(found.grads, expected.grads, rtol=1e-9, atol=1e-12)


def test_a_snapshot_names_what_changed():
    network = StoresAttributes()
    snapshot = Snapshot(network)
    assert snapshot.changes() == []
    network(torch.randn(2, 3).double())
    network.a.weight = nn.Parameter(torch.zeros(4, 3))
    stored = [("", key) for key in ("cache", "count", "history", "last", "made_later")]
    assert snapshot.changes() == [*stored, ("a", "weight")]
    snapshot.restore()
    assert snapshot.changes() == []
    assert not hasattr(network, "made_later")
