"""The conditions of T tasks as one inner problem over rows."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree
from typing_extensions import Self

from lightning_imaml.linear.operator import LinearOperator
from lightning_imaml.parameters.layout import Layout
from lightning_imaml.problems.base import InnerProblem, Linearization
from lightning_imaml.problems.condition import Condition, require_alike
from lightning_imaml.problems.vmap import vmap_tasks


class _Holder(nn.Module):
    """Runs functions of a network while ``functional_call`` has put other tensors in its place."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, function: Any, *trees: Any) -> Any:
        return function(*trees[:-1], self.network, trees[-1])


@dataclass(frozen=True)
class SolutionRows:
    """The solution of one task as a row ``[D]``: its structure and what the rows are made of."""

    structure: pytree.TreeSpec
    layout: Layout
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, solutions: Any) -> SolutionRows:
        """Those of solutions ``[T, ...]``.

        Raises:
            ValueError: the leaves are not floating-point tensors of one dtype.
        """
        leaves, structure = pytree.tree_flatten(solutions)
        dtypes = {leaf.dtype for leaf in leaves if isinstance(leaf, Tensor)}
        if len(dtypes) != 1 or not all(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in leaves):
            kinds = sorted({str(getattr(leaf, "dtype", type(leaf).__name__)) for leaf in leaves}) or ["nothing"]
            raise ValueError(
                f"start must return floating-point tensors of one dtype; found {', '.join(kinds)}. Convert them with "
                ".to(dtype), and keep indices in the inputs."
            )
        names = tuple(str(k) for k in range(len(leaves)))
        layout = Layout(names, tuple(tuple(leaf.shape[1:]) for leaf in leaves))
        return cls(structure, layout, leaves[0].dtype, leaves[0].device)

    def join(self, solutions: Any) -> Tensor:
        """Solutions ``[T, ...]`` to rows ``[T, D]``."""
        return self.layout.flatten(dict(zip(self.layout.names, pytree.tree_leaves(solutions), strict=True)))

    def split(self, rows: Tensor) -> Any:
        """Rows ``[T, D]`` to solutions ``[T, ...]``."""
        return pytree.tree_unflatten(list(self.layout.unflatten(rows).values()), self.structure)


@dataclass(frozen=True, eq=False)
class Conditions(InnerProblem):
    """The same condition for T tasks with inputs of their own.

    Attributes:
        condition: F of one task.
        network: the network; its parameters may be replaced by ``tensors``.
        inputs: ``[T, ...]``, a pytree.
        form: a solution as a row.
        first: the first iterates, ``[T, D]``.
        tensors: the network's parameters by name, and ``inputs.<k>`` for the k-th tensor of the inputs, where these are
            meta-parameters.
        rates: the inner solver's learned step sizes.
    """

    condition: Condition
    network: nn.Module
    inputs: Any
    form: SolutionRows
    first: Tensor
    tensors: Mapping[str, Tensor]
    rates: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, condition: Condition, network: nn.Module, inputs: Any, tensors: Mapping[str, Tensor]) -> Conditions:
        """Compute the first iterates.

        Raises:
            ValueError: a solution is not made of floating-point tensors of one dtype.
        """
        with torch.no_grad():
            starts = _for_all_tasks(type(condition), network, condition.start, tensors, inputs)
            rows = SolutionRows.of(starts)
            return cls(condition, network, inputs, rows, rows.join(starts), tensors)

    @property
    def rows(self) -> SolutionRows:
        """What a row holds."""
        return self.form

    @property
    def tasks(self) -> int:
        """The number of tasks T."""
        return len(self.first)

    def start(self) -> Tensor:
        """The first iterates: ``[T, D]``."""
        return self.first

    def residual(self, parameters: Tensor) -> Tensor:
        """F: ``[T, D]``.

        Raises:
            ValueError: it has other shapes, another structure or another dtype than the solution.
        """

        def checked(solution: Any, network: nn.Module, inputs: Any) -> Any:
            found = self.condition.condition(solution, network, inputs)
            require_alike(self.condition, solution, found)
            return found

        return self.form.join(self._call(checked, self.form.split(parameters), self.inputs))

    def linearize(self, parameters: Tensor, curvature: object = None) -> Linearization:
        """F and ∂_φ F around rows ``[T, D]``; a condition has no choice of curvature.

        Raises:
            ValueError: F does not depend on the solution.
        """
        with torch.enable_grad():
            point = parameters.detach().requires_grad_()
            residual = self.residual(point)
        if not residual.requires_grad:
            raise ValueError(
                f"{type(self.condition).__name__} must depend on its solution; found a condition that does not, so "
                "that no solution is determined. Use the solution in it, without detach()."
            )

        def transposed(vector: Tensor) -> Tensor:
            return torch.autograd.grad(residual, point, vector, retain_graph=True, materialize_grads=True)[0]

        @functools.cache
        def pullback() -> tuple[Tensor, Tensor]:
            with torch.enable_grad():  # (∂F)ᵀ w is linear in w, and its derivative in w is ∂F v.
                weight = torch.zeros_like(residual, requires_grad=True)
                return weight, torch.autograd.grad(residual, point, weight, create_graph=True)[0]

        def product(vector: Tensor) -> Tensor:
            weight, pulled = pullback()
            return torch.autograd.grad(pulled, weight, vector, retain_graph=True)[0]

        operator = LinearOperator(product, symmetric=False, transposed_product=transposed)
        return Linearization(parameters.new_zeros(self.tasks), residual.detach(), operator)

    def pull_back(self, parameters: Tensor, u: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """−Σ_i (∂_η F_i)ᵀ u_i for the network's parameters and the inputs; the first iterate has no influence."""
        with torch.enable_grad():
            values = {name: tensor.detach().requires_grad_() for name, tensor in self.tensors.items()}
            residual = self.with_meta_parameters(self.first, values).residual(parameters.detach())
            if not residual.requires_grad:
                return torch.zeros_like(self.first[0]), {name: torch.zeros_like(t) for name, t in values.items()}
            found = torch.autograd.grad(residual, list(values.values()), -u, materialize_grads=True, allow_unused=True)
        return torch.zeros_like(self.first[0]), dict(zip(values, found, strict=True))

    def meta_parameters(self) -> dict[str, Tensor]:
        """The network's parameters and the inputs that are differentiated."""
        return dict(self.tensors)

    def with_meta_parameters(self, initial: Tensor, values: Mapping[str, Tensor]) -> Self:
        """The same conditions with other parameters."""
        leaves, structure = pytree.tree_flatten(self.inputs)
        leaves = [values.get(f"inputs.{k}", leaf) for k, leaf in enumerate(leaves)]
        return replace(self, inputs=pytree.tree_unflatten(leaves, structure), tensors=values)

    def _call(self, function: Callable[..., Any], *trees: Any) -> Any:
        """A function of one task and the network, for all tasks, with these parameters in the network."""
        return _for_all_tasks(type(self.condition), self.network, function, self.tensors, *trees)


def _for_all_tasks(
    owner: object, network: nn.Module, function: Callable[..., Any], tensors: Mapping[str, Tensor], *trees: Any
) -> Any:
    named = {f"network.{name}": t for name, t in tensors.items() if not name.startswith("inputs.")}
    holder = _Holder(network)
    return vmap_tasks(lambda *task: functional_call(holder, named, (function, *task)), owner, *trees)
