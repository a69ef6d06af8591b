"""Messages between ranks, and what is said when one does not answer; with recorded calls, so without processes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import distributed

from lightning_imaml.training import ranks
from lightning_imaml.training.ranks import gather, numbers_of_all_ranks, sum_over_ranks

LOST = r"every rank must be running for a meta-step; rank 1 of 3 lost another one \(gone\).*Resume from the last"
ERRORS = [RuntimeError, distributed.DistBackendError, distributed.DistNetworkError, distributed.DistError]


class Late(torch.Tensor):
    """What a backend hands out that does not block: the error comes when it is read."""

    def tolist(self):
        raise distributed.DistBackendError("gone")


def trainer(reduce, processes: int = 3):
    strategy = SimpleNamespace(reduce=reduce, root_device=torch.device("cpu"))
    return SimpleNamespace(world_size=processes, global_rank=1, is_global_zero=False, strategy=strategy)


def failing(error: type[Exception]):
    def reduce(tensor, reduce_op):
        raise error("gone")

    return trainer(reduce)


@pytest.mark.parametrize("error", ERRORS)
def test_every_backends_error_says_what_to_do(error):
    with pytest.raises(RuntimeError, match=LOST) as found:
        numbers_of_all_ranks(failing(error), 1.0)
    assert type(found.value) is RuntimeError
    assert isinstance(found.value.__cause__, error)
    with pytest.raises(RuntimeError, match=LOST):
        sum_over_ranks(failing(error), torch.ones(2))


def test_an_error_that_comes_when_the_numbers_are_read_says_the_same():
    with pytest.raises(RuntimeError, match=LOST):
        numbers_of_all_ranks(trainer(lambda tensor, reduce_op: tensor.as_subclass(Late)), 1.0)


def test_other_errors_are_not_taken_for_a_lost_rank():
    with pytest.raises(KeyError, match="gone"):
        numbers_of_all_ranks(failing(KeyError), 1.0)


def test_numbers_come_rank_by_rank():
    others = torch.tensor([[5.0, 6.0], [0.0, 0.0], [7.0, 8.0]])
    assert numbers_of_all_ranks(trainer(lambda t, reduce_op: t + others), 1, True) == [[5, 6], [1, 1], [7, 8]]


def test_one_process_sends_no_message():
    alone = trainer(lambda *args, **options: pytest.fail("a message"), processes=1)
    assert numbers_of_all_ranks(alone, 1.0, False) == [[1.0, 0.0]]
    assert gather(alone, None, {"a": 1}) == [{"a": 1}]


def test_ranks_that_do_not_answer_are_not_waited_for(monkeypatch):
    assert gather(failing(RuntimeError), None, {}) is None

    def barrier(group, timeout):
        assert timeout.total_seconds() == 30
        raise RuntimeError("gone")

    monkeypatch.setattr(ranks.distributed, "monitored_barrier", barrier)
    assert gather(failing(RuntimeError), object(), {}) is None
