r"""The error of the meta-gradient against the bound of the iMAML paper.

For G = L + λ/2 ‖φ − θ‖² (Rajeswaran et al., 2019, https://arxiv.org/abs/1909.04630, section 3 and its appendix):

    ‖g − d‖ ≤ (2λρB/μ² + λL/μ) δ + δ′

With A(φ) = I + ∇²L(φ)/λ, the exact meta-gradient is d = A(φ*)⁻¹ ∇Q(φ*) and g is the estimate at φ. The quantities:

- δ = ‖φ − φ*‖, the error of the inner solver; δ′ = ‖g − A(φ)⁻¹ ∇Q(φ)‖, that of the linear solver, in g and at φ;
- μ: G is μ-strongly convex; ρ: the support loss's Hessian is ρ-Lipschitz;
- the query loss's gradient is L-Lipschitz and at most B in norm at φ*.

Why it holds: A = ∇²G/λ, so ‖A⁻¹‖ ≤ λ/μ at every φ, and

    g − d = [g − A(φ)⁻¹ ∇Q(φ)] + A(φ)⁻¹ [∇Q(φ) − ∇Q(φ*)] + A(φ)⁻¹ [A(φ*) − A(φ)] A(φ*)⁻¹ ∇Q(φ*),

whose three terms are at most δ′, (λ/μ) L δ and (λ/μ)(ρδ/λ)(λ/μ) B = λρB/μ² δ. So with strong convexity everywhere the
bound holds with a factor 1 in place of 2, the "sharp" bound here. The 2 is what strong convexity at φ* alone asks for:
if δ ≤ μ/(2ρ) then ∇²G(φ) ⪰ μ/2.

The problems, one task each, in float64, with φ*, d and δ′ from dense solves:

- quadratic: linear regression. ρ = 0; μ and L are eigenvalues, and B does not matter.
- logistic: binary logistic regression with n samples x. μ = λ, as its support loss is convex;
  L = λ_max(XᵀX/n)/4 and B = Σ‖x‖/n over the query set, as 0 < σ' ≤ 1/4 and |σ − y| ≤ 1;
  ρ = Σ‖x‖³/n · sup|σ''| over the support set, with sup|σ''| = 1/(6√3).

    python experiments/error_bound.py
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from _synthetic import RegressionTasks
from _tables import Row, save
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_imaml import Episode
from lightning_imaml.functional import meta_gradient
from lightning_imaml.inner import GradientDescent
from lightning_imaml.linear import ConjugateGradient, Direct, LinearSolver
from lightning_imaml.meta_gradients import Implicit
from lightning_imaml.regularizers import Proximal

SIGMOID_CURVATURE = 1 / (6 * math.sqrt(3))
"""sup|σ''|."""


@dataclass(frozen=True)
class Problem:
    """One task with its constants.

    Attributes:
        name: the kind of problem.
        model: θ, a linear model of D features without bias.
        episode: the task.
        loss: L and Q.
        strength: λ.
        lr: 1 over the smoothness of G.
        convexity: μ.
        smoothness: L.
        hessian_lipschitz: ρ.
        slope_bound: B.
        hessian: φ ↦ ∇²L(φ), ``[D]`` to ``[D, D]``.
        query_gradient: φ ↦ ∇Q(φ), ``[D]`` to ``[D]``.
        solution: φ*, ``[D]``.
    """

    name: str
    model: nn.Linear
    episode: Episode
    loss: Callable[[Tensor, Tensor], Tensor]
    strength: float
    lr: float
    convexity: float
    smoothness: float
    hessian_lipschitz: float
    slope_bound: float
    hessian: Callable[[Tensor], Tensor]
    query_gradient: Callable[[Tensor], Tensor]
    solution: Tensor

    def meta_gradient(self, parameters: Tensor) -> Tensor:
        """A(φ)⁻¹ ∇Q(φ): ``[D]``."""
        system = torch.eye(len(parameters), dtype=torch.float64) + self.hessian(parameters) / self.strength
        return torch.linalg.solve(system, self.query_gradient(parameters))

    def bound(self, delta: float, delta_prime: float, factor: float) -> float:
        """(factor · λρB/μ² + λL/μ) δ + δ′."""
        curved = factor * self.strength * self.hessian_lipschitz * self.slope_bound / self.convexity**2
        return (curved + self.strength * self.smoothness / self.convexity) * delta + delta_prime


def quadratic(features: int, samples: int) -> Problem:
    """Linear regression with condition number 20."""
    tasks = RegressionTasks.draw(1, samples, features, condition=20.0)
    hessian, solution = tasks.hessian()[0], tasks.solution()

    def query_gradient(parameters: Tensor) -> Tensor:
        return tasks.query_gradient(parameters.unsqueeze(0))[0]

    return Problem(
        name="quadratic",
        model=tasks.model,
        episode=tasks.episode,
        loss=F.mse_loss,
        strength=tasks.strength,
        lr=1.0,
        convexity=tasks.strength + float(torch.linalg.eigvalsh(hessian)[0]),
        smoothness=float(torch.linalg.eigvalsh(tasks.query_hessian()[0])[-1]),
        hessian_lipschitz=0.0,
        slope_bound=float(query_gradient(solution[0]).norm()),
        hessian=lambda _: hessian,
        query_gradient=query_gradient,
        solution=solution[0],
    )


def logistic(features: int, samples: int, strength: float) -> Problem:
    """Logistic regression on labels drawn from a logistic model."""
    inputs = torch.randn(2, samples, features, dtype=torch.float64)
    labels = torch.bernoulli(torch.sigmoid(inputs @ torch.randn(features, 1, dtype=torch.float64)))
    support, query = inputs
    model = nn.Linear(features, 1, bias=False, dtype=torch.float64)
    nn.init.normal_(model.weight)
    initial = model.weight.detach().flatten()

    def gradient(part: int, parameters: Tensor) -> Tensor:
        x = inputs[part]
        return x.mT @ (torch.sigmoid(x @ parameters) - labels[part, :, 0]) / samples

    def hessian(parameters: Tensor) -> Tensor:
        chance = torch.sigmoid(support @ parameters)
        return support.mT @ (support * (chance * (1 - chance)).unsqueeze(1)) / samples

    solution = initial
    for _ in range(50):  # Newton's method.
        residual = gradient(0, solution) + strength * (solution - initial)
        system = hessian(solution) + strength * torch.eye(features, dtype=torch.float64)
        solution = solution - torch.linalg.solve(system, residual)
    if not residual.norm() < 1e-12:
        raise RuntimeError(f"Newton's method must solve the inner problem; found ‖∇G‖ = {float(residual.norm()):.1e}.")

    def curvature(x: Tensor) -> float:
        return float(torch.linalg.eigvalsh(x.mT @ x / samples)[-1]) / 4

    return Problem(
        name="logistic",
        model=model,
        episode=Episode(inputs[:1], labels[:1], inputs[1:], labels[1:]),
        loss=F.binary_cross_entropy_with_logits,
        strength=strength,
        lr=1 / (strength + curvature(support)),
        convexity=strength,
        smoothness=curvature(query),
        hessian_lipschitz=SIGMOID_CURVATURE * float(support.norm(dim=1).pow(3).mean()),
        slope_bound=float(query.norm(dim=1).mean()),
        hessian=hessian,
        query_gradient=lambda parameters: gradient(1, parameters),
        solution=solution,
    )


def measure(problem: Problem, steps: list[int], linear_solvers: dict[str, LinearSolver]) -> Iterator[Row]:
    """Error and bound for every number of inner steps and every linear solver."""
    exact = problem.meta_gradient(problem.solution)
    for count in steps:
        for name, linear_solver in linear_solvers.items():
            result = meta_gradient(
                problem.model,
                problem.episode,
                loss=problem.loss,
                inner_solver=GradientDescent(problem.lr, count),
                estimator=Implicit(linear_solver),
                regularizer=Proximal(problem.strength),
            )
            found, reached = result.grads["weight"].flatten(), result.adapted.parameters["weight"].flatten()
            delta = float((reached - problem.solution).norm())
            delta_prime = float((found - problem.meta_gradient(reached)).norm())
            error = float((found - exact).norm())
            yield {
                "problem": problem.name,
                "inner_steps": count,
                "linear_solver": name,
                "delta": delta,
                "delta_prime": delta_prime,
                "error": error,
                "bound": problem.bound(delta, delta_prime, factor=2),
                "sharp_bound": problem.bound(delta, delta_prime, factor=1),
            }


def draw(rows: list[Row]) -> Figure:
    """Measured error over bound, one panel for each kind of problem."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    names = list(dict.fromkeys(row["problem"] for row in rows))
    for axes, problem in zip(figure.subplots(1, len(names)), names, strict=True):
        mine = [row for row in rows if row["problem"] == problem]
        for solver in dict.fromkeys(row["linear_solver"] for row in mine):
            points = [(row["bound"], row["error"]) for row in mine if row["linear_solver"] == solver]
            axes.loglog(*zip(*points, strict=True), "o", markersize=3, alpha=0.6, label=solver)
        ends = [f(row["bound"] for row in mine) for f in (min, max)]
        axes.loglog(ends, ends, "k--", linewidth=1, label="error = bound")
        axes.set(title=f"{problem} inner problems", xlabel="(2λρB/μ² + λL/μ) δ + δ′", ylabel="‖g − d‖")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small", title="linear solver")
    return figure


def largest_ratio(rows: list[Row], bound: str) -> float:
    """The largest error in units of the bound."""
    return max(row["error"] / row[bound] for row in rows)


def main(args: list[str] | None = None) -> list[Row]:
    """Run the sweep, print the largest ratios and save the numbers with their picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=8, help="of each kind")
    parser.add_argument("--features", type=int, default=10)
    parser.add_argument("--samples", type=int, default=40, help="of the support and of the query set of a task")
    parser.add_argument("--strength", type=float, default=0.1, help="λ of the logistic problems")
    parser.add_argument(
        "--steps", type=int, nargs="+", default=[2**k for k in range(9)], help="inner steps: sweep of δ"
    )
    parser.add_argument("--cg-steps", type=int, nargs="+", default=[1, 2, 4, 8], help="for δ′")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("results"))
    options = parser.parse_args(args)
    torch.manual_seed(options.seed)
    linear_solvers: dict[str, LinearSolver] = {f"CG, {k} steps": ConjugateGradient(k) for k in options.cg_steps}
    linear_solvers["direct"] = Direct()
    rows: list[Row] = []
    print(f"{'problem':<12}{'task':>5}{'μ':>9}{'L':>9}{'ρ':>9}{'B':>9}{'λ':>9}")
    for task in range(options.tasks):
        for problem in (
            quadratic(options.features, options.samples),
            logistic(options.features, options.samples, options.strength),
        ):
            constants = (problem.convexity, problem.smoothness, problem.hessian_lipschitz, problem.slope_bound)
            values = "".join(f"{value:>9.3g}" for value in (*constants, problem.strength))
            print(f"{problem.name:<12}{task:>5}{values}")
            rows.extend({"task": task, **row} for row in measure(problem, options.steps, linear_solvers))
    save(rows, options.output / "error_bound.csv")
    draw(rows).savefig(options.output / "error_bound.png", dpi=120)
    print("\nLargest measured error over bound; the bound holds where it is at most 1")
    print(f"{'problem':<12}{'linear solver':<16}{'bound':>10}{'sharp bound':>13}")
    for problem in ("quadratic", "logistic"):
        for solver in linear_solvers:
            mine = [row for row in rows if (row["problem"], row["linear_solver"]) == (problem, solver)]
            ratios = f"{largest_ratio(mine, 'bound'):>10.4f}{largest_ratio(mine, 'sharp_bound'):>13.4f}"
            print(f"{problem:<12}{solver:<16}{ratios}")
    print(f"{'all':<28}{largest_ratio(rows, 'bound'):>10.4f}{largest_ratio(rows, 'sharp_bound'):>13.4f}")
    return rows


if __name__ == "__main__":
    main()
