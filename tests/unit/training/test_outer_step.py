"""What manual optimization leaves to the module, against plain PyTorch."""

from __future__ import annotations

import functools

import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import grad_norm
from small_runs import episode, loader, module, trainer, weights
from torch import Tensor

from lightning_imaml import IMAMLModule
from lightning_imaml.regularizers import Proximal


def gradient(model: IMAMLModule) -> Tensor:
    found = model.meta_gradient(episode()).grads
    return torch.cat([found[name].flatten() for name, _ in model.backbone.named_parameters()])


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_the_meta_gradient_is_clipped_as_the_trainer_would(algorithm):
    model = module(gradient_clip_val=0.02, gradient_clip_algorithm=algorithm)
    start, full = weights(model), gradient(model)
    trainer(max_steps=1).fit(model, loader(1))
    clipped = full.clamp(-0.02, 0.02) if algorithm == "value" else full * 0.02 / full.norm()
    assert not torch.allclose(clipped, full)
    torch.testing.assert_close(start - weights(model), clipped, rtol=1e-4, atol=1e-6)


def test_the_gradients_norm_is_logged_before_it_is_clipped():
    model, run = module(gradient_clip_val=1e-3), trainer(max_steps=1)
    expected = gradient(model).norm()
    run.fit(model, loader(1))
    torch.testing.assert_close(run.callback_metrics["train/grad_norm"], expected)


class OwnClipping(IMAMLModule):
    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        for parameter in self.parameters():
            parameter.grad.fill_(gradient_clip_val)


def test_clipping_can_be_overridden():
    model = module(OwnClipping, gradient_clip_val=0.25)
    start = weights(model)
    trainer(max_steps=1).fit(model, loader(1))
    torch.testing.assert_close(start - weights(model), torch.full_like(start, 0.25))


class Norms(IMAMLModule):
    """The recipe of Lightning's documentation."""

    def on_before_optimizer_step(self, optimizer):
        self.log_dict(grad_norm(self.backbone, norm_type=2))


def test_lightnings_recipe_for_gradient_norms_sees_them_before_clipping():
    model, run = module(Norms, gradient_clip_val=0.01), trainer(max_steps=1)
    start, expected = weights(model), gradient(model).norm()
    run.fit(model, loader(1))
    torch.testing.assert_close(run.callback_metrics["grad_2.0_norm_total"], expected, rtol=1e-3, atol=0)
    assert (weights(model) - start).norm().item() == pytest.approx(0.01, rel=1e-3)


def test_the_learned_strength_has_its_own_learning_rate(tmp_path):
    model = module(regularizer=Proximal(0.5, learned=True), regularizer_lr=0.01)
    start, strength = weights(model.backbone), model.strengths["log_strength"].item()
    grads = model.meta_gradient(episode()).grads
    rates = LearningRateMonitor()
    run = trainer(rates, max_steps=1, logger=CSVLogger(tmp_path))
    run.fit(model, loader(1))
    moved = torch.cat([grads[name].flatten() for name, _ in model.backbone.named_parameters()])
    torch.testing.assert_close(start - weights(model.backbone), moved, rtol=1e-4, atol=1e-6)
    step = 0.01 * grads["regularizer.log_strength"].item()
    assert strength - model.strengths["log_strength"].item() == pytest.approx(step, rel=1e-3)
    logged = run.callback_metrics
    assert logged["train/lr"] == logged["train/lr/backbone"] == 1.0
    assert logged["train/lr/regularizer"].item() == pytest.approx(0.01)
    assert rates.lrs["lr-SGD/backbone"][0] == 1.0
    assert rates.lrs["lr-SGD/regularizer"][0] == 0.01


class Groups(IMAMLModule):
    def configure_optimizers(self):
        head, body = self.backbone[-1], self.backbone[1]
        return torch.optim.SGD([{"params": body.parameters(), "lr": 0.5}, {"params": head.parameters()}], lr=2.0)


def test_the_networks_parts_can_have_learning_rates_of_their_own():
    model, run = module(Groups), trainer(max_steps=1)
    grads = model.meta_gradient(episode()).grads
    head, body = model.backbone[-1].bias.detach().clone(), model.backbone[1].bias.detach().clone()
    run.fit(model, loader(1))
    assert (run.callback_metrics["train/lr"], run.callback_metrics["train/lr/group2"]) == (0.5, 2.0)
    torch.testing.assert_close(head - model.backbone[-1].bias, 2.0 * grads["3.bias"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(body - model.backbone[1].bias, 0.5 * grads["1.bias"], rtol=1e-4, atol=1e-6)


def test_a_plateau_scheduler_can_go_by_steps():
    class Plateau(IMAMLModule):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
            # Nothing ever improves by this threshold, so that every call lowers the rate.
            schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=0, threshold=1e9)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step", "frequency": 2}}

    model, run = module(Plateau, lr_scheduler_monitor="val/loss"), trainer(val_check_interval=1)
    run.fit(model, loader(4), loader(1))
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.01)


def test_the_scheduler_starts_where_the_checkpoint_left_it(tmp_path):
    schedule = functools.partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
    run = trainer(max_epochs=1)
    run.fit(module(lr_scheduler=schedule), loader(2))
    run.save_checkpoint(tmp_path / "two.ckpt")
    resumed = trainer(max_epochs=2)
    resumed.fit(module(lr_scheduler=schedule), loader(2), ckpt_path=tmp_path / "two.ckpt")
    assert resumed.optimizers[0].param_groups[0]["lr"] == 0.5**4
