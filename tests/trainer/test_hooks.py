"""Every hook of LightningModule, overridden as Lightning's documentation does it: the table in docs/lightning.md."""

from __future__ import annotations

import inspect
import re

import pytest
import torch
from conftest import ROOT
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Callback, EarlyStopping
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.core.hooks import CheckpointHooks, DataHooks, ModelHooks
from small_runs import SGD, episode, loader, module, network, trainer, weights
from torch import nn

from lightning_imaml import Episode, IMAMLModule
from lightning_imaml.inner import GradientDescent
from lightning_imaml.regularizers import Proximal

pytestmark = pytest.mark.filterwarnings("ignore:.*You are using `torch.load`")

KEPT = "the module's own part runs too, with or without `super()`"
CALLED = "called as usual; the module does nothing in it"
AUTOMATIC = "called in every meta-step, as in automatic optimization"
REPLACES = "an override replaces the module's"
# What an override without super() does, by hook.
HOOKS = {
    "setup": f"{KEPT}, before an override's",
    "configure_model": f"{KEPT}, after an override's: it builds the network where the override did not set one",
    "configure_callbacks": f"{KEPT}: the callback that counts meta-steps is added to the list",
    "on_train_start": f"{KEPT}, before an override's",
    "on_train_batch_end": f"{KEPT}: it checks that `training_step` trains",
    "on_train_epoch_end": f"{KEPT}, after an override's: schedulers by epochs step",
    "on_before_optimizer_step": f"{KEPT}, after an override's: the norm and the learning rates are logged, and the "
    "gradient is clipped",
    "on_save_checkpoint": f"{KEPT}, after an override's",
    "on_load_checkpoint": f"{KEPT}, before an override's: the network is there",
    "training_step": f"{REPLACES}; one that returns a loss and leaves no gradient is refused at the first batch",
    "validation_step": REPLACES,
    "test_step": REPLACES,
    "predict_step": REPLACES,
    "forward": f"{REPLACES}; adaptation calls the network itself",
    "configure_optimizers": f"{REPLACES}; it returns one optimizer",
    "configure_gradient_clipping": f"{AUTOMATIC}, with the module's `gradient_clip_val`, or None",
    "optimizer_step": f"{AUTOMATIC}; the closure does nothing, since the gradients are there",
    "optimizer_zero_grad": f"{AUTOMATIC}, after the step",
    "on_before_zero_grad": f"{AUTOMATIC}, after the step",
    "lr_scheduler_step": "called for every scheduler, by its interval and frequency; it may step what is no "
    "scheduler of PyTorch, such as one of timm",
    "backward": "called for every batch, with a scalar whose gradient is the meta-gradient",
    "on_before_backward": "called for every batch, with a scalar whose gradient is the meta-gradient",
    "on_after_backward": "called for every batch, when `.grad` has the meta-gradient",
    "on_validation_model_zero_grad": "called as usual, between meta-steps",
    "configure_sharded_model": "refused by Lightning, which calls it deprecated: override `configure_model`",
    **dict.fromkeys(
        [
            "on_fit_start", "on_fit_end", "on_train_end", "on_validation_start", "on_validation_end", "on_test_start",
            "on_test_end", "on_predict_start", "on_predict_end", "on_train_batch_start", "on_validation_batch_start",
            "on_validation_batch_end", "on_test_batch_start", "on_test_batch_end", "on_predict_batch_start",
            "on_predict_batch_end", "on_validation_model_eval", "on_validation_model_train", "on_test_model_eval",
            "on_test_model_train", "on_predict_model_eval", "on_train_epoch_start",
            "on_validation_epoch_start", "on_validation_epoch_end", "on_test_epoch_start", "on_test_epoch_end",
            "on_predict_epoch_start", "on_predict_epoch_end", "prepare_data", "teardown", "train_dataloader",
            "val_dataloader", "test_dataloader", "predict_dataloader", "transfer_batch_to_device",
            "on_before_batch_transfer", "on_after_batch_transfer",
        ],
        CALLED,
    ),
}  # fmt: skip
# What a module calls, and Lightning does not.
METHODS = {
    "all_gather", "clip_gradients", "freeze", "load_from_checkpoint", "log", "log_dict", "lr_schedulers",
    "manual_backward", "optimizers", "print", "to_onnx", "to_tensorrt", "to_torchscript", "toggle_optimizer",
    "toggled_optimizer", "unfreeze", "untoggle_optimizer",
}  # fmt: skip


def test_every_hook_is_in_the_table():
    found = set()
    for place in (ModelHooks, DataHooks, CheckpointHooks, LightningModule):
        found |= {name for name, value in vars(place).items() if callable(value) and name[0] != "_"}
        found |= {name for name, value in vars(place).items() if isinstance(value, classmethod) and name[0] != "_"}
    assert found - METHODS == set(HOOKS)


def test_the_table_of_the_documentation_is_this_one():
    rows = re.findall(r"^\| (`.+?`) \| (.+?) \|$", (ROOT / "docs" / "lightning.md").read_text(), flags=re.MULTILINE)
    told = {hook: text for hooks, text in rows for hook in re.findall(r"`(\w+)`", hooks) if hook in HOOKS}
    assert told == HOOKS


class Late(IMAMLModule):
    """Builds its network late, goes by epochs, clips and accumulates: something in each hook can be lost."""

    def configure_backbone(self):
        return network()

    def configure_optimizers(self):
        optimizer = SGD(self.parameters())
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "epoch"}}


def late(kind: type[IMAMLModule]) -> IMAMLModule:
    return module(kind, backbone=None, gradient_clip_val=0.02, accumulate_meta_batches=2)


# Overrides that must give something, as in Lightning's documentation; all others are empty.
GIVEN = {
    "configure_callbacks": lambda self: [EarlyStopping("train/outer_loss", patience=100)],
    "configure_optimizers": Late.configure_optimizers,
    "configure_gradient_clipping": lambda self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None: (
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
    ),
    "optimizer_step": lambda self, epoch, batch_idx, optimizer, optimizer_closure=None: optimizer.step(
        closure=optimizer_closure
    ),
    "optimizer_zero_grad": lambda self, epoch, batch_idx, optimizer: optimizer.zero_grad(set_to_none=False),
    "lr_scheduler_step": lambda self, scheduler, metric: scheduler.step(),
    "backward": lambda self, loss, *args: loss.backward(*args),
    "training_step": lambda self, batch, batch_idx: IMAMLModule.training_step(self, batch, batch_idx),
    "predict_step": lambda self, batch, batch_idx, dataloader_idx=0: 0,
    "forward": lambda self, inputs: self.backbone(inputs),
    "on_validation_model_train": lambda self: self.train(),
    "on_test_model_train": lambda self: self.train(),
    "train_dataloader": lambda self: loader(4),
    "val_dataloader": lambda self: loader(1),
    "test_dataloader": lambda self: loader(1),
    "predict_dataloader": lambda self: loader(1),
    "transfer_batch_to_device": lambda self, batch, device, dataloader_idx: Episode(*(x.to(device) for x in batch)),
    "on_before_batch_transfer": lambda self, batch, dataloader_idx: batch,
    "on_after_batch_transfer": lambda self, batch, dataloader_idx: batch,
}


def everything(kind: type[IMAMLModule], folder, own_loaders: str = "") -> tuple[IMAMLModule, float]:
    """Three epochs, an evaluation of each kind, a checkpoint and its load; the loaded module and the learning rate."""
    loaders = {name: loader(4 if name == "train" else 1) for name in ("train", "val", "test", "predict")}
    loaders[own_loaders.removesuffix("_dataloader")] = None
    model, run = late(kind), trainer(max_epochs=3)
    run.fit(model, loaders["train"], loaders["val"])
    rate = run.optimizers[0].param_groups[0]["lr"]
    assert "lightning_imaml" in run._checkpoint_connector.dump_checkpoint()
    run.save_checkpoint(folder / "run.ckpt")
    run.test(model, loaders["test"], verbose=False)
    run.predict(model, loaders["predict"])
    model(episode().query_inputs[0])
    loaded = kind.load_from_checkpoint(folder / "run.ckpt", optimizer=SGD)
    assert torch.equal(weights(loaded), weights(model))
    assert loaded.inner_solver == GradientDescent(0.1, 2)
    return model, rate


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    model, rate = everything(Late, tmp_path_factory.mktemp("plain"))
    assert rate == 0.125
    return weights(model)


@pytest.mark.parametrize("hook", sorted(set(HOOKS) - {"configure_sharded_model"}))
def test_an_override_without_super_loses_nothing(hook, plain, tmp_path):
    calls = []

    def override(self, *args, **kwargs):
        calls.append(hook)
        return GIVEN[hook](self, *args, **kwargs) if hook in GIVEN else None

    if hook in ("validation_step", "test_step"):  # Lightning looks for the argument.
        own = lambda self, batch, batch_idx, dataloader_idx=0: override(self)  # noqa: E731
    else:
        own = override
    model, rate = everything(type("Own", (Late,), {hook: own}), tmp_path, hook if "dataloader" in hook else "")
    assert calls
    assert rate == 0.125
    torch.testing.assert_close(weights(model), plain, rtol=0, atol=0)


def test_an_override_that_calls_super_runs_the_part_once(plain, tmp_path):
    steps = []

    class Middle(Late):
        def on_train_epoch_end(self):
            steps.append(self.optimizers().param_groups[0]["lr"])
            super().on_train_epoch_end()
            steps.append(self.optimizers().param_groups[0]["lr"])

    class Own(Middle):
        def on_train_epoch_end(self):
            super().on_train_epoch_end()

    model, rate = everything(Own, tmp_path)
    assert rate == 0.125
    assert steps == [1.0, 0.5, 0.5, 0.25, 0.25, 0.125]
    assert torch.equal(weights(model), plain)


def test_an_override_in_a_mixin_loses_nothing(tmp_path, plain):
    class Mixin:
        def on_train_epoch_end(self):
            pass

        def on_before_optimizer_step(self, optimizer):
            pass

    model, rate = everything(type("Own", (Mixin, Late), {}), tmp_path)
    assert rate == 0.125
    assert torch.equal(weights(model), plain)


def test_the_deprecated_hook_is_refused():
    own = type("Own", (Late,), {"configure_sharded_model": lambda self: None})
    with pytest.raises(RuntimeError, match=r"configure_model.*configure_sharded_model"):
        trainer().fit(late(own), loader(1))


def test_a_network_set_in_configure_model_has_its_strengths():
    class Own(IMAMLModule):
        def configure_model(self):
            self.backbone = network()

    model = module(Own, backbone=None, regularizer=Proximal(0.5, learned=True))
    trainer().fit(model, loader(1))
    assert list(model.strengths) == ["log_strength"]


# The ways that Lightning's documentation shows.


class WarmUp(IMAMLModule):
    """The documentation of optimizer_step: warm-up without a scheduler."""

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
        optimizer.step(closure=optimizer_closure)
        if self.trainer.global_step < 5:
            for group in optimizer.param_groups:
                group["lr"] = min(1.0, float(self.trainer.global_step + 1) / 5.0)


def rates_of(kind: type[IMAMLModule], **settings) -> list[float]:
    found = []

    class Note(Callback):
        def on_before_zero_grad(self, trainer, pl_module, optimizer):
            found.append(trainer.callback_metrics["train/lr"].item())

    trainer(Note()).fit(module(kind, **settings), loader(4))
    return found


def test_a_warm_up_in_optimizer_step_warms_up():
    assert rates_of(WarmUp) == pytest.approx([1.0, 0.4, 0.6, 0.8])


def test_an_optimizer_step_that_leaves_steps_out_takes_the_others():
    class Every(IMAMLModule):
        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
            if batch_idx % 2 == 1:
                optimizer.step(closure=optimizer_closure)

    schedule = lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)  # noqa: E731
    run = trainer()
    run.fit(module(Every, lr_scheduler=schedule), loader(4))
    assert run.global_step == 2
    assert run.optimizers[0].param_groups[0]["lr"] == 0.25


class Timm:
    """What timm's schedulers have: no base class of PyTorch's, and an epoch for every step."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass

    def step(self, epoch, metric=None):
        for group in self.optimizer.param_groups:
            group["lr"] = 0.5**epoch


class WithTimm(IMAMLModule):
    def configure_optimizers(self):
        optimizer = SGD(self.parameters())
        return [optimizer], [{"scheduler": Timm(optimizer), "interval": "epoch"}]

    def lr_scheduler_step(self, scheduler, metric):
        scheduler.step(epoch=self.current_epoch)


def test_a_scheduler_of_timm_steps_by_lr_scheduler_step():
    run = trainer(max_epochs=3)
    run.fit(module(WithTimm), loader(1))
    assert run.optimizers[0].param_groups[0]["lr"] == 0.25


def test_a_scheduler_of_timm_without_the_hook_is_refused_at_the_start():
    own = type("Own", (IMAMLModule,), {"configure_optimizers": WithTimm.configure_optimizers})
    with pytest.raises(TypeError, match=r"found .*Timm\. Override lr_scheduler_step\(self, scheduler, metric\)"):
        trainer().fit(module(own), loader(1))


class Clipping(IMAMLModule):
    """The documentation of configure_gradient_clipping, with a value of its own."""

    def configure_gradient_clipping(self, optimizer, gradient_clip_val, gradient_clip_algorithm):
        self.clip_gradients(optimizer, gradient_clip_val=1e-3, gradient_clip_algorithm="norm")


def test_own_clipping_needs_no_argument_of_the_module():
    model = module(Clipping)
    start = weights(model)
    trainer(max_steps=1).fit(model, loader(1))
    assert (weights(model) - start).norm().item() == pytest.approx(1e-3, rel=1e-3)


def test_a_training_step_of_automatic_optimization_is_refused():
    class Automatic(IMAMLModule):
        def training_step(self, batch, batch_idx):
            loss = self.meta_gradient(Episode.of(batch)).loss.mean()
            self.log("loss", loss)
            return loss

    with pytest.raises(RuntimeError, match=r"Automatic.training_step must train.* Return super\(\).training_step"):
        trainer().fit(module(Automatic), loader(1))


def test_a_training_step_of_ones_own_may_skip_and_step_by_itself():
    class Own(IMAMLModule):
        def training_step(self, batch, batch_idx):
            if batch_idx == 0:
                return None
            loss = nn.functional.cross_entropy(self(batch.query_inputs[0]), batch.query_targets[0])
            self.manual_backward(loss)
            self.optimizers().step()
            self.optimizers().zero_grad()
            return loss

    run = trainer()
    run.fit(module(Own), loader(3))
    assert run.global_step == 2


def test_gradients_that_a_hook_clears_in_a_meta_step_are_missed():
    class Clearing(IMAMLModule):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            self.zero_grad()

    with pytest.raises(RuntimeError, match=r"gradients of an unfinished meta-step must stay .* found them cleared"):
        trainer().fit(module(Clearing, accumulate_meta_batches=2), loader(4))


class Small(IMAMLModule):
    """What a command line of one's own trains."""

    def __init__(self, inner_lr: float = 0.1) -> None:
        super().__init__(network(), inner_solver=GradientDescent(inner_lr, 1))

    def train_dataloader(self):
        return loader(2)

    def val_dataloader(self):
        return loader(1)


@pytest.mark.filterwarnings("ignore:.*will be overridden by")
@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter is intended")
@pytest.mark.filterwarnings("ignore:The lr scheduler dict contains the key")
@pytest.mark.parametrize(
    ("options", "rate"),
    [
        (["--lr_scheduler=StepLR", "--lr_scheduler.step_size=1", "--lr_scheduler.gamma=0.5"], 0.25),
        (
            ["--lr_scheduler=ReduceLROnPlateau", "--lr_scheduler.monitor=val/loss", "--lr_scheduler.patience=0",
             "--lr_scheduler.threshold=1e9", "--lr_scheduler.factor=0.1"], 0.002,
        ),
    ],
    ids=["StepLR", "ReduceLROnPlateau"],
)  # fmt: skip
def test_a_command_line_of_ones_own_sets_optimizer_and_scheduler(options, rate):
    quiet = [f"--trainer.{flag}=false" for flag in ("logger", "enable_checkpointing", "enable_progress_bar")]
    args = ["fit", "--optimizer=SGD", "--optimizer.lr=2.0", "--trainer.max_epochs=3", "--trainer.accelerator=cpu"]
    args += [*quiet, *options]
    run = LightningCLI(Small, args=args, save_config_callback=None, seed_everything_default=0).trainer
    assert type(run.optimizers[0]) is torch.optim.SGD
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(rate)


def test_signatures_stay_those_of_the_overrides():
    assert list(inspect.signature(WarmUp.optimizer_step).parameters)[1:] == [
        "epoch", "batch_idx", "optimizer", "optimizer_closure",
    ]  # fmt: skip
    own = type("Own", (IMAMLModule,), {"on_train_batch_end": lambda self, outputs, batch, batch_idx: None})
    assert list(inspect.signature(own.on_train_batch_end).parameters) == ["self", "outputs", "batch", "batch_idx"]
