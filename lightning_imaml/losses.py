"""Losses of one task."""

from __future__ import annotations

from torch import Tensor, nn

from lightning_imaml.components.checks import require
from lightning_imaml.problems.supervised import LossFunction

# The union names nn.Module so that the command line takes a loss by its class path, such as one of torch.nn.
Loss = nn.Module | LossFunction
"""Takes one task's outputs ``[n, ...]`` and targets ``[n, ...]``, and returns a scalar."""


class ScaledCrossEntropy(nn.CrossEntropyLoss):
    """Cross-entropy of logits times a constant, 1/T for temperature T.

    Use it as the ``query_loss`` of an :class:`~lightning_imaml.IMAMLModule` whose adapted networks are accurate but
    under-confident. A few small inner steps leave the logits small, so the plain loss mostly measures confidence and
    may fall while the accuracy falls too. On Omniglot a scale of 2.5 helped; the loss of validation tasks was lowest at
    2 to 3.

    Args:
        scale: the factor.

    Raises:
        ValueError: ``scale`` is not positive.
    """

    def __init__(self, scale: float) -> None:
        super().__init__()
        require(scale > 0, self, "scale", "positive", scale, "1 is the plain cross-entropy.")
        self.scale = scale

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The mean loss of logits ``[n, C]`` and class indices ``[n]``."""
        return super().forward(self.scale * input, target)

    def extra_repr(self) -> str:
        """The factor, for ``repr``."""
        return f"scale={self.scale}"
