"""Omniglot from Python: train, keep the checkpoint that is best on validation characters, test that one.

python examples/omniglot.py --root data/omniglot --download

The settings are those of ``configs/omniglot_5way_1shot_imaml_gd.yaml``, which the command line trains for half an hour;
here are fewer and smaller steps.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_imaml import IMAMLModule
from lightning_imaml.callbacks import ResultsTable
from lightning_imaml.data import OmniglotDataModule
from lightning_imaml.inner import GradientDescent
from lightning_imaml.models import Conv4
from lightning_imaml.regularizers import Proximal


def main(args: list[str] | None = None) -> dict[str, float]:
    """Train and test; return the test metrics of the best checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("data/omniglot"), help="the folder of the data")
    parser.add_argument("--download", action="store_true", help="fetch the data when it is not there")
    parser.add_argument("--ways", type=int, default=5)
    parser.add_argument("--shots", type=int, default=1)
    parser.add_argument("--filters", type=int, default=32, help="of Conv4; the papers have 64")
    parser.add_argument("--meta-steps", type=int, default=400)
    parser.add_argument("--validate-every", type=int, default=100, help="meta-steps between two validations")
    parser.add_argument("--test-tasks", type=int, default=600)
    parser.add_argument("--output", type=Path, default=Path("results/omniglot"), help="for the checkpoint")
    options = parser.parse_args(args)

    seed_everything(0)
    data = OmniglotDataModule(
        options.root,
        download=options.download,
        ways=options.ways,
        shots=options.shots,
        queries=2,
        eval_queries=5,
        tasks_per_batch=8,
        batches_per_epoch=options.validate_every,
        val_tasks=160,
        test_tasks=options.test_tasks,
    )
    module = IMAMLModule(
        Conv4(ways=options.ways, filters=options.filters),
        inner_solver=GradientDescent(lr=0.2, steps=5),
        regularizer=Proximal(0.02),
        optimizer=partial(torch.optim.Adam, lr=3e-3),
        lr_scheduler=partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=options.meta_steps),
    )
    best = ModelCheckpoint(options.output, filename="best", monitor="val/accuracy", mode="max")
    trainer = Trainer(
        max_steps=options.meta_steps, devices=1, logger=False, callbacks=[best, ResultsTable()], num_sanity_val_steps=0
    )
    trainer.fit(module, datamodule=data)
    (tested,) = trainer.test(module, datamodule=data, ckpt_path=best.best_model_path, verbose=False)
    print(f"The best checkpoint: {best.best_model_path}")
    return dict(tested)


if __name__ == "__main__":
    main()
