"""Meta-learning with implicit gradients (iMAML) for PyTorch Lightning."""

from lightning_imaml._version import __version__
from lightning_imaml.episodes import Episode
from lightning_imaml.module import IMAMLModule

__all__ = ["Episode", "IMAMLModule", "__version__"]
