"""Numbers for readers: digits in line, real minus signs, powers of ten."""

import math
from collections.abc import Sequence

MISSING = "–"
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def power(value: float | None, digits: int = 1) -> str:
    """Return `3.1 × 10⁻⁷`, or plain digits where they are as short."""
    if value is None or not math.isfinite(value):
        return MISSING
    if value == 0:
        return "0"
    if 0.01 <= abs(value) < 1000:
        return minus(f"{value:.{max(0, digits - math.floor(math.log10(abs(value))))}f}")
    mantissa, exponent = f"{value:.{digits}e}".split("e")
    raised = f"10{str(int(exponent)).translate(_RAISED)}"
    return minus(raised if mantissa.rstrip("0").rstrip(".") == "1" else f"{mantissa} × {raised}")


def fixed(value: float | None, digits: int = 3) -> str:
    """Return a number with a fixed count of decimals."""
    return MISSING if value is None else minus(f"{value:.{digits}f}")


def signed(value: float | None, digits: int = 3) -> str:
    """Return a number that always shows its sign; what rounds to nothing has none."""
    if value is None:
        return MISSING
    shown = f"{value:+.{digits}f}"
    return minus(shown if float(shown) else shown[1:])


def percent(value: float | None, digits: int = 1) -> str:
    """Return a share in percent; small ones are not rounded to nothing."""
    if value is None:
        return MISSING
    smallest = 10.0 ** -(digits + 2)
    if 0 < value < smallest:
        return f"< {100 * smallest:.{digits}f} %"
    return minus(f"{100 * value:.{digits}f} %")


def aligned(values: Sequence[float | None]) -> list[str]:
    """Return the cells of a column: as many decimals each as give the smallest some four digits."""
    sizes = [abs(value) for value in values if value]
    if not sizes or (max(sizes) < 1e6 and min(sizes) >= 1e-3):
        digits = max(0, 3 - math.floor(math.log10(min(sizes)))) if sizes else 3
        return [fixed(value, min(digits, 4)) for value in values]
    return [power(value, 3) for value in values]


def size(nbytes: int | None) -> str:
    """Return bytes in decimal units, as disks and model hubs count them."""
    if nbytes is None:
        return MISSING
    value = float(nbytes)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def duration(seconds: float | None) -> str:
    """Return a time as a person says it."""
    if seconds is None:
        return MISSING
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def minus(number: str) -> str:
    """Return a number with the sign that is as wide as a plus."""
    return number.replace("-", "−")
