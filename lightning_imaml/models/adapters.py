"""Low-rank adapters: a few parameters beside frozen or shared layers, for the inner loop to adapt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from lightning_imaml.components.checks import require
from lightning_imaml.parameters.names import matches, require_matches
from lightning_imaml.problems.stock_layers import stock_layer


@stock_layer
class LowRankAdapter(nn.Module):
    """A linear or 2-d convolutional layer with a path of low rank beside it: x ↦ layer(x) + up(down(x)).

    That adds a matrix of rank ``rank`` to the layer's weight (LoRA, `Hu et al., 2021
    <https://arxiv.org/abs/2106.09685>`_). ``up`` starts from zero, so that the layer starts as it was.

    Args:
        layer: the layer.
        rank: the width of the path.

    Raises:
        ValueError: ``rank`` is below 1.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d, rank: int) -> None:
        super().__init__()
        require(rank >= 1, self, "rank", "at least 1", rank, "4 is a usual start.")
        self.layer = layer
        kind: dict[str, Any] = {"bias": False, "dtype": layer.weight.dtype, "device": layer.weight.device}
        self.down: nn.Module
        self.up: nn.Module
        if isinstance(layer, nn.Linear):
            self.down, self.up = nn.Linear(layer.in_features, rank, **kind), nn.Linear(rank, layer.out_features, **kind)
        else:
            places: dict[str, Any] = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
            places["padding_mode"] = layer.padding_mode
            self.down = nn.Conv2d(layer.in_channels, rank, layer.kernel_size, **places, **kind)  # type: ignore[arg-type]
            self.up = nn.Conv2d(rank, layer.out_channels, 1, **kind)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Make the path zero."""
        nn.init.zeros_(self.up.weight)  # type: ignore[arg-type]

    @property
    def weight(self) -> Tensor:
        """The layer's weight with the path's: what attention reads of a linear layer instead of calling it."""
        path = self.up.weight.flatten(1) @ self.down.weight.flatten(1)  # type: ignore[operator]
        return self.layer.weight + path.view_as(self.layer.weight)

    @property
    def bias(self) -> Tensor | None:
        """The layer's own."""
        return self.layer.bias

    def forward(self, inputs: Tensor) -> Tensor:
        """What the layer and the path give together."""
        outputs: Tensor = self.layer(inputs) + self.up(self.down(inputs))
        return outputs


def add_low_rank_adapters(network: nn.Module, rank: int = 4, layers: Sequence[str] = ("*",)) -> nn.Module:
    """Put a :class:`LowRankAdapter` around linear and 2-d convolutional layers of a network, in place.

    With ``adapt_only=("*.down.*", "*.up.*")`` the inner loop adapts the adapters alone; the layers are meta-learned.

    Args:
        network: the network.
        rank: the rank of the adapters.
        layers: patterns over the names of layers.

    Returns:
        The network itself.

    Raises:
        ValueError: a pattern matches no such layer, or ``rank`` is below 1.
    """
    everything = network.named_modules(remove_duplicate=False)  # Of a layer that stands in it twice, both places.
    found = {name: layer for name, layer in everything if isinstance(layer, (nn.Linear, nn.Conv2d))}
    found.pop("", None)  # A layer that is the network itself has no place to put an adapter in.
    require_matches(layers, list(found), "layers")
    chosen = {layer for name, layer in found.items() if matches(name, layers)}
    adapters = {layer: LowRankAdapter(layer, rank) for layer in found.values() if layer in chosen}
    for name, layer in found.items():
        if layer in chosen:
            parent, _, own = name.rpartition(".")
            setattr(network.get_submodule(parent), own, adapters[layer])
    return network
