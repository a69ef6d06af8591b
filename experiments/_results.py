"""The rows, tables, learning curves and model cards of ``reproduce.py``, drawn from files alone."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from _tables import Row, save
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

PUBLISHED = Path(__file__).resolve().parent.parent / "docs" / "results" / "published.csv"
_SAME_MODEL = ("table", "dataset", "method", "ways", "shots", "seed", "protocol", "meta_steps")
METHODS = {
    "imaml_gd": "iMAML, gradient descent",
    "imaml_hf": "iMAML, Hessian-free",
    "maml": "MAML",
    "fomaml": "first-order MAML",
    "reptile": "Reptile",
}
DATASETS = {2: "omniglot", 3: "mini_imagenet"}
_TITLES = {"omniglot": "Omniglot", "mini_imagenet": "mini-ImageNet"}
_TICKS = (20, 40, 60, 70, 80, 85, 90, 92, 94, 95, 96, 97, 98, 98.5, 99, 99.5, 100)  # %
_INTRODUCTION = """\
# Tables 2 and 3

Written by `experiments/reproduce.py` from [results.csv](results.csv) and [published.csv](published.csv), which names
its sources: the paper's Table 2 was read in a public transcription of it, Table 3 as other papers quote it, and iMAML
with gradient descent on mini-ImageNet is left out, since no source for it was at hand. Accuracies in per cent. "Here"
is the newest row of a method and setting, and one with the λ and inner steps of the paper has a line of its own; all
rows are listed below."""
_DIFFERENCES = """\
## Protocol: what differs

- **Classes.** Omniglot's 1,623 characters are split once into 1,200 for training, 100 for validation and 323 for test;
  settings and checkpoints are chosen on the validation characters. In the code that the iMAML authors released, 310 of
  the 423 test characters are in the training split.
- **Training.** Budgets are minutes: each row has its meta-steps. λ, inner steps and inner rate are those of the row's
  configurations, which its protocol names; the paper has λ = 2, and 16 (5-way) or 25 (20-way) gradient steps.
- **Curvature.** The configurations of iMAML have the Gauss-Newton product in the place of the paper's Hessian, which is
  often indefinite here (docs/experiments).
- **Queries.** BatchNorm uses the statistics of the batch, as in the papers: fewer queries a class are easier. Each row
  names its own.
- **Intervals.** ± here is the 95 % interval of the mean over test tasks. What others print after ± is theirs.
- **mini-ImageNet** has 600 images a class. A row's protocol says how many its training had.
"""


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file; none where there is no file."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def add_row(row: Row, path: Path) -> None:
    """Append a row; it takes the place of an earlier test of the same model, after the same meta-steps."""
    same = {name: str(row[name]) for name in _SAME_MODEL}
    earlier = [old for old in read(path) if any(old[name] != value for name, value in same.items())]
    save([*earlier, row], path)


def _cell(row: dict[str, str] | None) -> str:
    """An accuracy of ours, with two digits; one of others, which no digit is added to or taken from."""
    if row is None:
        return "–"
    accuracy, interval = (
        (row["accuracy"], row["interval95"])
        if "code" in row
        else (f"{float(row['accuracy']):.2f}", f"{float(row['interval95']):.2f}")
    )
    return f"{accuracy} ± {interval}" if interval else accuracy


def _settings(rows: Iterable[dict[str, str]]) -> list[tuple[int, int]]:
    return sorted({(int(row["ways"]), int(row["shots"])) for row in rows})


def _line(cells: Iterable[object]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def _comparison(measured: list[dict[str, str]], published: list[dict[str, str]]) -> list[str]:
    """The numbers of each method and setting: of own rows the newest, and the newest with the paper's λ and steps."""
    settings = _settings([*measured, *published])
    lines = [_line(["method", "", *(f"{ways}-way {shots}-shot" for ways, shots in settings)])]
    lines.append(_line(["---"] * (2 + len(settings))))
    # The differences of configs/paper are called paper_...; the last name of a protocol is that of its difference.
    of_paper = [row for row in measured if row["protocol"].rpartition(" + ")[2].startswith("paper_")]
    others = [row for row in measured if row not in of_paper]
    sources = {"here": others, "here, the paper's λ and steps": of_paper, "published": published}
    for (method, title), (where, rows) in itertools.product(METHODS.items(), sources.items()):
        newest = {(int(row["ways"]), int(row["shots"])): row for row in rows if row["method"] == method}
        if newest or where in ("here", "published"):
            lines.append(_line([title, where, *(_cell(newest.get(setting)) for setting in settings)]))
    return lines


def tables(measured: list[dict[str, str]], published: list[dict[str, str]]) -> str:
    """The tables as markdown, from the rows of ``results.csv`` and of ``published.csv``."""
    lines = [_INTRODUCTION]
    for table, dataset in sorted({(row["table"], row["dataset"]) for row in measured + published}):
        own, others = ([row for row in rows if row["dataset"] == dataset] for rows in (measured, published))
        papers = [row for row in others if row["code"] == "paper"]
        lines += ["", f"## Table {table}: {_TITLES.get(dataset, dataset)}", "", *_comparison(own, papers)]
        again = [row for row in others if row["code"] != "paper"]
        if again:
            lines += ["", "Re-implementations, 5-way 1-shot:", "", _line(["code", "accuracy", "protocol", "source"])]
            lines += [_line(["---"] * 4)]
            lines += [_line([row["code"], _cell(row), row["protocol"], row["source"]]) for row in again]
        if own:
            shown = ("method", "ways", "shots", "tasks", "meta_steps", "minutes", "cores", "seed", "commit", "protocol")
            lines += ["", "All rows:", "", _line(["accuracy", *shown]), _line(["---"] * (1 + len(shown)))]
            lines += [_line([_cell(row), *(row[name] for name in shown)]) for row in own]
    return "\n".join([*lines, "", _DIFFERENCES])


def draw(curves: list[list[dict[str, str]]]) -> Figure:
    """Validation accuracy against meta-steps and minutes: a row of panels a setting, a line a run."""
    settings = sorted({(curve[0]["dataset"], int(curve[0]["ways"]), int(curve[0]["shots"])) for curve in curves})
    figure = Figure(figsize=(14, 3.6 * len(settings)), layout="constrained")
    panels = figure.subplots(len(settings), 2, squeeze=False, sharey="row")
    for (dataset, ways, shots), (left, right) in zip(settings, panels, strict=True):
        drawn: list[str] = []
        for curve in curves:
            run = curve[0]
            if (run["dataset"], int(run["ways"]), int(run["shots"])) != (dataset, ways, shots):
                continue
            label = METHODS.get(run["method"], run["method"]) + (f" ({run['variant']})" if run["variant"] else "")
            label += f", seed {run['seed']}" if run["seed"] != "0" else ""
            means, widths = ([float(point[key]) for point in curve] for key in ("accuracy", "interval95"))
            colour = f"C{list(METHODS).index(run['method'])}" if run["method"] in METHODS else None
            style = ("-", "--", ":", "-.")[drawn.count(run["method"]) % 4]
            drawn.append(run["method"])
            for axes, key in ((left, "meta_steps"), (right, "minutes")):
                where = [float(point[key]) for point in curve]
                (line,) = axes.plot(where, means, style, color=colour, marker="o", markersize=3, label=label)
                low, high = zip(*((m - w, m + w) for m, w in zip(means, widths, strict=True)), strict=True)
                axes.fill_between(where, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        title = f"{_TITLES.get(dataset, dataset)}, {ways}-way {shots}-shot"
        left.set(title=title, xlabel="meta-steps", ylabel="validation accuracy (%, 95 %)")
        right.set(title=title, xlabel="minutes of training")
        right.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
        if max(float(y) for line in left.lines for y in line.get_ydata()) > 90:  # Below, a plain scale is as clear.
            _near_100(left)
        for axes in (left, right):
            axes.grid(alpha=0.3)
    return figure


def _near_100(axes: Axes) -> None:
    """Accuracies on the scale of their errors' logarithms, so that 98 and 99 % are apart beside 60 %."""
    # Half a per cent is added to the errors: 100 % has its place, and intervals that reach above it are cut at 100.4.
    axes.set_yscale("function", functions=(lambda y: -np.log(np.maximum(100.5 - y, 0.1)), lambda s: 100.5 - np.exp(-s)))
    axes.yaxis.set_major_locator(FixedLocator(_TICKS))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())


def redraw(output: Path) -> None:
    """Write ``tables.md`` and ``learning_curves.png`` from the files in a folder of results."""
    (output / "tables.md").write_text(tables(read(output / "results.csv"), read(PUBLISHED)))
    files = (path for path in sorted((output / "curves").glob("*.csv")) if not path.stem.endswith("_training"))
    curves = [curve for curve in map(read, files) if curve]
    if curves:
        draw(curves).savefig(output / "learning_curves.png", dpi=120)


def model_card(row: Row, weights: Path, command: str) -> str:
    """The card of published weights."""
    dataset = _TITLES.get(str(row["dataset"]), row["dataset"])
    return f"""\
# {weights.stem}

{METHODS.get(str(row["method"]), row["method"])} on {dataset}, {row["ways"]}-way {row["shots"]}-shot:
an initialisation that adapts to a task of {row["ways"]} classes from {row["shots"]} image(s) of each.

| | |
| --- | --- |
| test accuracy | {row["accuracy"]:.2f} ± {row["interval95"]:.2f} % over {row["tasks"]} tasks (95 % interval) |
| protocol | {row["protocol"]} |
| training | {row["meta_steps"]} meta-steps, {row["minutes"]:.0f} minutes, seed {row["seed"]} |
| tested by | commit {row["commit"]}, torch {row["torch"]}, {row["cores"]} core(s) |
| file | {weights.stat().st_size:,} bytes; weights and settings only, loads with `weights_only=True` |

The number again, from the root of the repository:

```console
{command}
```

- **Chosen** on the validation classes, as the best of its training there.
- **Meant for** checking this number, and as a start for few-shot recognition of pictures of the same kind. The
  classifier's outputs mean nothing before adaptation.
- **Not for** other kinds of pictures, or for queries one at a time: BatchNorm uses the statistics of the batch, so a
  prediction depends on the other queries.
- **Data**: {dataset}, under its own terms; none of it is in the file.
- **Licence**: that of this repository.
"""
