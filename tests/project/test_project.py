"""What surrounds the code agrees with it: the workflow, the lower bounds, the citation, what an import costs."""

from __future__ import annotations

import configparser
import json
import re
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.version import Version

from lightning_imaml import __version__

SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")
WORKFLOW_TEXT = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
WORKFLOW = yaml.safe_load(WORKFLOW_TEXT)
JOBS = WORKFLOW["jobs"]
STEPS = [step for job in JOBS.values() for step in job["steps"]]


def requirements(text):
    """The requirements of a file or a setting by name, without comments."""
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    return {found.name: found for found in (Requirement(line) for line in lines if line)}


def versions(text):
    return {Version(version) for version in re.findall(r"\b3\.\d+\b", text)}


# Versions


def test_the_constraints_are_the_lower_bounds():
    oldest = requirements((ROOT / "requirements" / "oldest.txt").read_text())
    for name, required in requirements(SETUP["options"]["install_requires"]).items():
        (bound,) = (part for part in required.specifier if part.operator == ">=")
        (pinned,) = oldest[name].specifier
        assert pinned.operator == "=="
        assert Version(pinned.version) == Version(bound.version), name


def test_the_workflow_tests_every_version_of_python_that_is_promised():
    promised = versions(SETUP["metadata"]["classifiers"])
    used = {step["with"]["python-version"] for step in STEPS if "python-version" in step.get("with", {})}
    matrix = JOBS["versions"]["strategy"]["matrix"]["include"]
    tested = versions(" ".join([*used, *(entry["python"] for entry in matrix)]))
    assert tested == promised
    by_name = {entry["versions"]: entry for entry in matrix}
    assert Version(by_name["oldest"]["python"]) == min(promised) == min(versions(SETUP["options"]["python_requires"]))
    assert Version(by_name["newest"]["python"]) == max(promised)
    assert by_name["oldest"]["constraint"] == "--constraint requirements/oldest.txt"


def test_the_extras_are_documented():
    page = (ROOT / "docs" / "getting_started.md").read_text()
    told = set(re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| (`.+?) \|", page, flags=re.MULTILINE))))
    assert set(SETUP["options.extras_require"]) <= told


def test_the_citation_has_the_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert str(citation["version"]) == __version__
    # What the schema 1.2.0 requires.
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    (paper,) = citation["references"]
    assert {"type", "title", "authors"} <= set(paper)
    assert paper["identifiers"][0]["value"] == "arXiv:1909.04630"


# The workflow


def test_what_the_workflow_calls_exists():
    makefile = (ROOT / "Makefile").read_text()
    commands = "\n".join(step["run"] for step in STEPS if "run" in step)
    targets = set(re.findall(r"^make (\w+)", commands, flags=re.MULTILINE))
    assert targets >= {"lint", "test", "docs", "dist", "benchmark"}
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
    for path in re.findall(r"[\w./]+\.(?:txt|py|csv)\b", WORKFLOW_TEXT):
        assert (ROOT / path).is_file(), path


def test_the_workflow_asks_for_no_more_than_it_needs():
    assert WORKFLOW["permissions"] == {"contents": "read"}
    assert not any("permissions" in job for job in JOBS.values())
    assert WORKFLOW["concurrency"]["cancel-in-progress"] is True
    assert "secrets." not in WORKFLOW_TEXT
    for step in STEPS:
        if "uses" in step:
            assert re.fullmatch(r"actions/[\w-]+@[0-9a-f]{40}", step["uses"]), "pinned by commit"
        if step.get("uses", "").startswith("actions/checkout"):
            assert step["with"]["persist-credentials"] is False
        if step.get("uses", "").startswith("actions/setup-python"):
            assert step["with"]["cache"] == "pip"


def test_every_job_ends_and_noisy_ones_are_started_by_hand():
    assert all(job["timeout-minutes"] <= 90 for job in JOBS.values())
    assert {name for name, job in JOBS.items() if "if" in job} == {"benchmark"}
    assert "workflow_dispatch" in JOBS["benchmark"]["if"]


@pytest.mark.parametrize("path", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")), ids=lambda p: p.stem)
def test_issue_forms_have_what_a_form_needs(path):
    form = yaml.safe_load(path.read_text())
    if path.stem == "config":
        assert set(form) == {"blank_issues_enabled"}
        return
    assert {"name", "description", "body"} <= set(form)
    asked = [field for field in form["body"] if field["type"] != "markdown"]
    assert len({field["id"] for field in asked}) == len(asked) > 0
    assert all(field["attributes"]["label"] for field in asked)


# What an import costs

IMPORTED = """
import json, sys
import torch, lightning.pytorch
before = set(sys.modules)
import lightning_imaml
print(json.dumps(sorted(set(sys.modules) - before)))
"""


def test_the_import_brings_nothing_besides_torch_and_lightning():
    """No absolute time, which depends on the machine: what could make it long is another library."""
    listed = subprocess.run([sys.executable, "-c", IMPORTED], check=True, capture_output=True, text=True, cwd=ROOT)
    new = set(json.loads(listed.stdout))
    assert {name.partition(".")[0] for name in new} - set(sys.stdlib_module_names) == {"lightning_imaml"}
    rooms = {name.split(".")[1] for name in new if name.count(".") and name.startswith("lightning_imaml.")}
    assert not rooms & {"data", "callbacks", "models", "cli"}, "these need matplotlib, fontTools, Pillow or torchvision"
