"""The three worked examples of existing code that becomes a few-shot learner, and inputs that are no images."""

from __future__ import annotations

import image_folder
import own_lightning_module
import own_network
import pytest
import torch
from lightning.pytorch import Trainer
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_imaml import Episode, IMAMLModule
from lightning_imaml.inner import GradientDescent
from lightning_imaml.regularizers import Proximal

QUIET = {
    "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False, "accelerator": "cpu",
    "devices": 1, "logger": False,
}  # fmt: skip


@pytest.mark.parametrize("example", [own_network, own_lightning_module], ids=lambda module: module.__name__)
def test_what_there_was_learns_to_learn(example):
    found = example.main(["--meta-steps", "100", "--test-tasks", "200"])
    assert found["test/accuracy_before"] == pytest.approx(0.2, abs=0.05)
    assert found["test/accuracy"] > 0.5


def test_the_reused_loss_is_the_one_that_trains(monkeypatch):
    taken = []
    original = own_lightning_module.Classifier.compute_loss
    monkeypatch.setattr(
        own_lightning_module.Classifier, "compute_loss",
        lambda self, logits, labels: (taken.append(logits.shape), original(self, logits, labels))[1],
    )  # fmt: skip
    own_lightning_module.main(["--meta-steps", "1", "--test-tasks", "8"])
    assert {shape[-2] for shape in taken} == {5, 25}  # Support sets and query sets.


def test_a_resnet_with_a_folder_of_images(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for label in range(12):
        (tmp_path / f"class{label:02d}").mkdir()
        for k in range(2):
            noise = torch.randint(0, 60, (20, 20, 3), generator=generator)
            colour = torch.randint(0, 196, (3,), generator=torch.Generator().manual_seed(label))
            image = Image.fromarray((noise + colour).to(torch.uint8).numpy())
            image.save(tmp_path / f"class{label:02d}" / f"{k}.png")
    sizes = "--ways 2 --queries 1 --size 16 --meta-steps 1 --test-tasks 4"
    found = image_folder.main([str(tmp_path), *sizes.split()])
    assert found["test/accuracy"] > 0.6 > found["test/accuracy_before"]


def fit(network: nn.Module, episode: Episode, loss: object = F.cross_entropy, **settings: object) -> Trainer:
    module = IMAMLModule(
        network, loss=loss, inner_solver=GradientDescent(0.1, 2), regularizer=Proximal(0.5), **settings
    )
    data = DataLoader([episode], batch_size=None)
    run = Trainer(**QUIET, max_steps=2, log_every_n_steps=1)
    before = nn.utils.parameters_to_vector(module.parameters()).detach().clone()
    run.fit(module, data, data)
    assert not torch.equal(nn.utils.parameters_to_vector(module.parameters()), before)
    assert torch.isfinite(run.callback_metrics["val/loss"])
    return run


class Recurrent(nn.Module):
    """Reads tokens ``[n, length]``."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.recurrence = nn.GRU(4, 5, batch_first=True)
        self.out = nn.Linear(5, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        states, _ = self.recurrence(self.embedding(tokens))
        return self.out(states[:, -1])


class Attending(Recurrent):
    """Reads tokens by attention."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrence = nn.MultiheadAttention(4, 2, batch_first=True)
        self.out = nn.Linear(4, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        embedded = self.embedding(tokens)
        return self.out(self.recurrence(embedded, embedded, embedded)[0].mean(dim=1))


@pytest.mark.parametrize("network", [Recurrent, Attending])
def test_a_sequence_model(network):
    tokens, labels = torch.randint(0, 7, (2, 4, 6)), torch.tensor([0, 1, 0, 1]).expand(2, 4)
    # One task at a time: PyTorch has no rule to batch recurrent layers over their weights.
    run = fit(network(), Episode(tokens, labels, tokens.flip(1), labels.flip(1)), chunk_size=1)
    assert "val/accuracy" in run.callback_metrics


class FromDict(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.numbers, self.tokens = nn.Linear(3, 4), nn.Embedding(5, 4)
        self.out = nn.Linear(4, 1)

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        return self.out(torch.tanh(self.numbers(inputs["numbers"]) + self.tokens(inputs["token"])))


def test_dict_inputs_and_regression_targets():
    inputs = {"numbers": torch.randn(3, 6, 3), "token": torch.randint(0, 5, (3, 6))}
    targets = torch.randn(3, 6, 1)
    run = fit(FromDict(), Episode(inputs, targets, inputs, targets), loss=F.mse_loss)
    assert "val/accuracy" not in run.callback_metrics
