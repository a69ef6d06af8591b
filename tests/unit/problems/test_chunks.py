"""The chunk size that is taken where the user gives none."""

from __future__ import annotations

import pytest
import torch
from conftest import TanhNet, class_episode, regression_episode
from torch import nn
from torch.nn import functional as F

from lightning_imaml.functional import adapt, meta_gradient, predict
from lightning_imaml.models import Conv4
from lightning_imaml.problems import chunks
from lightning_imaml.problems.network import FlatModel

EVEN = [(16, 100, 16), (16, 16, 16), (16, 15, 8), (16, 7, 4), (16, 1, 1), (16, 0, 1), (12, 5, 4)]
UNEVEN = [(7, 4, 4), (7, 3, 3), (11, 4, 4)]


@pytest.mark.parametrize(("tasks", "most", "size"), EVEN + UNEVEN)
def test_chunks_are_even_and_within_the_limit(tasks, most, size):
    assert chunks.even_chunk_size(tasks, most) == size


def test_the_work_of_a_task_is_what_its_graph_keeps():
    """For two linear layers with a square between them: the inputs, the weights and the outputs of the first layer."""

    class Squared(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False)

        def forward(self, x):
            return self.second(self.first(x) ** 2)

    inputs = torch.randn(5, 6, 3)  # 6 samples a task
    kept = 6 * 3 + 6 * 4 + 6 * 4 + 2 * 4  # inputs of both layers, what is squared, the second weight
    assert chunks._bytes_of_a_task(FlatModel(Squared()), inputs) == 4 * kept


def test_small_tasks_go_together_and_large_ones_apart(monkeypatch):
    flat = FlatModel(Conv4(5))
    one_shot, many = torch.rand(16, 5, 1, 28, 28), torch.rand(16, 100, 1, 28, 28)
    assert chunks.default_chunk_size(flat, one_shot, 16) > chunks.default_chunk_size(flat, many, 16) == 1
    monkeypatch.setattr(chunks, "_CPU_BYTES", 10**10)
    assert chunks.default_chunk_size(flat, many, 16) == 16


def test_compiled_tasks_go_in_large_chunks_or_alone(monkeypatch):
    flat, images = FlatModel(Conv4(5), compile=True), torch.rand(64, 5, 1, 28, 28)
    work = chunks._bytes_of_a_task(flat, images)
    for fitting, size in ((32, 32), (8, 8), (7, 1), (0, 1)):
        monkeypatch.setattr(chunks, "_CPU_BYTES", fitting * work)
        assert chunks.default_chunk_size(flat, images, 64) == size
    monkeypatch.setattr(chunks, "_CPU_BYTES", 32 * work)
    assert chunks.default_chunk_size(flat, images[:4], 4) == 4  # All there are.


def test_the_default_gives_what_every_chunk_size_gives(monkeypatch, tanh_net):
    work = chunks._bytes_of_a_task(FlatModel(tanh_net), torch.rand(1, 6, 3).double())
    monkeypatch.setattr(chunks, "_CPU_BYTES", 3 * work)
    seen = []
    monkeypatch.setattr(chunks, "even_chunk_size", lambda tasks, most: seen.append((tasks, most)) or min(tasks, most))
    by_default = meta_gradient(tanh_net, regression_episode(), loss=F.mse_loss)
    assert seen == [(4, 3)]
    whole = meta_gradient(tanh_net, regression_episode(), loss=F.mse_loss, chunk_size=4)
    for name in whole.grads:
        torch.testing.assert_close(by_default.grads[name], whole.grads[name])


def test_measuring_leaves_the_random_state_and_works_in_inference_mode():
    net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2))
    torch.manual_seed(0)
    before = torch.get_rng_state()
    inputs = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(0))
    chunks.default_chunk_size(FlatModel(net), inputs, 2)
    assert torch.equal(torch.get_rng_state(), before)
    episode = class_episode(2, shape=(1, 16, 16))
    with torch.inference_mode():
        images = episode.support_inputs * 1
        adapted = adapt(Conv4(5, filters=2, image_size=16), images, episode.support_targets)
        outputs = predict(Conv4(5, filters=2, image_size=16), adapted.parameters, images)
    assert outputs.shape == (2, 5, 5)


def test_another_shape_is_measured_anew():
    flat = FlatModel(TanhNet())
    few, many = (chunks._bytes_of_a_task(flat, torch.rand(2, count, 3)) for count in (2, 20))
    assert few < many


class _Device:
    total_memory = 2**30


def test_on_a_gpu_the_estimator_and_the_query_set_count(monkeypatch):
    """A share of the memory over what is held at once; logic only, without a GPU."""
    flat, support, query = FlatModel(Conv4(5)), torch.rand(64, 5, 1, 28, 28), torch.rand(64, 75, 1, 28, 28)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: _Device)
    work = {count: chunks._bytes_of_a_task(flat, images) for count, images in ((5, support), (75, query))}
    monkeypatch.setattr(chunks, "_bytes_of_a_task", lambda model, inputs: work[inputs.shape[1]])
    flat.device = torch.device("cuda", 0)
    seen = []
    monkeypatch.setattr(chunks, "even_chunk_size", lambda tasks, most: seen.append(most))
    chunks.default_chunk_size(flat, support, 64, support)
    chunks.default_chunk_size(flat, support, 64, support, differentiated_steps=16)
    chunks.default_chunk_size(flat, support, 64, query)
    assert seen == [2**28 // (8 * work[5]), 2**28 // (56 * work[5]), 2**28 // (3 * work[75])]
