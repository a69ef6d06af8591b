"""Losses of one task."""

from __future__ import annotations

from torch import Tensor, nn

from lightning_imaml.components.checks import require
from lightning_imaml.problems.supervised import LossFunction

# The module is named apart so that the command line takes one by its class path, such as torch's own.
Loss = nn.Module | LossFunction
"""Takes one task's outputs ``[n, ...]`` and targets ``[n, ...]``, gives a scalar."""


class ScaledCrossEntropy(nn.CrossEntropyLoss):
    """Cross-entropy of logits times a constant, 1/T for temperature T.

    For the ``query_loss`` of an :class:`~lightning_imaml.IMAMLModule` whose adapted networks are right but hardly sure.
    A few small inner steps leave the logits small, so that the plain loss is mostly a matter of confidence: it may fall
    while the accuracy falls too. On Omniglot 2.5 helped, where the loss of validation tasks was lowest at 2 to 3.

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
        """The factor."""
        return f"scale={self.scale}"
