"""Evaluation under the default Trainer: adapts, without second-order graphs, in memory that does not grow."""

from __future__ import annotations

import gc

import pytest
import torch
from conftest import class_episode
from lightning.pytorch import Trainer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_imaml import Episode, IMAMLModule
from lightning_imaml.callbacks import LiveTensorBytes
from lightning_imaml.diagnostics.protocol import Protocol
from lightning_imaml.functional import adapt, predict
from lightning_imaml.inner import GradientDescent, HessianFree, Nesterov, TorchOptimizer
from lightning_imaml.meta_gradients import Implicit, Unrolled
from lightning_imaml.regularizers import Proximal

SHAPE = (1, 4, 4)


def episode(seed: int = 0) -> Episode:
    return class_episode(tasks=3, ways=3, shape=SHAPE, seed=seed)


def module(steps: int = 3, **settings) -> IMAMLModule:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3))
    return IMAMLModule(
        network, **{"inner_solver": GradientDescent(0.1, steps), "regularizer": Proximal(0.5)} | settings
    )


def trainer() -> Trainer:
    return Trainer(
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        accelerator="cpu", devices=1,
    )  # fmt: skip


def loader(batches: int = 2) -> DataLoader:
    return DataLoader([episode(k) for k in range(batches)], batch_size=None)


@pytest.fixture
def graphs(monkeypatch) -> list[bool]:
    """Whether each derivative that was taken could be differentiated again."""
    kept = []
    grad = torch.autograd.grad

    def recorded(outputs, inputs, *args, **kwargs):
        result = grad(outputs, inputs, *args, **kwargs)
        kept.append(any(g is not None and g.requires_grad for g in result))
        return result

    monkeypatch.setattr(torch.autograd, "grad", recorded)
    return kept


@pytest.mark.parametrize("solver", [GradientDescent(0.1, 3), Nesterov(0.1, 3), TorchOptimizer(torch.optim.SGD, 3,
                                    {"lr": 0.1})], ids=lambda s: type(s).__name__)  # fmt: skip
@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_evaluation_builds_no_second_order_graph(graphs, solver, stage):
    model = module(inner_solver=solver, estimator=Unrolled())
    getattr(trainer(), stage)(model, loader())
    assert len(graphs) >= 2 * 3
    assert not any(graphs)
    assert all(p.grad is None for p in model.parameters())


def test_the_recorder_sees_the_graph_of_training(graphs):
    module(estimator=Unrolled()).meta_gradient(episode())
    assert any(graphs)


def test_the_default_is_inference_mode_and_adapts_in_it():
    seen = []

    class Watched(IMAMLModule):
        def test_step(self, batch, batch_idx):
            seen.append(torch.is_inference_mode_enabled())
            super().test_step(batch, batch_idx)

    model = Watched(module().backbone, inner_solver=GradientDescent(0.5, 20), regularizer=Proximal(0.1))
    (found,) = trainer().test(model, loader(), verbose=False)
    assert seen == [True, True]
    assert found["test/accuracy"] > found["test/accuracy_before"]


def peak(steps: int, batches: int, **settings) -> int:
    model, data = module(steps, **settings), loader(batches)
    run = trainer()
    run.validate(model, data, verbose=False)  # What is made once is there.
    gc.disable()  # A collection at another time frees Lightning's cycles at another time: some scalars of the peak.
    try:
        with LiveTensorBytes() as live:
            run.validate(model, data, verbose=False)
    finally:
        gc.enable()
    return live.peak


@pytest.mark.parametrize("estimator", [Implicit(), Unrolled()], ids=repr)
def test_memory_grows_neither_with_inner_steps_nor_with_batches(estimator):
    least = peak(2, 2, estimator=estimator)
    assert peak(40, 2, estimator=estimator) == least
    assert peak(2, 20, estimator=estimator) <= least + 2048  # Eighteen more batches: losses of 3 tasks, if they leaked.


def test_the_hessian_free_solver_frees_its_graph():
    first, later = (peak(1, 1, inner_solver=HessianFree(steps)) for steps in (3, 12))
    assert later == first


def test_predict_returns_each_tasks_query_predictions():
    model = module()
    found = trainer().predict(model, loader(2))
    for k, outputs in enumerate(found):
        tasks = episode(k)
        settings = {"inner_solver": model.inner_solver, "regularizer": model.regularizer}
        adapted = adapt(model.backbone, tasks.support_inputs, tasks.support_targets, **settings)
        torch.testing.assert_close(outputs, predict(model.backbone, adapted.parameters, tasks.query_inputs))
        assert outputs.shape == (3, 6, 3)


def test_evaluation_may_have_a_solver_of_its_own():
    of_evaluation = GradientDescent(0.2, 9)
    model, plain = module(eval_inner_solver=of_evaluation), module(inner_solver=of_evaluation)
    (found,), (expected,) = (trainer().test(m, loader(), verbose=False) for m in (model, plain))
    assert found == expected != trainer().test(module(), loader(), verbose=False)[0]
    for one, other in zip(trainer().predict(model, loader()), trainer().predict(plain, loader()), strict=True):
        torch.testing.assert_close(one, other)
    assert "9 inner steps" in str(Protocol.of(model, episode()))


def test_a_solver_of_evaluation_does_not_train():
    found, expected, other = (
        m.meta_gradient(episode()).loss
        for m in (module(eval_inner_solver=GradientDescent(0.2, 9)), module(), module(9))
    )
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, other)


@pytest.mark.parametrize("learned", [True, False])
def test_a_solver_of_evaluation_takes_the_learned_step_sizes_if_it_learns(learned):
    trained, of_evaluation = GradientDescent(0.1, 3, learned=True), GradientDescent(0.2, 3, learned=learned)
    model = module(inner_solver=trained, eval_inner_solver=of_evaluation)
    support = episode().support_inputs, episode().support_targets
    found = model.adapt(*support).parameters
    expected = model.adapt(*support, inner_solver=trained if learned else GradientDescent(0.2, 3)).parameters
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 3)

    def forward(self, inputs):
        return {"mean": self.body(inputs["x"]) * inputs["scale"], "shift": self.body(inputs["x"])}


def test_predictions_can_be_a_dict():
    def inputs() -> dict[str, torch.Tensor]:
        return {"x": torch.rand(2, 6, 4), "scale": torch.rand(2, 6, 1)}

    def loss(outputs, targets):
        return F.mse_loss(outputs["mean"] + outputs["shift"], targets)

    tasks = Episode(inputs(), torch.rand(2, 6, 3), inputs(), torch.rand(2, 6, 3))
    model = IMAMLModule(TwoHeads(), loss=loss, inner_solver=GradientDescent(0.1, 2), estimator=Implicit())
    data = DataLoader([tasks], batch_size=None)
    run = Trainer(max_steps=2, logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu",
                  devices=1, enable_model_summary=False)  # fmt: skip
    run.fit(model, data, data)
    assert run.callback_metrics["val/loss"].isfinite()
    (found,) = run.predict(model, data)
    assert {name: value.shape for name, value in found.items()} == {"mean": (2, 6, 3), "shift": (2, 6, 3)}
