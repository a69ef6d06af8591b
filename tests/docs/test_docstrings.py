"""The examples in docstrings run, and give what they print."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from lightning_imaml import Episode, IMAMLModule
from lightning_imaml.data import EpisodicDataModule, GlyphDataModule
from lightning_imaml.functional import adapt, meta_gradient
from lightning_imaml.linear import ConjugateGradient
from lightning_imaml.regularizers import Proximal

SOURCES = [path for path in sorted((ROOT / "lightning_imaml").rglob("*.py")) if path.name != "__main__.py"]
CENTRAL = (
    IMAMLModule, Episode, adapt, meta_gradient, EpisodicDataModule, GlyphDataModule, ConjugateGradient, Proximal,
)  # fmt: skip


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


WITH_EXAMPLES = [name_of(path) for path in SOURCES if ">>> " in path.read_text()]
EXAMPLES = [
    test
    for name in WITH_EXAMPLES
    for test in doctest.DocTestFinder(exclude_empty=True).find(importlib.import_module(name))
    if test.examples
]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_the_example_of_a_docstring_gives_what_it_prints(example, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    failed, attempted = doctest.DocTestRunner().run(example)  # The report goes to the captured output.
    assert attempted == len(example.examples)
    assert not failed


def test_every_example_is_found():
    found = dict.fromkeys(WITH_EXAMPLES, 0)
    for example in EXAMPLES:
        found[name_of(Path(example.filename))] += len(example.examples)
    written = {name_of(path): len(re.findall(r"^ +>>> ", path.read_text(), flags=re.MULTILINE)) for path in SOURCES}
    assert found == {name: count for name, count in written.items() if count}


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_docstrings_have_no_code_that_does_not_run(path):
    """Neither fenced nor literal blocks: examples are for ``>>>``."""
    assert not re.search(r"^ *(```|~~~|\.\. code)|::\n\n", path.read_text(), flags=re.MULTILINE)


@pytest.mark.parametrize("thing", CENTRAL, ids=lambda thing: thing.__name__)
def test_central_names_have_an_example(thing):
    assert f"{thing.__module__}.{thing.__qualname__}" in {example.name for example in EXAMPLES}
