"""Random affine transforms of a batch: torchvision's answers, each image by numbers of its own."""

from __future__ import annotations

import re

import pytest
import torch
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as images_one_by_one

from lightning_imaml.data import Affine, RandomAffine, augmentation
from lightning_imaml.data.images.augmentation import affine

EVERYTHING = {"degrees": 20.0, "translate": (0.1, 0.2), "scale": (0.7, 1.3), "shear": 15.0}


def pictures(count: int = 6, height: int = 20, width: int = 28) -> torch.Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("size", [(28, 28), (20, 36)])
def test_each_image_is_moved_as_torchvision_moves_one(size):
    generator = torch.Generator().manual_seed(1)
    samples = pictures(6, *size)
    degrees, right, down, shear = (torch.rand(4, 6, generator=generator) - 0.5) * torch.tensor(
        [[60], [0.4], [0.4], [60]]
    )
    scale = 0.5 + torch.rand(6, generator=generator)
    height, width = size
    expected = [
        images_one_by_one.affine(
            sample, float(degrees[k]), [float(right[k]) * width, float(down[k]) * height], float(scale[k]),
            [float(shear[k]), 0.0], InterpolationMode.BILINEAR,
        )
        for k, sample in enumerate(samples)
    ]  # fmt: skip
    found = affine(samples, degrees, right, down, scale, shear)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=2e-5)


def test_equal_images_are_changed_differently():
    torch.manual_seed(0)
    samples = pictures(1).expand(8, -1, -1, -1)
    moved = RandomAffine(**EVERYTHING)(samples)
    assert moved.shape == samples.shape
    assert len({tuple(image.flatten().tolist()) for image in moved}) == 8


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_the_share_of_changed_images(p):
    torch.manual_seed(0)
    samples = pictures(1, 4, 4).expand(2000, -1, -1, -1)
    changed = (RandomAffine(**EVERYTHING, p=p)(samples) != samples).flatten(1).any(dim=1)
    assert float(changed.float().mean()) == pytest.approx(p, abs=0.04)


@pytest.mark.parametrize("name", EVERYTHING)
def test_the_numbers_stay_in_their_range(name, monkeypatch):
    """And what is left out has no effect."""
    seen = {}

    def note(images, *drawn):
        seen.update(zip(("degrees", "right", "down", "scale", "shear"), drawn, strict=True))
        return images

    monkeypatch.setattr(augmentation, "affine", note)
    torch.manual_seed(0)
    RandomAffine(**{name: EVERYTHING[name]})(pictures(1, 2, 2).expand(4000, -1, -1, -1))
    limits = {"degrees": (0, 0), "right": (0, 0), "down": (0, 0), "scale": (1, 1), "shear": (0, 0)}
    limits |= {
        "degrees": {"degrees": (-20, 20)}, "translate": {"right": (-0.1, 0.1), "down": (-0.2, 0.2)},
        "scale": {"scale": (0.7, 1.3)}, "shear": {"shear": (-15, 15)},
    }[name]  # fmt: skip
    for key, (low, high) in limits.items():
        spread = high - low
        assert low <= float(seen[key].min()) <= low + 0.01 * spread
        assert high - 0.01 * spread <= float(seen[key].max()) <= high


def test_a_seed_decides_and_other_dtypes_keep_theirs():
    transform = RandomAffine(**EVERYTHING, p=0.5)

    def run(samples):
        torch.manual_seed(3)
        return transform(samples)

    once = run(pictures())
    assert torch.equal(run(pictures()), once)
    assert run(pictures().double()).dtype == torch.float64
    torch.testing.assert_close(run(pictures().double()).float(), once, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [84, 224])
def test_images_of_16_bits_are_moved_as_precisely(dtype, size):
    """Their own grid would have less than one step a pixel."""
    samples = pictures(2, size, size).to(dtype)
    torch.testing.assert_close(RandomAffine()(samples), samples, rtol=1e-2, atol=1e-3)
    moves = torch.tensor([7.0, -12.0]), torch.tensor([0.1, 0.05]), torch.zeros(2), torch.ones(2), torch.zeros(2)
    found = affine(samples, *moves)
    assert found.dtype == dtype
    assert torch.equal(found, affine(samples.float(), *moves).to(dtype))


def test_no_images_stay_none():
    assert RandomAffine(10.0)(pictures()[:0]).shape == (0, 3, 20, 28)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"degrees": -1.0}, "degrees must be one angle from 0 to below 360 degrees; found -1.0. 0 leaves it out."),
        ({"degrees": (-10, 10)}, "degrees must be one angle"),
        ({"degrees": float("inf")}, "degrees must be one angle"),
        ({"translate": (0.1,)}, "translate must be two shares"),
        ({"translate": (-0.1, 0.0)}, "translate must be two shares"),
        ({"scale": (0.0, 1.0)}, "scale must be a positive factor"),
        ({"scale": (1.2, 0.8)}, "scale must be a positive factor"),
        ({"scale": None}, "scale must be a positive factor"),
        ({"shear": 90.0}, "shear must be one angle"),
        ({"p": 1.5}, "p must be a probability from 0 to 1; found 1.5"),
    ],
)
def test_arguments_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        RandomAffine(**settings)


@pytest.mark.parametrize("transform", [RandomAffine, Affine])
@pytest.mark.parametrize("samples", [torch.zeros(2, 5), torch.zeros(2, 1, 4, 4, dtype=torch.uint8)])
def test_other_samples_than_images_are_refused(samples, transform):
    with pytest.raises(ValueError, match=f"{transform.__name__}: samples must be images"):
        transform(10.0)(samples)


@pytest.mark.parametrize("mirror", [False, True])
def test_all_images_are_moved_alike(mirror):
    samples = pictures()
    before = torch.get_rng_state()
    found = Affine(20.0, (0.1, -0.2), 1.3, -15.0, mirror)(samples)
    expected = images_one_by_one.affine(
        samples, 20.0, [0.1 * 28, -0.2 * 20], 1.3, [-15.0, 0.0], InterpolationMode.BILINEAR
    )
    expected = images_one_by_one.hflip(expected) if mirror else expected
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)
    assert torch.equal(torch.get_rng_state(), before)
    assert Affine()(samples[:0]).shape == (0, 3, 20, 28)


def test_the_precision_is_that_of_the_images_and_at_least_32_bits():
    samples = pictures(2, 28, 28).double()
    torch.testing.assert_close(Affine(90, (0, 0), 1, 0)(samples), torch.rot90(samples, -1, (2, 3)))
    moved = Affine(7.0, (0.1, 0.05), 1.1, 12.0)
    assert torch.equal(moved(samples.half()), moved(samples.half().float()).half())


def test_a_mirrored_quarter_turn_mirrors_along_a_diagonal():
    samples = pictures(2, 28, 28)
    found = Affine(90.0, mirror=True)(samples), Affine(-90.0, mirror=True)(samples)
    torch.testing.assert_close(found[0], samples.mT, rtol=0, atol=1e-5)
    torch.testing.assert_close(found[1], samples.flip(-1, -2).mT, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"degrees": (-10, 10)}, "degrees must be one finite angle; found (-10, 10). 0 leaves it out."),
        ({"degrees": float("nan")}, "degrees must be one finite angle; found nan"),
        ({"translate": 0.1}, "translate must be two shares; found 0.1"),
        ({"scale": 0.0}, "scale must be one positive factor; found 0.0"),
        ({"scale": (0.8, 1.2)}, "scale must be one positive factor"),
        ({"scale": -1.0}, "scale must be one positive factor; found -1.0"),
        ({"shear": -90.0}, "shear must be one angle between -90 and 90 degrees; found -90.0"),
        ({"shear": 90.0}, "shear must be one angle between -90 and 90 degrees; found 90.0"),
    ],
)
def test_what_no_affine_transform_is_made_of_is_refused(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Affine(**settings)
