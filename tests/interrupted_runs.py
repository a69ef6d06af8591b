"""Small runs that tests interrupt and resume."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_imaml import IMAMLModule
from lightning_imaml.data import EpisodicDataModule
from lightning_imaml.inner import GradientDescent
from lightning_imaml.regularizers import Proximal

STEPS = 13


def module(dropout: float = 0.0, kind: type[IMAMLModule] = IMAMLModule, **settings) -> IMAMLModule:
    seed_everything(0, verbose=False)
    network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(dropout), nn.Linear(4, 2))
    schedule = functools.partial(torch.optim.lr_scheduler.StepLR, step_size=3, gamma=0.5)
    defaults = {
        "inner_solver": GradientDescent(0.1, 2), "regularizer": Proximal(0.5, learned=True),
        "optimizer": functools.partial(torch.optim.Adam, lr=0.01), "lr_scheduler": schedule,
    }  # fmt: skip
    return kind(network, **defaults | settings)


def data(**settings) -> EpisodicDataModule:
    generator = torch.Generator().manual_seed(0)
    source = TensorDataset(torch.randn(120, 3, generator=generator), torch.arange(120) % 12)
    sizes = {"ways": 2, "shots": 1, "queries": 2, "tasks_per_batch": 2, "batches_per_epoch": 5, "val_tasks": 2}
    return EpisodicDataModule(source, **sizes | settings)


def trainer(folder: Path, *callbacks: Callback, **settings) -> Trainer:
    defaults = {
        "max_steps": STEPS, "max_epochs": -1, "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False, "accelerator": "cpu", "devices": 1, "num_sanity_val_steps": 0,
        "limit_val_batches": 1, "log_every_n_steps": 3,
    }  # fmt: skip
    saves = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    return Trainer(
        **defaults | {"enable_checkpointing": saves} | settings, default_root_dir=folder, callbacks=list(callbacks)
    )


def each_step(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(
        folder, filename="{step}", every_n_train_steps=1, save_top_k=2, monitor="step", mode="max", save_last=True
    )


def weights(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()
