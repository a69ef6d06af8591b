"""Differentiate through adaptation."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from lightning_imaml.components.checks import require_choice
from lightning_imaml.episodes import Episode
from lightning_imaml.functional.adaptation import Adapted
from lightning_imaml.functional.preparation import Solve
from lightning_imaml.functional.settings import DEFAULT_INNER_SOLVER, DEFAULT_REGULARIZER, Settings
from lightning_imaml.inner import InnerSolver
from lightning_imaml.linear import LinearSolution
from lightning_imaml.meta_gradients import Estimator, Implicit
from lightning_imaml.meta_gradients.base import Estimate
from lightning_imaml.problems import bad_tasks
from lightning_imaml.problems.network import FlatModel
from lightning_imaml.problems.supervised import LossFunction
from lightning_imaml.regularizers import Regularizer


class MetaGradient(NamedTuple):
    """The meta-gradient of a batch of T tasks.

    Attributes:
        loss: the query losses Q_i(φ_i), ``[T]``.
        grads: dF/dη averaged over tasks, for the names of ``model.named_parameters()`` that are trainable,
            ``regularizer.<name>`` for learned strengths and ``inner_solver.<name>`` for learned step sizes. These are
            of the tasks of this process: with several, average them before they are written to ``.grad``.
        adapted: the adapted networks.
        linear: the solution of the linear system; None for estimators without one.
        query_outputs: the adapted networks' outputs on the query sets, ``[T, n, ...]``.
        tasks: the indices of these T tasks in the episode; bad tasks may be missing.
    """

    loss: Tensor
    grads: dict[str, Tensor]
    adapted: Adapted
    linear: LinearSolution | None
    query_outputs: Any
    tasks: Tensor


def meta_gradient(
    model: nn.Module,
    episode: Episode,
    *,
    loss: LossFunction = F.cross_entropy,
    outer_loss: LossFunction | None = None,
    inner_solver: InnerSolver = DEFAULT_INNER_SOLVER,
    estimator: Estimator = Implicit(),  # noqa: B008 - frozen, so that sharing it is safe
    regularizer: Regularizer = DEFAULT_REGULARIZER,
    strengths: Mapping[str, Tensor] | None = None,
    rates: Mapping[str, Tensor] | None = None,
    adapt_only: Sequence[str] | None = None,
    chunk_size: int | None = None,
    compile: bool = False,
    full_precision: bool = True,
    on_bad_task: Literal["raise", "skip"] = "raise",
    check_network: bool = True,
) -> MetaGradient:
    """The gradient of F(θ, λ) = (1/T) Σ_i Q_i(φ_i) for a batch of tasks.

    Example:
        >>> from lightning_imaml.inner import GradientDescent
        >>> from lightning_imaml.regularizers import Proximal
        >>> model = nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.zeros_(model.weight)  # θ = 0
        >>> one = torch.ones(1, 1, 1)  # One task with the example x = 1, y = 1: L(φ) = Q(φ) = (φ − 1)².
        >>> episode = Episode(one, one, one, one)
        >>> newton = GradientDescent(lr=0.25, steps=1)  # Exact: G(φ) = (φ − 1)² + φ² has the second derivative 4.
        >>> result = meta_gradient(model, episode, loss=F.mse_loss, inner_solver=newton, regularizer=Proximal(2.0))
        >>> result.adapted.parameters["weight"]
        tensor([[[0.5000]]])
        >>> result.grads["weight"]  # (1 + 2/λ)⁻¹ · 2(φ − 1)
        tensor([[-0.5000]])

    Args:
        model: maps inputs ``[n, ...]`` to outputs ``[n, ...]``; its parameters are θ. Neither they nor their ``.grad``
            are changed.
        episode: the tasks.
        loss: the support loss L, ``loss(outputs, targets) -> scalar`` for one task.
        outer_loss: the query loss Q; None takes ``loss``.
        inner_solver: what minimises G = L + R.
        estimator: what differentiates; the default is the paper's, with the exact Hessian.
        regularizer: the regulariser R.
        strengths: the regulariser's learned values λ; None takes their first values.
        rates: the inner solver's learned step sizes; None takes their first values.
        adapt_only: patterns over the names of trainable parameters (``*``, ``?``): those that match adapt. The others,
            ω, are shared by all tasks, and have their gradient dF/dω in ``grads``. None adapts all.
        chunk_size: the most tasks at once, which bounds memory; None chooses it from the size of a task.
        compile: compile the inner loop and the linear solve with PyTorch's Inductor. Each new shape of batch takes
            about a minute. Where that fails, one warning says why, and everything runs eagerly. Pass the same loss
            object every time, since each object is compiled by itself.
        full_precision: leave ``torch.autocast``, and solve in float32 where the network's parameters have fewer bits.
            The results are float32 then, too. False keeps the precision of the parameters and of autocast.
        on_bad_task: what to do with a task whose loss, residual or gradient is NaN, infinite or larger than the square
            root of the dtype's largest number. "raise" raises an error. "skip" warns, names the task, computes the
            batch again without it and takes the mean over the others; ``result.tasks`` holds the tasks that are left.
            If none is left, the gradient is zero.
        check_network: check, when a network is first used, that it is computed as a plain call computes it, which costs
            less than a meta-step; see ``docs/networks.md``.

    Raises:
        ValueError: an argument does not fit, or the network cannot be used rightly, see the message.
        FloatingPointError: a task is bad, see ``on_bad_task``; the message names it.
    """
    settings = Settings(
        loss,
        outer_loss,
        inner_solver,
        regularizer,
        strengths,
        rates,
        adapt_only,
        chunk_size,
        compile,
        full_precision,
        check_network,
    )
    require_choice("on_bad_task", on_bad_task, ("raise", "skip"))
    solve = Solve(model, episode, settings, estimator.differentiated_steps(inner_solver))

    def of_tasks(tasks: Tensor) -> MetaGradient:
        part = episode if len(tasks) == episode.tasks else episode.take(tasks)
        estimates = [estimator.estimate(problem, query, inner_solver) for problem, query in solve.chunks(part)]
        return _join(solve.network, estimates, inner_solver.tol, tasks)

    with solve.precision():
        tasks = torch.arange(episode.tasks, device=solve.network.device)
        while True:
            result = of_tasks(tasks)
            quantities = _quantities(result)
            bad = bad_tasks.find(quantities)
            if not bad.any() and not _sound_gradient(result):
                # All numbers of the tasks are sound, but their gradient is not: find the task whose share is bad.
                shares = [0.0 if _sound_gradient(of_tasks(task[None])) else torch.nan for task in tasks]
                quantities = {"the meta-gradient": result.loss.new_tensor(shares)}
                bad = bad_tasks.find(quantities)
                bad |= ~bad.any()  # Each share is sound; only the sum is too large.
                quantities["the meta-gradient"].masked_fill_(bad, torch.nan)
            if not bad.any():
                return result
            message = bad_tasks.describe(quantities, tasks)
            if on_bad_task == "raise":
                raise FloatingPointError(message)
            warnings.warn(f"{message} They are left out of the meta-gradient.", stacklevel=2)
            if bad.all():
                return _zero_meta_gradient(result)
            tasks = tasks[~bad]


def _quantities(result: MetaGradient) -> dict[str, Tensor]:
    """The numbers that show whether a task is bad, ``[T]`` each."""
    found = {"the inner loop's gradient norm": result.adapted.residual, "the outer loss": result.loss}
    return found if result.linear is None else found | {"the linear solve's residual": result.linear.residual}


def _sound_gradient(result: MetaGradient) -> bool:
    return bool(torch.stack([bad_tasks.sound(g).all() for g in result.grads.values()]).all())


def _zero_meta_gradient(result: MetaGradient) -> MetaGradient:
    """The meta-gradient of no tasks: zero."""
    grads = {name: torch.zeros_like(gradient) for name, gradient in result.grads.items()}
    # Gradients have no dimension of tasks, so they stay out of the slicing.
    empty: MetaGradient = pytree.tree_map_only(Tensor, lambda t: t[:0], result._replace(grads={}))
    return empty._replace(grads=grads)


def _join(flat: FlatModel, estimates: list[Estimate], tol: float, tasks: Tensor) -> MetaGradient:
    """Put the chunks together: means over all tasks."""
    losses = torch.cat([e.loss for e in estimates])
    residual = torch.cat([e.residual for e in estimates])
    grads = flat.unflatten(torch.stack([e.initial for e in estimates]).sum(dim=0) / losses.shape[0])
    for name in estimates[0].others:
        grads[name] = torch.stack([e.others[name] for e in estimates]).sum(dim=0) / losses.shape[0]
    adapted = Adapted(
        flat.unflatten(torch.cat([e.inner.parameters.detach() for e in estimates])),
        torch.cat([e.inner.steps for e in estimates]),
        residual,
        residual <= tol,
    )
    solved = [e.linear for e in estimates if e.linear is not None]
    linear = LinearSolution(*map(torch.cat, zip(*solved, strict=True))) if solved else None
    outputs = pytree.tree_map(lambda *leaves: torch.cat(leaves), *[e.outputs for e in estimates])
    return MetaGradient(losses, grads, adapted, linear, outputs, tasks)
