"""Affine transforms of a whole batch in one operation: by random numbers of each image, or all alike."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_imaml.components.checks import require


class RandomAffine(nn.Module):
    """Turn, shift, scale and shear images about their centre, each by random numbers of its own.

    The arguments are named as those of torchvision's ``RandomAffine``, which treats all images of a batch alike, and in
    :class:`PerSample` takes them one after the other, which is slow on a GPU. Shifts are not rounded to whole pixels,
    pixels between others are bilinear, those from outside are zero. The numbers are drawn on the CPU, and so are the
    same on every device.

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
        for name, angle, limit in (("degrees", degrees, 360), ("shear", shear, 90)):
            fits = _numbers(angle) and 0 <= angle < limit
            require(fits, self, name, f"one angle from 0 to below {limit} degrees", angle, "0 leaves it out.")
        fits = _numbers(translate, 2) and min(translate) >= 0
        require(fits, self, "translate", "two shares of zero or more", translate, "(0, 0) leaves it out.")
        fits = _numbers(scale, 2) and 0 < scale[0] <= scale[1]
        require(fits, self, "scale", "a positive factor and one no smaller", scale, "(1, 1) leaves it out.")
        require(_numbers(p) and 0 <= p <= 1, self, "p", "a probability from 0 to 1", p, "1 changes every image.")
        self.degrees, self.translate, self.scale, self.shear, self.p = degrees, translate, scale, shear, p

    def forward(self, samples: Tensor) -> Tensor:
        """``[n, C, H, W]`` to the same shape."""
        _require_images(self, samples)
        chosen, *drawn = torch.rand(6, len(samples), dtype=torch.float32).to(samples.device).unbind()
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


class Affine(nn.Module):
    """Turn, shift, scale and shear all images alike, about their centre: for ``class_transforms``.

    So a character that is slanted, or mirrored along a diagonal, is one more training class, as one turned by 90
    degrees is in Santoro et al. (2016, arXiv 1605.06065).

    Args:
        degrees: the angle, clockwise, whereas ``rotations`` turn anticlockwise.
        translate: the shifts to the right and down, as shares of the width and of the height.
        scale: the factor.
        shear: the angle of the shear along the width, in degrees; a positive one leans the top to the right.
        mirror: whether to mirror the images, left to right, after all this.

    Raises:
        ValueError: an argument is out of its range; in use, the samples are no images of floating-point numbers.
    """

    def __init__(
        self,
        degrees: float = 0.0,
        translate: tuple[float, float] = (0.0, 0.0),
        scale: float = 1.0,
        shear: float = 0.0,
        mirror: bool = False,
    ) -> None:
        super().__init__()
        require(_numbers(degrees), self, "degrees", "one finite angle", degrees, "0 leaves it out.")
        require(_numbers(translate, 2), self, "translate", "two shares", translate, "(0, 0) leaves it out.")
        require(_numbers(scale) and scale > 0, self, "scale", "one positive factor", scale, "1 leaves it out.")
        fits = _numbers(shear) and abs(shear) < 90
        require(fits, self, "shear", "one angle between -90 and 90 degrees", shear, "0 leaves it out.")
        self.degrees, self.translate, self.scale, self.shear, self.mirror = degrees, translate, scale, shear, mirror

    def forward(self, samples: Tensor) -> Tensor:
        """``[n, C, H, W]`` to the same shape."""
        _require_images(self, samples)
        precise = torch.promote_types(samples.dtype, torch.float32)
        numbers = torch.tensor(
            [self.degrees, *self.translate, self.scale, self.shear], dtype=precise, device=samples.device
        )
        moved = affine(samples, *numbers.view(5, 1).expand(5, len(samples)))
        return moved.flip(-1) if self.mirror else moved


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
    if not images.numel():
        return images
    height, width = images.shape[-2:]
    turn, slope = torch.deg2rad(degrees), torch.tan(torch.deg2rad(shear))
    cos, sin = torch.cos(turn), torch.sin(turn)
    # Where a pixel comes from: the inverse of scale · rotation · shear, x ↦ x − y tan(shear), in pixels.
    inverse = torch.stack([cos - slope * sin, sin + slope * cos, -sin, cos], dim=-1).view(-1, 2, 2)
    inverse = inverse / scale.view(-1, 1, 1)
    # affine_grid's coordinates run from −1 to 1 over either side.
    sides = degrees.new_tensor([width, height]) / 2
    shift = torch.stack([right * width, down * height], dim=-1).unsqueeze(-1)
    matrix = torch.cat([inverse * sides, -(inverse @ shift)], dim=-1) / sides.unsqueeze(-1)
    # A grid of 16 bits would be off by a part of a pixel, or more, and miss the image altogether.
    pixels = images.to(torch.promote_types(images.dtype, torch.float32))
    grid = F.affine_grid(matrix.to(pixels.dtype), list(images.shape), align_corners=False)
    return F.grid_sample(pixels, grid, mode="bilinear", padding_mode="zeros", align_corners=False).to(images.dtype)


def _require_images(transform: nn.Module, samples: Tensor) -> None:
    if samples.ndim != 4 or not samples.is_floating_point():
        raise ValueError(
            f"{type(transform).__name__}: samples must be images [n, C, H, W] of floating-point numbers; found "
            f"{list(samples.shape)} of {samples.dtype}. Convert them before, as data modules do with bytes."
        )


def _numbers(value: object, count: int | None = None) -> bool:
    """Whether this is a finite number, or so many of them."""
    if count is None:
        return isinstance(value, int | float) and math.isfinite(value)
    return isinstance(value, tuple | list) and len(value) == count and all(map(_numbers, value))
