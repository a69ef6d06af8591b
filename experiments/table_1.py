"""Computation, memory and error of iMAML and MAML: table 1 of the iMAML paper, measured.

Linear regression in float64 with a prescribed condition number κ of the inner objective G, step size 1/L
(Rajeswaran et al., 2019, https://arxiv.org/abs/1909.04630, table 1):

- the inner steps until ‖φ − φ*‖ ≤ δ: about κ log(1/δ) for gradient descent and √κ log(1/δ) for Nesterov's method, so
  slopes of 1 and 1/2 over κ on logarithmic axes;
- the peak bytes of live tensors in one meta-gradient: flat in the inner steps for iMAML, linear for MAML;
- what error of the meta-gradient remains after those steps. φ* and the exact meta-gradient are dense solves.

    python experiments/table_1.py
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from _synthetic import RegressionTasks
from _tables import Row, save
from matplotlib.figure import Figure
from torch.nn import functional as F

from lightning_imaml.callbacks import LiveTensorBytes
from lightning_imaml.inner import GradientDescent, Nesterov, SteppingSolver
from lightning_imaml.linear import ConjugateGradient
from lightning_imaml.meta_gradients import Estimator, Implicit, Truncated, Unrolled
from lightning_imaml.problems.network import FlatModel
from lightning_imaml.problems.supervised import SupervisedProblem, TaskLoss
from lightning_imaml.regularizers import Proximal

SOLVERS: tuple[Callable[..., SteppingSolver], ...] = (GradientDescent, Nesterov)
LR = 1.0  # 1/L, as G is 1-smooth.


def steps_until(tasks: RegressionTasks, solver: SteppingSolver, goal: float) -> float:
    """The inner steps until ‖φ − φ*‖ ≤ ``goal`` for the first time, averaged over the tasks.

    Raises:
        RuntimeError: a task is not there after ``solver.steps``.
    """
    flat = FlatModel(tasks.model)
    support = TaskLoss(flat, F.mse_loss, tasks.episode.support_inputs, tasks.episode.support_targets)
    problem = SupervisedProblem(support, Proximal(tasks.strength), flat.initial(), {})
    solution = tasks.solution()
    state = solver.init(problem, problem.start())
    first = torch.full((problem.tasks,), torch.inf, dtype=torch.float64)
    with torch.no_grad():
        for step in range(solver.steps + 1):
            near = (state[0] - solution).norm(dim=1) <= goal
            first = torch.where(near, first.clamp(max=step), first)
            if first.isfinite().all():
                return float(first.mean())
            state, _ = solver.step(problem, state)
    raise RuntimeError(f"{solver} did not come within {goal:g} of the solution; use a larger δ or smaller κ.")


def slope(x: list[float], y: list[float]) -> float:
    """The slope of the least-squares line."""
    return float(np.polyfit(x, y, 1)[0])


def measure_steps(options: argparse.Namespace) -> list[Row]:
    """Inner steps by solver and condition number."""
    rows: list[Row] = []
    for condition in options.conditions:
        torch.manual_seed(options.seed)
        tasks = RegressionTasks.draw(options.tasks, options.samples, options.features, condition)
        for kind in SOLVERS:
            solver = kind(lr=LR, steps=int(100 * condition))
            steps = steps_until(tasks, solver, options.goal)
            rows.append({"solver": type(solver).__name__, "condition": condition, "steps": steps})
    return rows


def measure_memory(options: argparse.Namespace) -> list[Row]:
    """Peak bytes and remaining error by method, solver and inner steps."""
    torch.manual_seed(options.seed)
    tasks = RegressionTasks.draw(options.tasks, options.samples, options.features, options.condition)
    rows: list[Row] = []
    for steps in options.steps:
        last = min(steps, options.last_steps)
        methods: dict[str, Estimator] = {
            "iMAML": Implicit(ConjugateGradient(options.cg_steps)),
            "MAML": Unrolled(),
            f"truncated, last {options.last_steps} steps": Truncated(last),
        }
        for method, estimator in methods.items():
            for kind in SOLVERS:
                solver = kind(lr=LR, steps=steps)
                with LiveTensorBytes() as live:
                    result = tasks.estimate(solver, estimator)
                rows.append(
                    {
                        "method": method,
                        "solver": type(solver).__name__,
                        "inner_steps": steps,
                        "peak_bytes": live.peak,
                        "relative_error": tasks.relative_error(result),
                    }
                )
    return rows


def curves(rows: list[Row], keys: tuple[str, ...], x: str, y: str) -> dict[tuple[str, ...], list[list[float]]]:
    """The columns ``x`` and ``y`` for each combination of ``keys``."""
    found: dict[tuple[str, ...], list[list[float]]] = {}
    for row in rows:
        columns = found.setdefault(tuple(str(row[key]) for key in keys), [[], []])
        columns[0].append(float(row[x]))
        columns[1].append(float(row[y]))
    return found


def draw(compute: list[Row], memory: list[Row], slopes: dict[str, float], goal: float) -> Figure:
    """Three panels: computation, memory, error."""
    figure = Figure(figsize=(15, 4.2), layout="constrained")
    steps, peaks, errors = figure.subplots(1, 3)
    for (solver,), (x, y) in curves(compute, ("solver",), "condition", "steps").items():
        steps.loglog(x, y, "o-", label=f"{solver}, slope {slopes[solver]:.2f}")
    steps.set(title=f"Computation: inner steps to ‖φ − φ*‖ ≤ {goal:g}", xlabel="condition number κ of G")
    keys = ("method", "solver")
    colours = {method: f"C{index}" for index, method in enumerate(dict.fromkeys(row["method"] for row in memory))}
    for axes, column in ((peaks, "peak_bytes"), (errors, "relative_error")):
        for (method, solver), (x, y) in curves(memory, keys, "inner_steps", column).items():
            style = "o-" if solver == GradientDescent.__name__ else "s--"
            axes.loglog(x, y, style, color=colours[method], markersize=3, label=f"{method}, {solver}")
        axes.set(xlabel="inner steps")
    peaks.set(title="Memory: peak bytes of live tensors")
    errors.set(title="Relative error of the meta-gradient")
    for axes in (steps, peaks, errors):
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    return figure


def main(args: list[str] | None = None) -> tuple[dict[str, float], list[Row], list[Row]]:
    """Run the measurements, print the summary and save the numbers with their picture.

    Returns:
        The log-log slope by solver, the rows on computation, and those on memory and error.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--features", type=int, default=20)
    parser.add_argument("--samples", type=int, default=40, help="of the support and of the query set of a task")
    parser.add_argument("--conditions", type=float, nargs="+", default=[10, 30, 100, 300, 1000], help="κ, computation")
    parser.add_argument("--goal", type=float, default=1e-6, help="δ")
    parser.add_argument("--condition", type=float, default=30.0, help="κ, memory and error")
    parser.add_argument("--steps", type=int, nargs="+", default=[2**k for k in range(9)], help="inner steps, memory")
    parser.add_argument("--cg-steps", type=int, default=20, help="of iMAML; the number of features makes them exact")
    parser.add_argument("--last-steps", type=int, default=10, help="that truncated back-propagation goes through")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("results"))
    options = parser.parse_args(args)
    compute, memory = measure_steps(options), measure_memory(options)
    by_solver = curves(compute, ("solver",), "condition", "steps")
    slopes = {solver: slope(list(np.log(x)), list(np.log(y))) for (solver,), (x, y) in by_solver.items()}
    save(compute, options.output / "table_1_steps.csv")
    save(memory, options.output / "table_1_memory.csv")
    draw(compute, memory, slopes, options.goal).savefig(options.output / "table_1.png", dpi=120)

    print(f"Inner steps to ‖φ − φ*‖ ≤ {options.goal:g}, and the slope over κ on logarithmic axes")
    print(f"{'solver':<18}" + "".join(f"{f'κ = {condition:g}':>10}" for condition in options.conditions) + "     slope")
    for (solver,), (_, steps) in by_solver.items():
        print(f"{solver:<18}" + "".join(f"{count:>10.1f}" for count in steps) + f"{slopes[solver]:>10.3f}")
    print(f"\nPeak bytes of live tensors, and the remaining error after {options.steps[-1]} steps")
    print(f"{'method':<28}{'solver':<18}{'first':>10}{'last':>10}{'bytes a step':>14}{'error':>12}")
    errors = curves(memory, ("method", "solver"), "inner_steps", "relative_error")
    for names, (x, y) in curves(memory, ("method", "solver"), "inner_steps", "peak_bytes").items():
        numbers = f"{y[0]:>10.0f}{y[-1]:>10.0f}{slope(x, y):>14.1f}{errors[names][1][-1]:>12.1e}"
        print(f"{names[0]:<28}{names[1]:<18}{numbers}")
    return slopes, compute, memory


if __name__ == "__main__":
    main()
