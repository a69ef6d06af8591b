"""Data modules that draw few-shot episodes."""

from lightning_imaml.data.episodic import EpisodicDataModule
from lightning_imaml.data.glyphs import GlyphDataModule
from lightning_imaml.data.labelled import ClassPool, LabelledTensors
from lightning_imaml.data.omniglot import OmniglotDataModule

__all__ = ["ClassPool", "EpisodicDataModule", "GlyphDataModule", "LabelledTensors", "OmniglotDataModule"]
