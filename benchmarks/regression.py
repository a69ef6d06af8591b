"""Speed against recorded ratios: how many times as fast as the other sides of the same run.

Times differ from machine to machine; ratios of sides that took turns in one process differ less. A ratio is that to the
fastest other side, such as the plain loop, among those that both tables have.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

OURS = ("lightning_imaml", "compiled")
Key = tuple[str, str, str]  # Workload, gradient, side.


def milliseconds(rows: Sequence[Mapping[str, object]]) -> dict[Key, float]:
    """The times of a table of ``python -m benchmarks``."""
    return {(str(r["workload"]), str(r["gradient"]), str(r["side"])): float(str(r["ms_a_task"])) for r in rows}


def read(path: Path) -> dict[Key, float]:
    """The times of a recorded table."""
    with path.open(newline="") as file:
        return milliseconds(list(csv.DictReader(file)))


def ratios(run: Mapping[Key, float], recorded: Mapping[Key, float]) -> dict[Key, tuple[float, float]]:
    """This run's and the recorded ratio of each of our sides that both tables have."""
    both = run.keys() & recorded.keys()
    found = {}
    for workload, gradient, side in sorted(both):
        peers = [key for key in both if key[:2] == (workload, gradient) and key[2] not in OURS]
        if side in OURS and peers:
            key = (workload, gradient, side)
            now, then = (min(times[peer] for peer in peers) / times[key] for times in (run, recorded))
            found[key] = now, then
    return found


def check(run: Mapping[Key, float], recorded: Mapping[Key, float], tolerance: float) -> None:
    """Print the ratios.

    Raises:
        SystemExit: with status 1, where a ratio is below ``(1 - tolerance)`` times the recorded one, or where tables
            have no workload with a side of ours and another one in common.
    """
    found = ratios(run, recorded)
    if not found:
        raise SystemExit("nothing to compare: no workload has a side of ours and another one both now and recorded")
    worse = []
    for (workload, gradient, side), (now, then) in found.items():
        slow = now < (1 - tolerance) * then
        line = f"{workload}, {gradient}, {side}: {now:.2f} times as fast as the fastest other side, recorded {then:.2f}"
        print(line + (" - WORSE" if slow else ""))
        worse += [line] * slow
    if worse:
        raise SystemExit(f"{len(worse)} of {len(found)} ratios are more than {tolerance:.0%} below the recorded ones")
