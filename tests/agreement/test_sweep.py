"""Every layer and every loss of PyTorch: batched = one at a time = plain loop, as docs/networks.md tells."""

from __future__ import annotations

import copy

import pytest
import sweep
import torch
import torchvision
from conftest import class_episode
from torch import nn
from torch.nn import functional as F
from torch.nn.modules import loss as losses

from lightning_imaml import Episode
from lightning_imaml.functional import meta_gradient
from lightning_imaml.inner import GradientDescent
from lightning_imaml.meta_gradients import Unrolled
from lightning_imaml.models import use_batch_statistics
from lightning_imaml.regularizers import NoRegularizer

# Older versions batch less; the table is of the newest.
NEWEST = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 14)


@pytest.mark.parametrize("name", sweep.LAYERS)
def test_a_layer(name):
    row = sweep.row(name, sweep.of_layer(name))
    assert not NEWEST or row in sweep.DOCS.read_text().splitlines(), f"{row}; write the table by python tests/sweep.py"


@pytest.mark.parametrize("name", sweep.LOSSES)
def test_a_loss(name):
    row = sweep.row(name, sweep.of_loss(name))
    assert not NEWEST or row in sweep.DOCS.read_text().splitlines(), f"{row}; write the table by python tests/sweep.py"


@pytest.mark.skipif(not NEWEST, reason="the list is of the newest version")
def test_no_layer_is_left_out():
    kinds = {name for name, kind in vars(nn).items() if isinstance(kind, type) and issubclass(kind, nn.Module)}
    kinds -= {name for name in kinds if name.startswith("Lazy") or hasattr(losses, name)}
    assert {name.split(", ")[0] for name in sweep.LAYERS} >= kinds - sweep.NO_LAYERS


@pytest.mark.skipif(not NEWEST, reason="the list is of the newest version")
def test_no_loss_is_left_out():
    ends = "_loss", "cross_entropy", "kl_div", "with_logits"
    assert set(sweep.LOSSES) >= {name for name in dir(F) if name.endswith(ends) and not name.startswith("_")}


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "shufflenet_v2_x0_5", "squeezenet1_1", "mnasnet0_5", "resnet18",
                                  "efficientnet_b0", "regnet_y_400mf"])  # fmt: skip
@pytest.mark.slow  # Real networks take many layers of many kinds, a minute for all of these.
def test_a_network_of_torchvision(name):
    torch.manual_seed(0)
    network = use_batch_statistics(getattr(torchvision.models, name)(num_classes=3)).double()
    for layer in network.modules():
        if isinstance(layer, (nn.Dropout, torchvision.ops.StochasticDepth)):
            layer.eval()
    tasks = Episode(*(t.double() if t.is_floating_point() else t for t in class_episode(2, 3, 2, 1, (3, 40, 40))))
    settings = {"inner_solver": GradientDescent(1e-3, 1), "estimator": Unrolled(), "regularizer": NoRegularizer()}
    before = copy.deepcopy(network.state_dict())
    together, alone = (meta_gradient(network, tasks, chunk_size=size, **settings).grads for size in (2, 1))
    # Small images leave deep layers few values to normalise, so that rounding grows.
    assert sweep.apart(together, alone) <= 1e-6
    turned = Episode(*(t.flip(0) for t in tasks))
    assert sweep.apart(meta_gradient(network, turned, chunk_size=2, **settings).grads, together) <= 1e-6
    for name, t in network.state_dict().items():
        assert torch.equal(t, before[name])
