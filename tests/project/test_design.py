"""What outside code relies on: public names, their docstrings, file lengths, imports, checkpoints of settings."""

from __future__ import annotations

import importlib
import inspect
import io
import re

import pytest
import torch
from conftest import ROOT
from public_api import NAMES
from rooms import ROOMS, room_of

from lightning_imaml.curvature import GaussNewton, Hessian
from lightning_imaml.inner import Anderson, GradientDescent, HessianFree, Nesterov, Newton, TorchOptimizer
from lightning_imaml.linear import GMRES, BiCGStab, ConjugateGradient, Direct, MinRes, Neumann, NormalCG
from lightning_imaml.meta_gradients import FirstOrder, Implicit, Reptile, Truncated, Unrolled
from lightning_imaml.regularizers import FullProximal, KroneckerProximal, LowRankProximal, Proximal
from lightning_imaml.runtime.phases import listening, phase

SOURCES = sorted((ROOT / "lightning_imaml").rglob("*.py"))
PROGRAMS = [
    path
    for folder in ("tests", "examples", "experiments", "benchmarks")
    for path in sorted((ROOT / folder).rglob("*.py"))
]
SETTINGS = [
    GradientDescent(0.1, 5, tol=1e-3), ConjugateGradient(7, 1e-3, 0.5), Direct(), MinRes(9), Hessian(), GaussNewton(),
    GMRES(9, restart=3), BiCGStab(9), NormalCG(9), Newton(steps=3), Anderson(3, 9),
    Implicit(ConjugateGradient(3), GaussNewton()), FirstOrder(), Proximal(0.3, learned=True), Nesterov(0.1, 5),
    HessianFree(3, curvature=GaussNewton()), TorchOptimizer(torch.optim.Adam, 3, {"lr": 0.1}), Neumann(3, step=0.5),
    Unrolled(), Truncated(2), Reptile(),
    Proximal({"a.*": 1.0, "*": 2.0}, learned=True, per="layer", bounds=(0.1, 9.0)), FullProximal(1.0),
    GradientDescent({"a.*": 0.1, "*": 0.2}, 3, learned=True, per="parameter"), KroneckerProximal(1.0),
    LowRankProximal(1.0, rank=2), ConjugateGradient(preconditioner="regularizer"),
]  # fmt: skip


@pytest.mark.parametrize(("module", "name"), [(m, n) for m, names in NAMES.items() for n in names])
def test_public_names_exist_and_are_documented(module, name):
    found = getattr(importlib.import_module(module), name)
    assert len(inspect.getdoc(found) or "") > 40
    assert name in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("path", SOURCES + PROGRAMS, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_file_is_long(path):
    assert len(path.read_text().splitlines()) <= 500


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_downward(path):
    room = room_of(path.relative_to(ROOT))
    if room in ("__init__", "__main__"):
        return
    text = path.read_text()
    imported = set(re.findall(r"^(?:from|import) lightning_imaml\.(\w+)", text, flags=re.MULTILINE))
    for listed in re.findall(r"^from lightning_imaml import (.+)$", text, flags=re.MULTILINE):
        imported |= {name.strip() for name in listed.split("#")[0].split(",")} & set(ROOMS)
    for other in imported - {room}:
        assert ROOMS.index(other) < ROOMS.index(room), f"{path} imports {other}"


@pytest.mark.parametrize("setting", SETTINGS, ids=repr)
def test_settings_survive_a_weights_only_checkpoint(setting):
    buffer = io.BytesIO()
    torch.save(setting, buffer)
    buffer.seek(0)
    assert torch.load(buffer, weights_only=True) == setting


def test_listeners_hear_of_phases_in_order_also_when_one_fails():
    heard = []

    class Listener:
        def enter(self, name):
            heard.append(f"+{name}")

        def exit(self, name):
            heard.append(f"-{name}")

    with listening(Listener()), pytest.raises(RuntimeError), phase("outer"), phase("inner"):
        raise RuntimeError
    with phase("unheard"):
        pass
    assert heard == ["+outer", "+inner", "-inner", "-outer"]


@pytest.mark.parametrize("setting", [GaussNewton(0.5), Hessian(0.5)], ids=repr)
def test_settings_of_earlier_checkpoints_are_found_where_they_were(setting, monkeypatch):
    """``lightning_imaml.curvature`` was one module, by which checkpoints name its classes."""
    buffer = io.BytesIO()
    with monkeypatch.context() as patch:
        patch.setattr(type(setting), "__module__", "lightning_imaml.curvature")
        torch.save(setting, buffer)
    buffer.seek(0)
    assert torch.load(buffer, weights_only=True) == setting
