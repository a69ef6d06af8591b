"""Several dataloaders in one evaluation: each has metrics of its own, as if it were alone."""

from __future__ import annotations

import pytest
from lightning.pytorch.callbacks import Callback
from small_runs import episode, loader, module, network, trainer
from torch.utils.data import DataLoader

from lightning_imaml import IMAMLModule
from lightning_imaml.callbacks import AdaptationCurve, LearningCurve, ResultsTable
from lightning_imaml.data import GlyphDataModule


def loaders() -> list[DataLoader]:
    return [DataLoader([episode(k) for k in numbers], batch_size=None) for numbers in ((0, 1), (2,), (3, 4, 5))]


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_each_loader_is_judged_as_if_it_were_alone(stage):
    model = module()
    together = getattr(trainer(), stage)(model, loaders(), verbose=False)
    alone = [getattr(trainer(), stage)(model, one, verbose=False)[0] for one in loaders()]
    assert len({result[next(iter(result))] for result in alone}) == 3  # They do differ.
    for k, (found, expected) in enumerate(zip(together, alone, strict=True)):
        assert found == {f"{name}/dataloader_idx_{k}": value for name, value in expected.items()}


def test_validation_in_a_fit_and_a_monitor_of_one_loader(tmp_path):
    curve, model = LearningCurve(), module(lr_scheduler_monitor="val/loss/dataloader_idx_1")
    run = trainer(curve, default_root_dir=tmp_path, max_epochs=2)
    run.fit(model, loader(2), loaders())
    (expected, _, _) = trainer().validate(model, loaders(), verbose=False)
    found = {name: value.item() for name, value in run.callback_metrics.items() if name.endswith("idx_0")}
    assert found == expected
    assert [step for step, _ in curve.state_dict()["points"]["val/accuracy"]] == [2, 4]


def test_predictions_come_by_loader():
    predictions = trainer().predict(module(), loaders())
    assert [len(batches) for batches in predictions] == [2, 1, 3]


def test_each_loader_has_a_table(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    run = trainer(ResultsTable())
    run.test(module(), loaders(), verbose=False)
    printed = capsys.readouterr().out
    for k, tasks in enumerate((4, 2, 6)):
        table = printed.split("Test results, dataloader ")[k + 1]
        assert table.startswith(f"{k} ")
        assert f"{100 * run.callback_metrics[f'test/accuracy/dataloader_idx_{k}'].item():.2f} ±" in table
        assert "random weights, after adaptation" in table
        assert f"{tasks} tasks" in table


def test_one_curve_takes_one_loader():
    with pytest.raises(
        ValueError, match=r"AdaptationCurve: the number of dataloaders must be 1, since there is one curve; found 3"
    ):
        trainer(AdaptationCurve()).test(module(), loaders(), verbose=False)


def test_metrics_may_depend_on_the_data_and_the_network():
    seen = []

    class Own(IMAMLModule):
        def configure_backbone(self):
            return network()

        def configure_metrics(self):
            seen.append((self.hparams.ways, sum(p.numel() for p in self.backbone.parameters())))
            return super().configure_metrics()

    class Data(GlyphDataModule):
        def val_dataloader(self):
            return loader(1)

    trainer().validate(module(Own, backbone=None), datamodule=Data(ways=3, shots=1), verbose=False)
    assert seen == [(3, 16 * 4 + 4 + 4 * 3 + 3)]


def test_an_interrupted_evaluation_leaves_no_tasks_behind():
    class Stop(Callback):
        def on_validation_batch_end(self, *args):
            raise KeyError("interrupted")

    model = module()
    with pytest.raises(KeyError):
        trainer(Stop()).validate(model, loader(2), verbose=False)
    after = trainer().validate(model, loader(1), verbose=False)
    assert after == trainer().validate(module(), loader(1), verbose=False)
