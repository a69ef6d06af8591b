"""Networks that differentiate in their forward pass, as forces come from energies."""

from __future__ import annotations

import pytest
import torch
from conftest import regression_episode
from lightning.pytorch import Trainer
from test_isolation import PLAIN, plain_loop, require_unchanged, state_of
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_imaml import IMAMLModule
from lightning_imaml.functional import adapt, evaluate, meta_gradient, predict
from lightning_imaml.inner import GradientDescent
from lightning_imaml.meta_gradients import FirstOrder, Implicit, Reptile, Unrolled


class Forces(nn.Module):
    """−∇E at positions."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.energy = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()

    def forward(self, positions):
        positions = positions.detach().requires_grad_()
        energy = self.energy(positions).sum()
        return -torch.autograd.grad(energy, positions, create_graph=True)[0]


class FunctionalForces(Forces):
    """The same by torch.func."""

    def forward(self, positions):
        return -vmap(grad(lambda x: self.energy(x).squeeze(-1)))(positions)


KINDS = [Forces, FunctionalForces]
EPISODE = regression_episode(outputs=3)
pytestmark = pytest.mark.filterwarnings("ignore:.*must consist of operations:UserWarning")


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("size", [1, None])
@pytest.mark.parametrize("kind", KINDS)
def test_prediction_works_where_gradients_are_off(kind, size, guard):
    network = kind()
    before = state_of(network)
    with guard():
        adapted = adapt(network, EPISODE.support_inputs, EPISODE.support_targets, chunk_size=size, **PLAIN).parameters
        outputs = predict(network, adapted, EPISODE.query_inputs, chunk_size=size)
        loss, again = evaluate(
            network, adapted, EPISODE.query_inputs, EPISODE.query_targets, loss=F.mse_loss, chunk_size=size
        )
    require_unchanged(network, before)
    assert guard is torch.enable_grad or not (outputs.requires_grad or loss.requires_grad)
    for task in range(EPISODE.tasks):
        own = {name: value[task].clone() for name, value in adapted.items()}
        expected = functional_call(network, own, EPISODE.query_inputs[task])
        torch.testing.assert_close(outputs[task].clone(), expected.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(loss, (again - EPISODE.query_targets).square().mean((1, 2)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("estimator", [FirstOrder(), Unrolled()], ids=str)
def test_meta_gradients_through_forces(kind, estimator):
    network = kind()
    found = meta_gradient(network, EPISODE, estimator=estimator, **PLAIN).grads
    for name, g in plain_loop(network, EPISODE, estimator).items():
        torch.testing.assert_close(found[name], g, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("estimator", [Implicit(), Reptile()], ids=str)
def test_other_estimators_run(estimator):
    settings = {"loss": F.mse_loss, "inner_solver": GradientDescent(0.1, 2), "estimator": estimator}
    found = [meta_gradient(kind(), EPISODE, **settings).grads for kind in KINDS]
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)


def test_a_trainer_fits_validates_and_predicts(tmp_path):
    batches = DataLoader([regression_episode(outputs=3, seed=seed) for seed in range(2)], batch_size=None)
    module = IMAMLModule(Forces(), loss=F.mse_loss, inner_solver=GradientDescent(0.1, 2))
    trainer = Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, batches, batches)
    assert trainer.callback_metrics["val/loss"].isfinite()
    assert len(trainer.predict(module, batches)) == 2
