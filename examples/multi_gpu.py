"""Meta-train on several devices, of one node or of many; two processes of a CPU will do to try it.

python examples/multi_gpu.py --accelerator cpu --devices 2 --max_steps 20
python examples/multi_gpu.py --devices 4 --precision bf16-mixed
torchrun --nnodes 2 --nproc_per_node 4 --rdzv_backend c10d --rdzv_endpoint HOST:29500 \
    examples/multi_gpu.py --devices 4 --num_nodes 2

Every process adapts its own tasks, and the meta-gradient is the mean over all of them: any number of processes takes
the same steps, up to rounding.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_only

from lightning_imaml import IMAMLModule
from lightning_imaml.data import GlyphDataModule
from lightning_imaml.inner import GradientDescent
from lightning_imaml.models import Conv4
from lightning_imaml.regularizers import Proximal


def main(args: list[str] | None = None) -> Trainer:
    """Train, test and return the Trainer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--devices", default="auto", help="processes of each node")
    parser.add_argument("--num_nodes", type=int, default=1)
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--tasks", type=int, default=16, help="tasks of a meta-step, over all processes")
    parser.add_argument("--max_steps", type=int, default=200)
    parser.add_argument("--folder", type=Path, default=Path("multi_gpu"), help="for checkpoints, of all nodes")
    options = parser.parse_args(args)

    seed_everything(0)  # The same initialisation on every process.
    trainer = Trainer(
        accelerator=options.accelerator,
        devices=options.devices,
        num_nodes=options.num_nodes,
        strategy="ddp",
        precision=options.precision,
        max_steps=options.max_steps,
        default_root_dir=options.folder,
        logger=False,
        callbacks=ModelCheckpoint(options.folder, save_last=True),
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    tasks, rest = divmod(options.tasks, trainer.world_size)
    if rest or not tasks:
        raise SystemExit(f"--tasks must be a multiple of the {trainer.world_size} processes; found {options.tasks}.")
    data = GlyphDataModule(ways=5, shots=1, queries=5, tasks_per_batch=tasks, val_tasks=64, test_tasks=200)
    module = IMAMLModule(Conv4(ways=5, filters=8), inner_solver=GradientDescent(0.3, 4), regularizer=Proximal(0.5))
    trainer.fit(module, datamodule=data)
    (tested,) = trainer.test(module, datamodule=data, verbose=False)
    report(f"{trainer.world_size} processes, {options.tasks} tasks a meta-step, {trainer.global_step} meta-steps")
    for name, value in tested.items():
        report(f"{name}: {value:.4f}")
    return trainer


report = rank_zero_only(print)

if __name__ == "__main__":
    main()
