"""Tables 2 and 3: a training that begins with the weights of another."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import reproduce
import torch
import yaml
from test_reproduce import pytestmark, run

__all__ = ["pytestmark"]


def of(checkpoint):
    return torch.load(checkpoint, weights_only=True)["state_dict"]


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """The weights that the others begin with."""
    trained = run(tmp_path_factory.mktemp("first"), epochs=1)
    reproduce.reproduce(trained)
    return trained.weights


def begun_with(first, folder, model=(), data=(), **changes):
    """A run that begins with the weights of another and, at the outer rate zero, ends with them."""
    still = {"optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.0}}, **dict(model)}
    second = run(folder, epochs=1, start=first)
    difference = {"model": {"init_args": still}, "data": {"init_args": dict(data)}}
    (folder / "still.yaml").write_text(yaml.safe_dump(difference))
    return replace(second, configs=[*second.configs, folder / "still.yaml"], seed=1, **changes)


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.filterwarnings("ignore:(?s)Be aware that when using `ckpt_path`, callbacks used to create")
def test_it_begins_with_the_weights_of_another(first, tmp_path):
    passing = Path(shutil.copy(first, tmp_path))
    second = begun_with(passing, tmp_path / "second")
    row = reproduce.reproduce(second)
    assert f", beginning with {first.name}; " in row["protocol"]
    for name, value in of(first).items():
        torch.testing.assert_close(of(second.weights)[name], value, rtol=0, atol=0, msg=name)

    (tmp_path / "second" / "epochs.yaml").write_text(yaml.safe_dump({"trainer": {"max_epochs": 2}}))
    passing.unlink()
    assert reproduce.train(second).trainer.global_step == 2, "what goes on has its own weights"


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_head_for_other_ways_begins_with_the_mean_class(first, tmp_path):
    changes = {"model": {"backbone": {"init_args": {"ways": 3}}}, "data": {"ways": 3}}
    second = begun_with(first, tmp_path / "second", ways=3, **changes)
    reproduce.reproduce(second)
    old, new = of(first), of(second.weights)
    heads = {name for name, value in new.items() if value.shape != old[name].shape}
    assert heads
    assert all(len(new[name]) == 3 for name in heads)
    for name, value in new.items():
        expected = old[name].numpy().mean(0)[None].repeat(3, 0) if name in heads else old[name].numpy()
        torch.testing.assert_close(value, torch.as_tensor(expected), rtol=1e-6, atol=1e-8, msg=name)


@pytest.mark.parametrize("several", [["--config", "a.yaml", "b.yaml"], ["--config", "a.yaml", "--config", "b.yaml"]])
def test_differences_keep_their_order_and_the_last_one_names_the_run(several, monkeypatch):
    runs = []
    monkeypatch.setattr(reproduce, "reproduce", lambda run: runs.append(run) or dict.fromkeys(
        ("accuracy", "interval95", "meta_steps"), 0))  # fmt: skip
    reproduce.main([*several, "--table", "2", "--method", "maml", "--root", "none", "--budget", "1"])
    assert [path.name for path in runs[0].configs[-2:]] == ["a.yaml", "b.yaml"]
    assert runs[0].variant == "b"
