"""The page's figures for print: PNG, SVG and PDF, drawn by matplotlib from the same charts."""

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from ggjac import runs
from ggjac.report import charts
from ggjac.report.charts import Axis, Chart, Heat
from ggjac.report.load import Run, load
from ggjac.runs import RunError

FOLDER = "figures"
FORMATS = ("png", "svg", "pdf")
MAX_BARS = 60  # tokens in the attribution figure: the largest shares, in the order of the prompt
MAX_LABEL = 16  # characters of a token beside a grid

TONES = {"accent": "#2b5bb8", "ink": "#1d1c1a", "faint": "#8a857d"}
LESS = "#b4531c"
# Fonts for tokens of every script, as far as this machine has them; matplotlib itself brings DejaVu Sans.
FAMILIES = (
    "DejaVu Sans", "Noto Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans Arabic", "Noto Sans Hebrew",
    "Noto Sans Devanagari", "Noto Sans Bengali", "Noto Sans Tamil", "Noto Sans Thai", "Noto Sans Symbols",
    "Noto Sans Symbols 2", "Arial Unicode MS", "PingFang SC", "Hiragino Sans", "Microsoft YaHei", "Yu Gothic",
    "Malgun Gothic", "Segoe UI Symbol",
)  # fmt: skip


def write_figures(source: str | os.PathLike[str]) -> list[Path]:
    """Draw the figures of a run folder into its folder `figures`, those of NAME.json into NAME-figures beside it.

    Returns the files, those of one figure together.

    Raises:
        RunError: no result, or a damaged one, or the figures cannot be written; the message is one line.
        ValueError: matplotlib is missing.
    """
    run, source = load(source), Path(source)
    target = source / FOLDER if source.is_dir() else source.with_name(f"{source.stem}-{FOLDER}")
    if target.is_symlink():  # a folder from strangers must not send us elsewhere
        raise RunError(f"{target}: is a link that leads out of the run folder; remove it")
    written = []
    with _drawing():
        try:
            target.mkdir(exist_ok=True)
        except OSError as error:
            raise RunError(f"{target}: cannot be made ({error.strerror}); copy the run folder elsewhere") from error
        for name, figure in figures(run).items():
            for kind in FORMATS:
                path = target / f"{name}.{kind}"
                if path.is_symlink():
                    raise RunError(f"{path}: is a link that leads out of the run folder; remove it")
                runs.save_bytes(path, _bytes(figure, kind))
                written.append(path)
    return written


def figures(run: Run) -> dict[str, Any]:
    """Return a matplotlib `Figure` by name for everything that a run has data for."""
    found: dict[str, Any] = {}
    # Those that come in a linear and a logarithmic scale, and those that do not.
    scaled = (
        charts.singular_values(run),
        charts.per_token(run),
        *charts.stable_ranks(run),
        charts.longest(run),
        *charts.dense(run),
        charts.spectra(run),
        charts.angles(run),
        charts.divergences(run),
        charts.ranks_over_prompts(run),
        charts.departures(run),
    )
    single = (
        *charts.branch_lines(run),
        *charts.readability(run),
        *charts.paths(run),
        *charts.ranks_by_depth(run),
        *charts.scatters(run),
        *charts.steering(run),
    )
    with _drawing():
        if run.content["attribution"]:
            found["attribution"] = _attribution(run.content["attribution"])
        for variants in scaled:
            found |= {f"{chart.key}-{chart.scale}": _draw(chart) for chart in variants}
        found |= {chart.key: _draw(chart) for chart in single}
        found |= {heat.key: _heat(heat) for heat in (*charts.branch_grid(run), *charts.position_grid(run))}
    return found


@contextmanager
def _drawing() -> Iterator[None]:
    """Set matplotlib up for print; afterwards it is as it was. The same run gives the same bytes.

    Figures are made without pyplot, which would choose a backend for the whole process.
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


def _bytes(figure: Any, kind: str) -> bytes:
    """Return a figure's file, without the time it was made."""
    import io

    stamp: dict[str, Any] = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}[kind]
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=200, bbox_inches="tight", metadata=stamp)
    return buffer.getvalue()


def _blank(inches: tuple[float, float]) -> tuple[Any, Any]:
    """Return an empty figure and its axes."""
    figure = _figure_class()(figsize=inches)
    return figure, figure.subplots()


@cache
def _figure_class() -> Any:
    """Return a `Figure` that shows itself in a notebook, where pyplot's would take pyplot."""
    import io

    from matplotlib.figure import Figure

    class Shown(Figure):
        def _repr_png_(self) -> bytes:
            buffer = io.BytesIO()
            self.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
            return buffer.getvalue()

    return Shown


def draw(chart: Chart) -> Any:
    """Return a chart as a matplotlib `Figure`.

    Raises:
        ValueError: matplotlib is missing.
    """
    with _drawing():
        return _draw(chart)


def bars(title: str, label: str, names: Sequence[str], values: Sequence[float]) -> Any:
    """Return horizontal bars as a matplotlib `Figure`: the largest, from the top in the order given.

    Raises:
        ValueError: matplotlib is missing.
    """
    with _drawing():
        return _bars(title, label, names, values)


def _draw(chart: Chart) -> Any:
    """Draw a chart."""
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
        style = "none" if not series.line else (0, (5, 4)) if series.tone == "faint" else "-"
        axes.plot(
            xs, ys, color=color, linestyle=style, linewidth=1.3, label=_label(series.name),
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
        figure.colorbar(mesh, ax=axes, pad=0.02, fraction=0.1 if widths[i] < 12 else 0.03, aspect=30).ax.tick_params(
            labelsize=7
        )
    drawn[0].set_ylabel(heat.label)
    figure.suptitle(_label(heat.title), x=0.02, ha="left", fontsize=10)
    return figure


def _scale(axes: Any, axis: Axis, name: str) -> None:
    """Give an axis of a figure the scale and the ticks of a chart's."""
    set_ = {key: getattr(axes, f"set_{name}{key}") for key in ("scale", "lim", "ticks", "label")}
    if axis.log:
        set_["scale"]("log")
    set_["lim"](*((axis.high, axis.low) if axis.flipped else (axis.low, axis.high)))
    set_["ticks"]([place for place, _ in axis.ticks], [label for _, label in axis.ticks])
    set_["ticks"]([], minor=True)
    set_["label"](axis.label)


def _attribution(data: dict[str, Any]) -> Any:
    """Draw the shares of the tokens as bars."""
    shares = data["shares"]
    return _bars(
        f"Shares in {charts.asked(data)}",
        f"share; all shares and the offset sum to the logit {data['logit']:.4f}",
        [share["token"] for share in shares],
        [share["share"] for share in shares],
    )


def _bars(title: str, label: str, names: Sequence[str], values: Sequence[float]) -> Any:
    """Draw a bar for each name, the `MAX_BARS` largest in the order given."""
    largest = sorted(sorted(range(len(values)), key=lambda i: -abs(values[i]))[:MAX_BARS])
    shown = [values[i] for i in largest]
    figure, axes = _blank((5.6, 0.7 + 0.24 * len(shown)))
    places = range(len(shown))
    axes.barh(places, shown, height=0.62, color=[TONES["accent"] if value >= 0 else LESS for value in shown])
    axes.set_yticks(places, [_label(names[i]) for i in largest])
    axes.tick_params(axis="y", length=0, labelcolor="#1d1c1a")
    axes.invert_yaxis()
    axes.axvline(0, color="#8a857d", linewidth=0.8)
    axes.spines["left"].set_visible(False)
    rest = f", the {len(shown)} largest of {len(values)}" if len(shown) < len(values) else ""
    axes.set_title(_label(f"{title}{rest}"))
    axes.set_xlabel(label.replace("-", "−"))
    return figure
