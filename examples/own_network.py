"""A plain ``nn.Module`` and a dataset of one's own become a few-shot learner: four lines around what there was.

python examples/own_network.py
"""

from __future__ import annotations

import argparse

import torch
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_imaml import IMAMLModule
from lightning_imaml.data import EpisodicDataModule
from lightning_imaml.inner import GradientDescent
from lightning_imaml.regularizers import Proximal


class Network(nn.Module):
    """What there was: a network for vectors, with as many outputs as a task has classes."""

    def __init__(self, ways: int = 5) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, ways))

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits ``[n, ways]`` of vectors ``[n, 16]``."""
        logits: Tensor = self.layers(inputs)
        return logits


def dataset() -> TensorDataset:
    """What there was: 60 classes of 20 vectors each; a class is a direction of the first eight coordinates."""
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(1200) % 60
    directions = torch.zeros(60, 16)
    directions[:, :8] = torch.randn(60, 8, generator=random)
    return TensorDataset(directions[labels] + 0.7 * torch.randn(1200, 16, generator=random), labels)


def main(args: list[str] | None = None) -> dict[str, float]:
    """Train and test; return the test metrics."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--meta-steps", type=int, default=200)
    parser.add_argument("--test-tasks", type=int, default=600)
    options = parser.parse_args(args)

    seed_everything(0, verbose=False)
    data = EpisodicDataModule(dataset(), ways=5, shots=1, queries=5, tasks_per_batch=8, test_tasks=options.test_tasks)
    module = IMAMLModule(Network(), inner_solver=GradientDescent(lr=0.1, steps=5), regularizer=Proximal(0.5))
    trainer = Trainer(max_steps=options.meta_steps, accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.fit(module, datamodule=data)
    (tested,) = trainer.test(module, datamodule=data)
    return dict(tested)


if __name__ == "__main__":
    main()
