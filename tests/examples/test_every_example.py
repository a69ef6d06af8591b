"""Every example and experiment has help, a line in the documentation and a test; printed commands are taken."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
from pathlib import Path

import pytest
from conftest import ROOT

FOLDERS = ("examples", "experiments")
EXAMPLES = [path for name in FOLDERS for path in sorted((ROOT / name).glob("*.py")) if path.name[0] != "_"]
NAMES = [path.stem for path in EXAMPLES]
PAGES = [ROOT / "README.md", *(path for path in (ROOT / "docs").rglob("*.md") if "_build" not in path.parts)]


@pytest.mark.parametrize("name", NAMES)
def test_help_says_what_it_is(name, capsys):
    example = importlib.import_module(name)
    with pytest.raises(SystemExit) as ended:
        example.main(["--help"])
    assert ended.value.code == 0
    told = capsys.readouterr().out
    assert told.startswith("usage: ")
    assert example.__doc__.strip().splitlines()[0] in told


@pytest.mark.parametrize("name", NAMES)
def test_some_test_knows_it(name):
    tests = [path.read_text() for path in (ROOT / "tests").glob("ex*/test_*.py") if path != Path(__file__)]
    assert any(re.search(rf'^import {name}\b|example\("{name}"\)', text, flags=re.MULTILINE) for text in tests)


def test_the_documentation_lists_every_example_once():
    page = (ROOT / "docs" / "examples.md").read_text()
    rows = re.findall(r"^\| \[`(\w+\.py)`\]\(\.\./(ex\w+/\w+\.py)\) \| \w.+ \|$", page, flags=re.MULTILINE)
    assert sorted(rows) == sorted((path.name, str(path.relative_to(ROOT))) for path in EXAMPLES)
    assert len(rows) == page.count(".py`]")


def printed_commands() -> list[tuple[str, str]]:
    """The example and the options of every command in prose, in code blocks and in the examples' own docstrings."""
    lines: list[str] = []
    for path in [*PAGES, *EXAMPLES]:
        text = re.sub(r"\\\n\s*", " ", path.read_text())
        if path.suffix == ".md":
            # Inline code may go over several lines.
            text = re.sub(r"(?<!`)`([^`]+)`(?!`)", lambda found: "\n" + " ".join(found[1].split()) + "\n", text)
        lines += text.splitlines()
    found = (re.search(r"\b(?:python|torchrun) .*?\b(?:examples|experiments)/(\w+)\.py(.*)$", line) for line in lines)
    return sorted({(match[1], match[2].strip()) for match in found if match})


COMMANDS = printed_commands()


def test_commands_are_found():
    assert {name for name, _ in COMMANDS} == set(NAMES)
    assert ("multi_gpu", "--devices 4 --num_nodes 2") in COMMANDS
    assert ("figure_2a", "--output docs/experiments") in COMMANDS


class ParsedError(Exception):
    """Ends an example once it has read its options."""


# Those of the quickstart are the command line's, which has tests of its own.
@pytest.mark.parametrize(("name", "options"), [command for command in COMMANDS if command[0] != "quickstart"])
def test_a_printed_command_is_one_that_the_example_takes(name, options, monkeypatch):
    parse = argparse.ArgumentParser.parse_args

    def parse_and_end(*args: object) -> None:
        parse(*args)
        raise ParsedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_end)
    with pytest.raises(ParsedError):
        importlib.import_module(name).main(shlex.split(options.replace("MINUTES", "30"), comments=True))
