"""Images: files found and decoded, kept between runs, and transformed a batch at a time."""

from lightning_imaml.data.images.decoding import Decoding, LazyImages, OnBroken, load_images, read_image
from lightning_imaml.data.images.files import Classes, ImageFile, find_classes, find_place, ignored_files, image_names

__all__ = [
    "Classes",
    "Decoding",
    "ImageFile",
    "LazyImages",
    "OnBroken",
    "find_classes",
    "find_place",
    "ignored_files",
    "image_names",
    "load_images",
    "read_image",
]
