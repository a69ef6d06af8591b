"""An existing LightningModule and DataModule become a few-shot learner; its network, its loss and its data are reused.

python examples/own_lightning_module.py
"""

from __future__ import annotations

import argparse

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from own_network import Network, dataset
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_imaml import IMAMLModule
from lightning_imaml.data import EpisodicDataModule
from lightning_imaml.inner import GradientDescent
from lightning_imaml.regularizers import Proximal


class Classifier(LightningModule):
    """What there was: an ordinary classifier with a loss of its own."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.network = Network(classes)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits of vectors."""
        logits: Tensor = self.network(inputs)
        return logits

    def compute_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy with smoothed labels."""
        return F.cross_entropy(logits, labels, label_smoothing=0.1)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of a batch of examples."""
        inputs, labels = batch
        return self.compute_loss(self(inputs), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters())


class Examples(LightningDataModule):
    """What there was: a data module of single examples."""

    def setup(self, stage: str | None = None) -> None:
        """Load the data."""
        self.train_set: TensorDataset = dataset()

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Batches of examples."""
        return DataLoader(self.train_set, batch_size=32, shuffle=True)


def main(args: list[str] | None = None) -> dict[str, float]:
    """Train and test; return the test metrics."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--meta-steps", type=int, default=200)
    parser.add_argument("--test-tasks", type=int, default=600)
    options = parser.parse_args(args)

    seed_everything(0, verbose=False)
    ways = 5
    classifier, examples = Classifier(ways), Examples()
    examples.setup()
    module = IMAMLModule(
        classifier,
        loss=classifier.compute_loss,
        inner_solver=GradientDescent(lr=0.1, steps=5),
        regularizer=Proximal(0.5),
    )
    data = EpisodicDataModule(
        examples.train_set, ways=ways, shots=1, queries=5, tasks_per_batch=8, test_tasks=options.test_tasks
    )
    trainer = Trainer(max_steps=options.meta_steps, accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.fit(module, datamodule=data)
    (tested,) = trainer.test(module, datamodule=data)
    return dict(tested)


if __name__ == "__main__":
    main()
