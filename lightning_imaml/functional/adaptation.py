"""Adapt a network to tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_imaml.episodes import Episode
from lightning_imaml.functional.preparation import Solve
from lightning_imaml.functional.settings import DEFAULT_INNER_SOLVER, DEFAULT_REGULARIZER, Settings
from lightning_imaml.inner import InnerSolver
from lightning_imaml.problems import bad_tasks
from lightning_imaml.problems.supervised import LossFunction
from lightning_imaml.regularizers import Regularizer
from lightning_imaml.runtime.phases import INNER_LOOP, phase


class Adapted(NamedTuple):
    """Networks adapted to T tasks.

    Attributes:
        parameters: name → ``[T, ...]``.
        steps: the inner steps that each task took, ``[T]``.
        residual: ‖∇G‖ at the parameters, ``[T]``.
        converged: whether the residual is within the inner solver's tolerance, ``[T]``; almost never with ``tol=0``.
    """

    parameters: dict[str, Tensor]
    steps: Tensor
    residual: Tensor
    converged: Tensor


def adapt(
    model: nn.Module,
    support_inputs: Any,
    support_targets: Any,
    *,
    loss: LossFunction = F.cross_entropy,
    inner_solver: InnerSolver = DEFAULT_INNER_SOLVER,
    regularizer: Regularizer = DEFAULT_REGULARIZER,
    strengths: Mapping[str, Tensor] | None = None,
    rates: Mapping[str, Tensor] | None = None,
    adapt_only: Sequence[str] | None = None,
    chunk_size: int | None = None,
    compile: bool = False,
    full_precision: bool = True,
    check_network: bool = True,
) -> Adapted:
    """Adapt a network to T tasks, each on its own support set.

    It works in inference mode too, and never builds a second-order graph.

    Example:
        >>> from lightning_imaml.inner import GradientDescent
        >>> inputs, targets = torch.randn(3, 5, 8), torch.arange(5).expand(3, 5)  # three tasks: 5-way 1-shot
        >>> adapted = adapt(nn.Linear(8, 5), inputs, targets, inner_solver=GradientDescent(lr=0.1, steps=8))
        >>> adapted.parameters["weight"].shape
        torch.Size([3, 5, 8])

    Args:
        model: maps inputs ``[n, ...]`` to outputs ``[n, ...]``; it is not changed.
        support_inputs: ``[T, n, ...]``.
        support_targets: ``[T, n]`` or ``[T, n, ...]``.
        loss: ``loss(outputs, targets) -> scalar`` for one task.
        inner_solver: what minimises G = L + R.
        regularizer: the regulariser R.
        strengths: the regulariser's learned values; None takes their first values.
        rates: the inner solver's learned step sizes; None takes their first values.
        adapt_only: patterns over the names of trainable parameters (``*``, ``?``): those that match adapt, all others
            stay as they are. None adapts all.
        chunk_size: the most tasks at once, which bounds memory; None chooses it from the size of a task.
        compile: compile the inner loop and the linear solve with PyTorch's Inductor. Each new shape of batch takes
            about a minute. Where that fails, one warning says why, and everything runs eagerly. Pass the same loss
            object every time, since each object is compiled by itself.
        full_precision: leave ``torch.autocast``, and solve in float32 where the network's parameters have fewer bits.
            The results are float32 then, too. False keeps the precision of the parameters and of autocast.
        check_network: check, when a network is first used, that it is computed as a plain call computes it, which costs
            less than a meta-step; see ``docs/networks.md``.

    Raises:
        ValueError: an argument does not fit, or the network cannot be used rightly, see the message.
        FloatingPointError: a task's adaptation is not finite or explodes; the message names the tasks.
    """
    settings = Settings(
        loss=loss,
        inner_solver=inner_solver,
        regularizer=regularizer,
        strengths=strengths,
        rates=rates,
        adapt_only=adapt_only,
        chunk_size=chunk_size,
        compile=compile,
        full_precision=full_precision,
        check_network=check_network,
    )
    episode = Episode(support_inputs, support_targets, support_inputs, support_targets)
    solve = Solve(model, episode, settings)
    solutions, residuals = [], []
    with solve.precision():
        for problem, _ in solve.chunks(episode):
            with phase(INNER_LOOP):
                solutions.append(inner_solver.solve(problem, problem.start()))
            residuals.append(problem.residual_norm(solutions[-1].parameters))
        residual = torch.cat(residuals)
        quantities = {"the inner loop's gradient norm": residual}
        if bad_tasks.find(quantities).any():
            tasks = torch.arange(len(residual), device=residual.device)
            raise FloatingPointError(bad_tasks.describe(quantities, tasks))
        parameters = solve.network.unflatten(torch.cat([s.parameters for s in solutions]))
    return Adapted(parameters, torch.cat([s.steps for s in solutions]), residual, residual <= inner_solver.tol)
