"""Live tensor bytes against sequences that can be counted by hand. One float32 matrix of the tests has 4 KiB."""

import gc

import pytest
import torch

from lightning_imaml.callbacks import LiveTensorBytes

SIDE = 32
UNIT = SIDE * SIDE * 4


def matrix(requires_grad: bool = False) -> torch.Tensor:
    return torch.eye(SIDE, requires_grad=requires_grad)


def test_a_chain_without_graph_needs_two_matrices_whatever_its_length():
    for length in (2, 10):
        x = matrix()
        with LiveTensorBytes() as live:
            for _ in range(length):
                x = x @ x
        assert (live.current, live.peak) == (UNIT, 2 * UNIT)


@pytest.mark.parametrize("length", [2, 10])
def test_a_graph_keeps_every_matrix_of_a_chain(length):
    x = matrix(requires_grad=True)
    with LiveTensorBytes() as live:
        for _ in range(length):
            x = x @ x
        assert live.current == length * UNIT
        # Nothing in Python holds the intermediate results: the graph alone does.
        del x
        assert live.current == 0
    assert live.peak == length * UNIT


def test_backward_frees_the_graph_and_leaves_the_gradient():
    x = matrix(requires_grad=True)
    with LiveTensorBytes() as live:
        y = x.exp().exp().sum()
        y.backward()
        del y
    assert live.current == UNIT
    assert x.grad is not None


def test_a_retained_graph_grows_by_double_backward():
    x = matrix(requires_grad=True)
    with LiveTensorBytes() as live:
        y = x.exp()
        (g,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        held = live.current
        (h,) = torch.autograd.grad(g.sum(), x)
        assert held >= 2 * UNIT
        del y, g, h
        gc.collect()
    assert live.current == 0


def test_views_and_in_place_results_count_once():
    with LiveTensorBytes() as live:
        x = torch.zeros(SIDE, SIDE)
        views = [x.view(-1), x.t(), x[3:], x.expand(5, SIDE, SIDE), x.detach(), x.add_(1), x.mul_(2)]
        assert (live.current, live.peak) == (UNIT, UNIT)
        # One view keeps the whole storage.
        del x
        views = views[2:3]
        assert live.current == UNIT
        del views
        assert live.current == 0


def test_views_and_in_place_results_of_outside_tensors_do_not_count():
    x = matrix()
    with LiveTensorBytes() as live:
        y = x.view(-1)
        y.add_(1)
        x[2:].zero_()
        torch.add(x, 1, out=x)
    assert live.peak == 0


def test_tracked_tensors_count_until_they_die():
    x = matrix()
    with LiveTensorBytes() as live:
        live.track([x, x.view(-1)])
        assert live.current == UNIT
        del x
        assert live.current == 0
    assert live.peak == UNIT


def test_resized_storages_count_by_their_new_size():
    with LiveTensorBytes() as live:
        x = torch.zeros(8)
        assert live.current == 32
        x.resize_(100)
        assert live.current == 400


def test_literal_tensors_count():
    with LiveTensorBytes() as live:
        x = torch.tensor([1.0, 2.0])
        assert live.current == 8
        del x
        assert live.current == 0


def test_reset_peak_starts_at_what_is_held():
    with LiveTensorBytes() as live:
        x = torch.zeros(SIDE, SIDE)
        y = torch.zeros(SIDE, SIDE)
        del y
        live.reset_peak()
        assert live.peak == UNIT
        z = x + 1
    assert live.peak == 2 * UNIT
    assert z is not None


def test_it_sees_through_vmap_and_grad():
    def loss(row: torch.Tensor) -> torch.Tensor:
        return row.exp().sum()

    rows = matrix()
    with LiveTensorBytes() as live:
        gradient = torch.func.vmap(torch.func.grad(loss))(rows)
        gc.collect()
    assert torch.equal(gradient, rows.exp())
    assert live.current == UNIT
    assert live.peak >= 2 * UNIT


def test_it_changes_no_result():
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(1, 3, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(108, 2)
    )
    inputs = torch.randn(4, 1, 8, 8)
    expected = torch.autograd.grad(network(inputs).square().sum(), list(network.parameters()))
    with LiveTensorBytes():
        found = torch.autograd.grad(network(inputs).square().sum(), list(network.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_two_runs_give_the_same_count():
    def peak() -> int:
        x = matrix(requires_grad=True)
        with LiveTensorBytes() as live:
            torch.autograd.grad((x @ x).tanh().sum(), x)
        return live.peak

    assert peak() == peak()


def test_sparse_and_meta_tensors_are_left_out():
    with LiveTensorBytes() as live:
        x = torch.empty(1000, device="meta")
        y = torch.sparse_coo_tensor(torch.zeros(1, 0, dtype=torch.long), torch.zeros(0), (4,), check_invariants=True)
    assert live.current == 0
    assert x.is_meta
    assert y.is_sparse


def test_deaths_after_the_block_do_not_disturb():
    with LiveTensorBytes() as live:
        x = torch.zeros(8)
    del x
    assert live.current == 0
