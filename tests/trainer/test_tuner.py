"""Lightning's finders, with every setting of the module that they meet."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from lightning.pytorch.tuner import Tuner
from small_runs import episode, loader, network, trainer, weights
from torch import nn
from torch.utils.data import DataLoader

from lightning_imaml import IMAMLModule
from lightning_imaml.data import GlyphDataModule
from lightning_imaml.inner import GradientDescent
from lightning_imaml.regularizers import Proximal

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*You are using `torch.load`"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]


class WithLR(IMAMLModule):
    """A learning rate that the finder may set."""

    def __init__(self, lr: float = 0.01, **settings):
        defaults = {"inner_solver": GradientDescent(0.1, 2), "regularizer": Proximal(0.5, learned=True)}
        super().__init__(network(), **defaults | settings)
        self.lr = lr

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


SETTINGS = {
    "default": {},
    "accumulate": {"accumulate_meta_batches": 4},
    "uneven": {"accumulate_meta_batches": 3},
    "skip": {"on_bad_task": "skip"},
    "clip": {"gradient_clip_val": 0.1},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_the_learning_rate_finder(name, tmp_path):
    torch.manual_seed(0)
    model = WithLR(**SETTINGS[name])
    start = weights(model)
    run = trainer(default_root_dir=tmp_path, max_epochs=2)
    finder = Tuner(run).lr_find(model, loader(40), num_training=30, min_lr=1e-3, max_lr=1.0)
    found = finder.results["lr"]
    assert len(found) >= 10
    # Exponentially between the two: the same learning rates in the same order, whatever a meta-step is.
    assert found[0] == pytest.approx(1e-3, rel=0.3)
    assert all(later > earlier for earlier, later in itertools.pairwise(found))
    assert model.lr in found
    assert torch.equal(weights(model), start)
    assert (run.accumulate_grad_batches, run.log_every_n_steps) == (1, 1)
    run.fit(model, loader(8))
    assert run.optimizers[0].param_groups[0]["lr"] == model.lr
    each = SETTINGS[name].get("accumulate_meta_batches", 1)
    assert run.global_step == 2 * -(-8 // each)


def test_a_fit_after_the_finder_draws_its_own_random_numbers(tmp_path):
    """Its checkpoint, saved before there was a seed, does not bring one."""
    seeds = []
    for seed in range(2):
        model, run = WithLR(), trainer(default_root_dir=tmp_path)
        Tuner(run).lr_find(model, loader(20), num_training=15, update_attr=False)
        torch.manual_seed(seed)
        run.fit(model, loader(1))
        seeds.append(model.outer_state()["seed"])
    assert None not in seeds
    assert seeds[0] != seeds[1]


def test_the_finder_without_an_attribute_is_explained(tmp_path):
    model = IMAMLModule(network(), inner_solver=GradientDescent(0.1, 1))
    with pytest.raises(Exception, match=r"should have one of these fields: \('lr', 'learning_rate'\)"):
        Tuner(trainer(default_root_dir=tmp_path)).lr_find(model, loader(20), num_training=15)
    found = Tuner(trainer(default_root_dir=tmp_path)).lr_find(model, loader(20), num_training=15, update_attr=False)
    assert found.suggestion() is None or found.suggestion() > 0


@pytest.mark.parametrize("name", ["default", "accumulate", "skip"])
@pytest.mark.parametrize("mode", ["power", "binsearch"])
def test_the_batch_size_finder_doubles_the_tasks_of_a_batch(name, mode, tmp_path):
    torch.manual_seed(0)
    data = GlyphDataModule(ways=3, shots=1, queries=1, tasks_per_batch=2, batches_per_epoch=64, val_tasks=2)
    flat = nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, 3))
    model = IMAMLModule(
        flat, inner_solver=GradientDescent(0.1, 1), optimizer=functools.partial(torch.optim.SGD, lr=0.1),
        **SETTINGS[name],
    )  # fmt: skip
    start, run = weights(model), trainer(default_root_dir=tmp_path, max_epochs=1, limit_train_batches=8)
    tuner = Tuner(run)
    found = tuner.scale_batch_size(
        model, datamodule=data, batch_arg_name="tasks_per_batch", mode=mode, max_trials=3, steps_per_trial=1
    )
    assert found == data.hparams["tasks_per_batch"] == {"power": 8, "binsearch": 7}[mode]  # The latter leaves a margin.
    assert torch.equal(weights(model), start)


def test_a_loader_of_ones_own_has_no_batch_size_to_find(tmp_path):
    model = IMAMLModule(network(), inner_solver=GradientDescent(0.1, 1))
    data = DataLoader([episode()] * 4, batch_size=None)
    with pytest.raises(Exception, match="cannot be used with dataloaders passed directly"):
        Tuner(trainer(default_root_dir=tmp_path)).scale_batch_size(model, data)
