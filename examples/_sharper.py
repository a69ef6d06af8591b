"""An outer loss on logits times a constant: what counts then is which class is first, more than how sure."""

from typing import Any

from torch import Tensor

from lightning_imaml import IMAMLModule


class Sharper(IMAMLModule):
    """IMAMLModule whose query logits are multiplied before the outer loss.

    Args:
        sharpness: the factor.
        **settings: those of IMAMLModule.
    """

    def __init__(self, sharpness: float = 2.0, **settings: Any) -> None:
        super().__init__(**settings)
        self.sharpness = sharpness

    def outer_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Q of an adapted network."""
        return self.loss(self.sharpness * outputs, targets)
