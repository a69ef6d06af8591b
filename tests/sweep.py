"""Every layer of torch.nn and every loss of torch.nn.functional, and how the package computes it.

``python tests/sweep.py`` writes the tables of docs/networks.md, which tests/agreement/test_sweep.py compares.
"""

from __future__ import annotations

import copy
import re
import warnings
from pathlib import Path

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from lightning_imaml import Episode
from lightning_imaml.curvature import GaussNewton, Hessian
from lightning_imaml.functional import adapt, evaluate, meta_gradient
from lightning_imaml.inner import GradientDescent
from lightning_imaml.linear import ConjugateGradient
from lightning_imaml.meta_gradients import FirstOrder, Implicit, Unrolled
from lightning_imaml.problems import isolation
from lightning_imaml.regularizers import NoRegularizer, Proximal
from lightning_imaml.runtime.attention import plain_attention

DOCS = Path(__file__).resolve().parents[1] / "docs" / "networks.md"
TASKS, SAMPLES, LR, STEPS = 2, 3, 0.05, 2
VECTOR, SEQUENCE, IMAGE, VOLUME = (6,), (4, 6), (4, 6, 6), (2, 4, 4, 4)
SHAPES = {1: SEQUENCE, 2: IMAGE, 3: VOLUME}


class Around(nn.Module):
    """A layer between two linear ones."""

    def __init__(self, make, shape):
        super().__init__()
        torch.manual_seed(0)
        self.shape = shape
        self.first, self.layer, self.last = nn.Linear(3, torch.Size(shape).numel()), make(), nn.LazyLinear(2)
        with torch.no_grad():
            self(torch.randn(SAMPLES, 3))
        self.double()

    def forward(self, x):
        found = self.layer(torch.tanh(self.first(x)).reshape(len(x), *self.shape))
        return self.last((found[0] if isinstance(found, tuple) else found).reshape(len(x), -1))


class Several(nn.Module):
    """A layer of several inputs."""

    def __init__(self, layer, count=2):
        super().__init__()
        self.layer, self.count = layer, count

    def forward(self, x):
        return self.layer(*[x * (k + 1) + torch.sin(k * x) for k in range(self.count)])


class Cell(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.cell = kind(6, 4)

    def forward(self, x):
        found = self.cell(x)
        return found[0] if isinstance(found, tuple) else found


class Unpooled(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.pool = getattr(nn, f"MaxPool{d}d")(2, return_indices=True)
        self.layer = getattr(nn, f"MaxUnpool{d}d")(2)

    def forward(self, x):
        return self.layer(*self.pool(x))


class Looked(nn.Module):
    """A table whose rows are chosen by an input, times a number."""

    def __init__(self, table):
        super().__init__()
        self.table = table

    def forward(self, x):
        found = self.table((x.detach().abs() * 50).long() % 5)
        return found * (1 + x[:, :1].reshape(len(x), *[1] * (found.ndim - 1)))


def of(name, *args, **options):
    return lambda: getattr(nn, name)(*args, **options)


LAYERS = {
    name: (of(name), VECTOR)
    for name in [
        "ELU",
        "Hardshrink",
        "Hardsigmoid",
        "Hardtanh",
        "Hardswish",
        "LeakyReLU",
        "LogSigmoid",
        "PReLU",
        "ReLU",
        "ReLU6",
        "SELU",
        "CELU",
        "GELU",
        "Sigmoid",
        "SiLU",
        "Mish",
        "Softplus",
        "Softshrink",
        "Softsign",
        "Tanh",
        "Tanhshrink",
        "Identity",
    ]
}
LAYERS |= {name: (of(name, dim=1), VECTOR) for name in ("Softmin", "Softmax", "LogSoftmax")}
# In training, their random numbers differ between tasks at once and one at a time.
RANDOM = {"Dropout": VECTOR, "Dropout1d": SEQUENCE, "Dropout2d": IMAGE, "Dropout3d": VOLUME,
          "AlphaDropout": VECTOR, "FeatureAlphaDropout": SEQUENCE, "RReLU": VECTOR}  # fmt: skip
LAYERS |= {
    f"{name}, evaluating": (lambda name=name: getattr(nn, name)().eval(), shape) for name, shape in RANDOM.items()
}
LAYERS |= {
    "Threshold": (of("Threshold", 0.1, 0.2), VECTOR),
    "GLU": (of("GLU"), VECTOR),
    "Softmax2d": (of("Softmax2d"), IMAGE),
}
for d, shape in SHAPES.items():
    channels = shape[0]
    LAYERS |= {
        f"Conv{d}d": (of(f"Conv{d}d", channels, 2, 2), shape),
        f"ConvTranspose{d}d": (of(f"ConvTranspose{d}d", channels, 2, 2), shape),
        f"MaxPool{d}d": (of(f"MaxPool{d}d", 2), shape),
        f"AvgPool{d}d": (of(f"AvgPool{d}d", 2), shape),
        f"LPPool{d}d": (of(f"LPPool{d}d", 2, 2), shape),
        f"AdaptiveMaxPool{d}d": (of(f"AdaptiveMaxPool{d}d", 2), shape),
        f"AdaptiveAvgPool{d}d": (of(f"AdaptiveAvgPool{d}d", 2), shape),
        f"MaxUnpool{d}d": (lambda d=d: Unpooled(d), shape),
        f"BatchNorm{d}d": (of(f"BatchNorm{d}d", channels), shape),
        f"BatchNorm{d}d, evaluating": (lambda d=d, c=channels: getattr(nn, f"BatchNorm{d}d")(c).eval(), shape),
        f"BatchNorm{d}d, batch statistics": (of(f"BatchNorm{d}d", channels, track_running_stats=False), shape),
        f"InstanceNorm{d}d": (of(f"InstanceNorm{d}d", channels, affine=True), shape),
        **{f"{kind}Pad{d}d": (of(f"{kind}Pad{d}d", 1), shape)
           for kind in ("Reflection", "Replication", "Zero", "Circular")},
        f"ConstantPad{d}d": (of(f"ConstantPad{d}d", 1, 0.5), shape),
    }  # fmt: skip
LAYERS |= {
    "SyncBatchNorm, batch statistics": (of("SyncBatchNorm", 4, track_running_stats=False), IMAGE),
    "FractionalMaxPool2d": (of("FractionalMaxPool2d", 2, output_size=3), IMAGE),
    "FractionalMaxPool3d": (of("FractionalMaxPool3d", 2, output_size=2), VOLUME),
    **{f"Upsample, {mode}": (of("Upsample", scale_factor=2, mode=mode), shape) for mode, shape in (
        ("nearest", IMAGE), ("bilinear", IMAGE), ("bicubic", IMAGE), ("area", IMAGE), ("linear", SEQUENCE),
        ("trilinear", VOLUME))},
    "UpsamplingNearest2d": (of("UpsamplingNearest2d", scale_factor=2), IMAGE),
    "UpsamplingBilinear2d": (of("UpsamplingBilinear2d", scale_factor=2), IMAGE),
    "GroupNorm": (of("GroupNorm", 2, 4), IMAGE),
    "LayerNorm": (of("LayerNorm", 6), SEQUENCE),
    "RMSNorm": (of("RMSNorm", 6), SEQUENCE),
    "LocalResponseNorm": (of("LocalResponseNorm", 2), IMAGE),
    "CrossMapLRN2d": (of("CrossMapLRN2d", 2), IMAGE),
    "PixelShuffle": (of("PixelShuffle", 2), IMAGE),
    "PixelUnshuffle": (of("PixelUnshuffle", 2), IMAGE),
    "ChannelShuffle": (of("ChannelShuffle", 2), IMAGE),
    "Flatten": (of("Flatten"), IMAGE),
    "Unflatten": (of("Unflatten", 1, (2, 3)), VECTOR),
    "Fold": (of("Fold", (3, 3), (2, 2)), (4, 4)),
    "Unfold": (of("Unfold", 2), IMAGE),
    **{name: (of(name, 6, 3, batch_first=True), SEQUENCE) for name in ("RNN", "LSTM", "GRU")},
    **{name: (lambda name=name: Cell(getattr(nn, name)), VECTOR) for name in ("RNNCell", "LSTMCell", "GRUCell")},
    "Linear": (of("Linear", 6, 3), VECTOR),
    "Bilinear": (lambda: Several(nn.Bilinear(6, 6, 2)), VECTOR),
    "CosineSimilarity": (lambda: Several(nn.CosineSimilarity()), VECTOR),
    "PairwiseDistance": (lambda: Several(nn.PairwiseDistance()), VECTOR),
    "MultiheadAttention": (lambda: Several(nn.MultiheadAttention(6, 2, batch_first=True), 3), SEQUENCE),
    "TransformerEncoderLayer": (of("TransformerEncoderLayer", 6, 2, 4, 0.0, batch_first=True), SEQUENCE),
    "TransformerEncoder": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(6, 2, 4, 0.0, batch_first=True), 1), SEQUENCE),
    "TransformerDecoderLayer": (lambda: Several(nn.TransformerDecoderLayer(6, 2, 4, 0.0, batch_first=True)), SEQUENCE),
    "TransformerDecoder": (
        lambda: Several(nn.TransformerDecoder(nn.TransformerDecoderLayer(6, 2, 4, 0.0, batch_first=True), 1)),
        SEQUENCE),
    "Transformer": (lambda: Several(nn.Transformer(6, 2, 1, 1, 4, 0.0, batch_first=True)), SEQUENCE),
    "Embedding": (lambda: Looked(nn.Embedding(5, 3)), VECTOR),
    "Embedding, padding_idx": (lambda: Looked(nn.Embedding(5, 3, padding_idx=0)), VECTOR),
    "Embedding, max_norm": (lambda: Looked(nn.Embedding(5, 3, max_norm=1.0)), VECTOR),
    **{f"EmbeddingBag, {mode}": (lambda mode=mode: Looked(nn.EmbeddingBag(5, 3, mode=mode)), VECTOR)
       for mode in ("sum", "mean", "max")},
    "weight_norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 3)), VECTOR),
    "orthogonal": (lambda: nn.utils.parametrizations.orthogonal(nn.Linear(6, 3)), VECTOR),
    "spectral_norm": (lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(6, 3)), VECTOR),
    "spectral_norm, evaluating": (lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(6, 3)).eval(), VECTOR),
}  # fmt: skip
# Containers, and layers that are others once they have seen an input.
NO_LAYERS = {
    *("Container", "DataParallel", "Module", "ModuleDict", "ModuleList", "ParameterDict", "ParameterList"),
    *("Sequential", "RNNBase", "RNNCellBase", "AdaptiveLogSoftmaxWithLoss"),
}

CLASS, REAL, SIGN, PROBABILITY, SOFT = "class", "real", "sign", "probability", "soft"
LOSSES = {
    "cross_entropy": (F.cross_entropy, CLASS),
    "linear_cross_entropy": (
        lambda o, t: F.linear_cross_entropy(o, torch.tensor([[1.0, 0.3], [-0.2, 0.8]]).to(o), t),
        CLASS,
    ),
    "nll_loss": (lambda o, t: F.nll_loss(o.log_softmax(1), t), CLASS),
    "multi_margin_loss": (F.multi_margin_loss, CLASS),
    "multilabel_margin_loss": (lambda o, t: F.multilabel_margin_loss(o, torch.stack([t, t * 0 - 1], 1)), CLASS),
    **{name: (getattr(F, name), REAL) for name in ("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss")},
    "poisson_nll_loss": (lambda o, t: F.poisson_nll_loss(o, t.abs()), REAL),
    "gaussian_nll_loss": (lambda o, t: F.gaussian_nll_loss(o[:, 0], t[:, 0], F.softplus(o[:, 1])), REAL),
    "margin_ranking_loss": (lambda o, t: F.margin_ranking_loss(o[:, 0], o[:, 1], t[:, 0].sign(), 0.3), REAL),
    "cosine_embedding_loss": (lambda o, t: F.cosine_embedding_loss(o, t, t[:, 0].sign(), 0.1), REAL),
    "hinge_embedding_loss": (lambda o, t: F.hinge_embedding_loss(o, t.sign()), REAL),
    "soft_margin_loss": (lambda o, t: F.soft_margin_loss(o, t.sign()), REAL),
    "triplet_margin_loss": (lambda o, t: F.triplet_margin_loss(o, t, t.flip(0)), REAL),
    "triplet_margin_with_distance_loss": (lambda o, t: F.triplet_margin_with_distance_loss(o, t, t.flip(0)), REAL),
    "binary_cross_entropy": (lambda o, t: F.binary_cross_entropy(o.sigmoid(), t.sigmoid()), REAL),
    "binary_cross_entropy_with_logits": (lambda o, t: F.binary_cross_entropy_with_logits(o, t.sigmoid()), REAL),
    "multilabel_soft_margin_loss": (lambda o, t: F.multilabel_soft_margin_loss(o, (t > 0).to(t)), REAL),
    "kl_div": (lambda o, t: F.kl_div(o.log_softmax(1), t.softmax(1), reduction="batchmean"), REAL),
    "ctc_loss": (
        lambda o, t: F.ctc_loss(
            F.pad(o[:, None], (0, 1)).log_softmax(-1), t[:1, None] * 0 + 1, torch.tensor([SAMPLES]), torch.tensor([1])
        ),
        CLASS,
    ),
}

_TOLERANCE = {"Hardsigmoid": 1e-6}  # PyTorch's own slope has 1/6 in float32.
ESTIMATORS = {
    "FirstOrder": FirstOrder(),
    "Unrolled": Unrolled(),
    "Hessian": Implicit(ConjugateGradient(2), Hessian()),
    "GaussNewton": Implicit(ConjugateGradient(2), GaussNewton()),
}


def episode(kind=REAL):
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(TASKS, SAMPLES, *shape, generator=generator, dtype=torch.float64)

    def targets():
        return draw(2) if kind == REAL else (draw() > 0).long()

    return Episode(draw(3), targets(), draw(3), targets())


def plain_loop(network, tasks, loss, unrolled):
    """One deep copy a task with plain autograd."""
    with plain_attention():
        parts = [_plain_task(copy.deepcopy(network), task, loss, unrolled) for task in zip(*tasks, strict=True)]
    names = [name for name, _ in network.named_parameters()]
    return {name: torch.stack(found).mean(0) for name, found in zip(names, zip(*parts, strict=True), strict=True)}


def _plain_task(net, task, loss, unrolled):
    x, y, queries, answers = task
    theta = dict(net.named_parameters())
    phi = {name: p.clone() for name, p in theta.items()}
    for _ in range(STEPS):
        value = loss(functional_call(net, phi, x), y)
        slopes = torch.autograd.grad(value, list(phi.values()), create_graph=unrolled, materialize_grads=True)
        phi = {name: p - LR * g for (name, p), g in zip(phi.items(), slopes, strict=True)}
    value, by = loss(functional_call(net, phi, queries), answers), theta if unrolled else phi
    return torch.autograd.grad(value, list(by.values()), materialize_grads=True)


def apart(found, expected):
    """The largest difference, relative to the largest entry."""
    scale = max(g.abs().max().item() for g in expected.values())
    return max((found[name] - g).abs().max().item() for name, g in expected.items()) / max(scale, 1e-12)


def of_layer(name):
    """How the package computes a layer, in words; an AssertionError where it is wrong."""
    network = Around(*LAYERS[name])
    return _computed(network, episode(), F.mse_loss, _TOLERANCE.get(name, 1e-9))


def of_loss(name):
    """The same of a loss."""
    loss, kind = LOSSES[name]
    torch.manual_seed(0)
    return _computed(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double(), episode(kind), loss, 1e-9)


def _computed(network, tasks, loss, tolerance):
    traits, of_its_loss = isolation.traits_of(network), isolation.traits_of_loss(loss)
    settings = {"loss": loss, "inner_solver": GradientDescent(LR, STEPS)}
    before = {name: t.clone() for name, t in network.state_dict().items()}
    words, first_order_only = "batched", False
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            adapted = adapt(network, *tasks[:2], chunk_size=TASKS, **settings).parameters
        except ValueError as error:
            return (
                f"refused: {re.sub(r'; found.*', '', str(error)).removeprefix('the backbone').lstrip(chr(39) + 's ')}"
            )
        evaluate(network, adapted, *tasks[2:], loss=loss)
        for label, estimator in ESTIMATORS.items():
            implicit = label in ("Hessian", "GaussNewton")
            regularizer = Proximal(3.0) if implicit else NoRegularizer()
            runs = {"estimator": estimator, "regularizer": regularizer, **settings}
            try:
                together = meta_gradient(network, tasks, chunk_size=TASKS, **runs).grads
            except RuntimeError as error:
                if label == "FirstOrder" or not ("derivative" in str(error) or "differentiation" in str(error)):
                    raise
                first_order_only = True
                continue
            alone = meta_gradient(network, Episode(*(t.flip(0) for t in tasks)), chunk_size=1, **runs).grads
            assert apart(together, alone) <= 1e-9, (label, "batched", apart(together, alone))
            if not implicit and not (label == "Unrolled" and (traits.replaced or of_its_loss.replaced)):
                expected = plain_loop(network, tasks, loss, label == "Unrolled")
                assert apart(alone, expected) <= tolerance, (label, "plain", apart(alone, expected))
    assert all(torch.equal(t, before[name]) for name, t in network.state_dict().items())
    copy.deepcopy(network)
    if any("one task at a time" in str(warning.message) for warning in told):
        words = "one at a time"
    if traits.replaced or of_its_loss.replaced:
        words += ", in another form"
    return words + (", first order alone" if first_order_only else "")


def row(name, status):
    kind, *how = name.split(", ")
    return f"| {', '.join([f'`{kind}`', *how])} | {status} |"


def tables():
    layers = ["| layer | how |", "| --- | --- |", *(row(name, of_layer(name)) for name in LAYERS)]
    losses = ["| loss | how |", "| --- | --- |", *(row(name, of_loss(name)) for name in LOSSES)]
    return "\n".join([*layers, "", *losses])


def main():
    begin, end = "<!-- sweep -->", "<!-- end of the sweep -->"
    head, rest = DOCS.read_text().split(begin)
    DOCS.write_text(f"{head}{begin}\n\n{tables()}\n\n{end}{rest.split(end)[1]}")


if __name__ == "__main__":
    main()
