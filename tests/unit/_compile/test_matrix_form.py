"""Convolutions as matrix products, against PyTorch's own."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_imaml._compile.matrix_form import MatrixForm


@pytest.mark.parametrize("stride", [1, 2, 3, (2, 1)])
@pytest.mark.parametrize("padding", [0, 1, (2, 0)])
def test_convolution_in_matrix_form(stride, padding):
    torch.manual_seed(0)
    for dilation, kernel, height in itertools.product((1, 2), ((1, 1), (3, 3), (3, 2)), (7, 8)):
        images = torch.randn(2, 3, height, 9, dtype=torch.float64, requires_grad=True)
        weight = torch.randn(4, 3, *kernel, dtype=torch.float64, requires_grad=True)
        bias = torch.randn(4, dtype=torch.float64)
        outcomes = []
        for mode in (None, MatrixForm()):
            if mode is None:
                output = F.conv2d(images, weight, bias, stride, padding, dilation)
            else:
                with mode:
                    output = F.conv2d(images, weight, bias, stride, padding, dilation)
            outcomes.append((output, *torch.autograd.grad(output.square().sum(), (images, weight))))
        for expected, found in zip(*outcomes, strict=True):
            torch.testing.assert_close(found, expected)


def test_layers_that_have_no_matrix_form_stay_as_they_are():
    images = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    norm = nn.BatchNorm2d(4, track_running_stats=False, affine=False).double()
    tracking = nn.BatchNorm2d(4).double().eval()
    same_size = nn.Conv2d(4, 4, 3, padding="same").double()
    grouped = nn.Conv2d(4, 4, 3, groups=2, bias=False).double()
    for layer in (norm, tracking, same_size, grouped, nn.BatchNorm2d(4, track_running_stats=False).double()):
        expected = layer(images)
        with MatrixForm():
            torch.testing.assert_close(layer(images), expected)
