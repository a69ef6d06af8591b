"""Which tasks are drawn, and in which order and batches they come."""

from lightning_imaml.data.sampling.tasks import (
    SPLITS,
    DrawnTasks,
    ImageTasks,
    Range,
    Shape,
    ShapeSource,
    TaskSource,
    bounds,
    draw_distinct,
    random_of,
)

__all__ = [
    "SPLITS",
    "DrawnTasks",
    "ImageTasks",
    "Range",
    "Shape",
    "ShapeSource",
    "TaskSource",
    "bounds",
    "draw_distinct",
    "random_of",
]
