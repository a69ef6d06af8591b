"""What test_fabric.py runs on one process and on two; each process leaves its weights in ``<folder>/of<W>-<r>.pt``.

python fabric_processes.py FOLDER PROCESSES
"""

from __future__ import annotations

import sys
from pathlib import Path

import fabric as example
import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import DDPStrategy
from torch import nn
from torch.utils.data import TensorDataset

from lightning_imaml.data import EpisodicDataModule


def main(folder: Path, processes: int) -> None:
    torch.set_num_threads(1)
    strategy = DDPStrategy(process_group_backend="gloo") if processes > 1 else "auto"
    fabric = Fabric(accelerator="cpu", devices=processes, strategy=strategy)
    fabric.launch()
    fabric.seed_everything(0, verbose=False)
    network = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    labels = torch.arange(400) % 40
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(40, 4, generator=generator, dtype=torch.float64)[labels]
    inputs += 0.5 * torch.randn(400, 4, generator=generator, dtype=torch.float64)
    data = EpisodicDataModule(
        TensorDataset(inputs, labels), ways=3, shots=2, queries=3, batches_per_epoch=10, test_tasks=7,
        tasks_per_batch=4 // processes,
    )  # fmt: skip
    optimizer = fabric.setup_optimizers(torch.optim.Adam(network.parameters(), lr=0.05))
    example.train(fabric, network, optimizer, data.train_dataloader())
    accuracy = example.test(fabric, network, data.test_dataloader())
    found = {"weights": nn.utils.parameters_to_vector(network.parameters()).detach(), "accuracy": accuracy}
    torch.save(found, folder / f"of{processes}-{fabric.global_rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
