"""Linear regression tasks with a prescribed Hessian, and their exact meta-gradient by dense solves in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_imaml import Episode
from lightning_imaml.functional import MetaGradient, meta_gradient
from lightning_imaml.inner import InnerSolver
from lightning_imaml.meta_gradients import Estimator
from lightning_imaml.regularizers import Proximal


@dataclass(frozen=True)
class RegressionTasks:
    """Tasks of a linear model without bias under the mean squared error.

    The eigenvalues of ∇²G = ∇²L + λI are the same for every task, log-spaced from 1/κ to 1, with λ = 1/(2κ); the
    eigenvectors are drawn for each task. So G is 1-smooth, its condition number is κ, and 1 is the step size 1/L.
    Nothing below uses the package's derivatives or solvers, but for :meth:`estimate`, which is what is to be judged.

    Attributes:
        model: θ.
        episode: inputs ``[T, n, D]`` and targets ``[T, n, 1]``.
        strength: λ.
    """

    model: nn.Linear
    episode: Episode
    strength: float

    @classmethod
    def draw(cls, tasks: int, samples: int, features: int, condition: float, noise: float = 0.1) -> RegressionTasks:
        """Draw tasks from PyTorch's default generator.

        Args:
            tasks: T.
            samples: n, for the support and the query set each; at least ``features``.
            features: D.
            condition: κ > 1.
            noise: the standard deviation of the targets' noise.
        """
        if samples < features:
            raise ValueError(f"samples must be at least the number of features, {features}; found {samples}.")

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=torch.float64)

        strength = 1 / (2 * condition)
        eigenvalues = condition ** torch.linspace(-1, 0, features, dtype=torch.float64) - strength
        scale = (eigenvalues / 2).sqrt()
        axes = torch.linalg.qr(normal(tasks, features, features)).Q.mT
        # Orthonormal columns make 2/n XᵀX exact on the support set; the query set is an ordinary sample.
        support = samples**0.5 * torch.linalg.qr(normal(tasks, samples, features)).Q * scale @ axes
        query = normal(tasks, samples, features) * scale @ axes
        weights = normal(tasks, features, 1)
        targets = [x @ weights + noise * normal(tasks, samples, 1) for x in (support, query)]
        model = nn.Linear(features, 1, bias=False, dtype=torch.float64)
        nn.init.normal_(model.weight)
        return cls(model, Episode(support, targets[0], query, targets[1]), strength)

    def hessian(self) -> Tensor:
        """∇²L: ``[T, D, D]``."""
        return _gram(self.episode.support_inputs)

    def query_hessian(self) -> Tensor:
        """∇²Q: ``[T, D, D]``."""
        return _gram(self.episode.query_inputs)

    def query_gradient(self, parameters: Tensor) -> Tensor:
        """∇Q at ``[T, D]`` parameters: ``[T, D]``."""
        inputs, targets = self.episode.query_inputs, self.episode.query_targets
        return _mean_product(inputs, inputs @ parameters.unsqueeze(2) - targets)

    def solution(self) -> Tensor:
        """φ*, where ∇G = 0: ``[T, D]``."""
        pull = self.strength * self.model.weight.detach()
        rhs = _mean_product(self.episode.support_inputs, self.episode.support_targets) + pull
        return torch.linalg.solve(self._inner_hessian(), rhs)

    def exact(self) -> Tensor:
        """The meta-gradient (I + ∇²L/λ)⁻¹ ∇Q(φ*) of each task: ``[T, D]``."""
        return self.strength * torch.linalg.solve(self._inner_hessian(), self.query_gradient(self.solution()))

    def _inner_hessian(self) -> Tensor:
        return self.hessian() + self.strength * torch.eye(self.model.in_features, dtype=torch.float64)

    def estimate(self, inner_solver: InnerSolver, estimator: Estimator) -> MetaGradient:
        """The package's meta-gradient, averaged over the tasks."""
        return meta_gradient(
            self.model,
            self.episode,
            loss=F.mse_loss,
            inner_solver=inner_solver,
            estimator=estimator,
            regularizer=Proximal(self.strength),
        )

    def relative_error(self, estimate: MetaGradient) -> float:
        """‖g − g*‖ / ‖g*‖ of the averages over the tasks."""
        exact = self.exact().mean(dim=0)
        return float((estimate.grads["weight"].flatten() - exact).norm() / exact.norm())


def _gram(inputs: Tensor) -> Tensor:
    return 2 / inputs.shape[1] * inputs.mT @ inputs


def _mean_product(inputs: Tensor, values: Tensor) -> Tensor:
    return (2 / inputs.shape[1] * inputs.mT @ values).squeeze(2)
