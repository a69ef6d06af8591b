"""Networks and modules that torch.compile has wrapped."""

from __future__ import annotations

import pytest
import torch
from conftest import TanhNet, regression_episode
from lightning.pytorch import Trainer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_imaml import IMAMLModule
from lightning_imaml.functional import adapt, evaluate, meta_gradient
from lightning_imaml.inner import GradientDescent
from lightning_imaml.meta_gradients import Unrolled

SETTINGS = {"loss": F.mse_loss, "inner_solver": GradientDescent(0.1, 2)}


def network(wrap):
    torch.manual_seed(0)
    return wrap(TanhNet().double())


def inner_part_compiled(net):
    net.hidden = torch.compile(net.hidden)
    return net


def in_place(net):
    net.compile()
    return net


@pytest.mark.parametrize("size", [1, None])
@pytest.mark.parametrize("wrap", [torch.compile, inner_part_compiled, in_place])
def test_a_compiled_backbone_gives_what_the_plain_one_gives(wrap, size):
    compiled, episode = network(wrap), regression_episode()
    for settings in ({}, {"estimator": Unrolled()}):
        found = meta_gradient(compiled, episode, chunk_size=size, **SETTINGS, **settings).grads
        plain = meta_gradient(network(lambda net: net), episode, **SETTINGS, **settings).grads
        assert found.keys() == {name for name, _ in compiled.named_parameters()}
        torch.testing.assert_close(list(found.values()), list(plain.values()), rtol=1e-9, atol=1e-12)
    adapted = adapt(compiled, episode.support_inputs, episode.support_targets, **SETTINGS).parameters
    evaluate(compiled, adapted, episode.query_inputs, episode.query_targets, loss=F.mse_loss)


def test_a_compiled_module_trains_uncompiled_with_a_warning(tmp_path):
    batches = DataLoader([regression_episode(seed=seed) for seed in range(2)], batch_size=None)
    trained = []
    for wrap in (torch.compile, nn.Identity()):
        module = IMAMLModule(network(lambda net: net), **SETTINGS)
        trainer = Trainer(
            accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=tmp_path,
        )  # fmt: skip
        if wrap is torch.compile:
            with pytest.warns(UserWarning, match="torch.compile must not wrap an IMAMLModule"):
                trainer.fit(wrap(module), batches, batches)
        else:
            trainer.fit(wrap(module), batches, batches)
        trained.append({name: p.detach().clone() for name, p in module.named_parameters()})
    torch.testing.assert_close(*trained)
