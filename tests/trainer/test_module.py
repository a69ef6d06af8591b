"""IMAMLModule under the Trainer."""

from __future__ import annotations

import datetime
import functools

import pytest
import torch
from conftest import TanhNet, class_episode, regression_episode
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_imaml import Episode, IMAMLModule, functional
from lightning_imaml.curvature import GaussNewton
from lightning_imaml.inner import GradientDescent
from lightning_imaml.linear import ConjugateGradient
from lightning_imaml.meta_gradients import FirstOrder, Implicit
from lightning_imaml.regularizers import Proximal

SHAPE = (1, 8, 8)


def network(ways: int = 5) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, ways))


def collate(episodes: list[Episode]) -> Episode:
    return Episode(*[torch.cat(parts) for parts in zip(*episodes, strict=True)])


small_images = functools.partial(class_episode, shape=SHAPE)


def loader(batches: int = 4, tasks: int = 3, make=small_images) -> DataLoader:
    return DataLoader([make(tasks=tasks, seed=k) for k in range(batches)], batch_size=1, collate_fn=collate)


def trainer(**settings) -> Trainer:
    defaults = {
        "max_epochs": 1, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
        "enable_model_summary": False, "accelerator": "cpu", "devices": 1, "log_every_n_steps": 1,
    }  # fmt: skip
    return Trainer(**defaults | settings)


def module(**settings) -> IMAMLModule:
    torch.manual_seed(0)
    defaults = {"backbone": network(), "inner_solver": GradientDescent(0.1, 3), "regularizer": Proximal(0.5)}
    return IMAMLModule(**defaults | settings)


def weights(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


def test_fit_validate_test_predict_under_a_default_trainer():
    model, run = module(), trainer(max_epochs=6)
    run.fit(model, loader(), loader(2))
    logged = run.callback_metrics
    for name in (
        "train/outer_loss", "train/accuracy", "train/accuracy_before", "train/inner_residual", "train/linear_residual",
        "train/linear_steps", "train/indefinite", "val/loss", "val/accuracy", "val/accuracy_before",
        "val/accuracy_interval95", "val/inner_residual",
    ):  # fmt: skip
        assert name in logged, name
        assert torch.isfinite(logged[name]), name
    with torch.no_grad():
        guesses = torch.cat([model(inputs) for episode in loader(2) for inputs in episode.query_inputs]).argmax(-1)
    labels = torch.cat([episode.query_targets.flatten() for episode in loader(2)])
    assert logged["val/accuracy_before"].item() == pytest.approx((guesses == labels).float().mean().item())
    (validated,) = run.validate(model, loader(2), verbose=False)
    assert validated["val/accuracy"] == pytest.approx(logged["val/accuracy"].item())
    (tested,) = run.test(model, loader(2), verbose=False)
    assert tested["test/accuracy"] == pytest.approx(validated["val/accuracy"])
    (first, _) = run.predict(model, loader(2))
    assert first.shape == (3, 10, 5)
    targets = class_episode(tasks=3, shape=SHAPE, seed=0).query_targets
    outputs = torch.cat(run.predict(model, loader(2)))
    both = torch.cat([targets, class_episode(tasks=3, shape=SHAPE, seed=1).query_targets])
    assert (outputs.argmax(-1) == both).float().mean().item() == pytest.approx(tested["test/accuracy"])


def test_a_meta_step_is_the_optimizers_step_along_the_meta_gradient():
    model = module(optimizer=functools.partial(torch.optim.SGD, lr=0.5))
    start = weights(model)
    episode = class_episode(tasks=3, shape=SHAPE, seed=0)
    result = model.meta_gradient(episode)
    trainer(max_steps=1).fit(model, loader(1))
    gradient = torch.cat([result.grads[name].flatten() for name, _ in model.backbone.named_parameters()])
    torch.testing.assert_close(weights(model), start - 0.5 * gradient, rtol=1e-5, atol=1e-7)


def test_meta_training_learns():
    model = module(optimizer=functools.partial(torch.optim.Adam, lr=1e-2))
    fresh = trainer().validate(model, loader(8), verbose=False)[0]
    trainer(max_epochs=15).fit(model, loader(8))
    trained = trainer().validate(model, loader(8), verbose=False)[0]
    assert trained["val/loss"] < 0.6 * fresh["val/loss"]


def doubled(seed: int) -> Episode:
    episode = class_episode(1, shape=SHAPE, seed=seed)
    return episode._replace(support_inputs=episode.support_inputs.double(), query_inputs=episode.query_inputs.double())


def test_accumulating_batches_is_one_larger_batch():
    small = module(accumulate_meta_batches=2, optimizer=functools.partial(torch.optim.SGD, lr=0.5)).double()
    large = module(optimizer=functools.partial(torch.optim.SGD, lr=0.5)).double()

    run = trainer()
    run.fit(small, DataLoader([doubled(k) for k in range(4)], batch_size=1, collate_fn=collate))
    assert run.global_step == 2
    trainer().fit(large, DataLoader([doubled(k) for k in range(4)], batch_size=2, collate_fn=collate))
    torch.testing.assert_close(weights(small), weights(large), rtol=1e-10, atol=1e-12)


def test_the_last_batches_of_an_epoch_are_not_lost():
    model, run = module(accumulate_meta_batches=3), trainer()
    run.fit(model, loader(4))
    assert run.global_step == 2
    assert all(p.grad is None for p in model.parameters())


def test_validation_does_not_clear_what_is_accumulated():
    found = []
    for interval in (datetime.timedelta(0), 1.0):  # The former after every batch, also in the middle of a meta-step.
        model = module(accumulate_meta_batches=2, optimizer=functools.partial(torch.optim.SGD, lr=0.5))
        trainer(val_check_interval=interval).fit(model, loader(4), loader(1))
        found.append(weights(model))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def test_chunks_bound_every_stage_and_change_nothing():
    sizes: list[int] = []

    class Recorded(nn.Sequential):
        def forward(self, x):
            sizes.append(torch._C._functorch.is_batchedtensor(x))
            return super().forward(x)

    found = []
    for chunk_size in (None, 1):
        sizes.clear()
        torch.manual_seed(0)
        model = module(backbone=Recorded(*network()), chunk_size=chunk_size)
        run = trainer()
        run.fit(model, loader(2), loader(2))
        run.test(model, loader(2), verbose=False)
        assert any(sizes) == (chunk_size is None), "a single task runs without vmap"
        found.append(run.callback_metrics["test/loss"])
    torch.testing.assert_close(found[0], found[1])


class Pixels(nn.Module):
    """A segmentation network: a class for every pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3, padding=1)

    def forward(self, x):
        return self.conv(x)


def test_dense_class_targets_train_without_the_default_accuracy():
    def episode(tasks: int = 2, seed: int = 0) -> Episode:
        generator = torch.Generator().manual_seed(seed)
        images = torch.rand(tasks, 4, 1, 6, 6, generator=generator)
        labels = (images[:, :, 0] * 3).long().clamp(max=2)
        return Episode(images, labels, images, labels)

    run = trainer()
    model = IMAMLModule(Pixels(), inner_solver=GradientDescent(0.1, 2))
    run.fit(model, loader(2, make=episode), loader(1, make=episode))
    assert "val/loss" in run.callback_metrics
    assert "val/accuracy" not in run.callback_metrics


def test_a_batch_that_is_no_episode_is_explained():
    with pytest.raises(TypeError, match=r"must be an Episode of support_inputs, .*; found 2 parts. Use an Episodic"):
        trainer().fit(module(), DataLoader([(torch.rand(3), torch.rand(3))] * 2))


def test_the_gradient_is_clipped_to_its_norm():
    start = weights(module())
    model = module(gradient_clip_val=1e-3, optimizer=functools.partial(torch.optim.SGD, lr=1.0))
    trainer(max_steps=1).fit(model, loader(1))
    assert (weights(model) - start).norm().item() == pytest.approx(1e-3, rel=1e-3)


def test_the_scheduler_steps_after_every_meta_step():
    schedule = functools.partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
    model = module(optimizer=functools.partial(torch.optim.SGD, lr=1.0), lr_scheduler=schedule)
    run = trainer(max_epochs=1)
    run.fit(model, loader(3))
    assert run.optimizers[0].param_groups[0]["lr"] == 0.125


def plateau(monitor: str | None) -> IMAMLModule:
    # Nothing ever improves by this threshold, so that every call lowers the rate.
    schedule = functools.partial(torch.optim.lr_scheduler.ReduceLROnPlateau, factor=0.1, patience=0, threshold=1e9)
    return module(
        optimizer=functools.partial(torch.optim.SGD, lr=1.0), lr_scheduler=schedule, lr_scheduler_monitor=monitor
    )


def test_a_plateau_scheduler_sees_its_monitor_by_epoch():
    model, run = plateau("val/loss"), trainer(max_epochs=2)
    run.fit(model, loader(2), loader(1))
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.01)


def test_a_scheduler_goes_by_its_interval_and_frequency():
    class Scheduled(IMAMLModule):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
            schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": schedule, "interval": "epoch", "frequency": 2},
            }

    model, run = Scheduled(network(), inner_solver=GradientDescent(0.1, 1)), trainer(max_epochs=5)
    run.fit(model, loader(2))
    assert run.optimizers[0].param_groups[0]["lr"] == 0.25


@pytest.mark.parametrize("monitor", [None, "val/typo"])
def test_an_unknown_monitor_is_explained(monitor):
    with pytest.raises(ValueError, match=rf"must be a logged quantity .*; found {monitor!r}. Logged are \['train"):
        trainer(max_epochs=2).fit(plateau(monitor), loader(1), loader(1))


def test_a_learned_strength_is_trained_and_saved(tmp_path):
    model = module(
        regularizer=Proximal(0.5, learned=True),
        estimator=Implicit(ConjugateGradient(5), GaussNewton()),
        optimizer=functools.partial(torch.optim.Adam, lr=0.05),
    )
    start = model.strengths["log_strength"].item()
    run = trainer(max_epochs=2)
    run.fit(model, loader())
    learned = model.strengths["log_strength"].item()
    assert learned != start
    run.save_checkpoint(tmp_path / "model.ckpt")
    loaded = IMAMLModule.load_from_checkpoint(tmp_path / "model.ckpt", backbone=network())
    assert loaded.strengths["log_strength"].item() == learned
    assert loaded.regularizer == Proximal(0.5, learned=True)


def test_a_checkpoint_of_another_loss_is_refused(tmp_path):
    model, run = module(backbone=network(1), loss=F.mse_loss), trainer()
    run.strategy.connect(model)
    run.save_checkpoint(tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match=r"loss must be given, since .* trained with .*mse_loss; found .* Pass loss="):
        IMAMLModule.load_from_checkpoint(tmp_path / "model.ckpt", backbone=network(1))
    loaded = IMAMLModule.load_from_checkpoint(tmp_path / "model.ckpt", backbone=network(1), loss=F.mse_loss)
    assert loaded.loss is F.mse_loss


class OwnNetwork(IMAMLModule):
    def configure_backbone(self):
        return network(self.hparams.ways)


class Data(LightningDataModule):
    def __init__(self, ways: int = 5, shots: int = 1) -> None:
        super().__init__()
        self.save_hyperparameters()

    def train_dataloader(self):
        return loader(2)


def test_a_subclass_builds_its_network_for_the_data(tmp_path):
    """The example of the documentation: the network needs the data module's ways."""
    model, run = OwnNetwork(inner_solver=GradientDescent(0.1, 2, tol=1e-3), estimator=FirstOrder()), trainer()
    run.fit(model, datamodule=Data())
    assert model.hparams.ways == 5
    assert model.backbone[-1].out_features == 5
    run.save_checkpoint(tmp_path / "model.ckpt")
    loaded = OwnNetwork.load_from_checkpoint(tmp_path / "model.ckpt")
    torch.testing.assert_close(weights(loaded), weights(model), rtol=0, atol=0)
    assert loaded.inner_solver == GradientDescent(0.1, 2, tol=1e-3)
    assert loaded.estimator == FirstOrder()
    episode = class_episode(tasks=2, shape=SHAPE)
    adapted = loaded.adapt(episode.support_inputs, episode.support_targets)
    expected = model.adapt(episode.support_inputs, episode.support_targets)
    torch.testing.assert_close(adapted.parameters["3.bias"], expected.parameters["3.bias"], rtol=0, atol=0)


class WithArguments(IMAMLModule):
    def __init__(self, hidden: int = 4, **settings):
        super().__init__(**settings)
        self.save_hyperparameters("hidden")

    def configure_backbone(self):
        return nn.Sequential(nn.Flatten(), nn.Linear(64, self.hparams.hidden), nn.Linear(self.hparams.hidden, 5))


def test_a_subclass_with_arguments_of_its_own_is_loaded(tmp_path):
    model, run = WithArguments(hidden=7, inner_solver=GradientDescent(0.1, 2)), trainer()
    run.fit(model, datamodule=Data())
    run.save_checkpoint(tmp_path / "model.ckpt")
    loaded = WithArguments.load_from_checkpoint(tmp_path / "model.ckpt")
    assert loaded.hparams.hidden == 7
    torch.testing.assert_close(weights(loaded), weights(model), rtol=0, atol=0)


def test_a_module_without_a_network_is_explained():
    with pytest.raises(NotImplementedError, match="found no backbone"):
        IMAMLModule().adapt(torch.rand(1, 5, 3), torch.zeros(1, 5, dtype=torch.long))
    with pytest.raises(NotImplementedError, match=r"found no backbone\. Pass backbone=\.\.\., or override"):
        trainer().fit(IMAMLModule(), loader(1))


class WeightedInner(IMAMLModule):
    def inner_loss(self, outputs, targets):
        return 2 * F.mse_loss(outputs, targets)


def test_losses_can_be_overridden_and_regression_works():
    torch.manual_seed(0)
    net, episode = TanhNet().double(), regression_episode()
    model = WeightedInner(net, loss=F.mse_loss, inner_solver=GradientDescent(0.1, 3))
    expected = functional.meta_gradient(
        net, episode, loss=lambda o, t: 2 * F.mse_loss(o, t), outer_loss=F.mse_loss,
        inner_solver=GradientDescent(0.1, 3), estimator=model.estimator, regularizer=model.regularizer,
    )  # fmt: skip
    found = model.meta_gradient(episode)
    for name in expected.grads:
        torch.testing.assert_close(found.grads[name], expected.grads[name])
    data = loader(2, make=regression_episode)
    run = trainer()
    run.fit(model, data, data)
    assert "val/loss" in run.callback_metrics
    assert "val/accuracy" not in run.callback_metrics


def test_no_setting_is_overridden_in_silence():
    model, episode = IMAMLModule(nn.Linear(4, 3)), class_episode(tasks=1, ways=3, shape=(4,))
    model.inner_loss = lambda outputs, targets: 0 * outputs.sum()
    adapted = model.adapt(episode.support_inputs, episode.support_targets)
    torch.testing.assert_close(adapted.parameters["weight"][0], model.backbone.weight.detach())
    own = type("Own", (IMAMLModule,), {"loss": lambda self, outputs, targets: F.mse_loss(outputs, targets)})
    with pytest.raises(TypeError, match=r"loss must be an argument of .*; found Own.loss. Pass it there, or override"):
        own(nn.Linear(4, 3))


def test_most_tasks_indefinite_is_told_once():
    model = IMAMLModule(
        TanhNet().double(),
        loss=lambda o, t: -F.mse_loss(o, t) * 5,
        inner_solver=GradientDescent(0.01, 1),
        estimator=Implicit(ConjugateGradient(5)),
        regularizer=Proximal(1e-3),
    )
    with pytest.warns(UserWarning, match=r"indefinite for \d+% of this batch's tasks.*GaussNewton") as caught:
        trainer(max_epochs=2).fit(model, loader(2, make=regression_episode))
    assert sum("indefinite" in str(w.message) for w in caught) == 1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"gradient_clip_val": 0.0}, "gradient_clip_val must be positive or None for no clipping; found 0.0"),
        ({"accumulate_meta_batches": 0}, "accumulate_meta_batches must be at least 1; found 0"),
        ({"chunk_size": 0}, "chunk_size must be at least 1; found 0"),
    ],
)
def test_bad_settings_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        module(**settings)


def test_a_trainable_parameter_that_no_meta_gradient_reaches_is_refused():
    class Tempered(IMAMLModule):
        def __init__(self, **settings):
            super().__init__(**settings)
            self.temperature = nn.Parameter(torch.ones(()))

        def outer_loss(self, outputs, targets):
            return F.cross_entropy(outputs / self.temperature, targets)

    with pytest.raises(ValueError, match=r"found \['temperature'\] elsewhere, which would never change"):
        trainer().fit(Tempered(backbone=network()), loader())
    fixed = Tempered(backbone=network())
    fixed.temperature.requires_grad_(False)
    trainer(max_steps=1).fit(fixed, loader())
