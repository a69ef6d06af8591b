"""Query targets that a loss ignores are left out of metrics, too; the values are counted by hand."""

from __future__ import annotations

import pytest
import torch
from small_runs import module, trainer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from lightning_imaml import Episode
from lightning_imaml.callbacks import AdaptationCurve, ResultsTable
from lightning_imaml.metrics import (
    EpisodicAccuracy,
    EpisodicCalibrationError,
    EpisodicMetric,
    LoaderMetrics,
    accuracy_of_tasks,
    ignore_index_of,
)

# Two tasks of four queries: 1 of 2 kept ones is right, then 3 of 4.
PREDICTED = torch.tensor([[0, 1, 2, 2], [0, 1, 2, 2]])
TARGETS = torch.tensor([[0, 2, -100, -100], [0, 1, 2, 1]])
OUTPUTS = 3 * F.one_hot(PREDICTED, 3).float()


def values(metric, outputs=OUTPUTS, targets=TARGETS):
    return metric.of_tasks(outputs, targets).tolist()


@pytest.mark.parametrize(
    "metric", [EpisodicAccuracy(), EpisodicMetric(MulticlassAccuracy(3, average="micro"))], ids=["ours", "torchmetrics"]
)
def test_accuracy(metric):
    assert values(metric) == [0.5, 0.75]


def test_calibration_error():
    # All confidences are in one bin, so that the error is their distance from the accuracy.
    confidence = OUTPUTS.softmax(-1).max().item()
    assert values(EpisodicCalibrationError()) == pytest.approx([confidence - 0.5, confidence - 0.75])


@pytest.mark.parametrize("ignored", [-1, -100, 2, 255])
def test_the_index_of_the_loss(ignored):
    """Negative indices are no classes; others are named."""
    targets = torch.tensor([[0, 0, ignored, ignored], [0, 1, 1, 0]])
    index = ignored if ignored >= 0 else None
    for metric in (
        EpisodicAccuracy(ignore_index=index),
        EpisodicMetric(MulticlassAccuracy(3, average="micro"), ignore_index=index),
    ):
        assert values(metric, targets=targets) == [0.5, 0.5]
    confidence = OUTPUTS.softmax(-1).max().item()
    error = EpisodicCalibrationError(ignore_index=index)
    assert values(error, targets=targets) == pytest.approx([confidence - 0.5] * 2)


@pytest.mark.parametrize(
    "metric",
    [EpisodicAccuracy(), EpisodicCalibrationError(), EpisodicMetric(MulticlassAccuracy(3, average="micro"))],
    ids=lambda metric: type(metric).__name__,
)
def test_a_task_without_targets_has_no_value(metric):
    """It is NaN, as its loss is, and so is the mean: no success, no failure, and nothing left out in silence."""
    targets = TARGETS.clone()
    targets[0] = -100
    first, second = metric.of_tasks(OUTPUTS, targets)
    assert first.isnan()
    assert second.isfinite()
    metric.update(OUTPUTS, targets)
    assert metric.compute().isnan()
    assert F.cross_entropy(OUTPUTS[0], targets[0]).isnan()


def test_the_index_is_that_of_the_outer_loss():
    inner, outer = nn.CrossEntropyLoss(ignore_index=7), nn.CrossEntropyLoss(ignore_index=9)
    assert ignore_index_of(module()) is None
    assert ignore_index_of(module(loss=inner)) == 7
    assert ignore_index_of(module(loss=inner, query_loss=outer)) == 9
    assert ignore_index_of(module(loss=inner, query_loss=F.cross_entropy)) is None


def test_metrics_of_torchmetrics_are_told():
    loader = LoaderMetrics("val", MetricCollection({"tm": MulticlassAccuracy(3, average="micro")}), ignore_index=255)
    loader.update_predictions(OUTPUTS, OUTPUTS, TARGETS.where(TARGETS >= 0, 255))
    assert loader.after["val/tm"].compute().item() == pytest.approx((0.5 + 0.75) / 2)


@pytest.mark.parametrize("ignored", [-100, 255])
def test_under_the_trainer(ignored, tmp_path):
    """Padding changes no number that is logged."""

    def episode(k, padded):
        random = torch.Generator().manual_seed(k)
        support, query = torch.randn(2, 3, 1, 4, 4, generator=random), torch.randn(2, 6, 1, 4, 4, generator=random)
        targets = torch.arange(3).repeat(2, 2)
        if padded:
            query = torch.cat([query, torch.randn(2, 5, 1, 4, 4, generator=random)], dim=1)
            targets = torch.cat([targets, torch.full((2, 5), ignored)], dim=1)
        return Episode(support, torch.arange(3).repeat(2, 1), query, targets)

    found = []
    for padded in (False, True):
        loader = DataLoader([episode(k, padded) for k in range(2)], batch_size=None)
        learner = module(loss=nn.CrossEntropyLoss(ignore_index=ignored))
        callbacks = (AdaptationCurve((0, 2)), ResultsTable())
        run = trainer(*callbacks, default_root_dir=tmp_path)
        run.fit(learner, loader, loader)
        logged = dict(run.logged_metrics)
        run.test(learner, loader, verbose=False)
        found.append({name: float(value) for name, value in (logged | run.logged_metrics).items()})
    plain, padded = found
    assert {"train/accuracy", "train/accuracy_before", "val/accuracy", "test/accuracy_at_2_steps"} <= plain.keys()
    assert padded == pytest.approx(plain, rel=1e-5, abs=1e-7)


def test_accuracy_of_tasks_keeps_nan():
    outputs = OUTPUTS.clone()
    outputs[1, 0] = torch.nan
    assert accuracy_of_tasks(outputs, TARGETS)[0] == 0.5
    assert accuracy_of_tasks(outputs, TARGETS)[1].isnan()
