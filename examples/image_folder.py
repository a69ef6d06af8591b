"""A torchvision ResNet and a folder of images, one subfolder a class, become a few-shot learner.

python examples/image_folder.py FOLDER

The classes are split into training, validation and test classes; each needs at least shots + queries images.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from lightning.pytorch import Trainer, seed_everything
from torchvision.datasets import ImageFolder
from torchvision.models import resnet18
from torchvision.transforms import v2

from lightning_imaml import IMAMLModule
from lightning_imaml.data import EpisodicDataModule
from lightning_imaml.inner import GradientDescent
from lightning_imaml.models import use_batch_statistics
from lightning_imaml.regularizers import Proximal


def main(folder: Path, ways: int = 5, shots: int = 1, queries: int = 5, size: int = 84, **settings: object) -> Trainer:
    """Train and test; ``settings`` go to the Trainer."""
    seed_everything(0, verbose=False)
    transform = v2.Compose([v2.Resize((size, size)), v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)])
    images = ImageFolder(str(folder), transform=transform)
    data = EpisodicDataModule(
        images, ways=ways, shots=shots, queries=queries, tasks_per_batch=2, val_tasks=20, test_tasks=100
    )
    # Tasks that adapt side by side must not share running statistics.
    network = use_batch_statistics(resnet18(num_classes=ways))
    module = IMAMLModule(
        network,
        inner_solver=GradientDescent(lr=0.05, steps=3),
        regularizer=Proximal(0.5),
        chunk_size=1,  # One task at a time: 11 million parameters each.
    )
    trainer = Trainer(**{"max_epochs": 10, "logger": False} | settings)  # type: ignore[arg-type]
    trainer.fit(module, datamodule=data)
    trainer.test(module, datamodule=data)
    return trainer


if __name__ == "__main__":
    main(Path(sys.argv[1]))
