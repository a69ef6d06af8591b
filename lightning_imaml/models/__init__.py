"""Backbones of the few-shot papers."""

from lightning_imaml.models.adapters import LowRankAdapter, add_low_rank_adapters
from lightning_imaml.models.checkpointed import Checkpointed
from lightning_imaml.models.conv4 import Conv4
from lightning_imaml.models.mlp import MLP
from lightning_imaml.models.norm import Norm, SupportNorm, norm_layer, use_batch_statistics, use_support_statistics
from lightning_imaml.models.resnet12 import ResNet12
from lightning_imaml.models.wide_resnet import WideResNet

__all__ = [
    "MLP",
    "Checkpointed",
    "Conv4",
    "LowRankAdapter",
    "Norm",
    "ResNet12",
    "SupportNorm",
    "WideResNet",
    "add_low_rank_adapters",
    "norm_layer",
    "use_batch_statistics",
    "use_support_statistics",
]
