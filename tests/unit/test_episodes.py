"""Episodes on another device and in another dtype."""

from __future__ import annotations

import pytest
import torch
from conftest import class_episode, regression_episode
from lightning.fabric.utilities import move_data_to_device
from torch import nn
from torch.utils import _pytree as pytree

from lightning_imaml import Episode
from lightning_imaml.functional import meta_gradient

# Tensors without data take the place of those on a GPU.
META = torch.device("meta")


def kinds(episode):
    return [(leaf.device.type, leaf.dtype) for leaf in pytree.tree_leaves(episode)]


def nested() -> Episode:
    """Inputs of tokens, a mask and numbers."""
    inputs = {"tokens": torch.ones(2, 3, 4, dtype=torch.int32), "mask": (torch.ones(2, 3, 4) > 0, torch.rand(2, 3))}
    return Episode(inputs, torch.zeros(2, 3, dtype=torch.long), inputs, torch.zeros(2, 3, dtype=torch.long))


def test_a_dtype_converts_floating_point_numbers_only():
    episode = nested().to(torch.float64)
    assert isinstance(episode, Episode)
    part = [("cpu", torch.int32), ("cpu", torch.bool), ("cpu", torch.float64), ("cpu", torch.int64)]
    assert kinds(episode) == part + part


@pytest.mark.parametrize("where", [(META,), ("meta",), (torch.ones(1, device=META, dtype=torch.int32),)])
def test_a_device_moves_all(where):
    before = nested()
    assert kinds(before.to(*where)) == [("meta", dtype) for _, dtype in kinds(before)]
    assert kinds(before) == kinds(nested())


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        (("meta", torch.bfloat16), {}),
        ((), {"device": "meta", "dtype": torch.bfloat16}),
        ((torch.ones(1, device="meta", dtype=torch.bfloat16),), {}),
    ],
)
def test_both(args, kwargs):
    episode = regression_episode().to(*args, **kwargs)
    assert kinds(episode) == [("meta", torch.bfloat16)] * 4


def test_values_stay_and_what_fits_is_no_copy():
    episode = regression_episode()
    wide = episode.to(torch.float64)
    assert torch.equal(wide.query_inputs, episode.query_inputs.double())
    same = episode.to(episode.query_inputs)
    assert all(mine is its for mine, its in zip(episode, same, strict=True))


def test_whole_numbers_are_refused_as_a_dtype():
    with pytest.raises(TypeError, match=r"found torch\.int64\. Convert class indices with episode\._replace"):
        nested().to(torch.int64)


def test_what_lightning_moves():
    """Lightning calls ``to`` of whatever has it; other parts of a batch go on to be moved."""
    extra = torch.ones(2)
    batch, other = move_data_to_device([nested(), extra], META)
    assert isinstance(batch, Episode)
    assert kinds(batch) == [("meta", dtype) for _, dtype in kinds(nested())]
    assert other.device == META
    untouched = move_data_to_device(nested(), torch.device("cpu"))
    assert kinds(untouched) == kinds(nested())


class Moves:
    """Something with ``to``, as Hugging Face's encodings are."""

    device = "cpu"

    def to(self, device):
        self.device = str(device)
        return self


def test_leaves_of_another_kind():
    episode = Episode(Moves(), "a name", Moves(), None)
    moved = episode.to(META)
    assert (moved.support_inputs.device, moved.support_targets, moved.query_targets) == ("meta", "a name", None)
    assert episode.to(torch.float64) == episode


def test_the_remedy_for_a_wrong_dtype_works():
    episode, network = class_episode(tasks=2, shape=(3,)), nn.Linear(3, 5)
    with pytest.raises(ValueError, match=r"Convert the episode with \.to\(torch\.float32\)"):
        meta_gradient(network, episode.to(torch.float64))
    wide = episode.to(torch.float64)
    assert meta_gradient(network, wide.to(torch.float32)).loss.isfinite().all()
    with pytest.raises(ValueError, match=r"found 'meta'\. Move one of them with \.to\(device\)"):
        meta_gradient(network, episode.to("meta"))
