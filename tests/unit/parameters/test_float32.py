"""The settings that let float32 be rounded: off inside the solves, and as they were afterwards."""

from __future__ import annotations

import pytest
import torch
from conftest import TanhNet, regression_episode
from torch.nn import functional as F

from lightning_imaml.functional import adapt, meta_gradient
from lightning_imaml.runtime.precision import _settings, full_float32

PARENTS = [torch.backends, torch.backends.cudnn]


def read(setting) -> object:
    try:
        return setting()
    except RuntimeError as error:  # PyTorch refuses to read an older setting that contradicts its successor.
        return str(error)[:60]


def state() -> list[object]:
    older = [
        torch.get_float32_matmul_precision, lambda: torch.backends.cuda.matmul.allow_tf32,
        lambda: torch.backends.cudnn.allow_tf32,
    ]  # fmt: skip
    newer = [operation.fp32_precision for operation in [*PARENTS, *_settings()] if hasattr(operation, "fp32_precision")]
    return [*map(read, older), *newer]


@pytest.fixture(autouse=True)
def settings():
    """Every test ends where it began; the settings are the process's."""
    first = state()
    yield
    if hasattr(torch.backends, "fp32_precision"):
        for parent in PARENTS:
            parent.fp32_precision = "none"
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("highest")
    for operation in _settings():
        operation.fp32_precision = "tf32" if operation in _settings()[1:3] else "none"
    assert state() == first


def older(precision: str):
    return lambda: torch.set_float32_matmul_precision(precision)


def newer(index: int, precision: str):
    def change() -> None:
        _settings()[index].fp32_precision = precision

    return change


def parent(index: int, precision: str):
    def change() -> None:
        PARENTS[index].fp32_precision = precision

    return change


def convolutions_in_full() -> None:
    torch.backends.cudnn.allow_tf32 = False


CHANGES = {
    "default": [],
    **{precision: [older(precision)] for precision in ("highest", "high", "medium")},
    "no TF32 in convolutions": [convolutions_in_full],
    "high, no TF32 in convolutions": [older("high"), convolutions_in_full],
}
if hasattr(torch.backends, "fp32_precision"):
    CHANGES |= {
        "new: matmul": [newer(0, "tf32")],
        "new: conv": [newer(1, "ieee")],
        "new: mkldnn": [newer(3, "bf16"), newer(4, "bf16"), newer(5, "tf32")],
        "new: all, inherited": [parent(0, "tf32")],
        "new: all of a backend, inherited": [parent(1, "tf32")],
        "new: all, and one of its own": [parent(0, "tf32"), newer(3, "ieee")],
        "both": [older("high"), newer(3, "bf16"), newer(1, "ieee")],
    }


@pytest.mark.parametrize("name", CHANGES)
def test_inside_is_full_and_afterwards_all_is_as_before(name):
    for change in CHANGES[name]:
        change()
    before = state()
    with full_float32():
        assert {operation.fp32_precision for operation in _settings()} <= {"ieee"}
        # An older setting can be read wherever it could be before, as a network or a compiler may do.
        mixed = str(before[0]).startswith("PyTorch is checking")
        for now, then, full in zip(state()[:3], before[:3], ["highest", False, False], strict=True):
            assert mixed or now == full or str(then).startswith("PyTorch is checking")
    assert state() == before
    with pytest.raises(KeyError), full_float32():
        raise KeyError
    assert state() == before


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="needs PyTorch 2.9")
def test_what_was_inherited_still_is():
    torch.backends.fp32_precision = "tf32"
    with full_float32():
        pass
    torch.backends.fp32_precision = "ieee"
    assert torch.backends.mkldnn.conv.fp32_precision == "ieee"


@pytest.mark.parametrize("full", [True, False])
def test_solves_are_full_unless_told_otherwise(full):
    torch.set_float32_matmul_precision("medium")
    seen = set()

    class Watched(TanhNet):
        def forward(self, inputs):
            seen.add(torch.get_float32_matmul_precision())
            return super().forward(inputs)

    episode = regression_episode()
    settings = {"loss": F.mse_loss, "full_precision": full, "chunk_size": 4}
    meta_gradient(Watched().double(), episode, **settings)
    adapt(Watched().double(), episode.support_inputs, episode.support_targets, **settings)
    assert seen == {"highest" if full else "medium"}
