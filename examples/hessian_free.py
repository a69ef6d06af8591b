"""Hessian-free against gradient descent: evaluations until the inner problem is as stationary.

Gradient descent takes the paper's 16 steps on 5-way 1-shot tasks. The Hessian-free solver then runs until each task's
‖∇G‖ is as small, and all that both evaluated is counted: gradients, products with the curvature, and values of G in the
line search.

    python examples/hessian_free.py --root PATH   # Omniglot; without --root: the embedded letters
"""

from __future__ import annotations

import argparse
import csv
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_imaml import Episode
from lightning_imaml.curvature import Curvature, GaussNewton, Hessian, Linearization
from lightning_imaml.data import GlyphDataModule, OmniglotDataModule
from lightning_imaml.inner import GradientDescent, HessianFree
from lightning_imaml.models import Conv4
from lightning_imaml.regularizers import Proximal
from lightning_imaml.tasks import FlatModel, InnerProblem, TaskLoss

COUNTS: Counter[str] = Counter()


class CountingProblem(InnerProblem):
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

    def expand(self, problem: InnerProblem, parameters: Tensor) -> Linearization:
        """Linearise, counted."""
        COUNTS["gradients"] += 1
        gradient, product = self.curvature.expand(problem, parameters)

        def counted(vector: Tensor) -> Tensor:
            COUNTS["products"] += 1
            return product(vector)

        return Linearization(gradient, counted)


def problem_of(episode: Episode, strength: float, seed: int) -> CountingProblem:
    """The inner problem of a fresh Conv4."""
    torch.manual_seed(seed)
    model = FlatModel(Conv4(5))
    support = TaskLoss(model, F.cross_entropy, episode.support_inputs, episode.support_targets)
    return CountingProblem(support, Proximal(strength), model.initial(), {})


def until(problem: CountingProblem, curvature: Curvature, goal: Tensor, most: int) -> tuple[Tensor, Counter[str]]:
    """Take Hessian-free steps, one at a time, until every task's ‖∇G‖ is at most ``goal``."""
    COUNTS.clear()
    solver = HessianFree(1, curvature=CountingCurvature(curvature))
    parameters = problem.start()
    for _ in range(most):
        parameters = solver.solve(problem, parameters).parameters
        counted = COUNTS.copy()  # Checking the goal is not part of the solver.
        residual = problem.residual(parameters)
        COUNTS.clear()
        COUNTS.update(counted)
        if (residual <= goal).all():
            break
    return residual, COUNTS.copy()


def main(args: list[str] | None = None) -> list[dict[str, str | float]]:
    """Run the comparison, print it and save it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, help="the folder of the Omniglot archives")
    parser.add_argument("--tasks", type=int, default=16)
    parser.add_argument("--strengths", type=float, nargs="+", default=[2.0, 0.5, 0.1], help="λ")
    parser.add_argument("--lr", type=float, default=0.1, help="of gradient descent")
    parser.add_argument("--steps", type=int, default=16, help="of gradient descent")
    parser.add_argument("--most", type=int, default=20, help="Hessian-free steps before giving up")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("results"))
    options = parser.parse_args(args)
    sizes = {"ways": 5, "shots": 1, "tasks_per_batch": options.tasks, "seed": options.seed}
    data = OmniglotDataModule(options.root, **sizes) if options.root else GlyphDataModule(**sizes)
    data.setup("fit")
    episode = next(iter(data.train_dataloader()))
    rows: list[dict[str, str | float]] = []
    for strength in options.strengths:
        problem = problem_of(episode, strength, options.seed)
        COUNTS.clear()
        found = GradientDescent(options.lr, options.steps).solve(problem, problem.start())
        counted = COUNTS.copy()
        goal = problem.residual(found.parameters)
        outcomes = {"gradient descent": (goal, counted)}
        for name, curvature in (("Hessian", Hessian()), ("Gauss-Newton", GaussNewton())):
            outcomes[f"Hessian-free, {name}"] = until(problem, curvature, goal, options.most)
        for solver, (residual, counts) in outcomes.items():
            rows.append(
                {
                    "strength": strength,
                    "solver": solver,
                    "gradients": counts["gradients"],
                    "products": counts["products"],
                    "values": counts["values"],
                    "largest_gradient_norm": residual.max().item(),
                    "reached": float((residual <= goal).float().mean()),
                }
            )
    options.output.mkdir(parents=True, exist_ok=True)
    with (options.output / "hessian_free.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    print(f"{'λ':>5}  {'solver':<26}{'gradients':>10}{'products':>10}{'values':>8}{'max ‖∇G‖':>12}{'reached':>9}")
    for row in rows:
        print(
            f"{row['strength']:>5}  {row['solver']:<26}{row['gradients']:>10}{row['products']:>10}{row['values']:>8}"
            f"{row['largest_gradient_norm']:>12.2e}{row['reached']:>9.0%}"
        )
    return rows


if __name__ == "__main__":
    main()
