from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lightning_imaml import Episode

ROOT = Path(__file__).resolve().parents[1]
OMNIGLOT = ROOT.parent / "shared" / "data" / "omniglot"
MEASURED = pytest.StashKey[bool]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is measured with ``--cov``: the first case of each test that is not slow.

    Tracing makes Python 3.11 run at half its speed, PyTorch's own Python too. The floor of ``make test`` is stricter
    for it: a line counts only if a quick test reaches it in its first case.
    """
    seen: set[str] = set()
    for item in items:
        name = item.nodeid.partition("[")[0]
        item.stash[MEASURED] = name not in seen and item.get_closest_marker("slow") is None
        seen.add(name)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Pause the measurement for the other tests, with their fixtures, which pytest-cov's own marker would measure."""
    controller = getattr(item.config.pluginmanager.getplugin("_cov"), "cov_controller", None)
    if controller is None or item.stash[MEASURED]:
        return (yield)
    controller.pause()
    try:
        return (yield)
    finally:
        controller.resume()


@pytest.fixture(scope="session")
def omniglot_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all processes of tests: the first of them decodes the drawings for the others."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "omniglot_cache"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture
def omniglot_root(omniglot_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The real data, which are decoded once for all tests and leave nothing in the user's cache."""
    if not OMNIGLOT.is_dir():
        pytest.skip("Omniglot is not in ../shared/data/omniglot")
    monkeypatch.setenv("XDG_CACHE_HOME", str(omniglot_cache))
    return OMNIGLOT


class TanhNet(nn.Module):
    """A small network with a non-convex loss, for answers from finite differences."""

    def __init__(self, inputs: int = 3, hidden: int = 4, outputs: int = 2) -> None:
        super().__init__()
        self.hidden = nn.Linear(inputs, hidden)
        self.out = nn.Linear(hidden, outputs)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.out(torch.tanh(self.hidden(inputs)))


def regression_episode(tasks: int = 4, shots: int = 6, inputs: int = 3, outputs: int = 2, seed: int = 0) -> Episode:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return Episode(
        draw(tasks, shots, inputs), draw(tasks, shots, outputs), draw(tasks, shots, inputs), draw(tasks, shots, outputs)
    )


def class_episode(
    tasks: int = 4, ways: int = 5, shots: int = 1, queries: int = 2, shape: tuple[int, ...] = (1, 28, 28), seed: int = 0
) -> Episode:
    """Random images whose mean brightness tells their class, so that adaptation helps."""
    generator = torch.Generator().manual_seed(seed)

    def images(count: int) -> Tensor:
        noise = torch.rand(tasks, ways * count, *shape, generator=generator)
        level = torch.arange(ways).repeat_interleave(count) / ways
        return noise * 0.3 + level.view(1, -1, *[1] * len(shape))

    def targets(count: int) -> Tensor:
        return torch.arange(ways).repeat_interleave(count).expand(tasks, -1).contiguous()

    return Episode(images(shots), targets(shots), images(queries), targets(queries))


@pytest.fixture
def tanh_net() -> TanhNet:
    torch.manual_seed(0)
    return TanhNet().double()
