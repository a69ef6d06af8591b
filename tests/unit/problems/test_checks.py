"""What PyTorch would answer with a wrong number is an error at the first batch."""

from __future__ import annotations

import functools

import pytest
import torch
from small_runs import module, trainer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_imaml import Episode
from lightning_imaml.functional import meta_gradient
from lightning_imaml.inner import GradientDescent
from lightning_imaml.problems.checks import require_task_dimension
from lightning_imaml.problems.network import FlatModel


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def episode(targets: torch.Tensor, inputs: torch.Tensor | None = None) -> Episode:
    inputs = draw(*targets.shape[:2], 8) if inputs is None else inputs
    return Episode(inputs, targets, inputs, targets)


def linear(outputs: int, inputs: int = 8) -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs).double()


def loss_of(model: nn.Module, tasks: Episode, loss=F.cross_entropy) -> torch.Tensor:
    return meta_gradient(model, tasks, loss=loss, inner_solver=GradientDescent(0.1, 2)).loss


CLASSES = torch.arange(4).expand(2, 4) % 3
FLAT = nn.Sequential(linear(1), nn.Flatten(0))


@pytest.mark.parametrize(
    ("model", "targets", "words"),
    [
        (linear(3), draw(2, 4), r"must be class indices .*; found torch.float64 of shape \[2, 4\] .*mse_loss"),
        (linear(3), CLASSES.double(), r"found torch.float64 .* Convert class indices with \.long\(\)"),
        (linear(3), draw(2, 4, 3), r"that sum to 1; found torch.float64 of shape \[2, 4, 3\]"),
        (linear(1), torch.ones(2, 4, 1).double(), r"at least two outputs for each sample, .* found \[4, 1\]"),
        (linear(1), 0 * CLASSES, r"at least two outputs for each sample, .* found \[4, 1\].*binary_cross_entropy"),
        (FLAT, 0 * CLASSES, r"at least two outputs for each sample, .* found \[4\]"),
    ],
)
@pytest.mark.parametrize("loss", [F.cross_entropy, nn.CrossEntropyLoss(label_smoothing=0.1)])
def test_cross_entropy_of_what_is_no_class(model, targets, words, loss):
    with pytest.raises(ValueError, match=words):
        loss_of(model, episode(targets), loss)


def test_probabilities_of_classes_are_targets_of_cross_entropy():
    one_hot = F.one_hot(CLASSES, 3).double()
    torch.testing.assert_close(loss_of(linear(3), episode(one_hot)), loss_of(linear(3), episode(CLASSES)))


SQUARES = [
    F.mse_loss, F.l1_loss, nn.MSELoss(), nn.SmoothL1Loss(), nn.HuberLoss(),
    lambda outputs, targets: F.mse_loss(outputs, targets) + 1,
    lambda outputs, targets: ((outputs - targets) ** 2).mean(),
    lambda outputs, targets: ((targets - outputs) ** 2).mean(),
]  # fmt: skip


@pytest.mark.parametrize("loss", SQUARES)
@pytest.mark.parametrize("tasks", [1, 2])
def test_targets_that_broadcast(loss, tasks):
    with pytest.raises(ValueError, match=r"same shape, since PyTorch would broadcast .*; found \[4, 1\] and \[4\]"):
        loss_of(linear(1), episode(draw(tasks, 4)), loss)
    assert loss_of(linear(1), episode(draw(tasks, 4, 1)), loss).shape == (tasks,)


def test_a_loss_may_reshape_outputs_by_itself():
    def squeezed(outputs, targets):
        return F.mse_loss(outputs.squeeze(-1), targets)

    expected = loss_of(linear(1), episode(draw(2, 4, 1)), F.mse_loss)
    inputs = draw(2, 4, 8)
    torch.testing.assert_close(loss_of(linear(1), episode(draw(2, 4), inputs), squeezed), expected)


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (lambda x: (x, 1), "tuple"),
        (lambda x: x.item(), "float"),
        (lambda x: {"loss": x}, "dict"),
        (lambda x: None, "None"),
    ],
)
@pytest.mark.parametrize("tasks", [1, 2])
@pytest.mark.filterwarnings("ignore:.*must consist of operations that torch.func.vmap")
def test_losses_that_are_no_tensors(value, found, tasks):
    def loss(outputs, targets):
        return value(F.mse_loss(outputs, targets))

    with pytest.raises(TypeError, match=rf"loss must return a tensor, with its graph; found {found}"):
        loss_of(linear(1), episode(draw(tasks, 4, 1)), loss)


@pytest.mark.parametrize(
    ("model", "inputs", "targets"),
    [
        (linear(1, inputs=1), draw(4, 1), draw(4, 1)),
        (linear(8), draw(4, 8), draw(4, 8)),
        (nn.Sequential(nn.Conv2d(1, 2, 3).double(), nn.Flatten(1), nn.LazyLinear(1)), draw(4, 1, 5, 5), draw(4, 1)),
    ],
    ids=["numbers", "vectors", "images"],
)
def test_a_missing_dimension_of_tasks(model, inputs, targets):
    if isinstance(model, nn.Sequential):
        model = nn.Sequential(
            model[0], nn.Flatten(-2), nn.Linear(9, 1).double(), nn.Flatten(0), nn.Linear(2, 1).double()
        )
    with pytest.raises(ValueError, match=r"must have shape \[tasks, samples, \.\.\.\]; found \[4, .*\.unsqueeze\(0\)"):
        loss_of(model, episode(targets, inputs), F.mse_loss)


class Scalars(nn.Module):
    """Takes numbers, and draws some: what it is asked must not change the random stream."""

    def __init__(self):
        super().__init__()
        self.linear = linear(1, inputs=1)

    def forward(self, inputs):
        return self.linear(inputs.unsqueeze(-1)).squeeze(-1) + 0 * torch.rand(())


def test_samples_may_be_numbers_and_tasks_may_have_one_sample():
    inputs = draw(3, 4)
    assert loss_of(Scalars(), episode(inputs, inputs), F.mse_loss).shape == (3,)
    assert loss_of(linear(1), episode(draw(3, 1, 1)), F.mse_loss).shape == (3,)
    flat, before = FlatModel(Scalars()), torch.random.get_rng_state()
    require_task_dimension(flat, inputs)
    assert torch.equal(before, torch.random.get_rng_state())


def test_under_the_trainer_it_is_the_first_batch():
    tasks = Episode(*(part.float() for part in episode(draw(2, 4))))
    data = DataLoader([tasks] * 2, batch_size=None)
    model = module(backbone=nn.Linear(8, 1), loss=F.mse_loss, optimizer=functools.partial(torch.optim.SGD, lr=0.1))
    with pytest.raises(ValueError, match="must have the same shape"):
        trainer().fit(model, data)
