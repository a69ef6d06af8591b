"""Metrics of torchmetrics in configure_metrics: the mean over tasks of the value on each task, or a refusal."""

from __future__ import annotations

import pytest
import torch
from small_runs import module, trainer
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics import ClasswiseWrapper, MeanMetric, Metric, MetricCollection, MinMaxMetric
from torchmetrics.classification import (
    BinaryAccuracy,
    MulticlassAccuracy,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
)
from torchmetrics.regression import MeanAbsoluteError

from lightning_imaml import Episode, IMAMLModule
from lightning_imaml.metrics import EpisodicAccuracy, EpisodicLoss, EpisodicMean, EpisodicMetric, LoaderMetrics


def logits(*predicted):
    """Logits ``[n, 5]`` whose largest are these classes'."""
    return nn.functional.one_hot(torch.tensor(predicted), 5).float()


# 5-way tasks with two queries a class; the second has one right, so 9 of 10 and 1 of 10 are.
TARGETS = torch.arange(5).repeat(2, 2)
OUTPUTS = torch.stack([logits(0, 1, 2, 3, 4, 0, 1, 2, 3, 0), logits(0, 0, 0, 0, 0, 1, 2, 3, 4, 0)])


def measured(metrics, outputs=OUTPUTS, targets=TARGETS):
    loader = LoaderMetrics("test", metrics)
    loader.update_predictions(outputs, outputs, targets)
    return {name: metric.compute().item() for name, metric in loader.after.items(copy_state=False)}


@pytest.mark.parametrize("queries", [1, 2])
def test_queries_are_not_taken_for_classes(queries):
    metrics = MetricCollection({"tm": MulticlassAccuracy(5, average="micro"), "own": EpisodicAccuracy()})
    found = measured(metrics, OUTPUTS[:, : 5 * queries], TARGETS[:, : 5 * queries])
    expected = {1: (1.0 + 0.2) / 2, 2: (0.9 + 0.1) / 2}[queries]
    assert found == {"test/tm": pytest.approx(expected), "test/own": pytest.approx(expected)}


def test_a_metric_that_is_no_mean_of_samples_is_one_of_tasks():
    """Macro F1 over all samples together is another number."""
    each = [MulticlassF1Score(5)(o, t).item() for o, t in zip(OUTPUTS, TARGETS, strict=True)]
    together = MulticlassF1Score(5)(OUTPUTS.flatten(0, 1), TARGETS.flatten()).item()
    found = measured(MetricCollection([MulticlassF1Score(5)]))
    assert found == {"test/MulticlassF1Score": pytest.approx(sum(each) / 2)}
    assert abs(sum(each) / 2 - together) > 0.01


def test_tasks_of_several_batches_count_once():
    loader = LoaderMetrics("val", MetricCollection([MulticlassAccuracy(5, average="micro")]))
    for rows in (slice(0, 1), slice(1, 2), slice(0, 1)):
        loader.update_predictions(OUTPUTS[rows], OUTPUTS[rows], TARGETS[rows])
    assert loader.before["val/MulticlassAccuracy_before"].compute().item() == pytest.approx((0.9 + 0.1 + 0.9) / 3)


def test_names_prefixes_and_nested_collections_are_kept():
    inner = MetricCollection([MulticlassAccuracy(5, average="micro")], prefix="deep_")
    metrics = MetricCollection({"a": inner, "b": EpisodicAccuracy()}, prefix="my_", postfix="_own")
    loader = LoaderMetrics("val", metrics)
    assert set(loader.after.keys()) == {f"val/my_{name}_own" for name in metrics.keys(keep_base=True)}
    assert set(loader.before.keys()) == {f"val/my_{name}_own_before" for name in metrics.keys(keep_base=True)}
    assert isinstance(metrics["my_a_deep_MulticlassAccuracy_own"], MulticlassAccuracy)  # as it was


def test_metrics_of_one_group_have_their_own_values():
    metrics = {"accuracy": MulticlassAccuracy(5), "f1": MulticlassF1Score(5)}
    found = measured(MetricCollection(metrics, compute_groups=[["accuracy", "f1"]]))
    assert found["test/accuracy"] == pytest.approx(0.5)
    assert found["test/f1"] != pytest.approx(found["test/accuracy"], abs=0.01)


def test_compositions():
    error = 1 - MulticlassAccuracy(5, average="micro")
    own = 1 - EpisodicAccuracy()
    found = measured(MetricCollection({"error": error, "own": own}))
    assert found == {"test/error": pytest.approx(0.5), "test/own": pytest.approx(0.5)}
    mixed = EpisodicAccuracy() - MulticlassAccuracy(5)
    with pytest.raises(ValueError, match=r"found both in 'gap'\. Wrap the others in EpisodicMetric"):
        measured(MetricCollection({"gap": mixed}))
    remedied = EpisodicAccuracy() - EpisodicMetric(MulticlassAccuracy(5, average="micro"))
    assert measured(MetricCollection({"gap": remedied}))["test/gap"] == 0


class Own(Metric):
    """A person's own metric, as torchmetrics describes them: of samples ``[n, C]``."""

    def __init__(self):
        super().__init__()
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, preds, target):
        assert preds.shape == (10, 5)
        self.total += (preds.argmax(-1) == target).sum()

    def compute(self):
        return self.total


def test_a_metric_of_ones_own():
    assert measured(MetricCollection({"right": Own()})) == {"test/right": pytest.approx((9 + 1) / 2)}


def test_other_targets():
    outputs, targets = torch.tensor([[[0.0], [2.0]], [[1.0], [1.0]]]), torch.tensor([[[1.0], [0.0]], [[1.0], [-5.0]]])
    found = measured(MetricCollection([MeanAbsoluteError()]), outputs, targets)
    assert found == {"test/MeanAbsoluteError": pytest.approx((1.5 + 3.0) / 2)}
    # Whole numbers that are no class indices: nothing is left out.
    whole = targets[..., 0].long()
    assert measured(MetricCollection([MeanAbsoluteError()]), outputs[..., 0], whole) == found
    yes = torch.tensor([[1, 0], [1, 1]])
    found = measured(MetricCollection([BinaryAccuracy()]), torch.tensor([[0.9, 0.8], [0.7, 0.6]]), yes)
    assert found == {"test/BinaryAccuracy": 0.75}


def test_outputs_that_are_nan_are_no_success():
    outputs = OUTPUTS.clone()
    outputs[1, 0] = torch.nan
    metric = MulticlassAccuracy(5, average="micro")
    assert torch.tensor(measured(MetricCollection([metric]), outputs)["test/MulticlassAccuracy"]).isnan()


REFUSED = {
    "a number a class": (MulticlassAccuracy(5, average=None), r"found \[5\] numbers from MulticlassAccuracy"),
    "a matrix": (MulticlassConfusionMatrix(5), r"found \[5, 5\] numbers from MulticlassConfusionMatrix"),
    "a dict": (ClasswiseWrapper(MulticlassAccuracy(5, average=None)), "found dict from ClasswiseWrapper"),
    "two numbers": (MinMaxMetric(MulticlassAccuracy(5)), "found dict from MinMaxMetric"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_one_number_is_refused_with_the_remedy(name):
    metric, found = REFUSED[name]
    with pytest.raises(ValueError, match=found + r"\. Set its average, such as average='macro'; or subclass Episodic"):
        measured(MetricCollection([metric]))


def test_the_remedies():
    class Spread(EpisodicMean):
        def of_tasks(self, outputs, targets):
            each = [MulticlassAccuracy(5, average=None)(o, t) for o, t in zip(outputs, targets, strict=True)]
            return torch.stack([accuracies.max() - accuracies.min() for accuracies in each])

    metrics = MetricCollection({"macro": MulticlassAccuracy(5, average="macro"), "spread": Spread()})
    assert measured(metrics) == {"test/macro": pytest.approx(0.5), "test/spread": pytest.approx(0.5)}
    with pytest.raises(TypeError, match=r"found MeanMetric, which takes numbers\. Use EpisodicLoss"):
        measured(MetricCollection({"mean": MeanMetric()}))
    top = EpisodicLoss(lambda outputs, targets: outputs.max())
    assert measured(MetricCollection({"mean": top})) == {"test/mean": 1.0}
    with pytest.raises(TypeError, match=r"must return a MetricCollection; found EpisodicAccuracy\. Put"):
        measured(EpisodicAccuracy())
    assert measured(MetricCollection({"accuracy": EpisodicAccuracy()})) == {"test/accuracy": pytest.approx(0.5)}


class WithTorchmetrics(IMAMLModule):
    def configure_metrics(self):
        return MetricCollection({"tm": MulticlassAccuracy(3, average="micro"), "accuracy": EpisodicAccuracy()})


@pytest.mark.parametrize("queries", [1, 4])
def test_under_the_trainer(queries):
    torch.manual_seed(0)
    inputs, targets = torch.randn(6, 3 * queries, 1, 4, 4), torch.arange(3).repeat(6, queries)
    tasks = Episode(inputs, targets, torch.randn_like(inputs), targets)
    loader = DataLoader(tasks.split(2), batch_size=None)
    (logged,) = trainer().test(module(WithTorchmetrics), loader, verbose=False)
    assert logged["test/tm"] == pytest.approx(logged["test/accuracy"], abs=1e-6)
    assert logged["test/tm_before"] == pytest.approx(logged["test/accuracy_before"], abs=1e-6)
    assert 0 < logged["test/tm"] < 1
