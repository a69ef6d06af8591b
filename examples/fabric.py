"""Meta-train with Fabric: a loop of one's own on one device or several; see the page on Fabric for what it must do.

python examples/fabric.py --accelerator cpu --devices 2
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable

import torch
from lightning.fabric import Fabric
from torch import nn

from lightning_imaml import Episode
from lightning_imaml.curvature import GaussNewton
from lightning_imaml.data import GlyphDataModule
from lightning_imaml.functional import adapt, evaluate, meta_gradient
from lightning_imaml.inner import GradientDescent
from lightning_imaml.linear import ConjugateGradient
from lightning_imaml.meta_gradients import Implicit
from lightning_imaml.metrics import EpisodicAccuracy
from lightning_imaml.models import Conv4
from lightning_imaml.regularizers import Proximal

INNER_SOLVER = GradientDescent(lr=0.3, steps=5)
REGULARIZER = Proximal(0.02)
ESTIMATOR = Implicit(ConjugateGradient(max_iter=5), GaussNewton())


def train(fabric: Fabric, network: nn.Module, optimizer: torch.optim.Optimizer, loader: Iterable[Episode]) -> None:
    """One step of the optimizer for each batch of tasks on every process."""
    for number, batch in enumerate(loader, start=1):
        episode = Episode(*fabric.to_device(tuple(batch)))
        result = meta_gradient(
            network, episode, inner_solver=INNER_SOLVER, estimator=ESTIMATOR, regularizer=REGULARIZER
        )
        # What is written to .grad passes DistributedDataParallel by: the mean over processes is the loop's own task.
        gradients = fabric.all_reduce(result.grads, reduce_op="mean")
        for name, parameter in network.named_parameters():
            if parameter.requires_grad:
                parameter.grad = gradients[name]
        optimizer.step()
        if number % 20 == 0:
            fabric.print(f"meta-step {number}: query loss {result.loss.mean():.3f}")


def test(fabric: Fabric, network: nn.Module, loader: Iterable[Episode]) -> float:
    """The mean accuracy over the tasks of all processes, after adaptation."""
    accuracy = EpisodicAccuracy().to(fabric.device)  # It knows of other processes by itself.
    for batch in loader:
        episode = Episode(*fabric.to_device(tuple(batch)))
        adapted = adapt(
            network,
            episode.support_inputs,
            episode.support_targets,
            inner_solver=INNER_SOLVER,
            regularizer=REGULARIZER,
        )
        _, logits = evaluate(network, adapted.parameters, episode.query_inputs, episode.query_targets)
        accuracy.update(logits, episode.query_targets)
    return float(accuracy.compute())


def main(args: list[str] | None = None) -> float:
    """Train and test; return the accuracy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--meta-steps", type=int, default=200)
    parser.add_argument("--tasks", type=int, default=8, help="tasks a meta-step, over all processes")
    parser.add_argument("--test-tasks", type=int, default=200)
    options = parser.parse_args(args)

    strategy = "ddp" if options.devices > 1 else "auto"
    fabric = Fabric(accelerator=options.accelerator, devices=options.devices, strategy=strategy)
    fabric.launch()
    fabric.seed_everything(0, verbose=False)  # The same first weights on every process.
    network = Conv4(ways=5, filters=16).to(fabric.device)
    optimizer = fabric.setup_optimizers(torch.optim.Adam(network.parameters(), lr=3e-3))
    # Its loaders share the tasks out to the processes.
    data = GlyphDataModule(
        ways=5,
        shots=1,
        queries=5,
        tasks_per_batch=options.tasks // fabric.world_size,
        batches_per_epoch=options.meta_steps,
        test_tasks=options.test_tasks,
    )
    train(fabric, network, optimizer, data.train_dataloader())
    accuracy = test(fabric, network, data.test_dataloader())
    fabric.print(f"5-way 1-shot on unseen letters: {accuracy:.1%}")
    return accuracy


if __name__ == "__main__":
    main()
