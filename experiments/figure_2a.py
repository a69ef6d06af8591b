"""Accuracy of the meta-gradient against computation, on tasks whose exact meta-gradient is known.

In the manner of figure 2(a) of the iMAML paper (Rajeswaran et al., 2019, https://arxiv.org/abs/1909.04630): linear
regression in float64, compared with (I + ∇²L/λ)⁻¹ ∇Q(φ*) from dense solves.

What counts, in units of one gradient (a forward and a backward pass):

- an inner step, the gradient of the query loss, and the linearisation before the linear solve: 1 each;
- a Hessian-vector product: 2, as a backward pass costs about twice the pass that it goes back through;
- going back through an inner step: 2, since it is one Hessian-vector product.

So K inner steps cost K + 2 + 2·(CG steps) with iMAML, 3K + 1 with MAML, and K + 1 + 2·min(K, k) with back-propagation
through the last k steps.

    python experiments/figure_2a.py
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from _synthetic import RegressionTasks
from _tables import Row, save
from matplotlib.figure import Figure

from lightning_imaml.functional import MetaGradient
from lightning_imaml.inner import GradientDescent, Nesterov
from lightning_imaml.linear import ConjugateGradient
from lightning_imaml.meta_gradients import Estimator, Implicit, Truncated, Unrolled

PRODUCT = 2
LEVELS = (1e-1, 1e-2, 1e-4)


def gradient_computations(inner_steps: int, estimator: Estimator, result: MetaGradient) -> int:
    """The cost for one task in gradients, see the top of this file."""
    if result.linear is not None:
        return inner_steps + 2 + PRODUCT * int(result.linear.steps.max())
    differentiated = estimator.last_steps if isinstance(estimator, Truncated) else inner_steps
    return inner_steps + 1 + PRODUCT * differentiated


def estimators(inner_steps: int, cg_steps: list[int], last_steps: int) -> list[tuple[str, int, Estimator]]:
    """Each method's name, conjugate gradient steps and estimator."""
    return [
        *((f"iMAML, {cg} CG steps", cg, Implicit(ConjugateGradient(cg))) for cg in cg_steps),
        ("MAML", 0, Unrolled()),
        (f"truncated, last {last_steps} steps", 0, Truncated(min(inner_steps, last_steps))),
    ]


def draw(rows: list[Row]) -> Figure:
    """One panel for each inner solver."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    names = list(dict.fromkeys(row["solver"] for row in rows))
    for axes, solver in zip(figure.subplots(1, len(names), sharey=True), names, strict=True):
        mine = [row for row in rows if row["solver"] == solver]
        for method in dict.fromkeys(row["method"] for row in mine):
            points = [(row["gradient_computations"], row["relative_error"]) for row in mine if row["method"] == method]
            style = "o-" if str(method).startswith("iMAML") else "s--"
            axes.loglog(*zip(*points, strict=True), style, markersize=3, label=method)
        axes.set(title=f"inner solver: {solver}", xlabel="gradient computations a task")
        axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.axes[0].set_ylabel("relative error of the meta-gradient")
    return figure


def summarise(rows: list[Row]) -> None:
    """Print the fewest gradient computations to each level of error."""
    heads = "".join(f"{f'error ≤ {level:g}':>16}" for level in LEVELS)
    print(f"{'solver':<18}{'method':<28}{heads}{'least error':>14}")
    for solver, method in dict.fromkeys((row["solver"], row["method"]) for row in rows):
        mine = [row for row in rows if (row["solver"], row["method"]) == (solver, method)]
        costs = [
            min((row["gradient_computations"] for row in mine if row["relative_error"] <= level), default=math.inf)
            for level in LEVELS
        ]
        cells = "".join(f"{'—' if cost == math.inf else cost:>16}" for cost in costs)
        print(f"{solver:<18}{method:<28}{cells}{min(row['relative_error'] for row in mine):>14.1e}")


def main(args: list[str] | None = None) -> list[Row]:
    """Run the experiment, print the summary and save the numbers with their picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=10)
    parser.add_argument("--features", type=int, default=50)
    parser.add_argument("--samples", type=int, default=100, help="of the support and of the query set of a task")
    parser.add_argument("--condition", type=float, default=50.0, help="the condition number κ of the inner problem")
    parser.add_argument("--steps", type=int, nargs="+", default=[2**k for k in range(11)], help="inner steps")
    parser.add_argument("--cg-steps", type=int, nargs="+", default=[2, 5, 10, 20])
    parser.add_argument("--last-steps", type=int, default=10, help="that truncated back-propagation goes through")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("results"))
    options = parser.parse_args(args)
    torch.manual_seed(options.seed)
    tasks = RegressionTasks.draw(options.tasks, options.samples, options.features, options.condition)
    rows: list[Row] = []
    for solver in (GradientDescent, Nesterov):
        for steps in options.steps:
            for method, cg_steps, estimator in estimators(steps, options.cg_steps, options.last_steps):
                result = tasks.estimate(solver(lr=1.0, steps=steps), estimator)  # 1/L, as G is 1-smooth.
                rows.append(
                    {
                        "method": method,
                        "solver": solver.__name__,
                        "inner_steps": steps,
                        "cg_steps": cg_steps,
                        "gradient_computations": gradient_computations(steps, estimator, result),
                        "relative_error": tasks.relative_error(result),
                    }
                )
    save(rows, options.output / "figure_2a.csv")
    draw(rows).savefig(options.output / "figure_2a.png", dpi=120)
    print(f"κ = {options.condition:g}, λ = {tasks.strength:g}; the fewest gradient computations a task for an error:")
    summarise(rows)
    return rows


if __name__ == "__main__":
    main()
