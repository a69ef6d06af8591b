"""Second derivatives of the inner objective, as products."""

import torch

from lightning_imaml.curvature.base import Curvature
from lightning_imaml.curvature.gauss_newton import GaussNewton
from lightning_imaml.curvature.hessian import Hessian
from lightning_imaml.problems.base import Linearization

__all__ = ["Curvature", "GaussNewton", "Hessian", "Linearization"]

# Checkpoints of earlier versions name these classes by the path of this package, which was one module then.
torch.serialization.add_safe_globals([(kind, f"{__name__}.{kind.__name__}") for kind in (GaussNewton, Hessian)])
