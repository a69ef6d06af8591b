"""The code of README and documentation runs as it stands; links, and references to lines of code, lead somewhere."""

from __future__ import annotations

import ast
import inspect
import re
import shlex
import textwrap
from functools import cache

import _results
import pytest
from conftest import ROOT
from lightning.pytorch import Trainer
from public_api import NAMES
from rooms import ROOMS, room_of
from test_trainer_flags import FLAGS

from lightning_imaml import cli

README = (ROOT / "README.md").read_text()
PAGES = sorted(path for path in (ROOT / "docs").rglob("*.md") if "_build" not in path.parts)


def blocks(text):
    """The Python of a page; blocks in lists are indented."""
    found = re.findall(r"^( *)```python\n(.*?)^\1```", text, flags=re.DOTALL | re.MULTILINE)
    return [textwrap.dedent(code) for _, code in found]


BLOCKS = blocks(README)
WITH_CODE = [path for path in PAGES if blocks(path.read_text())]


def test_the_results_of_the_readme_are_the_newest():
    shown = re.search(r"^\| method \|  \| 5-way.*\n(?:\|.*\n)+", README, flags=re.MULTILINE).group().splitlines()
    assert len(shown) >= 8
    tables = (ROOT / "docs" / "results" / "tables.md").read_text().splitlines()
    assert [row for row in shown if row not in tables] == []


def test_the_tables_are_those_of_the_rows():
    folder = ROOT / "docs" / "results"
    expected = _results.tables(_results.read(folder / "results.csv"), _results.read(folder / "published.csv"))
    assert (folder / "tables.md").read_text() == expected, "experiments/_results.py: redraw(docs/results)"


def test_there_is_code_to_run():
    assert len(BLOCKS) >= 2


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
@pytest.mark.slow  # The first block is a whole training epoch: what a reader copies must work as printed.
def test_the_code_of_the_readme_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {})


@pytest.mark.parametrize("path", WITH_CODE, ids=lambda path: path.stem)
def test_the_code_of_a_page_runs_from_top_to_bottom(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    for number, block in enumerate(blocks(path.read_text())):
        exec(compile(block, f"{path.name}, block {number}", "exec", dont_inherit=True), names)


def test_the_pages_with_code_are_known():
    assert {"getting_started", "theory", "your_own", "migration", "faq"} <= {path.stem for path in WITH_CODE}
    fences = {path.stem: path.read_text().count("```python") for path in PAGES}
    assert {path.stem: len(blocks(path.read_text())) for path in PAGES} == fences


def command_lines():
    """The command line's commands with a configuration, in blocks and in prose."""
    text = " \n".join(path.read_text() for path in (ROOT / "README.md", *PAGES))
    found = re.findall(r"lightning-imaml +((?:fit|validate|test|predict) +--config [^`#\n]*)", text)
    return sorted({" ".join(command.split()) for command in found})


@pytest.mark.parametrize("command", command_lines())
def test_a_printed_command_line_is_one_that_it_takes(command, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as ended:
        cli.run([*shlex.split(command), "--print_config"])
    assert ended.value.code == 0
    assert "IMAMLModule" in capsys.readouterr().out


def test_printed_command_lines_are_found():
    assert "fit --config configs/quickstart.yaml" in command_lines()
    assert "fit --config configs/quickstart.yaml --trainer.strategy ddp --trainer.devices 4" in command_lines()


def test_targets_of_make_exist():
    blocks_of_console = re.findall(r"```console\n(.*?)```", " ".join(p.read_text() for p in LINKED), flags=re.DOTALL)
    named = set(re.findall(r"^make (\w+)", "\n".join(blocks_of_console), flags=re.MULTILINE))
    assert {"demo", "test"} <= named <= set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))


# Links


@cache
def prose(path):
    """A page without its code."""
    return re.sub(r"^( *)```.*?^\1```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)


@cache
def anchors(path):
    """The anchors of a page's headings, as GitHub and MyST make them."""
    titles = re.findall(r"^#+ (.+)$", prose(path), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-") for title in titles}


LINKED = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "RELEASING.md", "SECURITY.md")),
    *PAGES,
]
LINKS = [
    (path, target)
    for path in LINKED
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(path))
    if not re.match(r"\w+://", target)
]


@pytest.mark.parametrize(("path", "target"), LINKS, ids=[f"{p.relative_to(ROOT)}-{t}" for p, t in LINKS])
def test_a_link_leads_somewhere(path, target):
    file, _, anchor = target.partition("#")
    found = (path.parent / file).resolve() if file else path
    assert found.exists()
    assert not anchor or anchor in anchors(found)


def test_links_are_found():
    assert (ROOT / "docs" / "lightning.md", "#precision") in LINKS
    assert (ROOT / "README.md", "docs/lightning.md") in LINKS


# Architecture and reference


def definition(file, name):
    """The source of a function by its qualified name."""
    text = (ROOT / file).read_text()
    node = ast.parse(text)
    for part in name.split("."):
        kinds = (ast.ClassDef, ast.FunctionDef)
        (node,) = [child for child in node.body if isinstance(child, kinds) and child.name == part]
    return ast.get_source_segment(text, node)


ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()
STOPS = re.findall(r"^1\. (.+):\\\n   `([\w/]+\.py)::([\w.]+)`\\\n   `(.+)`$", ARCHITECTURE, flags=re.MULTILINE)


@pytest.mark.parametrize(("stop", "file", "name", "line"), STOPS, ids=[stop for stop, *_ in STOPS])
def test_a_line_of_the_architecture_is_in_its_function(stop, file, name, line):
    assert [code.strip() for code in definition(file, name).splitlines()].count(line) == 1


def test_a_meta_step_goes_down_the_rooms_and_never_back_up():
    rooms = [ROOMS.index(room_of(file)) for _, file, _, _ in STOPS]
    assert rooms == sorted(rooms, reverse=True)
    assert len(STOPS) <= 12


def test_the_architecture_names_what_readers_look_for():
    named = " ".join(stop for stop, *_ in STOPS)
    for sought in ("An inner step", "A conjugate gradient iteration", "The implicit formula", "The all-reduce"):
        assert f"**{sought}**" in named
    assert ARCHITECTURE.count(".py::") == len(STOPS)


SHOWN = [
    (path, *found)
    for path in PAGES
    for found in re.findall(r"\{literalinclude\} (\S+)\n(?::.*\n)*?:pyobject: (\S+)", path.read_text())
]


@pytest.mark.parametrize(("path", "file", "name"), SHOWN, ids=[f"{p.stem}-{n}" for p, _, n in SHOWN])
def test_code_that_a_page_shows_exists(path, file, name):
    assert definition((path.parent / file).resolve().relative_to(ROOT), name)


def test_the_reference_has_every_public_module():
    shown = set(re.findall(r"automodule:: (\S+)", " ".join(path.read_text() for path in PAGES)))
    assert set(NAMES) <= shown


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
