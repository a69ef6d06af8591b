"""Inner problems beyond supervised losses: conditions F = 0 that a user writes for one task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_imaml.components.base import Component


class Condition(Component, ABC):
    """A condition F(φ, ω) = 0 on the solution φ of one task, where ω are a network's parameters.

    The base of :class:`Root`, :class:`FixedPoint` and :class:`Equilibrium`. A subclass is a frozen dataclass whose
    methods see one task; the package batches them. The solution is a floating-point tensor or a pytree of them.
    """

    @abstractmethod
    def start(self, network: nn.Module, inputs: Any) -> Any:
        """The first iterate.

        Args:
            network: has the parameters; call it, or use its attributes.
            inputs: of one task.
        """

    @abstractmethod
    def condition(self, solution: Any, network: nn.Module, inputs: Any) -> Any:
        """F, of the structure of the solution."""


class Root(Condition):
    """Find φ with F(φ, ω) = 0 for any F, given by :meth:`residual`.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class Kepler(Root):  # E − e sin E = M, for the eccentricity e that the network holds
        ...     def start(self, network, inputs):
        ...         return inputs
        ...     def residual(self, solution, network, inputs):
        ...         return solution - network.weight[0, 0] * solution.sin() - inputs
    """

    @abstractmethod
    def residual(self, solution: Any, network: nn.Module, inputs: Any) -> Any:
        """F(φ, ω) of one task, of the structure of the solution."""

    def condition(self, solution: Any, network: nn.Module, inputs: Any) -> Any:
        """F itself."""
        return self.residual(solution, network, inputs)


class FixedPoint(Condition):
    """Find φ = T(φ, ω), given by :meth:`map`: F = φ − T(φ). Value iteration and equilibrium networks are of this kind.

    ``GradientDescent(lr=1.0, steps)`` on it is Picard's iteration φ ← T(φ).
    """

    @abstractmethod
    def map(self, solution: Any, network: nn.Module, inputs: Any) -> Any:
        """T(φ, ω) of one task, of the structure of the solution."""

    def condition(self, solution: Any, network: nn.Module, inputs: Any) -> Any:
        """φ − T(φ)."""
        moved = self.map(solution, network, inputs)
        require_alike(self, solution, moved)  # A difference of other shapes would be broadcast.
        return pytree.tree_map(torch.sub, solution, moved)


class Equilibrium(Condition):
    """Find φ where the gradient of a loss in its live argument is zero: F = ∇_live ℓ(live, frozen) at frozen = live.

    This is what a stopped target means: temporal differences, actor-critic, games. ``detach()`` gives the same F, but
    hides from ∂F that the frozen argument moves with the solution, so that an implicit gradient through it is wrong.
    """

    @abstractmethod
    def loss(self, live: Any, frozen: Any, network: nn.Module, inputs: Any) -> Tensor:
        """ℓ, a scalar."""

    def condition(self, solution: Any, network: nn.Module, inputs: Any) -> Any:
        """∇_live ℓ(live, frozen) at frozen = live = φ."""
        return torch.func.grad(lambda live: self.loss(live, solution, network, inputs))(solution)


def require_alike(owner: object, solution: Any, found: Any) -> None:
    """Raise a ValueError unless a tree has the structure, the shapes and the dtype of a solution."""
    (expected, structure), (leaves, own) = pytree.tree_flatten(solution), pytree.tree_flatten(found)
    kinds = [
        [f"{list(t.shape)} {t.dtype}" if isinstance(t, Tensor) else str(t) for t in part] for part in (expected, leaves)
    ]
    if structure != own or kinds[0] != kinds[1]:
        raise ValueError(
            f"{type(owner).__name__} must give the structure, shapes and dtype of its solution, {', '.join(kinds[0])}; "
            f"found {', '.join(kinds[1])}. Return one number for each number of the solution, with .to(dtype) where "
            "the dtype differs."
        )
