"""Names of parameters: patterns over them, and the several names of a tied one."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase

from torch import nn

from lightning_imaml.components.checks import require


def matches(name: str, patterns: Collection[str]) -> bool:
    """Whether a name matches a pattern: ``*`` and ``?`` work as in a shell, but brackets stand for themselves."""
    return any(fnmatchcase(name, pattern.replace("[", "[[]")) for pattern in patterns)


def require_matches(patterns: Collection[str], names: Sequence[str], argument: str) -> None:
    """Raise a ValueError that lists the names if a pattern matches none of them."""
    unknown = [pattern for pattern in patterns if not any(matches(name, [pattern]) for name in names)]
    remedy = f"The names are {list(names)}; '*' stands for any part of one."
    require(not unknown, None, argument, "patterns that match parameter names", unknown, remedy)


def tied_names(module: nn.Module) -> dict[str, str]:
    """For parameters with several names: each further name with the first, which ``named_parameters`` gives.

    ``functional_call`` ties weights by itself, but does not restore a layer that stands in a network twice. So we call
    it with ``tie_weights=False`` and pass every name.
    """
    first = {parameter: name for name, parameter in module.named_parameters()}
    placed = (
        (f"{prefix}.{name}" if prefix else name, parameter)
        for prefix, layer in module.named_modules()  # named_modules gives each layer once.
        for name, parameter in layer.named_parameters(recurse=False, remove_duplicate=False)
    )
    return {name: first[parameter] for name, parameter in placed if name != first[parameter]}
