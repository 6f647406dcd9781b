"""Charts as data: what the page draws as inline SVG and `figures` with matplotlib, so that both show the same.

A chart knows its axes and series and nothing of how it is drawn. Places on an axis are fractions from 0 to 1.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from ggjac.report.load import Run
from ggjac.report.numbers import minus, power

MAX_POINTS = 2000  # of a scatter; beyond, a seeded sample that keeps the extremes

KINDS = {"layer": "layer", "attn": "attention", "mlp": "MLP"}
MAPS = {
    "cumulative": "from the input to this depth",
    "blockwise": "each block alone",
    "to_end": "from this depth to the end",
}


@dataclass(frozen=True)
class Axis:
    """A scale: `low` to `high` in data units, with ticks."""

    label: str
    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    log: bool = False
    flipped: bool = False

    def place(self, value: float | int) -> float:
        """Return where a value lies, from 0 at the start of the axis to 1 at its end."""
        low, high, at = self.low, self.high, value
        if self.log:
            low, high, at = math.log(low), math.log(high), math.log(max(at, self.low))
        share = min(1.0, max(0.0, (at - low) / (high - low)))
        return 1 - share if self.flipped else share


@dataclass(frozen=True)
class Series:
    """Points of one kind, in data units; `error` is one standard error of y, 0 where it is exact."""

    name: str
    points: tuple[tuple[float, float], ...]
    tone: str = "accent"  # accent, ink or faint
    line: bool = True
    error: tuple[float, ...] = ()
    labels: tuple[tuple[int, str], ...] = ()  # of some points, by their place in `points`


@dataclass(frozen=True)
class Chart:
    """One figure. `scale` names it among the variants of a switch; `summary` says it in words."""

    key: str
    title: str
    x: Axis
    y: Axis
    series: tuple[Series, ...]
    scale: str = "linear"
    diagonal: bool = False
    square: bool = False
    summary: str = ""
    notes: tuple[str, ...] = field(default=())


def linear(
    label: str, values: Iterable[float | int], *, zero: bool = False, whole: bool = False, pad: float = 0.0
) -> Axis:
    """Return a linear axis over some values, with round ticks; `zero` includes 0, `whole` ticks at integers only."""
    found = [float(value) for value in values]
    low, high = min(found), max(found)
    low, high = (min(low, 0.0), max(high, 0.0)) if zero else (low, high)
    span = high - low or abs(high) or 1.0
    low, high = (low if zero and low == 0 else low - pad * span), high + pad * span
    if high == low:
        low, high = low - 0.5 * span, high + 0.5 * span
    step = _step(high - low, whole)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    places = [i * step for i in range(first, last + 1)]
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    tall = max(abs(low), abs(high)) >= 1e5 or digits > 5
    names = [power(p, 2) if tall else minus(f"{p:.{digits}f}") for p in places]
    return Axis(label, low, high, tuple(zip(places, names, strict=True)))


def _step(span: float, whole: bool) -> float:
    """Return a round distance that cuts a span into some five pieces."""
    rough = span / 5
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough * 0.999)
    return max(1.0, step) if whole else step


def logarithmic(label: str, values: Iterable[float | int], *, flipped: bool = False) -> Axis:
    """Return a logarithmic axis over the positive ones among some values, ticked at 1, 2, 5 or at powers of ten."""
    found = [float(value) for value in values if value > 0] or [1.0]
    low, high = min(found), max(found)
    decades = math.log10(high / low)
    low, high = (low / 1.15, high * 1.15) if decades > 0.05 else (low / 2, high * 2)
    factors = (1, 2, 5) if decades < 2 else (1,)
    stride = max(1, round(decades / 6))
    places = [
        factor * 10.0**exponent
        for exponent in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for factor in factors
        if exponent % stride == 0 and low <= factor * 10.0**exponent <= high
    ]
    if len(places) < 2:  # a short stretch between two such marks
        places = [tick for tick, _ in linear(label, (low, high)).ticks if tick > 0]
    names = [minus(f"{p:g}") if 1e-4 < p < 1e6 else power(p) for p in places]
    return Axis(label, low, high, tuple(zip(places, names, strict=True)), log=True, flipped=flipped)


def scales(chart: Chart, values: Sequence[float], zero: bool = True) -> list[Chart]:
    """Return a chart with a linear and with a logarithmic y axis; linear alone where nothing is positive."""
    both = [replace(chart, y=linear(chart.y.label, values, zero=zero, pad=0.05), scale="linear")]
    if sum(value > 0 for value in values) > 1:
        both.append(replace(chart, y=logarithmic(chart.y.label, values), scale="log"))
    return both


def singular_values(run: Run) -> list[Chart]:
    """Draw the singular values, in both scales; nothing where there are none."""
    triplets = (run.content["svd"] or {}).get("triplets", [])
    values = [triplet["singular_value"] for triplet in triplets]
    if not values:
        return []
    chart = Chart(
        key="singular-values",
        title="Singular values of the detached Jacobian",
        x=linear("index", range(len(values)), whole=True, pad=0.03),
        y=Axis("σ", 0.0, 1.0, ()),
        series=(Series("σ", tuple((float(j), value) for j, value in enumerate(values))),),
        summary=f"{len(values)} singular values, from {values[0]:.4g} down to {values[-1]:.4g}.",
    )
    return scales(chart, values)


def stable_ranks(run: Run) -> list[list[Chart]]:
    """Draw the stable rank by depth: for each map a chart in both scales, a series for layer, attention and MLP."""
    taps = [tap for tap in (run.content["layers"] or {}).get("taps", []) if _stable(tap) is not None]
    found = []
    tones = {"layer": "accent", "attn": "ink", "mlp": "faint"}
    for name, words in MAPS.items():
        series = []
        for kind, tone in tones.items():
            own = sorted((t for t in taps if t["map"] == name and t["kind"] == kind), key=lambda t: t["index"])
            if own:
                points = tuple((float(t["index"]), t["stable_rank"]["value"]) for t in own)
                error = tuple(t["stable_rank"]["error"] or 0.0 for t in own)
                series.append(Series(KINDS[kind], points, tone, error=error))
        if not series:
            continue
        values = [y for s in series for _, y in s.points]
        depths = [x for s in series for x, _ in s.points]
        ends = [f"{s.name} {s.points[0][1]:.3g} to {s.points[-1][1]:.3g}" for s in series]
        chart = Chart(
            key=f"stable-rank-{name.replace('_', '-')}",
            title=f"Stable rank by depth, {words}",
            x=linear("blocks", depths, whole=True, pad=0.03),
            y=Axis("stable rank", 0.0, 1.0, ()),
            series=tuple(series),
            summary=f"Stable rank from the first depth to the last: {'; '.join(ends)}.",
        )
        found.append(scales(chart, values))
    return found


def _stable(tap: dict) -> float | None:
    return (tap["stable_rank"] or {}).get("value")


def paths(run: Run) -> list[Chart]:
    """Draw the path of the output's two leading directions through the depths (paper, analysis A14)."""
    rows = sorted((run.content["layers"] or {}).get("path") or [], key=lambda row: row["index"])
    if len(rows) < 2:
        return []
    points = tuple((row["values"][0], row["values"][1]) for row in rows)
    first, last = points[0], points[-1]
    x = linear("along direction 0", [x for x, _ in points], zero=True, pad=0.06)
    y = linear("along direction 1", [y for _, y in points], zero=True, pad=0.06)
    # Labels enough to see which way it goes, and none upon another: the ends first.
    every, labelled = max(1, len(rows) // 6), list[int]()
    for i in (len(rows) - 1, *range(0, len(rows) - 1, every)):
        places = [(x.place(points[k][0]), y.place(points[k][1])) for k in (i, *labelled)]
        if all(math.dist(places[0], other) > 0.06 for other in places[1:]):
            labelled.append(i)
    labels = tuple((i, str(rows[i]["index"])) for i in sorted(labelled))
    return [
        Chart(
            key="path",
            title="The way to the output's two leading directions",
            x=x,
            y=y,
            series=(Series("depth", points, labels=labels),),
            square=True,
            summary=f"{len(rows)} depths, from ({first[0]:.2g}, {first[1]:.2g}) to ({last[0]:.2g}, {last[1]:.2g}).",
        )
    ]


def rank_axes(run: Run) -> Chart | None:
    """Draw empty axes for the rank of a token by depth; the page's script and `ranks_by_depth` fill them."""
    ranks = (run.content["layers"] or {}).get("ranks")
    if not ranks or not ranks["tokens"] or not ranks["depths"]:
        return None
    depths = [depth["index"] for depth in ranks["depths"]]
    worst = max((rank for depth in ranks["depths"] for rank in depth["ranks"]), default=1)
    return Chart(
        key="rank-by-depth",
        title="Rank by depth",
        x=linear("blocks", depths, whole=True, pad=0.03),
        y=logarithmic("rank", [1, max(10, worst)], flipped=True),
        series=(),
        summary="The table below has the numbers.",
    )


def ranks_by_depth(run: Run) -> list[Chart]:
    """Draw the predicted token's rank by depth, as the page does when it opens."""
    axes, predictions = rank_axes(run), run.content["predictions"]
    if axes is None or not predictions:
        return []
    ranks = run.content["layers"]["ranks"]
    ids = [token["id"] for token in ranks["tokens"]]
    if predictions[0]["id"] not in ids:
        return []
    column = ids.index(predictions[0]["id"])
    rows = sorted(ranks["depths"], key=lambda depth: depth["index"])
    points = tuple((float(row["index"]), float(row["ranks"][column])) for row in rows if row["ranks"][column] > 0)
    if not points:
        return []
    name = ranks["tokens"][column]["token"]
    return [replace(axes, title=f"Rank of {name} by depth", series=(Series(name, points),))]


def scatters(run: Run) -> list[Chart]:
    """Draw the output against its reconstruction, and against the ordinary Jacobian's where that was computed."""
    y, found = run.vectors.get("y"), []
    if y is None:
        return []
    rebuilt = {
        "detached": ("J x + offset", _sum(run.vectors.get("linear_output"), run.vectors.get("offset"))),
        "ordinary": ("ordinary Jacobian × x", run.vectors.get("ordinary_output")),
    }
    for name, (label, values) in rebuilt.items():
        if values is None:
            continue
        shown = _sample(y, values)
        note = () if len(shown) == len(y) else (f"{len(shown)} of {len(y)} components, the extremes among them.",)
        error = float(np.linalg.norm(values - y) / (np.linalg.norm(y) or 1.0))
        pairs = tuple((float(y[i]), float(values[i])) for i in shown)
        found.append(
            Chart(
                key=f"reconstruction-{name}",
                title="Reconstruction" if name == "detached" else "The ordinary Jacobian",
                x=linear("y", y, pad=0.04),
                y=linear(label, [*y, *values], pad=0.04),  # y's own scale at least: what is flat looks flat
                series=(Series(label, pairs, "accent" if name == "detached" else "ink", line=False),),
                diagonal=True,
                square=True,
                summary=f"{label} against y, {len(y)} components: relative distance {power(error)}.",
                notes=note,
            )
        )
    return found


def _sum(first: np.ndarray | None, second: np.ndarray | None) -> np.ndarray | None:
    return None if first is None or second is None else first + second


def _sample(y: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return the indices of at most `MAX_POINTS` components, with the extremes of both."""
    if len(y) <= MAX_POINTS:
        return np.arange(len(y))
    keep = np.concatenate([np.argsort(v)[[*range(20), *range(-20, 0)]] for v in (y, values, values - y)])
    rest = np.random.default_rng(0).permutation(np.setdiff1d(np.arange(len(y)), keep))
    return np.sort(np.concatenate([np.unique(keep), rest[: MAX_POINTS - len(np.unique(keep))]]))
