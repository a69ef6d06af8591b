from __future__ import annotations

from pathlib import Path

import pytest
import torch
import with_hydra
import yaml

from lightning_imaml import IMAMLModule
from lightning_imaml.curvature import GaussNewton
from lightning_imaml.inner import GradientDescent
from lightning_imaml.models import Conv4


def test_everything_comes_from_the_configuration(tmp_path, capsys):
    pytest.importorskip("hydra")
    result = with_hydra.main(
        [
            "module.backbone.filters=4", "module.inner_solver.lr={classifier.weight:0.2,classifier.bias:0.1}",
            "module.inner_solver.steps=2", "module.adapt_only=[classifier.*]", "data.ways=3", "data.queries=2",
            "data.tasks_per_batch=2", "data.batches_per_epoch=2", "+data.val_tasks=2", "data.test_tasks=4",
            "trainer.max_epochs=1", "+trainer.log_every_n_steps=1", f"trainer.logger.save_dir={tmp_path}",
            "+trainer.enable_progress_bar=false", "+trainer.enable_model_summary=false",
        ]
    )  # fmt: skip
    assert 0 <= result["test/accuracy"] <= 1
    assert "on 4 new tasks" in capsys.readouterr().out
    (written,) = tmp_path.rglob("hparams.yaml")
    settings = yaml.safe_load(Path(written).read_text())
    assert settings["adapt_only"] == ["classifier.*"]
    assert settings["inner_solver"]["name"] == "GradientDescent"
    assert settings["inner_solver"]["lr"] == {"classifier.weight": 0.2, "classifier.bias": 0.1}
    assert settings["estimator"]["curvature"]["name"] == "GaussNewton"
    assert settings["ways"] == 3
    (saved,) = tmp_path.rglob("*.ckpt")
    values = torch.load(saved, weights_only=True)["hyper_parameters"]
    assert type(values["adapt_only"]) is list
    loaded = IMAMLModule.load_from_checkpoint(saved, backbone=Conv4(ways=3, filters=4))
    assert loaded.inner_solver == GradientDescent({"classifier.weight": 0.2, "classifier.bias": 0.1}, 2)
    assert loaded.estimator.curvature == GaussNewton()
