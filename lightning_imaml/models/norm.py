"""Normalisation layers, by the protocol that they imply."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.overrides import TorchFunctionMode
from typing_extensions import Self

from lightning_imaml.components.checks import require
from lightning_imaml.problems.stock_layers import stock_layer
from lightning_imaml.problems.support_set import SupportLayer

Norm = Literal["batch", "support", "group", "layer", "none"]
"""What a network normalises by.

- ``"batch"``: the statistics of the batch at hand, in training and in evaluation, as in MAML and iMAML. Predictions
  on a query set then depend on all of it: the transductive protocol.
- ``"support"``: the statistics of the task's support set, for the query set too, see :class:`SupportNorm`: the
  inductive protocol.
- ``"group"``: groups of at most eight channels of one sample, each sample by itself: the inductive protocol.
- ``"layer"``: all channels of one sample: inductive.
- ``"none"``: nothing: inductive.
"""

NORMS = ("batch", "support", "group", "layer", "none")


@stock_layer
class SupportNorm(SupportLayer):
    r"""Normalises by the mean and the variance, over the task's support set, of each channel.

    :math:`y = \gamma (x - \mu_S) / \sqrt{\sigma_S^2 + \epsilon} + \beta`, where :math:`\mu_S` and :math:`\sigma_S^2`
    are over samples and places of the support set alone: "MetaBN" of `Bronskill et al. (2020), TaskNorm
    <https://arxiv.org/abs/2003.03284>`_. On the support set it is BatchNorm with batch statistics. A query
    sample is normalised as the support set is, so predictions do not depend on the other query samples.

    The core gives a network with such layers both sets in one pass, the support set first. Called in any other way, the
    network takes all samples for the support set.

    Args:
        channels: channels C of the input.
        eps: ε, added to the variance.

    Shapes:
        ``[n, C, ...]`` to the same.

    Raises:
        ValueError: in use, the support set has a single value a channel, which has no variance.
    """

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.channels, self.eps = channels, eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def reset_parameters(self) -> None:
        """Set the scale γ to one and the shift β to zero."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def extra_repr(self) -> str:
        """What the printed network says of the layer."""
        return f"{self.channels}, eps={self.eps}"

    def forward(self, inputs: Tensor) -> Tensor:
        """Normalise ``[n, C, ...]``."""
        variance, mean = self._statistics(inputs[: self.support_rows])
        return _normalize(inputs, variance, mean, self.weight, self.bias, self.eps)

    def frozen(self, inputs: Tensor) -> nn.Module:
        """PyTorch's BatchNorm with the statistics of these support samples ``[s, C, ...]`` in its buffers."""
        kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[inputs.ndim]
        layer = kind(self.channels, self.eps).to(inputs)
        variance, mean = self._statistics(inputs)
        state = {"weight": self.weight, "bias": self.bias, "running_mean": mean.flatten()}
        layer.load_state_dict(state | {"running_var": variance.flatten(), "num_batches_tracked": torch.tensor(1)})
        return layer

    def _statistics(self, support: Tensor) -> tuple[Tensor, Tensor]:
        """Variance and mean of each channel, ``[1, C, 1, ...]``."""
        values = support.numel() // self.channels
        require(values > 1, self, "the support set", "more than one value a channel", values, "Use norm='layer'.")
        return _statistics(support)


def norm_layer(norm: Norm, channels: int, images: bool = True) -> nn.Module:
    """Make a layer for ``channels`` channels.

    Args:
        norm: what to normalise by.
        channels: channels of its input.
        images: whether the input is ``[n, channels, height, width]``, or else ``[n, channels]``.

    Raises:
        ValueError: ``norm`` is none of these, or the channels cannot be grouped.
    """
    if norm == "batch":
        batch_norm = nn.BatchNorm2d if images else nn.BatchNorm1d
        return batch_norm(channels, track_running_stats=False)
    if norm == "support":
        return SupportNorm(channels)
    if norm == "group":
        if channels % 2:
            raise ValueError(
                f"norm='group' needs an even number of channels, for a group of one is constant; found {channels}. "
                "Use an even width, or norm='layer'."
            )
        return nn.GroupNorm(channels // math.gcd(channels, 8), channels)
    if norm == "layer":
        return nn.GroupNorm(1, channels)
    if norm == "none":
        return nn.Identity()
    raise ValueError(f"norm must be one of {', '.join(map(repr, NORMS))}; found {norm!r}. The papers use 'batch'.")


class _OwnForward(SupportLayer):
    """A BatchNorm layer whose class adds something in its own ``forward``, over the statistics of the support set.

    It has the layer's parameters, submodules and buffers under the same names, and calls the layer with another
    ``torch.nn.functional.batch_norm``.
    """

    layer: _BatchNorm

    def __init__(self, layer: _BatchNorm) -> None:
        super().__init__()
        # The same dictionaries: what takes the place of a parameter here takes it in the layer.
        for held in ("_parameters", "_buffers", "_modules"):
            vars(self)[held] = vars(layer)[held]
        vars(self)["layer"] = layer  # Past nn.Module, which would register it.
        self.train(layer.training)

    def train(self, mode: bool = True) -> Self:
        """Set the training mode of the layer, too."""
        self.layer.training = mode
        return super().train(mode)

    def forward(self, inputs: Tensor) -> Tensor:
        """What the layer makes of ``[n, C, ...]``."""
        with _SupportStatistics(self.support_rows):
            outputs: Tensor = self.layer(inputs)
        return outputs

    def frozen(self, inputs: Tensor) -> nn.Module:
        """The layer itself with the statistics of these support samples ``[s, C, ...]`` in its buffers."""
        layer = copy.deepcopy(self.layer)
        variance, mean = _statistics(inputs)
        layer.track_running_stats = True
        layer.running_mean, layer.running_var = mean.flatten(), variance.flatten()
        return layer


class _SupportStatistics(TorchFunctionMode):
    """Within the block, BatchNorm takes the statistics of the first rows; of all rows for None."""

    def __init__(self, rows: int | None) -> None:
        super().__init__()
        self.rows = rows

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Replace ``batch_norm`` alone."""
        if func is not F.batch_norm:
            return func(*args, **(kwargs or {}))
        return self._normalize(*args, **(kwargs or {}))

    def _normalize(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        return _normalize(input, *_statistics(input[: self.rows]), weight, bias, eps)


def _statistics(support: Tensor) -> tuple[Tensor, Tensor]:
    """Variance and mean of each channel, ``[1, C, 1, ...]``."""
    return torch.var_mean(support, [0, *range(2, support.ndim)], correction=0, keepdim=True)


def _normalize(
    inputs: Tensor, variance: Tensor, mean: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Normalise ``[n, C, ...]``, then scale and shift."""
    shape = [1, inputs.shape[1]] + [1] * (inputs.ndim - 2)
    scale = (variance + eps).rsqrt()
    if weight is not None:
        scale = scale * weight.view(shape)
    outputs = (inputs - mean) * scale
    return outputs if bias is None else outputs + bias.view(shape)


def use_batch_statistics(module: nn.Module) -> nn.Module:
    """Make every BatchNorm layer of ``module`` use the statistics of the batch at hand, always.

    Tasks that adapt side by side must not overwrite one another's running statistics. This removes them, in place; it
    is the papers' protocol. InstanceNorm layers lose theirs, too, and use those of each sample.

    Returns:
        The module itself.
    """
    for layer in module.modules():
        if isinstance(layer, _NormBase):
            layer.track_running_stats = False
            layer.running_mean = layer.running_var = layer.num_batches_tracked = None
    return module


def use_support_statistics(module: nn.Module) -> nn.Module:
    """Replace every BatchNorm layer of ``module`` by :class:`SupportNorm`, in place: the inductive protocol.

    Scale and shift stay the same parameters under the same names; running statistics are dropped, those of InstanceNorm
    layers too. What a class of one's own adds in its ``forward``, such as the activation of timm's ``BatchNormAct2d``,
    stays.

    Returns:
        The module itself; a module that is a BatchNorm layer gives its replacement.
    """
    for name, layer in list(module._modules.items()):  # named_children leaves out the second place of a layer.
        if layer is not None:
            setattr(module, name, use_support_statistics(layer))
    if not isinstance(module, _NormBase):
        return module
    use_batch_statistics(module)
    if not isinstance(module, _BatchNorm):
        return module
    if type(module).forward not in (_BatchNorm.forward, nn.SyncBatchNorm.forward):
        return _OwnForward(module)
    norm = SupportNorm(module.num_features, module.eps).train(module.training)
    if module.affine:
        norm.weight, norm.bias = module.weight, module.bias
    else:
        norm.requires_grad_(False)
    return norm
