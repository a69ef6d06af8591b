"""Runs that take a moment: a tiny network, two tasks a batch, a Trainer without extras."""

from __future__ import annotations

import functools

import torch
from conftest import class_episode
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_imaml import Episode, IMAMLModule
from lightning_imaml.inner import GradientDescent
from lightning_imaml.regularizers import Proximal

SHAPE = (1, 4, 4)
SGD = functools.partial(torch.optim.SGD, lr=1.0)


def episode(seed: int = 0) -> Episode:
    return class_episode(tasks=2, ways=3, shape=SHAPE, seed=seed)


def network(*layers: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 4), *layers, nn.Tanh(), nn.Linear(4, 3))


def module(kind: type[IMAMLModule] = IMAMLModule, **settings) -> IMAMLModule:
    defaults = {"backbone": network(), "inner_solver": GradientDescent(0.1, 2), "regularizer": Proximal(0.5)}
    return kind(**defaults | {"optimizer": SGD} | settings)


def loader(batches: int = 4) -> DataLoader:
    return DataLoader([episode(k) for k in range(batches)], batch_size=None)


def trainer(*callbacks, **settings) -> Trainer:
    defaults = {
        "max_epochs": 1, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
        "enable_model_summary": False, "accelerator": "cpu", "devices": 1, "log_every_n_steps": 1,
    }  # fmt: skip
    return Trainer(**defaults | settings, callbacks=list(callbacks))


def weights(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()
