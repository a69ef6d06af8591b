"""The inner problem of supervised few-shot learning: model, loss and regulariser as functions of ``[tasks, D]`` rows.

Row i of a parameter matrix holds all trainable parameters of the network that task i adapts, raveled in the order of
``named_parameters()``. Each function here is one batched operation over all rows.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import weakref
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from typing_extensions import Self

from lightning_imaml import _compile
from lightning_imaml.linear.operator import LinearOperator
from lightning_imaml.parameters.rows import Rows
from lightning_imaml.problems.base import Linearization, Minimization, SupportsLinearize
from lightning_imaml.problems.checks import checked, require_fitting_outputs
from lightning_imaml.problems.isolation import replacing, traits_of_loss, unreadable
from lightning_imaml.problems.network import FlatModel
from lightning_imaml.problems.vmap import vmap_tasks
from lightning_imaml.regularizers import MatrixProximal, Regularizer

LossFunction = Callable[[Any, Any], Tensor]
"""Takes one task's outputs ``[n, ...]`` and targets ``[n, ...]``, gives a scalar."""


@dataclass(frozen=True, eq=False)
class TaskLoss:
    """The loss of T tasks on one of their two sets: L (support) or Q (query).

    Attributes:
        model: the network.
        loss: ``loss(outputs, targets) -> scalar`` for one task.
        inputs: ``[T, n, ...]``, or from :func:`support_set.concat_support`.
        targets: ``[T, n, ...]``.
        classes: the number of outputs that the targets need, where the loss takes class indices.
        state: stands in for the network's shared and frozen parameters and its buffers.
        support_rows: how many of the first inputs are the support set of the others.
    """

    model: FlatModel
    loss: LossFunction
    inputs: Any
    targets: Any
    classes: int | None = None
    state: Mapping[str, Tensor] | None = None
    support_rows: int = 0

    @property
    def compile(self) -> bool:
        """Whether to compile functions of it."""
        return self.model.compile

    @property
    def tasks(self) -> int:
        """The number of tasks T."""
        return int(pytree.tree_leaves(self.targets)[0].shape[0])

    def tensors(self) -> Any:
        """All tensors that the loss depends on."""
        return self.inputs, self.targets, self._state()

    def shared(self) -> dict[str, Tensor]:
        """ω, the trainable parameters that all tasks share, by name."""
        state = self._state() if self.model.shared else {}
        return {name: state[name] for name in self.model.shared}

    def with_shared(self, shared: Mapping[str, Tensor]) -> Self:
        """The same loss with other values of ω."""
        return replace(self, state={**self._state(), **shared}) if shared else self

    def _state(self) -> dict[str, Tensor]:
        return self.model.state() if self.state is None else dict(self.state)

    def bind(self, tensors: Any) -> Self:
        """The same loss of other tensors."""
        inputs, targets, state = tensors
        return replace(self, inputs=inputs, targets=targets, state=state)

    def signature(self) -> Hashable:
        """What else the loss depends on."""
        # Compiled code outlives a module whose own method the loss is.
        loss = weakref.WeakMethod(self.loss) if inspect.ismethod(self.loss) else self.loss
        return self.model.signature(), loss, self.classes, self.support_rows

    def outputs(self, parameters: Tensor, first_order_only: bool = False) -> Any:
        """The network's outputs ``[T, n, ...]`` at ``[T, D]`` parameters, see :meth:`FlatModel.__call__`."""
        return self.check(self.model(parameters, self.inputs, self.state, self.support_rows, first_order_only))

    def check(self, outputs: Any) -> Any:
        """The outputs themselves, if they have one entry for each class that the targets name."""
        require_fitting_outputs(self.loss, outputs, self.targets)
        if self.classes is not None and isinstance(outputs, Tensor) and outputs.ndim > 2:
            found = outputs.shape[2]
            if found < self.classes:
                raise ValueError(
                    f"targets must lie in 0 … {found - 1}, since the backbone has {found} outputs; found "
                    f"{self.classes - 1}. Give the backbone one output for each way, or relabel the episode to 0 … N-1."
                )
        return outputs

    def from_outputs(self, outputs: Any) -> Tensor:
        """The losses ``[T]`` of given outputs."""
        owner, written = getattr(self.loss, "__func__", self.loss), self.model.traits.writes
        reading = unreadable(self.model.module, written) if written else contextlib.nullcontext()
        with reading, replacing(traits_of_loss(owner)):
            losses: Tensor = vmap_tasks(checked(self.loss, owner), owner, outputs, self.targets)
        if losses.ndim != 1:
            raise ValueError(
                f"loss must give one number for each task; found a tensor of shape {list(losses.shape[1:])}. "
                "Average over the task's samples, as reduction='mean' does."
            )
        return losses

    def value(self, parameters: Tensor, first_order_only: bool = False) -> Tensor:
        """The losses ``[T]`` at ``[T, D]`` parameters, see :meth:`FlatModel.__call__`."""
        return self.from_outputs(self.outputs(parameters, first_order_only))


@dataclass(frozen=True, eq=False)
class SupervisedProblem(Minimization):
    """Minimise G_i(φ_i) = L_i(φ_i) + R(φ_i, θ, λ) over the rows φ_i (paper, eq. 3), for T tasks.

    Attributes:
        support: L, the loss on the support sets.
        regularizer: R, for the layout of the rows, see :meth:`Regularizer.for_layout`.
        initial: θ as one row ``[D]``; where the inner loop starts and what R pulls towards.
        strengths: the regulariser's learned values λ.
        rates: the inner solver's learned step sizes.
    """

    support: TaskLoss
    regularizer: Regularizer
    initial: Tensor
    strengths: Mapping[str, Tensor]
    rates: Mapping[str, Tensor] = field(default_factory=dict)

    # What the compiler must know of a batch of tasks, see _compile.Tasks.

    @property
    def compile(self) -> bool:
        """Whether to compile functions of it."""
        return self.support.compile

    @property
    def tasks(self) -> int:
        """The number of tasks T."""
        return self.support.tasks

    def tensors(self) -> Any:
        """All tensors that the problem depends on."""
        return self.support.tensors(), self.initial, dict(self.strengths), dict(self.rates)

    def bind(self, tensors: Any) -> Self:
        """The same problem of other tensors."""
        support, initial, strengths, rates = tensors
        return replace(self, support=self.support.bind(support), initial=initial, strengths=strengths, rates=rates)

    def signature(self) -> Hashable:
        """What else the problem depends on."""
        return self.support.signature(), self.regularizer

    # The meta-parameters.

    def meta_parameters(self) -> dict[str, Tensor]:
        """ω, λ and learned step sizes, see :meth:`InnerProblem.meta_parameters`."""
        strengths = {f"regularizer.{name}": value for name, value in self.strengths.items()}
        rates = {f"inner_solver.{name}": value for name, value in self.rates.items()}
        return self.support.shared() | strengths | rates

    def with_meta_parameters(self, initial: Tensor, values: Mapping[str, Tensor]) -> Self:
        """The same problem with another θ, ``[D]``, and other values of :meth:`meta_parameters`."""
        shared = {name: values[name] for name in self.support.model.shared}
        return replace(
            self,
            support=self.support.with_shared(shared),
            initial=initial,
            strengths={name: values[f"regularizer.{name}"] for name in self.strengths},
            rates={name: values[f"inner_solver.{name}"] for name in self.rates},
        )

    # The inner problem.

    @property
    def rows(self) -> Rows:
        """Which parameters a row holds."""
        return self.support.model

    def start(self) -> Tensor:
        """θ as the first iterate of every task: ``[T, D]``."""
        return self.initial.expand(self.tasks, -1).contiguous()

    def run(self, function: Callable[..., Any], *arguments: Tensor) -> Any:
        """``function(problem, *arguments)``, compiled where the user asked for it."""
        return _compile.run(function, self, *arguments, repeated=True)

    def value(self, parameters: Tensor) -> Tensor:
        """G: ``[T]``."""
        value: Tensor = self.run(_value, parameters)
        return value

    def gradient(self, parameters: Tensor) -> Tensor:
        """∇G: ``[T, D]``, differentiable again where gradients are enabled and the parameters require them."""
        gradient: Tensor = self.run(_gradient, parameters)
        return gradient

    def linearize(self, parameters: Tensor, curvature: SupportsLinearize) -> Linearization:
        """∇G around rows of parameters ``[T, D]``, with R's matrix as the preconditioner where it has one."""
        found, regularizer = curvature.linearize(self, parameters), self.regularizer
        precondition = None
        if isinstance(regularizer, MatrixProximal):
            precondition = functools.partial(regularizer.solve, strengths=self.strengths)
        return found._replace(product=LinearOperator(found.product, preconditioner=precondition))

    def pull_back(self, parameters: Tensor, u: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """−Σ_i (∂_η ∇G_i)ᵀ u_i for η = θ and λ, through R, and for ω, through L.

        Raises:
            ValueError: ∇R depends on nothing that is learned, so that all of it is zero.
        """
        with torch.enable_grad():
            initial, strengths = leaf(self.initial), {name: leaf(value) for name, value in self.strengths.items()}
            gradient = self.regularizer.gradient(parameters, initial, strengths)
            meta, constant = [initial, *strengths.values()], not gradient.requires_grad
            found = [None] if constant else torch.autograd.grad(gradient, meta, -u, allow_unused=True)
        # Without θ, as where a head is pulled to zero, there may be λ and ω to learn.
        if constant or (found[0] is None and not strengths and not self.support.model.shared):
            raise ValueError(
                f"Implicit: the regularizer's gradient must depend on the initialisation; found {self.regularizer}, "
                "whose does not, so that the meta-gradient would be zero. Use Proximal, or another estimator."
            )
        pulled = [torch.zeros_like(m) if f is None else f for m, f in zip(meta, found, strict=True)]
        others = {f"regularizer.{name}": p for name, p in zip(strengths, pulled[1:], strict=True)}
        if self.support.model.shared:
            others |= _compile.run(_pull_back_shared, self.support, parameters, u)
        return pulled[0], others


def leaf(tensor: Tensor) -> Tensor:
    """The same values to differentiate by, cut off from where they come from."""
    return tensor.detach().requires_grad_()


def _pull_back_shared(support: TaskLoss, parameters: Tensor, u: Tensor) -> dict[str, Tensor]:
    """−Σ_i (∂_ω ∇_φ L_i)ᵀ u_i."""
    with torch.enable_grad():
        shared, point = {name: leaf(value) for name, value in support.shared().items()}, leaf(parameters)
        loss = support.with_shared(shared).value(point).sum()
        (gradient,) = torch.autograd.grad(loss, point, create_graph=True)
        if not gradient.requires_grad:  # A loss whose slope is a constant.
            return {name: torch.zeros_like(value) for name, value in shared.items()}
        pulled = torch.autograd.grad(gradient, list(shared.values()), -u, materialize_grads=True)
    return dict(zip(shared, pulled, strict=True))


def _value(problem: SupervisedProblem, parameters: Tensor) -> Tensor:
    penalty = problem.regularizer.penalty(parameters, problem.initial, problem.strengths)
    return problem.support.value(parameters, first_order_only=not torch.is_grad_enabled()) + penalty


def _gradient(problem: SupervisedProblem, parameters: Tensor) -> Tensor:
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        point = parameters if parameters.requires_grad else parameters.detach().requires_grad_()
        # Tasks do not share rows, so the gradient of the sum holds each task's own gradient.
        losses = problem.support.value(point, first_order_only=not create_graph)
        (gradient,) = torch.autograd.grad(losses.sum(), point, create_graph=create_graph)
    return gradient + problem.regularizer.gradient(parameters, problem.initial, problem.strengths)
