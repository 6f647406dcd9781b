"""Numbers of the report: fixed decimals, signs, percent, columns."""

import math
from collections.abc import Sequence

from ggjac.units import MISSING, minus, power


def fixed(value: float | None, digits: int = 3) -> str:
    """Return a number with a fixed number of decimals."""
    return MISSING if value is None else minus(f"{value:.{digits}f}")


def signed(value: float | None, digits: int = 3) -> str:
    """Return a number with its sign; one that rounds to zero has none."""
    if value is None:
        return MISSING
    shown = f"{value:+.{digits}f}"
    return minus(shown if float(shown) else shown[1:])


def percent(value: float | None, digits: int = 1) -> str:
    """Return a share in percent, which no line breaks; small ones are not rounded to zero."""
    if value is None:
        return MISSING
    smallest = 10.0 ** -(digits + 2)
    if 0 < abs(value) < smallest:
        shown = f"< {100 * smallest:.{digits}f} %" if value > 0 else f"> -{100 * smallest:.{digits}f} %"
    else:
        shown = f"{100 * value:.{digits}f} %"
    return minus(shown).replace(" ", "\N{NO-BREAK SPACE}")


def aligned(values: Sequence[float | None]) -> list[str]:
    """Return the cells of a column, with the same decimals: enough for some four digits of the smallest."""
    sizes = [abs(value) for value in values if value]
    if not sizes or (max(sizes) < 1e6 and min(sizes) >= 1e-3):
        digits = max(0, 3 - math.floor(math.log10(min(sizes)))) if sizes else 3
        return [fixed(value, min(digits, 4)) for value in values]
    return [power(value, 3) for value in values]
