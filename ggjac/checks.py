"""Arguments of functions, checked before any work starts: a wrong one is named, with its value and what it may be."""

from operator import index
from typing import Any


def whole(name: str, value: Any, least: int | None = 1, most: int | None = None) -> int:
    """Return a whole number, of whatever type that counts as one; truth values do not.

    Args:
        name: of the argument, for messages.
        value: the argument.
        least, most: its range, both included; None for no bound.

    Raises:
        ValueError: it is not a whole number, or out of range.
    """
    try:
        number = None if isinstance(value, bool) else index(value)
    except TypeError:
        number = None
    if number is None:
        raise ValueError(f"{name} {_short(value)} is not a whole number")
    if least is not None and number < least:
        raise ValueError(f"{name} {number} is out of range: it must be at least {least}")
    if most is not None and number > most:
        raise ValueError(f"{name} {number} is out of range: it must be at most {most}")
    return number


def seed(value: Any) -> int:
    """Return the seed of a random generator; errors as those of `whole`."""
    return whole("seed", value, 0, 2**63 - 1)


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 40 else f"{text[:39]}…"
