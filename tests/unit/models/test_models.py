"""Backbones: the papers' sizes, every norm in the batched core, and the protocol that a norm implies."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from conftest import class_episode
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from lightning_imaml.curvature import Hessian
from lightning_imaml.diagnostics.protocol import Protocol
from lightning_imaml.functional import adapt, meta_gradient, predict
from lightning_imaml.inner import GradientDescent
from lightning_imaml.linear import ConjugateGradient
from lightning_imaml.meta_gradients import Implicit
from lightning_imaml.models import MLP, Conv4, ResNet12, WideResNet, norm_layer
from lightning_imaml.models.norm import NORMS
from lightning_imaml.problems.support_set import support_rows
from lightning_imaml.regularizers import Proximal

WAYS = 3
# Small enough for a test, with every kind of layer: the builder, and the size of its images.
SMALL = {
    "Conv4 stride": (lambda norm: Conv4(WAYS, channels=2, filters=4, image_size=16, norm=norm), 16),
    "Conv4 max-pool": (
        lambda norm: Conv4(WAYS, channels=2, filters=4, image_size=16, downsampling="max-pool", norm=norm),
        16,
    ),
    "MLP": (lambda norm: MLP(2 * 4 * 4, WAYS, hidden=(8, 6), norm=norm), 4),
    "ResNet12": (lambda norm: ResNet12(WAYS, channels=2, widths=(4, 4, 6, 8), norm=norm), 16),
    "WideResNet": (lambda norm: WideResNet(WAYS, channels=2, depth=10, width=1, norm=norm), 8),
}


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def convolution(before, after, kernel, bias=False):
    return before * after * kernel**2 + (after if bias else 0)


def test_the_papers_sizes():
    """Counted by hand from the papers' tables; a BatchNorm has two numbers a channel."""
    omniglot = convolution(1, 64, 3, True) + 3 * convolution(64, 64, 3, True) + 4 * 128 + (256 + 1) * 5
    assert parameters(Conv4(5)) == omniglot == 113_221
    mini = convolution(3, 32, 3, True) + 3 * convolution(32, 32, 3, True) + 4 * 64 + (32 * 25 + 1) * 5
    assert parameters(Conv4(5, 3, 32, 84, "max-pool")) == mini == 32_901  # MAML's 32,901
    assert parameters(MLP(1, 1)) == 1 * 40 + 40 + 40 * 40 + 40 + 40 + 1
    widths = [3, 64, 160, 320, 640]
    resnet = sum(
        convolution(a, b, 3) + 2 * convolution(b, b, 3) + convolution(a, b, 1) + 4 * 2 * b for a, b in pairwise(widths)
    )
    assert parameters(ResNet12(5)) == resnet + 641 * 5
    # Zagoruyko and Komodakis, table 4: WRN-16-4 2.7 M, WRN-28-10 36.5 M.
    assert parameters(WideResNet(10)) == pytest.approx(2.7e6, rel=0.03)
    assert parameters(WideResNet(10, depth=28, width=10)) == pytest.approx(36.5e6, rel=0.01)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", SMALL)
def test_all_tasks_at_once_are_each_task_alone(name, norm):
    """The batched solve, exact Hessian and all, against plain autograd on one task at a time."""
    build, size = SMALL[name]
    torch.manual_seed(0)
    model = build(norm).double()
    episode = class_episode(tasks=2, ways=WAYS, shots=2, queries=2, shape=(2, size, size))
    episode = episode._replace(
        support_inputs=episode.support_inputs.double(), query_inputs=episode.query_inputs.double()
    )
    lr, steps, strength = 0.05, 2, 0.5
    adapted = adapt(
        model,
        episode.support_inputs,
        episode.support_targets,
        inner_solver=GradientDescent(lr, steps),
        regularizer=Proximal(strength),
    )
    outputs = predict(model, adapted.parameters, episode.query_inputs, support_inputs=episode.support_inputs)
    initial = {key: p.detach() for key, p in model.named_parameters()}
    for task in range(2):
        mine = {key: p.clone().requires_grad_() for key, p in initial.items()}
        for _ in range(steps):
            support = functional_call(model, mine, (episode.support_inputs[task],))
            loss = F.cross_entropy(support, episode.support_targets[task])
            loss = loss + strength / 2 * sum((p - initial[key]).square().sum() for key, p in mine.items())
            gradients = torch.autograd.grad(loss, list(mine.values()))
            mine = {
                key: (p - lr * g).detach().requires_grad_() for (key, p), g in zip(mine.items(), gradients, strict=True)
            }
        for key, p in mine.items():
            torch.testing.assert_close(adapted.parameters[key][task], p.detach(), rtol=1e-8, atol=1e-10)
        count = 2 * WAYS if norm == "support" else 0
        rows = torch.cat([episode.support_inputs[task][:count], episode.query_inputs[task]])
        with support_rows(count):
            alone = functional_call(model, mine, (rows,))[count:]
        torch.testing.assert_close(outputs[task], alone, rtol=1e-7, atol=1e-9)
    result = meta_gradient(
        model,
        episode,
        inner_solver=GradientDescent(lr, steps),
        estimator=Implicit(ConjugateGradient(2), Hessian()),
        regularizer=Proximal(strength),
    )
    assert all(g.isfinite().all() for g in result.grads.values())
    assert any(g.abs().max() > 0 for g in result.grads.values())


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", SMALL)
def test_the_protocol_says_whether_queries_depend_on_each_other(name, norm):
    build, size = SMALL[name]
    torch.manual_seed(0)
    model = build(norm).double()
    images = torch.rand(6, 2, size, size, dtype=torch.float64)
    support = torch.rand(1, 3, 2, size, size, dtype=torch.float64)
    rows = {key: p.detach()[None] for key, p in model.named_parameters()}
    together, alone = (predict(model, rows, images[None, :k], support_inputs=support)[0, :4] for k in (6, 4))
    depends = not torch.allclose(together, alone, rtol=1e-9, atol=1e-12)
    assert depends == (norm == "batch")

    class Module:
        backbone = model
        inner_solver = GradientDescent(0.1, 3)
        eval_inner_solver = None

    words = str(Protocol.of(Module, class_episode(ways=WAYS)))
    inductive = "support statistics (inductive)" if norm == "support" else "3 inner steps, inductive"
    assert words.endswith("batch statistics (transductive)" if depends else inductive)


@pytest.mark.parametrize("name", SMALL)
def test_new_weights_are_new(name):
    model = SMALL[name][0]("batch")
    before = {key: p.clone() for key, p in model.named_parameters()}
    model.reset_parameters()
    weights = [key for key, p in before.items() if p.ndim > 1]
    assert weights
    assert not any(torch.equal(before[key], dict(model.named_parameters())[key]) for key in weights)


def test_group_and_layer_norms_are_pytorchs():
    torch.manual_seed(0)
    flat, images = torch.randn(5, 12), torch.randn(5, 12, 3, 3)
    torch.testing.assert_close(norm_layer("layer", 12, images=False)(flat), F.layer_norm(flat, (12,)))
    torch.testing.assert_close(norm_layer("layer", 12)(images), F.layer_norm(images, (12, 3, 3)))
    torch.testing.assert_close(norm_layer("group", 12)(images), F.group_norm(images, 3))
    assert isinstance(norm_layer("none", 12), nn.Identity)


BAD = {
    "norm": (lambda: Conv4(5, norm="instance"), r"norm must be one of 'batch', .*; found 'instance'"),
    "odd groups": (lambda: MLP(4, 2, (7,), norm="group"), r"an even number of channels.*found 7\. Use an even width"),
    "downsampling": (
        lambda: Conv4(5, downsampling="mean"),
        "downsampling must be 'stride' or 'max-pool'; .* 'mean'",
    ),
    "too small to pool": (lambda: Conv4(5, image_size=15, downsampling="max-pool"), r"at least 16 pixels; found 15"),
    "depth": (lambda: WideResNet(5, depth=15), r"depth must be 10, 16, 22, 28 ….*found 15"),
    "width": (lambda: WideResNet(5, width=0), "width must be at least 1; found 0"),
    "widths": (lambda: ResNet12(5, widths=(4, 4)), r"widths must be four numbers; found \(4, 4\)"),
    "ways": (lambda: ResNet12(0), r"ways and channels must be at least 1; found \(0, 3\)"),
    "hidden": (lambda: MLP(4, 2, (0,)), r"hidden must be at least 1; found \[4, 0, 2\]"),
    "MLP's inputs": (lambda: MLP(4, 2)(torch.zeros(2, 5)), r"must have 4 numbers a sample; found \[2, 5\]"),
    "channels": (
        lambda: ResNet12(5)(torch.zeros(2, 1, 16, 16)),
        r"\[n, 3, height, width\].*found \[2, 1, 16, 16\]",
    ),
    "small images": (lambda: WideResNet(5)(torch.zeros(2, 3, 2, 2)), "with at least 4 pixels each"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_explained(case):
    call, words = BAD[case]
    with pytest.raises(ValueError, match=words):
        call()
