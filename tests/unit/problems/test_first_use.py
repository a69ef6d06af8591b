"""The check of a network's structure when it is first used."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import class_episode, regression_episode
from test_isolation import PLAIN, Net, plain_loop, require_unchanged, state_of
from torch import nn

from lightning_imaml import IMAMLModule
from lightning_imaml.functional import adapt, evaluate, meta_gradient, predict
from lightning_imaml.inner import GradientDescent
from lightning_imaml.meta_gradients import FirstOrder, Unrolled
from lightning_imaml.models import Checkpointed, Conv4
from lightning_imaml.problems import first_use
from lightning_imaml.problems.network import FlatModel


class CallsAgain(torch.autograd.Function):
    """Computes a layer again in the backward pass, as recomputation and adjoint solvers do."""

    @staticmethod
    def forward(ctx, layer, x, *weights):
        ctx.layer = layer
        ctx.save_for_backward(x)
        with torch.no_grad():
            return layer(x)

    @staticmethod
    def backward(ctx, slope):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            again = ctx.layer(x)
            wanted = [x, *ctx.layer.parameters()] if ctx.needs_input_grad[2:] else [x]
            return None, *torch.autograd.grad(again, wanted, slope)


class Reversed(Net):
    """Hands the weights to the function, whose backward pass takes those that the layer holds by then."""

    def forward(self, x):
        inner = nn.Sequential(self.a, nn.Tanh(), self.b)
        return CallsAgain.apply(inner, x, *inner.parameters())


class Accumulates(torch.autograd.Function):
    """Writes the gradients of the weights itself."""

    @staticmethod
    def forward(ctx, layer, x, *_):
        ctx.layer = layer
        ctx.save_for_backward(x)
        with torch.no_grad():
            return layer(x)

    @staticmethod
    def backward(ctx, slope):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            torch.autograd.backward(ctx.layer(x), slope)
        return None, x.grad, None


class Adjoint(Net):
    def forward(self, x):
        return self.b(torch.tanh(Accumulates.apply(self.a, x, torch.zeros((), requires_grad=True))))


class Elsewhere(Net):
    def __init__(self):
        super().__init__()
        self.weights = [self.a.weight, self.a.bias]

    def forward(self, x):
        return self.b(torch.tanh(nn.functional.linear(x, *self.weights)))


@pytest.mark.parametrize("size", [None, 1])
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Reversed, r"'weight' of Linear 'a' has another one, as where a torch.autograd.Function"),
        (Adjoint, r"'weight' of Linear 'a' has another one, as where a torch.autograd.Function"),
        (Elsewhere, r"'weight' of Linear 'a' lies in another place too"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*must consist of operations:UserWarning")
def test_a_layer_whose_weights_a_task_does_not_reach_is_refused_by_name(kind, words, size):
    network, episode = kind(), regression_episode()
    before = state_of(network)
    for _ in range(2):
        with pytest.raises(ValueError, match=words):
            adapt(network, episode.support_inputs, episode.support_targets, chunk_size=size, **PLAIN)
        require_unchanged(network, before)
        assert all(p.grad is None for p in network.parameters())


@pytest.mark.parametrize("estimator", [FirstOrder(), Unrolled()], ids=str)
def test_the_remedy_of_a_layer_that_is_computed_again_works(estimator):
    class Wrapped(Net):
        def __init__(self):
            super().__init__()
            self.a = Checkpointed(self.a)

    network, episode = Wrapped(), regression_episode()
    found = meta_gradient(network, episode, estimator=estimator, **PLAIN).grads
    expected = plain_loop(Net(), episode, estimator)
    for name, g in expected.items():
        torch.testing.assert_close(found[name.replace("a.", "a.module.")], g, rtol=1e-9, atol=1e-12)


def test_a_function_with_a_backward_pass_of_its_own_is_no_fault():
    class Surrogate(torch.autograd.Function):
        """A step with the slope of a sigmoid, as spiking networks have it."""

        generate_vmap_rule = True

        @staticmethod
        def forward(x):
            return (x > 0).to(x.dtype)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(inputs[0])

        @staticmethod
        def backward(ctx, slope):
            s = ctx.saved_tensors[0].sigmoid()
            return slope * s * (1 - s)

    class Spiking(Net):
        def forward(self, x):
            return self.b(Surrogate.apply(self.a(x)))

    network, episode = Spiking(), regression_episode()
    found = meta_gradient(network, episode, estimator=FirstOrder(), **PLAIN).grads
    for name, g in plain_loop(network, episode, FirstOrder()).items():
        torch.testing.assert_close(found[name], g, rtol=1e-9, atol=1e-12)


def test_a_network_that_vmap_gets_wrong_goes_one_task_at_a_time():
    class First(torch.autograd.Function):
        """Has a batching rule with a fault: its gradient reaches the first task alone."""

        @staticmethod
        def forward(x):
            return x.clone()

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def backward(ctx, slope):
            return slope

        @staticmethod
        def vmap(info, in_dims, x):
            return torch.cat([x[:1], x[1:].detach()]), 0

    class Faulty(Net):
        def forward(self, x):
            return self.b(First.apply(self.hidden(x)))

    network, episode = Faulty(), regression_episode()
    with pytest.warns(UserWarning, match=r"Faulty must give the same .* torch.func.vmap changes its gradient by a"):
        found = meta_gradient(network, episode, estimator=Unrolled(), chunk_size=4, **PLAIN).grads
    for name, g in plain_loop(Net(), episode, Unrolled()).items():
        torch.testing.assert_close(found[name], g, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_kinks_and_random_numbers_raise_no_alarm(dtype):
    torch.manual_seed(0)
    episode = class_episode(tasks=3)
    episode = episode._replace(
        support_inputs=episode.support_inputs.to(dtype), query_inputs=episode.query_inputs.to(dtype)
    )
    for network in (Conv4(5, filters=8), nn.Sequential(nn.Flatten(), nn.Linear(784, 9), nn.Dropout(), nn.Linear(9, 5))):
        adapt(network.to(dtype), episode.support_inputs, episode.support_targets, full_precision=False)


def test_random_numbers_are_not_drawn_by_the_check():
    network = nn.Sequential(nn.Linear(3, 4), nn.Dropout(), nn.Linear(4, 2)).double()
    episode, found = regression_episode(), []
    for _ in range(2):  # The second time, nothing is checked.
        torch.manual_seed(1)
        found.append(meta_gradient(network, episode, estimator=FirstOrder(), **PLAIN).grads)
        found.append({"state": torch.get_rng_state()})
    torch.testing.assert_close(found[0], found[2], rtol=0, atol=0)
    assert torch.equal(found[1]["state"], found[3]["state"])


def test_a_network_is_checked_once(monkeypatch):
    ran, run = [], first_use._Check.run
    monkeypatch.setattr(first_use._Check, "run", lambda self, several: (ran.append(several), run(self, several))[1])
    network, episode = Net(), regression_episode()
    for _ in range(3):
        adapted = adapt(network, episode.support_inputs, episode.support_targets, **PLAIN)
        evaluate(network, adapted.parameters, episode.query_inputs, episode.query_targets, loss=PLAIN["loss"])
    assert ran == [True]
    adapt(network, episode.support_inputs, episode.support_targets, adapt_only=("b.*",), **PLAIN)
    assert ran == [True, True]
    adapt(copy.deepcopy(network), episode.support_inputs, episode.support_targets, chunk_size=1, **PLAIN)
    assert ran == [True, True, False]


def test_an_argument_leaves_the_check_out(monkeypatch):
    monkeypatch.setattr(first_use._Check, "run", lambda *_: pytest.fail("checked"))
    network, episode = Net(), regression_episode()
    adapted = adapt(network, episode.support_inputs, episode.support_targets, check_network=False, **PLAIN).parameters
    query = episode.query_inputs, episode.query_targets
    predict(network, adapted, query[0], check_network=False)
    evaluate(network, adapted, *query, loss=PLAIN["loss"], check_network=False)
    meta_gradient(network, episode, estimator=FirstOrder(), check_network=False, **PLAIN)
    module = IMAMLModule(Net(), PLAIN["loss"], GradientDescent(0.1, 2), check_network=False)
    module.meta_gradient(episode)
    module.log = lambda *_, **__: None
    module.test_step(episode, 0)
    module.predict_step(episode, 0)


def test_the_check_takes_fewer_forward_passes_than_a_meta_step_and_of_fewer_tasks():
    torch.manual_seed(0)
    episode, network = class_episode(tasks=8), Conv4(5, filters=4)
    calls: list[None] = []
    network.register_forward_pre_hook(lambda *_: calls.append(None))
    first_use.check_network(FlatModel(network), episode.support_inputs)
    check, _ = len(calls), calls.clear()
    meta_gradient(network, episode, inner_solver=GradientDescent(0.1, 16))
    assert 3 <= check <= 8  # Of two tasks at most, where those of the meta-step are of eight.
    assert len(calls) >= 18  # Sixteen steps, the query set, the linearisation.
