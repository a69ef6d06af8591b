"""Meta-train with a plain PyTorch loop: the core is one function, ``meta_gradient``, and needs no Trainer.

python examples/without_lightning.py
"""

from __future__ import annotations

import argparse

import torch
from torch.utils.data import DataLoader

from lightning_imaml import Episode
from lightning_imaml.curvature import GaussNewton
from lightning_imaml.data import GlyphDataModule
from lightning_imaml.functional import adapt, evaluate, meta_gradient
from lightning_imaml.inner import GradientDescent
from lightning_imaml.linear import ConjugateGradient
from lightning_imaml.meta_gradients import Implicit
from lightning_imaml.models import Conv4
from lightning_imaml.regularizers import Proximal

INNER_SOLVER = GradientDescent(lr=0.3, steps=5)
REGULARIZER = Proximal(0.02)
ESTIMATOR = Implicit(ConjugateGradient(max_iter=5), GaussNewton())


def train(model: torch.nn.Module, loader: DataLoader[Episode]) -> None:
    """One meta-step of Adam for each batch of tasks."""
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for number, episode in enumerate(loader, start=1):
        result = meta_gradient(model, episode, inner_solver=INNER_SOLVER, estimator=ESTIMATOR, regularizer=REGULARIZER)
        for name, parameter in model.named_parameters():
            parameter.grad = result.grads[name]
        optimizer.step()
        if number % 20 == 0:
            print(f"meta-step {number}: query loss {result.loss.mean():.3f}")


def test(model: torch.nn.Module, loader: DataLoader[Episode]) -> float:
    """The mean accuracy on the query sets, after adaptation to the support sets."""
    correct: list[torch.Tensor] = []
    for episode in loader:
        adapted = adapt(
            model,
            episode.support_inputs,
            episode.support_targets,
            inner_solver=INNER_SOLVER,
            regularizer=REGULARIZER,
        )
        _, logits = evaluate(model, adapted.parameters, episode.query_inputs, episode.query_targets)
        correct.append((logits.argmax(dim=-1) == episode.query_targets).float().mean(dim=1))
    return torch.cat(correct).mean().item()


def main(args: list[str] | None = None) -> tuple[torch.nn.Module, float, float]:
    """Test, train, test again; return the network and both accuracies."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--meta-steps", type=int, default=200)
    parser.add_argument("--tasks", type=int, default=8, help="tasks a meta-step")
    parser.add_argument("--test-tasks", type=int, default=200)
    options = parser.parse_args(args)

    torch.manual_seed(0)
    model = Conv4(ways=5, filters=16)
    # Any iterable of episodes will do; the loaders of the data modules need no Trainer.
    data = GlyphDataModule(
        ways=5,
        shots=1,
        queries=5,
        tasks_per_batch=options.tasks,
        batches_per_epoch=options.meta_steps,
        test_tasks=options.test_tasks,
    )
    before = test(model, data.test_dataloader())
    train(model, data.train_dataloader())
    after = test(model, data.test_dataloader())
    print(f"5-way 1-shot on unseen letters: {before:.1%} from random weights, {after:.1%} from meta-learned ones")
    return model, before, after


if __name__ == "__main__":
    main()
