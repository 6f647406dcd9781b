"""Quantities as text, in one form for terminal, report and messages: numbers, bytes, durations, names."""

import math
from collections.abc import Mapping
from typing import Any

MISSING = "–"
CLUSTER = 0.05  # singular values that differ by less than this fraction are called close
#: What takes the place of a token that is left out.
PLACES = {
    "replace": "drawn tokens take its place, and the mean is shown",
    "mean": "the mean embedding of the vocabulary takes its place",
    "zero": "zero takes the place of its embedding",
}
#: Paths of edits, by their kinds in JSON; the name of the path follows. Of one token to another the tokens are named.
PATHS = {"toward": "to the other prompt", "singular": "right singular vector", "random": "random direction"}
#: Scores beside measured effects, by their names in JSON.
SCORES = {
    "share": "share",
    "other_share": "share of the other rule",
    "detached": "detached prediction",
    "gradient_input": "gradient x input",
    "ordinary": "ordinary prediction",
    "attention": "attention rollout",
}
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def edit_path(kind: str, name: str, *, tokens: tuple[str, str] | None = None, layer: int | None = None) -> str:
    """Return a path of edits in words, with names that are safe wherever it is shown.

    Args:
        kind: one of `ggjac.analysis.reach.Curve`.
        name: of the path; of a direction it says all.
        tokens: of a swap, the two.
        layer: number of blocks after which a direction is added, or a random one beside it.
    """
    if tokens:
        return f"{tokens[0]} to {tokens[1]}"
    words = name if kind == "direction" else f"{PATHS.get(kind, kind)} {name}".strip()
    return words if layer is None else f"{words}, after {layer} blocks"


def minus(number: str) -> str:
    """Return a number with a minus sign that is as wide as a plus."""
    return number.replace("-", "−")


def power(value: float | None, digits: int = 1) -> str:
    """Return `3.1 × 10⁻⁷`, or plain digits where they are as short; `–` for None, NaN and infinity."""
    if value is None or not math.isfinite(value):
        return MISSING
    if value == 0:
        return "0"
    if 0.01 <= abs(value) < 1000:
        return minus(f"{value:.{max(0, digits - math.floor(math.log10(abs(value))))}f}")
    mantissa, exponent = f"{value:.{digits}e}".split("e")
    raised = f"10{str(int(exponent)).translate(_RAISED)}"
    return minus(raised if mantissa.rstrip("0").rstrip(".") == "1" else f"{mantissa} × {raised}")


def passing(t: int | float | None, first: int | float, last: int | float) -> str:
    """Return the step at which an error passes a level, of which steps between the first and the last are measured."""
    if t is None:
        return f"> {last:g}"
    return f"≤ {first:g}" if t <= first else f"{t:.3f}"


def counted(count: int, thing: str) -> str:
    """Return a number of things: `1 prompt`, `2 prompts`."""
    return f"{count} {thing}" + "s" * (count != 1)


def size(nbytes: int | float) -> str:
    """Return bytes in binary units: `999 B`, `1.5 GiB`."""
    value = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def duration(seconds: int | float) -> str:
    """Return seconds as `0.42 s`, `42 s`, `3 min 7 s`, `1 h 2 min`; `–` for NaN and infinity."""
    if not math.isfinite(seconds):
        return MISSING
    if 0 < seconds < 0.001:
        return "< 0.001 s"
    if seconds < 9.95:
        return f"{seconds:.2g} s"
    whole = round(seconds)
    minutes, rest = divmod(whole, 60)
    if whole < 60:
        return f"{whole} s"
    return f"{minutes} min {rest} s" if whole < 3600 else f"{minutes // 60} h {minutes % 60} min"


def is_close(last: float, following: Mapping[str, Any] | None) -> bool:
    """Return whether a spectrum is cut inside a cluster, given its last value and the data of the `following` one."""
    return following is not None and 0 < last * (1 - CLUSTER) <= following["value"]


def cut_after(last: float, rank: int, following: Mapping[str, Any] | None) -> str | None:
    """Return a line on the gap between the last of `rank` singular values and the next one; None if that is unknown."""
    if following is None or not last > 0:
        return None
    gap = f"{max(0.0, 1 - following['value'] / last):.1%} below σ{rank}"
    if following["converged"]:
        found = f"σ{rank + 1} = {following['value']:.4g}, {gap}"
    else:
        found = f"σ{rank + 1} ≥ {following['value']:.4g} (not converged), at most {gap}"
    if not is_close(last, following):
        return found
    return f"{found}: the cut goes through a cluster, of which the last vectors are a basis of a part only"


def matrix_ending(stopped_by: str) -> str:
    """Return how exact triplets of the whole matrix are."""
    return "values exact to rounding" if stopped_by == "tolerance" else "exact to rounding"


def ending(data: Mapping[str, Any]) -> str:
    """Return a line on how singular triplets were found, given their data."""
    sweeps = counted(data["sweeps"], "sweep")
    if data["method"] == "matrix":
        return f"from the whole matrix ({sweeps}), {matrix_ending(data['stopped_by'])}"
    rough = f" ({data['rough_sweeps']} of them rough)" if data["rough_sweeps"] else ""
    return f"{sweeps}{rough}, stopped by: {data['stopped_by']}"


def worst(residual: float) -> str:
    """Return how progress shows the worst residual of a sweep; nothing before one is measured."""
    return f", worst residual {residual:.1e}" if math.isfinite(residual) else ""
