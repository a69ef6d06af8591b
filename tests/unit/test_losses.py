"""A query loss of its own: what it is, where it counts, and that a checkpoint does not lose it."""

from __future__ import annotations

import pytest
import small_runs
import torch
from torch.nn import functional as F

from lightning_imaml import IMAMLModule
from lightning_imaml.curvature import GaussNewton
from lightning_imaml.functional import meta_gradient
from lightning_imaml.inner import GradientDescent
from lightning_imaml.losses import ScaledCrossEntropy
from lightning_imaml.meta_gradients import Implicit
from lightning_imaml.regularizers import Proximal

SETTINGS = {"inner_solver": GradientDescent(0.1, 2), "regularizer": Proximal(0.5)}


def test_it_is_the_cross_entropy_of_the_softmax_at_a_temperature():
    logits = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    targets = torch.tensor([0, 1, 2, 3, 1, 1])
    loss = ScaledCrossEntropy(2.5)(logits, targets)
    (slope,) = torch.autograd.grad(loss, logits)
    powers = torch.exp(2.5 * logits.detach())
    chances = powers / powers.sum(dim=1, keepdim=True)
    torch.testing.assert_close(loss.detach(), -chances[range(6), targets].log().mean())
    torch.testing.assert_close(slope, 2.5 / 6 * (chances - F.one_hot(targets, 4)))
    assert repr(ScaledCrossEntropy(2.5)) == "ScaledCrossEntropy(scale=2.5)"


@pytest.mark.parametrize("scale", [0.0, -1.0])
def test_its_factor_is_checked(scale):
    with pytest.raises(ValueError, match=f"ScaledCrossEntropy: scale must be positive; found {scale}"):
        ScaledCrossEntropy(scale)


class Scaled(IMAMLModule):
    def outer_loss(self, outputs, targets):
        return F.cross_entropy(3 * outputs, targets)


def test_the_query_loss_is_the_outer_one_alone():
    """The same as in the core, and as an override; and another one than without."""
    episode = small_runs.episode()
    core = meta_gradient(
        small_runs.network(), episode, outer_loss=ScaledCrossEntropy(3.0), estimator=Implicit(curvature=GaussNewton()),
        **SETTINGS,
    )  # fmt: skip
    given = small_runs.module(query_loss=ScaledCrossEntropy(3.0)).meta_gradient(episode)
    override = small_runs.module(Scaled).meta_gradient(episode)
    without = small_runs.module().meta_gradient(episode)
    for found in (given, override):
        torch.testing.assert_close(found.loss, core.loss)
        for name, gradient in core.grads.items():
            torch.testing.assert_close(found.grads[name], gradient)
            torch.testing.assert_close(found.adapted.parameters[name], without.adapted.parameters[name])
            assert not torch.allclose(gradient, without.grads[name])


def test_validation_shows_the_query_loss():
    model = small_runs.module(query_loss=ScaledCrossEntropy(3.0))
    run = small_runs.trainer()
    (found,) = run.validate(model, small_runs.loader(1), verbose=False)
    episode = small_runs.episode()
    adapted = model.adapt(episode.support_inputs, episode.support_targets).parameters
    expected = [
        F.cross_entropy(
            3 * torch.func.functional_call(model.backbone, {n: p[k] for n, p in adapted.items()}, (inputs,)), targets
        )
        for k, (inputs, targets) in enumerate(zip(episode.query_inputs, episode.query_targets, strict=True))
    ]
    assert found["val/loss"] == pytest.approx(float(torch.stack(expected).mean()), rel=1e-5)


def test_labels_that_have_no_output_are_found():
    episode = small_runs.episode()
    model = small_runs.module(query_loss=ScaledCrossEntropy(2.0))
    bad = episode._replace(query_targets=episode.query_targets + 1)
    with pytest.raises(ValueError, match=r"targets must lie in 0 … 2"):
        model.meta_gradient(bad)


def test_a_plain_query_loss_binds_nobody(tmp_path):
    run = small_runs.trainer()
    run.fit(small_runs.module(query_loss=F.cross_entropy), small_runs.loader(1))
    run.save_checkpoint(tmp_path / "named.ckpt")
    assert "query_loss" not in torch.load(tmp_path / "named.ckpt", weights_only=True)["lightning_imaml"]
    loaded = IMAMLModule.load_from_checkpoint(tmp_path / "named.ckpt", backbone=small_runs.network())
    assert loaded.query_loss is None
    # Another loss for both, where it is said.
    other = IMAMLModule.load_from_checkpoint(
        tmp_path / "named.ckpt", backbone=small_runs.network(), loss=F.multi_margin_loss
    )
    assert other.loss is F.multi_margin_loss


@pytest.mark.parametrize("name", ["loss", "query_loss"])
def test_a_checkpoint_does_not_lose_a_loss_in_silence(name, tmp_path):
    run = small_runs.trainer()
    run.fit(small_runs.module(**{name: ScaledCrossEntropy(2.0)}), small_runs.loader(1))
    run.save_checkpoint(tmp_path / "model.ckpt")
    with pytest.raises(
        ValueError, match=f"^{name} must be given, since .*losses.ScaledCrossEntropy; found the default"
    ):
        IMAMLModule.load_from_checkpoint(tmp_path / "model.ckpt", backbone=small_runs.network())
    loaded = IMAMLModule.load_from_checkpoint(
        tmp_path / "model.ckpt", backbone=small_runs.network(), **{name: ScaledCrossEntropy(2.0)}
    )
    assert getattr(loaded, name).scale == 2.0
