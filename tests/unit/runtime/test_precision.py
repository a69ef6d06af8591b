"""Every precision of the Trainer: solves in full precision unless told otherwise, and the right gradient at the end."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from conftest import class_episode
from lightning.pytorch import Trainer
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_imaml import Episode, IMAMLModule
from lightning_imaml._compile import splitting
from lightning_imaml.callbacks import MetaGradientErrorMonitor, PeakMemoryMonitor
from lightning_imaml.curvature import GaussNewton
from lightning_imaml.functional import adapt, evaluate, meta_gradient, predict
from lightning_imaml.inner import GradientDescent
from lightning_imaml.linear import ConjugateGradient
from lightning_imaml.meta_gradients import FirstOrder, Implicit, Unrolled
from lightning_imaml.regularizers import Proximal

SHAPE = (1, 6, 6)
SETTINGS = {"inner_solver": GradientDescent(0.1, 3), "regularizer": Proximal(0.5)}
SGD = functools.partial(torch.optim.SGD, lr=0.5)


def episode(seed: int = 0) -> Episode:
    return class_episode(tasks=3, shape=SHAPE, seed=seed)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.Tanh(), nn.BatchNorm1d(8, track_running_stats=False),
                         nn.Linear(8, 5))  # fmt: skip


def loader(batches: int = 2) -> DataLoader:
    return DataLoader([episode(k) for k in range(batches)], batch_size=None)


def trainer(precision: str, *callbacks, **settings) -> Trainer:
    if precision == "16-mixed":  # The Trainer would take bf16-mixed on a CPU.
        scaler = settings.pop("scaler", None) or torch.amp.GradScaler("cpu", init_scale=1024.0)
        settings["plugins"] = MixedPrecision("16-mixed", "cpu", scaler)
    else:
        settings["precision"] = precision
    return Trainer(
        **{"max_epochs": 1} | settings, callbacks=list(callbacks), logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, accelerator="cpu", devices=1, log_every_n_steps=1,
    )  # fmt: skip


def weights(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach().double()


PRECISIONS = ["32-true", "64-true", "bf16-mixed", "16-mixed", "bf16-true"]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("solve", ["full", "trainer"])
def test_everything_runs_in_every_precision(precision, solve):
    learned = {"regularizer": Proximal(0.5, learned=True)}
    module = IMAMLModule(network(), solve_precision=solve, gradient_clip_val=10.0, **SETTINGS | learned)
    monitors = MetaGradientErrorMonitor(every_n_steps=1), PeakMemoryMonitor(every_n_steps=1)
    run = trainer(precision, *monitors)
    run.fit(module, loader(), loader())
    for name in (
        "train/outer_loss", "train/grad_norm", "train/accuracy_before", "val/loss", "val/accuracy",
        "meta_gradient/relative_error", "meta_gradient/reference_converged", "memory/inner_loop_mib",
    ):  # fmt: skip
        assert run.callback_metrics[name].isfinite(), name
    run.test(module, loader(), verbose=False)
    assert run.predict(module, loader())[0].shape == (3, 10, 5)
    stored = {"64-true": torch.float64, "bf16-true": torch.bfloat16}.get(precision, torch.float32)
    assert {p.dtype for p in module.backbone.parameters()} == {stored}
    assert {p.dtype for p in module.strengths.values()} == {torch.promote_types(stored, torch.float32)}
    assert weights(module).isfinite().all()


class Late(IMAMLModule):
    def configure_backbone(self):
        return network()


@pytest.mark.parametrize("kind", [IMAMLModule, Late])
def test_bf16_does_not_round_the_steps_of_a_learned_strength_away(kind):
    """Log 2 is 0.6931; the bfloat16 numbers around it are 0.0039 apart, and Adam steps by its rate."""
    learned = SETTINGS | {"regularizer": Proximal(2.0, learned=True), "regularizer_lr": 1e-3}
    module = kind(network() if kind is IMAMLModule else None, **learned)
    trainer("bf16-true").fit(module, loader(1))
    assert {p.dtype for p in module.backbone.parameters()} == {torch.bfloat16}
    moved = module.strengths["log_strength"].detach() - torch.tensor(2.0).log()
    assert moved.abs().item() == pytest.approx(1e-3, rel=1e-2)
    assert IMAMLModule(network(), **learned).double().strengths["log_strength"].dtype == torch.float64


def test_every_task_counts_with_bf16():
    """In bfloat16, 2048 and 4 are 2048."""
    batches = DataLoader([class_episode(tasks=k, shape=SHAPE) for k in (2048, *[4] * 32)], batch_size=None)
    expected, found = (
        trainer(precision).validate(IMAMLModule(network(), **SETTINGS), batches, verbose=False)[0]
        for precision in ("32-true", "bf16-true")
    )
    assert found == pytest.approx(expected, rel=2e-2)  # Where four tasks are not counted, 6 % off.


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_mixed_precision_takes_the_steps_of_full_precision(precision):
    """The solves leave autocast: the same float32 computation, up to the loss scale's rounding."""
    found = []
    for each in ("32-true", precision):
        module = IMAMLModule(network(), optimizer=SGD, gradient_clip_val=0.1, accumulate_meta_batches=2, **SETTINGS)
        run = trainer(each)
        run.fit(module, loader(5))
        assert run.global_step == 3
        found.append(weights(module))
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=1e-7)


class Recorded(torch.amp.GradScaler):
    """Keeps what it is given and what it hands on."""

    def __init__(self):
        super().__init__("cpu", init_scale=4096.0)
        self.before, self.after = [], []

    def unscale_(self, optimizer):
        parameters = optimizer.param_groups[0]["params"]
        self.before.append(torch.cat([p.grad.flatten() for p in parameters]))
        super().unscale_(optimizer)

    def step(self, optimizer, *args, **kwargs):
        self.after.append(torch.cat([p.grad.flatten() for p in optimizer.param_groups[0]["params"]]))
        return super().step(optimizer, *args, **kwargs)


def test_the_scaler_sees_scaled_gradients_and_the_optimizer_the_meta_gradient():
    module, scaler = IMAMLModule(network(), optimizer=SGD, **SETTINGS), Recorded()
    start = weights(module)
    result = module.meta_gradient(episode())
    expected = torch.cat([result.grads[name].flatten() for name, _ in module.backbone.named_parameters()])
    trainer("16-mixed", scaler=scaler).fit(module, loader(1))
    (before,), (after,) = scaler.before, scaler.after
    torch.testing.assert_close(before, expected * 4096)
    torch.testing.assert_close(after, expected)
    torch.testing.assert_close(weights(module), start - 0.5 * expected.double(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "estimator", [Implicit(ConjugateGradient(3), GaussNewton()), Implicit(), FirstOrder(), Unrolled()], ids=repr
)
def test_bf16_parameters_are_solved_on_a_float32_copy(estimator):
    """The gradient is that of the same network in float32, to the last bit: nothing is rounded on the way."""
    short = network().bfloat16()
    long = copy.deepcopy(short).float()
    rounded = Episode(*[t.bfloat16() if t.is_floating_point() else t for t in episode()])
    exact = Episode(*[t.float() if t.is_floating_point() else t for t in rounded])
    found = meta_gradient(short, rounded, estimator=estimator, **SETTINGS)
    expected = meta_gradient(long, exact, estimator=estimator, **SETTINGS)
    assert {p.dtype for p in short.parameters()} == {torch.bfloat16}
    for name, gradient in expected.grads.items():
        assert found.grads[name].dtype == torch.float32
        torch.testing.assert_close(found.grads[name], gradient, rtol=0, atol=0)
    torch.testing.assert_close(found.loss, expected.loss, rtol=0, atol=0)


def test_what_was_adapted_in_float32_predicts_in_float32():
    short = network().bfloat16()
    long, exact = copy.deepcopy(short).float(), episode()
    rounded = Episode(*[t.bfloat16() if t.is_floating_point() else t for t in exact])
    exact = Episode(*[t.float() if t.is_floating_point() else t for t in rounded])
    found = adapt(short, rounded.support_inputs, rounded.support_targets, **SETTINGS)
    expected = adapt(long, exact.support_inputs, exact.support_targets, **SETTINGS)
    outputs = predict(short, found.parameters, rounded.query_inputs)
    torch.testing.assert_close(outputs, predict(long, expected.parameters, exact.query_inputs), rtol=0, atol=0)
    losses, _ = evaluate(short, found.parameters, rounded.query_inputs, rounded.query_targets)
    again, _ = evaluate(long, expected.parameters, exact.query_inputs, exact.query_targets)
    torch.testing.assert_close(losses, again, rtol=0, atol=0)


def test_frozen_parameters_and_buffers_are_part_of_the_float32_copy():
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = network()
            self.frozen = nn.Parameter(torch.ones(36, 36) / 36, requires_grad=False)
            self.register_buffer("shift", torch.full((36,), 0.3))

        def forward(self, x):
            assert self.frozen.dtype == self.shift.dtype == torch.float32
            assert torch.zeros(1).dtype == torch.float32  # What a network makes anew, under bf16-true.
            return self.body(x.flatten(1) @ self.frozen + self.shift)

    module = IMAMLModule(Shifted(), **SETTINGS)
    module._predict_initial = lambda batch: None  # Which is in the Trainer's precision.
    trainer("bf16-true").fit(module, loader(1))
    assert module.backbone.frozen.dtype == torch.bfloat16


@pytest.mark.filterwarnings("ignore:the linear system is indefinite")  # A finding about the short precision.
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed", "bf16-true"])
def test_the_monitor_measures_what_a_short_precision_costs(precision):
    """With the inner loop and the linear system solved to convergence, what is left is the precision's own error."""
    settings = {"inner_solver": GradientDescent(0.1, 200), "regularizer": Proximal(2.0)}
    estimator = Implicit(ConjugateGradient(30, rtol=1e-5))
    found = {}
    for solve in ("full", "trainer"):
        torch.manual_seed(0)
        convex = nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.Tanh(), nn.Linear(8, 5))
        module = IMAMLModule(convex, solve_precision=solve, estimator=estimator, **settings)
        run = trainer(precision, MetaGradientErrorMonitor(every_n_steps=1, tasks=3), max_steps=1)
        run.fit(module, loader(1))
        found[solve] = float(run.callback_metrics["meta_gradient/relative_error"])
    assert found["full"] < 1e-3 < found["trainer"]


def test_the_choice_is_checked():
    with pytest.raises(ValueError, match="solve_precision must be one of 'full', 'trainer'; found 'half'"):
        IMAMLModule(network(), solve_precision="half")


COMPILED = SETTINGS | {"estimator": Implicit(ConjugateGradient(3), GaussNewton())}


def far_from_full_precision(model: nn.Module, expected: dict[str, Tensor]) -> float:
    with torch.autocast("cpu", torch.bfloat16):
        ambient = meta_gradient(model, episode(), compile=True, full_precision=False, **COMPILED).grads
    return max((ambient[name] - expected[name]).abs().max().item() for name in expected)


def test_what_is_recorded_under_one_precision_is_not_taken_for_another(monkeypatch):
    """Of one network, in turns; the graphs run as they were recorded."""
    monkeypatch.setattr(splitting, "_inductor", lambda graph: graph)
    model = network()
    expected = meta_gradient(model, episode(), **COMPILED).grads
    for _ in range(2):
        found = meta_gradient(model, episode(), compile=True, **COMPILED).grads
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert 1e-5 < far_from_full_precision(model, expected) < 5e-2


@pytest.mark.slow  # The compiler itself, twice: no other test compiles in a short precision.
def test_compiled_solves_keep_to_their_precision():
    short = network().bfloat16()
    rounded = Episode(*[t.bfloat16() if t.is_floating_point() else t for t in episode()])
    expected = meta_gradient(short, rounded, **COMPILED).grads
    found = meta_gradient(short, rounded, compile=True, **COMPILED).grads
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    full = meta_gradient(network(), episode(), **COMPILED).grads
    assert 1e-5 < far_from_full_precision(network(), full) < 5e-2
