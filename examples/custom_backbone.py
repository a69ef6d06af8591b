"""A backbone of one's own: subclass ``IMAMLModule`` and build the network in ``configure_backbone``.

python examples/custom_backbone.py

Here the network attends over the patches of a picture. What it must do is map inputs ``[n, ...]`` to outputs
``[n, ways]``; how tasks and their parameters are batched is no concern of its own. A network that exists already can
also be passed, ``IMAMLModule(network)``: see ``own_network.py``.
"""

from __future__ import annotations

import argparse

import torch
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_imaml import IMAMLModule
from lightning_imaml.data import GlyphDataModule
from lightning_imaml.inner import GradientDescent
from lightning_imaml.regularizers import Proximal


class PatchAttention(nn.Module):
    """One layer of attention over the 16 patches, 7×7 pixels each, of pictures ``[n, 1, 28, 28]``."""

    def __init__(self, ways: int, width: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Linear(49, width)
        self.position = nn.Parameter(0.1 * torch.randn(16, width))
        self.attention = nn.MultiheadAttention(width, num_heads=4, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(16 * width, ways)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[n, ways]``."""
        patches = F.unfold(images, kernel_size=7, stride=7).mT  # [n, 16, 49]
        tokens = self.embedding(patches) + self.position
        tokens = self.norm(tokens + self.attention(tokens, tokens, tokens)[0])
        logits: Tensor = self.classifier(F.gelu(tokens).flatten(1))
        return logits


class PatchIMAML(IMAMLModule):
    """The package's module with the network above."""

    def configure_backbone(self) -> nn.Module:
        """Runs when the Trainer sets the module up: ``self.hparams`` has the ``ways`` of the data by then."""
        return PatchAttention(self.hparams["ways"])


def main(args: list[str] | None = None) -> dict[str, float]:
    """Train and test; return the test metrics."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", type=int, default=5)
    parser.add_argument("--meta-steps", type=int, default=400)
    parser.add_argument("--test-tasks", type=int, default=200)
    options = parser.parse_args(args)

    seed_everything(0)
    data = GlyphDataModule(
        ways=options.ways, shots=1, queries=5, tasks_per_batch=8, val_tasks=80, test_tasks=options.test_tasks
    )
    module = PatchIMAML(inner_solver=GradientDescent(lr=0.1, steps=5), regularizer=Proximal(0.1))
    trainer = Trainer(max_steps=options.meta_steps, accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.fit(module, datamodule=data)
    (tested,) = trainer.test(module, datamodule=data)
    return dict(tested)


if __name__ == "__main__":
    main()
