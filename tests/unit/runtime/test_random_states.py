"""The random states of a device; the GPU's calls are recorded, since the tests run without one."""

from __future__ import annotations

import contextlib

import pytest
import torch

from lightning_imaml.runtime.random_states import random_states, seed_random_states, set_random_states

CPU, GPU = torch.device("cpu"), torch.device("cuda", 1)


@pytest.fixture
def calls(monkeypatch) -> list[tuple]:
    found: list[tuple] = []
    state = torch.arange(16, dtype=torch.uint8)

    @contextlib.contextmanager
    def device(which):
        found.append(("device", which))
        yield
        found.append(("end", which))

    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda which: (found.append(("get", which)), state)[1])
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda value, which: found.append(("set", value.tolist(), which)))
    monkeypatch.setattr(torch.cuda, "manual_seed", lambda seed: found.append(("seed", seed)))
    monkeypatch.setattr(torch.cuda, "device", device)
    return found


def test_the_cpu_alone_goes_on_where_it_was(calls):
    torch.manual_seed(0)
    states = random_states(CPU)
    drawn = torch.rand(3)
    set_random_states(states, CPU)
    assert torch.equal(torch.rand(3), drawn)
    assert not calls


def test_both_generators_of_a_gpus_process_are_kept(calls):
    states = random_states(GPU)
    drawn = torch.rand(3)
    set_random_states(states, GPU)
    assert torch.equal(torch.rand(3), drawn)
    assert calls == [("get", GPU), ("set", list(range(16)), GPU)]


def test_states_of_a_gpu_are_put_back_without_one_and_the_other_way_round(calls):
    set_random_states(random_states(GPU), CPU)
    set_random_states(random_states(CPU), GPU)
    assert [call[0] for call in calls] == ["get"]


def test_a_stream_is_named_by_all_its_numbers(calls):
    drawn = {}
    for name in [(0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 0, 10), (0, 10, 0)]:
        seed_random_states(CPU, *name)
        drawn[name] = tuple(torch.rand(3).tolist())
    assert len(set(drawn.values())) == len(drawn)
    seed_random_states(CPU, 0, 0, 1)
    assert tuple(torch.rand(3).tolist()) == drawn[0, 0, 1]
    assert not calls


def test_a_gpus_generator_is_seeded_on_its_own_device(calls):
    for number in (3, 4, 3):
        seed_random_states(GPU, 0, 0, number)
    (one, first, two), (_, second, _), (_, again, _) = calls[:3], calls[3:6], calls[6:]
    assert (one, two) == (("device", GPU), ("end", GPU))
    assert first == again != second
