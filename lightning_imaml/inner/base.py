"""The interface of inner solvers, and the loop that stepping solvers share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping
from dataclasses import fields
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from lightning_imaml.components.base import Component
from lightning_imaml.components.checks import require
from lightning_imaml.components.stopping import all_done
from lightning_imaml.parameters.positive import Bounds, Granularity, Positive, Value, place, require_positive
from lightning_imaml.parameters.rows import Rows
from lightning_imaml.problems.base import InnerProblem

State = tuple[Tensor, ...]
"""Tensors with a leading task dimension; the first holds the parameters ``[T, D]``."""


class InnerSolution(NamedTuple):
    """The outcome of the inner loop for T tasks.

    Attributes:
        parameters: φ, ``[T, D]``.
        steps: the steps that each task took, ``[T]``.
    """

    parameters: Tensor
    steps: Tensor


class InnerSolver(Component, ABC):
    """Minimises G_i for all tasks at once, each until ‖∇G_i‖ ≤ ``tol`` or for ``steps`` steps.

    Where G is μ-strongly convex, ‖∇G‖ ≤ tol bounds the distance to the solution by tol/μ.
    """

    steps: int
    tol: float
    check_every: int = 1
    """After how many steps the host looks whether all tasks are done; it never looks with ``tol=0``."""

    def __post_init__(self) -> None:
        require(self.steps >= 1, self, "steps", "at least 1", self.steps, "The paper takes 16 for 5-way Omniglot.")
        require(self.tol >= 0, self, "tol", "zero or positive", self.tol, "Use 0 to take all steps.")
        require(self.check_every >= 1, self, "check_every", "at least 1", self.check_every, "Use 1 for every step.")

    def rates(self, model: Rows) -> dict[str, Tensor]:
        """The learned step sizes at the start, by names without dots; empty where nothing is learned."""
        return {}

    @abstractmethod
    def solve(self, problem: InnerProblem, parameters: Tensor, differentiable_steps: int = 0) -> InnerSolution:
        """Minimise G from ``parameters``.

        Args:
            problem: the tasks.
            parameters: the first iterate, ``[T, D]``.
            differentiable_steps: how many of the last steps keep their graph; memory grows with these alone. The
                derivative takes the iterate before them as ``parameters`` plus a constant.

        Raises:
            ValueError: the solver's steps cannot be differentiated.
        """


class SteppingSolver(InnerSolver):
    """An inner solver that defines one step; :meth:`solve` stops and differentiates."""

    positions: ClassVar[int] = 1
    """How many of the state's first entries are points in parameter space, which depend on the initialisation."""
    differentiable: ClassVar[bool] = True

    @abstractmethod
    def init(self, problem: InnerProblem, parameters: Tensor) -> State:
        """The state before the first step, from parameters ``[T, D]``."""

    @abstractmethod
    def step(self, problem: InnerProblem, state: State) -> tuple[State, Tensor]:
        """One step.

        Returns:
            The next state, and ∇G ``[T, D]`` at the parameters before the step.
        """

    def solve(self, problem: InnerProblem, parameters: Tensor, differentiable_steps: int = 0) -> InnerSolution:
        """Minimise G from ``parameters``, see :meth:`InnerSolver.solve`."""
        if not self.differentiable:
            require_no_derivative(self, differentiable_steps)
        constant_steps = self.steps - differentiable_steps
        with torch.no_grad():
            state = self.init(problem, parameters.detach())
        taken = torch.zeros(parameters.shape[0], dtype=torch.long, device=parameters.device)
        active = torch.ones_like(taken, dtype=torch.bool)
        anchor = parameters if parameters.requires_grad else None
        del parameters  # Free [T, D] during the steps.
        for k in range(self.steps):
            if k == constant_steps:
                state = self._attached(state, anchor)
            with torch.set_grad_enabled(k >= constant_steps):
                following, gradient = self.step(problem, state)
                if self.tol > 0:
                    active = active & (gradient.detach().norm(dim=1) > self.tol)
                    if all_done(active, k + 1, self.check_every):
                        break
                    following = tuple(
                        torch.where(active.view(-1, *[1] * (new.ndim - 1)), new, old)
                        for new, old in zip(following, state, strict=True)
                    )
                del gradient
                state = following
                taken += active
        if differentiable_steps == 0:
            state = self._attached(state, anchor)
        return InnerSolution(state[0], taken)

    def _attached(self, state: State, anchor: Tensor | None) -> State:
        return (*(attach(point, anchor) for point in state[: self.positions]), *state[self.positions :])


class StepSizes(SteppingSolver):
    """A stepping solver with a fixed or learned step size: one for all parameters, or one a pattern, layer or entry."""

    lr: Value
    learned: bool
    per: Granularity | None
    bounds: Bounds | None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "lr", self.lr, self.learned, self.per, self.bounds, "0.1 is a usual start.")

    # A dataclass would compare patterns as dicts, which have no hash and ignore their order: code compiled for one
    # order would run for another.
    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self._settings() == other._settings()

    def __hash__(self) -> int:
        return hash((type(self), self._settings()))

    def _settings(self) -> tuple[Hashable, ...]:
        values = [getattr(self, setting.name) for setting in fields(self)]  # type: ignore[arg-type]
        return tuple(tuple(value.items()) if isinstance(value, Mapping) else value for value in values)

    def rates(self, model: Rows) -> dict[str, Tensor]:
        """The learned parameter: a scalar, one number for each group, or one for each entry ``[D]``."""
        return self._placed(model).init(model)

    def step_sizes(self, model: Rows, rates: Mapping[str, Tensor], rows: Tensor) -> Tensor | float:
        """The step size of all entries, or one for each, ``[D]``, with the dtype and device of ``rows``."""
        return self._placed(model).values(rates, rows)

    def descend(self, problem: InnerProblem, parameters: Tensor, gradient: Tensor) -> Tensor:
        """φ − lr ∇G: ``[T, D]``."""
        lr = self.step_sizes(problem.rows, problem.rates, parameters)
        if isinstance(lr, float):
            return torch.add(parameters, gradient, alpha=-lr)
        return parameters - lr * gradient

    def _placed(self, model: Rows) -> Positive:
        return place("lr", self.lr, self.learned, self.per, self.bounds, model.layout)


def attach(point: Tensor, parameters: Tensor | None) -> Tensor:
    """Give ``point`` the derivative of ``parameters`` where these require a gradient, without changing its value."""
    if parameters is None or not parameters.requires_grad:
        return point
    with torch.enable_grad():
        return point + (parameters - parameters.detach())


def require_no_derivative(solver: InnerSolver, differentiable_steps: int) -> None:
    """Raise a ValueError if an estimator asks for derivatives of steps that have none."""
    argument, requirement = "the number of differentiated steps", "0, since its steps have no derivative"
    remedy = "Use Implicit, FirstOrder or Reptile, or the solver GradientDescent or Nesterov."
    require(differentiable_steps == 0, solver, argument, requirement, differentiable_steps, remedy)
