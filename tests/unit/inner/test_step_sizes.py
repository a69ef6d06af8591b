"""Learned step sizes of the inner solvers: against finite differences and by hand."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from conftest import TanhNet, regression_episode
from lightning.pytorch import Trainer
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_imaml import IMAMLModule
from lightning_imaml._compile import door, splitting
from lightning_imaml.callbacks import MetaGradientErrorMonitor
from lightning_imaml.functional import adapt, meta_gradient
from lightning_imaml.inner import GradientDescent, HessianFree, Nesterov
from lightning_imaml.meta_gradients import FirstOrder, Implicit, Reptile, Truncated, Unrolled
from lightning_imaml.problems.network import FlatModel
from lightning_imaml.regularizers import KroneckerProximal, LowRankProximal, NoRegularizer, Proximal

EPISODE = regression_episode()
PATTERNS = {"out.*": 0.1, "*": 0.3}
SOLVERS = {
    f"{kind.__name__}, {name}": kind(lr, 4, learned=True, **options)
    for kind in (GradientDescent, Nesterov)
    for name, (lr, options) in {
        "scalar": (0.2, {}),
        "bounded": (0.2, {"bounds": (0.01, 1.0)}),
        "pattern": (PATTERNS, {}),
        "layer": (0.2, {"per": "layer"}),
        "parameter": (PATTERNS, {"per": "parameter"}),
    }.items()
}


def run(net, solver, estimator=Unrolled(), **more):  # noqa: B008
    settings = {"loss": F.mse_loss, "regularizer": Proximal(0.5), "estimator": estimator}
    return meta_gradient(net, EPISODE, inner_solver=solver, **settings | more)


@pytest.mark.parametrize("name", SOLVERS)
def test_the_gradient_is_that_of_central_differences(name, tanh_net):
    solver, step = SOLVERS[name], 1e-5
    ((leaf, start),) = solver.rates(FlatModel(tanh_net)).items()
    generator = torch.Generator().manual_seed(1)
    random = torch.randn(2, *start.shape, generator=generator, dtype=torch.float64)
    value, way = start + 0.2 * random[0], random[1]
    found = run(tanh_net, solver, rates={leaf: value}).grads[f"inner_solver.{leaf}"]
    assert found.shape == start.shape
    ends = [run(tanh_net, solver, rates={leaf: value + sign * step * way}).loss.mean() for sign in (1, -1)]
    torch.testing.assert_close((found * way).sum(), (ends[0] - ends[1]) / (2 * step), rtol=1e-6, atol=1e-9)


def test_the_last_step_by_hand(tanh_net):
    """φ = φ' − lr ⊙ ∇L(φ'), so that dQ/d log lr = −lr ⊙ ∇L(φ') ⊙ ∇Q(φ), summed over what shares it."""
    solver = GradientDescent(0.2, 1, learned=True, per="parameter")
    found = run(tanh_net, solver, Truncated(1), regularizer=NoRegularizer()).grads["inner_solver.log_lr"]
    expected = torch.zeros_like(found)
    for x, y, xq, yq in zip(*EPISODE, strict=True):
        start = dict(tanh_net.named_parameters())
        slopes = torch.autograd.grad(F.mse_loss(tanh_net(x), y), list(start.values()))
        phi = {k: (p - 0.2 * g).detach().requires_grad_() for (k, p), g in zip(start.items(), slopes, strict=True)}
        outer = F.mse_loss(torch.func.functional_call(tanh_net, phi, (xq,)), yq)
        outers = torch.autograd.grad(outer, list(phi.values()))
        expected -= torch.cat([(0.2 * g * q).flatten() for g, q in zip(slopes, outers, strict=True)]) / EPISODE.tasks
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_truncated_differentiates_the_last_steps(tanh_net):
    solver = SOLVERS["GradientDescent, layer"]
    full = run(tanh_net, solver).grads["inner_solver.log_lr"]
    torch.testing.assert_close(run(tanh_net, solver, Truncated(4)).grads["inner_solver.log_lr"], full)
    distances = [(run(tanh_net, solver, Truncated(k)).grads["inner_solver.log_lr"] - full).norm() for k in (1, 2, 3)]
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] > 0


def test_equal_step_sizes_are_one_step_size(tanh_net):
    one = run(tanh_net, GradientDescent(0.2, 4), Implicit())
    by_name = run(tanh_net, GradientDescent({"out.*": 0.2, "*": 0.2}, 4), Implicit())
    learned = run(tanh_net, GradientDescent(0.2, 4, learned=True, per="parameter"))
    torch.testing.assert_close(by_name.loss, one.loss)
    torch.testing.assert_close(learned.loss, one.loss)
    other = run(tanh_net, GradientDescent(PATTERNS, 4), Implicit())
    assert (other.loss - one.loss).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["GradientDescent, pattern", "Nesterov, parameter"])
def test_compiled_steps_give_the_same(name, tanh_net, monkeypatch):
    graphs = []
    door._kept.clear()
    monkeypatch.setattr(splitting, "_inductor", lambda graph: graphs.append(graph) or graph)
    plain, compiled = (run(tanh_net, SOLVERS[name], compile=compile) for compile in (False, True))
    door._kept.clear()
    assert graphs
    for key in plain.grads:
        torch.testing.assert_close(compiled.grads[key], plain.grads[key], rtol=1e-9, atol=1e-12)


def test_compiled_steps_know_the_order_of_patterns(tanh_net, monkeypatch):
    """The first that matches counts: here for the weight of the last layer."""
    door._kept.clear()
    monkeypatch.setattr(splitting, "_inductor", lambda graph: graph)
    patterns = [("out.*", 0.1), ("*.weight", 0.3), ("*", 0.2)]
    losses = []
    for order in (patterns, [patterns[1], patterns[0], patterns[2]]):
        solver = GradientDescent(dict(order), 4)
        plain, compiled = (run(tanh_net, solver, compile=compile).loss for compile in (False, True))
        torch.testing.assert_close(compiled, plain, rtol=1e-9, atol=1e-12)
        losses.append(plain)
    door._kept.clear()
    assert (losses[0] - losses[1]).abs().max() > 1e-4
    assert GradientDescent(dict(patterns), 4) == GradientDescent(dict(patterns), 4) != Nesterov(dict(patterns), 4)


@pytest.mark.parametrize(
    ("estimator", "reason"),
    [
        (Implicit(), "the solution of the inner problem does not depend on them"),
        (FirstOrder(), "it takes the adapted parameters as constants"),
        (Reptile(), "it has no direction for them"),
        (Truncated(0), "with last_steps=0 it differentiates no step"),
    ],
)
def test_estimators_without_a_gradient_for_step_sizes_say_so(tanh_net, estimator, reason):
    words = (
        rf"{type(estimator).__name__}: the step sizes must be fixed, since {reason}; found \['log_lr'\]. Set learned"
    )
    with pytest.raises(ValueError, match=words):
        run(tanh_net, GradientDescent(0.1, 3, learned=True), estimator)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: GradientDescent({}, 3), "lr must be a positive finite number, or patterns with one each"),
        (lambda: GradientDescent(0.1, 3, per="layer"), "per must be None where nothing is learned"),
        (lambda: GradientDescent(2.0, 3, learned=True, bounds=(0.1, 1.0)), "bounds must be two positive numbers with"),
        (lambda: run(TanhNet().double(), GradientDescent({"head.*": 0.1}, 3)), r"lr must be patterns .*'out.bias'"),
    ],
)
def test_bad_settings_are_explained(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def fit(model: IMAMLModule, *callbacks, **settings) -> Trainer:
    trainer = Trainer(
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, max_epochs=1, callbacks=list(callbacks), **settings,
    )  # fmt: skip
    trainer.fit(model, DataLoader([regression_episode(seed=k) for k in range(4)], batch_size=None))
    return trainer


def module(**settings) -> IMAMLModule:
    torch.manual_seed(0)
    defaults = {"loss": F.mse_loss, "regularizer": Proximal(0.5, learned=True, per="layer"), "estimator": Unrolled()}
    return IMAMLModule(TanhNet().double(), **defaults | settings)


def test_the_module_learns_step_sizes_in_a_group_of_their_own(tmp_path):
    solver = GradientDescent(PATTERNS, 3, learned=True, per="parameter")
    sgd = functools.partial(torch.optim.SGD, lr=0.0)
    model = module(inner_solver=solver, optimizer=sgd, inner_solver_lr=0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = fit(model)
    groups = {group["name"]: group["lr"] for group in trainer.optimizers[0].param_groups}
    assert groups == {"backbone": 0.0, "inner_solver": 0.1}
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"rates.log_lr"}
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    loaded = IMAMLModule.load_from_checkpoint(tmp_path / "model.ckpt", backbone=TanhNet().double(), loss=F.mse_loss)
    assert loaded.inner_solver == solver
    episode = regression_episode(seed=9)
    ours, theirs = (m.adapt(episode.support_inputs, episode.support_targets).parameters for m in (model, loaded))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_the_module_adapts_the_head_alone_and_learns_the_rest(tmp_path):
    model = module(inner_solver=GradientDescent(0.2, 3), estimator=Implicit(), adapt_only=["out.*"])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = fit(model, MetaGradientErrorMonitor(every_n_steps=2))
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert model.strengths["log_strength"].shape == ()  # The head is one layer.
    assert trainer.callback_metrics["meta_gradient/cosine"] > 0.9
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    loaded = IMAMLModule.load_from_checkpoint(tmp_path / "model.ckpt", backbone=TanhNet().double(), loss=F.mse_loss)
    episode = regression_episode(seed=9)
    assert set(loaded.adapt(episode.support_inputs, episode.support_targets).parameters) == {"out.weight", "out.bias"}


@pytest.mark.parametrize("regularizer", [KroneckerProximal(0.5), LowRankProximal(0.5, rank=2)], ids=str)
def test_learned_matrices_are_trained_in_their_group_saved_and_loaded(regularizer, tmp_path):
    sgd = functools.partial(torch.optim.SGD, lr=0.0)
    settings = {"inner_solver": GradientDescent(0.2, 3), "estimator": Implicit(), "regularizer_lr": 0.05}
    model = module(regularizer=regularizer, optimizer=sgd, **settings)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = fit(model)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {f"strengths.{name}" for name in model.strengths}
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    loaded = IMAMLModule.load_from_checkpoint(tmp_path / "model.ckpt", backbone=TanhNet().double(), loss=F.mse_loss)
    assert loaded.regularizer == regularizer
    torch.testing.assert_close(dict(loaded.strengths), dict(model.strengths), rtol=0, atol=0)


def test_the_error_monitor_says_that_learned_step_sizes_have_no_reference():
    model = module(inner_solver=GradientDescent(0.1, 3, learned=True))
    with pytest.raises(ValueError, match="MetaGradientErrorMonitor: the inner solver's step sizes must be fixed"):
        fit(model, MetaGradientErrorMonitor())


def test_other_solvers_have_none(tanh_net):
    assert HessianFree(2).rates(FlatModel(tanh_net)) == {}


def test_a_module_with_learned_step_sizes_adapts_with_another_solver_too(tanh_net):
    support, settings = EPISODE[:2], {"loss": F.mse_loss, "regularizer": Proximal(0.5)}
    module = IMAMLModule(tanh_net, inner_solver=GradientDescent(0.2, 2, learned=True), **settings)
    for solver in (GradientDescent(0.1, 2), Nesterov(0.1, 2), HessianFree(2)):
        expected = adapt(tanh_net, *support, inner_solver=solver, **settings)
        found = module.adapt(*support, inner_solver=solver)
        torch.testing.assert_close(found.residual, expected.residual)
    module.rates["log_lr"].data -= 1
    longer = module.adapt(*support, inner_solver=GradientDescent(0.2, 4, learned=True))  # With what was learned.
    expected = adapt(tanh_net, *support, inner_solver=GradientDescent(0.2 / math.e, 4), **settings)
    torch.testing.assert_close(longer.residual, expected.residual, rtol=1e-6, atol=0)
