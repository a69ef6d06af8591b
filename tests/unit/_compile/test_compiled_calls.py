"""compile=True without Dynamo: what its guards and its lock would see to, and what it would break."""

from __future__ import annotations

import logging
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import TanhNet, class_episode, regression_episode
from torch import nn
from torch.nn import functional as F

from lightning_imaml._compile import door, splitting
from lightning_imaml.curvature import GaussNewton
from lightning_imaml.episodes import Episode
from lightning_imaml.functional import meta_gradient
from lightning_imaml.inner import GradientDescent
from lightning_imaml.meta_gradients import Implicit
from lightning_imaml.regularizers import Proximal

EPISODE = regression_episode()
SETTINGS = {"loss": F.mse_loss, "inner_solver": GradientDescent(0.1, 4), "regularizer": Proximal(1.5)}


IMAGES = Episode(*[t.double() if t.is_floating_point() else t for t in class_episode(2, 3, shape=(1, 4, 4))])


def block():
    """One of Conv4's four: each more of them costs the compiler as much as the first."""
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 2, 3, stride=2, padding=1), nn.BatchNorm2d(2, track_running_stats=False), nn.ReLU()
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, 3)).double()


NET = block()


def run(compile=True):
    settings = {"estimator": Implicit(curvature=GaussNewton()), "inner_solver": GradientDescent(0.1, 3)}
    return meta_gradient(NET, IMAGES, compile=compile, **settings)


@pytest.fixture(scope="module")
def first():
    """What the compiled code gave at first, with the log: two tests share the compilation."""
    messages = []

    class Kept(logging.Handler):
        def emit(self, record):
            messages.append(record.getMessage())

    door._kept.clear()
    logger, kept = logging.getLogger("lightning.pytorch.lightning_imaml"), Kept(logging.INFO)
    level = logger.level
    logger.addHandler(kept)
    logger.setLevel(logging.INFO)
    try:
        return run(), messages
    finally:
        logger.removeHandler(kept)
        logger.setLevel(level)


@pytest.mark.slow  # The compiler itself, for half a minute.
def test_compiled_results_are_the_eager_ones(first):
    results, messages = first
    # A set, since the logger may hand messages on to the handler a second time.
    assert len({message.split(" for ")[0] for message in messages if "compiled" in message}) == 3
    assert len(door._kept) == 3
    assert all(kept.compiled is not None for kept in door._kept.values())
    plain = run(compile=False)
    for found in (results, run()):
        torch.testing.assert_close(found.loss, plain.loss, rtol=1e-8, atol=1e-12)
        torch.testing.assert_close(found.grads, plain.grads, rtol=1e-8, atol=1e-12)
        torch.testing.assert_close(found.adapted.parameters, plain.adapted.parameters, rtol=1e-8, atol=1e-12)
    assert len(door._kept) == 3


@pytest.mark.slow  # Runs what is compiled: nothing else tells whether it is safe.
@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="there are no timers to send signals")
def test_the_handler_of_a_signal_runs_whenever_it_comes_once_all_is_compiled(first):
    """As that of a Trainer which saves before it is preempted. Dynamo took one in a hundred for code to compile."""
    handled = []

    def handler(number, frame):
        handled.append(sum(k for k in range(3)))

    before = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 5e-4, 5e-4)
        while len(handled) < 1000:
            torch.testing.assert_close(run().grads, first[0].grads, rtol=1e-10, atol=1e-12)
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
        x = torch.linspace(0, 1, size)
        return torch.allclose(splitting._inductor(graphs[size])(x)[0], x.sin() * size)

    # Recorded before: the tracer of torch.fx is one for all threads, too, and here nothing locks it.
    graphs = {
        size: torch.fx.symbolic_trace(lambda x, size=size: [x.sin() * size], {"size": size}) for size in (3, 5, 7)
    }
    with ThreadPoolExecutor(3) as threads:
        assert list(threads.map(run, graphs)) == [True] * 3


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
