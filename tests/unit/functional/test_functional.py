"""The meta-gradient against closed forms and finite differences; batching; memory; modes."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import dataclass

import pytest
import torch
from conftest import TanhNet, class_episode, regression_episode
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from lightning_imaml import Episode
from lightning_imaml.callbacks import LiveTensorBytes
from lightning_imaml.curvature import GaussNewton, Hessian
from lightning_imaml.functional import adapt, evaluate, meta_gradient, predict, preparation
from lightning_imaml.inner import GradientDescent
from lightning_imaml.linear import ConjugateGradient, Direct
from lightning_imaml.meta_gradients import FirstOrder, Implicit
from lightning_imaml.models import Conv4
from lightning_imaml.problems import vmap as vmap_tasks
from lightning_imaml.problems.network import FlatModel
from lightning_imaml.regularizers import Proximal

TIGHT = GradientDescent(lr=0.2, steps=20_000, tol=1e-13)


@pytest.mark.parametrize("solver", [Direct(), ConjugateGradient(max_iter=30, rtol=1e-13)], ids=["direct", "cg"])
@pytest.mark.parametrize("curvature", [Hessian(), GaussNewton()], ids=["hessian", "gauss-newton"])
def test_the_meta_gradient_is_the_closed_form_of_ridge_regression(solver, curvature):
    torch.manual_seed(0)
    strength = 0.8
    net = nn.Linear(5, 1, bias=False).double()
    episode = regression_episode(tasks=6, shots=8, inputs=5, outputs=1)
    result = meta_gradient(
        net, episode,
        loss=F.mse_loss, inner_solver=TIGHT, estimator=Implicit(solver, curvature), regularizer=Proximal(strength),
    )  # fmt: skip
    x, y, xq, yq = (part.double() for part in episode)
    theta = net.weight.detach().T
    matrix = 2 / 8 * x.mT @ x + strength * torch.eye(5, dtype=torch.float64)
    solution = torch.linalg.solve(matrix, 2 / 8 * x.mT @ y + strength * theta)
    outer = 2 / 8 * xq.mT @ (xq @ solution - yq)
    exact = strength * torch.linalg.solve(matrix, outer).mean(dim=0).T
    torch.testing.assert_close(result.grads["weight"], exact, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(result.loss, (xq @ solution - yq).square().mean(dim=(1, 2)), rtol=1e-10, atol=1e-12)
    assert result.linear is not None
    assert result.linear.converged.all()


def test_the_meta_gradient_is_that_of_central_differences(tanh_net):
    """Through the whole pipeline, of a network whose loss is not convex."""
    episode = regression_episode()
    flat = FlatModel(tanh_net)

    def run(row: torch.Tensor):
        nn.utils.vector_to_parameters(row, tanh_net.parameters())
        return meta_gradient(
            tanh_net, episode,
            loss=F.mse_loss, inner_solver=TIGHT, estimator=Implicit(Direct()), regularizer=Proximal(1.5),
        )  # fmt: skip

    theta, step = flat.initial(), 1e-4
    result = run(theta)
    assert result.adapted.converged.all()
    gradient = torch.cat([result.grads[name].flatten() for name in flat.names])
    differences = torch.stack(
        [
            (run(theta + step * unit).loss.mean() - run(theta - step * unit).loss.mean()) / (2 * step)
            for unit in torch.eye(len(theta), dtype=torch.float64)
        ]
    )
    assert (gradient - differences).norm() / differences.norm() < 1e-5


@pytest.mark.parametrize(
    "estimator", [FirstOrder(), Implicit(ConjugateGradient(5), GaussNewton()), Implicit()], ids=str
)
@pytest.mark.parametrize("chunk_size", [1, 2, 3, 4, 9])
def test_chunks_and_batching_do_not_change_the_result(tanh_net, estimator, chunk_size):
    episode = regression_episode(tasks=4)
    settings = {"loss": F.mse_loss, "estimator": estimator, "inner_solver": GradientDescent(0.1, 5)}
    whole = meta_gradient(tanh_net, episode, **settings)
    parts = meta_gradient(tanh_net, episode, chunk_size=chunk_size, **settings)
    torch.testing.assert_close(parts.loss, whole.loss, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(parts.query_outputs, whole.query_outputs, rtol=1e-12, atol=1e-13)
    for name in whole.grads:
        torch.testing.assert_close(parts.grads[name], whole.grads[name], rtol=1e-10, atol=1e-12)
    order = torch.tensor([2, 0, 3, 1])
    shuffled = meta_gradient(tanh_net, Episode(*[part[order] for part in episode]), **settings)
    torch.testing.assert_close(shuffled.loss, whole.loss[order], rtol=1e-12, atol=1e-13)
    for name in whole.grads:
        torch.testing.assert_close(shuffled.grads[name], whole.grads[name], rtol=1e-10, atol=1e-12)


def test_first_order_is_the_query_gradient_at_the_adapted_parameters(tanh_net):
    episode = regression_episode(tasks=3)
    result = meta_gradient(
        tanh_net, episode, loss=F.mse_loss, estimator=FirstOrder(), inner_solver=GradientDescent(0.1, 5)
    )
    expected = {name: torch.zeros_like(p) for name, p in tanh_net.named_parameters()}
    for i in range(3):
        own = {name: p[i].clone().requires_grad_() for name, p in result.adapted.parameters.items()}
        loss = F.mse_loss(functional_call(tanh_net, own, (episode.query_inputs[i],)), episode.query_targets[i])
        for name, gradient in zip(own, torch.autograd.grad(loss, list(own.values())), strict=True):
            expected[name] += gradient / 3
    for name, gradient in expected.items():
        torch.testing.assert_close(result.grads[name], gradient, rtol=1e-12, atol=1e-14)


def test_the_outer_loss_may_differ_from_the_inner_one(tanh_net):
    episode = regression_episode()
    settings = {"inner_solver": GradientDescent(0.1, 5)}
    plain = meta_gradient(tanh_net, episode, loss=F.mse_loss, **settings)
    triple = meta_gradient(tanh_net, episode, loss=F.mse_loss, outer_loss=lambda o, t: 3 * F.mse_loss(o, t), **settings)
    torch.testing.assert_close(triple.loss, 3 * plain.loss)
    for name in plain.grads:
        torch.testing.assert_close(triple.grads[name], 3 * plain.grads[name])


def test_nothing_of_the_model_is_changed(tanh_net):
    before = {name: p.detach().clone() for name, p in tanh_net.named_parameters()}
    meta_gradient(tanh_net, regression_episode(), loss=F.mse_loss)
    for name, p in tanh_net.named_parameters():
        assert p.grad is None
        torch.testing.assert_close(p.detach(), before[name], rtol=0, atol=0)


def test_frozen_parameters_stay_out(tanh_net):
    tanh_net.hidden.requires_grad_(False)
    result = meta_gradient(tanh_net, regression_episode(), loss=F.mse_loss)
    assert set(result.grads) == {"out.weight", "out.bias"}


def test_adapt_and_predict_work_in_inference_mode(tanh_net):
    episode = regression_episode()
    expected = adapt(tanh_net, episode.support_inputs, episode.support_targets, loss=F.mse_loss)
    with torch.inference_mode():
        inputs, targets = episode.support_inputs * 1.0, episode.support_targets * 1.0
        assert inputs.is_inference()
        adapted = adapt(tanh_net, inputs, targets, loss=F.mse_loss)
        outputs = predict(tanh_net, adapted.parameters, episode.query_inputs * 1.0, chunk_size=3)
    for name in expected.parameters:
        torch.testing.assert_close(adapted.parameters[name], expected.parameters[name], rtol=0, atol=0)
        assert not adapted.parameters[name].requires_grad
    own = {name: p[2] for name, p in expected.parameters.items()}
    torch.testing.assert_close(outputs[2], functional_call(tanh_net, own, (episode.query_inputs[2],)))


@pytest.mark.parametrize(("tasks", "given"), [(1, 2), (2, 4), (4, 2)])
@pytest.mark.parametrize("chunk_size", [None, 1])
def test_inputs_and_targets_of_other_tasks_are_refused(tanh_net, tasks, given, chunk_size):
    episode = regression_episode()
    rows = {name: p.detach().expand(tasks, *p.shape) for name, p in tanh_net.named_parameters()}
    inputs, targets = episode.query_inputs, episode.query_targets[:given]
    with pytest.raises(
        ValueError, match=rf"parameters and inputs must be of the same .*found \[\[{tasks}\], \[{given}\]\]"
    ):
        predict(tanh_net, rows, inputs[:given], chunk_size=chunk_size)
    with pytest.raises(
        ValueError, match=rf"parameters and targets must be of the same .*found \[\[{tasks}\], \[{given}\]\]"
    ):
        evaluate(tanh_net, rows, inputs[:tasks], targets, loss=F.mse_loss, chunk_size=chunk_size)


def test_autocast_does_not_reach_the_solves(tanh_net):
    net, episode = tanh_net.float(), Episode(*[part.float() for part in regression_episode()])
    plain = meta_gradient(net, episode, loss=F.mse_loss)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = meta_gradient(net, episode, loss=F.mse_loss)
    for name in plain.grads:
        torch.testing.assert_close(cast.grads[name], plain.grads[name], rtol=0, atol=0)


@pytest.mark.parametrize("estimator", [FirstOrder(), Implicit(), Implicit(curvature=GaussNewton())], ids=str)
def test_memory_does_not_grow_with_inner_steps(estimator):
    torch.manual_seed(0)
    net, episode = Conv4(5, filters=8), class_episode(tasks=2)
    peaks = []
    for steps in (16, 64, 256):
        with LiveTensorBytes() as live:
            meta_gradient(net, episode, estimator=estimator, inner_solver=GradientDescent(0.01, steps))
        peaks.append(live.peak)
    assert max(peaks) <= 1.05 * min(peaks), peaks


class DictNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = TanhNet().double()

    def forward(self, inputs):
        return self.net(inputs["a"] + inputs["b"])


def test_inputs_may_be_dicts(tanh_net):
    episode = regression_episode()
    net = DictNet()
    net.net.load_state_dict(tanh_net.state_dict())

    def split(x):
        return {"a": 0.25 * x, "b": 0.75 * x}

    parts = episode._replace(support_inputs=split(episode.support_inputs), query_inputs=split(episode.query_inputs))
    plain = meta_gradient(tanh_net, episode, loss=F.mse_loss, chunk_size=3)
    split_up = meta_gradient(net, parts, loss=F.mse_loss, chunk_size=3)
    torch.testing.assert_close(split_up.grads["net.out.weight"], plain.grads["out.weight"])


class Deciding(TanhNet):
    """Decides by a value of its data, which vmap cannot batch."""

    def forward(self, inputs):
        return super().forward(inputs if inputs.mean().item() > -1e9 else -inputs)


def deciding_loss(outputs, targets):
    return F.mse_loss(outputs, targets) if outputs.mean().item() > -1e9 else outputs.sum()


@pytest.mark.parametrize("estimator", [Implicit(), FirstOrder()])
def test_what_cannot_be_batched_goes_one_task_at_a_time_with_one_warning(estimator):
    torch.manual_seed(0)
    net, settings = Deciding().double(), {"loss": deciding_loss, "estimator": estimator}
    vmap_tasks._batched.clear()
    with pytest.warns(UserWarning, match=r"must consist of operations that .*vmap.*item") as seen:
        batch = meta_gradient(net, regression_episode(), chunk_size=4, **settings)
    assert sorted(str(w.message).split()[0] for w in seen) == ["Deciding", "deciding_loss"]
    again = meta_gradient(net, regression_episode(), chunk_size=4, **settings)  # Without another warning.
    single = meta_gradient(net, regression_episode(), chunk_size=1, **settings)
    plain = TanhNet().double()
    plain.load_state_dict(net.state_dict())
    batched = meta_gradient(plain, regression_episode(), loss=F.mse_loss, estimator=estimator)
    for name in batch.grads:
        for other in (again, single, batched):
            torch.testing.assert_close(batch.grads[name], other.grads[name], rtol=1e-9, atol=1e-12)


def test_an_error_of_the_network_itself_is_not_taken_for_a_missing_batching_rule():
    class Broken(TanhNet):
        def forward(self, inputs):
            raise ZeroDivisionError("of the network")

    with pytest.raises(ZeroDivisionError, match="of the network"):
        meta_gradient(Broken().double(), regression_episode(), loss=F.mse_loss)


class Noisy(Deciding):
    """Draws random numbers before it does what vmap cannot batch."""

    def forward(self, inputs):
        return super().forward(inputs + 0.1 * torch.randn_like(inputs))


def test_the_attempt_to_batch_leaves_the_random_numbers_to_the_tasks():
    """So that a resumed run, which tries again, goes on like one that knows already."""
    net = Noisy().double()
    vmap_tasks._batched.clear()
    losses = []
    for attempt in range(2):
        torch.manual_seed(0)
        with pytest.warns(UserWarning, match="Noisy must consist") if attempt == 0 else nullcontext():
            losses.append(meta_gradient(net, regression_episode(), loss=F.mse_loss, estimator=FirstOrder()).loss)
    assert torch.equal(*losses)


@dataclass
class Forgotten:
    """Not hashable, as plain dataclasses are."""

    scale: float = 1.0

    def __call__(self, outputs, targets):
        return self.scale * F.mse_loss(outputs, targets)


def test_a_loss_that_is_not_hashable_works(tanh_net):
    plain = meta_gradient(tanh_net, regression_episode(), loss=F.mse_loss)
    torch.testing.assert_close(meta_gradient(tanh_net, regression_episode(), loss=Forgotten()).loss, plain.loss)


def test_a_lack_of_memory_is_not_taken_for_a_missing_batching_rule():
    class Huge(TanhNet):
        def forward(self, inputs):
            raise torch.OutOfMemoryError("out of memory.")

    net = Huge().double()
    with pytest.raises(torch.OutOfMemoryError, match=r"out of memory\. Lower chunk_size"):
        meta_gradient(net, regression_episode(), loss=F.mse_loss, chunk_size=4)
    assert net not in vmap_tasks._batched


def test_an_error_without_a_message_is_no_other_error():
    class Silent(TanhNet):
        def forward(self, inputs):
            if torch._C._functorch.is_batchedtensor(inputs):
                raise NotImplementedError
            return super().forward(inputs)

    with pytest.warns(UserWarning, match=r"found no message\. Going on one task at a time"):
        meta_gradient(Silent().double(), regression_episode(), loss=F.mse_loss)


def test_a_network_that_differentiates_by_itself_gets_a_default_chunk_size(monkeypatch):
    """PyTorch's derivatives of functions refuse the hooks that measure a task."""

    class Differentiating(TanhNet):
        def forward(self, inputs):
            return super().forward(torch.func.grad(lambda x: x.square().sum())(inputs))

    net = Differentiating().double()
    by_default, single = (
        meta_gradient(net, regression_episode(), loss=F.mse_loss, chunk_size=size).loss for size in (None, 1)
    )
    torch.testing.assert_close(by_default, single)


class Tied(nn.Module):
    """A layer under two names, and two layers with one weight."""

    def __init__(self):
        super().__init__()
        self.first, self.twice = nn.Linear(3, 3), nn.Linear(3, 3)
        self.again = nn.Sequential(nn.Tanh(), self.twice)
        self.last = nn.Linear(3, 3)
        self.last.weight = self.first.weight

    def forward(self, x):
        return self.last(self.again(self.twice(self.first(x))))[..., :2]


def test_shared_layers_and_tied_weights_are_adapted_as_one_and_the_network_is_left_alone():
    torch.manual_seed(0)
    net, episode = Tied().double(), regression_episode()
    before = [(p, p.detach().clone()) for p in net.parameters()]
    found = meta_gradient(net, episode, loss=F.mse_loss, inner_solver=GradientDescent(0.1, 1), estimator=FirstOrder(),
                          regularizer=Proximal(1.0))  # fmt: skip
    for (parameter, value), now in zip(before, net.parameters(), strict=True):
        assert now is parameter
        assert torch.equal(now, value)
    expected = [torch.zeros_like(p) for p in net.parameters()]
    for k in range(episode.tasks):
        copied = copy.deepcopy(net)
        F.mse_loss(copied(episode.support_inputs[k]), episode.support_targets[k]).backward()
        with torch.no_grad():
            for p in copied.parameters():
                p -= 0.1 * p.grad
        copied.zero_grad()
        F.mse_loss(copied(episode.query_inputs[k]), episode.query_targets[k]).backward()
        expected = [e + p.grad / episode.tasks for e, p in zip(expected, copied.parameters(), strict=True)]
    for (name, _), gradient in zip(net.named_parameters(), expected, strict=True):
        torch.testing.assert_close(found.grads[name], gradient)


def test_adaptation_reads_its_targets_once(monkeypatch):
    """Each reading of class indices makes the host wait for a device."""
    read, classes_of = [], preparation.classes_of
    monkeypatch.setattr(preparation, "classes_of", lambda name, *args: (read.append(name), classes_of(name, *args))[1])
    episode = class_episode(tasks=2, ways=3, shape=(4,))
    adapt(nn.Linear(4, 3), episode.support_inputs, episode.support_targets)
    assert read == ["support_targets"]
    with pytest.raises(ValueError, match="support_targets must be class indices from 0"):
        adapt(nn.Linear(4, 3), episode.support_inputs, episode.support_targets - 1)


def test_names_with_brackets_are_names_and_no_patterns():
    """``layer[1]`` as a pattern of a shell is ``layer1``."""
    torch.manual_seed(0)
    net = nn.Sequential()
    for name, layer in (("layer1", nn.Linear(3, 3)), ("tanh", nn.Tanh()), ("layer[1]", nn.Linear(3, 2))):
        net.add_module(name, layer)
    episode = regression_episode(tasks=2)
    net, head = net.double(), ("layer[1].weight", "layer[1].bias")
    adapted = adapt(net, *episode[:2], loss=F.mse_loss, adapt_only=head)
    assert tuple(adapted.parameters) == head
    found = predict(net, adapted.parameters, episode.query_inputs)
    features = net.tanh(net.layer1(episode.query_inputs))
    weight, bias = (adapted.parameters[name] for name in head)
    torch.testing.assert_close(found, torch.baddbmm(bias[:, None], features, weight.mT))
    with pytest.raises(ValueError, match="must be patterns"):
        adapt(net, *episode[:2], loss=F.mse_loss, adapt_only=("layer[2].*",))
