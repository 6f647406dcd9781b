"""Charts as data: the report draws them as inline SVG and `figures` with matplotlib, so that both show the same.

A chart holds its axes and series and nothing about how it is drawn. Places on an axis are fractions from 0 to 1.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from ggjac.units import minus, power


@dataclass(frozen=True)
class Axis:
    """A scale: `low` to `high` in data units, with ticks `(value, label)`; a `flipped` axis starts with `high`."""

    label: str
    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    log: bool = False
    flipped: bool = False

    def place(self, value: float | int) -> float:
        """Return the place of a value, from 0 at the start of the axis to 1 at its end."""
        low, high, at = self.low, self.high, value
        if self.log:
            low, high, at = math.log(low), math.log(high), math.log(max(at, self.low))
        share = min(1.0, max(0.0, (at - low) / (high - low)))
        return 1 - share if self.flipped else share


#: The tone of each part of the network, in every chart.
PARTS = {"layer": "ink", "attn": "accent", "mlp": "warm"}


@dataclass(frozen=True)
class Series:
    """Points of one kind.

    Attributes:
        name: in the legend.
        points: `(x, y)` in data units.
        tone: `accent`, `ink`, `warm` or `faint`.
        line: whether points are joined.
        error: one standard error of each y, 0 where it is exact; empty where all are.
        labels: of some points, `(index in points, text)`.
    """

    name: str
    points: tuple[tuple[float, float], ...]
    tone: str = "accent"
    line: bool = True
    error: tuple[float, ...] = ()
    labels: tuple[tuple[int, str], ...] = ()


@dataclass(frozen=True)
class Chart:
    """A figure of lines and points.

    Attributes:
        key: its name, unique within a report.
        title: one line.
        x: the horizontal axis.
        y: the vertical axis.
        series: lines and points, the last on top.
        scale: `linear` or `log` if the chart has both variants, else empty.
        diagonal: whether the line y = x is drawn.
        square: whether both axes have the same length.
        summary: the chart in a sentence.
        notes: lines below the chart.
    """

    key: str
    title: str
    x: Axis
    y: Axis
    series: tuple[Series, ...]
    scale: str = ""
    diagonal: bool = False
    square: bool = False
    summary: str = ""
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Return the key with the scale, as files are named."""
        return f"{self.key}-{self.scale}" if self.scale else self.key


@dataclass(frozen=True)
class Bars:
    """Horizontal bars: one value for each name."""

    key: str
    title: str
    label: str
    names: Sequence[str]
    values: Sequence[float]

    @property
    def name(self) -> str:
        """Return the key, as files are named."""
        return self.key


# A scale of colour covers values up to FAR times the one at this fraction of all, by size.
FAR, USUAL = 3.0, 0.95


@dataclass(frozen=True)
class Panel:
    """Columns of a heat grid that share a scale of colour, from `-largest` to `largest`.

    Attributes:
        name: of the whole panel.
        columns: the short name of each column, for its label.
        names: the full name of each column.
        values: `[rows][columns]`; None for an empty cell.
        span: the width of a column, in units of the grid.
    """

    name: str
    columns: tuple[str, ...]
    names: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]
    span: int = 1

    @cached_property
    def largest(self) -> float:
        """Return the largest absolute value that the scale of colour covers.

        Few values that are far beyond all others would leave the others without colour; they lie outside the scale.
        """
        sizes = sorted(abs(value) for row in self.values for value in row if value is not None)
        if not sizes:
            return 0.0
        usual = FAR * sizes[int(USUAL * (len(sizes) - 1))]
        return max((size for size in sizes if size <= usual), default=0.0) or sizes[-1]

    @property
    def beyond(self) -> list[tuple[int, int, float]]:
        """Return the values outside the scale, `(row, column, value)`, the largest first."""
        places = [(i, j, value) for i, row in enumerate(self.values) for j, value in enumerate(row)]
        found = [(i, j, value) for i, j, value in places if value is not None and abs(value) > self.largest]
        return sorted(found, key=lambda place: -abs(place[2]))


@dataclass(frozen=True)
class Heat:
    """A grid of values shown as colours: `rows` are the names of its rows, `label` is the axis title they share."""

    key: str
    title: str
    label: str
    rows: tuple[str, ...]
    panels: tuple[Panel, ...]
    summary: str = ""
    tilted: bool = False  # column labels are words, and so drawn aslant

    @property
    def name(self) -> str:
        """Return the key, as files are named."""
        return self.key

    @property
    def cells(self) -> int:
        """Return the number of values."""
        return len(self.rows) * sum(len(panel.columns) for panel in self.panels)


@dataclass(frozen=True)
class Spot:
    """A node of a graph: its name, the row it is in, from the bottom, and its place across, from 0 to 1."""

    name: str
    row: int
    across: float


@dataclass(frozen=True)
class Graph:
    """Edges between nodes in rows, which go upwards.

    Attributes:
        key: its name, unique within a report.
        title: one line.
        rows: the names of the rows, from the bottom.
        spots: the nodes.
        edges: `(from, to, value)`, numbers of nodes, the largest value first.
        summary: the graph in a sentence.
    """

    key: str
    title: str
    rows: tuple[str, ...]
    spots: tuple[Spot, ...]
    edges: tuple[tuple[int, int, float], ...]
    summary: str = ""

    @property
    def name(self) -> str:
        """Return the key, as files are named."""
        return self.key

    def height(self, spot: Spot) -> float:
        """Return the place of a node upwards, from 0 to 1."""
        return (spot.row + 0.5) / len(self.rows)

    def curve(self, source: int, reader: int) -> list[tuple[float, float]]:
        """Return both ends of an edge with its two control points between them, each across and upwards.

        An edge within a row rises above it, and one within a column bends to the left: others pass there straight.
        """
        a, b = self.spots[source], self.spots[reader]
        bend = 0.03 * min(6, b.row - a.row - 1) if abs(a.across - b.across) < 0.02 else 0.0
        lift = (0.2 + 0.6 * abs(a.across - b.across)) / len(self.rows) if a.row == b.row else 0.0
        low, high = self.height(a), self.height(b)
        third = (high - low) / 3 + lift
        below = (high - low) / 3 - lift
        return [(a.across, low), (a.across - bend, low + third), (b.across - bend, high - below), (b.across, high)]

    def weight(self, value: float) -> float:
        """Return the size of an edge relative to the largest one."""
        return abs(value) / (max((abs(other) for *_, other in self.edges), default=0.0) or 1.0)


Drawing = Chart | Heat | Bars | Graph


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
    """Return a round distance that divides a span into some five parts."""
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


def curves(
    key: str,
    title: str,
    axes: tuple[str, str],
    series: Iterable[Series],
    summary: str,
    *,
    whole: bool = True,
    log: bool = True,
) -> list[Chart]:
    """Return a chart of several series; nothing where none has points.

    Args:
        key: its name.
        title: one line.
        axes: the labels of x and y.
        series: those without points are dropped.
        summary: the chart in a sentence.
        whole: x has ticks at integers only.
        log: return a logarithmic variant as well; else one chart without variants.
    """
    shown = tuple(s for s in series if s.points)
    if not shown:
        return []
    xs, ys = ([point[axis] for s in shown for point in s.points] for axis in (0, 1))
    # The linear scale has room for whole error bars.
    ends = [y + sign * e for s in shown for (_, y), e in zip(s.points, s.error, strict=False) for sign in (-1, 1)]
    wide = linear(axes[1], [*ys, *ends], zero=True, pad=0.05)
    x = linear(axes[0], xs, whole=whole, pad=0.03)
    chart = Chart(key, title, x, wide, shown, summary=summary)
    return [v if v.y.log else replace(v, y=wide) for v in scales(chart, ys)] if log else [chart]


def known(pairs: Iterable[tuple[float | int, float | None]]) -> tuple[tuple[float, float], ...]:
    """Return points, without those that have None as y."""
    return tuple((float(x), y) for x, y in pairs if y is not None)


def from_to(name: str, points: Sequence[tuple[float, float]]) -> str:
    """Return the first and last y of some points as a phrase, for the summary of a chart."""
    return f"{name} {points[0][1]:.3g} to {points[-1][1]:.3g}" if points else f"{name} none"
