from __future__ import annotations

import re

from conftest import ROOT

from lightning_imaml.components import metric_names as names

HOME = ROOT / "lightning_imaml" / "components" / "metric_names.py"


def test_the_names_of_metrics_have_one_home():
    literal = re.compile(r"""["'](train|val|test|memory|meta_gradient|regularizer|inner_solver)/|dataloader_idx_\{""")
    others = [path for path in (ROOT / "lightning_imaml").rglob("*.py") if path != HOME]
    assert [str(path) for path in others if literal.search(path.read_text())] == []


def test_names_of_an_evaluation_follow_its_stage():
    assert names.of_stage("val", names.LOSS) + names.of_loader(1) == "val/loss/dataloader_idx_1"
    assert names.at_steps("test", "accuracy", 5) == "test/accuracy_at_5_steps"
    assert names.peak_memory("step") == "memory/step_mib"
