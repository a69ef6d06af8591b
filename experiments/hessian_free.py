"""Hessian-free against gradient descent: evaluations until the inner problem is as stationary.

Gradient descent takes the paper's 16 steps on 5-way 1-shot tasks. The Hessian-free solver then runs until each task's
‖∇G‖ is as small. All that both evaluated is counted: gradients, products with the curvature, and the values of G that
the line search tries; and, for the mean task, the gradients and products until it was there. The network is fresh, or
one that was meta-trained, whose tasks are of classes that it has not seen.

    python experiments/hessian_free.py --root PATH   # Omniglot; without --root: the embedded letters
    python experiments/hessian_free.py --root PATH --ckpt_path best.ckpt --cg-steps 5 2 --lrs 0.1 0.03
"""

from __future__ import annotations

import argparse
import itertools
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from _tables import Row, save
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_imaml import Episode
from lightning_imaml.curvature import Curvature, GaussNewton, Hessian, Linearization
from lightning_imaml.data import GlyphDataModule, OmniglotDataModule
from lightning_imaml.inner import GradientDescent, HessianFree
from lightning_imaml.models import Conv4
from lightning_imaml.problems.network import FlatModel
from lightning_imaml.problems.supervised import SupervisedProblem, TaskLoss
from lightning_imaml.regularizers import Proximal

COUNTS: Counter[str] = Counter()


class CountingProblem(SupervisedProblem):
    """An inner problem that counts its gradients and values."""

    def gradient(self, parameters: Tensor) -> Tensor:
        """∇G, counted."""
        COUNTS["gradients"] += 1
        return super().gradient(parameters)

    def value(self, parameters: Tensor) -> Tensor:
        """G, counted."""
        COUNTS["values"] += 1
        return super().value(parameters)


@dataclass(frozen=True)
class CountingCurvature(Curvature):
    """A curvature that counts its products, and the gradient that comes with its linearisation."""

    curvature: Curvature

    def expand(self, problem: SupervisedProblem, parameters: Tensor) -> Linearization:
        """Linearise, counted."""
        COUNTS["gradients"] += 1
        value, gradient, product = self.curvature.expand(problem, parameters)

        def counted(vector: Tensor) -> Tensor:
            COUNTS["products"] += 1
            return product(vector)

        return Linearization(value, gradient, counted)


def network(ckpt_path: Path | None, seed: int) -> nn.Module:
    """A fresh Conv4, or one with the weights of a checkpoint."""
    torch.manual_seed(seed)
    backbone = Conv4(5)
    if ckpt_path is not None:
        weights = torch.load(ckpt_path, map_location="cpu", weights_only=True)["state_dict"]
        prefix = "backbone."
        backbone.load_state_dict({n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)})
    return backbone


def problem_of(episode: Episode, strength: float, backbone: nn.Module) -> CountingProblem:
    """The inner problem of a network."""
    model = FlatModel(backbone)
    support = TaskLoss(model, F.cross_entropy, episode.support_inputs, episode.support_targets)
    return CountingProblem(support, Proximal(strength), model.initial(), {})


def until(
    problem: CountingProblem, curvature: Curvature, goal: Tensor, most: int, cg_steps: int = 5
) -> tuple[Tensor, Tensor, Counter[str]]:
    """Take Hessian-free steps, each task until its ‖∇G‖ is at most ``goal``.

    Returns:
        ‖∇G‖, how many steps each task took, and what all of them together evaluated.
    """
    COUNTS.clear()
    solver = HessianFree(1, cg_steps, curvature=CountingCurvature(curvature))
    parameters = problem.start()
    taken = torch.zeros(problem.tasks)
    going = torch.ones(problem.tasks, dtype=torch.bool)
    for _ in range(most):
        following = solver.solve(problem, parameters).parameters
        parameters = torch.where(going.unsqueeze(1), following, parameters)
        taken += going
        counted = COUNTS.copy()  # Checking the goal is not part of the solver.
        residual = problem.residual_norm(parameters)
        COUNTS.clear()
        COUNTS.update(counted)
        going = residual > goal
        if not going.any():
            break
    return residual, taken, COUNTS.copy()


def main(args: list[str] | None = None) -> list[Row]:
    """Run the comparison, print it and save it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, help="the folder of the Omniglot archives")
    parser.add_argument("--tasks", type=int, default=16)
    parser.add_argument("--strengths", type=float, nargs="+", default=[2.0, 0.5, 0.1], help="λ")
    parser.add_argument("--lrs", type=float, nargs="+", default=[0.1], help="step sizes of gradient descent")
    parser.add_argument("--steps", type=int, default=16, help="of gradient descent")
    parser.add_argument("--cg-steps", type=int, nargs="+", default=[5], help="conjugate gradient iterations a step")
    parser.add_argument("--most", type=int, default=20, help="Hessian-free steps before giving up")
    parser.add_argument("--ckpt_path", type=Path, help="a meta-trained Conv4 instead of a fresh one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("results/hessian_free.csv"))
    options = parser.parse_args(args)
    sizes = {"ways": 5, "shots": 1, "tasks_per_batch": options.tasks, "seed": options.seed}
    data = OmniglotDataModule(options.root, **sizes) if options.root else GlyphDataModule(**sizes)
    data.setup("fit")
    loader = data.val_dataloader() if options.ckpt_path else data.train_dataloader()
    episode, backbone = next(iter(loader)), network(options.ckpt_path, options.seed)
    solvers = [
        (f"{name}, {cg_steps} CG", curvature, cg_steps)
        for name, curvature in (("Hessian", Hessian()), ("Gauss-Newton", GaussNewton()))
        for cg_steps in options.cg_steps
    ]
    rows: list[Row] = []
    for strength, lr in itertools.product(options.strengths, options.lrs):
        problem = problem_of(episode, strength, backbone)
        COUNTS.clear()
        found = GradientDescent(lr, options.steps).solve(problem, problem.start())
        counted = COUNTS.copy()
        goal = problem.residual_norm(found.parameters)
        outcomes = {"gradient descent": (goal, float(options.steps), counted)}
        for name, curvature, cg_steps in solvers:
            residual, taken, counted = until(problem, curvature, goal, options.most, cg_steps)
            outcomes[name] = (residual, (1 + cg_steps) * taken.mean().item(), counted)
        for solver, (residual, evaluations, counts) in outcomes.items():
            rows.append(
                {
                    "strength": strength,
                    "lr": lr,
                    "solver": solver,
                    "mean_evaluations": evaluations,
                    "gradients": counts["gradients"],
                    "products": counts["products"],
                    "values": counts["values"],
                    "largest_gradient_norm": residual.max().item(),
                    "reached": float((residual <= goal).float().mean()),
                }
            )
    save(rows, options.output)
    print(
        f"{'λ':>5}{'lr':>6}  {'solver':<20}{'gradients':>10}{'products':>10}{'values':>8}{'max ‖∇G‖':>12}{'reached':>9}"
    )
    for row in rows:
        print(
            f"{row['strength']:>5}{row['lr']:>6}  {row['solver']:<20}{row['mean_evaluations']:>7.1f}"
            f"{row['gradients']:>10}{row['products']:>10}{row['values']:>8}{row['largest_gradient_norm']:>12.2e}{row['reached']:>9.0%}"
        )
    return rows


if __name__ == "__main__":
    main()
