"""The comparison of regularisers on Omniglot: equal steps, paired differences, and it goes on where it was stopped."""

from __future__ import annotations

import csv

import omniglot_regularizers as example
import pytest
import torch


def arguments(root, output, *more: str) -> list[str]:
    small = "--meta-steps 4 --tasks 2 --filters 4 --test-tasks 6 --save-every 2 --regularizer-lr 0.5"
    return ["--root", str(root), *small.split(), "--output", str(output), *more]


@pytest.mark.slow  # Reads all of Omniglot and trains five times: the example must be ready for its hours on a machine.
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
@pytest.mark.filterwarnings("ignore:(?s)Using ModelCheckpoint with manual optimization")
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_it_compares_and_goes_on_where_it_was_stopped(omniglot_root, tmp_path, monkeypatch):
    rows = example.main(arguments(omniglot_root, tmp_path / "whole"))
    assert [row["regularizer"] for row in rows] == list(example.VARIANTS)
    found = [torch.load(path)["accuracies"] for path in sorted((tmp_path / "whole").glob("*/result.pt"))]
    assert [len(values) for values in found] == [6] * 4
    assert rows[0]["gain_over_fixed"] == 0
    assert rows[0]["lowest_strength"] == rows[0]["highest_strength"] == pytest.approx(0.02)
    assert rows[1]["lowest_strength"] == pytest.approx(rows[1]["highest_strength"])
    assert rows[1]["lowest_strength"] != pytest.approx(0.02)
    assert rows[3]["lowest_strength"] < rows[2]["lowest_strength"] < rows[2]["highest_strength"]
    for row in rows:
        assert row["gain_over_fixed"] == pytest.approx(row["accuracy"] - rows[0]["accuracy"])
    with (tmp_path / "whole" / "omniglot_regularizers.csv").open() as file:
        assert [row["regularizer"] for row in csv.DictReader(file)] == list(example.VARIANTS)
    assert (tmp_path / "whole" / "omniglot_regularizers.png").stat().st_size > 0

    def stop(self, trainer, *_):
        if trainer.global_step == 3:
            raise RuntimeError("stopped")

    only = ["--variants", "per layer"]
    with monkeypatch.context() as patched:
        patched.setattr(example.Clock, "on_train_batch_end", stop)
        with pytest.raises(RuntimeError, match="stopped"):
            example.main(arguments(omniglot_root, tmp_path / "parts", *only))
    example.main(arguments(omniglot_root, tmp_path / "parts", *only))
    (resumed,) = (torch.load(path) for path in (tmp_path / "parts").glob("*/result.pt"))
    (at_once,) = (torch.load(path) for path in (tmp_path / "whole").glob("per_layer*/result.pt"))
    torch.testing.assert_close(resumed["accuracies"], at_once["accuracies"])
    torch.testing.assert_close(resumed["strengths"], at_once["strengths"])

    def again(*_):
        raise AssertionError("what is done is not done again")

    monkeypatch.setattr(example, "train", again)
    assert example.main(arguments(omniglot_root, tmp_path / "whole"))[0]["accuracy"] == rows[0]["accuracy"]


def test_the_time_of_a_variant_chooses_the_steps_of_all(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(example, "train", lambda variant, *_: (None, 0.5 if variant == "per weight" else 0.1))
    steps = []

    def run(variant, options, seed, count):
        steps.append(count)
        accuracies = torch.tensor([0.2, 0.4, 0.6]) + 0.1 * seed
        return {"accuracies": accuracies, "strengths": {"weight": torch.tensor([1.0, 2.0])}, "seconds": 0.1}

    monkeypatch.setattr(example, "run", run)
    rows = example.main(["--root", "none", "--minutes", "1", "--seeds", "0", "1", "--output", str(tmp_path)])
    assert steps == [120] * 8
    assert rows[0]["accuracy"] == pytest.approx(45)
    values = torch.tensor([0.2, 0.4, 0.6, 0.3, 0.5, 0.7])
    assert rows[0]["interval95"] == pytest.approx(100 * 1.96 * values.std().item() / 6**0.5)
    assert "give --meta-steps 120" in capsys.readouterr().out
