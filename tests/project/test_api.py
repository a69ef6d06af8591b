"""The public API is as recorded in ``tests/api.txt``: no name, parameter or default changes without a word."""

from __future__ import annotations

from functools import partial

from conftest import ROOT
from public_api import NAMES, lines, members, shown, signature

RECORDED = (ROOT / "tests" / "api.txt").read_text().splitlines()


def test_the_api_is_as_recorded():
    changed = set(lines()) ^ set(RECORDED)
    assert list(lines()) == RECORDED, f"{changed}; if meant: PYTHONPATH=. python tests/public_api.py > tests/api.txt"


def test_the_record_has_the_names_that_the_readme_has():
    recorded = {line.partition("(")[0] for line in RECORDED}
    assert {f"{module}.{name}" for module, names in NAMES.items() for name in names} <= recorded


def test_a_signature_shows_names_kinds_and_defaults_and_nothing_else():
    def function(a: int, /, b: float = 2.0, *, c: type = dict, d=len) -> None: ...

    assert signature(function) == "(a, /, b=2.0, *, c=builtins.dict, d=builtins.len)"
    assert shown(partial(signature, 1)) == "partial(public_api.signature)"


def test_members_are_the_public_ones_and_those_of_unlisted_bases():
    class Base:
        def told(self, x=1): ...

    class Listed:
        def elsewhere(self): ...

    class Kind(Base, Listed):
        @property
        def size(self): ...

        @classmethod
        def of(cls, y): ...

        def _hidden(self): ...

    for kind in (Base, Listed, Kind):
        kind.__module__ = "lightning_imaml.x"
    assert list(members(Kind, {Kind, Listed})) == ["of(cls, y)", "size", "told(self, x=1)"]
