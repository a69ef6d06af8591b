"""keep_freed_memory: the kernel's own count of page faults says whether it works."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys

import pytest

from lightning_imaml import cli
from lightning_imaml.runtime import memory as allocator

# Twenty times 20 tensors of 4 MiB. With glibc's defaults chance decides, by what lies at the end of the heap, whether
# their pages are mapped anew each time; with a low threshold they are.
FAULTS = """
import resource, sys, torch
from lightning_imaml.runtime.memory import keep_freed_memory
took_effect = keep_freed_memory() if sys.argv[1] == "kept" else None
def work(times):
    for _ in range(times):
        tensors = [torch.empty(2**20).fill_(1) for _ in range(20)]
        del tensors
work(3)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
work(20)
print(took_effect, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD")


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch):
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)


def faults(side: str, **settings: str) -> tuple[str, int]:
    done = subprocess.run(
        [sys.executable, "-c", FAULTS, side], env=os.environ | settings, capture_output=True, text=True, check=True
    )
    took_effect, count = done.stdout.split()
    return took_effect, int(count)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc's allocator that is set")
def test_memory_that_is_freed_is_used_again_without_page_faults():
    _, mapped = faults("mapped", MALLOC_MMAP_THRESHOLD_="131072")
    took_effect, kept = faults("kept")
    assert took_effect == "True"
    assert mapped >= 20 * 20  # For each tensor one at least, with the largest pages.
    assert kept < mapped / 20


@pytest.mark.parametrize(
    ("most", "calls", "took_effect"),
    [
        (2**30, [(-3, 2**30), (-1, 2**30)], True),
        (2**25, [(-3, 2**30), (-3, 2**25), (-1, 2**30)], True),
        (0, [(-3, 2**30), (-3, 2**25)], False),
    ],
)
def test_what_older_versions_refuse_leaves_nothing_half_set(monkeypatch, most, calls, took_effect):
    """The trim threshold alone fixes the other one at 128 KiB."""
    monkeypatch.setattr(sys, "platform", "linux")
    seen = []

    class Library:
        def mallopt(self, setting, value):
            seen.append((setting, value))
            return int(setting != -3 or value <= most)

    monkeypatch.setattr(ctypes, "CDLL", lambda path: Library())
    assert allocator.keep_freed_memory() is took_effect
    assert seen == calls


@pytest.mark.parametrize("name", SETTINGS[:3])
def test_what_the_user_has_set_stays(monkeypatch, name):
    monkeypatch.setenv(name, "")
    monkeypatch.setattr(ctypes, "CDLL", lambda path: pytest.fail("the allocator was set"))
    assert not allocator.keep_freed_memory()


@pytest.mark.parametrize(("system", "library"), [("darwin", None), ("win32", None), ("linux", object())])
def test_other_allocators_are_left_alone(monkeypatch, system, library):
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(ctypes, "CDLL", lambda path: library or pytest.fail("there is no glibc"))
    assert not allocator.keep_freed_memory()


def test_the_command_line_calls_it_before_all_else(monkeypatch):
    called = []
    monkeypatch.setattr(cli, "keep_freed_memory", lambda: called.append("keep_freed_memory"))
    monkeypatch.setattr(cli, "run", lambda: called.append("run"))
    cli.main()
    assert called == ["keep_freed_memory", "run"]
