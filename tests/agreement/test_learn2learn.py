"""Against learn2learn, the library whose MAML the field compares with."""

from __future__ import annotations

import importlib
import warnings

import pytest
import torch
from conftest import TanhNet, class_episode, regression_episode
from lightning.pytorch import Trainer
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_imaml import Episode, IMAMLModule
from lightning_imaml.functional import meta_gradient
from lightning_imaml.inner import GradientDescent
from lightning_imaml.meta_gradients import FirstOrder, Unrolled
from lightning_imaml.models import use_batch_statistics
from lightning_imaml.regularizers import NoRegularizer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Of its old dependencies.
    learn2learn = pytest.importorskip("learn2learn", reason="learn2learn is an extra: requirements/learn2learn.txt")


@pytest.mark.parametrize("estimator", [FirstOrder(), Unrolled()], ids=["first order", "second order"])
def test_the_meta_gradient_is_that_of_learn2learns_maml(estimator):
    torch.manual_seed(0)
    net, episode, steps, lr = TanhNet().double(), regression_episode(tasks=3), 4, 0.1
    maml = learn2learn.algorithms.MAML(TanhNet().double(), lr=lr, first_order=estimator == FirstOrder())
    maml.module.load_state_dict(net.state_dict())
    total = 0.0
    for task in range(3):
        learner = maml.clone()
        for _ in range(steps):
            learner.adapt(F.mse_loss(learner(episode.support_inputs[task]), episode.support_targets[task]))
        total = total + F.mse_loss(learner(episode.query_inputs[task]), episode.query_targets[task]) / 3
    total.backward()
    ours = meta_gradient(
        net,
        episode,
        loss=F.mse_loss,
        inner_solver=GradientDescent(lr, steps),
        estimator=estimator,
        regularizer=NoRegularizer(),
    )
    assert ours.loss.mean().item() == pytest.approx(total.item(), rel=1e-10)
    for name, parameter in maml.module.named_parameters():
        torch.testing.assert_close(ours.grads[name], parameter.grad, rtol=1e-8, atol=1e-10)


def test_the_core_never_imports_it():
    import subprocess
    import sys

    code = "import lightning_imaml.cli, sys; assert 'learn2learn' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def l2l_network(name: str):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        models = importlib.import_module("learn2learn.vision.models")
    if name == "OmniglotCNN":
        return models.OmniglotCNN(output_size=2, hidden_size=4), (1, 28, 28)
    if name == "CNN4":
        return models.CNN4(output_size=2, hidden_size=4, channels=3, embedding_size=4 * 25), (3, 84, 84)
    return models.ResNet12(output_size=2, hidden_size=512, wider=False, channels=3), (3, 84, 84)


@pytest.mark.parametrize(
    "name", ["OmniglotCNN", "CNN4", pytest.param("ResNet12", marks=pytest.mark.slow)]
)  # ResNet12 is slow as the only one that has drop-out blocks, which depend on the data.
def test_its_backbones_run_in_the_module(name):
    network, shape = l2l_network(name)
    # One task at a time: the blocks that ResNet12 drops cannot be batched over tasks.
    module = IMAMLModule(
        use_batch_statistics(network), inner_solver=GradientDescent(0.1, 1), estimator=FirstOrder(), chunk_size=1
    )
    data = DataLoader([class_episode(tasks=1, ways=2, queries=1, shape=shape)], batch_size=None)
    run = Trainer(max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu",
                  devices=1, enable_model_summary=False)  # fmt: skip
    before = torch.cat([p.detach().flatten().clone() for p in network.parameters()])
    run.fit(module, data, data)
    assert not torch.equal(torch.cat([p.detach().flatten() for p in network.parameters()]), before)
    assert run.callback_metrics["val/loss"].isfinite()


def to_episode(tasks: list, ways: int = 3, shots: int = 2) -> Episode:
    """A collate function of a person's own: learn2learn's tasks as one episode."""
    parts = []
    for inputs, labels in tasks:
        x, y = inputs.unflatten(0, (ways, -1)), labels.unflatten(0, (ways, -1))
        parts.append([half.flatten(0, 1) for half in (x[:, :shots], y[:, :shots], x[:, shots:], y[:, shots:])])
    return Episode(*[torch.stack(part) for part in zip(*parts, strict=True)])


def test_its_tasksets_feed_the_module():
    data = learn2learn.data
    labels = torch.arange(80) % 8
    items = torch.utils.data.TensorDataset(torch.randn(80, 4) + labels[:, None], labels)
    meta = data.MetaDataset(items)
    transforms = [
        data.transforms.NWays(meta, 3), data.transforms.KShots(meta, 2 + 4), data.transforms.LoadData(meta),
        data.transforms.RemapLabels(meta), data.transforms.ConsecutiveLabels(meta),
    ]  # fmt: skip
    tasks = data.Taskset(meta, task_transforms=transforms, num_tasks=6)
    loader = DataLoader(tasks, batch_size=2, collate_fn=to_episode)
    episode = next(iter(loader))
    assert episode.support_inputs.shape == (2, 6, 4)
    for inputs, targets, shots in ((*episode[:2], 2), (*episode[2:], 4)):
        assert inputs.shape == (2, 3 * shots, 4)
        assert targets.view(2, 3, shots).sort(dim=1).values.tolist() == [[[k] * shots for k in range(3)]] * 2
    module = IMAMLModule(torch.nn.Linear(4, 3), inner_solver=GradientDescent(0.1, 2))
    run = Trainer(max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu",
                  devices=1, enable_model_summary=False)  # fmt: skip
    run.fit(module, loader)
    assert run.global_step == 3
