"""The four-block convolutional network of the few-shot papers."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from lightning_imaml.components.checks import require
from lightning_imaml.models.norm import Norm, norm_layer
from lightning_imaml.problems.stock_layers import stock_layer


@stock_layer
class Conv4(nn.Module):
    """Four blocks of 3×3 convolution, normalisation and ReLU, then a linear classifier.

    The networks of `MAML <https://arxiv.org/abs/1703.03400>`_ (section 5.2) and iMAML: for Omniglot 64 filters with
    stride 2, the default; for mini-ImageNet ``Conv4(ways, channels=3, filters=32, image_size=84,
    downsampling="max-pool")``. With the default norm, BatchNorm uses the statistics of the batch at hand in training
    and in evaluation, as there; predictions on a query set then depend on all of it (the transductive protocol).
    Weights start from the Xavier uniform distribution and biases from zero, as in the authors' code: PyTorch's own
    defaults make the implicit system indefinite for more tasks.

    Args:
        ways: the number of classes N of a task.
        channels: image channels.
        filters: filters of each block.
        image_size: height and width of the images in pixels.
        downsampling: what halves the image in each block: convolution with stride 2, or 2×2 max-pooling after it.
        norm: what the blocks normalise by: "batch", "support", "group", "layer" or "none", see
            :data:`lightning_imaml.models.norm.Norm`.

    Shapes:
        ``[n, channels, image_size, image_size]`` to logits ``[n, ways]``.
    """

    def __init__(
        self,
        ways: int,
        channels: int = 1,
        filters: int = 64,
        image_size: int = 28,
        downsampling: Literal["stride", "max-pool"] = "stride",
        norm: Norm = "batch",
    ) -> None:
        super().__init__()
        for name, value, least in (("ways", ways, 1), ("channels", channels, 1), ("filters", filters, 1)):
            require(value >= least, self, name, f"at least {least}", value, "Omniglot has 5 or 20 ways, 1 channel.")
        pool = downsampling == "max-pool"
        least = 16 if pool else 2
        require(image_size >= least, self, "image_size", f"at least {least} pixels", image_size, "Omniglot's is 28.")
        choices = "'stride' or 'max-pool'"
        require(
            pool or downsampling == "stride", self, "downsampling", choices, downsampling, "Omniglot's is 'stride'."
        )
        self.image_shape = (channels, image_size, image_size)
        blocks: list[nn.Module] = []
        size = image_size
        for k in range(4):
            blocks += [
                nn.Conv2d(channels if k == 0 else filters, filters, kernel_size=3, stride=1 if pool else 2, padding=1),
                norm_layer(norm, filters),
                nn.ReLU(),
            ]
            blocks += [nn.MaxPool2d(2)] if pool else []
            size = size // 2 if pool else (size + 1) // 2
        self.features = nn.Sequential(*blocks, nn.Flatten())
        self.classifier = nn.Linear(filters * size * size, ways)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new initial weights."""
        for layer in self.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                nn.init.xavier_uniform_(layer.weight)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[n, ways]`` of images ``[n, channels, image_size, image_size]``."""
        if images.shape[1:] != self.image_shape:
            raise ValueError(
                f"Conv4: images must have shape [n, {', '.join(map(str, self.image_shape))}]; found "
                f"{list(images.shape)}. Resize them, or give channels and image_size to Conv4."
            )
        logits: Tensor = self.classifier(self.features(images))
        return logits
