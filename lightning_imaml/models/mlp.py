"""The fully connected network of the few-shot papers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from lightning_imaml.components.checks import require
from lightning_imaml.models.norm import Norm, norm_layer
from lightning_imaml.problems.stock_layers import stock_layer


@stock_layer
class MLP(nn.Module):
    """Fully connected layers, each followed by normalisation and ReLU, then a linear layer.

    The networks of `MAML <https://arxiv.org/abs/1703.03400>`_: for sinusoids ``MLP(1, 1)`` (section 5.1), for Omniglot
    ``MLP(784, ways, hidden=(256, 128, 64, 64), norm="batch")`` (section 5.2). Weights start from the Xavier uniform
    distribution and biases from zero.

    Args:
        inputs: numbers in a sample; samples of more dimensions are flattened.
        outputs: outputs: the ways N of a task, or the dimensions of a regression target.
        hidden: the width of each hidden layer; none of them makes the network linear.
        norm: what hidden layers normalise by: "batch", "support", "group", "layer" or "none", see
            :data:`lightning_imaml.models.norm.Norm`.

    Shapes:
        ``[n, ...]`` with ``inputs`` numbers a sample to ``[n, outputs]``.
    """

    def __init__(self, inputs: int, outputs: int, hidden: Sequence[int] = (40, 40), norm: Norm = "none") -> None:
        super().__init__()
        widths = [inputs, *hidden, outputs]
        require(min(widths) >= 1, self, "inputs, outputs and hidden", "at least 1", widths, "A sinusoid has 1 and 1.")
        self.inputs = inputs
        layers: list[nn.Module] = [nn.Flatten()]
        for before, width in zip(widths[:-2], hidden, strict=True):
            layers += [nn.Linear(before, width), norm_layer(norm, width, images=False), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(widths[-2], outputs)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new initial weights."""
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, inputs: Tensor) -> Tensor:
        """Outputs ``[n, outputs]`` of samples ``[n, ...]``."""
        if inputs.shape[1:].numel() != self.inputs:
            raise ValueError(
                f"MLP: inputs must have {self.inputs} numbers a sample; found {list(inputs.shape)}. Give inputs to MLP."
            )
        outputs: Tensor = self.classifier(self.features(inputs))
        return outputs
