"""From adapted to deployed: a network adapts to one task, is exported, and answers one image at a time.

python examples/deploy.py --meta-steps 100

The exported program runs with PyTorch alone: neither Lightning nor this package is needed to serve it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor

from lightning_imaml import IMAMLModule
from lightning_imaml.data import GlyphDataModule
from lightning_imaml.inner import GradientDescent
from lightning_imaml.models import Conv4
from lightning_imaml.regularizers import Proximal


def serve(program: Path, image: Tensor) -> int:
    """The class of one image ``[1, 28, 28]``: all that a server has to do."""
    network = torch.export.load(program).module()
    return int(network(image.unsqueeze(0)).argmax(dim=-1))


def main(args: list[str] | None = None) -> dict[str, float]:
    """Train, adapt, export, serve; return the share of right answers and the largest difference from ``predict``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--meta-steps", type=int, default=100)
    parser.add_argument("--output", type=Path, default=Path("letters.pt2"), help="the exported program")
    options = parser.parse_args(args)

    seed_everything(0, verbose=False)
    data = GlyphDataModule(ways=5, shots=5, queries=5, tasks_per_batch=4, val_tasks=8, test_tasks=8)
    # Statistics of the support set: the deployed network treats each image by itself.
    network = Conv4(ways=5, filters=16, norm="support")
    module = IMAMLModule(network, inner_solver=GradientDescent(lr=0.2, steps=8), regularizer=Proximal(0.1))
    trainer = Trainer(
        max_steps=options.meta_steps, limit_val_batches=0, devices=1, logger=False, enable_checkpointing=False
    )
    trainer.fit(module, datamodule=data)

    data.setup("test")
    episode = next(iter(data.test_dataloader()))
    support, targets = episode.support_inputs[0], episode.support_targets[0]
    deployed = module.eval().adapted_network(support, targets)
    torch.export.save(torch.export.export(deployed, (support[:1],)), options.output)

    queries, classes = episode.query_inputs[0], episode.query_targets[0]
    answers = torch.tensor([serve(options.output, image) for image in queries])
    one_by_one = torch.cat([deployed(image.unsqueeze(0)) for image in queries])
    found = {
        "accuracy": float((answers == classes).float().mean()),
        "difference": float((one_by_one - module.predict_step(episode, 0)[0]).abs().max()),
    }
    print(f"{options.output}: {found['accuracy']:.0%} of {len(queries)} single images right")
    return found


if __name__ == "__main__":
    main()
