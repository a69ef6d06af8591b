"""The EXIF orientation of a photograph is applied."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from lightning_imaml.data.images import Decoding, LazyImages, find_classes, load_images

# How a stored image is to be shown (EXIF 2.32, section 4.6.4): which side its first row and its first column are.
SHOWN = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.T,
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].T,
    8: lambda a: np.rot90(a),
}
STORED = np.arange(64, dtype=np.uint8).reshape(8, 8) * 3


def encoded(orientation, kind="PNG", array=STORED, **options):
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = BytesIO()
    Image.fromarray(array).save(buffer, kind, exif=exif, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("orientation", SHOWN)
def test_every_orientation(orientation):
    assert np.array_equal(Decoding(8, channels=1)(encoded(orientation))[0], SHOWN[orientation](STORED))


@pytest.mark.parametrize("kind", ["JPEG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", [3, 6])
def test_other_formats(kind, orientation):
    smooth = np.add.outer(np.arange(16) * 12, np.arange(16) * 3).astype(np.uint8)
    decoded = Decoding(16, channels=1)(encoded(orientation, kind, smooth))[0].astype(int)
    assert np.abs(decoded - SHOWN[orientation](smooth)).max() < 12


def test_a_tall_image_is_cropped_upright():
    """A phone stores a tall picture as a wide one: its middle is that of the tall one."""
    wide = np.zeros((8, 24), dtype=np.uint8)
    wide[:, 8:16] = 200
    assert (Decoding(8, channels=1, crop=True)(encoded(6, array=wide)) == 200).all()
    wide[2] = 90
    assert (Decoding(8, channels=1, crop=True)(encoded(6, array=wide))[0, :, 5] == 90).all()


@pytest.mark.parametrize("orientation", [0, 9, 400])
def test_what_is_no_orientation_changes_nothing(orientation):
    assert np.array_equal(Decoding(8, channels=1)(encoded(orientation))[0], STORED)


def test_damaged_exif_does_not_break_an_image(tmp_path):
    buffer = BytesIO()
    Image.fromarray(STORED).save(buffer, "PNG", exif=b"Exif\0\0no TIFF header")
    assert np.array_equal(Decoding(8, channels=1)(buffer.getvalue())[0], STORED)


def test_half_a_photograph_is_broken(tmp_path):
    data = encoded(6, "JPEG", np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8))
    with pytest.raises(OSError, match="truncated"):
        Decoding(8, channels=1)(data[: len(data) // 2])


def test_from_memory_and_from_disk(tmp_path):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "1.png").write_bytes(encoded(8))
    classes, decode = find_classes(tmp_path), Decoding(8, channels=1)
    pool = load_images(classes, decode, name="test", folders=[tmp_path / "cache"])
    assert np.array_equal(pool.source.tensors[0][0, 0].numpy(), SHOWN[8](STORED))
    assert np.allclose(LazyImages(classes, decode)[0][0][0].numpy() * 255, SHOWN[8](STORED))
