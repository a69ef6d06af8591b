"""The old place of :mod:`lightning_imaml.runtime.memory`, kept for one release."""

from lightning_imaml.runtime.memory import keep_freed_memory

__all__ = ["keep_freed_memory"]
