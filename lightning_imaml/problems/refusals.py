"""Layers that keep state from one call to the next, refused by name."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm


def refuse_state(network: nn.Module) -> None:
    """Raise a ValueError where a standard layer would change its own buffers or weights in the forward pass."""
    for name, layer in network.named_modules():
        if isinstance(layer, _NormBase) and layer.training and layer.running_mean is not None:
            raise ValueError(
                f"the backbone's norm layers must not track running statistics in training, since every task "
                f"would overwrite the others'; found {type(layer).__name__} {name!r}. Build it with "
                "track_running_stats=False (batch statistics, the paper's protocol), or call "
                "lightning_imaml.models.use_batch_statistics(backbone); for the inductive protocol, "
                "use_support_statistics(backbone)."
            )
        if layer.training and (isinstance(layer, _SpectralNorm) or _has_spectral_hook(layer)):
            raise ValueError(
                f"the backbone's spectral norms must not take power iterations, since what one task has found would be "
                f"where the next one begins; found {type(layer).__name__} {name!r} in training mode. Call "
                f"backbone.get_submodule({name!r}).eval(), which keeps the singular vectors that it has."
            )
        if isinstance(layer, (nn.Embedding, nn.EmbeddingBag)) and layer.max_norm is not None:
            raise ValueError(
                f"the backbone's embeddings must have max_norm=None, since with it the forward pass writes into the "
                f"weights; found {type(layer).__name__} {name!r} with max_norm={layer.max_norm}. Set its max_norm to "
                "None, and scale what it returns, for example by torch.renorm."
            )


def _has_spectral_hook(layer: nn.Module) -> bool:
    hooks = layer._forward_pre_hooks
    return bool(hooks) and any(isinstance(hook, SpectralNorm) for hook in hooks.values())
