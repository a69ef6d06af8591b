"""Networks of well-known layers alone, whose forward pass may be run in faster ways.

A network's own code may do what a faster way does not see or cannot do: draw random numbers, stop a derivative, change
a buffer or its input, look at the strides of a tensor. What is listed here does none of that.
"""

from __future__ import annotations

from typing import TypeVar

from torch import nn

_Layer = TypeVar("_Layer", bound=type[nn.Module])
_LAYERS: set[type[nn.Module]] = {
    nn.Sequential, nn.ModuleList, nn.Identity, nn.Flatten, nn.Conv2d, nn.Linear, nn.BatchNorm1d, nn.BatchNorm2d,
    nn.GroupNorm, nn.LayerNorm, nn.ReLU, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Softplus, nn.Tanh, nn.Sigmoid,
    nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Dropout, nn.Dropout2d,
}  # fmt: skip


def stock_layer(layer: _Layer) -> _Layer:
    """Count a class among them, not its subclasses, whose forward pass may be another."""
    _LAYERS.add(layer)
    return layer


def has_stock_layers_alone(network: nn.Module) -> bool:
    """Whether a network has nothing else, and as it stands no hooks, no random numbers and nothing in place."""
    return all(
        type(layer) in _LAYERS
        and "forward" not in vars(layer)
        and not getattr(layer, "inplace", False)
        and not (layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks)
        and not (layer.training and isinstance(layer, (nn.Dropout, nn.Dropout2d)) and layer.p)
        for layer in network.modules()
    )
