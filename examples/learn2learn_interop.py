"""A taskset and a network of learn2learn, trained by iMAML: nothing of either has to be rewritten.

python examples/learn2learn_interop.py

The taskset here is of the embedded letters, so that nothing is downloaded; those of
``learn2learn.vision.benchmarks.get_tasksets`` go into ``TasksetDataModule`` just so.
"""

from __future__ import annotations

import argparse
from typing import Any

from lightning.pytorch import Trainer, seed_everything
from torch.utils.data import Subset

from lightning_imaml import IMAMLModule
from lightning_imaml.data import GlyphDataModule, TasksetDataModule
from lightning_imaml.inner import GradientDescent
from lightning_imaml.models import use_batch_statistics
from lightning_imaml.regularizers import Proximal

MISSING = "This example needs learn2learn: pip install --use-pep517 -r requirements/learn2learn.txt"


def taskset(letters: GlyphDataModule, split: str, ways: int, samples: int) -> Any:
    """What there was: the tasks of a split, by learn2learn's own means, with ``samples`` images of each class."""
    from learn2learn.data import MetaDataset, Taskset, transforms

    pool = letters.tasks(split).pool
    images = MetaDataset(Subset(pool.source, [item for items in pool.members.values() for item in items.tolist()]))
    steps = [
        transforms.NWays(images, ways),
        transforms.KShots(images, samples),
        transforms.LoadData(images),
        transforms.RemapLabels(images),
        transforms.ConsecutiveLabels(images),
    ]
    return Taskset(images, task_transforms=steps)


def main(args: list[str] | None = None) -> dict[str, float]:
    """Train and test; return the test metrics."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", type=int, default=5)
    parser.add_argument("--shots", type=int, default=1)
    parser.add_argument("--queries", type=int, default=5)
    parser.add_argument("--meta-steps", type=int, default=200)
    parser.add_argument("--test-tasks", type=int, default=200)
    options = parser.parse_args(args)
    try:
        from learn2learn.vision.models import OmniglotCNN
    except ImportError:
        raise SystemExit(MISSING) from None

    seed_everything(0)
    letters = GlyphDataModule(ways=options.ways)
    samples = options.shots + options.queries
    train, val, test = (taskset(letters, split, options.ways, samples) for split in ("train", "val", "test"))
    data = TasksetDataModule(
        train, val, test, shots=options.shots, tasks_per_batch=8, val_tasks=80, test_tasks=options.test_tasks
    )
    # Its BatchNorm keeps running statistics, which tasks side by side would overwrite.
    network = use_batch_statistics(OmniglotCNN(output_size=options.ways, hidden_size=16))
    module = IMAMLModule(network, inner_solver=GradientDescent(lr=0.1, steps=5), regularizer=Proximal(0.1))
    trainer = Trainer(max_steps=options.meta_steps, accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.fit(module, datamodule=data)
    (tested,) = trainer.test(module, datamodule=data)
    return dict(tested)


if __name__ == "__main__":
    main()
