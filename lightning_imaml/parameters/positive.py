"""Positive numbers for the entries of a row: one for all, one for each group of parameters, or one for each entry."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_imaml.components.checks import require
from lightning_imaml.parameters.layout import Layout
from lightning_imaml.parameters.names import matches, require_matches
from lightning_imaml.parameters.rows import Rows

Value = float | Mapping[str, float]
"""A positive number, or one for each pattern over parameter names; the first pattern that matches a name counts."""
Granularity = Literal["layer", "parameter"]
"""Each layer has a learned value of its own, or each single entry of the parameters has."""
Bounds = tuple[float, float]


@dataclass(frozen=True)
class Positive:
    r"""Positive numbers, fixed or learned, that know which entries of a row they belong to.

    The learned parameter is the logarithm, ``log_<name>``, which keeps the number positive. With bounds (a, b) it is
    ``logit_<name>``, s in a (b/a)^σ(s), which keeps the number between them and has a gradient everywhere.

    Attributes:
        name: what the numbers are.
        layout: the parameters of a row; None where one number serves all.
        start: the first value of each group.
        groups: which group each parameter belongs to.
        learned: whether they are learned.
        every_entry: whether each entry has a learned value of its own.
        bounds: the lowest and the highest value.
    """

    name: str
    layout: Layout | None
    start: tuple[float, ...]
    groups: tuple[int, ...]
    learned: bool = False
    every_entry: bool = False
    bounds: Bounds | None = None

    @property
    def leaf(self) -> str:
        """The name of the learned parameter."""
        return f"{'logit' if self.bounds else 'log'}_{self.name}"

    def init(self, model: Rows) -> dict[str, Tensor]:
        """The learned parameter's first value: a scalar, one for each group ``[groups]``, or for each entry ``[D]``."""
        if not self.learned:
            return {}
        raw = torch.tensor([self._raw(value) for value in self.start], dtype=model.dtype, device=model.device)
        if self.every_entry:
            # Clone: an optimizer writes to it, and must not meet a view of a few numbers. The order is the network's.
            return {self.leaf: self._spread(raw).clone()}
        return {self.leaf: raw if len(self.start) > 1 else raw[0]}

    def values(self, learned: Mapping[str, Tensor], like: Tensor) -> Tensor | float:
        """The numbers themselves: one for all, or ``[D]`` with the dtype and device of ``like``."""
        if not self.learned:
            # These tensors are made on the device: a list of numbers would be copied there in every step.
            return self.start[0] if len(self.start) == 1 else self._spread([like.new_full((), v) for v in self.start])
        raw = learned[self.leaf]
        positive = raw.exp() if self.bounds is None else self._between(raw, *self.bounds)
        if self.every_entry and self.layout is not None:
            return self.layout.row_order(positive)
        return positive if len(self.start) == 1 else self._spread(positive)

    def _spread(self, values: Tensor | Sequence[Tensor]) -> Tensor:
        """Expand one number for each group to one for each entry, ``[D]``."""
        assert self.layout is not None
        sizes = zip(self.groups, self.layout.sizes, strict=True)
        return torch.cat([values[group].expand(size) for group, size in sizes])

    def _raw(self, value: float) -> float:
        if self.bounds is None:
            return math.log(value)
        low, high = self.bounds
        share = math.log(value / low) / math.log(high / low)
        return math.log(share / (1 - share))

    @staticmethod
    def _between(raw: Tensor, low: float, high: float) -> Tensor:
        return low * (math.log(high / low) * raw.sigmoid()).exp()


def require_positive(
    owner: object, name: str, value: Value, learned: bool, per: Granularity | None, bounds: Bounds | None, remedy: str
) -> None:
    """Raise a ValueError unless an argument is positive and ``learned``, ``per`` and ``bounds`` fit it.

    Args:
        owner: the object whose argument this is.
        name: the argument's name.
        value: what was given for it.
        learned: whether it is learned.
        per: what has a learned value of its own.
        bounds: the lowest and the highest learned value.
        remedy: what to do where the value is not positive.
    """
    numbers = list(value.values()) if isinstance(value, Mapping) else [value]
    positive = bool(numbers) and all(0 < number < math.inf for number in numbers)
    kind = "a positive finite number" + (", or patterns with one each" if isinstance(value, Mapping) else "")
    require(positive, owner, name, kind, value, remedy)
    choices = "'layer', 'parameter' or None"
    require(per in (None, "layer", "parameter"), owner, "per", choices, per, "None is one value for each pattern.")
    learn = "Set learned=True, or leave it out: fixed values are the same either way."
    require(per is None or learned, owner, "per", "None where nothing is learned", per, learn)
    if bounds is None:
        return
    require(learned, owner, "bounds", "None where nothing is learned", bounds, "Set learned=True, or leave them out.")
    low, high = bounds
    inside = 0 < low < high < math.inf and all(low < number < high for number in numbers)
    requirement = f"two positive numbers with every first {name} between them"
    require(inside, owner, "bounds", requirement, bounds, f"The first value is {value}.")


def place(
    name: str, value: Value, learned: bool, per: Granularity | None, bounds: Bounds | None, layout: Layout | None
) -> Positive:
    """Work out which value belongs to which parameter.

    Raises:
        ValueError: a pattern has no parameter, or a parameter has no pattern; the message lists the names.
    """
    if layout is None or (per is None and not isinstance(value, Mapping)):
        if isinstance(value, Mapping) or per is not None:
            raise ValueError(
                f"{name} must be one number without a layout; found {value}, per {per!r}. Call for_layout."
            )
        return Positive(name, None, (float(value),), (), learned, False, bounds)
    patterns = dict(value) if isinstance(value, Mapping) else {"*": value}
    names = [layout.names_of(own) for own in layout.names]  # Any name of a tied parameter counts.
    require_matches(patterns, [own for owns in names for own in owns], name)
    found = [next((p for p in patterns if any(matches(own, [p]) for own in owns)), None) for owns in names]
    lacking = [own for own, pattern in zip(layout.names, found, strict=True) if pattern is None]
    if lacking:
        raise ValueError(
            f"{name} must have a pattern for every adapted parameter; found none for {lacking}. Add them, or '*' as "
            "the last pattern for all others."
        )
    unused = [pattern for pattern in patterns if pattern not in found]
    remedy = f"Put the narrower patterns first; the names are {list(layout.names)}."
    require(not unused, None, f"every pattern of {name}", "the first to match some parameter", unused, remedy)
    keys = [
        (pattern, own.rpartition(".")[0]) if per == "layer" else (pattern, "")
        for own, pattern in zip(layout.names, found, strict=True)
    ]
    kinds = list(dict.fromkeys(keys))
    start = tuple(float(patterns[str(pattern)]) for pattern, _ in kinds)
    groups = tuple(kinds.index(key) for key in keys)
    return Positive(name, layout, start, groups, learned, per == "parameter", bounds)
