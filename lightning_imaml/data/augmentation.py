"""Random augmentation of a whole batch in one operation, each sample by random numbers of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class RandomAffine(nn.Module):
    """Turn, shift, scale and shear images about their centre, each by random numbers of its own.

    The arguments are those of torchvision's ``RandomAffine``, which treats all images of a batch alike; in
    :class:`PerSample` that takes the images one after the other, which is slow on a GPU. Pixels between others are
    bilinear, those from outside are zero. The numbers are drawn on the CPU, so they are the same on every device.

    Args:
        degrees: the largest angle, to either side.
        translate: the largest shifts to either side, as shares of the width and of the height.
        scale: the smallest and the largest factor.
        shear: the largest angle of the shear along the width, in degrees, to either side.
        p: the probability that an image is changed at all.

    Raises:
        ValueError: an argument is out of its range; in use, the samples are no images of floating-point numbers.
    """

    def __init__(
        self,
        degrees: float = 0.0,
        translate: tuple[float, float] = (0.0, 0.0),
        scale: tuple[float, float] = (1.0, 1.0),
        shear: float = 0.0,
        p: float = 1.0,
    ) -> None:
        super().__init__()
        _require("degrees", degrees, degrees >= 0, "zero or a positive angle")
        _require("translate", translate, _pair(translate) and min(translate) >= 0, "two shares of zero or more")
        _require("scale", scale, _pair(scale) and 0 < scale[0] <= scale[1], "a positive factor and a larger one")
        _require("shear", shear, 0 <= shear < 90, "an angle from 0 to below 90 degrees")
        _require("p", p, 0 <= p <= 1, "a probability from 0 to 1")
        self.degrees, self.translate, self.scale, self.shear, self.p = degrees, translate, scale, shear, p

    def forward(self, samples: Tensor) -> Tensor:
        """``[n, C, H, W]`` to the same shape."""
        if samples.ndim != 4 or not samples.is_floating_point():
            raise ValueError(
                f"RandomAffine: samples must be images [n, C, H, W] of floating-point numbers; found "
                f"{list(samples.shape)} of {samples.dtype}. Convert them before, as data modules do with bytes."
            )
        chosen, *drawn = torch.rand(6, len(samples)).to(samples.device).unbind()
        angle, right, down, size, slant = drawn
        low, high = self.scale
        moved = affine(
            samples,
            (2 * angle - 1) * self.degrees,
            (2 * right - 1) * self.translate[0],
            (2 * down - 1) * self.translate[1],
            low + size * (high - low),
            (2 * slant - 1) * self.shear,
        )
        return torch.where((chosen < self.p).view(-1, 1, 1, 1), moved, samples)


def affine(images: Tensor, degrees: Tensor, right: Tensor, down: Tensor, scale: Tensor, shear: Tensor) -> Tensor:
    """Turn, shift, scale and shear images about their centres, clockwise as torchvision's ``affine`` does.

    Args:
        images: ``[n, C, H, W]``.
        degrees: angles, ``[n]`` like all that follow.
        right: shifts as shares of the width.
        down: shifts as shares of the height.
        scale: factors.
        shear: angles of the shear along the width, in degrees.

    Returns:
        ``[n, C, H, W]``, bilinear and zero outside.
    """
    height, width = images.shape[-2:]
    turn, slope = torch.deg2rad(degrees), torch.tan(torch.deg2rad(shear))
    cos, sin = torch.cos(turn), torch.sin(turn)
    # Where a pixel comes from: the inverse of scale · rotation · shear, x ↦ x − y tan(shear), in pixels.
    inverse = torch.stack([cos - slope * sin, sin + slope * cos, -sin, cos], dim=-1).view(-1, 2, 2)
    inverse = inverse / scale.view(-1, 1, 1)
    # affine_grid's coordinates run from −1 to 1 over either side.
    sides = images.new_tensor([width, height]) / 2
    shift = torch.stack([right * width, down * height], dim=-1).unsqueeze(-1)
    matrix = torch.cat([inverse * sides, -(inverse @ shift)], dim=-1) / sides.unsqueeze(-1)
    grid = F.affine_grid(matrix.to(images.dtype), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _pair(value: Sequence[float]) -> bool:
    return isinstance(value, tuple | list) and len(value) == 2


def _require(name: str, value: object, holds: bool, requirement: str) -> None:
    if not holds:
        raise ValueError(f"RandomAffine: {name} must be {requirement}; found {value!r}. Leave it out for no effect.")
