"""Charts drawn by matplotlib, and as the bytes of PNG, SVG and PDF files. pyplot is left alone."""

import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from ggjac.drawing.charts import Axis, Bars, Chart, Drawing, Graph, Heat
from ggjac.units import minus

MAX_BARS = 60  # those of the largest values, in the order given
MAX_LABEL = 16  # characters of a label at a grid

TONES = {"accent": "#2b5bb8", "ink": "#1d1c1a", "warm": "#b4531c", "faint": "#8a857d"}
LESS = TONES["warm"]
# Fonts for tokens of every script, where this machine has them; matplotlib itself ships DejaVu Sans.
FAMILIES = (
    "DejaVu Sans", "Noto Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans Arabic", "Noto Sans Hebrew",
    "Noto Sans Devanagari", "Noto Sans Bengali", "Noto Sans Tamil", "Noto Sans Thai", "Noto Sans Symbols",
    "Noto Sans Symbols 2", "Arial Unicode MS", "PingFang SC", "Hiragino Sans", "Microsoft YaHei", "Yu Gothic",
    "Malgun Gothic", "Segoe UI Symbol",
)  # fmt: skip


@contextmanager
def style() -> Iterator[None]:
    """Set matplotlib's parameters for figures in print, and restore them afterwards.

    Figures are made without pyplot, which would choose a backend for the whole process.

    Raises:
        ValueError: matplotlib is missing.
    """
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise ValueError("figures need matplotlib; pip install matplotlib") from error
    settings: Any = {
        "font.family": [family for family in FAMILIES if family in _installed()],
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": "#8a857d",
        "axes.labelcolor": "#66625c",
        "axes.titlesize": 10,
        "axes.titlelocation": "left",
        "axes.unicode_minus": True,
        "xtick.color": "#66625c",
        "ytick.color": "#66625c",
        "text.color": "#1d1c1a",
        "legend.frameon": False,
        "svg.hashsalt": "ggjac",
        "svg.fonttype": "path",  # looks the same where the fonts are missing
        "pdf.fonttype": 42,
        "text.parse_math": False,  # a token may hold a dollar sign
    }
    with matplotlib.rc_context(settings):
        yield


@cache
def _installed() -> frozenset[str]:
    from matplotlib import font_manager

    return frozenset(font.name for font in font_manager.fontManager.ttflist)


@cache
def _drawable() -> frozenset[int]:
    """Return the characters for which some chosen font has a glyph."""
    from matplotlib import font_manager

    found: set[int] = set()
    for family in FAMILIES:
        if family in _installed():
            found |= font_manager.get_font(font_manager.findfont(family)).get_charmap().keys()
    return frozenset(found)


def _label(text: str) -> str:
    """Return a token with escapes for the characters that no font here can draw."""
    return "".join(c if ord(c) in _drawable() else f"⟨U+{ord(c):04X}⟩" for c in text)


def encoded(figure: Any, kind: str) -> bytes:
    """Return a figure as a file of some kind: `png`, `svg` or `pdf`. The same figure gives the same bytes."""
    undated: dict[str, Any] = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}[kind]
    buffer = io.BytesIO()
    with style():
        figure.savefig(buffer, format=kind, dpi=200, bbox_inches="tight", metadata=undated)
    return buffer.getvalue()


def _blank(inches: tuple[float, float]) -> tuple[Any, Any]:
    """Return an empty figure and its axes."""
    figure = _figure_class()(figsize=inches)
    return figure, figure.subplots()


@cache
def _figure_class() -> Any:
    """Return a `Figure` that a notebook shows by itself, without pyplot."""
    from matplotlib.figure import Figure

    class Shown(Figure):
        def _repr_png_(self) -> bytes:
            buffer = io.BytesIO()
            self.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
            return buffer.getvalue()

    return Shown


def draw(drawing: Drawing) -> Any:
    """Return a chart, a heat grid, bars or a graph as a matplotlib `Figure`.

    Raises:
        ValueError: matplotlib is missing.
    """
    with style():
        if isinstance(drawing, Chart):
            return _chart(drawing)
        if isinstance(drawing, Graph):
            return _graph(drawing)
        return _heat(drawing) if isinstance(drawing, Heat) else _bars(drawing)


def _chart(chart: Chart) -> Any:
    """Draw lines and points."""
    figure, axes = _blank((4.2, 4.2) if chart.square else (5.6, 3.2))
    for axis, name in ((chart.x, "x"), (chart.y, "y")):
        _scale(axes, axis, name)
    axes.grid(axis="y", color="#e3dfd8", linewidth=0.6)
    axes.set_axisbelow(True)
    if chart.diagonal:
        ends = max(chart.x.low, chart.y.low), min(chart.x.high, chart.y.high)
        axes.plot(ends, ends, color="#8a857d", linewidth=0.8, linestyle=(0, (2, 3)))
    for series in chart.series:
        xs, ys = zip(*series.points, strict=True)
        color = TONES[series.tone]
        if any(series.error):
            axes.errorbar(xs, ys, yerr=series.error, fmt="none", ecolor=color, elinewidth=0.8)
        dashes = "none" if not series.line else (0, (5, 4)) if series.tone == "faint" else "-"
        axes.plot(
            xs, ys, color=color, linestyle=dashes, linewidth=1.3, label=_label(series.name),
            marker="o", markersize=3.5 if series.line else 2, markeredgewidth=0, alpha=1 if series.line else 0.6,
        )  # fmt: skip
        for i, label in series.labels:
            axes.annotate(label, series.points[i], (4, 3), textcoords="offset points", fontsize=8)
    if len(chart.series) > 1:
        axes.legend(fontsize=8)
    axes.set_title(_label(chart.title))
    return figure


def _heat(heat: Heat) -> Any:
    """Draw a heat grid: its panels side by side, each with its own scale of colour."""
    from matplotlib.colors import LinearSegmentedColormap

    colours = LinearSegmentedColormap.from_list("shares", [LESS, "#efece6", TONES["accent"]])
    widths = [panel.span * len(panel.columns) for panel in heat.panels]
    tall = min(10.0, max(2.2, 0.16 * len(heat.rows)))
    figure = _figure_class()(figsize=(min(11.0, max(5.0, 2.5 + 0.16 * sum(widths))), tall), layout="constrained")
    drawn = figure.subplots(1, len(widths), width_ratios=widths, squeeze=False)[0]
    for i, (panel, axes) in enumerate(zip(heat.panels, drawn, strict=True)):
        values = [[math.nan if value is None else value for value in row] for row in panel.values]
        largest = panel.largest or 1.0
        mesh = axes.pcolormesh(values, cmap=colours, vmin=-largest, vmax=largest, rasterized=True)
        axes.invert_yaxis()
        for places, names, which in ((len(panel.columns), panel.columns, "x"), (len(heat.rows), heat.rows, "y")):
            shown = range(0, places, -(-places // (40 if which == "y" else 24)))
            ticks = [_label(names[j][:MAX_LABEL]) for j in shown] if which == "x" or i == 0 else []
            getattr(axes, f"set_{which}ticks")([j + 0.5 for j in shown][: len(ticks)], ticks, fontsize=7)
        if heat.tilted or panel.span > 1:
            axes.tick_params(axis="x", rotation=60)
        axes.set_xlabel(panel.name)
        bar = figure.colorbar(
            mesh, ax=axes, pad=0.02, fraction=0.1 if widths[i] < 12 else 0.03, aspect=30,
            extend="both" if panel.beyond else "neither",
        )  # fmt: skip
        bar.ax.tick_params(labelsize=7)
    drawn[0].set_ylabel(heat.label)
    figure.suptitle(_label(heat.title), x=0.02, ha="left", fontsize=10)
    return figure


def _graph(graph: Graph) -> Any:
    """Draw edges, as wide as they are large, and their nodes over them."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    figure, axes = _blank((5.6, max(2.4, 0.34 * len(graph.rows))))
    for source, reader, value in reversed(graph.edges):  # the largest on top
        path = Path(graph.curve(source, reader), [Path.MOVETO, Path.CURVE4, Path.CURVE4, Path.CURVE4])
        color, width = TONES["accent"] if value > 0 else LESS, 0.6 + 3.4 * graph.weight(value)
        axes.add_patch(PathPatch(path, facecolor="none", edgecolor=color, linewidth=width, alpha=0.75))
    for spot in graph.spots:
        axes.plot([spot.across], [graph.height(spot)], "o", markersize=4, color=TONES["ink"], markeredgewidth=0)
        beside = {"xytext": (5, 3)} if spot.row else {"xytext": (0, -10), "ha": "center"}  # no edge comes from below
        place = {"textcoords": "offset points", "fontsize": 7}
        axes.annotate(_label(spot.name), (spot.across, graph.height(spot)), **beside, **place)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.set_xticks([])
    axes.set_yticks([(i + 0.5) / len(graph.rows) for i in range(len(graph.rows))], [_label(row) for row in graph.rows])
    axes.tick_params(axis="y", length=0, labelsize=7)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.set_title(_label(graph.title))
    return figure


def _scale(axes: Any, axis: Axis, name: str) -> None:
    """Set the scale, limits, ticks and label of an axis of a figure to those of a chart's."""
    set_ = {key: getattr(axes, f"set_{name}{key}") for key in ("scale", "lim", "ticks", "label")}
    if axis.log:
        set_["scale"]("log")
    set_["lim"](*((axis.high, axis.low) if axis.flipped else (axis.low, axis.high)))
    set_["ticks"]([place for place, _ in axis.ticks], [label for _, label in axis.ticks])
    set_["ticks"]([], minor=True)
    set_["label"](axis.label)


def _bars(bars: Bars) -> Any:
    """Draw a bar for each name, from the top; of many, the `MAX_BARS` of the largest values."""
    largest = sorted(sorted(range(len(bars.values)), key=lambda i: -abs(bars.values[i]))[:MAX_BARS])
    shown = [bars.values[i] for i in largest]
    figure, axes = _blank((5.6, 0.7 + 0.24 * len(shown)))
    places = range(len(shown))
    axes.barh(places, shown, height=0.62, color=[TONES["accent"] if value >= 0 else LESS for value in shown])
    axes.set_yticks(places, [_label(bars.names[i]) for i in largest])
    axes.tick_params(axis="y", length=0, labelcolor="#1d1c1a")
    axes.invert_yaxis()
    axes.axvline(0, color="#8a857d", linewidth=0.8)
    axes.spines["left"].set_visible(False)
    rest = f", the {len(shown)} largest of {len(bars.values)}" if len(shown) < len(bars.values) else ""
    axes.set_title(_label(f"{bars.title}{rest}"))
    axes.set_xlabel(minus(bars.label))
    return figure
