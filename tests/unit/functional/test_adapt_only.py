"""Adapting a part of the network: against the formula by hand, finite differences, and what it must save."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import TanhNet, class_episode, regression_episode
from torch import nn
from torch.autograd.functional import hessian, jacobian
from torch.func import functional_call
from torch.nn import functional as F

from lightning_imaml import Episode, IMAMLModule
from lightning_imaml._compile import door, splitting
from lightning_imaml.callbacks import LiveTensorBytes
from lightning_imaml.curvature import GaussNewton
from lightning_imaml.functional import adapt, evaluate, meta_gradient, predict
from lightning_imaml.inner import GradientDescent
from lightning_imaml.linear import ConjugateGradient, Direct
from lightning_imaml.meta_gradients import FirstOrder, Implicit, Reptile, Truncated, Unrolled
from lightning_imaml.models import MLP, Conv4, LowRankAdapter, ResNet12, add_low_rank_adapters
from lightning_imaml.problems.network import FlatModel
from lightning_imaml.regularizers import KroneckerProximal, Proximal

EPISODE = regression_episode()
HEAD, BODY = ("out.weight", "out.bias"), ("hidden.weight", "hidden.bias")
STRENGTH = 0.8
TIGHT = GradientDescent(0.2, 5000, tol=1e-13)


def run(net, estimator=Implicit(Direct()), solver=TIGHT, **more):  # noqa: B008
    settings = {"loss": F.mse_loss, "regularizer": Proximal(STRENGTH), "adapt_only": ("out.*",)}
    return meta_gradient(net, EPISODE, inner_solver=solver, estimator=estimator, **settings | more)


def by_hand(net: nn.Module, adapted: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """dF/dθ and dF/dω with dense second derivatives by torch.autograd.functional."""
    named = {name: p.detach() for name, p in net.named_parameters()}
    shared = [name for name in named if name not in adapted]
    sizes = {name: p.numel() for name, p in named.items()}

    def cut(row, names):
        pieces = row.split([sizes[name] for name in names])
        return {name: piece.view_as(named[name]) for name, piece in zip(names, pieces, strict=True)}

    theta = torch.cat([named[name].flatten() for name in adapted])
    omega = torch.cat([named[name].flatten() for name in shared])
    total = {name: torch.zeros_like(p) for name, p in named.items()}
    for x, y, xq, yq in zip(*EPISODE, strict=True):

        def loss(phi, omega, x=x, y=y):
            return F.mse_loss(functional_call(net, cut(phi, adapted) | cut(omega, shared), (x,)), y)

        def inner(phi):
            return loss(phi, omega) + STRENGTH / 2 * (phi - theta).square().sum()

        phi = theta
        for _ in range(30):  # Newton's method.
            phi = phi - torch.linalg.solve(hessian(inner, phi), jacobian(inner, phi))
        assert jacobian(inner, phi).norm() < 1e-13
        of_phi, of_omega = jacobian(lambda p, o: loss(p, o, xq, yq), (phi, omega))  # noqa: B023
        u = torch.linalg.solve(hessian(inner, phi), of_phi)
        _, mixed = hessian(loss, (phi, omega))[0]
        for name, part in (cut(STRENGTH * u, adapted) | cut(of_omega - mixed.T @ u, shared)).items():
            total[name] += part / EPISODE.tasks
    return total


@pytest.mark.parametrize("adapted", [HEAD, BODY, ("hidden.weight", "out.bias")], ids=["head", "body", "mixed"])
def test_the_meta_gradient_is_the_general_formula_by_hand(tanh_net, adapted):
    expected = by_hand(tanh_net, adapted)
    found = run(tanh_net, adapt_only=adapted)
    assert found.adapted.converged.all()
    assert set(found.grads) == set(expected)
    assert set(found.adapted.parameters) == set(adapted)
    for name, gradient in expected.items():
        torch.testing.assert_close(found.grads[name], gradient, rtol=1e-8, atol=1e-10)
    assert expected["hidden.weight"].abs().max() > 1e-3


def test_the_shared_parameters_have_the_gradient_of_central_differences(tanh_net):
    found = run(tanh_net).grads["hidden.weight"][1, 2]
    losses = []
    for step in (1e-4, -1e-4):
        moved = copy.deepcopy(tanh_net)
        with torch.no_grad():
            moved.hidden.weight[1, 2] += step
        losses.append(run(moved, FirstOrder()).loss.mean())
    torch.testing.assert_close(found, (losses[0] - losses[1]) / 2e-4, rtol=1e-6, atol=1e-9)


def test_unrolled_is_implicit_at_convergence_and_truncated_lies_between(tanh_net):
    implicit, solver = run(tanh_net), GradientDescent(0.2, 200)
    unrolled = run(tanh_net, Unrolled(), solver)
    for name in implicit.grads:
        torch.testing.assert_close(unrolled.grads[name], implicit.grads[name], rtol=1e-7, atol=1e-9)
    few = GradientDescent(0.2, 5)
    for ours, theirs in ((Truncated(5), Unrolled()), (Truncated(0), FirstOrder())):
        for name, gradient in run(tanh_net, ours, few).grads.items():
            torch.testing.assert_close(gradient, run(tanh_net, theirs, few).grads[name], rtol=1e-10, atol=1e-12)


def test_first_order_is_the_direct_part(tanh_net):
    few = GradientDescent(0.2, 5)
    found = run(tanh_net, FirstOrder(), few)
    phi = {name: p.clone().requires_grad_() for name, p in found.adapted.parameters.items()}
    tanh_net.zero_grad()
    for i in range(EPISODE.tasks):
        own = {name: p[i] for name, p in phi.items()}
        F.mse_loss(functional_call(tanh_net, own, (EPISODE.query_inputs[i],)), EPISODE.query_targets[i]).backward()
    for name in BODY:
        expected = tanh_net.get_parameter(name).grad / EPISODE.tasks
        torch.testing.assert_close(found.grads[name], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("estimator", [Implicit(curvature=GaussNewton()), Unrolled(), FirstOrder()], ids=str)
def test_chunks_compiling_and_learned_strengths_change_nothing(tanh_net, estimator, monkeypatch):
    more = {"solver": GradientDescent(0.2, 4)}
    if not isinstance(estimator, FirstOrder):
        more["regularizer"] = KroneckerProximal(STRENGTH)
    plain = run(tanh_net, estimator, **more)
    graphs = []
    door._kept.clear()
    monkeypatch.setattr(splitting, "_inductor", lambda graph: graphs.append(graph) or graph)
    for settings in ({"chunk_size": 1}, {"chunk_size": 3}, {"compile": True}):
        found = run(tanh_net, estimator, **more, **settings)
        for name, gradient in plain.grads.items():
            torch.testing.assert_close(found.grads[name], gradient, rtol=1e-9, atol=1e-12)
    door._kept.clear()
    assert graphs
    assert ("regularizer.out/weight/rows" in plain.grads) == ("regularizer" in more)


def test_adapt_gives_the_adapted_part_which_predict_and_evaluate_take(tanh_net):
    support = EPISODE.support_inputs, EPISODE.support_targets
    found = adapt(tanh_net, *support, loss=F.mse_loss, adapt_only=("out.*",))
    assert set(found.parameters) == set(HEAD)
    own = {name: p[2] for name, p in found.parameters.items()}
    expected = functional_call(tanh_net, own, (EPISODE.query_inputs[2],))
    outputs = predict(tanh_net, found.parameters, EPISODE.query_inputs)
    torch.testing.assert_close(outputs[2], expected)
    query = EPISODE.query_inputs, EPISODE.query_targets
    losses, _ = evaluate(tanh_net, found.parameters, *query, loss=F.mse_loss)
    torch.testing.assert_close(losses[2], F.mse_loss(expected, EPISODE.query_targets[2]))
    whole = adapt(tanh_net, *support, loss=F.mse_loss, adapt_only=("*",))
    every = adapt(tanh_net, *support, loss=F.mse_loss)
    torch.testing.assert_close(whole.parameters, every.parameters)


def test_frozen_parameters_are_neither_adapted_nor_shared(tanh_net):
    tanh_net.hidden.bias.requires_grad_(False)
    assert set(run(tanh_net).grads) == {*HEAD, "hidden.weight"}


def test_compiled_code_knows_frozen_from_shared_parameters(tanh_net, monkeypatch):
    door._kept.clear()
    monkeypatch.setattr(splitting, "_inductor", lambda graph: graph)
    few = GradientDescent(0.2, 3)
    for frozen in (False, True):
        tanh_net.hidden.bias.requires_grad_(not frozen)
        found = run(tanh_net, solver=few, compile=True).grads
        assert ("hidden.bias" in found) != frozen
        torch.testing.assert_close(found, run(tanh_net, solver=few).grads, rtol=1e-9, atol=1e-12)
    door._kept.clear()


def test_the_head_of_a_resnet_12_needs_less_memory():
    torch.manual_seed(0)
    net, episode = ResNet12(5, widths=(4, 4, 8, 8)), class_episode(1, shape=(3, 20, 20))
    peaks = {}
    for adapt_only in (None, ("classifier.*",)):
        settings = {"inner_solver": GradientDescent(0.1, 3), "adapt_only": adapt_only, "chunk_size": 1}
        with LiveTensorBytes() as live:
            adapt(net, episode.support_inputs, episode.support_targets, **settings)
        peaks[adapt_only] = live.peak
        result = meta_gradient(net, episode, estimator=Implicit(curvature=GaussNewton()), **settings)
        assert set(result.grads) == {name for name, _ in net.named_parameters()}
        assert all(gradient.abs().max() > 0 for gradient in result.grads.values())
    assert peaks["classifier.*",] < 0.6 * peaks[None]


@pytest.mark.parametrize(
    "make", [lambda: Conv4(3, filters=4, image_size=9), lambda: MLP(81, 3, hidden=[6])], ids=["conv", "mlp"]
)
def test_low_rank_adapters_start_from_the_network_and_adapt_alone(make):
    torch.manual_seed(0)
    net = make()
    episode = class_episode(2, 3, shape=(1, 9, 9))
    net = net.double()
    episode = Episode(*[t.double() if t.is_floating_point() else t for t in episode])
    before = net(episode.support_inputs[0])
    network = add_low_rank_adapters(net, rank=2)
    torch.testing.assert_close(network(episode.support_inputs[0]), before)
    settings = {"adapt_only": ("*.down.*", "*.up.*"), "inner_solver": GradientDescent(0.1, 10)}
    result = meta_gradient(network, episode, estimator=Implicit(ConjugateGradient(3), GaussNewton()), **settings)
    assert all(".up." in name or ".down." in name for name in result.adapted.parameters)
    assert result.grads[next(name for name in result.grads if name.endswith("layer.weight"))].abs().max() > 0
    unadapted = F.cross_entropy(before, episode.support_targets[0])
    support = F.cross_entropy(
        predict(network, result.adapted.parameters, episode.support_inputs)[0], episode.support_targets[0]
    )
    assert support < unadapted


def with_some_adapters(network, **settings):
    network = add_low_rank_adapters(network, rank=2, **settings).double()
    for adapter in network.modules():
        if isinstance(adapter, LowRankAdapter):
            nn.init.normal_(adapter.up.weight)
    return network


def test_adapters_in_attention_whose_output_layer_is_read_and_not_called():
    torch.manual_seed(0)
    plain = nn.MultiheadAttention(4, 2, batch_first=True).double()
    found, x = with_some_adapters(copy.deepcopy(plain)), torch.randn(2, 3, 4).double()
    with torch.no_grad():
        plain.out_proj.weight += found.out_proj.up.weight @ found.out_proj.down.weight
    torch.testing.assert_close(found(x, x, x)[0], plain(x, x, x)[0])


def test_adapters_in_both_places_of_a_layer():
    torch.manual_seed(0)
    layer = nn.Linear(3, 3)
    net = with_some_adapters(nn.Sequential(layer, nn.Tanh(), layer))
    assert net[0] is net[2]
    assert isinstance(net[0], LowRankAdapter)


@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
def test_an_adapter_adds_a_matrix_of_low_rank(padding_mode):
    torch.manual_seed(0)
    layer = nn.Linear(5, 4).double()
    adapter = LowRankAdapter(layer, rank=2)
    nn.init.normal_(adapter.up.weight)
    added = adapter.up.weight @ adapter.down.weight
    assert torch.linalg.matrix_rank(added) == 2
    x = torch.randn(3, 5).double()
    torch.testing.assert_close(adapter(x), F.linear(x, layer.weight + added, layer.bias))
    conv = nn.Conv2d(3, 4, 3, stride=2, padding=1, padding_mode=padding_mode).double()
    adapter = LowRankAdapter(conv, rank=2)
    nn.init.normal_(adapter.up.weight)
    added = torch.einsum("or,rihw->oihw", adapter.up.weight[:, :, 0, 0], adapter.down.weight)
    x = torch.randn(2, 3, 7, 7).double()
    torch.testing.assert_close(adapter.weight, conv.weight + added)
    with torch.no_grad():
        expected, conv.weight[:] = adapter(x), conv.weight + added
    torch.testing.assert_close(conv(x), expected)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda net: run(net, adapt_only=("head.*",)),
            r"adapt_only must be patterns .*found \['head.\*'\].*out",
        ),
        (lambda net: run(net, adapt_only="out.*"), r"adapt_only must be a sequence of patterns.*found 'out.\*'"),
        (lambda net: IMAMLModule(net, adapt_only="out.*"), r"adapt_only must be a sequence.*found 'out.\*'"),
        (lambda net: run(net, adapt_only=()), r"adapt_only must be a sequence of patterns"),
        (lambda net: run(net, Reptile()), r"Reptile: .* that do not adapt must be frozen.*found \['hidden.weight'"),
        (
            lambda net: run(net, regularizer=Proximal({"hidden.*": 1.0, "*": 1.0})),
            r"strength must be patterns.*found \['hidden.\*'\]",
        ),
        (lambda net: add_low_rank_adapters(net, layers=("conv*",)), r"layers must be patterns .*\['hidden', 'out'\]"),
        (lambda net: add_low_rank_adapters(net, rank=0), "rank must be at least 1; found 0"),
    ],
)
def test_bad_settings_are_explained(make, words):
    with pytest.raises(ValueError, match=words):
        make(TanhNet().double())


def test_a_tied_weight_adapts_by_any_of_its_names():
    """Not the bias alone of a head that shares its weight with an earlier layer."""
    net = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Tanh(), nn.Linear(3, 3)).double()
    net[2].weight = net[0].weight
    assert FlatModel(net, adapt_only=("2.*",)).names == ("0.weight", "2.bias")
    assert FlatModel(net, adapt_only=("0.*",)).shared == ("2.bias",)


def test_rows_hold_the_adapted_part_alone(tanh_net):
    flat = FlatModel(tanh_net, adapt_only=("out.*",))
    assert flat.initial().numel() == 10
    assert flat.shared == BODY
    assert not any(tensor.requires_grad for tensor in flat.state().values())
