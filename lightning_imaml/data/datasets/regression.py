"""Regression tasks that are drawn from formulas: sinusoids, and linear functions with Gaussian weights."""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from numpy.random import Generator
from torch import Tensor

from lightning_imaml.data.base import TaskDataModule, require_range, split_setting
from lightning_imaml.data.sampling import Range, Shape, ShapeSource, TaskSource, random_of
from lightning_imaml.episodes import Episode


class RegressionTasks(TaskSource):
    """Tasks of a :class:`RegressionDataModule`; their shapes are of one way.

    Args:
        module: draws the points.
        split: "train", "val" or "test".
        shapes: gives the shape that belongs to a number.
        seed: the seed of the episodes.
    """

    def __init__(self, module: RegressionDataModule, split: str, shapes: ShapeSource, seed: int) -> None:
        module = copy.copy(module)
        # What loader workers that are spawned need not be sent, and perhaps could not. The hook, where there is one,
        # belongs to the original with its trainer.
        module.trainer = module.transform = module.train_transform = None
        vars(module).pop("on_after_batch_transfer", None)
        self.draw, self.split, self.shapes, self.seed = module.draw, split, shapes, seed

    def shape(self, number: int) -> Shape:
        """The shape that belongs to a number."""
        return self.shapes(number)

    def episode(self, tasks: Sequence[int], shape: Shape) -> Episode:
        """Inputs and targets ``[T, K, ...]`` and ``[T, Q, ...]``."""
        drawn = [self.draw(random_of(self.seed, self.split, task), shape.shots + shape.queries) for task in tasks]
        x, y = (torch.stack(points).float() for points in zip(*drawn, strict=True))
        return Episode(x[:, : shape.shots], y[:, : shape.shots], x[:, shape.shots :], y[:, shape.shots :])


class RegressionDataModule(TaskDataModule):
    """The base of regression tasks whose points are drawn from a formula; a subclass says in :meth:`draw` how.

    Args:
        shots: support points a task, K, or the range ``(lowest, highest)`` to draw them from; likewise the others.
        queries: query points a task, Q, in training.
        eval_shots: support points a task in validation and test; None for the same as ``shots``.
        eval_queries: query points a task in validation and test; None for the same as ``queries``.
        **options: those of :class:`TaskDataModule`.
    """

    def __init__(
        self,
        *,
        shots: Range = 10,
        queries: Range = 10,
        eval_shots: Range | None = None,
        eval_queries: Range | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        require_range("shots", shots, 1)
        require_range("queries", queries, 1)
        require_range("eval_shots", shots if eval_shots is None else eval_shots, 1)
        require_range("eval_queries", queries if eval_queries is None else eval_queries, 1)

    @abstractmethod
    def draw(self, random: Generator, points: int) -> tuple[Tensor, Tensor]:
        """Draw a task and points of it.

        Args:
            random: gives uniform doubles, ``random.random(shape)``.
            points: the number of points n.

        Returns:
            Inputs ``[n, ...]`` and targets ``[n, ...]``.
        """

    def tasks(self, split: str) -> RegressionTasks:
        """The tasks of a split."""
        shots, queries = (split_setting(self.hparams, split, name) for name in ("shots", "queries"))
        seed = self.hparams["seed"]
        return RegressionTasks(self, split, ShapeSource(split, 1, shots, queries, seed), seed)


class SinusoidDataModule(RegressionDataModule):
    """Few-shot regression of sinusoids y = A sin(x − p), the first experiment of MAML.

    Amplitude A, phase p and inputs x are uniform in the ranges of
    `Finn et al. (2017) <https://arxiv.org/abs/1703.03400>`_, section 5.1. Inputs and targets are ``[T, n, 1]``.

    Args:
        amplitude: the range of A.
        phase: the range of p.
        inputs: the range of x.
        **options: those of :class:`RegressionDataModule`.

    Raises:
        ValueError: a range is empty, or an argument is out of its range.
    """

    def __init__(
        self,
        *,
        amplitude: tuple[float, float] = (0.1, 5.0),
        phase: tuple[float, float] = (0.0, math.pi),
        inputs: tuple[float, float] = (-5.0, 5.0),
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.ranges = (amplitude, phase, inputs)
        for name, (low, high) in zip(("amplitude", "phase", "inputs"), self.ranges, strict=True):
            if not low <= high:
                raise ValueError(f"{name} must be the lowest and the highest of a range; found {(low, high)}.")

    def draw(self, random: Generator, points: int) -> tuple[Tensor, Tensor]:
        """Points of one sinusoid, ``[n, 1]`` each."""
        uniforms = torch.from_numpy(random.random(2 + points))
        (amplitude, phase), x = uniforms[:2], uniforms[2:, None]
        amplitude, phase, x = (
            low + (high - low) * u for u, (low, high) in zip((amplitude, phase, x), self.ranges, strict=True)
        )
        return x, amplitude * torch.sin(x - phase)


class LinearRegressionDataModule(RegressionDataModule):
    r"""Linear regression with Gaussian weights, whose best initialisation and predictions are known in closed form.

    A task is :math:`y = w^\top x + \sigma\varepsilon` with :math:`w \sim N(\mu\mathbf{1}, \tau^2 I)` and x, ε standard
    normal. Given the task's support set, the posterior mean of w is the minimiser of
    :math:`\frac{1}{2}\|y - Xw\|^2 + \frac{\sigma^2}{2\tau^2}\|w - \mu\mathbf{1}\|^2`: the solution of the proximal
    inner problem with the initialisation :math:`\mu\mathbf{1}`. Inputs are ``[T, n, features]``, targets ``[T, n, 1]``.

    Args:
        features: the dimension of x.
        mean: μ, the mean of each weight.
        spread: τ, the standard deviation of each weight over tasks.
        noise: σ, the standard deviation of the noise.
        **options: those of :class:`RegressionDataModule`.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self, *, features: int = 10, mean: float = 1.0, spread: float = 1.0, noise: float = 0.1, **options: Any
    ) -> None:
        super().__init__(**options)
        if features < 1 or spread < 0 or noise < 0:
            raise ValueError(
                f"features must be at least 1, spread and noise at least 0; found {features}, {spread} and {noise}."
            )
        self.features, self.mean, self.spread, self.noise = features, mean, spread, noise

    def draw(self, random: Generator, points: int) -> tuple[Tensor, Tensor]:
        """Points of one linear function, ``[n, features]`` and ``[n, 1]``."""
        uniforms = torch.from_numpy(random.random(self.features + points * (self.features + 1)))
        # By the inverse of the normal distribution: NumPy's own normal numbers may change with its version.
        normal = torch.special.ndtri(uniforms.clamp(min=2.0**-54))
        weights, noise, x = normal.split([self.features, points, points * self.features])
        x = x.view(points, self.features)
        y = x @ (self.mean + self.spread * weights) + self.noise * noise
        return x, y[:, None]
