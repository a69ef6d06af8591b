from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch.core.saving import save_hparams_to_yaml
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from small_runs import SGD, loader, module, network, trainer, weights

from lightning_imaml import IMAMLModule
from lightning_imaml.curvature import GaussNewton
from lightning_imaml.data import GlyphDataModule
from lightning_imaml.inner import GradientDescent, TorchOptimizer
from lightning_imaml.linear import ConjugateGradient
from lightning_imaml.meta_gradients import Implicit
from lightning_imaml.regularizers import Proximal
from lightning_imaml.training.hyperparameters import described, without_configs

PLAIN = (dict, list, str, int, float, bool, type(None))


@dataclasses.dataclass(frozen=True, eq=False)
class Halving(GradientDescent):
    """A solver of one's own, with a field that is no plain value."""

    factor: torch.Tensor = dataclasses.field(default_factory=lambda: torch.tensor([0.5, 2.0]))


def leaves(value):
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [value, *(leaf for part in parts for leaf in leaves(part))]


def test_settings_are_described_by_name_and_fields():
    solver = described(TorchOptimizer(torch.optim.SGD, 3, {"lr": np.float32(0.5)}))
    assert solver["name"] == "TorchOptimizer"
    assert solver["optimizer"] == "torch.optim.sgd.SGD"
    assert solver["options"] == {"lr": 0.5}
    found = described(Implicit(ConjugateGradient(3), GaussNewton()))
    assert found["linear_solver"]["name"] == "ConjugateGradient"
    assert found["linear_solver"]["max_iter"] == 3
    assert described(Proximal({"a.*": 1.0, "*": 2.0}, learned=True, bounds=(0.1, 9.0)))["bounds"] == [0.1, 9.0]
    assert described(Halving(0.1, 2))["factor"] == [0.5, 2.0]
    assert described(functools.partial(SGD)).startswith("functools.partial")
    for value in (solver, found):
        assert all(type(leaf) in PLAIN for leaf in leaves(value))


@pytest.mark.parametrize("logger", [CSVLogger, TensorBoardLogger])
def test_loggers_get_plain_nested_values(logger, tmp_path):
    run = trainer(logger=logger(tmp_path))
    model = module(inner_solver=Halving(0.1, 2))
    run.fit(model, loader(1))
    kept = yaml.safe_load((Path(run.log_dir) / "hparams.yaml").read_text())
    assert kept["inner_solver"]["name"] == "Halving"
    assert kept["inner_solver"]["lr"] == 0.1
    assert kept["regularizer"] == {"name": "Proximal", **dataclasses.asdict(Proximal(0.5))}
    assert all(type(leaf) in PLAIN for leaf in leaves(dict(model.hparams)))
    save_hparams_to_yaml(str(tmp_path / "own.yaml"), model.hparams)
    assert yaml.safe_load((tmp_path / "own.yaml").read_text())["inner_solver"]["steps"] == 2


def saved(model: IMAMLModule, path: Path) -> Path:
    run = trainer()
    run.fit(model, loader(1))
    run.save_checkpoint(path)
    return path


def test_a_checkpoint_restores_the_settings_themselves(tmp_path):
    solver = TorchOptimizer(torch.optim.SGD, 2, {"lr": 0.1, "momentum": 0.9})
    regularizer = Proximal({"1.*": 1.0, "*": 2.0}, learned=True, bounds=(0.1, 9.0))
    model = module(inner_solver=solver, eval_inner_solver=Halving(0.1, 3), regularizer=regularizer)
    path = saved(model, tmp_path / "model.ckpt")
    loaded = IMAMLModule.load_from_checkpoint(path, backbone=network(), optimizer=SGD, weights_only=True)
    assert (loaded.inner_solver, loaded.regularizer) == (solver, regularizer)
    assert torch.equal(loaded.eval_inner_solver.factor, torch.tensor([0.5, 2.0]))
    assert loaded.hparams == model.hparams
    assert torch.equal(weights(loaded), weights(model))
    other = IMAMLModule.load_from_checkpoint(path, backbone=network(), inner_solver=GradientDescent(0.3, 1))
    assert other.hparams["inner_solver"]["lr"] == 0.3


def test_a_checkpoint_of_an_earlier_version_loads(tmp_path):
    """It held what it holds now: the settings themselves."""
    path = saved(module(), tmp_path / "model.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["hyper_parameters"]["inner_solver"] == GradientDescent(0.1, 2)
    assert checkpoint["hyper_parameters"]["regularizer"] == Proximal(0.5)


class WithSolver(IMAMLModule):
    def __init__(self, extra: GradientDescent, sizes=(1, 2), **settings):
        super().__init__(**settings)
        self.save_hyperparameters("extra", "sizes")
        self.extra = extra

    def configure_backbone(self):
        return network()


def test_a_subclass_may_take_settings_of_its_own(tmp_path):
    model = WithSolver(GradientDescent(0.5, 1), optimizer=SGD)
    path = saved(model, tmp_path / "model.ckpt")
    assert model.hparams.extra["lr"] == 0.5
    assert model.hparams_initial.extra["lr"] == 0.5
    loaded = WithSolver.load_from_checkpoint(path)
    assert loaded.extra == GradientDescent(0.5, 1)
    model.hparams["extra"] = "changed by hand"
    run = trainer()
    run.strategy.connect(model)
    run.save_checkpoint(path)
    assert torch.load(path, weights_only=True)["hyper_parameters"]["extra"] == "changed by hand"


# With OmegaConf, as in every project with Hydra.


@pytest.fixture
def configs():
    return pytest.importorskip("omegaconf").OmegaConf


def test_values_of_omegaconf_become_plain_and_others_stay(configs):
    strength = configs.create({"1.*": 1.0, "*": 2.0})
    changed = without_configs(Proximal(strength, learned=True))
    assert changed == Proximal({"1.*": 1.0, "*": 2.0}, learned=True)
    assert type(changed.strength) is dict
    solver = GradientDescent(0.1, 2)
    assert without_configs(solver) is solver
    kept = [1, (2, 3), {"a": math.pi}]
    assert without_configs(kept) is kept
    assert without_configs((configs.create([1]), {"a": configs.create({"b": "${c}", "c": 2})})) == (
        [1],
        {"a": {"b": 2, "c": 2}},
    )


@pytest.mark.parametrize("logger", [CSVLogger, TensorBoardLogger])
def test_the_trainer_logs_and_saves_with_omegaconf_imported(configs, logger, tmp_path):
    model = module(
        adapt_only=configs.create(["3.*"]), regularizer=Proximal(configs.create({"*": 0.5})), chunk_size=None
    )
    run = trainer(logger=logger(tmp_path))
    run.fit(model, loader(1))
    kept = yaml.safe_load((Path(run.log_dir) / "hparams.yaml").read_text())
    assert kept["adapt_only"] == ["3.*"]
    assert kept["regularizer"]["strength"] == {"*": 0.5}
    run.save_checkpoint(tmp_path / "model.ckpt")
    found = torch.load(tmp_path / "model.ckpt", weights_only=True)["hyper_parameters"]
    assert type(found["adapt_only"]) is list
    assert type(found["regularizer"].strength) is dict
    loaded = IMAMLModule.load_from_checkpoint(tmp_path / "model.ckpt", backbone=network(), optimizer=SGD)
    assert loaded.adapt_only == ("3.*",)


def test_a_whole_config_of_hydra_is_saved_as_a_dict(configs, tmp_path):
    class Own(IMAMLModule):
        def __init__(self, config):
            super().__init__(network(), inner_solver=GradientDescent(config["lr"], 2))
            self.save_hyperparameters({"config": config})

    path = saved(Own(configs.create({"lr": 0.2, "sizes": [1, 2]})), tmp_path / "model.ckpt")
    assert torch.load(path, weights_only=True)["hyper_parameters"]["config"] == {"lr": 0.2, "sizes": [1, 2]}
    assert Own.load_from_checkpoint(path).inner_solver.lr == 0.2


def test_a_data_module_saves_ranges_of_hydra_as_lists(configs):
    data = GlyphDataModule(ways=configs.create([2, 3]), shots=1, queries=2, tasks_per_batch=2)
    assert type(data.hparams["ways"]) is list
    assert type(data.hparams_initial["ways"]) is list
    assert len(next(iter(data.train_dataloader()))) == 4
