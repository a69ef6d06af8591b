"""Argument checks and error texts that all rooms share."""

from __future__ import annotations

from collections.abc import Sequence


def require(condition: bool, owner: object, argument: str, requirement: str, found: object, remedy: str) -> None:
    """Raise a ValueError unless a condition holds.

    Args:
        condition: the condition.
        owner: the object whose argument this is, which the message names by its class; None for a function's argument.
        argument: the argument's name.
        requirement: what the argument must be.
        found: what was given instead.
        remedy: what the user can do about it.
    """
    if not condition:
        prefix = "" if owner is None else f"{type(owner).__name__}: "
        raise ValueError(f"{prefix}{argument} must be {requirement}; found {found!r}. {remedy}")


def require_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise a ValueError unless an argument is one of the choices."""
    require(value in choices, None, name, f"one of {', '.join(map(repr, choices))}", value, "Pass one of these.")


def require_at_least_one(name: str, value: int, remedy: str) -> None:
    """Raise a ValueError unless an argument is at least 1."""
    require(value >= 1, None, name, "at least 1", value, remedy)


def first_line(error: Exception) -> str:
    """The first line of an error's message, without a final full stop."""
    return (str(error).splitlines() or ["no message"])[0].rstrip(".")
