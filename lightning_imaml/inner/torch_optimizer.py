"""Any element-wise optimizer of torch.optim as the inner solver."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from lightning_imaml.components.checks import require
from lightning_imaml.components.stopping import all_done
from lightning_imaml.inner.base import InnerSolution, InnerSolver, attach, require_no_derivative
from lightning_imaml.problems.base import InnerProblem

# The updates of these optimizers mix the entries of a tensor, and so the tasks of the matrix.
_NOT_ELEMENTWISE = ("LBFGS", "Muon", "Adafactor", "SparseAdam")


# A checkpoint holds the optimizer's class by name. Loading PyTorch's own classes is safe.
torch.serialization.add_safe_globals(
    [found for found in vars(torch.optim).values() if isinstance(found, type) and issubclass(found, Optimizer)]
)


@dataclass(frozen=True)
class TorchOptimizer(InnerSolver):
    """An optimizer of ``torch.optim`` over the ``[T, D]`` matrix: SGD with momentum, Adam, RMSprop ….

    The update must be element-wise, so that tasks do not mix.

    Args:
        optimizer: the optimizer's class.
        steps: the most steps a task takes.
        options: its keyword arguments, the learning rate among them.
        tol: a task stops when ‖∇G‖ ≤ tol.
        check_every: after how many steps the host looks whether all tasks are done. It waits for the device when it
            looks, and never looks with ``tol=0``. The results do not depend on it.

    Raises:
        ValueError: the optimizer is known not to be element-wise, ``steps`` or ``check_every`` is below 1, or ``tol``
            is negative; in use, an estimator asks to differentiate the steps.
    """

    optimizer: type[Optimizer]
    steps: int
    options: Mapping[str, Any] = field(default_factory=dict)
    tol: float = 0.0
    check_every: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        name = self.optimizer.__name__
        remedy = "Use SGD, Adam or RMSprop, or HessianFree for second-order steps."
        separate = name not in _NOT_ELEMENTWISE
        require(separate, self, "optimizer", "element-wise, so that tasks do not mix", name, remedy)

    def solve(self, problem: InnerProblem, parameters: Tensor, differentiable_steps: int = 0) -> InnerSolution:
        """Minimise G from ``parameters``, see :meth:`InnerSolver.solve`."""
        require_no_derivative(self, differentiable_steps)
        rows = parameters.detach().clone()
        optimizer = self.optimizer([rows], **self.options)
        taken = torch.zeros(rows.shape[0], dtype=torch.long, device=rows.device)
        active = torch.ones_like(taken, dtype=torch.bool)
        with torch.no_grad():
            for k in range(self.steps):
                rows.grad = None  # Free [T, D] before the next gradient is computed.
                rows.grad = problem.residual(rows)
                if self.tol > 0:
                    active = active & (rows.grad.norm(dim=1) > self.tol)
                    if all_done(active, k + 1, self.check_every):
                        break
                before = rows.clone() if self.tol > 0 else rows
                optimizer.step()
                if self.tol > 0:
                    rows.copy_(torch.where(active.unsqueeze(1), rows, before))
                taken += active
        return InnerSolution(attach(rows.detach(), parameters), taken)
