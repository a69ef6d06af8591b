"""Normalisation by the statistics of the support set: against a network that keeps them between two passes."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision.models import mobilenet_v2

from lightning_imaml import Episode, IMAMLModule
from lightning_imaml.callbacks import AdaptationCurve, ResultsTable
from lightning_imaml.functional import adapt, adapted_network, evaluate, meta_gradient, predict
from lightning_imaml.inner import GradientDescent
from lightning_imaml.linear import Direct
from lightning_imaml.meta_gradients import FirstOrder, Implicit, Unrolled
from lightning_imaml.models import Checkpointed, SupportNorm, use_batch_statistics, use_support_statistics
from lightning_imaml.regularizers import Proximal

WAYS, TASKS = 3, 2
LR, STRENGTH = 0.01, 20.0


class TwoPasses(nn.Module):
    """Keeps the support set's statistics for the query pass that follows."""

    def __init__(self, channels):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.kept = None

    def forward(self, inputs):
        if self.kept is None:
            over = [0, *range(2, inputs.ndim)]
            self.kept = inputs.mean(over), inputs.var(over, unbiased=False)
        mean, variance, weight, bias = (
            v.reshape(1, -1, *[1] * (inputs.ndim - 2)) for v in (*self.kept, self.weight, self.bias)
        )
        return (inputs - mean) / torch.sqrt(variance + 1e-5) * weight + bias


def network(norm=SupportNorm):
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 4, 3, stride=2), norm(4), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 4, 6), norm(6), nn.Tanh()
    model = nn.Sequential(*layers, nn.Linear(6, WAYS)).double()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:  # scales and shifts that are not the initial ones
                p.add_(torch.linspace(-0.3, 0.4, len(p)))
    return model


def tasks(queries=2, shots=2):
    """Two tasks with very different statistics."""
    generator = torch.Generator().manual_seed(1)

    def images(count):
        noise = torch.randn(TASKS, WAYS * count, 1, 6, 6, generator=generator, dtype=torch.float64)
        scale = torch.tensor([1.0, 3.0]).view(-1, 1, 1, 1, 1)
        return noise * scale - scale, torch.arange(WAYS).repeat_interleave(count).expand(TASKS, -1)

    return Episode(*images(shots), *images(queries))


def single(episode):
    return Episode(*(part.float() if part.is_floating_point() else part for part in episode))


def support_loss(model, parameters, episode, task):
    """Leaves the statistics behind for the query set."""
    for layer in model.modules():
        if isinstance(layer, TwoPasses):
            layer.kept = None
    outputs = functional_call(model, parameters, (episode.support_inputs[task],))
    return F.cross_entropy(outputs, episode.support_targets[task])


def adapted_alone(model, initial, episode, task, steps, only=""):
    """Plain gradient descent on G, differentiable in the initialisation; only parameters with that prefix adapt."""
    mine = {name: p * 1.0 for name, p in initial.items() if name.startswith(only)}
    for _ in range(steps):
        pull = sum((p - initial[name]).square().sum() for name, p in mine.items())
        objective = support_loss(model, initial | mine, episode, task) + STRENGTH / 2 * pull
        gradients = torch.autograd.grad(objective, list(mine.values()), create_graph=True)
        mine = {name: p - LR * g for (name, p), g in zip(mine.items(), gradients, strict=True)}
    return initial | mine


def outer(model, initial, episode, steps, only=""):
    """The mean query loss after adaptation, by two passes a task."""
    losses = []
    for task in range(TASKS):
        mine = adapted_alone(model, initial, episode, task, steps, only)
        support_loss(model, mine, episode, task)
        outputs = functional_call(model, mine, (episode.query_inputs[task],))
        losses.append(F.cross_entropy(outputs, episode.query_targets[task]))
    return torch.stack(losses).mean()


def parameters(model):
    return {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}


def settings(steps, **options):
    return {"inner_solver": GradientDescent(LR, steps), "regularizer": Proximal(STRENGTH), **options}


@pytest.mark.parametrize("shape", [(5, 4), (5, 4, 3, 3)])
def test_on_the_support_set_it_is_batch_norm(shape):
    torch.manual_seed(0)
    layer, inputs = SupportNorm(4).double(), torch.randn(shape, dtype=torch.float64)
    layer.weight.data.uniform_(), layer.bias.data.uniform_()
    expected = F.batch_norm(inputs, None, None, layer.weight, layer.bias, training=True)
    torch.testing.assert_close(layer(inputs), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chunk_size", [None, 1])
def test_each_task_is_normalised_by_its_own_support_set(chunk_size):
    model, reference, episode = network(), network(TwoPasses), tasks()
    adapted = adapt(model, episode.support_inputs, episode.support_targets, chunk_size=chunk_size, **settings(3))
    loss, outputs = evaluate(
        model,
        adapted.parameters,
        episode.query_inputs,
        episode.query_targets,
        support_inputs=episode.support_inputs,
        chunk_size=chunk_size,
    )
    for task in range(TASKS):
        mine = adapted_alone(reference, parameters(reference), episode, task, 3)
        for name, p in mine.items():
            torch.testing.assert_close(adapted.parameters[name][task], p.detach(), rtol=1e-9, atol=1e-12)
        support_loss(reference, mine, episode, task)
        expected = functional_call(reference, mine, (episode.query_inputs[task],))
        torch.testing.assert_close(outputs[task], expected.detach(), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(loss[task], F.cross_entropy(expected, episode.query_targets[task]).detach())


class BatchStatistics(nn.modules.batchnorm._BatchNorm):
    def __init__(self, channels):
        super().__init__(channels, track_running_stats=False)

    def _check_input_dim(self, inputs):
        pass  # with places and without


@pytest.mark.parametrize("norm", [SupportNorm, BatchStatistics])
def test_a_prediction_does_not_depend_on_the_other_queries(norm):
    """By the derivative of each prediction in each query image: zero off the diagonal, and no rounding about it."""
    model, episode = network(norm), tasks()
    rows = {name: p.detach().expand(TASKS, *p.shape) for name, p in model.named_parameters()}
    queries = episode.query_inputs.clone().requires_grad_()
    outputs = predict(model, rows, queries, support_inputs=episode.support_inputs)
    for task in range(TASKS):
        for query in range(outputs.shape[1]):
            (slope,) = torch.autograd.grad(outputs[task, query, 0], queries, retain_graph=True)
            depends = slope.flatten(2).abs().amax(dim=2) > 0
            assert depends[task, query]
            depends[task, query] = False
            assert depends.any() == (norm is BatchStatistics)
    alone = predict(model, rows, queries[:, :2], support_inputs=episode.support_inputs)
    together = torch.allclose(alone, outputs[:, :2], rtol=1e-12, atol=1e-14)
    assert together == (norm is SupportNorm)


@pytest.mark.parametrize("only", ["", "5.", "7."], ids=["all", "a norm", "the head"])
def test_the_meta_gradient_against_central_differences(only):
    """Q depends on all parameters, adapted and shared, through the support set's statistics too."""
    model, reference, episode, steps, h = network(), network(TwoPasses), tasks(), 3, 1e-5
    found = meta_gradient(model, episode, estimator=Unrolled(), adapt_only=(f"{only}*",), **settings(steps))
    initial = {name: p.detach() for name, p in reference.named_parameters()}
    torch.manual_seed(0)
    for name, p in initial.items():
        direction = torch.randn_like(p)
        values = []
        for sign in (1, -1):
            moved = {**initial, name: p + sign * h * direction}
            values.append(
                outer(reference, {k: v.clone().requires_grad_() for k, v in moved.items()}, episode, steps, only)
            )
        expected = (values[0] - values[1]).detach() / (2 * h)
        torch.testing.assert_close((found.grads[name] * direction).sum(), expected, rtol=1e-6, atol=1e-9)


def test_implicit_is_unrolled_at_convergence():
    model, reference, episode = network(), network(TwoPasses), tasks(shots=5)
    implicit = meta_gradient(model, episode, estimator=Implicit(Direct()), **settings(160))
    assert implicit.adapted.residual.max() < 1e-10
    start = parameters(reference)
    expected = torch.autograd.grad(outer(reference, start, episode, 160), list(start.values()))
    unrolled = meta_gradient(model, episode, estimator=Unrolled(), **settings(160))
    for name, plain in zip(start, expected, strict=True):
        torch.testing.assert_close(unrolled.grads[name], plain, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(implicit.grads[name], plain, rtol=1e-5, atol=1e-8)


def test_chunks_change_nothing():
    model, episode = network(), tasks()
    whole, parts = (
        meta_gradient(model, episode, estimator=Implicit(Direct()), chunk_size=size, **settings(5)) for size in (2, 1)
    )
    for name, gradient in whole.grads.items():
        torch.testing.assert_close(parts.grads[name], gradient)
    torch.testing.assert_close(parts.query_outputs, whole.query_outputs)


@pytest.mark.parametrize("estimator", [Implicit(Direct()), Unrolled()])
def test_layers_that_are_computed_again_find_the_same_support_set(estimator):
    plain = nn.Sequential(network()[:4], network()[4:])
    saving = nn.Sequential(Checkpointed(network()[:4]), network()[4:])
    expected, found = (meta_gradient(m, tasks(), estimator=estimator, **settings(3)) for m in (plain, saving))
    for one, other in zip(expected.grads.values(), found.grads.values(), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-12)


@pytest.mark.slow  # Compiles an inner loop and a query gradient.
def test_compiled_code_takes_each_task_s_statistics():
    model, episode = network().float(), single(tasks())
    plain, compiled = (
        meta_gradient(model, episode, estimator=FirstOrder(), compile=compile, **settings(2))
        for compile in (False, True)
    )
    for name, gradient in plain.grads.items():
        torch.testing.assert_close(compiled.grads[name], gradient, rtol=1e-3, atol=1e-5)


def test_the_module_and_its_callbacks_take_the_support_set(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    model = network().float()
    episode = single(tasks())
    module = IMAMLModule(model, inner_solver=GradientDescent(LR, 3), regularizer=Proximal(STRENGTH))
    trainer = Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        max_steps=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[ResultsTable(), AdaptationCurve(steps=(0, 3))],
    )
    loader = DataLoader([episode], batch_size=None)
    trainer.fit(module, loader, loader)
    adapted = module.adapt(episode.support_inputs, episode.support_targets)
    expected = predict(model, adapted.parameters, episode.query_inputs, support_inputs=episode.support_inputs)
    (outputs,) = trainer.predict(module, loader)
    torch.testing.assert_close(outputs, expected.detach())
    capsys.readouterr()
    (metrics,) = trainer.test(module, loader, verbose=False)
    accuracy = (expected.argmax(-1) == episode.query_targets).float().mean()
    assert metrics["test/accuracy"] == metrics["test/accuracy_at_3_steps"] == pytest.approx(float(accuracy))
    words = " ".join(capsys.readouterr().out.split())
    assert "3 inner steps, support statistics (inductive), 2 tasks." in words
    assert "random weights, after adaptation" in words


def test_batch_norm_layers_can_be_replaced():
    """torchvision's own network: the same parameters, and on a support set the same outputs as in training."""
    torch.manual_seed(0)
    model = mobilenet_v2(num_classes=WAYS, width_mult=0.1, dropout=0.0).double()
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    before, expected = dict(model.named_parameters()), model(images)
    assert use_support_statistics(model) is model
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is p for name, p in before.items())
    torch.testing.assert_close(model(images), expected, rtol=1e-9, atol=1e-10)
    rows = {name: p.detach()[None] for name, p in after.items()}
    outputs = predict(model, rows, images[None], support_inputs=images[None])
    torch.testing.assert_close(outputs[0], expected.detach(), rtol=1e-9, atol=1e-10)
    fixed = use_support_statistics(nn.BatchNorm1d(4, affine=False))
    assert isinstance(fixed, SupportNorm)
    assert not any(p.requires_grad for p in fixed.parameters())


def test_what_is_lacking_is_named():
    model, episode = network(), tasks()
    rows = {name: p.detach().expand(TASKS, *p.shape) for name, p in model.named_parameters()}
    with pytest.raises(
        ValueError, match=r"support_inputs must be given, since Sequential .* \(SupportNorm\); found None"
    ):
        predict(model, rows, episode.query_inputs)
    with pytest.raises(ValueError, match=r"support_inputs must be \[T, s, ...\] .*\(1, 1, 6, 6\).*\(2, 1, 6, 6\)"):
        predict(model, rows, episode.query_inputs, support_inputs=episode.support_inputs[:1])
    with pytest.raises(ValueError, match="SupportNorm: the support set must be more than one value a channel; found 1"):
        SupportNorm(4)(torch.zeros(1, 4))


def test_both_places_of_a_layer_are_replaced_and_keep_their_parameters():
    layer = nn.BatchNorm1d(4, track_running_stats=False)
    network = use_support_statistics(nn.Sequential(layer, nn.Tanh(), layer))
    assert isinstance(network[0], SupportNorm)
    assert isinstance(network[2], SupportNorm)
    assert network[0].weight is network[2].weight is layer.weight


class BatchNormAct(nn.BatchNorm2d):
    """As timm's BatchNormAct2d: a forward of its own, with an activation."""

    def __init__(self, channels):
        super().__init__(channels)
        self.act = nn.Softplus()

    def forward(self, x):
        mean, variance = (None, None) if self.running_mean is None else (self.running_mean, self.running_var)
        x = F.batch_norm(x, mean, variance, self.weight, self.bias, mean is None or self.training, 0.1, self.eps)
        return self.act(x)


class TanhOfTwice(nn.Module):
    def forward(self, x):
        return torch.tanh(2 * x)


class BatchNormTwice(nn.BatchNorm2d):
    def forward(self, x):
        return torch.tanh(2 * super().forward(x))


@pytest.mark.parametrize(("kind", "added"), [(BatchNormAct, nn.Softplus()), (BatchNormTwice, TanhOfTwice())])
def test_what_a_batch_norm_of_ones_own_adds_stays(kind, added):
    def build(norm):
        torch.manual_seed(0)
        layers = nn.Conv2d(1, 4, 3, stride=2), norm, nn.Flatten(), nn.Linear(4 * 4, WAYS)
        return nn.Sequential(*layers).double()

    replaced, expected = use_support_statistics(build(kind(4))), build(nn.Sequential(SupportNorm(4)))
    assert [name for name, _ in replaced.named_parameters()] == [
        f"{k}.{part}" for k in (0, 1, 3) for part in ("weight", "bias")
    ]
    assert not dict(replaced.named_buffers())
    expected[1].append(added)
    episode = tasks()
    settings = {"inner_solver": GradientDescent(LR, 2), "regularizer": Proximal(STRENGTH), "estimator": Unrolled()}
    found, right = (meta_gradient(net, episode, **settings).grads for net in (replaced, expected))
    torch.testing.assert_close(list(found.values()), list(right.values()), rtol=1e-10, atol=1e-12)
    again = copy.deepcopy(replaced.eval())
    assert not again[1].layer.training
    torch.testing.assert_close(list(meta_gradient(again, episode, **settings).grads.values()), list(right.values()))
    adapted = adapt(replaced, *episode[:2]).parameters
    plain = adapted_network(replaced, adapted, task=1, support_inputs=episode.support_inputs)
    assert type(plain[1]) is kind
    predicted = predict(replaced, adapted, episode.query_inputs, support_inputs=episode.support_inputs)[1]
    torch.testing.assert_close(plain(episode.query_inputs[1]), predicted, rtol=1e-10, atol=1e-12)
    twin = pickle.loads(pickle.dumps(replaced))
    twin.load_state_dict(replaced.state_dict())
    torch.testing.assert_close(twin(episode.query_inputs[0]), expected(episode.query_inputs[0]))


@pytest.mark.parametrize("helper", [use_batch_statistics, use_support_statistics])
def test_the_remedy_works_for_instance_norms(helper):
    def build(track):
        torch.manual_seed(0)
        norm = nn.InstanceNorm2d(4, affine=True, track_running_stats=track)
        return nn.Sequential(nn.Conv2d(1, 4, 3, stride=2), norm, nn.Tanh(), nn.Flatten(), nn.Linear(16, WAYS)).double()

    tracking, episode = build(True), tasks()
    with pytest.raises(ValueError, match=r"found InstanceNorm2d '1'.*use_batch_statistics\(backbone\)"):
        meta_gradient(tracking, episode)
    found, expected = meta_gradient(helper(tracking), episode).grads, meta_gradient(build(False), episode).grads
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
