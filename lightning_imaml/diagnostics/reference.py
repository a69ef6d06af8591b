"""The exact meta-gradient of an episode, and how far an estimate is from it."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_imaml.curvature import Hessian
from lightning_imaml.episodes import Episode
from lightning_imaml.functional import MetaGradient, meta_gradient
from lightning_imaml.linear import Direct, LinearSolver, MinRes
from lightning_imaml.meta_gradients import Implicit
from lightning_imaml.problems.network import FlatModel


class MetaGradientError(NamedTuple):
    """How far a meta-gradient g is from the reference g*, and how far g* can be trusted.

    Attributes:
        relative_error: ‖g − g*‖ / ‖g*‖.
        cosine: ⟨g, g*⟩ / (‖g‖ ‖g*‖).
        converged: whether the inner and the linear residual of every task are within the reference's tolerances.
        inner_residual: the largest ‖∇_φ G‖ of a task at the reference's φ.
        linear_residual: the largest ‖b − A u‖ / ‖b‖ of a task.
        indefinite: the share of tasks whose exact system is not positive definite. Their φ is a stationary point but
            no minimum of the inner problem, or the inner problem is not solved.
    """

    relative_error: float
    cosine: float
    converged: bool
    inner_residual: float
    linear_residual: float
    indefinite: float


@dataclass(frozen=True)
class ExactReference:
    """The meta-gradient with the inner problem and the linear system solved to a tight tolerance.

    The inner solver runs from the same initialisation until ‖∇_φ G‖ ≤ ``tol``. Then the system with the exact Hessian
    is solved: by ``Direct`` up to ``direct_limit`` parameters, and by ``MinRes`` beyond, which also solves indefinite
    systems. The result is the paper's exact meta-gradient (arXiv 1909.04630, Lemma 1) to within the tolerances. A
    backbone that draws random numbers, as dropout does, has no such gradient, and its reference does not converge.

    Args:
        steps: the most inner steps.
        tol: the absolute tolerance on ‖∇_φ G‖.
        linear_steps: the most MINRES iterations.
        rtol: the relative tolerance of the linear system.
        direct_limit: the most parameters D for ``Direct``, which needs D Hessian products and D² numbers a task.
        double: compute in float64. The error of a Hessian product in float32 is about 1e-6 of the largest eigenvalue,
            and tolerances near that mean nothing. Set it to False for devices without float64, and for losses that
            hold float32 tensors.
    """

    steps: int = 1000
    tol: float = 1e-6
    linear_steps: int = 1000
    rtol: float = 1e-6
    direct_limit: int = 512
    double: bool = True

    def inner_solver(self, solver: Any) -> Any:
        """The module's inner solver with the steps and the tolerance of the reference.

        Raises:
            TypeError: the solver is not a dataclass with a field ``steps``.
        """
        fields = {field.name for field in dataclasses.fields(solver)} if dataclasses.is_dataclass(solver) else set()
        if "steps" not in fields:
            raise TypeError(
                f"inner_solver must be a dataclass with a field 'steps', so that it can run until convergence; "
                f"found {type(solver).__name__}. Use a solver of lightning_imaml.inner, or compute without reference."
            )
        return dataclasses.replace(
            solver, **{k: v for k, v in (("steps", self.steps), ("tol", self.tol)) if k in fields}
        )

    def linear_solver(self, size: int) -> LinearSolver:
        """The linear solver for ``size`` parameters."""
        return Direct() if size <= self.direct_limit else MinRes(self.linear_steps, rtol=self.rtol)

    def meta_gradient(
        self,
        model: nn.Module,
        episode: Episode,
        *,
        inner_solver: Any,
        strengths: Mapping[str, Tensor] | None = None,
        adapt_only: Sequence[str] | None = None,
        **problem: Any,
    ) -> MetaGradient:
        """Compute the reference; ``model`` stays unchanged.

        Args:
            model: the backbone at the initialisation θ.
            episode: the tasks.
            inner_solver: the solver, whose steps and tolerance the reference replaces.
            strengths: learned strengths of the regulariser.
            adapt_only: patterns over the names of the parameters that adapt; None for all.
            **problem: ``loss``, ``outer_loss``, ``regularizer`` and ``chunk_size`` of ``functional.meta_gradient``.

        Raises:
            TypeError: the inner solver has no field ``steps``, see :meth:`inner_solver`.
            FloatingPointError: the inner solver diverges in its further steps.
            torch.linalg.LinAlgError: the exact system is singular.
        """
        solver = self.inner_solver(inner_solver)
        size = sum(FlatModel(model, adapt_only=adapt_only).layout.sizes)
        # Copy in any case: the forward passes may write to buffers.
        model = copy.deepcopy(model)
        values = None if strengths is None else {name: value.detach() for name, value in strengths.items()}
        if self.double:
            model = model.double()
            episode, values = pytree.tree_map_only(Tensor, _double, (episode, values))
        estimator = Implicit(self.linear_solver(size), curvature=Hessian())
        return meta_gradient(
            model, episode, inner_solver=solver, estimator=estimator, strengths=values, adapt_only=adapt_only, **problem
        )

    def compare(self, grads: Mapping[str, Tensor], reference: MetaGradient) -> MetaGradientError:
        """Measure the distance of ``grads``, name to gradient, from the reference, over all names together."""
        exact = torch.cat([g.detach().reshape(-1).double().cpu() for g in reference.grads.values()])
        # Convert after the move to the CPU: MPS has no float64.
        found = torch.cat([grads[name].detach().reshape(-1).cpu().double() for name in reference.grads])
        scale = exact.norm()
        inner = float(reference.adapted.residual.max())
        linear = reference.linear
        assert linear is not None
        residual = float(linear.residual.max())
        return MetaGradientError(
            relative_error=float((found - exact).norm() / scale),
            cosine=float(found @ exact / (found.norm() * scale)),
            # NaN compares as false, so it counts as not converged.
            converged=inner <= self.tol and residual <= self.rtol,
            inner_residual=inner,
            linear_residual=residual,
            indefinite=float(linear.indefinite.double().mean()),
        )


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor
