"""compile=True without Dynamo: what its guards and its lock would see to, and what it would break."""

from __future__ import annotations

import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import TanhNet, regression_episode
from torch.nn import functional as F

from lightning_imaml._compile import splitting
from lightning_imaml.functional import meta_gradient
from lightning_imaml.inner import GradientDescent
from lightning_imaml.regularizers import Proximal

EPISODE = regression_episode()
SETTINGS = {"loss": F.mse_loss, "inner_solver": GradientDescent(0.1, 4), "regularizer": Proximal(1.5)}


@pytest.mark.slow  # Compiles: nothing else tells whether what runs is safe.
@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="there are no timers to send signals")
def test_the_handler_of_a_signal_runs_whenever_it_comes_once_all_is_compiled(tanh_net):
    """As that of a Trainer which saves before it is preempted. Dynamo took one in a hundred for code to compile."""
    handled = []

    def handler(number, frame):
        handled.append(sum(k for k in range(3)))

    def run():
        return meta_gradient(tanh_net, EPISODE, compile=True, **SETTINGS).grads

    first = run()
    before = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 5e-4, 5e-4)
        while len(handled) < 1000:
            torch.testing.assert_close(run(), first, rtol=1e-10, atol=1e-12)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert set(handled) == {3}


def test_compiled_code_follows_the_default_dtype(monkeypatch):
    monkeypatch.setattr(splitting, "_inductor", lambda graph: graph)

    class Rounding(TanhNet):
        def forward(self, inputs):
            return super().forward(inputs) + torch.linspace(0, 1, 5)[1] / 3

    net, found = Rounding().double(), {}
    for dtype in (torch.float64, torch.float32):
        torch.set_default_dtype(dtype)
        try:
            plain = meta_gradient(net, EPISODE, **SETTINGS)
            compiled = meta_gradient(net, EPISODE, compile=True, **SETTINGS)
        finally:
            torch.set_default_dtype(torch.float32)
        torch.testing.assert_close(compiled.grads, plain.grads, rtol=1e-12, atol=1e-14)
        found[dtype] = plain.loss
    assert not torch.equal(*found.values()), "the network depends on it"


@pytest.mark.slow  # Compiles, on three threads.
def test_threads_may_compile_at_a_time():
    def run(size):
        graph = torch.fx.symbolic_trace(lambda x: [x.sin() * size])
        x = torch.linspace(0, 1, size)
        return torch.allclose(splitting._inductor(graph)(x)[0], x.sin() * size)

    with ThreadPoolExecutor(3) as threads:
        assert list(threads.map(run, (3, 5, 7))) == [True] * 3


def test_compiled_code_follows_what_requires_a_gradient():
    """A graph that first met vectors without one does not lose that of later ones."""
    graph = torch.fx.symbolic_trace(lambda x: [x.sin() * 2])
    compiled = splitting._inductor(graph)
    x = torch.linspace(0, 1, 3, dtype=torch.float64)
    (plain,) = compiled(x)
    assert not plain.requires_grad
    (tracked,) = compiled(x.clone().requires_grad_())
    assert tracked.requires_grad
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(compiled(leaf)[0].sum(), leaf)
    torch.testing.assert_close(gradient, 2 * x.cos())
    (strided,) = compiled(torch.stack([x, x], dim=1)[:, 0])
    torch.testing.assert_close(strided, plain)
