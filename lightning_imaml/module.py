"""IMAMLModule: the core, wired to the Trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.compile import to_uncompiled
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.optim.optimizer import Optimizer
from torch.utils import _pytree as pytree
from torchmetrics import Metric, MetricCollection

from lightning_imaml import functional
from lightning_imaml.components.checks import require_choice
from lightning_imaml.curvature import GaussNewton
from lightning_imaml.episodes import Episode
from lightning_imaml.functional import Adapted, MetaGradient
from lightning_imaml.functional.prediction import predict_rows
from lightning_imaml.functional.settings import check_chunk_size
from lightning_imaml.inner import GradientDescent, InnerSolver
from lightning_imaml.linear import ConjugateGradient
from lightning_imaml.losses import Loss
from lightning_imaml.meta_gradients import Estimator, Implicit
from lightning_imaml.metrics import (
    EpisodicAccuracy,
    EpisodicInterval95,
    LoaderMetrics,
    ignore_index_of,
    is_classification,
)
from lightning_imaml.parameters.float32 import Float32Parameters
from lightning_imaml.problems.network import FlatModel
from lightning_imaml.regularizers import Proximal, Regularizer
from lightning_imaml.runtime.phases import META_STEP, phase
from lightning_imaml.runtime.precision import default_dtype
from lightning_imaml.training.hooks import own_part
from lightning_imaml.training.hyperparameters import without_configs
from lightning_imaml.training.meta_steps import row_number
from lightning_imaml.training.outer_step import OuterStep, parameter_groups, refuse_unreached, surrogate

OptimizerFactory = Callable[[Iterable[Any]], Optimizer]
SchedulerFactory = Callable[[Optimizer], LRScheduler | ReduceLROnPlateau]


class IMAMLModule(OuterStep):
    """Meta-learns an initialisation that adapts to a task in a few steps (`iMAML <https://arxiv.org/abs/1909.04630>`_).

    Batches are :class:`~lightning_imaml.Episode`. Training adapts to each task's support set, and moves the
    initialisation along the meta-gradient of the query losses. Validation, test and predict adapt first too.

    Example:
        >>> module = IMAMLModule(nn.Linear(8, 5), inner_solver=GradientDescent(lr=0.1, steps=3))
        >>> module.adapt(torch.randn(2, 5, 8), torch.arange(5).expand(2, 5)).parameters["weight"].shape
        torch.Size([2, 5, 8])

    Args:
        backbone: the network; None builds it by :meth:`configure_backbone` when the Trainer sets the module up.
        loss: ``loss(outputs, targets) -> scalar`` for one task, inner and, without ``query_loss``, outer.
        inner_solver: what adapts.
        estimator: what differentiates through adaptation. The default curvature is Gauss-Newton: on the paper's own
            network the exact Hessian soon is indefinite for most tasks, and conjugate gradient fails on it.
        regularizer: what ties the adapted parameters to the initialisation.
        optimizer: takes the parameters, gives the outer optimizer.
        lr_scheduler: takes the optimizer, gives a scheduler by meta-steps; else override :meth:`configure_optimizers`.
        lr_scheduler_monitor: what ReduceLROnPlateau watches, by epoch; Lightning drops a scheduler's own (manual mode).
        regularizer_lr: the learning rate of the learned strengths; None for that of the network.
        inner_solver_lr: likewise of the inner solver's learned step sizes.
        gradient_clip_val: clip the meta-gradient to this; the Trainer's own flag refuses manual optimization.
        gradient_clip_algorithm: clip by the "norm" of the whole gradient, or every entry by its "value".
        accumulate_meta_batches: average the meta-gradients over the tasks of this many batches for one step; likewise.
            What is left at the end of an epoch makes a step of its own.
        adapt_only: patterns over the backbone's parameter names, such as ``("classifier.*",)``: those that match adapt,
            and the others are meta-learned and the same for all tasks. None adapts all.
        chunk_size: the most tasks at once, which bounds memory; None chooses it from the size of a task.
        compile: run all through PyTorch's compiler, see :func:`lightning_imaml.functional.meta_gradient`.
        solve_precision: what the inner loop, the linear solve and the meta-gradient compute in: "full", float32 or more
            whatever the Trainer's ``precision``, on a float32 copy where the parameters have fewer bits; or "trainer",
            the Trainer's own.
        on_bad_task: what to do with a training task that is NaN or explodes: "raise" an error on all ranks, or "skip"
            it, with a warning that names it; see :func:`lightning_imaml.functional.meta_gradient`. A step that is left
            without tasks is not taken. Evaluation always raises: results without their worst tasks would flatter.
        eval_inner_solver: what adapts in validation, test, predict and :meth:`adapt`, such as more steps; None for
            ``inner_solver``.
        check_network: check the backbone's structure when it is first used, see
            :func:`lightning_imaml.functional.adapt`.
        query_loss: the outer loss, such as ``ScaledCrossEntropy``; None for ``loss``. An overridden outer_loss wins.

    Override :meth:`configure_backbone`, :meth:`inner_loss`, :meth:`outer_loss`, :meth:`configure_metrics` or
    :meth:`configure_optimizers` to change one thing.
    """

    def __init__(
        self,
        backbone: nn.Module | None = None,
        loss: Loss = F.cross_entropy,
        inner_solver: InnerSolver = GradientDescent(lr=0.1, steps=16),  # noqa: B008 - frozen: sharing it is safe
        estimator: Estimator = Implicit(ConjugateGradient(max_iter=5), GaussNewton()),  # noqa: B008
        regularizer: Regularizer = Proximal(strength=2.0),  # noqa: B008
        optimizer: OptimizerFactory = torch.optim.Adam,
        lr_scheduler: SchedulerFactory | None = None,
        lr_scheduler_monitor: str | None = None,
        regularizer_lr: float | None = None,
        inner_solver_lr: float | None = None,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: Literal["norm", "value"] = "norm",
        accumulate_meta_batches: int = 1,
        adapt_only: Sequence[str] | None = None,
        chunk_size: int | None = None,
        compile: bool = False,
        solve_precision: Literal["full", "trainer"] = "full",
        on_bad_task: Literal["raise", "skip"] = "raise",
        eval_inner_solver: InnerSolver | None = None,
        query_loss: Loss | None = None,
        check_network: bool = True,
    ) -> None:
        # Those of Hydra have containers of OmegaConf in them.
        inner_solver, eval_inner_solver = without_configs(inner_solver), without_configs(eval_inner_solver)
        estimator, regularizer = without_configs(estimator), without_configs(regularizer)
        super().__init__(
            gradient_clip_val, gradient_clip_algorithm, accumulate_meta_batches, lr_scheduler_monitor, on_bad_task
        )
        check_chunk_size(chunk_size)
        require_choice("solve_precision", solve_precision, ("full", "trainer"))
        for name in ("loss", "query_loss", "inner_solver", "eval_inner_solver", "estimator", "regularizer"):
            if hasattr(type(self), name):
                raise TypeError(
                    f"{name} must be an argument of super().__init__, which would hide one of the class; found "
                    f"{type(self).__name__}.{name}. Pass it there, or override inner_loss and outer_loss for a loss."
                )
        # From a script, networks, losses and optimizers are code: pass them again to load_from_checkpoint. From
        # LightningCLI all arguments are plain configuration, and its test and predict need them in the checkpoint.
        code = [] if _given_hyperparameters.get() else ["backbone", "loss", "query_loss", "optimizer", "lr_scheduler"]
        self.save_hyperparameters(ignore=code)
        self.loss, self.query_loss = loss, query_loss
        self.inner_solver = inner_solver
        self.eval_inner_solver = eval_inner_solver
        self.estimator = estimator
        self.regularizer = regularizer
        self.optimizer_factory = optimizer
        self.scheduler_factory = lr_scheduler
        self.regularizer_lr = regularizer_lr
        self.inner_solver_lr = inner_solver_lr
        # Not the letters of a single pattern, which is refused as it is.
        self.adapt_only = adapt_only if adapt_only is None or isinstance(adapt_only, str) else tuple(adapt_only)
        self.chunk_size = chunk_size
        # Not ``compile``: that is nn.Module's method.
        self.compile_solves = compile
        self.solve_precision = solve_precision
        self.check_network = check_network
        self.strengths, self.rates = Float32Parameters(), Float32Parameters()
        # By stage and dataloader. A dictionary that is no submodule: what a metric holds is no weight of a checkpoint.
        self._metrics: dict[tuple[str, int], LoaderMetrics] = {}
        self._of_data: dict[str, Any] = {}
        self._attached = False
        if backbone is not None:
            self._attach(backbone)

    # Building

    def configure_backbone(self) -> nn.Module:
        """Build the network, where none was passed.

        Runs when the Trainer sets the module up, so that ``self.hparams`` holds the data module's ``ways`` and
        ``shots``.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must have a network; found no backbone. Pass backbone=..., or override "
            "configure_backbone."
        )

    @own_part("first")
    def setup(self, stage: str) -> None:
        """Take over the data module's ``ways`` and ``shots`` as hyper-parameters, for :meth:`configure_backbone`.

        Raises:
            ValueError: the strategy shards the parameters.
        """
        if self._compiler_ctx is not None:  # The Trainer was given torch.compile(module).
            to_uncompiled(self)
            rank_zero_warn(
                "torch.compile must not wrap an IMAMLModule, since its code cannot be differentiated twice; found that "
                "it does. Going on without it. Pass compile=True to the module to compile the solves."
            )
        super().setup(stage)
        data = getattr(self.trainer, "datamodule", None)
        known = {} if data is None else data.hparams
        self._take_over({name: known[name] for name in ("ways", "shots") if name in known})
        self._metrics.clear()  # An evaluation that was interrupted left its tasks in them.

    def _take_over(self, of_data: dict[str, Any]) -> None:
        # Kept apart too: they are no arguments of __init__, to which a checkpoint's hyper-parameters are passed.
        self._of_data |= {name: value for name, value in of_data.items() if name not in self.hparams}
        self.hparams.update(self._of_data)

    @own_part("last")
    def configure_model(self) -> None:
        """Build the network if that has not happened yet."""
        # load_from_checkpoint calls this, too, before on_load_checkpoint knows ways and shots.
        if self._trainer is not None:
            self._build()
            super().configure_model()

    def _build(self) -> None:
        if not self._attached:  # An override of configure_model may have set the network.
            self._attach(self.backbone if hasattr(self, "backbone") else self.configure_backbone())

    @own_part("last")
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note what no hyper-parameter restores: the data's ways and shots, and which loss the weights belong to."""
        saved = checkpoint.get(self.CHECKPOINT_HYPER_PARAMS_KEY, {})
        self._restore_settings(saved)
        for name in self._of_data:
            saved.pop(name, None)
        inner, outer = map(_qualified_name, self._losses().values())
        losses = {"loss": inner} if outer == inner else {"loss": inner, "query_loss": outer}
        checkpoint["lightning_imaml"] = {**losses, "data": dict(self._of_data)}
        if self._trainer is not None:
            checkpoint["lightning_imaml"]["outer_step"] = self.outer_state()

    @own_part("first")
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Build the network before its weights arrive; refuse to replace another loss by the default in silence."""
        noted = checkpoint.get("lightning_imaml", {})
        given = {"loss": self.loss is not F.cross_entropy, "query_loss": self.query_loss is not None}
        for (name, known), own in zip(given.items(), self._losses().values(), strict=True):
            if not known and noted.get(name, _qualified_name(own)) != _qualified_name(own):
                raise ValueError(
                    f"{name} must be given, since the checkpoint was trained with {noted[name]}; found the default, "
                    f"{_qualified_name(own)}. Pass {name}=... to load_from_checkpoint or the module."
                )
        self._take_over(noted.get("data", {}))
        self._build()
        if self._trainer is not None and self.trainer.state.fn == "fit":
            self.resumed_state = noted.get("outer_step")

    def _attach(self, backbone: nn.Module) -> None:
        self.backbone, self._attached = backbone, True
        with torch.no_grad():
            flat = FlatModel(backbone, adapt_only=self.adapt_only)
            flat.dtype = torch.promote_types(flat.dtype, torch.float32)  # Of what is learned, from the start.
            learned = (self.strengths, self.regularizer.init(flat)), (self.rates, self.inner_solver.rates(flat))
            for parameters, start in learned:
                parameters.update({name: nn.Parameter(value.clone()) for name, value in start.items()})

    def configure_optimizers(self) -> Any:
        """The outer optimizer over the network, the learned strengths and step sizes, and its scheduler."""
        own = (self.strengths, "regularizer", self.regularizer_lr), (self.rates, "inner_solver", self.inner_solver_lr)
        parameters = parameter_groups(self, {part: (name, lr) for part, name, lr in own if lr is not None})
        optimizer = self.optimizer_factory(parameters)
        if self.scheduler_factory is None:
            return optimizer
        scheduler = self.scheduler_factory(optimizer)
        interval = "epoch" if isinstance(scheduler, ReduceLROnPlateau) else "step"
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": interval}}

    def configure_metrics(self) -> MetricCollection:
        """Metrics of the query predictions: those of :mod:`lightning_imaml.metrics`, and any of torchmetrics.

        Each gives the mean over tasks of its value on each task, see :class:`~lightning_imaml.metrics.EpisodicMetric`.
        The default is the episodic accuracy and its interval; they are left out where targets are not class indices.
        Runs at the first batch of each dataloader of an evaluation, so that ``self.hparams`` holds the data module's
        ``ways`` and ``shots``, and ``self.backbone`` is there.
        """
        ignored = ignore_index_of(self)
        accuracy, interval = EpisodicAccuracy(ignore_index=ignored), EpisodicInterval95(ignore_index=ignored)
        return MetricCollection({"accuracy": accuracy, "accuracy_interval95": interval})

    # The core with the module's settings

    def inner_loss(self, outputs: Any, targets: Any) -> Tensor:
        """L: the loss on one task's support set, from outputs ``[n, ...]`` and targets ``[n, ...]``."""
        return self.loss(outputs, targets)

    def outer_loss(self, outputs: Any, targets: Any) -> Tensor:
        """Q: the loss on one task's query set, from outputs ``[n, ...]`` and targets ``[n, ...]``."""
        return self._losses()["outer_loss"](outputs, targets)

    def forward(self, inputs: Any) -> Any:
        """The network at its initialisation, unadapted: inputs ``[n, ...]`` to outputs ``[n, ...]``."""
        return self.backbone(inputs)

    def adapt(self, support_inputs: Any, support_targets: Any, *, inner_solver: InnerSolver | None = None) -> Adapted:
        """Adapt to new tasks, ``[T, n, ...]`` each; see :func:`lightning_imaml.functional.adapt`."""
        self._build()
        settings = self.solve_settings(inner_solver or self.eval_inner_solver)
        return functional.adapt(self.backbone, support_inputs, support_targets, **settings)

    def adapted_network(self, support_inputs: Any, support_targets: Any) -> nn.Module:
        """A plain network that has adapted to one task: to save, export, compile and serve.

        Args:
            support_inputs: of one task, ``[n, ...]``.
            support_targets: of one task, ``[n]`` or ``[n, ...]``.

        Returns:
            A copy of the backbone, see :func:`lightning_imaml.functional.adapted_network`.
        """
        inputs, targets = pytree.tree_map(lambda t: t.unsqueeze(0), (support_inputs, support_targets))
        adapted = self.adapt(inputs, targets)
        return functional.adapted_network(self.backbone, adapted.parameters, support_inputs=inputs)

    def meta_gradient(
        self,
        episode: Episode,
        *,
        inner_solver: InnerSolver | None = None,
        estimator: Estimator | None = None,
        on_bad_task: Literal["raise", "skip"] = "raise",
    ) -> MetaGradient:
        """The meta-gradient of a batch of tasks, with the module's settings where no others are given."""
        self._build()
        return functional.meta_gradient(
            self.backbone,
            episode,
            outer_loss=self._loss("outer_loss"),
            estimator=estimator or self.estimator,
            on_bad_task=on_bad_task,
            **self.solve_settings(inner_solver),
        )

    def solve_settings(self, inner_solver: InnerSolver | None = None) -> dict[str, Any]:
        """The module's settings, as arguments of :func:`lightning_imaml.functional.adapt`; for another network, too."""
        # Another solver may learn no step sizes.
        learned = inner_solver is None or getattr(inner_solver, "learned", False)
        return {
            "loss": self._loss("inner_loss"),
            "inner_solver": inner_solver or self.inner_solver,
            "regularizer": self.regularizer,
            "strengths": dict(self.strengths),
            "rates": dict(self.rates) if learned else None,
            "adapt_only": self.adapt_only,
            "chunk_size": self.chunk_size,
            "compile": self.compile_solves,
            "full_precision": self.solve_precision == "full",
            "check_network": self.check_network,
        }

    def _loss(self, name: str) -> Loss:
        """The bare loss unless it is overridden: the core checks labels against the losses that it knows."""
        own = getattr(self, name)
        return self._losses()[name] if getattr(own, "__func__", None) is getattr(IMAMLModule, name) else own

    def _losses(self) -> dict[str, Loss]:
        return {"inner_loss": self.loss, "outer_loss": self.loss if self.query_loss is None else self.query_loss}

    # Training

    @own_part("first")
    def on_train_start(self) -> None:
        """Refuse trainable parameters that no meta-gradient reaches, those of a loss for example."""
        super().on_train_start()
        refuse_unreached(self, (self.backbone, self.strengths, self.rates))

    def training_step(self, batch: Episode, batch_idx: int) -> Tensor | None:
        """One meta-gradient, and an outer step when enough batches have been accumulated.

        Returns:
            The mean query loss of the batch's adapted networks, over all ranks; None if no task was left.
        """
        self.resume_outer_state()
        batch = Episode.of(batch)
        due = (batch_idx + 1) % self.accumulate_meta_batches == 0 or self.trainer.is_last_batch
        # The meta-steps of which Lightning writes a row; reading values for the others would only wait for the device.
        every = max(1, self.trainer.log_every_n_steps)  # type: ignore[attr-defined]
        logged = (row_number(self.trainer) + 1) % every == 0
        before = self._predict_initial(batch) if logged else None  # Before the step changes the initialisation.
        with phase(META_STEP):
            result, error = None, None
            try:
                with self.random_stream():
                    result = self.meta_gradient(batch, on_bad_task=self.on_bad_task)
            except FloatingPointError as found:
                error = found
            counts = self.agree(0 if result is None else len(result.tasks), error)
            assert result is not None
            parameters = {name: p for name, p in self.backbone.named_parameters() if p.requires_grad}
            parameters |= {f"regularizer.{name}": p for name, p in self.strengths.items()}
            parameters |= {f"inner_solver.{name}": p for name, p in self.rates.items()}
            self.accumulate(surrogate(result, parameters), len(result.tasks), counts, due)
        return self.log_meta_step(result, batch.query_targets, before, counts, due)

    def _predict_initial(self, batch: Episode) -> Any:
        """The unadapted network on every task's query set, ``[T, n, ...]``."""
        flat = FlatModel(self.backbone, adapt_only=self.adapt_only)
        rows = flat.initial().expand(batch.tasks, -1)
        with torch.no_grad():
            return predict_rows(flat, rows, batch.query_inputs, batch.support_inputs, self.chunk_size)

    def _predict(self, parameters: dict[str, Tensor], batch: Episode) -> Any:
        with torch.no_grad():
            return functional.predict(
                self.backbone,
                parameters,
                batch.query_inputs,
                support_inputs=batch.support_inputs,
                chunk_size=self.chunk_size,
                check_network=self.check_network,
            )

    def validation_step(self, batch: Episode, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Adapt to the support sets, then judge on the query sets.

        With several dataloaders, each has its own metrics, named ``val/accuracy/dataloader_idx_0`` and so on.
        """
        self._evaluate(batch, "val", dataloader_idx)

    def test_step(self, batch: Episode, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Adapt to the support sets, then judge on the query sets; several dataloaders as in validation."""
        self._evaluate(batch, "test", dataloader_idx)

    def predict_step(self, batch: Episode, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Adapt to the support sets, then predict the query sets: ``[T, n, ...]``."""
        batch = Episode.of(batch)
        return self._predict(self.adapt(batch.support_inputs, batch.support_targets).parameters, batch)

    def _evaluate(self, batch: Episode, stage: str, loader: int) -> None:
        batch = Episode.of(batch)
        adapted = self.adapt(batch.support_inputs, batch.support_targets)
        loss, outputs = functional.evaluate(
            self.backbone,
            adapted.parameters,
            batch.query_inputs,
            batch.query_targets,
            loss=self._loss("outer_loss"),
            support_inputs=batch.support_inputs,
            chunk_size=self.chunk_size,
            check_network=self.check_network,
        )
        metrics = self._metrics_of(stage, loader)
        logged, shown = metrics.update(loss, adapted.residual), dict[str, Metric]()
        default = type(self).configure_metrics is IMAMLModule.configure_metrics
        if not default or is_classification(outputs, batch.query_targets):
            shown = metrics.update_predictions(self._predict_initial(batch), outputs, batch.query_targets)
        for name, metric in (logged | shown).items():
            bar = name in shown and not name.endswith("_before")
            # Lightning would look for the metric among the submodules; where it is does not matter to it.
            self.log(name, metric, prog_bar=bar, batch_size=batch.tasks, metric_attribute=name)

    def _metrics_of(self, stage: str, loader: int) -> LoaderMetrics:
        if (stage, loader) not in self._metrics:
            # With bf16-true, new tensors are of bfloat16, which cannot count beyond 256.
            counting = torch.promote_types(torch.get_default_dtype(), torch.float32)
            with torch.inference_mode(False), default_dtype(counting):
                metrics = LoaderMetrics(stage, self.configure_metrics(), ignore_index_of(self))
                self._metrics[stage, loader] = metrics.to(self.device)
        return self._metrics[stage, loader]


def _qualified_name(loss: object) -> str:
    named = loss if hasattr(loss, "__qualname__") else type(loss)
    return f"{named.__module__}.{named.__qualname__}"
