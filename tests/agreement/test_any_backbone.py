"""Backbones of every kind: all tasks at once give what one task at a time gives, and what finite differences give."""

from __future__ import annotations

import pytest
import torch
from conftest import class_episode
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_imaml import Episode
from lightning_imaml._compile import door, splitting
from lightning_imaml.curvature import GaussNewton, Hessian
from lightning_imaml.functional import adapt, evaluate, meta_gradient
from lightning_imaml.inner import GradientDescent
from lightning_imaml.linear import ConjugateGradient
from lightning_imaml.meta_gradients import FirstOrder, Implicit, Unrolled
from lightning_imaml.models import ResNet12, WideResNet
from lightning_imaml.regularizers import Proximal

WAYS, TASKS, DIM, SIDE = 3, 3, 8, 8


class FusedAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, DIM // 2)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class MultiheadAttention(nn.MultiheadAttention):
    def __init__(self, need_weights):
        super().__init__(DIM, 2, batch_first=True)
        self.need_weights = need_weights

    def forward(self, x):
        return super().forward(x, x, x, need_weights=self.need_weights)[0]


class ViT(nn.Module):
    """Patches, a class token, positions, one block of attention and one of two linear layers."""

    def __init__(self, attention):
        super().__init__()
        self.patches = nn.Conv2d(1, DIM, 4, stride=4)
        self.token, self.position = nn.Parameter(torch.randn(1, 1, DIM)), nn.Parameter(torch.randn(1, 5, DIM))
        self.attention = nn.Sequential(nn.LayerNorm(DIM), attention)
        self.mlp = nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, 12), nn.GELU(), nn.Linear(12, DIM))
        self.head = nn.Linear(DIM, WAYS)

    def forward(self, images):
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.position
        x = x + self.attention(x)
        x = x + self.mlp(x)
        return self.head(x[:, 0])


class Attending(nn.Module):
    """Attention between patches, after a group norm and a layer norm, and no more for the compiler."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Sequential(nn.Conv2d(1, DIM, 4, stride=4), nn.GroupNorm(2, DIM))
        self.attention = nn.Sequential(nn.LayerNorm(DIM), FusedAttention())
        self.head = nn.Linear(DIM, WAYS)

    def forward(self, images):
        x = self.patches(images).flatten(2).transpose(1, 2)
        return self.head((x + self.attention(x)).mean(dim=1))


class OfRows(nn.Module):
    """An image's rows as a sequence."""

    def __init__(self, sequence, width):
        super().__init__()
        self.sequence, self.head = sequence, nn.Linear(width, WAYS)

    def forward(self, images):
        found = self.sequence(images.squeeze(1))
        return self.head((found[0] if isinstance(found, tuple) else found)[:, -1])


class Words(nn.Module):
    """Grey levels as words."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(4, DIM), nn.Linear(DIM, WAYS)

    def forward(self, images):
        return self.head(torch.tanh(self.embedding((3 * images.flatten(1)).long().clamp(0, 3)).mean(dim=1)))


def convolutions(*layers):
    return nn.Sequential(nn.Conv2d(1, 4, 3, stride=2, padding=1), *layers, nn.Flatten(), nn.LazyLinear(WAYS))


def encoder(**options):
    return OfRows(nn.TransformerEncoderLayer(DIM, 2, 12, dropout=0.0, batch_first=True, **options), DIM)


BATCHED = {
    "ResNet-12": lambda: ResNet12(WAYS, 1, widths=(4, 4, 6, 8)),
    "WideResNet": lambda: WideResNet(WAYS, 1, depth=10, width=1),
    "ViT, fused attention": lambda: ViT(FusedAttention()),
    "ViT, MultiheadAttention": lambda: ViT(MultiheadAttention(True)),
    "ViT, MultiheadAttention without weights": lambda: ViT(MultiheadAttention(False)),
    "TransformerEncoderLayer": encoder,
    "TransformerEncoderLayer, norm first": lambda: encoder(norm_first=True, activation="gelu"),
    "TransformerEncoderLayer, evaluating": lambda: encoder().eval(),
    "embedding": Words,
    "GroupNorm": lambda: convolutions(nn.GroupNorm(2, 4), nn.Tanh()),
    "LayerNorm": lambda: convolutions(nn.LayerNorm([4, 4, 4]), nn.SiLU()),
    "InstanceNorm": lambda: convolutions(nn.InstanceNorm2d(4, affine=True), nn.PReLU()),
    "RMSNorm": lambda: convolutions(nn.RMSNorm([4, 4, 4]), nn.Softplus()),
    "depthwise, max-pooling": lambda: convolutions(nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.MaxPool2d(2), nn.Tanh()),
    "transposed, interpolated": lambda: convolutions(
        nn.ConvTranspose2d(4, 2, 2, 2), nn.Upsample(scale_factor=2, mode="bilinear"), nn.Tanh(), nn.AvgPool2d(4)
    ),
}
IN_TURN = {
    "RNN": lambda: OfRows(nn.RNN(SIDE, DIM, batch_first=True), DIM),
    "GRU": lambda: OfRows(nn.GRU(SIDE, DIM, batch_first=True), DIM),
    "LSTM": lambda: OfRows(nn.LSTM(SIDE, DIM, batch_first=True), DIM),
}
COMPILED = {"attention and norms": Attending}
KINKED = ("ResNet-12", "WideResNet")  # ReLU: finite differences step over kinks.
# Not the deep ones, whose recording takes long, and one for each kind of attention.
RECORDED = [
    *("ViT, fused attention", "TransformerEncoderLayer, evaluating", "embedding", "GroupNorm", "LayerNorm", "RMSNorm"),
    *("InstanceNorm", "depthwise, max-pooling", "transposed, interpolated"),
]
ESTIMATORS = {
    "Hessian": Implicit(ConjugateGradient(3), Hessian()),
    "Gauss-Newton": Implicit(ConjugateGradient(3), GaussNewton()),
    "unrolled": Unrolled(),
}
# Strong enough that conjugate gradient does not end at the first direction, with a gradient of zero.
SETTINGS = {"inner_solver": GradientDescent(0.02, 2), "regularizer": Proximal(20.0)}


def setting(name, dtype=torch.float64):
    torch.manual_seed(0)
    side = 16 if name == "ResNet-12" else SIDE
    episode = class_episode(TASKS, WAYS, shots=2, queries=2, shape=(1, side, side))
    network = (BATCHED | IN_TURN | COMPILED)[name]()
    network(episode.support_inputs[0])  # Makes the lazy layers.
    return network.to(dtype), Episode(*(t.to(dtype) if t.is_floating_point() else t for t in episode))


def same(found, expected, rtol, atol):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("name", BATCHED)
def test_all_tasks_at_once_give_what_one_at_a_time_gives(name, estimator):
    """A fall-back to one at a time would warn, and warnings are errors."""
    network, episode = setting(name)
    settings = SETTINGS | {"estimator": ESTIMATORS[estimator]}
    together, alone = (meta_gradient(network, episode, chunk_size=size, **settings) for size in (TASKS, 1))
    same(together.grads, alone.grads, rtol=1e-10, atol=1e-12)
    assert max(g.abs().max() for g in alone.grads.values()) > 1e-4


@pytest.mark.parametrize("name", [name for name in [*BATCHED, *IN_TURN] if name not in KINKED])
def test_the_unrolled_gradient_is_the_slope_of_the_query_loss(name):
    """Central differences along a random direction, of adaptation and judgement alone."""
    network, episode = setting(name)
    chunk_size = 1 if name in IN_TURN else None
    grads = meta_gradient(network, episode, estimator=Unrolled(), chunk_size=chunk_size, **SETTINGS).grads
    parameters = dict(network.named_parameters())
    # Along all signs of the gradient, halved at random, so that no entry can be wrong unseen.
    direction = {key: g.sign() * (torch.rand_like(g) + 0.5) for key, g in grads.items()}
    step, values = 1e-6, []
    for sign in (1, -1):
        with torch.no_grad():
            for key, p in parameters.items():
                p.add_(direction[key], alpha=sign * step)
        adapted = adapt(network, episode.support_inputs, episode.support_targets, chunk_size=1, **SETTINGS)
        values.append(
            evaluate(network, adapted.parameters, episode.query_inputs, episode.query_targets, chunk_size=1)[0].mean()
        )
        with torch.no_grad():
            for key, p in parameters.items():
                p.sub_(direction[key], alpha=sign * step)
    slope = (values[0] - values[1]) / (2 * step)
    torch.testing.assert_close(sum((direction[key] * g).sum() for key, g in grads.items()), slope, rtol=1e-5, atol=0)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("name", IN_TURN)
def test_recurrent_networks_go_one_task_at_a_time_with_one_warning(name, estimator):
    network, episode = setting(name)
    settings = SETTINGS | {"estimator": ESTIMATORS[estimator]}
    alone = meta_gradient(network, episode, chunk_size=1, **settings)
    with pytest.warns(UserWarning, match=r"OfRows must consist of operations .* aten::(rnn_tanh|gru|lstm)\.") as seen:
        together = meta_gradient(network, episode, chunk_size=TASKS, **settings)
    assert len(seen) == 1
    same(together.grads, alone.grads, rtol=1e-10, atol=1e-12)


def test_dropout_in_attention_runs():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(DIM, 2, 12, dropout=0.3, batch_first=True)
    network, episode = OfRows(layer, DIM).double(), setting("embedding")[1]
    losses = [meta_gradient(network, episode, chunk_size=TASKS, **SETTINGS).loss for _ in range(2)]
    assert torch.stack(losses).isfinite().all()
    assert not torch.equal(*losses)


def test_attention_settings_are_put_back():
    network, episode = setting("TransformerEncoderLayer, evaluating")
    torch.backends.mha.set_fastpath_enabled(True)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        meta_gradient(network, episode, **SETTINGS)
        assert torch.backends.cuda.flash_sdp_enabled()
        assert not torch.backends.cuda.math_sdp_enabled()
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_bags_of_words_are_means_of_words(estimator):
    """EmbeddingBag has one derivative in PyTorch, and no batching rule."""

    class Bag(Words):
        def __init__(self):
            super().__init__()
            self.embedding = nn.EmbeddingBag(4, DIM)

        def forward(self, images):
            return self.head(torch.tanh(self.embedding((3 * images.flatten(1)).long().clamp(0, 3))))

    torch.manual_seed(0)
    bag, words = Bag().double(), Words().double()
    words.load_state_dict(bag.state_dict())
    episode = setting("embedding")[1]
    settings = SETTINGS | {"estimator": ESTIMATORS[estimator]}
    same(meta_gradient(bag, episode, **settings).grads, meta_gradient(words, episode, **settings).grads, 1e-10, 1e-12)


@pytest.fixture
def graphs(monkeypatch):
    """What is compiled, without the compiler, which takes a minute."""
    found = []
    monkeypatch.setattr(splitting, "_inductor", lambda graph: found.append(graph) or graph)
    door._kept.clear()
    return found


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_graphs_give_the_same(name, graphs):
    if name == "GroupNorm" and torch.__version__.startswith("2.6."):
        pytest.skip("PyTorch 2.6 cannot record GroupNorm under vmap: a warning says so, and all goes on uncompiled")
    network, episode = setting(name)
    settings = SETTINGS | {"estimator": ESTIMATORS["Gauss-Newton"], "chunk_size": TASKS}
    plain = meta_gradient(network, episode, **settings | {"chunk_size": 1})
    recorded = meta_gradient(network, episode, compile=True, **settings)
    assert len(graphs) == 4  # An inner step, the query gradient, and before and after the vector of a product.
    same(recorded.grads, plain.grads, rtol=1e-8, atol=1e-11)


@pytest.mark.slow  # The compiler itself, for a minute: no other test compiles attention and these norms.
def test_compiled_results_are_the_eager_ones_within_rounding():
    """Of one network with attention, layer norm and group norm: its inner steps and the query gradient."""
    door._kept.clear()
    network, episode = setting("attention and norms", torch.float32)
    # Products with the compiler are those of test_compiled_calls.py, of these layers those of the recorded graphs.
    settings = SETTINGS | {"estimator": FirstOrder(), "chunk_size": TASKS}
    plain, compiled = (meta_gradient(network, episode, compile=compile, **settings) for compile in (False, True))
    assert all(kept.compiled is not None for kept in door._kept.values())
    a, b = (torch.cat([g.flatten() for g in result.grads.values()]) for result in (plain, compiled))
    assert (a - b).norm() <= 1e-5 * a.norm()


def test_a_recurrent_network_with_compile_warns_once_of_each(graphs):
    network, episode = setting("GRU")
    plain = meta_gradient(network, episode, chunk_size=1, **SETTINGS)
    with pytest.warns(UserWarning, match="Going on") as seen:
        found = meta_gradient(network, episode, chunk_size=TASKS, compile=True, **SETTINGS)
    told = [str(warning.message).split("Going on ")[1].split(",")[0] for warning in seen]
    assert told == ["one task at a time", "without compiling."]
    same(found.grads, plain.grads, rtol=1e-10, atol=1e-12)
