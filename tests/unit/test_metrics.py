"""Accuracy over tasks and its interval."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import distributed, multiprocessing
from torch.nn import functional as F
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassF1Score

from lightning_imaml.metrics import (
    EpisodicAccuracy,
    EpisodicCalibrationError,
    EpisodicInterval95,
    EpisodicLoss,
    EpisodicMetric,
    TaskMean,
    with_intervals,
)


def test_the_mean_of_numbers_keeps_the_digits_of_float64_and_tells_nan():
    numbers = [torch.tensor([1e8 + k / 7, 1e8 - k / 3], dtype=torch.float64) for k in range(3)]
    mean, interval = TaskMean(), TaskMean(interval95=True)
    for pair in numbers:
        mean.update(pair)
        interval.update(pair)
    joined = torch.cat(numbers).numpy()
    assert mean.compute().item() == pytest.approx(joined.mean(), rel=1e-15)
    assert interval.compute().item() == pytest.approx(1.96 * joined.std(ddof=1) / np.sqrt(6), rel=1e-6)
    mean.update(torch.tensor([torch.nan]))
    assert mean.compute().isnan()


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
    with pytest.raises(ValueError, match=r"found \[2, 3, 1\] torch.float32 and \[2, 3, 1\] torch.float32\. For other"):
        EpisodicAccuracy().update(torch.zeros(2, 3, 1), torch.zeros(2, 3, 1))


def batches():
    """Batches of tasks of several sizes, none of which is alike."""
    torch.manual_seed(0)
    return [(torch.randn(tasks, n, 5), torch.randint(5, (tasks, n))) for tasks, n in ((4, 10), (3, 7), (1, 12))]


def cross_entropy(outputs, targets):
    return -(outputs - outputs.logsumexp(-1, keepdim=True))[torch.arange(len(targets)), targets].mean().item()


def calibration_error(outputs, targets, bins=15):
    """Guo et al. (2017), equation 3, bin by bin."""
    confidence, predicted = outputs.softmax(-1).max(-1)
    error = 0.0
    for k in range(bins):
        inside = (confidence > k / bins) & (confidence <= (k + 1) / bins)
        if inside.any():
            gap = confidence[inside].mean() - (predicted == targets)[inside].float().mean()
            error += inside.float().mean().item() * gap.abs().item()
    return error


def macro_f1(outputs, targets):
    """From its definition, over the classes that are there or predicted."""
    predicted, scores = outputs.argmax(-1), []
    for way in range(5):
        hit = ((predicted == way) & (targets == way)).sum().item()
        missed = ((predicted == way) != (targets == way)).sum().item()
        if hit or missed:
            scores.append(2 * hit / (2 * hit + missed))
    return np.mean(scores)


def f1_metric():
    return EpisodicMetric(MulticlassF1Score(num_classes=5, average="macro"))


# What is measured, and the value of one task from another library or straight from the paper.
MEASURED = {
    "accuracy": (EpisodicAccuracy, lambda o, t: (o.argmax(-1) == t).float().mean().item()),
    "loss": (EpisodicLoss, cross_entropy),
    "calibration error": (EpisodicCalibrationError, calibration_error),
    "any metric of torchmetrics": (f1_metric, macro_f1),
}


def expected_of(name):
    of_task = MEASURED[name][1]
    values = [of_task(o, t) for outputs, targets in batches() for o, t in zip(outputs, targets, strict=True)]
    return np.mean(values), 1.96 * np.std(values, ddof=1) / np.sqrt(len(values))


@pytest.mark.parametrize("name", MEASURED)
def test_each_task_counts_once(name):
    collection = with_intervals(it=MEASURED[name][0]())
    for outputs, targets in batches():
        collection.update(outputs, targets)
    mean, interval = expected_of(name)
    found = collection.compute()
    assert found["it"].item() == pytest.approx(mean, rel=1e-5)
    assert found["it_interval95"].item() == pytest.approx(interval, rel=1e-4)
    collection.reset()
    assert collection["it"].tasks == 0


def test_a_large_mean_does_not_hide_a_small_deviation():
    values = 1e5 + torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0])
    metric = EpisodicLoss(lambda outputs, targets: outputs.mean(), interval95=True)
    for value in values:
        metric.update(value.view(1, 1, 1), torch.zeros(1, 1))
    assert metric.compute().item() == pytest.approx(1.96 * np.std(values.numpy(), ddof=1) / np.sqrt(5), rel=1e-3)


def test_metrics_that_agree_on_the_first_batch_stay_apart():
    """torchmetrics joins metrics whose states are equal once; accuracy and F1 score are, where all is right."""
    collection = with_intervals(accuracy=EpisodicAccuracy(), f1=f1_metric())
    right = torch.arange(5).repeat(2, 1)
    collection.update(F.one_hot(right).float(), right)
    for outputs, targets in batches():
        collection.update(outputs, targets)
    alone = {"accuracy": EpisodicAccuracy(), "f1": f1_metric()}
    for metric in alone.values():
        metric.update(F.one_hot(right).float(), right)
        for outputs, targets in batches():
            metric.update(outputs, targets)
    found = collection.compute()
    assert found["accuracy"] == alone["accuracy"].compute() != found["f1"] == alone["f1"].compute()
    assert sorted(map(sorted, collection.compute_groups.values())) == [
        ["accuracy", "accuracy_interval95"],
        ["f1", "f1_interval95"],
    ]


def test_forward_gives_the_batch_and_keeps_the_sum():
    metric = EpisodicLoss()
    for outputs, targets in batches():
        alone = EpisodicLoss()
        alone.update(outputs, targets)
        assert metric(outputs, targets) == alone.compute()
    assert metric.compute().item() == pytest.approx(expected_of("loss")[0], rel=1e-5)


@pytest.mark.parametrize("metric", [EpisodicAccuracy(), EpisodicCalibrationError(), EpisodicLoss()])
def test_outputs_that_are_nan_are_no_success(metric):
    """The largest of NaNs is the first, which would be right for class 0."""
    outputs, targets = torch.randn(3, 4, 5), torch.zeros(3, 4, dtype=torch.long)
    metric.update(outputs[:2], targets[:2])
    assert metric.compute().isfinite()
    outputs[2, 1] = torch.nan
    metric.update(outputs, targets)
    assert metric.compute().isnan()


def test_no_tasks_change_nothing():
    metric = EpisodicAccuracy()
    metric.update(torch.randn(0, 4, 5), torch.zeros(0, 4, dtype=torch.long))
    metric.update(torch.eye(5).repeat(2, 1, 1), torch.arange(5).repeat(2, 1))
    assert metric.compute() == 1


@pytest.mark.parametrize(
    ("outputs", "found"), [({"logits": 0}, "dict"), (torch.zeros(2, 3), r"\[2, 3\] torch.float32")]
)
def test_outputs_of_another_kind_are_named(outputs, found):
    with pytest.raises(ValueError, match=rf"EpisodicAccuracy takes logits .*; found {found} and \[2, 3\] torch.int64"):
        EpisodicAccuracy().update(outputs, torch.zeros(2, 3, dtype=torch.long))


def test_before_the_first_task():
    with pytest.warns(UserWarning, match="was called before the"):
        assert EpisodicAccuracy().compute().isnan()


def test_bad_metrics_are_explained():
    each = EpisodicMetric(MulticlassF1Score(num_classes=5, average=None))
    with pytest.raises(ValueError, match=r"one number a task; found \[5\] numbers from MulticlassF1Score\."):
        each.update(*batches()[0])
    with pytest.raises(ValueError, match="bins must be at least 1; found 0"):
        EpisodicCalibrationError(bins=0)


def _measure(rank, path, results):
    distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    collection = with_intervals(**{name.split()[0]: make() for name, (make, _) in MEASURED.items()})
    # Uneven shares: seven tasks on one process, one on the other.
    for outputs, targets in batches()[:2] if rank == 0 else batches()[2:]:
        collection.update(outputs, targets)
    results.put((rank, {name: value.item() for name, value in collection.compute().items()}))
    distributed.destroy_process_group()


def test_two_processes_give_what_one_would(tmp_path):
    context = multiprocessing.get_context("spawn")  # A fork would copy locks of threads that it has not
    results = context.Queue()
    processes = [context.Process(target=_measure, args=(rank, tmp_path / "store", results)) for rank in range(2)]
    for process in processes:
        process.start()
    found = dict(results.get(timeout=120) for _ in processes)
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0
    for name in MEASURED:
        mean, interval = expected_of(name)
        for rank in range(2):
            assert found[rank][name.split()[0]] == pytest.approx(mean, rel=1e-5)
            assert found[rank][f"{name.split()[0]}_interval95"] == pytest.approx(interval, rel=1e-4)
