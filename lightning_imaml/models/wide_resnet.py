"""Wide residual networks."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

from lightning_imaml.components.checks import require
from lightning_imaml.models.norm import Norm, norm_layer
from lightning_imaml.models.resnet12 import conv, kaiming_normal, require_images
from lightning_imaml.problems.stock_layers import stock_layer


@stock_layer
class WideResNet(nn.Module):
    """A `wide residual network <https://arxiv.org/abs/1605.07146>`_ WRN-d-k (table 1), by default WRN-16-4.

    The smaller sibling of WRN-28-10, the network of LEO and of later few-shot papers, of a size whose copies for many
    tasks fit side by side. A convolution, three groups of (d − 4)/6 pre-activation blocks with 16 k, 32 k and 64 k
    filters, of which the second and third halve the image, the mean over the image, a linear classifier. Weights start
    from the Kaiming normal distribution.

    Args:
        ways: the number of classes N of a task.
        channels: image channels.
        depth: layers d, 4 more than a multiple of 6.
        width: the factor k.
        norm: what the blocks normalise by: "batch", "support", "group", "layer" or "none", see
            :data:`lightning_imaml.models.norm.Norm`.

    Shapes:
        ``[n, channels, height, width]``, at least 4 pixels each, to logits ``[n, ways]``.
    """

    def __init__(self, ways: int, channels: int = 3, depth: int = 16, width: int = 4, norm: Norm = "batch") -> None:
        super().__init__()
        require(depth >= 10 and depth % 6 == 4, self, "depth", "10, 16, 22, 28 …", depth, "WRN-28-10 has 28.")
        small = min(ways, channels, width)
        require(small >= 1, self, "ways, channels and width", "at least 1", small, "WRN-28-10 has width 10.")
        self.channels = channels
        filters = [16, 16 * width, 32 * width, 64 * width]
        layers: list[nn.Module] = [conv(channels, filters[0], 3, norm)]
        for group, (before, after) in enumerate(pairwise(filters)):
            for k in range((depth - 4) // 6):
                stride = 2 if k == 0 and group > 0 else 1
                layers.append(_Block(before if k == 0 else after, after, stride, norm))
        ending = [norm_layer(norm, filters[-1]), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        self.features = nn.Sequential(*layers, *ending)
        self.classifier = nn.Linear(filters[-1], ways)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new initial weights."""
        kaiming_normal(self, slope=0.0)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[n, ways]`` of images ``[n, channels, height, width]``."""
        require_images(self, images, self.channels, least=4)
        logits: Tensor = self.classifier(self.features(images))
        return logits


@stock_layer
class _Block(nn.Module):
    def __init__(self, before: int, width: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.start = nn.Sequential(norm_layer(norm, before), nn.ReLU())
        self.residual = nn.Sequential(
            conv(before, width, 3, norm, stride), norm_layer(norm, width), nn.ReLU(), conv(width, width, 3, norm)
        )
        self.shortcut = nn.Conv2d(before, width, 1, stride, bias=False) if before != width or stride > 1 else None

    def forward(self, images: Tensor) -> Tensor:
        started = self.start(images)
        through: Tensor = self.residual(started)
        return through + (images if self.shortcut is None else self.shortcut(started))
