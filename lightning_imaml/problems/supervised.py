"""A model, a loss and a regulariser as functions of ``[tasks, D]`` parameters.

Row i of a parameter matrix holds all trainable parameters of the network that task i adapts, raveled in the order of
``named_parameters()``. Each function here is one batched operation over all rows.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.linalg import vector_norm
from torch.utils import _pytree as pytree

from lightning_imaml._compile import door as compilation
from lightning_imaml.problems.network import FlatModel
from lightning_imaml.problems.vmap import over_tasks
from lightning_imaml.regularizers.base import Regularizer

if TYPE_CHECKING:
    from typing_extensions import Self

LossFunction = Callable[[Any, Any], Tensor]
"""Takes one task's outputs ``[n, ...]`` and targets ``[n, ...]``, gives a scalar."""


@dataclass(frozen=True, eq=False)
class TaskLoss:
    """The loss of T tasks on one of their two sets: L (support) or Q (query).

    Attributes:
        model: the network.
        loss: ``loss(outputs, targets) -> scalar`` for one task.
        inputs: ``[T, n, ...]``, or from :func:`support_set.joined`.
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

    def outputs(self, parameters: Tensor, once: bool = False) -> Any:
        """The network's outputs ``[T, n, ...]`` at ``[T, D]`` parameters; ``once``: not to be differentiated twice."""
        return self.check(self.model(parameters, self.inputs, self.state, self.support_rows, once))

    def check(self, outputs: Any) -> Any:
        """The outputs themselves, if they have one entry for each class that the targets name."""
        if self.classes is not None and isinstance(outputs, Tensor) and outputs.ndim > 2:
            found = outputs.shape[2]
            if found < self.classes:
                raise ValueError(
                    f"targets must lie in 0 … {found - 1}, since the backbone has {found} outputs; found "
                    f"{self.classes - 1}. Give the backbone one output for each way, or relabel the episode to 0 … N-1."
                )
        return outputs

    def of(self, outputs: Any) -> Tensor:
        """The losses ``[T]`` of given outputs."""
        losses: Tensor = over_tasks(self.loss, getattr(self.loss, "__func__", self.loss), outputs, self.targets)
        if losses.ndim != 1:
            raise ValueError(
                f"loss must give one number for each task; found a tensor of shape {list(losses.shape[1:])}. "
                "Average over the task's samples, as reduction='mean' does."
            )
        return losses

    def value(self, parameters: Tensor, once: bool = False) -> Tensor:
        """The losses ``[T]`` at ``[T, D]`` parameters; ``once``: not to be differentiated twice."""
        return self.of(self.outputs(parameters, once))


@dataclass(frozen=True, eq=False)
class InnerProblem:
    """The inner problem of T tasks: minimise G_i(φ_i) = L_i(φ_i) + R(φ_i, θ, λ) over the rows φ_i (paper, eq. 3).

    Attributes:
        support: L, the loss on the support sets.
        regularizer: R.
        initial: θ as one row ``[D]``; where the inner loop starts and what R pulls towards.
        strengths: the regulariser's learned values λ.
        rates: the inner solver's learned step sizes.
    """

    support: TaskLoss
    regularizer: Regularizer
    initial: Tensor
    strengths: Mapping[str, Tensor]
    rates: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "regularizer", self.regularizer.for_layout(self.support.model.layout))

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

    def meta_parameters(self) -> dict[str, Tensor]:
        """All besides θ, under their names in :attr:`MetaGradient.grads`: ω, λ and learned step sizes."""
        strengths = {f"regularizer.{name}": value for name, value in self.strengths.items()}
        rates = {f"inner_solver.{name}": value for name, value in self.rates.items()}
        return self.support.shared() | strengths | rates

    def with_meta_parameters(self, values: Mapping[str, Tensor]) -> Self:
        """The same problem with other values of :meth:`meta_parameters`."""
        shared = {name: values[name] for name in self.support.model.shared}
        return replace(
            self,
            support=self.support.with_shared(shared),
            strengths={name: values[f"regularizer.{name}"] for name in self.strengths},
            rates={name: values[f"inner_solver.{name}"] for name in self.rates},
        )

    def signature(self) -> Hashable:
        """What else the problem depends on."""
        return self.support.signature(), self.regularizer

    def start(self) -> Tensor:
        """θ as the first iterate of every task: ``[T, D]``."""
        return self.initial.expand(self.tasks, -1).contiguous()

    def value(self, parameters: Tensor) -> Tensor:
        """G: ``[T]``."""
        value: Tensor = compilation.run(_value, self, parameters, repeated=True)
        return value

    def gradient(self, parameters: Tensor) -> Tensor:
        """∇G: ``[T, D]``, differentiable again where gradients are enabled and the parameters require them."""
        gradient: Tensor = compilation.run(_gradient, self, parameters, repeated=True)
        return gradient

    def residual(self, parameters: Tensor) -> Tensor:
        """‖∇G‖, how far the parameters are from a solution: ``[T]``."""
        with torch.no_grad():
            residual: Tensor = vector_norm(self.gradient(parameters), dim=1)
        return residual


def _value(problem: InnerProblem, parameters: Tensor) -> Tensor:
    penalty = problem.regularizer.penalty(parameters, problem.initial, problem.strengths)
    return problem.support.value(parameters, once=not torch.is_grad_enabled()) + penalty


def _gradient(problem: InnerProblem, parameters: Tensor) -> Tensor:
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        point = parameters if parameters.requires_grad else parameters.detach().requires_grad_()
        # Tasks do not share rows, so the gradient of the sum holds each task's own gradient.
        losses = problem.support.value(point, once=not create_graph)
        (gradient,) = torch.autograd.grad(losses.sum(), point, create_graph=create_graph)
    return gradient + problem.regularizer.gradient(parameters, problem.initial, problem.strengths)
