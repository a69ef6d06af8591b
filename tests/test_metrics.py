"""Accuracy over tasks and its interval."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchmetrics import MetricCollection

from lightning_imaml.metrics import EpisodicAccuracy, EpisodicInterval95


def test_mean_and_interval_are_those_of_numpy_over_tasks():
    torch.manual_seed(0)
    mean, interval = EpisodicAccuracy(), EpisodicInterval95()
    per_task = []
    for tasks, samples in ((4, 10), (3, 7)):
        outputs, targets = torch.randn(tasks, samples, 5), torch.randint(5, (tasks, samples))
        mean.update(outputs, targets)
        interval.update(outputs, targets)
        per_task += (outputs.argmax(-1) == targets).float().mean(1).tolist()
    assert mean.compute().item() == pytest.approx(np.mean(per_task), rel=1e-6)
    expected = 1.96 * np.std(per_task, ddof=1) / np.sqrt(len(per_task))
    assert interval.compute().item() == pytest.approx(expected, rel=1e-4)
    mean.reset()
    assert mean.tasks.item() == 0


def test_both_in_one_collection_are_those_of_each_alone():
    """A MetricCollection shares the state of metrics with the same updates."""
    torch.manual_seed(0)
    both = MetricCollection({"mean": EpisodicAccuracy(), "interval": EpisodicInterval95()})
    alone = {"mean": EpisodicAccuracy(), "interval": EpisodicInterval95()}
    for _ in range(4):
        outputs, targets = torch.randn(3, 6, 4), torch.randint(4, (3, 6))
        both.update(outputs, targets)
        for metric in alone.values():
            metric.update(outputs, targets)
    for name, metric in alone.items():
        assert both.compute()[name] == metric.compute()


def test_a_single_task_has_no_interval():
    metric = EpisodicInterval95()
    metric.update(torch.eye(3).unsqueeze(0), torch.arange(3).unsqueeze(0))
    assert metric.compute().item() == 0


def test_other_targets_are_refused():
    with pytest.raises(ValueError, match=r"found \[2, 3, 1\] and \[2, 3, 1\] torch.float32.*configure_metrics"):
        EpisodicAccuracy().update(torch.zeros(2, 3, 1), torch.zeros(2, 3, 1))
