"""The reference meta-gradient against its closed form, and the monitor in training."""

import math
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_imaml import Episode, IMAMLModule
from lightning_imaml.callbacks import ExactReference, MetaGradientErrorMonitor, PeakMemoryMonitor
from lightning_imaml.curvature import Hessian
from lightning_imaml.functional import meta_gradient
from lightning_imaml.inner import GradientDescent
from lightning_imaml.linear import ConjugateGradient, Direct
from lightning_imaml.meta_gradients import FirstOrder, Implicit
from lightning_imaml.regularizers import Proximal
from lightning_imaml.runtime import phases

FEATURES, SAMPLES, STRENGTH = 6, 12, 0.5
SOLVER = GradientDescent(lr=0.3, steps=3)


def regression(tasks=2, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)

    def part(*shape):
        return torch.randn(tasks, SAMPLES, *shape, generator=generator, dtype=torch.float64).to(dtype)

    return Episode(part(FEATURES), part(1), part(FEATURES), part(1))


def half_squares(outputs, targets):
    return (outputs - targets).square().sum() / (2 * SAMPLES)


@pytest.fixture
def linear_model():
    torch.manual_seed(1)
    return nn.Linear(FEATURES, 1, bias=False)


def closed_form(model, episode):
    """Mean over tasks of λ (H + λI)⁻¹ ∇Q(φ*), and of ∇Q(φ*), with H = XᵀX/n."""
    theta = model.weight.detach().double().reshape(-1)
    eye = torch.eye(FEATURES, dtype=torch.float64)
    exact, slopes = [], []
    for x, y, xq, yq in zip(*(part.double() for part in episode), strict=True):
        system = x.T @ x / SAMPLES + STRENGTH * eye
        phi = torch.linalg.solve(system, x.T @ y[:, 0] / SAMPLES + STRENGTH * theta)
        slope = xq.T @ (xq @ phi - yq[:, 0]) / SAMPLES
        slopes.append(slope)
        exact.append(STRENGTH * torch.linalg.solve(system, slope))
    return torch.stack(exact).mean(0), torch.stack(slopes).mean(0)


def problem(**changes):
    return {"loss": half_squares, "outer_loss": None, "regularizer": Proximal(STRENGTH), **changes}


@pytest.mark.parametrize("direct_limit", [0, 100])
def test_the_reference_is_the_closed_form(linear_model, direct_limit):
    episode = regression()
    reference = ExactReference(tol=1e-10, rtol=1e-10, direct_limit=direct_limit)
    result = reference.meta_gradient(linear_model, episode, inner_solver=SOLVER, **problem())
    exact, _ = closed_form(linear_model, episode)
    torch.testing.assert_close(result.grads["weight"].reshape(-1), exact, rtol=1e-8, atol=1e-10)
    error = reference.compare(result.grads, result)
    assert error.relative_error == 0
    assert error.cosine == pytest.approx(1)
    assert error.converged
    assert error.indefinite == 0
    assert linear_model.weight.dtype == torch.float32


def test_the_error_of_the_first_order_is_the_closed_form(linear_model):
    episode = regression()
    reference = ExactReference(tol=1e-10)
    many = GradientDescent(lr=0.3, steps=500)
    estimate = meta_gradient(linear_model, episode, inner_solver=many, estimator=FirstOrder(), **problem())
    error = reference.compare(
        estimate.grads, reference.meta_gradient(linear_model, episode, inner_solver=SOLVER, **problem())
    )
    exact, slope = closed_form(linear_model, episode)
    assert error.relative_error == pytest.approx(float((slope - exact).norm() / exact.norm()), rel=1e-4)
    assert error.cosine == pytest.approx(float(F.cosine_similarity(slope, exact, dim=0)), rel=1e-4)


def test_the_error_falls_with_inner_steps_and_with_linear_steps(linear_model):
    episode = regression()
    reference = ExactReference()
    exact = reference.meta_gradient(linear_model, episode, inner_solver=SOLVER, **problem())

    def error(steps, linear_solver):
        estimate = meta_gradient(
            linear_model,
            episode,
            inner_solver=GradientDescent(0.3, steps),
            estimator=Implicit(linear_solver, Hessian()),
            **problem(),
        )
        return reference.compare(estimate.grads, exact).relative_error

    by_inner = [error(steps, Direct()) for steps in (1, 4, 16, 64)]
    by_linear = [error(200, ConjugateGradient(iterations)) for iterations in (1, 2, 6)]
    assert by_inner == sorted(by_inner, reverse=True)
    assert by_linear == sorted(by_linear, reverse=True)
    assert by_inner[-1] < 1e-4
    assert by_linear[-1] < 1e-4


@pytest.mark.parametrize("limits", [{"steps": 2}, {"linear_steps": 1, "direct_limit": 0}])
def test_a_reference_that_missed_a_tolerance_says_so(linear_model, limits):
    reference = ExactReference(**limits)
    result = reference.meta_gradient(linear_model, regression(), inner_solver=SOLVER, **problem())
    error = reference.compare(result.grads, result)
    assert not error.converged
    assert max(error.inner_residual, error.linear_residual) > 1e-3


def test_an_indefinite_system_is_reported():
    class Saddle(nn.Module):
        """Outputs φ₁² − φ₂²: stationary at 0, where the Hessian is diag(2, −2)."""

        def __init__(self):
            super().__init__()
            self.phi = nn.Parameter(torch.zeros(2))

        def forward(self, inputs):
            return (self.phi[0] ** 2 - self.phi[1] ** 2 + self.phi.sum() * inputs[:, 0]).expand(len(inputs))

    support, query = torch.zeros(1, 3, 1), torch.ones(1, 3, 1)
    targets = torch.zeros(1, 3)
    reference = ExactReference()
    result = reference.meta_gradient(
        Saddle(),
        Episode(support, targets, query, targets),
        inner_solver=SOLVER,
        **problem(loss=lambda outputs, targets: outputs.mean()),
    )
    error = reference.compare(result.grads, result)
    assert error.indefinite == 1
    # (diag(2, −2) + 0.5 I) u = (1, 1), and the meta-gradient is 0.5 u.
    torch.testing.assert_close(result.grads["phi"], torch.tensor([0.2, -1 / 3], dtype=torch.float64))


def test_the_model_s_own_precision_is_kept_on_request(linear_model):
    result = ExactReference(double=False).meta_gradient(linear_model, regression(), inner_solver=SOLVER, **problem())
    assert result.grads["weight"].dtype == torch.float32


def test_learned_strengths_are_compared_too(linear_model):
    strengths = {"log_strength": torch.tensor(math.log(STRENGTH))}
    changes = problem(regularizer=Proximal(STRENGTH, learned=True), strengths=strengths)
    reference = ExactReference()
    result = reference.meta_gradient(linear_model, regression(), inner_solver=SOLVER, **changes)
    wrong = {**result.grads, "regularizer.log_strength": -result.grads["regularizer.log_strength"]}
    assert reference.compare(wrong, result).relative_error > 0


def test_an_inner_solver_without_steps_is_refused():
    with pytest.raises(TypeError, match=r"dataclass with a field 'steps'.*found object"):
        ExactReference().inner_solver(object())


def module(**kwargs):
    torch.manual_seed(2)
    return IMAMLModule(
        **{
            "backbone": nn.Linear(FEATURES, 1, bias=False),
            "loss": half_squares,
            "inner_solver": SOLVER,
            "regularizer": Proximal(STRENGTH),
            **kwargs,
        }
    )


class Metrics(Callback):
    """Remembers ``callback_metrics`` of every step."""

    def __init__(self):
        self.steps = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.steps.append({k: float(v) for k, v in trainer.callback_metrics.items()})


def fit(tmp_path, model, *callbacks, steps=4):
    episodes = [regression(seed=seed) for seed in range(steps)]
    trainer = Trainer(
        max_epochs=1,
        limit_val_batches=1,
        num_sanity_val_steps=0,
        accelerator="cpu",
        default_root_dir=tmp_path,
        logger=False,
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = DataLoader(episodes, batch_size=None)
    trainer.fit(model, loader, loader)
    return model


def test_the_monitor_logs_what_the_closed_form_says(tmp_path):
    seen = Metrics()
    # A step size of zero: all steps see the same initialisation.
    model = module(estimator=FirstOrder(), optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    fit(tmp_path, model, MetaGradientErrorMonitor(every_n_steps=2, tasks=2), seen)
    assert [any(k.startswith("meta_gradient/") for k in step) for step in seen.steps] == [False, True, True, True]
    for seed in (1, 3):
        step, episode = seen.steps[seed], regression(seed=seed)
        exact, _ = closed_form(model.backbone, episode)
        estimate = meta_gradient(model.backbone, episode, inner_solver=SOLVER, estimator=FirstOrder(), **problem())
        found = estimate.grads["weight"].reshape(-1).double()
        relative = float((found - exact).norm() / exact.norm())
        assert step["meta_gradient/relative_error"] == pytest.approx(relative, rel=1e-3)
        assert 0 < step["meta_gradient/cosine"] < 1
        assert step["meta_gradient/reference_converged"] == 1
        assert step["meta_gradient/reference_inner_residual"] <= 1e-6
        assert step["meta_gradient/reference_linear_residual"] <= 1e-6
        assert step["meta_gradient/reference_indefinite"] == 0


def test_a_batch_that_is_no_episode_is_refused():
    pair = (torch.zeros(1, 2, FEATURES), torch.zeros(1, 2, 1))
    with pytest.raises(TypeError, match=r"a batch must be an Episode of .*; found 2 parts"):
        MetaGradientErrorMonitor(1).on_train_batch_start(SimpleNamespace(global_step=0), module(), pair, 0)


class Noisy(nn.Module):
    """Draws random numbers and writes to a buffer in every forward pass."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(FEATURES, 1)
        self.dropout = nn.Dropout(0.3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, inputs):
        self.calls.add_(1)
        return self.inner(self.dropout(inputs))


def test_training_is_the_same_with_and_without(tmp_path):
    def after(*callbacks):
        torch.manual_seed(3)
        model = module(backbone=Noisy(), regularizer=Proximal(STRENGTH, learned=True))
        fit(tmp_path, model, *callbacks)
        return {**model.state_dict(), "random state": torch.get_rng_state()}

    monitor = MetaGradientErrorMonitor(every_n_steps=1, reference_steps=5, reference_linear_steps=5)
    expected, found = after(), after(monitor)
    assert expected["backbone.calls"] == 0
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name


def test_a_reference_that_diverges_does_not_stop_training(tmp_path):
    seen = Metrics()
    model = module(inner_solver=GradientDescent(lr=30.0, steps=1))
    fit(tmp_path, model, MetaGradientErrorMonitor(every_n_steps=1), seen, steps=1)
    assert seen.steps[0]["meta_gradient/reference_converged"] == 0
    assert math.isnan(seen.steps[0]["meta_gradient/relative_error"])


@pytest.mark.parametrize("first", ["memory", "error"])
def test_its_own_work_does_not_count_as_memory_of_the_step(tmp_path, first):
    def peaks(*callbacks):
        seen = Metrics()
        fit(tmp_path, module(), *callbacks, seen, steps=2)
        return {k: v for k, v in seen.steps[1].items() if k.startswith("memory/") and "process" not in k}

    memory = PeakMemoryMonitor(every_n_steps=2)
    error = MetaGradientErrorMonitor(every_n_steps=2)
    order = (memory, error) if first == "memory" else (error, memory)
    expected = peaks(PeakMemoryMonitor(every_n_steps=2))
    assert expected.keys() >= {"memory/inner_loop_mib", "memory/linear_solve_mib", "memory/meta_step_mib"}
    found = peaks(*order)
    # What the monitor leaves in callback_metrics is a few scalars.
    assert found == pytest.approx(expected, abs=100 / 2**20)


def test_a_network_built_by_configure_backbone_is_accepted(tmp_path):
    class Late(IMAMLModule):
        def configure_backbone(self):
            return nn.Linear(FEATURES, 1)

    seen = Metrics()
    fit(
        tmp_path, Late(loss=half_squares, inner_solver=SOLVER), MetaGradientErrorMonitor(every_n_steps=1), seen, steps=1
    )
    assert seen.steps[0]["meta_gradient/reference_converged"] == 1


def test_a_module_without_meta_gradient_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"found BoringModel, which lacks .*meta_gradient.*Subclass"):
        fit(tmp_path, BoringModel(), MetaGradientErrorMonitor())
    assert phases._listeners == []


def test_tasks_below_one_are_refused():
    with pytest.raises(ValueError, match="tasks must be at least 1; found 0"):
        MetaGradientErrorMonitor(tasks=0)
