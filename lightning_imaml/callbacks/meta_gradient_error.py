"""Log how far the meta-gradient is from the exact one."""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils import _pytree as pytree

from lightning_imaml.components import metric_names as names
from lightning_imaml.components.checks import require, require_at_least_one
from lightning_imaml.diagnostics.interface import require_interface
from lightning_imaml.diagnostics.nested_peaks import MONITOR
from lightning_imaml.diagnostics.reference import ExactReference, MetaGradientError
from lightning_imaml.episodes import Episode
from lightning_imaml.runtime import phases
from lightning_imaml.training.schedule import EveryNSteps, record

# "backbone" is missing here, since configure_model may build it after the callbacks' setup.
_NEEDED = ("inner_solver", "regularizer", "strengths", "inner_loss", "outer_loss", "meta_gradient")


class MetaGradientErrorMonitor(Callback):
    """Log the distance of the module's meta-gradient from the exact one: figure 2a of the paper (arXiv 1909.04630).

    In a due step, before the module trains on the batch, the monitor takes the first tasks of the batch. It compares
    the module's own ``meta_gradient`` with an ``ExactReference``, which solves the same inner problem and the linear
    system with the exact Hessian to tolerance. It logs the means over ranks of:

    - ``meta_gradient/relative_error``: ‖g − g*‖ / ‖g*‖, over all parameters and learned strengths;
    - ``meta_gradient/cosine``: the cosine of the angle between g and g*;
    - ``meta_gradient/reference_converged``: 1, or 0 where the reference missed a tolerance and so is not exact;
    - ``meta_gradient/reference_inner_residual``, ``meta_gradient/reference_linear_residual``: its two residuals;
    - ``meta_gradient/reference_indefinite``: the share of tasks whose exact system is not positive definite.

    Where the reference diverges or its system is singular, all but ``reference_converged`` are NaN.

    Training with and without the monitor gives the same weights: it restores random states and buffers, leaves
    ``.grad`` alone, and works on a copy of the backbone. A due step costs about ``reference_steps`` inner
    steps and hundreds of Hessian products.

    Args:
        every_n_steps: how often, in optimizer steps.
        tasks: how many tasks of the batch to use.
        reference_steps: the most inner steps of the reference.
        reference_tol: the reference's absolute tolerance on ‖∇_φ G‖.
        reference_linear_steps: the most MINRES iterations of the reference.
        reference_rtol: the reference's relative tolerance on the linear system.
        direct_limit: the most parameters for which the reference factorises the linear system instead.
        double: compute the reference in float64, see ``ExactReference``.

    Raises:
        ValueError: ``every_n_steps`` or ``tasks`` is below one; in ``setup``, step sizes are learned.
        TypeError: in ``setup``, the module has no meta-gradient to compare.
    """

    def __init__(
        self,
        every_n_steps: int = 100,
        tasks: int = 1,
        reference_steps: int = 1000,
        reference_tol: float = 1e-6,
        reference_linear_steps: int = 1000,
        reference_rtol: float = 1e-6,
        direct_limit: int = 512,
        double: bool = True,
    ) -> None:
        require_at_least_one("tasks", tasks, "Remove the callback to switch it off.")
        self.every_n_steps = every_n_steps
        self.tasks = tasks
        self.reference = ExactReference(
            reference_steps, reference_tol, reference_linear_steps, reference_rtol, direct_limit, double
        )
        self._schedule = EveryNSteps(every_n_steps)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that the module has what the comparison needs."""
        require_interface(self, pl_module, _NEEDED)
        self.reference.inner_solver(pl_module.inner_solver)
        solver, requirement = pl_module.inner_solver, "fixed, since the exact meta-gradient does not depend on them"
        remedy = "Remove the callback, or set learned=False."
        fixed = not getattr(solver, "learned", False)
        require(fixed, self, "the inner solver's step sizes", requirement, solver, remedy)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Compare and log, if due."""
        if not self._schedule.due(trainer.global_step):
            return
        with phases.phase(MONITOR):
            error = self.measure(trainer, pl_module, Episode.of(batch))
        metrics = {
            "relative_error": error.relative_error,
            "cosine": error.cosine,
            "reference_converged": float(error.converged),
            "reference_inner_residual": error.inner_residual,
            "reference_linear_residual": error.linear_residual,
            "reference_indefinite": error.indefinite,
        }
        record(trainer, {names.META_GRADIENT + name: value for name, value in metrics.items()}, reduce_op="mean")

    def measure(self, trainer: Trainer, module: Any, episode: Episode) -> MetaGradientError:
        """Compare the module's meta-gradient of the first tasks with the reference, leaving no trace in the module."""
        tasks = pytree.tree_map(lambda t: t[: self.tasks], episode)
        buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
        with isolate_rng():
            try:
                # The estimate runs in the precision of training, the reference in full precision.
                with trainer.precision_plugin.train_step_context():
                    estimate = module.meta_gradient(tasks)
                exact = self.reference.meta_gradient(
                    module.backbone,
                    tasks,
                    loss=module.inner_loss,
                    outer_loss=module.outer_loss,
                    inner_solver=module.inner_solver,
                    regularizer=module.regularizer,
                    strengths=module.strengths,
                    adapt_only=getattr(module, "adapt_only", None),
                    chunk_size=module.chunk_size,
                )
            except (FloatingPointError, torch.linalg.LinAlgError):  # type: ignore[attr-defined]
                # The reference may diverge, since it takes more steps than training does: training can go on. A bad
                # task does not stop it here either, since the training step reports it on all ranks.
                return MetaGradientError(math.nan, math.nan, False, math.nan, math.nan, math.nan)
            finally:
                for buffer, before in buffers:
                    buffer.copy_(before)
        return self.reference.compare(estimate.grads, exact)
