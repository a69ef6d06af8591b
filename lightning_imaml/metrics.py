"""Metrics of few-shot tasks: each task counts once, and the mean over tasks has a confidence interval."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from torchmetrics import Metric, MetricCollection
from torchmetrics.aggregation import BaseAggregator
from torchmetrics.functional.classification import multiclass_calibration_error

from lightning_imaml.components import metric_names as names
from lightning_imaml.components.checks import require_at_least_one

_instances = count()


def is_classification(outputs: Any, targets: Any) -> bool:
    """Whether these are logits ``[T, n, ways]`` and class indices ``[T, n]``."""
    return (
        isinstance(outputs, Tensor)
        and isinstance(targets, Tensor)
        and not targets.is_floating_point()
        and outputs.ndim == 3
        and outputs.shape[:2] == targets.shape
    )


def ignore_index_of(module: nn.Module) -> int | None:
    """The class index that the outer loss of an :class:`~lightning_imaml.IMAMLModule` leaves out, if it has one."""
    loss = getattr(module, "query_loss", None)
    index: int | None = getattr(getattr(module, "loss", None) if loss is None else loss, "ignore_index", None)
    return index


def accuracy_of_tasks(outputs: Tensor, targets: Tensor, ignore_index: int | None = None) -> Tensor:
    """The share of right predictions of each task, ``[T]``, among the targets that are not ignored.

    Args:
        outputs: logits ``[T, n, ways]``.
        targets: class indices ``[T, n]``. A negative one is no class and is left out, as padding with -100 is.
        ignore_index: a class index that is left out, too.

    Returns:
        ``[T]``; NaN where outputs are, and where a task has no target that is kept.
    """
    kept = _kept(targets, ignore_index)
    right = (outputs.argmax(dim=-1) == targets) & kept
    return _nan_where(outputs, right.sum(dim=1).float() / kept.sum(dim=1))


class TaskMean(Metric):
    """The mean over all tasks of one number a task, or its 95 % interval.

    Every task counts the same, whatever its number of queries and the process that saw it. Mean and deviation are
    joined over batches and processes by the update of `Chan, Golub and LeVeque (1983)
    <https://doi.org/10.1080/00031305.1983.10483115>`_, which loses no digits where the mean is large. A task whose
    number is NaN makes both NaN.

    ``LightningModule.log(..., sync_dist=True)`` is off where processes have different numbers of tasks: Lightning 2.6
    averages the counts over processes as whole numbers.

    Args:
        interval95: compute half the width of the mean's 95 % interval instead of the mean: 1.96 s/√T, with s the
            standard deviation over the T tasks; 0 for a single task, which has no deviation.
        **kwargs: those of ``torchmetrics.Metric``.
    """

    is_differentiable = False
    full_state_update = True  # of ``forward``, which otherwise would add states up by itself
    tasks: Tensor
    mean: Tensor
    deviation: Tensor
    instance: Tensor

    def __init__(self, interval95: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.interval95 = interval95
        # A MetricCollection takes metrics for one and the same if their states happen to be equal after the first
        # batch, as accuracy and F1 score are where all is right. This state tells all but copies apart; it is the first
        # one, since torchmetrics 1.4 compares no other.
        self.add_state("instance", torch.tensor(float(next(_instances))), dist_reduce_fx="max")
        for name in ("tasks", "mean", "deviation"):
            self.add_state(name, torch.tensor(0.0), dist_reduce_fx=None)

    def update(self, values: Tensor) -> None:
        """Add tasks by their numbers, ``[T]``."""
        if not values.numel():
            return
        values = values.detach().to(torch.promote_types(values.dtype, torch.float32))
        mean = values.mean()
        tasks = torch.stack([self.tasks, torch.full_like(self.tasks, values.numel())])
        # Not in place: processes that were spawned with this metric share its first tensors.
        self.tasks, self.mean, self.deviation = _joined(
            tasks, torch.stack([self.mean, mean]), torch.stack([self.deviation, (values - mean).square().sum()])
        )

    def compute(self) -> Tensor:
        """The mean over tasks, NaN before the first; or half the width of its interval."""
        # With several processes these are [processes].
        tasks, mean, deviation = _joined(*(x.reshape(-1) for x in (self.tasks, self.mean, self.deviation)))
        if not self.interval95:
            return mean.where(tasks > 0, torch.nan)
        return 1.96 * (deviation / (tasks - 1).clamp(min=1) / tasks).sqrt()


def _joined(tasks: Tensor, mean: Tensor, deviation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Number, mean and sum of squared deviations of several groups together, from those of each group."""
    total = tasks.sum()
    joint = (tasks * mean).sum() / total.clamp(min=1)
    return total, joint, deviation.sum() + (tasks * (mean - joint).square()).sum()


class EpisodicMean(TaskMean):
    """The base of metrics that are a mean over tasks; a subclass gives the value of each task.

    Args:
        interval95: compute half the width of the mean's 95 % interval instead, see :class:`TaskMean`.
        **kwargs: those of ``torchmetrics.Metric``.
    """

    @abstractmethod
    def of_tasks(self, outputs: Any, targets: Any) -> Tensor:
        """The value of each task, ``[T]``, from outputs ``[T, n, ...]`` and targets ``[T, n, ...]``."""

    def update(self, outputs: Any, targets: Any) -> None:  # type: ignore[override]
        """Add tasks.

        Args:
            outputs: ``[T, n, ...]``; logits ``[T, n, ways]`` for classification.
            targets: ``[T, n, ...]``; class indices ``[T, n]`` for classification.
        """
        super().update(self.of_tasks(outputs, targets))


class EpisodicAccuracy(EpisodicMean):
    """The mean over tasks of each task's accuracy on its query set, a fraction in 0 … 1.

    Negative class indices are left out, as queries that are padded with a loss's ``ignore_index`` of -100 are. The mean
    is NaN with outputs that are, and with a task that has no target left.

    Args:
        interval95: compute half the width of the 95 % interval instead.
        ignore_index: a class index that is left out, too, such as a loss's ``ignore_index`` of 255.
        **kwargs: those of ``torchmetrics.Metric``.
    """

    higher_is_better = True

    def __init__(self, interval95: bool = False, ignore_index: int | None = None, **kwargs: Any) -> None:
        super().__init__(interval95, **kwargs)
        self.ignore_index = ignore_index

    def of_tasks(self, outputs: Any, targets: Any) -> Tensor:
        """The accuracy of each task, ``[T]``."""
        _require_classification(self, outputs, targets)
        return accuracy_of_tasks(outputs, targets, self.ignore_index)


class EpisodicInterval95(EpisodicAccuracy):
    """Half the width of the 95 % interval of :class:`EpisodicAccuracy`.

    1.96 s/√T, with s the standard deviation over the T tasks; 0 for a single task, which has no deviation.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(interval95=True, **kwargs)


class EpisodicLoss(EpisodicMean):
    """The mean over tasks of each task's loss on its query set.

    Args:
        loss: ``loss(outputs, targets) -> scalar`` for one task.
        interval95: compute half the width of the 95 % interval instead.
        **kwargs: those of ``torchmetrics.Metric``.
    """

    higher_is_better = False

    def __init__(
        self, loss: Callable[[Any, Any], Tensor] = F.cross_entropy, interval95: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(interval95, **kwargs)
        self.loss = loss

    def of_tasks(self, outputs: Any, targets: Any) -> Tensor:
        """The loss of each task, ``[T]``."""
        return _each(self.loss, outputs, targets)


class EpisodicCalibrationError(EpisodicMean):
    """The mean over tasks of each task's expected calibration error (`Guo et al. <https://arxiv.org/abs/1706.04599>`_).

    The expected distance between confidence and accuracy, over bins of confidence of equal width. A task's query set is
    small, and the error of a perfectly calibrated network is above zero on it: compare networks on the same tasks only.
    Targets are left out as in :class:`EpisodicAccuracy`.

    Args:
        bins: the number of bins.
        interval95: compute half the width of the 95 % interval instead.
        ignore_index: a class index that is left out besides the negative ones.
        **kwargs: those of ``torchmetrics.Metric``.
    """

    higher_is_better = False

    def __init__(
        self, bins: int = 15, interval95: bool = False, ignore_index: int | None = None, **kwargs: Any
    ) -> None:
        super().__init__(interval95, **kwargs)
        require_at_least_one("bins", bins, "Guo et al. have 15.")
        self.bins, self.ignore_index = bins, ignore_index

    def of_tasks(self, outputs: Any, targets: Any) -> Tensor:
        """The calibration error of each task, ``[T]``."""
        _require_classification(self, outputs, targets)
        ways = outputs.shape[-1]
        error = _on_kept(lambda p, t: multiclass_calibration_error(p, t, ways, self.bins), self.ignore_index)
        return _nan_where(outputs, _each(error, outputs.softmax(-1), targets))


class EpisodicMetric(EpisodicMean):
    """The mean over tasks of any metric of torchmetrics, computed on each task by itself.

    Of logits and class indices, targets are left out as in :class:`EpisodicAccuracy`.

    Example:
        >>> from torchmetrics.classification import MulticlassF1Score
        >>> f1 = EpisodicMetric(MulticlassF1Score(num_classes=5, average="macro"))

    Args:
        metric: takes a task's outputs ``[n, ...]`` and targets ``[n, ...]``, and computes one number; copied.
        interval95: compute half the width of the 95 % interval instead.
        ignore_index: a class index that is left out besides the negative ones.
        **kwargs: those of ``torchmetrics.Metric``.

    Raises:
        TypeError: the metric takes numbers instead of predictions and targets.
        ValueError: in use, the metric computes something else than one number.
    """

    def __init__(
        self, metric: Metric, interval95: bool = False, ignore_index: int | None = None, **kwargs: Any
    ) -> None:
        super().__init__(interval95, **kwargs)
        if isinstance(metric, BaseAggregator):
            raise TypeError(
                f"metric must take predictions and targets; found {type(metric).__name__}, which takes numbers. Use "
                "EpisodicLoss(function) for the mean over tasks of function(outputs, targets)."
            )
        self.metric, self.ignore_index = copy.deepcopy(metric), ignore_index
        self.metric.dist_sync_on_step = False  # A task is one process's own.

    def of_tasks(self, outputs: Any, targets: Any) -> Tensor:
        """The metric of each task, ``[T]``."""
        if not is_classification(outputs, targets):
            return _each(self._of_task, outputs, targets)
        return _nan_where(outputs, _each(_on_kept(self._of_task, self.ignore_index), outputs, targets))

    def _of_task(self, outputs: Any, targets: Any) -> Tensor:
        self.metric.reset()
        # ``forward``, not ``compute``: it gives this task's value without asking the other processes for theirs.
        value = self.metric(outputs, targets)
        if not isinstance(value, Tensor) or value.numel() != 1:
            found = f"{list(value.shape)} numbers" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"metric must compute one number a task; found {found} from {type(self.metric).__name__}. "
                "Set its average, such as average='macro'; or subclass EpisodicMean, whose of_tasks gives a number a "
                "task, and return that from configure_metrics."
            )
        return value.reshape(())


def episodic(metrics: MetricCollection, ignore_index: int | None = None) -> MetricCollection:
    """The same metrics under the same names, each the mean over tasks of its value on each task.

    A metric of torchmetrics would take the queries ``[T, n, ways]`` of T tasks for classes. Here each one that is no
    :class:`EpisodicMean` becomes an :class:`EpisodicMetric`.

    Args:
        metrics: what :meth:`lightning_imaml.IMAMLModule.configure_metrics` gives.
        ignore_index: a class index that wrapped metrics leave out besides the negative ones.

    Raises:
        TypeError: it is no collection, or a metric in it takes numbers instead of predictions and targets.
        ValueError: a metric joins those of tasks with those of samples.
    """
    if not isinstance(metrics, MetricCollection):
        raise TypeError(
            f"configure_metrics must return a MetricCollection; found {type(metrics).__name__}. Put the metrics into "
            "MetricCollection({name: metric})."
        )
    found = dict(metrics.items(keep_base=True, copy_state=False))
    wrapped = {
        name: metric if _takes_tasks(name, metric) else EpisodicMetric(metric, ignore_index=ignore_index)
        for name, metric in found.items()
    }
    if all(wrapped[name] is metric for name, metric in found.items()):
        return metrics
    return MetricCollection({**wrapped}, prefix=metrics.prefix, postfix=metrics.postfix)


def _takes_tasks(name: str, metric: Metric) -> bool:
    """Whether a metric, or else what it is computed from, takes whole batches of tasks."""
    kinds = _kinds(metric)
    if len(kinds) > 1:
        raise ValueError(
            f"a metric must be computed either from episodic metrics or from others; found both in {name!r}. Wrap the "
            "others in EpisodicMetric."
        )
    return kinds == {"tasks"}


def _kinds(module: nn.Module) -> set[str]:
    """What the metrics that a metric is computed from take: batches of "tasks", or the "samples" of one."""
    if isinstance(module, TaskMean):
        return {"tasks"}
    inner = set[str]().union(*map(_kinds, module.children()))
    return inner or ({"samples"} if isinstance(module, Metric) else set())


class LoaderMetrics(nn.Module):
    """What an evaluation logs of one dataloader.

    Args:
        stage: the first part of all names, ``<stage>/<name>``.
        metrics: of the predictions; copied, see :func:`episodic`.
        ignore_index: a class index that is left out of metrics of torchmetrics.
    """

    def __init__(self, stage: str, metrics: MetricCollection, ignore_index: int | None = None) -> None:
        super().__init__()
        self.stage = stage
        self.loss, self.inner_residual = TaskMean(), TaskMean()
        metrics = episodic(metrics, ignore_index)
        prefix, postfix = names.of_stage(stage, metrics.prefix or ""), metrics.postfix or ""
        self.before = metrics.clone(prefix=prefix, postfix=postfix + names.BEFORE)
        self.after = metrics.clone(prefix=prefix)

    def update(self, loss: Tensor, inner_residual: Tensor) -> dict[str, Metric]:
        """Add tasks by the numbers ``[T]`` that each has, and give the metrics of these by name."""
        self.loss.update(loss)
        self.inner_residual.update(inner_residual)
        return {
            names.of_stage(self.stage, names.LOSS): self.loss,
            names.of_stage(self.stage, names.EVALUATION_INNER_RESIDUAL): self.inner_residual,
        }

    def update_predictions(self, before: Any, after: Any, targets: Any) -> dict[str, Metric]:
        """Add tasks by the predictions of the unadapted and the adapted networks, and give all metrics of these."""
        found: dict[str, Metric] = {}
        for metrics, predictions in ((self.before, before), (self.after, after)):
            metrics.update(predictions, targets)
            # Not copies: what the metrics of a collection share is the state of the first of them.
            found |= dict(metrics.items(copy_state=False))
        return found


def with_intervals(**metrics: EpisodicMean) -> MetricCollection:
    """A collection of metrics, each with its 95 % interval beside it as ``<name>_interval95``.

    What :meth:`lightning_imaml.IMAMLModule.configure_metrics` may return. The module logs ``loss`` and
    ``inner_residual`` by itself, so these names are taken there.

    Example:
        >>> sorted(with_intervals(accuracy=EpisodicAccuracy(), cross_entropy=EpisodicLoss()).keys())
        ['accuracy', 'accuracy_interval95', 'cross_entropy', 'cross_entropy_interval95']
    """
    both: dict[str, Metric | MetricCollection] = {}
    for name, metric in metrics.items():
        both[name] = metric
        interval = metric.clone()
        interval.interval95 = True
        both[name + names.INTERVAL] = interval
    return MetricCollection(both)


def _each(function: Callable[[Any, Any], Tensor], outputs: Any, targets: Any) -> Tensor:
    tasks = pytree.tree_leaves(targets)[0].shape[0]
    parts = ((pytree.tree_map(lambda x, k=k: x[k], tree) for tree in (outputs, targets)) for k in range(tasks))
    return torch.stack([function(*part) for part in parts])


def _kept(targets: Tensor, ignore_index: int | None) -> Tensor:
    """Where targets are classes, and not to be ignored."""
    kept = targets >= 0
    return kept if ignore_index is None else kept & (targets != ignore_index)


def _on_kept(function: Callable[[Any, Any], Tensor], ignore_index: int | None) -> Callable[[Any, Any], Tensor]:
    """The function of one task's samples whose targets are kept; NaN where there is none."""

    def of_task(outputs: Tensor, targets: Tensor) -> Tensor:
        kept = _kept(targets, ignore_index)
        return function(outputs[kept], targets[kept]) if kept.any() else outputs.new_tensor(torch.nan)

    return of_task


def _nan_where(outputs: Tensor, values: Tensor) -> Tensor:
    """The values ``[T]``, but NaN for tasks with outputs that are: their largest would be that of class 0."""
    return values.where(~outputs.isnan().flatten(1).any(dim=1), torch.nan)


def _require_classification(metric: Metric, outputs: Any, targets: Any) -> None:
    if not is_classification(outputs, targets):
        found = [
            f"{list(x.shape)} {x.dtype}" if isinstance(x, Tensor) else type(x).__name__ for x in (outputs, targets)
        ]
        raise ValueError(
            f"{type(metric).__name__} takes logits [tasks, samples, ways] and class indices [tasks, samples]; found "
            f"{' and '.join(found)}. For other targets, return metrics "
            "that suit them from IMAMLModule.configure_metrics."
        )
