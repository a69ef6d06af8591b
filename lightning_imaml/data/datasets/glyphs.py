"""Few-shot recognition of printed letters, without a download."""

from __future__ import annotations

import hashlib
import os
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import PIL
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from lightning_imaml.data.episodic import EpisodicDataModule
from lightning_imaml.data.images.cache import Arrays, cached_arrays, default_cache_dir
from lightning_imaml.data.labelled import ClassPool, LabelledTensors
from lightning_imaml.data.sampling import Range

# The Unicode text faces among matplotlib's fonts. Its Computer Modern files put symbols at the codes of letters.
FACES = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-BoldOblique",
    "DejaVuSans-Oblique",
    "DejaVuSansMono",
    "DejaVuSansMono-Bold",
    "DejaVuSansMono-BoldOblique",
    "DejaVuSansMono-Oblique",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSerif-BoldItalic",
    "DejaVuSerif-Italic",
    "STIXGeneral",
    "STIXGeneralBol",
    "STIXGeneralBolIta",
    "STIXGeneralItalic",
)
MIN_FACES = 12  # a letter in fewer distinct faces is left out
SIZE = 28  # pixels, the side of a picture
_SCALE = 4  # letters are drawn this many times larger, then averaged down: no dependence on small-size hinting
_EM = 24  # pixels; one size for all letters, so that o and O stay different
_BOX = 26  # pixels; a larger letter is shrunk to it
_VERSION = 1  # of the rendering: change it together with what decides the pixels, so that old caches are not used


class GlyphDataModule(EpisodicDataModule):
    """Letters as classes and typefaces as their instances, drawn with the fonts that matplotlib brings.

    About 1,350 letters of the Latin, Greek, Cyrillic, Armenian and other alphabets, each in 12 to 16 faces of DejaVu
    and STIX, as ``[1, 28, 28]`` pictures with ink 1 and paper 0. Drawn in seconds at the first use, then cached. The
    letters are split into training, validation and test classes in a fixed random order. Letters that some face draws
    pixel for pixel alike (Latin A, Greek Alpha, Cyrillic A) count once: the first by code point stays.

    Example:
        >>> data = GlyphDataModule(ways=5, shots=1, queries=4, tasks_per_batch=2)
        >>> next(iter(data.train_dataloader())).query_inputs.shape
        torch.Size([2, 20, 1, 28, 28])

    Args:
        queries: query images a class, Q, in training; a letter has 12 to 16 images.
        cache_dir: where the pictures are kept; None for ``$XDG_CACHE_HOME/lightning_imaml`` or
            ``~/.cache/lightning_imaml``.
        **options: those of :class:`EpisodicDataModule`, apart from the datasets.

    Raises:
        ValueError: as for :class:`EpisodicDataModule`.
    """

    def __init__(
        self,
        *,
        queries: Range = 5,
        cache_dir: str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> None:
        # A plain string: hyperparameters go into checkpoints, which load only plain types by default.
        cache_dir = None if cache_dir is None else os.fspath(cache_dir)
        super().__init__(None, None, None, queries=queries, **options)

    def configure_splits(self) -> Mapping[str, ClassPool]:
        """Draw the letters, or read them from the cache, and split them."""
        folder = self.hparams["cache_dir"]
        letters = load_glyphs(Path(folder).expanduser() if folder else default_cache_dir())
        return self.split_by_class(ClassPool.of(letters))


def load_glyphs(cache_dir: Path) -> LabelledTensors:
    """All letters in all their faces, from the cache or drawn anew.

    Returns:
        Images ``[n, 1, 28, 28]``, labelled with the letter.
    """
    paths = [Path(matplotlib.get_data_path(), "fonts", "ttf", f"{face}.ttf") for face in FACES]
    key = hashlib.sha256(f"{_VERSION} {MIN_FACES} {SIZE} {_SCALE} {_EM} {_BOX} {PIL.__version__}".encode())
    for path in paths:
        key.update(path.read_bytes())
    arrays = cached_arrays(f"glyphs-{key.hexdigest()[:16]}", [cache_dir], lambda: render_letters(paths))
    letters = [chr(code) for code in arrays["codes"]]
    return LabelledTensors(torch.from_numpy(arrays["images"]), torch.from_numpy(arrays["labels"]), letters)


def render_letters(paths: Sequence[Path]) -> Arrays:
    """Draw every letter that enough of the faces have, leaving out pictures and letters that are not distinct.

    Returns:
        "images" ``[n, 1, 28, 28]`` ``uint8``, "labels" ``[n]``, and "codes", the code point of each label.
    """
    from fontTools.ttLib import TTFont  # Here, as it is needed only where no cache has the letters.

    fonts = [ImageFont.truetype(str(path), _EM * _SCALE, layout_engine=ImageFont.Layout.BASIC) for path in paths]
    faces: dict[int, list[ImageFont.FreeTypeFont]] = {}
    for path, font in zip(paths, fonts, strict=True):
        with TTFont(path, lazy=True) as tables:
            for code in tables.getBestCmap():
                if unicodedata.category(chr(code)).startswith("L"):
                    faces.setdefault(code, []).append(font)
    seen: set[bytes] = set()
    images: list[NDArray[np.uint8]] = []
    labels: list[int] = []
    codes: list[int] = []
    for code in sorted(code for code, having in faces.items() if len(having) >= MIN_FACES):
        drawn = (render(chr(code), font) for font in faces[code])
        pictures = {picture.tobytes(): picture for picture in drawn if picture.any()}
        # One picture must not stand for two classes, let alone in two splits.
        if len(pictures) < MIN_FACES or not seen.isdisjoint(pictures):
            continue
        seen.update(pictures)
        images.extend(pictures.values())
        labels.extend([len(codes)] * len(pictures))
        codes.append(code)
    return {"images": np.stack(images)[:, None], "labels": np.asarray(labels), "codes": np.asarray(codes)}


def render(letter: str, font: ImageFont.FreeTypeFont) -> NDArray[np.uint8]:
    """Draw one letter, its ink centred.

    Returns:
        ``[28, 28]``, ink 255; all zero for a letter without ink.
    """
    left, top, right, bottom = (round(edge) for edge in font.getbbox(letter))
    ink = Image.new("L", (max(1, right - left), max(1, bottom - top)))
    ImageDraw.Draw(ink).text((-left, -top), letter, fill=255, font=font)
    edges = ink.getbbox()  # tighter than the font's, which counts the space up to the next letter
    if edges is None:
        return np.zeros((SIZE, SIZE), dtype=np.uint8)
    ink = ink.crop(edges)
    shrink = _BOX * _SCALE / max(ink.size)
    if shrink < 1:
        ink = ink.resize((max(1, round(ink.width * shrink)), max(1, round(ink.height * shrink))), Image.Resampling.BOX)
    side = SIZE * _SCALE
    picture = Image.new("L", (side, side))
    picture.paste(ink, ((side - ink.width) // 2, (side - ink.height) // 2))
    return np.array(picture.reduce(_SCALE), dtype=np.uint8)
