"""Tasks that are NaN or explode: reported with their index, raised or left out, and never in the weights."""

from __future__ import annotations

import functools

import pytest
import torch
from conftest import TanhNet, regression_episode
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_imaml import Episode, IMAMLModule
from lightning_imaml.callbacks import MetaGradientErrorMonitor
from lightning_imaml.functional import adapt, meta_gradient
from lightning_imaml.inner import GradientDescent, HessianFree, Nesterov, TorchOptimizer
from lightning_imaml.linear import ConjugateGradient, Direct, MinRes, Neumann
from lightning_imaml.meta_gradients import FirstOrder, Implicit, Reptile, Truncated, Unrolled
from lightning_imaml.problems import bad_tasks
from lightning_imaml.regularizers import Proximal

ESTIMATORS = [
    Implicit(ConjugateGradient(3)), Implicit(Direct()), Implicit(MinRes(5)), Implicit(Neumann(3, step=0.1)),
    FirstOrder(), Reptile(), Unrolled(), Truncated(2),
]  # fmt: skip
solve = functools.partial(meta_gradient, loss=F.mse_loss, inner_solver=GradientDescent(0.1, 3))


def broken(episode: Episode, task: int, part: str = "support_inputs", value: float = float("nan")) -> Episode:
    inputs = getattr(episode, part).clone()
    inputs[task, 1] = value
    return episode._replace(**{part: inputs})


def without(episode: Episode, *tasks: int) -> Episode:
    return episode.take(torch.tensor([k for k in range(episode.tasks) if k not in tasks]))


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
@pytest.mark.parametrize("part", ["support_inputs", "query_targets"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e200], ids=str)
def test_a_bad_task_is_named_and_left_out(tanh_net, estimator, part, value):
    episode = broken(regression_episode(), 2, part, value)
    if part == "support_inputs" and value == 1e200:
        episode = broken(regression_episode(), 2, "support_targets", value)  # tanh bounds what inputs can do.
    with pytest.raises(FloatingPointError, match=r"for tasks \[2\] of the batch"):
        solve(tanh_net, episode, estimator=estimator)
    with pytest.warns(UserWarning, match=r"tasks \[2\] of the batch.*left out of the meta-gradient"):
        result = solve(tanh_net, episode, estimator=estimator, on_bad_task="skip")
    expected = solve(tanh_net, without(episode, 2), estimator=estimator)
    assert result.tasks.tolist() == [0, 1, 3]
    for name in expected.grads:
        torch.testing.assert_close(result.grads[name], expected.grads[name])
    torch.testing.assert_close(result.loss, expected.loss)


@pytest.mark.parametrize("chunk_size", [None, 1, 2])
def test_several_bad_tasks_are_found_by_their_index_in_the_batch(tanh_net, chunk_size):
    episode = broken(broken(regression_episode(), 0), 3, "query_inputs")
    with pytest.warns(UserWarning, match="left out") as caught:
        result = solve(tanh_net, episode, on_bad_task="skip", chunk_size=chunk_size)
    text = " ".join(str(w.message) for w in caught)
    assert "[0" in text
    assert "3]" in text
    assert result.tasks.tolist() == [1, 2]


class Kink(torch.autograd.Function):
    """Finite going forward, NaN going back where the input is marked."""

    @staticmethod
    def forward(inputs):
        return inputs.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx, slope):
        (inputs,) = ctx.saved_tensors
        return torch.where(inputs.abs() > 50, torch.nan, slope)

    generate_vmap_rule = True


def test_a_task_whose_gradient_alone_is_bad_is_found(tanh_net):
    """Its losses and residuals are finite: only the derivative of the query loss is not."""

    def query_loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.mse_loss(Kink.apply(outputs + targets), targets)

    episode = regression_episode()
    targets = episode.query_targets.clone()
    targets[1] += 100
    episode = episode._replace(query_targets=targets)
    run = functools.partial(solve, tanh_net, outer_loss=query_loss, estimator=FirstOrder())
    with pytest.raises(FloatingPointError, match=r"the meta-gradient must be finite.* tasks \[1\]"):
        run(episode)
    with pytest.warns(UserWarning, match=r"tasks \[1\]"):
        result = run(episode, on_bad_task="skip")
    assert result.tasks.tolist() == [0, 2, 3]


@pytest.mark.parametrize(
    "solver",
    [GradientDescent(1e9, 30), Nesterov(1e9, 30), TorchOptimizer(torch.optim.SGD, 30, {"lr": 1e9}), HessianFree(2)],
    ids=lambda solver: type(solver).__name__,
)
def test_an_inner_loop_that_diverges_is_told(solver):
    net = nn.Linear(3, 2).double()
    if isinstance(solver, HessianFree):
        net.weight.data.fill_(1e200)
    with pytest.raises(FloatingPointError, match=r"must be finite.* for tasks \[0, 1, 2, 3\]"):
        meta_gradient(net, regression_episode(), loss=F.mse_loss, inner_solver=solver, regularizer=Proximal(0.1))


def test_nothing_is_left_of_a_batch_of_bad_tasks(tanh_net):
    episode = regression_episode(tasks=2)
    with pytest.warns(UserWarning, match=r"tasks \[0, 1\]"):
        result = solve(tanh_net, broken(broken(episode, 0), 1), on_bad_task="skip")
    assert result.loss.shape == result.tasks.shape == (0,)
    assert result.query_outputs.shape == (0, 6, 2)
    assert all((g == 0).all() for g in result.grads.values())


def test_nothing_is_left_of_a_batch_of_bad_tasks_with_learned_strengths(tanh_net):
    """One number, unlike the gradient of a weight, has no dimension that could be cut."""
    episode = broken(regression_episode(tasks=1), 0)
    with pytest.warns(UserWarning, match=r"tasks \[0\]"):
        result = solve(tanh_net, episode, on_bad_task="skip", regularizer=Proximal(1.0, learned=True))
    assert result.tasks.shape == (0,)
    assert result.grads["regularizer.log_strength"] == 0


def test_adaptation_names_its_bad_tasks_too(tanh_net):
    episode = broken(regression_episode(), 1)
    with pytest.raises(FloatingPointError, match=r"gradient norm must be finite; found \[nan\] for tasks \[1\]"):
        adapt(tanh_net, episode.support_inputs, episode.support_targets, loss=F.mse_loss)


def test_a_number_is_bad_when_its_square_overflows():
    assert (
        bad_tasks.sound(torch.tensor([1e19, -1e19, 2e19, -2e19, torch.nan, torch.inf])).tolist()
        == [True] * 2 + [False] * 4
    )


def test_the_choice_is_checked(tanh_net):
    with pytest.raises(ValueError, match="on_bad_task must be one of 'raise', 'skip'; found 'drop'"):
        solve(tanh_net, regression_episode(), on_bad_task="drop")


# Under the Trainer


def collate(episodes: list[Episode]) -> Episode:
    return episodes[0]


def fit(batches: list[Episode], *callbacks: Callback, **settings) -> tuple[IMAMLModule, Trainer]:
    torch.manual_seed(0)
    defaults = {"loss": F.mse_loss, "inner_solver": GradientDescent(0.1, 3)}
    module = IMAMLModule(TanhNet().double(), **defaults | settings)
    trainer = Trainer(
        max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        accelerator="cpu", devices=1, log_every_n_steps=1, callbacks=list(callbacks),
    )  # fmt: skip
    trainer.fit(module, DataLoader(batches, batch_size=1, collate_fn=collate))
    return module, trainer


def weights(module: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(module.parameters()).detach()


def test_training_raises_before_the_weights_are_touched():
    kept = {}

    class Keep(Callback):
        def on_exception(self, trainer, pl_module, exception):
            kept["weights"], kept["steps"] = weights(pl_module).clone(), trainer.global_step

    good = [regression_episode(seed=k) for k in range(2)]
    with pytest.raises(FloatingPointError, match=r"tasks \[3\]"):
        fit([*good, broken(regression_episode(seed=2), 3)], Keep())
    assert kept["steps"] == 2
    torch.testing.assert_close(kept["weights"], weights(fit(good)[0]), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:.*left out of the meta-gradient")
def test_training_without_the_bad_task_is_training_on_the_others():
    batches = [regression_episode(seed=k) for k in range(3)]
    skipped, _ = fit([batches[0], broken(batches[1], 2), batches[2]], on_bad_task="skip")
    expected, _ = fit([batches[0], without(batches[1], 2), batches[2]])
    torch.testing.assert_close(weights(skipped), weights(expected), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:.*left out of the meta-gradient")
def test_every_task_of_a_long_meta_step_counts_the_same():
    """Whatever was left out of which batch, and however many batches are left at the end of an epoch."""
    batches = [broken(regression_episode(seed=0), 2), regression_episode(tasks=2, seed=1), regression_episode(seed=2)]
    sgd = functools.partial(torch.optim.SGD, lr=0.5)
    found, trainer = fit(batches, on_bad_task="skip", accumulate_meta_batches=2, optimizer=sgd)
    assert trainer.global_step == 2
    first = Episode(*[torch.cat(parts) for parts in zip(without(batches[0], 2), batches[1], strict=True)])
    expected, _ = fit([first, batches[2]], optimizer=sgd)
    torch.testing.assert_close(weights(found), weights(expected), rtol=1e-10, atol=1e-12)


@pytest.mark.filterwarnings("ignore:.*left out of the meta-gradient")
def test_a_meta_step_without_a_good_task_is_not_taken():
    """Not even along zero: Adam's momentum and weight decay would move the weights."""
    batches = [regression_episode(tasks=1, seed=k) for k in range(3)]
    decay = functools.partial(torch.optim.AdamW, lr=0.1, weight_decay=0.1)
    skipped, trainer = fit([batches[0], broken(batches[1], 0), batches[2]], on_bad_task="skip", optimizer=decay)
    expected, _ = fit([batches[0], batches[2]], optimizer=decay)
    assert trainer.global_step == 2
    torch.testing.assert_close(weights(skipped), weights(expected), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:.*left out of the meta-gradient")
def test_training_that_never_finds_a_good_task_ends():
    batches = [broken(regression_episode(tasks=1, seed=k), 0) for k in range(30)]
    with pytest.raises(FloatingPointError, match="found none in 20 meta-steps in a row"):
        fit(batches, on_bad_task="skip")


def test_evaluation_always_raises():
    torch.manual_seed(0)
    module = IMAMLModule(TanhNet().double(), loss=F.mse_loss, on_bad_task="skip")
    trainer = Trainer(logger=False, enable_progress_bar=False, accelerator="cpu", devices=1, enable_checkpointing=False)
    loader = DataLoader([broken(regression_episode(), 1)], batch_size=1, collate_fn=collate)
    with pytest.raises(FloatingPointError, match=r"tasks \[1\]"):
        trainer.test(module, loader, verbose=False)


@pytest.mark.filterwarnings("ignore:.*left out of the meta-gradient")
def test_a_monitor_does_not_stop_a_training_that_skips():
    batches = [broken(regression_episode(seed=0), 0), regression_episode(seed=1)]
    _, trainer = fit(batches, MetaGradientErrorMonitor(every_n_steps=1), on_bad_task="skip")
    assert trainer.global_step == 2
    assert trainer.callback_metrics["meta_gradient/relative_error"].isfinite()
