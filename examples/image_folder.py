"""A torchvision ResNet and a folder of images, one subfolder a class, become a few-shot learner.

python examples/image_folder.py FOLDER

The classes are split into training, validation and test classes; each needs at least shots + queries images.
"""

from __future__ import annotations

import argparse
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


def main(args: list[str] | None = None) -> dict[str, float]:
    """Train and test; return the test metrics."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--ways", type=int, default=5)
    parser.add_argument("--shots", type=int, default=1)
    parser.add_argument("--queries", type=int, default=5, help="query images a class")
    parser.add_argument("--size", type=int, default=84, help="pixels, the side of a picture")
    parser.add_argument("--meta-steps", type=int, default=100)
    parser.add_argument("--test-tasks", type=int, default=100)
    options = parser.parse_args(args)

    seed_everything(0, verbose=False)
    size = (options.size, options.size)
    transform = v2.Compose([v2.Resize(size), v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)])
    images = ImageFolder(str(options.folder), transform=transform)
    data = EpisodicDataModule(
        images,
        ways=options.ways,
        shots=options.shots,
        queries=options.queries,
        tasks_per_batch=2,
        batches_per_epoch=50,
        val_tasks=20,
        test_tasks=options.test_tasks,
    )
    # Tasks that adapt side by side must not share running statistics.
    network = use_batch_statistics(resnet18(num_classes=options.ways))
    module = IMAMLModule(
        network,
        inner_solver=GradientDescent(lr=0.05, steps=3),
        regularizer=Proximal(0.5),
        chunk_size=1,  # One task at a time: 11 million parameters each.
    )
    trainer = Trainer(max_steps=options.meta_steps, devices=1, logger=False, enable_checkpointing=False)
    trainer.fit(module, datamodule=data)
    (tested,) = trainer.test(module, datamodule=data)
    return dict(tested)


if __name__ == "__main__":
    main()
