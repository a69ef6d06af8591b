"""The README's code runs as it stands."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest
from lightning.pytorch import Trainer
from test_trainer_flags import FLAGS

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_there_is_code_to_run():
    assert len(BLOCKS) >= 2


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
@pytest.mark.slow  # The first block is a whole training epoch: what a reader copies must work as printed.
def test_the_code_of_the_readme_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {})


LIGHTNING = (ROOT / "docs" / "lightning.md").read_text()
ROWS = re.findall(r"^\| (`[^|]+`[^|]*) \|[^|]*\| `(tests/[^`]+)` \|$", LIGHTNING, flags=re.MULTILINE)


@pytest.mark.parametrize(("flags", "test"), ROWS)
def test_every_row_of_the_tables_of_flags_has_its_test(flags, test):
    file, _, name = test.partition("::")
    name, _, parameter = name.rstrip("]").partition("[")
    defined = [node.name for node in ast.parse((ROOT / file).read_text()).body if isinstance(node, ast.FunctionDef)]
    assert name in defined
    assert not parameter or parameter in FLAGS


def test_the_tables_know_every_flag_of_the_trainer():
    told = set(re.findall(r"`(\w+)[`=]", " ".join(flags for flags, _ in ROWS)))
    assert told >= set(inspect.signature(Trainer).parameters)
    assert told <= set(inspect.signature(Trainer).parameters) | {"deepspeed"}
