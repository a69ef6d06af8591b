"""The 12-layer residual network of the few-shot papers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from lightning_imaml.components.checks import require
from lightning_imaml.models.norm import Norm, norm_layer
from lightning_imaml.problems.stock_layers import stock_layer


@stock_layer
class ResNet12(nn.Module):
    """Four residual blocks of three 3×3 convolutions, each block halving the image, then a linear classifier.

    The network of `MetaOptNet <https://arxiv.org/abs/1904.03758>`_ (section 4.1) without DropBlock, which has no place
    inside an inner loop: leaky ReLU of slope 0.1, max-pooling after each block, the mean over what is left of the
    image. Weights start from the Kaiming normal distribution.

    Args:
        ways: the number of classes N of a task.
        channels: image channels.
        widths: filters of the four blocks; MetaOptNet has (64, 160, 320, 640), TADAM (64, 128, 256, 512).
        norm: what the convolutions normalise by: "batch", "support", "group", "layer" or "none", see
            :data:`lightning_imaml.models.norm.Norm`.

    Shapes:
        ``[n, channels, height, width]``, at least 16 pixels each, to logits ``[n, ways]``.
    """

    def __init__(
        self, ways: int, channels: int = 3, widths: Sequence[int] = (64, 160, 320, 640), norm: Norm = "batch"
    ) -> None:
        super().__init__()
        require(
            ways >= 1 and channels >= 1, self, "ways and channels", "at least 1", (ways, channels), "Photos have 3."
        )
        require(len(widths) == 4 and min(widths) >= 1, self, "widths", "four numbers", widths, "See the default.")
        self.channels = channels
        before = [channels, *widths]
        blocks = [_Block(a, b, norm) for a, b in zip(before, widths, strict=False)]
        self.features = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.classifier = nn.Linear(widths[-1], ways)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new initial weights."""
        kaiming_normal(self, slope=0.1)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[n, ways]`` of images ``[n, channels, height, width]``."""
        require_images(self, images, self.channels, least=16)
        logits: Tensor = self.classifier(self.features(images))
        return logits


@stock_layer
class _Block(nn.Module):
    def __init__(self, before: int, width: int, norm: Norm) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for k in range(3):
            layers += [conv(before if k == 0 else width, width, 3, norm), norm_layer(norm, width)]
            layers += [nn.LeakyReLU(0.1)] if k < 2 else []
        self.residual = nn.Sequential(*layers)
        self.shortcut = nn.Sequential(conv(before, width, 1, norm), norm_layer(norm, width))
        self.end = nn.Sequential(nn.LeakyReLU(0.1), nn.MaxPool2d(2))

    def forward(self, images: Tensor) -> Tensor:
        output: Tensor = self.end(self.residual(images) + self.shortcut(images))
        return output


def conv(before: int, width: int, kernel_size: int, norm: Norm, stride: int = 1) -> nn.Conv2d:
    """A convolution that keeps the size of the image, without the bias that a normalisation would take away."""
    return nn.Conv2d(before, width, kernel_size, stride, padding=kernel_size // 2, bias=norm == "none")


def kaiming_normal(network: nn.Module, slope: float) -> None:
    """Draw all convolutions from the Kaiming normal distribution, and the other layers from their own."""
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, a=slope, mode="fan_out", nonlinearity="leaky_relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif layer is not network and hasattr(layer, "reset_parameters"):
            layer.reset_parameters()  # type: ignore[operator]


def require_images(network: nn.Module, images: Tensor, channels: int, least: int) -> None:
    """Raise a ValueError unless these are images of the right kind."""
    if images.ndim != 4 or images.shape[1] != channels or min(images.shape[2:]) < least:
        raise ValueError(
            f"{type(network).__name__}: images must have shape [n, {channels}, height, width] with at least {least} "
            f"pixels each; found {list(images.shape)}. Resize them, or give channels to {type(network).__name__}."
        )
