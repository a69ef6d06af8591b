"""Functions in another form: the originals' values and slopes, right second derivatives, and the same for all tasks."""

from __future__ import annotations

import pytest
import torch
from conftest import regression_episode
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import vmap
from torch.nn import functional as F

from lightning_imaml.curvature import GaussNewton, Hessian
from lightning_imaml.functional import meta_gradient
from lightning_imaml.inner import GradientDescent
from lightning_imaml.linear import Direct
from lightning_imaml.meta_gradients import FirstOrder, Implicit, Unrolled
from lightning_imaml.regularizers import NoRegularizer, Proximal
from lightning_imaml.runtime.replacements import FORMS, Replacements

IDS = torch.tensor([[0, 1, 2], [3, 3, 0], [0, 0, 0], [2, 4, 1]])
FLAT, OFFSETS = torch.tensor([0, 1, 2, 3, 3, 0, 4]), torch.tensor([0, 2, 2, 5])


def bag(input, offsets=None, **options):
    return lambda weight: F.embedding_bag(input, weight, offsets, **options)


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


LABELS, WEIGHTS, G = torch.tensor([0, 2, 1, 2]), draw(4, 3), draw(5) + 2
CASES = {
    "embedding": (lambda weight: F.embedding(IDS, weight, padding_idx=0), (5, 4)),
    "embedding, padding from the end": (lambda weight: F.embedding(IDS, weight, padding_idx=-2), (5, 4)),
    "bag sum": (bag(IDS, mode="sum"), (5, 4)),
    "bag mean, padded": (bag(IDS, mode="mean", padding_idx=0), (5, 4)),
    "bag max, padded": (bag(IDS, mode="max", padding_idx=0), (5, 4)),
    "bag sum, weighted": (bag(IDS, mode="sum", per_sample_weights=WEIGHTS, padding_idx=3), (5, 4)),
    "bag sum, offsets": (bag(FLAT, OFFSETS, mode="sum"), (5, 4)),
    "bag mean, offsets, padded": (bag(FLAT, OFFSETS, mode="mean", padding_idx=3), (5, 4)),
    "bag max, offsets": (bag(FLAT, OFFSETS, mode="max"), (5, 4)),
    "bag mean, last offset": (bag(FLAT, torch.tensor([0, 2, 5, 7]), mode="mean", include_last_offset=True), (5, 4)),
    "hardsigmoid": (F.hardsigmoid, (4, 3)),
    "rrelu, evaluating": (F.rrelu, (4, 3)),
    "margins": (lambda x: F.multi_margin_loss(x, LABELS)[None], (4, 3)),
    "squared margins": (lambda x: F.multi_margin_loss(x, LABELS, 2, 0.5, G[:3], reduction="none"), (4, 3)),
    "hardswish": (F.hardswish, (4, 3)),
    "hardsigmoid in place": (lambda x: F.hardsigmoid(x * 1, inplace=True), (4, 3)),
    "weight norm": (lambda v: torch._weight_norm(v, G[:, None], 0), (5, 3)),
    "weight norm, last": (lambda v: torch._weight_norm(v, G[None, :3], 1), (5, 3)),
    "weight norm, all": (lambda v: torch._weight_norm(v, G[0], -1), (5, 3)),
    "weight norm of a convolution": (lambda v: torch._weight_norm(v, G[:3, None, None, None], 0), (3, 2, 2, 2)),
}


def replaced(function):
    def run(point):
        with Replacements():
            return function(point)

    return run


@pytest.mark.parametrize("name", CASES)
def test_values_and_slopes_are_the_originals_and_second_derivatives_are_right(name):
    function, shape = CASES[name]
    point = draw(*shape).requires_grad_()
    values = [run(point) for run in (function, replaced(function))]
    torch.testing.assert_close(values[1], values[0], rtol=1e-12, atol=1e-14)
    slope = draw(*values[0].shape)
    slopes = [torch.autograd.grad(value, point, slope)[0] for value in values]
    # PyTorch's own slope of hardsigmoid has 1/6 in float32.
    torch.testing.assert_close(slopes[1], slopes[0], rtol=1e-7 if "hardsigmoid" in name else 1e-12, atol=1e-14)
    if "embedding" not in name:  # The slope of a padding row is zero, which its values are not.
        assert gradcheck(replaced(function), point)
    assert gradgradcheck(replaced(function), point)


@pytest.mark.parametrize("name", CASES)
def test_all_tasks_at_once_give_what_one_at_a_time_gives(name):
    function, shape = CASES[name]
    points = draw(3, *shape).requires_grad_()
    run = replaced(function)
    together, alone = vmap(run)(points), torch.stack([run(point) for point in points])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-14)
    weights = draw(*alone.shape)
    found, expected = (torch.autograd.grad((v * weights).sum(), points)[0] for v in (together, alone))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_what_no_formula_stands_for_is_left_to_pytorch():
    with Replacements() as mode:
        x = draw(5, 4)
        F.embedding(IDS, x)
        F.embedding(IDS, x, padding_idx=0, scale_grad_by_freq=True)
        F.embedding_bag(IDS, x, scale_grad_by_freq=True)
        F.relu(x)
    assert not mode.used
    assert len(FORMS) >= 4


class Words(nn.Module):
    """Three words a sample, of which 0 is padding."""

    def __init__(self, embedding):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = embedding(), nn.Linear(4, 2)
        nn.init.normal_(self.embedding.weight)
        self.double()

    def forward(self, x):
        found = self.embedding((x.abs() * 3).long().clamp(max=4))
        return self.head(torch.tanh(found if found.ndim == 2 else found.mean(1)))


class ByHand(nn.Module):
    """The sum over g · v/‖v‖."""

    def __init__(self):
        super().__init__()
        layer = weight_normed()[0]
        self.g, self.v = (nn.Parameter(getattr(layer.parametrizations.weight, k).data) for k in
                          ("original0", "original1"))  # fmt: skip
        self.bias, self.head = layer.bias, weight_normed()[2]

    def forward(self, x):
        weight = self.g * self.v / self.v.square().sum(1, keepdim=True).sqrt()
        return self.head(torch.tanh(x @ weight.T + self.bias))


def weight_normed():
    torch.manual_seed(0)
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 4))
    return nn.Sequential(layer, nn.Tanh(), nn.Linear(4, 2)).double()


ESTIMATORS = [FirstOrder(), Unrolled(), Implicit(Direct(), Hessian()), Implicit(Direct(), GaussNewton())]
SETTINGS = {"loss": F.mse_loss, "inner_solver": GradientDescent(0.1, 3), "regularizer": Proximal(2.0)}


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
def test_weight_norm_gives_what_g_v_over_the_norm_of_v_gives(estimator):
    settings = SETTINGS | {"estimator": estimator}
    found, expected = (meta_gradient(net, regression_episode(), **settings) for net in (weight_normed(), ByHand()))
    names = {"0.bias": "bias", "2.weight": "head.weight", "2.bias": "head.bias",
             "0.parametrizations.weight.original0": "g", "0.parametrizations.weight.original1": "v"}  # fmt: skip
    assert found.grads.keys() == names.keys()
    for name, g in found.grads.items():
        torch.testing.assert_close(g, expected.grads[names[name]], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_padding_stays_in_every_task(kind, estimator):
    network, episode = Words(lambda: kind(5, 4, padding_idx=0)), regression_episode()
    settings = SETTINGS | {"estimator": estimator, "regularizer": Proximal(3.0)}
    found = [meta_gradient(network, episode, chunk_size=size, **settings) for size in (1, 4, 3)]
    padding = network.embedding.weight[0].expand(4, -1)
    for result in found:
        torch.testing.assert_close(result.adapted.parameters["embedding.weight"][:, 0], padding, rtol=0, atol=0)
        torch.testing.assert_close(result.grads, found[0].grads, rtol=1e-9, atol=1e-12)


def test_the_unrolled_gradient_with_padding_is_the_plain_loops():
    network, episode = Words(lambda: nn.Embedding(5, 4, padding_idx=0)), regression_episode()
    theta, total = dict(network.named_parameters()), []
    for task in range(4):
        phi = {name: p.clone() for name, p in theta.items()}
        for _ in range(3):
            outputs = torch.func.functional_call(network, phi, episode.support_inputs[task])
            loss = F.mse_loss(outputs, episode.support_targets[task])
            slopes = torch.autograd.grad(loss, list(phi.values()), create_graph=True)
            phi = {name: p - 0.1 * g for (name, p), g in zip(phi.items(), slopes, strict=True)}
        outputs = torch.func.functional_call(network, phi, episode.query_inputs[task])
        loss = F.mse_loss(outputs, episode.query_targets[task])
        total.append(torch.autograd.grad(loss, list(theta.values())))
    settings = SETTINGS | {"estimator": Unrolled(), "regularizer": NoRegularizer()}
    for order in (slice(None), [2, 0, 3, 1]):
        shuffled = type(episode)(*(t[order] for t in episode))
        found = meta_gradient(network, shuffled, chunk_size=4, **settings).grads
        for name, parts in zip(theta, zip(*total, strict=True), strict=True):
            torch.testing.assert_close(found[name], torch.stack(parts).mean(0), rtol=1e-9, atol=1e-12)


def test_embeddings_that_rescale_their_weights_are_refused_by_name():
    network, episode = Words(lambda: nn.Embedding(5, 4, max_norm=1.0)), regression_episode()
    with pytest.raises(ValueError, match=r"found Embedding 'embedding' with max_norm=1.0. Set its max_norm to None"):
        meta_gradient(network, episode, **SETTINGS)
    network.embedding.max_norm = None
    meta_gradient(network, episode, **SETTINGS)


def test_mobilenets_activation_has_a_hessian():
    def build(activation):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), activation, nn.Linear(4, 2)).double()

    class Written(nn.Module):
        def forward(self, x):
            return (x + 3).clamp(0, 6) / 6

    episode = regression_episode()
    for estimator in ESTIMATORS:
        settings = SETTINGS | {"estimator": estimator}
        for size in (1, 4):
            nets = build(nn.Hardsigmoid()), build(Written())
            found, expected = (meta_gradient(net, episode, chunk_size=size, **settings).grads for net in nets)
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_no_mode_is_left_where_nothing_is_replaced(monkeypatch):
    entered, enter = [], Replacements.__enter__
    monkeypatch.setattr(Replacements, "__enter__", lambda self: (entered.append(self), enter(self))[1])
    network, episode = nn.Linear(3, 2).double(), regression_episode()
    meta_gradient(network, episode, **SETTINGS)
    first = len(entered)
    meta_gradient(network, episode, **SETTINGS)
    assert first == len(entered) > 0
