"""On a GPU: the answers of the CPU in float64, the same memory for every number of steps, training, resumption."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import pytest
import small_runs
import torch
from conftest import class_episode
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_imaml import Episode, IMAMLModule
from lightning_imaml.callbacks import MetaGradientErrorMonitor, PeakMemoryMonitor
from lightning_imaml.curvature import GaussNewton, Hessian
from lightning_imaml.data import Affine, GlyphDataModule, RandomAffine
from lightning_imaml.functional import adapt, evaluate, meta_gradient
from lightning_imaml.functional.preparation import Solve
from lightning_imaml.functional.settings import Settings
from lightning_imaml.inner import GradientDescent, HessianFree, Nesterov, TorchOptimizer
from lightning_imaml.linear import ConjugateGradient, Direct, MinRes, Neumann
from lightning_imaml.meta_gradients import FirstOrder, Implicit, Reptile, Truncated, Unrolled
from lightning_imaml.models import Conv4
from lightning_imaml.problems.chunks import _bytes_of_a_task
from lightning_imaml.problems.network import FlatModel
from lightning_imaml.regularizers import Proximal

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
CUDA = "cuda"
SGD = functools.partial(torch.optim.SGD, lr=0.5)
ADAM = functools.partial(torch.optim.Adam, lr=0.01)
GD, SMALL_STEPS = GradientDescent(0.05, 4), GradientDescent(0.005, 4)
CASES = {
    "implicit, Gauss-Newton": (GD, Implicit(ConjugateGradient(5), GaussNewton()), Proximal(2.0)),
    "implicit, Hessian": (SMALL_STEPS, Implicit(ConjugateGradient(3), Hessian()), Proximal(100.0)),
    "implicit, MINRES": (SMALL_STEPS, Implicit(MinRes(3), Hessian()), Proximal(100.0)),
    "implicit, Neumann": (SMALL_STEPS, Implicit(Neumann(3), GaussNewton()), Proximal(100.0)),
    "implicit, learned": (GD, Implicit(ConjugateGradient(5), GaussNewton()), Proximal(2.0, learned=True)),
    "Nesterov": (Nesterov(0.05, 4), Implicit(ConjugateGradient(5), GaussNewton()), Proximal(2.0)),
    "Hessian-free": (HessianFree(2), Implicit(ConjugateGradient(5), GaussNewton()), Proximal(20.0)),
    "SGD": (TorchOptimizer(torch.optim.SGD, 3, {"lr": 0.05}), FirstOrder(), Proximal(2.0)),
    "MAML": (GD, Unrolled(), Proximal(2.0)),
    "truncated MAML": (GD, Truncated(2), Proximal(2.0)),
    "Reptile": (GD, Reptile(), Proximal(2.0)),
}


def images(tasks: int = 3, seed: int = 0) -> Episode:
    return class_episode(tasks=tasks, seed=seed)


def network() -> nn.Module:
    torch.manual_seed(0)
    return Conv4(5, filters=16)


def moved(episode: Episode, *where) -> Episode:
    return Episode(*(part.to(*where) if part.is_floating_point() else part.to(where[0]) for part in episode))


def gradient(net: nn.Module, episode: Episode, case, **options) -> torch.Tensor:
    solver, estimator, regularizer = case
    settings = {"inner_solver": solver, "estimator": estimator, "regularizer": regularizer}
    found = meta_gradient(net, episode, **settings, **options).grads
    return torch.cat([g.flatten() for g in found.values()]).cpu().double()


def distance(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


@pytest.mark.parametrize("name", CASES)
def test_the_meta_gradient_is_that_of_the_cpu_in_float64(name):
    exact = gradient(network().double(), moved(images(), "cpu", torch.float64), CASES[name])
    double = gradient(network().double().to(CUDA), moved(images(), CUDA, torch.float64), CASES[name])
    assert distance(double, exact) < 1e-9
    # TF32 has 10 bits: with it, the error would be far above.
    single = gradient(network().to(CUDA), moved(images(), CUDA), CASES[name])
    assert distance(single, exact) < 1e-3


@pytest.mark.parametrize("name", ["implicit, Gauss-Newton", "implicit, Hessian", "Nesterov", "MAML"])
def test_compiled_solves_give_the_same(name):
    """What cannot be compiled here warns, and warnings are errors."""
    exact = gradient(network().double(), moved(images(), "cpu", torch.float64), CASES[name])
    found = gradient(network().to(CUDA), moved(images(), CUDA), CASES[name], compile=True)
    assert distance(found, exact) < 1e-3


def test_a_dense_solve_gives_the_same_on_both():
    episode = small_runs.episode()
    case = GradientDescent(0.1, 3), Implicit(Direct(), GaussNewton()), Proximal(0.5)
    exact = gradient(small_runs.network().double(), moved(episode, "cpu", torch.float64), case)
    found = gradient(small_runs.network().double().to(CUDA), moved(episode, CUDA, torch.float64), case)
    assert distance(found, exact) < 1e-9


def test_tf32_outside_does_not_reach_full_precision():
    case = CASES["implicit, Gauss-Newton"]
    exact = gradient(network().double(), moved(images(), "cpu", torch.float64), case)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        net, episode = network().to(CUDA), moved(images(), CUDA)
        full = distance(gradient(net, episode, case), exact)
        short = distance(gradient(net, episode, case, full_precision=False), exact)
    finally:
        torch.set_float32_matmul_precision(before)
    assert full < 1e-3
    assert short > 3 * full


def peak(steps: int, estimator) -> int:
    net, episode = network().to(CUDA), moved(images(8), CUDA)
    settings = {"inner_solver": GradientDescent(0.01, steps), "estimator": estimator, "regularizer": Proximal(2.0)}
    meta_gradient(net, episode, **settings)  # Libraries take their workspaces.
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    meta_gradient(net, episode, **settings)
    return torch.cuda.max_memory_allocated() - before


def test_peak_memory_does_not_grow_with_inner_steps():
    few, many = (peak(steps, Implicit(ConjugateGradient(5), GaussNewton())) for steps in (2, 32))
    assert many <= 1.02 * few
    few, many = (peak(steps, Unrolled()) for steps in (2, 32))
    assert many > 4 * few


def test_chunks_follow_the_memory_of_the_card(monkeypatch):
    net, episode = network().to(CUDA), moved(images(8), CUDA)
    chunks = Solve(net, episode, Settings(inner_solver=GradientDescent(0.1, 2))).chunks
    assert [problem.tasks for problem, _ in chunks(episode)] == [8]
    # A quarter of it, for eight times what a forward pass keeps: two tasks at a time.
    small = SimpleNamespace(total_memory=4 * 8 * 2.5 * _bytes_of_a_task(FlatModel(net), episode.support_inputs))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: small)
    assert [problem.tasks for problem, _ in chunks(episode)] == [2, 2, 2, 2]


def test_adaptation_and_evaluation_run_in_inference_mode():
    net, episode = network().to(CUDA), moved(images(), CUDA)
    with torch.inference_mode():
        adapted = adapt(net, episode.support_inputs, episode.support_targets, inner_solver=GradientDescent(0.1, 8))
        loss, outputs = evaluate(net, adapted.parameters, episode.query_inputs, episode.query_targets)
    assert loss.device.type == outputs.device.type == CUDA
    assert loss.isfinite().all()


def module(**settings) -> IMAMLModule:
    defaults = {"inner_solver": GradientDescent(0.1, 3), "regularizer": Proximal(0.5), "optimizer": SGD}
    return IMAMLModule(network(), **defaults | settings)


def glyphs(**settings) -> GlyphDataModule:
    sizes = {"ways": 5, "shots": 1, "queries": 2, "tasks_per_batch": 4, "batches_per_epoch": 3, "val_tasks": 4}
    return GlyphDataModule(**sizes | {"test_tasks": 4} | settings)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_training_logs_its_monitors(precision):
    monitors = MetaGradientErrorMonitor(every_n_steps=1), PeakMemoryMonitor(every_n_steps=1)
    run = small_runs.trainer(*monitors, accelerator="gpu", precision=precision, max_epochs=2)
    model = module()
    run.fit(model, datamodule=glyphs(train_transform=RandomAffine(10, (0.1, 0.1), (0.8, 1.2), 10, p=0.5)))
    found = run.callback_metrics
    for name in ("train/outer_loss", "val/accuracy", "meta_gradient/relative_error", "memory/inner_loop_mib"):
        assert found[name].isfinite(), name
    assert 0 < found["memory/inner_loop_mib"] <= found["memory/step_mib"]
    assert run.strategy.root_device.type == CUDA
    run.test(model, datamodule=glyphs(), verbose=False)


def test_workers_and_pinned_memory():
    run = small_runs.trainer(accelerator="gpu", max_epochs=1)
    data = glyphs(num_workers=2)
    assert all(part.is_pinned() for part in next(iter(data.train_dataloader())))
    run.fit(module(), datamodule=data)
    assert run.global_step == 3


# Lightning calls barrier() without a device, of which PyTorch warns.
@pytest.mark.filterwarnings("ignore:barrier\\(\\). using the device under current context")
def test_ddp_over_nccl_with_one_rank_takes_the_same_steps():
    alone, ddp = module(), module()
    small_runs.trainer(accelerator="gpu", max_epochs=1).fit(alone, datamodule=glyphs())
    small_runs.trainer(accelerator="gpu", max_epochs=1, strategy="ddp").fit(ddp, datamodule=glyphs())
    torch.testing.assert_close(small_runs.weights(ddp), small_runs.weights(alone), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_resumed_run_goes_on_like_one_that_was_not_stopped(tmp_path):
    """Weights, Adam's moments, tasks, augmentation and the dropout of a network, on the device's own generator."""

    def fit(epochs: int, folder, resume=None):
        seed_everything(1, verbose=False)
        net = nn.Sequential(nn.Flatten(), nn.Linear(784, 16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 5))
        model = IMAMLModule(net, inner_solver=GradientDescent(0.1, 3), regularizer=Proximal(0.5), optimizer=ADAM)
        keeps = ModelCheckpoint(folder, "end", every_n_epochs=1, enable_version_counter=False)
        run = small_runs.trainer(keeps, accelerator="gpu", max_epochs=epochs, enable_checkpointing=True)
        run.fit(model, datamodule=glyphs(train_transform=RandomAffine(10, p=0.5)), ckpt_path=resume)
        return small_runs.weights(model), keeps.best_model_path

    whole, _ = fit(2, tmp_path / "whole")
    _, checkpoint = fit(1, tmp_path / "stopped")
    resumed, _ = fit(2, tmp_path / "stopped", checkpoint)
    torch.testing.assert_close(resumed, whole, rtol=1e-4, atol=1e-6)


def test_augmentation_is_that_of_the_cpu():
    samples = torch.rand(6, 1, 28, 28)
    alike = Affine(20, (0.1, -0.1), 1.2, 15, mirror=True)
    for transform in (RandomAffine(20, (0.1, 0.1), (0.8, 1.2), 15, p=0.7), alike):
        torch.manual_seed(3)
        here = transform(samples)
        torch.manual_seed(3)
        there = transform(samples.to(CUDA))
        assert there.device.type == CUDA
        torch.testing.assert_close(there.cpu(), here, rtol=1e-4, atol=1e-4)
