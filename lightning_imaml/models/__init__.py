"""Backbones of the few-shot papers."""

from lightning_imaml.models.checkpointed import Checkpointed
from lightning_imaml.models.conv4 import Conv4
from lightning_imaml.models.mlp import MLP
from lightning_imaml.models.norm import Norm, norm_layer, use_batch_statistics
from lightning_imaml.models.resnet12 import ResNet12
from lightning_imaml.models.wide_resnet import WideResNet

__all__ = ["MLP", "Checkpointed", "Conv4", "Norm", "ResNet12", "WideResNet", "norm_layer", "use_batch_statistics"]
