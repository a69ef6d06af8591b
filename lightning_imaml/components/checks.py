"""Checks of arguments that have the same answer everywhere."""

from __future__ import annotations

from collections.abc import Sequence


def require(condition: bool, owner: object, argument: str, requirement: str, found: object, remedy: str) -> None:
    """Raise a ValueError that names the argument, the requirement, what was found and the remedy."""
    if not condition:
        raise ValueError(f"{type(owner).__name__}: {argument} must be {requirement}; found {found!r}. {remedy}")


def require_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise a ValueError unless an argument is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; found {value!r}.")


def require_at_least_one(name: str, value: int, remedy: str) -> None:
    """Raise a ValueError unless an argument is at least 1."""
    if value < 1:
        raise ValueError(f"{name} must be at least 1; found {value}. {remedy}")


def first_line(error: Exception) -> str:
    """An error's message without the rest of its story."""
    return (str(error).splitlines() or ["no message"])[0].rstrip(".")
