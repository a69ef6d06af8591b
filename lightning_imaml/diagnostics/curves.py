"""Draw training curves in panels, one for each kind of metric."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_imaml.components import metric_names as names
from lightning_imaml.runtime.phases import INNER_LOOP, LINEAR_SOLVE, META_STEP

Points = Mapping[str, Sequence[tuple[int, float]]]
"""Metric name to its (step, value) pairs in order."""


@dataclass(frozen=True)
class Panel:
    """A panel of the picture.

    Attributes:
        title: the title.
        unit: the label of the vertical axis.
        curves: metric name to the label of its curve.
        bands: metric name to the metric that holds the half-width of its 95 % interval.
        trusted: metric name to the metric that is 0 at its doubtful points, which are drawn hollow.
        logarithmic: whether the vertical axis is logarithmic.
        from_zero: whether the vertical axis begins at zero, so that heights compare.
    """

    title: str
    unit: str
    curves: Mapping[str, str]
    bands: Mapping[str, str] = field(default_factory=dict)
    trusted: Mapping[str, str] = field(default_factory=dict)
    logarithmic: bool = False
    from_zero: bool = False


def _of_validation(name: str) -> str:
    return names.VALIDATION + name


PANELS = (
    Panel("Loss on the query sets", "loss", {names.OUTER_LOSS: "training", _of_validation(names.LOSS): "validation"}),
    Panel(
        "Accuracy on the query sets",
        "accuracy",
        {
            names.ACCURACY_BEFORE: "training, before adaptation",
            names.ACCURACY: "training, after",
            _of_validation(names.EVALUATION_ACCURACY + names.BEFORE): "validation, before adaptation",
            _of_validation(names.EVALUATION_ACCURACY): "validation, after (95 %)",
        },
        {_of_validation(names.EVALUATION_ACCURACY): _of_validation(names.EVALUATION_ACCURACY + names.INTERVAL)},
    ),
    Panel(
        "Meta-gradient against the exact one",
        "relative error",
        {names.RELATIVE_ERROR: "‖g − g*‖ / ‖g*‖ (hollow: g* not converged)"},
        trusted={names.RELATIVE_ERROR: names.REFERENCE_CONVERGED},
        logarithmic=True,
    ),
    Panel(
        "Peak memory",
        "MiB",
        {
            names.peak_memory("step"): "whole step",
            names.peak_memory(META_STEP): "meta-step",
            names.peak_memory(INNER_LOOP): "inner loop",
            names.peak_memory(LINEAR_SOLVE): "linear solve",
        },
        from_zero=True,
    ),
)


def drawn_metrics() -> list[str]:
    """All metrics that some panel reads."""
    return [name for panel in PANELS for name in (*panel.curves, *panel.bands.values(), *panel.trusted.values())]


def draw(points: Points) -> Figure:
    """Draw the panels for which there are points, two in a row."""
    panels = [panel for panel in PANELS if any(points.get(name) for name in panel.curves)]
    # A bare Figure draws with Agg; pyplot would change global state: the open figures and the user's backend.
    columns = min(2, max(1, len(panels)))
    rows = max(1, -(-len(panels) // columns))
    figure = Figure(figsize=(5.0 * columns, 3.4 * rows), layout="constrained")
    for index, panel in enumerate(panels):
        _draw_panel(figure.add_subplot(rows, columns, index + 1), panel, points)
    return figure


def _draw_panel(axes: Axes, panel: Panel, points: Points) -> None:
    drawn: list[float] = []
    for name, label in panel.curves.items():
        curve = points.get(name)
        if not curve:
            continue
        steps, values = zip(*curve, strict=True)
        drawn.extend(values)
        # Markers show how few points there are.
        (line,) = axes.plot(steps, values, label=label, marker="o" if len(curve) < 30 else None, markersize=3)
        widths = dict(points.get(panel.bands.get(name, ""), ()))
        if widths:
            low, high = zip(*((v - widths.get(s, 0.0), v + widths.get(s, 0.0)) for s, v in curve), strict=True)
            axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
        doubtful = [s for s, value in points.get(panel.trusted.get(name, ""), ()) if not value]
        hollow = [(s, value) for s, value in curve if s in doubtful]
        if hollow:
            axes.plot(*zip(*hollow, strict=True), "o", color=line.get_color(), markerfacecolor="white", markersize=5)
    if panel.logarithmic and any(math.isfinite(value) and value > 0 for value in drawn):
        axes.set_yscale("log")
    if panel.from_zero:
        axes.set_ylim(bottom=0)
    axes.set(title=panel.title, xlabel="optimizer steps", ylabel=panel.unit)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def write_csv(points: Points, path: Path) -> None:
    """Write one row for each point: ``metric,step,value``."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("metric", "step", "value"))
        writer.writerows((name, step, value) for name, curve in points.items() for step, value in curve)
