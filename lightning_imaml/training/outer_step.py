"""The outer step: what the Trainer leaves to the module in manual optimization."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Literal

import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.optim.optimizer import Optimizer

from lightning_imaml.components import metric_names as names
from lightning_imaml.components.checks import require_at_least_one, require_choice
from lightning_imaml.functional import MetaGradient
from lightning_imaml.metrics import ignore_index_of
from lightning_imaml.training.automatic import refuse_automatic, require_known_schedulers
from lightning_imaml.training.hooks import own_part
from lightning_imaml.training.logging import learning_rates, training_values
from lightning_imaml.training.meta_steps import MetaSteps, begin_next_epoch
from lightning_imaml.training.ranks import numbers_of_all_ranks, sum_over_ranks
from lightning_imaml.training.resume import OuterState

_MOST_EMPTY_STEPS = 20


def _tracks_statistics(module: nn.Module) -> bool:
    return any(isinstance(layer, _NormBase) and layer.running_mean is not None for layer in module.modules())


def parameter_groups(module: nn.Module, apart: Mapping[nn.Module, tuple[str, float]]) -> list[Any]:
    """A module's trainable parameters for an optimizer: one list, or groups where parts have their own learning rate.

    Args:
        module: the module.
        apart: parts of it, with the name and the learning rate of their group.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    groups = []
    for part, (name, lr) in apart.items():
        own = [p for p in part.parameters() if p.requires_grad]
        if own:
            groups.append({"params": own, "lr": lr, "name": name})
            parameters = [p for p in parameters if all(p is not other for other in own)]
    return [{"params": parameters, "name": "backbone"}, *groups] if groups else parameters


def refuse_unreached(module: nn.Module, parts: Iterable[nn.Module]) -> None:
    """Raise a ValueError that names the module's trainable parameters outside the parts that have a meta-gradient."""
    reached = {id(p) for part in parts for p in part.parameters()}
    lost = [name for name, p in module.named_parameters() if p.requires_grad and id(p) not in reached]
    if lost:
        raise ValueError(
            f"every trainable parameter must belong to the backbone, the regulariser or the inner solver; found {lost} "
            "elsewhere, which would never change. Move it into the backbone, or set requires_grad=False."
        )


def surrogate(result: MetaGradient, parameters: Mapping[str, Tensor]) -> Tensor:
    """A scalar with the outer loss as its value and the meta-gradient as its gradient in ``parameters``.

    A ``.grad`` written by hand would miss the all-reduce of DistributedDataParallel and the loss scale of 16-bit
    training.
    """
    inner = torch.stack([(result.grads[name].detach() * p).sum() for name, p in parameters.items()]).sum()
    return result.loss.sum() / max(1, len(result.tasks)) + inner - inner.detach()


def _nothing() -> None:
    """The closure of a step whose gradients are there."""


class OuterStep(OuterState):
    """Takes meta-gradients to the optimizer: mean over ranks, accumulation, clipping, optimizer and schedulers.

    The base of :class:`~lightning_imaml.IMAMLModule`, which calls :meth:`accumulate`.

    Args:
        gradient_clip_val: clip the gradient to this; None does not.
        gradient_clip_algorithm: by its "norm", or every entry by its "value".
        accumulate_meta_batches: batches for one step.
        lr_scheduler_monitor: the logged quantity that ReduceLROnPlateau watches.
        on_bad_task: "skip" may leave a meta-step without tasks, which is not taken then.
    """

    _empty_steps = 0
    _warned_indefinite = False
    _trains = False  # Whether a gradient of this fit has been seen.
    _first_step = 0
    _values: list[tuple[int, dict[str, Tensor]]]

    def __init__(
        self,
        gradient_clip_val: float | None,
        gradient_clip_algorithm: str,
        accumulate_meta_batches: int,
        lr_scheduler_monitor: str | None,
        on_bad_task: Literal["raise", "skip"],
    ) -> None:
        super().__init__()
        require_at_least_one("accumulate_meta_batches", accumulate_meta_batches, "Leave it out for one batch a step.")
        if gradient_clip_val is not None and gradient_clip_val <= 0:
            raise ValueError(f"gradient_clip_val must be positive or None for no clipping; found {gradient_clip_val}.")
        require_choice("gradient_clip_algorithm", gradient_clip_algorithm, ("norm", "value"))
        require_choice("on_bad_task", on_bad_task, ("raise", "skip"))
        self.automatic_optimization = False
        self.gradient_clip_val = gradient_clip_val
        self.gradient_clip_algorithm = gradient_clip_algorithm
        self.accumulate_meta_batches = accumulate_meta_batches
        self.lr_scheduler_monitor = lr_scheduler_monitor
        self.on_bad_task = on_bad_task

    def setup(self, stage: str) -> None:
        """Refuse what shards the parameters or joins ranks' statistics; tell weight averaging that there are none."""
        if isinstance(self.trainer.strategy, (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)):
            raise ValueError(
                f"strategy must keep all parameters on every rank, since each task adapts its own copy of all of them; "
                f"found {type(self.trainer.strategy).__name__}, which shards them. Use strategy='ddp'; a smaller "
                "chunk_size saves memory instead."
            )
        if self.trainer.world_size > 1 and getattr(self.trainer.strategy, "_layer_sync", None) is not None:
            raise ValueError(
                "sync_batchnorm must be off, since the statistics of a batch are one task's, and ranks have different "
                "tasks; found it on. Leave it out."
            )
        for callback in self._averaging():
            # Lightning's callback would renew running statistics, and fails where BatchNorm has none.
            callback.pl_module_contains_batch_norm = _tracks_statistics  # type: ignore[method-assign,assignment]

    def configure_model(self) -> None:
        """Let weight averaging copy the network again, since it may not have been there when it did."""
        for callback in self._averaging():
            callback.setup(self.trainer, self, "fit")

    def _averaging(self) -> list[StochasticWeightAveraging]:
        callbacks = [] if self._trainer is None else self.trainer.callbacks  # type: ignore[attr-defined]
        return [callback for callback in callbacks if isinstance(callback, StochasticWeightAveraging)]

    def on_train_start(self) -> None:
        """Refuse ranks with different numbers of batches, which would wait for one another for ever."""
        counts = [
            batches for (batches,) in numbers_of_all_ranks(self.trainer, float(self.trainer.num_training_batches))
        ]
        if len(set(counts)) > 1:
            raise ValueError(
                f"every rank must have the same number of training batches; found {counts}. Leave the sampler to the "
                "Trainer (use_distributed_sampler=True), or set limit_train_batches."
            )
        if begin_next_epoch(self.trainer):
            # A plateau's value is not known, since that epoch's validation was missed, too. And PyTorch warns that the
            # optimizer has not stepped yet: it has, before the checkpoint.
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
                self._step_schedulers("epoch", self.current_epoch, plateaus=False)
        require_known_schedulers(self)
        # What an earlier fit left in the middle of a meta-step is no part of this one.
        self.tasks_of_step, self._values = 0, []
        self._trains, self._first_step = False, self.trainer.global_step
        self.zero_grad()
        self.agree_on_the_seed()

    @own_part("last")
    def configure_callbacks(self) -> Sequence[Callback] | Callback:
        """Let the Trainer count meta-steps in training, where a batch need not be one.

        Raises:
            MisconfigurationException: the Trainer is to clip or to accumulate, which the module does itself.
        """
        if self.trainer.state.fn != TrainerFn.FITTING:
            return []
        refuse_automatic(self.trainer)
        return [MetaSteps(self.accumulate_meta_batches)] if self._counts_meta_steps() else []

    def _counts_meta_steps(self) -> bool:
        return self.accumulate_meta_batches > 1 or self.on_bad_task == "skip"

    def agree(self, tasks: int, error: FloatingPointError | None) -> list[int]:
        """Tell the other ranks how many tasks this one has for the meta-gradient, and hear how many they have.

        Raises:
            FloatingPointError: on this rank or another one; on all of them, so that none waits for one that stopped.
        """
        told = numbers_of_all_ranks(self.trainer, tasks, error is not None)
        failed = [rank for rank, (_, bad) in enumerate(told) if bad]
        if failed and error is None:
            error = FloatingPointError(
                f"every rank's tasks must be sound; found bad ones on ranks {failed}, whose own error names them. "
                "All ranks stop together."
            )
        if error is not None:
            raise error
        return [int(count) for count, _ in told]

    def mean_over_ranks(self, values: dict[str, Tensor], tasks: int, counts: list[int]) -> dict[str, Tensor]:
        """The means over all ranks' tasks of values that are means over this rank's; NaN where there are no tasks."""
        if len(counts) == 1 or not values:
            return values
        # In one message; a rank without tasks has no means.
        mine = torch.stack([value.detach().double() * tasks for value in values.values()]).nan_to_num()
        if not tasks:
            mine.zero_()
        total = sum_over_ranks(self.trainer, mine)
        return dict(zip(values, (total / sum(counts)).float(), strict=True))

    def means_of_meta_step(self, values: dict[str, Tensor], tasks: int, due: bool) -> tuple[dict[str, Tensor], int]:
        """What there is to log of a meta-step: the means over all its tasks, and how many these are; at its end only.

        Args:
            values: a batch's means over the tasks of all ranks.
            tasks: how many they are.
            due: whether the batch ends a meta-step.
        """
        if tasks:
            self._values.append((tasks, values))
        if not due:
            return {}, 0
        batches, self._values = self._values, []
        total = sum(tasks for tasks, _ in batches)
        first = batches[0][1] if batches else {}
        sums = {name: torch.stack([tasks * values[name] for tasks, values in batches]).sum(dim=0) for name in first}
        return {name: value / total for name, value in sums.items()}, total

    def log_meta_step(
        self, result: MetaGradient, targets: Any, before: Any, counts: list[int], due: bool
    ) -> Tensor | None:
        """Log the means over the tasks of a meta-step at its end, and warn once where most systems are indefinite.

        Args:
            result: the meta-gradient of a batch's tasks that were good.
            targets: the query targets of all tasks of the batch.
            before: the unadapted network's outputs for them; None where no row is due.
            counts: how many good tasks every rank has.
            due: whether the batch ends a meta-step.

        Returns:
            The batch's mean outer loss, over all ranks; None if no task was left.
        """
        values = training_values(result, targets, before, ignore_index_of(self))
        values = self.mean_over_ranks(values, len(result.tasks), counts)
        means, tasks = self.means_of_meta_step(values, sum(counts), due)
        bar = (names.OUTER_LOSS, names.ACCURACY)
        for name, value in means.items():
            self.log(name, value, prog_bar=name in bar, batch_size=tasks)
        if not sum(counts):
            return None
        indefinite = values.get(names.INDEFINITE)
        if indefinite is not None and before is not None and not self._warned_indefinite and indefinite > 0.5:
            self._warned_indefinite = True
            rank_zero_warn(
                f"the linear system is indefinite for {indefinite:.0%} of this batch's tasks, so the meta-gradient "
                "is far from exact. Use Implicit(..., curvature=GaussNewton()), a stronger regulariser or damping."
            )
        return values[names.OUTER_LOSS]

    def accumulate(self, surrogate: Tensor, tasks: int, counts: list[int], due: bool) -> None:
        """Add a meta-gradient to ``.grad`` by a backward pass, and step if due.

        Args:
            surrogate: has the mean meta-gradient of this rank's tasks as its gradient.
            tasks: how many they are.
            counts: how many every rank has.
            due: whether the batch ends a meta-step.
        """
        # The mean over all tasks of all batches and ranks, however many were left out where: sums are accumulated, and
        # divided once. DDP averages over ranks.
        total, share = (self.tasks_of_step or 0) + sum(counts), float(tasks * len(counts))
        if self.tasks_of_step and all(p.grad is None for p in self.parameters()):
            raise RuntimeError(
                "the gradients of an unfinished meta-step must stay until it ends; found them cleared. Leave out "
                "zero_grad in hooks and callbacks, or use accumulate_meta_batches=1."
            )
        self.tasks_of_step = None  # Not known while gradients change: an error may end this in the middle.
        if due:
            share /= max(1, total)
            for parameter in self.parameters():
                if parameter.grad is not None:
                    parameter.grad /= max(1, total)
        block = getattr(self.trainer.strategy, "block_backward_sync", None)
        with nullcontext() if due or block is None else block():
            self.manual_backward(surrogate * share)
        self.tasks_of_step, self._trains = total, True
        if due:
            self._step()

    def _step(self) -> None:
        optimizer = self.optimizers()
        if isinstance(optimizer, list):
            raise ValueError(
                f"configure_optimizers must return one optimizer; found {len(optimizer)}. Give its parameter groups "
                "their own learning rates instead."
            )
        tasks, self.tasks_of_step = self.tasks_of_step, 0
        if not tasks:
            # A step along zero would still move the weights, by momentum and weight decay.
            self._zero_grad(optimizer)
            self._empty_steps += 1
            if self._empty_steps == _MOST_EMPTY_STEPS:
                raise FloatingPointError(
                    f"some task must be sound; found none in {_MOST_EMPTY_STEPS} meta-steps in a row, so that the "
                    "network itself does not adapt. Lower the inner learning rate, or use a stronger regulariser."
                )
            return
        self._empty_steps = 0
        before = self.trainer.global_step
        # By the hooks of automatic optimization, so that an override of them does what Lightning's documentation says.
        self.optimizer_step(self.current_epoch, self.trainer.fit_loop.batch_idx, optimizer, _nothing)
        self._zero_grad(optimizer)
        if self.trainer.global_step > before:  # An override of optimizer_step may leave a step out.
            self._step_schedulers("step", self.trainer.global_step)

    def _zero_grad(self, optimizer: Any) -> None:
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            callback.on_before_zero_grad(self.trainer, self, optimizer)
        self.on_before_zero_grad(optimizer)
        self.optimizer_zero_grad(self.current_epoch, self.trainer.fit_loop.batch_idx, optimizer)

    @own_part("last")
    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Log the meta-gradient's norm and the learning rates, and clip, here where a GradScaler has unscaled it."""
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self.log(names.GRADIENT_NORM, torch.nn.utils.get_total_norm(gradients))
        for name, lr in learning_rates(optimizer).items():
            self.log(name, lr)
        self.configure_gradient_clipping(optimizer, self.gradient_clip_val, self.gradient_clip_algorithm)

    @own_part("last")
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """See to it that an overridden ``training_step`` trains.

        Raises:
            RuntimeError: it returns a loss and leaves no gradient, as in automatic optimization.
        """
        if not outputs or self._trains:
            return
        stepped = self.trainer.global_step > self._first_step
        self._trains = stepped or any(p.grad is not None for p in self.parameters())
        if not self._trains:
            raise RuntimeError(
                f"{type(self).__name__}.training_step must train, since nothing else does in manual optimization; "
                "found that it returns a loss and leaves no gradient. Return super().training_step(batch, batch_idx), "
                "or call self.manual_backward(loss) and self.optimizers().step() in it."
            )

    @own_part("last")
    def on_train_epoch_end(self) -> None:
        """Step the schedulers that go by epochs, which manual optimization leaves to the module."""
        self._step_schedulers("epoch", self.current_epoch + 1)

    def _step_schedulers(self, interval: str, count: int, plateaus: bool = True) -> None:
        for config in self.trainer.lr_scheduler_configs:
            if config.interval != interval or count % config.frequency:
                continue
            if not isinstance(config.scheduler, ReduceLROnPlateau):
                self.lr_scheduler_step(config.scheduler, None)
                continue
            if not plateaus:
                continue
            # LightningCLI's own class of schedulers knows its monitor.
            monitor = self.lr_scheduler_monitor or getattr(config.scheduler, "monitor", None)
            value: Any = self.trainer.callback_metrics.get(str(monitor))
            if value is None:
                raise ValueError(
                    f"lr_scheduler_monitor must be a logged quantity for ReduceLROnPlateau; found "
                    f"{monitor!r}. Logged are {sorted(self.trainer.callback_metrics)}: choose one, "
                    "and validate as often as the scheduler steps."
                )
            self.lr_scheduler_step(config.scheduler, value)
