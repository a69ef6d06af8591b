"""What the benchmarks measure: the papers' networks on tasks of the papers' sizes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_imaml import Episode
from lightning_imaml.data import EpisodicDataModule, MiniImageNetDataModule, OmniglotDataModule
from lightning_imaml.models import Conv4


@dataclass(frozen=True)
class Settings:
    """The inner loop and the linear solve, the same for all sides.

    Attributes:
        lr: of the inner gradient steps.
        steps: their number.
        cg_steps: conjugate gradient steps.
        strength: λ.
    """

    lr: float = 0.005
    steps: int = 16
    cg_steps: int = 5
    strength: float = 100.0


@dataclass(frozen=True)
class Workload:
    """A network and a batch of tasks.

    Attributes:
        data: "omniglot" or "mini-imagenet".
        ways: N.
        shots: K.
        queries: query images a class.
        tasks: tasks a batch.
        filters: the network's width.
        settings: steps as in the paper: 16 for 5 ways, 25 for 20 ways, 10 for mini-ImageNet.
    """

    data: str
    ways: int
    shots: int
    queries: int
    tasks: int
    settings: Settings
    filters: int = 64

    def network(self) -> nn.Module:
        """The paper's network with the same weights each time."""
        torch.manual_seed(0)
        if self.data == "omniglot":
            return Conv4(self.ways, filters=self.filters)
        return Conv4(self.ways, channels=3, filters=self.filters, image_size=84, downsampling="max-pool")

    def episode(self, root: Path | None) -> Episode:
        """Real training tasks, or random images where there is no data."""
        if root is None:
            shape = (1, 28, 28) if self.data == "omniglot" else (3, 84, 84)
            labels = torch.arange(self.ways)
            support, query = labels.repeat_interleave(self.shots), labels.repeat_interleave(self.queries)
            return Episode(
                torch.rand(self.tasks, len(support), *shape),
                support.repeat(self.tasks, 1),
                torch.rand(self.tasks, len(query), *shape),
                query.repeat(self.tasks, 1),
            )
        episode: Episode = next(iter(self.loader(root)))
        return episode

    def loader(self, root: Path, batches: int = 1) -> DataLoader[Any]:
        """Batches of real training tasks."""
        sizes = {"ways": self.ways, "shots": self.shots, "queries": self.queries, "tasks_per_batch": self.tasks}
        kind = OmniglotDataModule if self.data == "omniglot" else MiniImageNetDataModule
        data: EpisodicDataModule = kind(root, **sizes, batches_per_epoch=batches)
        data.setup("fit")
        return data.train_dataloader()


WORKLOADS = {
    "omniglot-5-1": Workload("omniglot", 5, 1, 1, 16, Settings()),
    "omniglot-5-5": Workload("omniglot", 5, 5, 1, 8, Settings()),
    "omniglot-20-1": Workload("omniglot", 20, 1, 1, 8, Settings(steps=25)),
    "omniglot-20-5": Workload("omniglot", 20, 5, 1, 2, Settings(steps=25)),
    "mini-imagenet-5-1": Workload("mini-imagenet", 5, 1, 1, 4, Settings(steps=10), filters=32),
}
