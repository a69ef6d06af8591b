"""Few-shot regression of sinusoids, the first experiment of the MAML paper.

A task is y = A sin(x − p) with amplitude A in [0.1, 5] and phase p in [0, π], seen at 10 points x in [-5, 5]
(Finn et al., 2017, https://arxiv.org/abs/1703.03400, section 5.1). A network of two hidden layers of 40 units learns an
initialisation from which a few gradient steps fit a sinusoid that it never saw.

    python experiments/sinusoid.py                 # iMAML; --method maml, fomaml or reptile for the others
"""

from __future__ import annotations

import argparse
import copy
import math
from pathlib import Path

import torch
from _tables import save
from lightning.pytorch import Trainer
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_imaml import Episode, IMAMLModule
from lightning_imaml.curvature import GaussNewton
from lightning_imaml.data import SinusoidDataModule
from lightning_imaml.functional import adapt, evaluate, predict
from lightning_imaml.inner import GradientDescent
from lightning_imaml.linear import ConjugateGradient
from lightning_imaml.meta_gradients import FirstOrder, Implicit, Reptile, Unrolled
from lightning_imaml.regularizers import Proximal

METHODS = {
    "imaml": Implicit(ConjugateGradient(max_iter=5), GaussNewton()),
    "maml": Unrolled(),
    "fomaml": FirstOrder(),
    "reptile": Reptile(),
}
AMPLITUDES, PHASES, INPUTS = (0.1, 5.0), (0.0, math.pi), (-5.0, 5.0)
TEST_QUERIES = 100  # Points a task to judge on.
JUDGED_STEPS = (0, 1, 5, 10)
PICTURED = 5

Row = dict[str, str | int | float]


def tasks(options: argparse.Namespace) -> SinusoidDataModule:
    """Training tasks with as many query points as support points; one batch of test tasks with more."""
    return SinusoidDataModule(
        amplitude=AMPLITUDES,
        phase=PHASES,
        inputs=INPUTS,
        shots=options.shots,
        queries=options.shots,
        eval_queries=TEST_QUERIES,
        tasks_per_batch=options.tasks,
        batches_per_epoch=options.meta_steps,
        test_tasks=options.test_tasks,
        eval_tasks_per_batch=options.test_tasks,
        seed=options.seed,
    )


def least_unadapted_error() -> float:
    """The expected MSE of the best predictor that does not adapt, in closed form.

    That predictor is the mean over tasks, E[A] E[sin(x − p)] = −2 E[A] cos(x)/π, and what is left is the variance,
    E[A²]/2 − (2 E[A]/π)² E[cos² x].
    """
    low, high = AMPLITUDES
    mean = (low + high) / 2
    mean_square = mean**2 + (high - low) ** 2 / 12
    end = INPUTS[1]
    return mean_square / 2 - (2 * mean / math.pi) ** 2 * (0.5 + math.sin(2 * end) / (4 * end))


def network() -> nn.Sequential:
    """The paper's network: 1-40-40-1 with ReLU."""
    return nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))


def adapted(model: nn.Module, episode: Episode, steps: int, lr: float, strength: float) -> dict[str, Tensor]:
    """The parameters of every task after ``steps`` gradient steps, name to ``[T, ...]``."""
    if steps == 0:
        return {name: p.detach().expand(episode.tasks, *p.shape) for name, p in model.named_parameters()}
    return adapt(
        model,
        episode.support_inputs,
        episode.support_targets,
        loss=F.mse_loss,
        inner_solver=GradientDescent(lr, steps),
        regularizer=Proximal(strength),
    ).parameters


def judge(name: str, model: nn.Module, episode: Episode, lr: float, strength: float) -> list[Row]:
    """Test MSE with its 95 % interval over tasks, by the number of adaptation steps."""
    rows: list[Row] = []
    for steps in JUDGED_STEPS:
        parameters = adapted(model, episode, steps, lr, strength)
        errors, _ = evaluate(model, parameters, episode.query_inputs, episode.query_targets, loss=F.mse_loss)
        interval = 1.96 * errors.std().item() / math.sqrt(episode.tasks)
        rows.append({"network": name, "steps": steps, "mse": errors.mean().item(), "interval95": interval})
    return rows


def draw(model: nn.Module, episode: Episode, rows: list[Row], lr: float, strength: float) -> Figure:
    """Some test sinusoids before and after adaptation, and the test error by steps."""
    figure = Figure(figsize=(12, 6), layout="constrained")
    panels = figure.subplots(2, 3).flat
    shown = Episode(*(part[:PICTURED] for part in episode))
    grid = torch.linspace(*INPUTS, 200)
    inputs = grid.view(1, -1, 1).expand(shown.tasks, -1, 1)
    curves = {
        steps: predict(model, adapted(model, shown, steps, lr, strength), inputs)
        for steps in (JUDGED_STEPS[0], JUDGED_STEPS[-1])
    }
    for task in range(shown.tasks):
        axes = next(panels)
        order = shown.query_inputs[task, :, 0].argsort()
        axes.plot(shown.query_inputs[task, order, 0], shown.query_targets[task, order, 0], "k", alpha=0.4, label="true")
        for (steps, outputs), style in zip(curves.items(), (":", "-"), strict=True):
            axes.plot(grid, outputs[task, :, 0].detach(), style, label=f"after {steps} steps" if steps else "before")
        axes.plot(shown.support_inputs[task, :, 0], shown.support_targets[task, :, 0], "k^", label="support")
        axes.set(title=f"test task {task}", ylim=(-5.5, 5.5))
    axes.legend(fontsize="small")
    axes = next(panels)
    for name in dict.fromkeys(row["network"] for row in rows):
        mine = [row for row in rows if row["network"] == name]
        steps, values, widths = zip(*((row["steps"], row["mse"], row["interval95"]) for row in mine), strict=True)
        axes.errorbar(steps, values, widths, marker="o", markersize=3, capsize=2, label=f"{name} weights")
    axes.axhline(least_unadapted_error(), color="k", linestyle=":", label="least possible without adaptation")
    axes.set(title="Test MSE (95 %)", xlabel="adaptation steps", yscale="log")
    axes.legend(fontsize="small")
    return figure


def main(args: list[str] | None = None) -> list[Row]:
    """Train, test, print the table and save it with the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=METHODS, default="imaml", help="what estimates the meta-gradient")
    parser.add_argument("--meta-steps", type=int, default=3000)
    parser.add_argument("--tasks", type=int, default=25, help="tasks a meta-step")
    parser.add_argument("--shots", type=int, default=10, help="support points a task, and query points in training")
    parser.add_argument("--lr", type=float, default=0.005, help="of the inner gradient steps")
    parser.add_argument("--inner-steps", type=int, default=10, help="inner steps in training")
    parser.add_argument("--strength", type=float, default=3.0, help="λ of the proximal term")
    parser.add_argument("--meta-lr", type=float, default=2e-3, help="of Adam, falling to 0 by half a cosine")
    parser.add_argument("--test-tasks", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("results"))
    options = parser.parse_args(args)
    if options.test_tasks < PICTURED:
        parser.error(f"--test-tasks must be at least {PICTURED}, the number of pictures; found {options.test_tasks}")

    torch.manual_seed(options.seed)
    model = network()
    start = copy.deepcopy(model)
    data = tasks(options)
    (episode,) = data.test_dataloader()
    module = IMAMLModule(
        model,
        loss=F.mse_loss,
        inner_solver=GradientDescent(options.lr, options.inner_steps),
        estimator=METHODS[options.method],
        regularizer=Proximal(options.strength),
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=options.meta_lr),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.meta_steps),
    )
    # On so small a network a CPU is fastest.
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data)

    rows = judge("random", start, episode, options.lr, options.strength)
    rows += judge("meta-learned", model, episode, options.lr, options.strength)
    stem = options.output / f"sinusoid_{options.method}"
    save([{"method": options.method, **row} for row in rows], stem.with_suffix(".csv"))
    draw(model, episode, rows, options.lr, options.strength).savefig(stem.with_suffix(".png"), dpi=120)
    print(f"\n{options.method}: test MSE over {options.test_tasks} tasks ± 95 % interval")
    print(f"{'weights':<14}" + "".join(f"{f'{steps} steps':>18}" for steps in JUDGED_STEPS))
    for name in ("random", "meta-learned"):
        mine = (row for row in rows if row["network"] == name)
        print(f"{name:<14}" + "".join(f"{row['mse']:>10.3f} ± {row['interval95']:.3f}" for row in mine))
    print(f"The least that any network can reach without adaptation: {least_unadapted_error():.3f} (closed form)")
    return rows


if __name__ == "__main__":
    main()
