"""Solve any inner problem, with a solution that is differentiated implicitly."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils import _pytree as pytree

from lightning_imaml.inner import InnerSolver
from lightning_imaml.linear import GMRES, LinearSolver
from lightning_imaml.problems import bad_tasks
from lightning_imaml.problems.condition import Condition
from lightning_imaml.problems.conditions import Conditions

# Beyond this relative residual of the linear system an implicit gradient is more wrong than right.
_DOUBTFUL = 0.1


class Solution(NamedTuple):
    """The solutions of T tasks.

    Attributes:
        value: φ, ``[T, ...]``, of the structure that ``start`` gives; part of autograd's graph.
        steps: the inner steps that each task took, ``[T]``.
        residual: ‖F(φ)‖, ``[T]``.
        converged: whether the residual is within the inner solver's tolerance, ``[T]``.
    """

    value: Any
    steps: Tensor
    residual: Tensor
    converged: Tensor


def solve(
    network: nn.Module,
    problem: Condition,
    inputs: Any,
    *,
    inner_solver: InnerSolver,
    linear_solver: LinearSolver = GMRES(20),  # noqa: B008 - frozen, so that sharing it is safe
) -> Solution:
    r"""Solve F(φ, ω) = 0 for T tasks; the solutions have the implicit gradient in ω and in the inputs.

    .. math:: (∂_φ F)^⊤ u = ∂_φ Q, \qquad \frac{dQ}{dω} = -(∂_ω F)^⊤ u

    Each backward pass solves this linear system once, whatever the inner solver did, so that memory does not grow with
    its steps (`Rajeswaran et al., 2019 <https://arxiv.org/abs/1909.04630>`_, Lemma 1; `Bai et al., 2019
    <https://arxiv.org/abs/1909.01377>`_ for fixed points). It can be repeated, but not be differentiated itself.

    Args:
        network: holds ω, its trainable parameters.
        problem: what defines a solution, for one task.
        inputs: ``[T, ...]``, a pytree of tensors. Those that require gradients get theirs.
        inner_solver: finds φ: ``GradientDescent(1.0, steps)`` iterates a fixed point; ``Newton`` and ``Anderson`` take
            fewer steps.
        linear_solver: solves for u. A condition's system is not symmetric in general.

    Raises:
        ValueError: nothing requires a gradient, or the problem's functions do not fit together, see the message.
        FloatingPointError: a solution is not finite; the message names its tasks. In the backward pass: a linear
            system's is not.

    Warns:
        UserWarning: in the backward pass, the linear solver leaves more than a tenth of the right-hand side.
    """
    tensors: dict[str, Tensor] = {name: p for name, p in network.named_parameters() if p.requires_grad}
    leaves = pytree.tree_leaves(inputs)
    tensors |= {f"inputs.{k}": leaf for k, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad}
    if not tensors:
        raise ValueError(
            f"the network must have a trainable parameter, or an input must require gradients; found neither in "
            f"{type(network).__name__}. Hold what is to be learned as nn.Parameter."
        )
    held = {name: tensor.detach() for name, tensor in tensors.items()}
    given = pytree.tree_map_only(Tensor, Tensor.detach, inputs)
    conditions = Conditions.of(problem, network, given, held)
    found = inner_solver.solve(conditions, conditions.start())
    residual = conditions.residual_norm(found.parameters)
    quantities = {"the residual of the inner problem": residual}
    if bad_tasks.find(quantities).any():
        raise FloatingPointError(bad_tasks.describe(quantities, torch.arange(len(residual), device=residual.device)))
    rows = _Solve.apply(found.parameters, conditions, linear_solver, tuple(tensors), *tensors.values())
    return Solution(conditions.form.split(rows), found.steps, residual, residual <= inner_solver.tol)


class _Solve(torch.autograd.Function):
    """The solutions as rows, with the implicit gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        conditions: Conditions,
        linear_solver: LinearSolver,
        names: tuple[str, ...],
        *tensors: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(rows, *tensors)
        ctx.conditions, ctx.linear_solver, ctx.names = conditions, linear_solver, names
        return rows.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        rows, *tensors = ctx.saved_tensors
        held = {name: tensor.detach() for name, tensor in zip(ctx.names, tensors, strict=True)}
        conditions = ctx.conditions.with_meta_parameters(rows, held)
        linear = ctx.linear_solver.solve(conditions.linearize(rows).product.transpose, slope.contiguous())
        worst = float(linear.residual.max())
        if not worst < torch.inf:
            tasks = (~linear.residual.isfinite()).nonzero().flatten().tolist()
            raise FloatingPointError(
                f"the linear system of the implicit gradient must have a finite solution; found none for tasks {tasks}."
                " Its matrix ∂F may be singular there: add a regulariser, or use Direct() to see it."
            )
        if worst > _DOUBTFUL:
            warnings.warn(
                f"{type(ctx.linear_solver).__name__} should leave little of the implicit system; found a relative "
                f"residual of {worst:.1e}, so that the gradient is far from exact. Raise max_iter, or check whether ∂F "
                "is singular.",
                stacklevel=2,
            )
        _, pulled = conditions.pull_back(rows, linear.value)
        return None, None, None, None, *(pulled[name] for name in ctx.names)
