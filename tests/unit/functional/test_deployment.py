"""A deployed network gives, one sample at a time, what ``predict`` gives for its task."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from conftest import TanhNet, class_episode, regression_episode
from torch import nn
from torch.nn import functional as F

from lightning_imaml import IMAMLModule
from lightning_imaml.functional import adapt, adapted_network, predict
from lightning_imaml.inner import GradientDescent
from lightning_imaml.models import Conv4, SupportNorm, use_support_statistics

_drawn = class_episode(tasks=2, ways=3, shots=2, queries=4, shape=(1, 28, 28))
EPISODE = _drawn._replace(support_inputs=_drawn.support_inputs.double(), query_inputs=_drawn.query_inputs.double())
STEPS = GradientDescent(0.2, 3)


def conv(norm: str = "support") -> nn.Module:
    torch.manual_seed(0)
    return Conv4(ways=3, filters=4, norm=norm).double().eval()


def deployed(network: nn.Module, task: int = 1) -> tuple[nn.Module, torch.Tensor]:
    """The network of one task, and what ``predict`` gives for its query set."""
    adapted = adapt(network, EPISODE.support_inputs, EPISODE.support_targets, inner_solver=STEPS)
    told = predict(network, adapted.parameters, EPISODE.query_inputs, support_inputs=EPISODE.support_inputs)
    plain = adapted_network(network, adapted.parameters, task=task, support_inputs=EPISODE.support_inputs)
    return plain, told[task]


@pytest.mark.parametrize("norm", ["support", "group", "layer", "none"])
def test_one_image_at_a_time_gives_what_predict_gives(norm):
    network = conv(norm)
    before = copy.deepcopy(network.state_dict())
    plain, expected = deployed(network)
    found = torch.cat([plain(image.unsqueeze(0)) for image in EPISODE.query_inputs[1]])
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert not any(isinstance(layer, SupportNorm) for layer in plain.modules())
    assert not plain.training
    torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)


def test_a_vector_network_and_a_part_that_adapts():
    torch.manual_seed(0)
    network = use_support_statistics(
        nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 2))
    ).double()
    support, targets, queries, _ = regression_episode(tasks=2)
    adapted = adapt(network, support, targets, loss=F.mse_loss, inner_solver=STEPS, adapt_only=("3.*",))
    plain = adapted_network(network, adapted.parameters, support_inputs=support)
    expected = predict(network, adapted.parameters, queries, support_inputs=support)[0]
    torch.testing.assert_close(torch.stack([plain(x[None])[0] for x in queries[0]]), expected, rtol=1e-12, atol=1e-12)


def test_the_module_deploys_its_own_network_for_one_task():
    module = IMAMLModule(conv(), inner_solver=STEPS).eval()
    support = EPISODE.support_inputs[1], EPISODE.support_targets[1]
    torch.testing.assert_close(
        module.adapted_network(*support)(EPISODE.query_inputs[1]), deployed(conv())[1], rtol=1e-10, atol=1e-10
    )


def test_it_pickles_and_is_saved_without_the_package():
    plain, expected = deployed(conv())
    image = EPISODE.query_inputs[1]
    torch.testing.assert_close(pickle.loads(pickle.dumps(plain))(image), plain(image), rtol=0, atol=0)
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(plain, (image[:1],)), buffer)
    buffer.seek(0)
    torch.testing.assert_close(torch.export.load(buffer).module()(image[:1]), expected[:1], rtol=1e-10, atol=1e-10)


@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore::torch.jit.TracerWarning")
def test_it_is_traced_and_compiled():
    plain, expected = deployed(conv())
    image = EPISODE.query_inputs[1][:1]
    torch.testing.assert_close(torch.jit.trace(plain, image)(image), expected[:1], rtol=1e-10, atol=1e-10)
    compiled = torch.compile(plain, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(image), expected[:1], rtol=1e-10, atol=1e-10)


def test_a_network_that_looks_at_its_batch_is_deployed_with_a_warning():
    with pytest.warns(UserWarning, match="should treat each sample by itself.*norm='support'"):
        plain, expected = deployed(conv("batch"))
    torch.testing.assert_close(plain(EPISODE.query_inputs[1]), expected, rtol=1e-10, atol=1e-10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        deployed(use_support_statistics(conv("batch")))  # The remedy.


def test_what_does_not_fit_is_refused():
    network, parameters = TanhNet().double(), {"hidden.bias": torch.zeros(2, 4, dtype=torch.float64)}
    with pytest.raises(IndexError, match="task must be from 0 to 1, the tasks of the parameters; found 2"):
        adapted_network(network, parameters, task=2)
    with pytest.raises(ValueError, match=r"parameters must be named as those of Linear; found \['hidden.bias'\]"):
        adapted_network(nn.Linear(4, 4), parameters)
    with pytest.raises(ValueError, match="support_inputs must be given"):
        adapted_network(conv(), {"classifier.bias": torch.zeros(1, 3, dtype=torch.float64)})


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.out = SupportNorm(3), nn.Linear(3, 2)

    def forward(self, x):
        return self.out(self.norm(self.norm(x) + 1))


def test_a_layer_with_two_places_is_refused():
    with pytest.raises(ValueError, match="must be used once in a forward pass; found one that Twice uses twice"):
        adapted_network(Twice(), {"out.bias": torch.zeros(1, 2)}, support_inputs=torch.randn(1, 4, 3))
