"""The four-block convolutional network of the few-shot papers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_imaml.component import require


class Conv4(nn.Module):
    """Four blocks of 3×3 convolution, batch normalisation and ReLU, then a linear classifier.

    The network of `MAML <https://arxiv.org/abs/1703.03400>`_ (section 5.2) and iMAML for Omniglot: 64 filters, stride 2
    instead of pooling. BatchNorm uses the statistics of the batch at hand in training and in evaluation, as there;
    predictions on a query set then depend on the whole query set (the transductive protocol). Weights start from the
    Xavier uniform distribution and biases from zero, as in the authors' code: PyTorch's own defaults make the implicit
    system indefinite for more tasks.

    Args:
        ways: the number of classes N of a task.
        channels: image channels.
        filters: filters of each block.
        image_size: height and width of the images in pixels.

    Shapes:
        ``[n, channels, image_size, image_size]`` to logits ``[n, ways]``.
    """

    def __init__(self, ways: int, channels: int = 1, filters: int = 64, image_size: int = 28) -> None:
        super().__init__()
        for name, value, least in (("ways", ways, 1), ("channels", channels, 1), ("filters", filters, 1)):
            require(value >= least, self, name, f"at least {least}", value, "Omniglot has 5 or 20 ways, 1 channel.")
        require(image_size >= 2, self, "image_size", "at least 2 pixels", image_size, "Omniglot's is 28.")
        self.image_shape = (channels, image_size, image_size)
        blocks: list[nn.Module] = []
        size = image_size
        for k in range(4):
            blocks += [
                nn.Conv2d(channels if k == 0 else filters, filters, kernel_size=3, stride=2, padding=1),
                nn.BatchNorm2d(filters, track_running_stats=False),
                nn.ReLU(),
            ]
            size = (size + 1) // 2
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


def use_batch_statistics(module: nn.Module) -> nn.Module:
    """Make every BatchNorm layer of ``module`` use the statistics of the batch at hand, always.

    Tasks that adapt side by side must not overwrite one another's running statistics. This removes them, in place; it
    is the papers' protocol.

    Returns:
        The module itself.
    """
    for layer in module.modules():
        if isinstance(layer, torch.nn.modules.batchnorm._BatchNorm):
            layer.track_running_stats = False
            layer.running_mean = layer.running_var = layer.num_batches_tracked = None
    return module
