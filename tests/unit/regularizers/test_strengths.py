"""Every form of λ against dense matrices, the closed form of ridge regression, finite differences and Unrolled."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from conftest import TanhNet, class_episode, regression_episode
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_imaml import Episode
from lightning_imaml._compile import door, splitting
from lightning_imaml.curvature import GaussNewton
from lightning_imaml.functional import meta_gradient
from lightning_imaml.inner import GradientDescent
from lightning_imaml.linear import ConjugateGradient, Direct
from lightning_imaml.meta_gradients import Implicit, Unrolled
from lightning_imaml.parameters.positive import place
from lightning_imaml.problems.network import FlatModel
from lightning_imaml.regularizers import FullProximal, KroneckerProximal, LowRankProximal, Proximal, Regularizer

INPUTS, OUTPUTS = 3, 2
PATTERNS = {"weight": 2.0, "*": 0.7}
FORMS: dict[str, Regularizer] = {
    "scalar": Proximal(1.5, learned=True),
    "bounded": Proximal(1.5, learned=True, bounds=(0.1, 10.0)),
    "pattern": Proximal(PATTERNS, learned=True),
    "layer": Proximal(PATTERNS, learned=True, per="layer"),
    "parameter": Proximal(PATTERNS, learned=True, per="parameter"),
    "bounded parameter": Proximal(1.5, learned=True, per="parameter", bounds=(0.1, 10.0)),
    "full": FullProximal(1.5),
    "kronecker": KroneckerProximal(1.5),
    "low rank": LowRankProximal(1.5, rank=2),
}
each_form = pytest.mark.parametrize("form", FORMS)


def cholesky(leaf: Tensor) -> Tensor:
    lower = leaf.tril(-1) + leaf.diagonal().exp().diag()
    return lower @ lower.T


def dense(form: str, s: Mapping[str, Tensor], sizes: tuple[int, int] = (INPUTS * OUTPUTS, OUTPUTS)) -> Tensor:
    """M for a weight and a bias, written down anew."""
    weight, bias = sizes
    if form == "scalar":
        return s["log_strength"].exp() * torch.eye(weight + bias, dtype=torch.float64)
    if form == "bounded":
        return 0.1 * 100 ** s["logit_strength"].sigmoid() * torch.eye(weight + bias, dtype=torch.float64)
    if form in ("pattern", "layer"):
        both = s["log_strength"].exp()
        return torch.cat([both[:1].expand(weight), both[1:].expand(bias)]).diag()
    if form == "parameter":
        return s["log_strength"].exp().diag()
    if form == "bounded parameter":
        return (0.1 * 100 ** s["logit_strength"].sigmoid()).diag()
    if form == "full":
        return cholesky(s["log_cholesky"])
    if form == "kronecker":
        block = torch.kron(cholesky(s["weight/rows"]), cholesky(s["weight/columns"]))
        return torch.block_diag(block, s["bias/log_diagonal"].exp().diag())
    return s["log_diagonal"].exp().diag() + s["factor"] @ s["factor"].T


def some_strengths(regularizer: Regularizer, net: nn.Module, spread: float = 0.3) -> dict[str, Tensor]:
    """Away from the start, where every matrix is a multiple of the identity."""
    generator = torch.Generator().manual_seed(3)
    start = regularizer.init(FlatModel(net))
    return {k: v + spread * torch.randn(v.shape, generator=generator, dtype=v.dtype) for k, v in start.items()}


@pytest.fixture
def net() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(INPUTS, OUTPUTS).double()


@each_form
def test_every_form_is_its_dense_matrix(form, net):
    strengths = some_strengths(FORMS[form], net)
    bound, matrix = FORMS[form].for_layout(FlatModel(net).layout), dense(form, strengths)
    rows, theta = torch.randn(4, 8).double(), torch.randn(8).double()
    torch.testing.assert_close(bound.multiply(rows, strengths), rows @ matrix)
    torch.testing.assert_close(bound.product(rows, rows, theta, strengths), rows @ matrix)
    torch.testing.assert_close(bound.gradient(rows, theta, strengths), (rows - theta) @ matrix)
    torch.testing.assert_close(bound.solve(rows, strengths), torch.linalg.solve(matrix, rows.T).T)
    torch.testing.assert_close(bound.diagonal(rows, strengths), matrix.diagonal())
    expected = torch.einsum("ti,ij,tj->t", rows - theta, matrix, rows - theta) / 2
    torch.testing.assert_close(bound.penalty(rows, theta, strengths), expected)


@each_form
def test_every_form_starts_at_its_first_value(form, net):
    matrix = dense(form, FORMS[form].init(FlatModel(net)))
    first = torch.tensor(
        [2.0] * 6 + [0.7] * 2 if form in ("pattern", "layer", "parameter") else [1.5] * 8, dtype=torch.float64
    )
    # U of the low-rank form is small, not zero.
    torch.testing.assert_close(matrix, first.diag(), rtol=0, atol=0.02 if form == "low rank" else 1e-12)


def closed_form(episode: Episode, theta: Tensor, matrix: Tensor) -> Tensor:
    """F(M) of ridge regression towards θ: outputs are J φ with a constant J."""

    def parts(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        eye = torch.eye(OUTPUTS, dtype=torch.float64)
        return torch.cat([torch.kron(eye, x), torch.kron(eye, torch.ones(len(x), 1).double())], dim=1), y.T.flatten()

    losses = []
    for x, y, xq, yq in zip(*episode, strict=True):
        (j, b), (jq, bq) = parts(x, y), parts(xq, yq)
        phi = torch.linalg.solve(2 / len(b) * j.T @ j + matrix, 2 / len(b) * j.T @ b + matrix @ theta)
        losses.append((jq @ phi - bq).square().mean())
    return torch.stack(losses).mean()


def run(net, strengths, regularizer, estimator=Implicit(Direct()), steps=3000, tol=1e-13):  # noqa: B008
    return meta_gradient(
        net, regression_episode(), loss=F.mse_loss, inner_solver=GradientDescent(0.15, steps, tol=tol),
        estimator=estimator, regularizer=regularizer, strengths=strengths,
    )  # fmt: skip


@each_form
def test_the_gradient_is_that_of_ridge_regression_and_of_central_differences(form, net):
    strengths = some_strengths(FORMS[form], net)
    leaves = {k: v.clone().requires_grad_() for k, v in strengths.items()}
    theta = FlatModel(net).initial().requires_grad_()
    value = closed_form(regression_episode(), theta, dense(form, leaves))
    exact = torch.autograd.grad(value, [theta, *leaves.values()])
    found = run(net, strengths, FORMS[form])
    assert found.adapted.converged.all()
    torch.testing.assert_close(found.loss.mean(), value.detach(), rtol=1e-9, atol=1e-12)
    row = torch.cat([found.grads["weight"].flatten(), found.grads["bias"]])
    torch.testing.assert_close(row, exact[0], rtol=1e-6, atol=1e-9)
    for name, gradient in zip(leaves, exact[1:], strict=True):
        torch.testing.assert_close(found.grads[f"regularizer.{name}"], gradient, rtol=1e-6, atol=1e-9)
    generator, step = torch.Generator().manual_seed(4), 1e-4
    way = {k: torch.randn(v.shape, generator=generator, dtype=v.dtype) for k, v in strengths.items()}
    ends = [
        run(net, {k: v + sign * step * way[k] for k, v in strengths.items()}, FORMS[form]).loss.mean()
        for sign in (1, -1)
    ]
    slope = sum((found.grads[f"regularizer.{k}"] * w).sum() for k, w in way.items())
    torch.testing.assert_close(slope, (ends[0] - ends[1]) / (2 * step), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("form", ["layer", "parameter", "full", "kronecker", "low rank"])
def test_implicit_is_unrolled_at_convergence(form, tanh_net):
    """On a network whose loss is not convex, with two layers."""
    regularizer = Proximal(1.5, learned=True, per="layer") if form == "layer" else FORMS[form]
    if form == "parameter":
        regularizer = Proximal({"hidden.*": 2.0, "*": 1.0}, learned=True, per="parameter")
    strengths = some_strengths(regularizer, tanh_net, 0.1)  # Well conditioned, so that few steps solve it.
    implicit = run(tanh_net, strengths, regularizer)
    assert implicit.adapted.converged.all()
    unrolled = run(tanh_net, strengths, regularizer, Unrolled(), steps=300, tol=0.0)
    assert (unrolled.adapted.residual < 1e-8).all()
    assert any(name.startswith("regularizer.") for name in implicit.grads)
    for name in implicit.grads:
        torch.testing.assert_close(implicit.grads[name], unrolled.grads[name], rtol=1e-6, atol=1e-8)


@pytest.fixture
def recorded(monkeypatch):
    """Record graphs for the compiler, but run them as they are."""
    door._kept.clear()
    graphs = []
    monkeypatch.setattr(splitting, "_inductor", lambda graph: graphs.append(graph) or graph)
    yield graphs
    door._kept.clear()


@pytest.mark.parametrize("form", ["pattern", "layer", "parameter", "full", "kronecker", "low rank"])
def test_compiled_rows_in_another_order_have_the_same_strengths(form, recorded):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, (3, 2)), nn.Tanh(), nn.Flatten(), nn.Linear(9, 3)).double()
    episode = Episode(*[t.double() if t.is_floating_point() else t for t in class_episode(2, 3, shape=(2, 5, 2))])
    regularizer = {
        "pattern": Proximal({"0.*": 1.0, "*": 3.0}),
        "layer": Proximal(1.5, learned=True, per="layer"),
        "parameter": Proximal(1.5, learned=True, per="parameter"),
    }.get(form, FORMS[form])
    settings = {
        "estimator": Implicit(ConjugateGradient(3, preconditioner="regularizer"), GaussNewton()),
        "inner_solver": GradientDescent(0.05, 3), "regularizer": regularizer,
        "strengths": some_strengths(regularizer, net),
    }  # fmt: skip
    plain, compiled = (meta_gradient(net, episode, compile=compile, **settings) for compile in (False, True))
    assert recorded
    for name in plain.grads:
        torch.testing.assert_close(compiled.grads[name], plain.grads[name], rtol=1e-8, atol=1e-12)


@each_form
def test_conjugate_gradient_preconditioned_by_the_regulariser(form, net):
    """Without curvature of the loss, the preconditioner is the inverse, and one iteration solves."""
    strengths = some_strengths(FORMS[form], net)
    once = ConjugateGradient(1, preconditioner="regularizer")
    flat = meta_gradient(
        net, regression_episode(), loss=lambda o, t: (o * t).mean(), outer_loss=F.mse_loss, estimator=Implicit(once),
        inner_solver=GradientDescent(0.1, 3), regularizer=FORMS[form], strengths=strengths,
    )  # fmt: skip
    assert (flat.linear.residual < 1e-10).all()
    full = run(net, strengths, FORMS[form], Implicit(ConjugateGradient(20, 1e-12, preconditioner="regularizer")))
    for name, gradient in run(net, strengths, FORMS[form]).grads.items():
        torch.testing.assert_close(full.grads[name], gradient, rtol=1e-8, atol=1e-11)


def test_the_preconditioner_needs_a_matrix(net):
    class Own(Regularizer):
        def penalty(self, parameters, initial, strengths):
            return (parameters - initial).square().sum(dim=1)

    estimator = Implicit(ConjugateGradient(3, preconditioner="regularizer"))
    with pytest.raises(ValueError, match="must have a regulariser with a matrix; found none"):
        run(net, None, Own(), estimator)
    with pytest.raises(ValueError, match="preconditioner must be None with jacobi_probes"):
        ConjugateGradient(3, jacobi_probes=2, preconditioner="regularizer")


def test_fixed_strengths_by_pattern_are_those_of_learned_ones(net):
    fixed, learned = (run(net, None, Proximal(PATTERNS, learned=value)) for value in (False, True))
    assert "regularizer.log_strength" not in fixed.grads
    for name in fixed.grads:
        torch.testing.assert_close(fixed.grads[name], learned.grads[name])


def test_bounds_are_kept_and_never_stop_the_gradient(net):
    regularizer = Proximal(1.5, learned=True, bounds=(0.5, 4.0))
    for raw, end in ((-30.0, 0.5), (30.0, 4.0)):
        result = run(net, {"logit_strength": torch.tensor(raw).double()}, regularizer)
        value = regularizer.for_layout(FlatModel(net).layout).diagonal(torch.zeros(1, 8).double(), {
            "logit_strength": torch.tensor(raw).double()
        })  # fmt: skip
        torch.testing.assert_close(value, torch.full((8,), end).double())
        assert result.grads["regularizer.logit_strength"] != 0


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Proximal({}), "strength must be a positive finite number, or patterns with one each"),
        (lambda: Proximal({"a": -1.0}), "strength must be a positive finite number, or patterns with one each"),
        (lambda: Proximal(1.0, per="layer"), r"per must be None where nothing is learned; found 'layer'. Set learned"),
        (lambda: Proximal(1.0, learned=True, per="tensor"), "per must be 'layer', 'parameter' or None; found 'tensor'"),
        (lambda: Proximal(1.0, bounds=(0.1, 2.0)), "bounds must be None where nothing is learned"),
        (lambda: Proximal(3.0, learned=True, bounds=(0.1, 2.0)), "bounds must be two positive numbers with every"),
        (lambda: FullProximal(0.0), "strength must be a positive finite number; found 0.0"),
        (lambda: LowRankProximal(1.0, rank=0), "rank must be at least 1; found 0"),
        (lambda: run(TanhNet().double(), None, Proximal({"head.*": 1.0, "*": 2.0})),
         r"strength must be patterns that match parameter names; found \['head.\*'\].*'hidden.weight', 'hidden.bias'"),
        (lambda: run(TanhNet().double(), None, Proximal({"out.*": 1.0})),
         r"must have a pattern for every adapted parameter; found none for \['hidden.weight', 'hidden.bias'\]"),
        (lambda: run(TanhNet().double(), None, Proximal({"*": 1.0, "out.*": 2.0})),
         r"every pattern of strength must be the first to match .*; found \['out.\*'\]. Put the narrower"),
        (lambda: run(nn.Linear(50, 50).double(), None, FullProximal()), "at most 2048, since its .* found 2550"),
        (lambda: run(nn.Linear(2049, 2).double(), None, KroneckerProximal()), "columns of .* must be at most 2048"),
        (lambda: KroneckerProximal().multiply(torch.ones(1, 2), {}),
         r"KroneckerProximal: the layout must be known, .*; found rows alone. Use for_layout\(layout\)"),
        (lambda: Proximal({"*": 1.0}).multiply(torch.ones(1, 2), {}),
         r"must be one number without a layout; found \{'\*': 1.0\}, per None. Call for_layout"),
    ],
)  # fmt: skip
def test_bad_settings_are_explained(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_the_first_values_are_not_made_anew_in_every_step(net, monkeypatch):
    made, init = [], LowRankProximal.init
    monkeypatch.setattr(LowRankProximal, "init", lambda self, model: made.append(model) or init(self, model))
    regularizer = LowRankProximal(1.5, rank=2)
    strengths = regularizer.init(FlatModel(net))
    for _ in range(3):
        run(net, strengths, regularizer)
    assert len(made) == 2  # The one above, and one for its names and shapes.
    with pytest.raises(ValueError, match=r"that LowRankProximal learns, \{.factor.: \[8, 1\]"):
        run(net, strengths, LowRankProximal(1.5, rank=1))


def test_a_tied_weight_has_a_pattern_by_any_of_its_names():
    net = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Tanh(), nn.Linear(3, 3)).double()
    net[2].weight = net[0].weight
    layout = FlatModel(net).layout
    for patterns, expected in (({"2.*": 3.0}, (3.0, 3.0)), ({"0.*": 2.0, "2.*": 3.0}, (2.0, 3.0))):
        placed = place("strength", patterns, False, None, None, layout)
        assert tuple(placed.start[group] for group in placed.groups) == expected
    with pytest.raises(ValueError, match=r"found none for \['2.bias'\]"):
        place("strength", {"2.weight": 1.0}, False, None, None, layout)
    twice = nn.Sequential(net[2], nn.Tanh(), net[2])
    assert place("strength", {"2.*": 3.0}, False, None, None, FlatModel(twice).layout).start == (3.0,)


def test_layers_are_modules_and_the_root_is_one():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.shift = nn.Parameter(torch.ones(())), nn.Parameter(torch.zeros(()))
            self.body = nn.Linear(3, 2)

        def forward(self, inputs):
            return self.scale * self.body(inputs) + self.shift

    strengths = Proximal(2.0, learned=True, per="layer").init(FlatModel(Scaled()))
    assert strengths["log_strength"].shape == (2,)
