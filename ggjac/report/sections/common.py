"""Shared by the rooms: the run they read, the section they make of it, and bars and heat grids for templates."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import numpy as np

from ggjac.drawing.charts import Drawing, Heat, Panel
from ggjac.report.numbers import percent, signed
from ggjac.units import power

SHORT = 32  # prompts up to this many tokens show their tables open
SHOWN = 3  # tokens in a cell of the layer grid, and positions of a right vector
WHOLE = 32  # positions up to which tables for each position are shown whole
WORDS_SHOWN = 4  # tokens shown of each vector in such tables, where they are not
MAX_POINTS = 2000  # of a cloud of points; of more, a selection is drawn
LEVELS = 10  # shades of a diverging colour, each way
LEGEND = [*range(-LEVELS, LEVELS + 1, 2)]
NAMED = 3  # values outside a scale of colour that are named
# A heat grid on a screen, in pixels: as wide as the column of text, its cells not too small and not too large.
WIDE, TALL, CELL_WIDTH, CELL_HEIGHT = 720, 640, (4, 36), (5, 24)
MAX_CELLS = 20_000  # of a heat grid; larger ones would make the page slow and could not be read
SMALL, FEW = 280, 3  # pixels that a phone has left for the grid: there, wider panels show every third label


@dataclass(frozen=True)
class Run:
    """A result as the report reads it.

    Attributes:
        content: its parts, each of the `FORM` of its room; parts that are missing are None.
        vectors: those of `load.VECTORS` that were saved, `[d]` each, float64.
        source: the name of the file that has the numbers.
    """

    content: dict[str, Any]
    vectors: dict[str, np.ndarray]
    source: str = "run.json"


def _nothing(_: Run) -> Iterable[Drawing]:
    return ()


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        key: its anchor in the page, and the name of its template.
        title: its heading.
        build: returns the data for the template, or None where the run has none: then the page omits the section.
        note: how to read it.
        drawings: its figures for print.
    """

    key: str
    title: str
    build: Callable[[Run], dict[str, Any] | None]
    note: str = ""
    drawings: Callable[[Run], Iterable[Drawing]] = _nothing


def file_name(model: dict[str, Any]) -> str:
    """Return the name for which a model was found, or else that of its file, whichever system wrote its path."""
    return model["asked"] or PurePath(model["path"].replace("\\", "/")).name


def source_name(source: str) -> str:
    """Return where a vector is from, as `FILE:NAME`, without the folders of the file."""
    file, colon, name = source.rpartition(":") if ":" in source else (source, "", "")
    return PurePath(file.replace("\\", "/")).name + colon + name


def open_end(residual: float | None, tol: float | None) -> str | None:
    """Return the tolerance that singular vectors have not reached, in print; None if they have, or nothing is known."""
    return power(tol) if residual is not None and tol is not None and residual > tol else None


def capital(sentence: str) -> str:
    """Return a sentence with a capital at its start."""
    return sentence[:1].upper() + sentence[1:]


def sink(found: dict[str, Any] | None) -> dict[str, str] | None:
    """Prepare the first position, where a result says that it is an attention sink."""
    return found and {"token": found["token"], "percent": percent(found["fraction"], 0)}


def length(share: float) -> str:
    """Return a length for SVG."""
    return f"{100 * share:.2f}".rstrip("0").rstrip(".") + "%"


def bar(share: float, low: float, high: float) -> dict[str, str]:
    """Return a bar that starts at the zero of a scale from `low` to `high`."""
    span = high - low or 1.0
    return {"x": length((min(share, 0.0) - low) / span), "width": length(abs(share) / span)}


def bars(shares: list[float]) -> tuple[list[dict[str, str]], str]:
    """Return a bar for each share, all on one scale, and the place of its zero."""
    low, high = min([0.0, *shares]), max([0.0, *shares])
    return [bar(share, low, high) for share in shares], length(-low / (high - low or 1.0))


def digits(shares: list[float]) -> int:
    """Return the number of decimals for a column of shares."""
    return 4 if max(map(abs, shares), default=0.0) < 100 else 2


def heat(grid: Heat) -> dict[str, Any]:
    """Prepare a heat grid: cells as one path for each shade, ticks in fractions, and all values as a table."""
    count, units = len(grid.rows), sum(panel.span * len(panel.columns) for panel in grid.panels) + len(grid.panels) - 1
    width = min(WIDE, units * min(CELL_WIDTH[1], max(CELL_WIDTH[0], WIDE // units)))
    height = count * min(CELL_HEIGHT[1], max(CELL_HEIGHT[0], TALL // count))
    paths: dict[str, list[str]] = {}
    columns, grounds, places = [], [], []
    start = 0
    for panel in grid.panels:
        across = panel.span * len(panel.columns)
        grounds.append({"x": start, "width": across})
        # Labels some 22 pixels apart at least; tilted words need less.
        every = max(1, -(-(18 if grid.tilted or panel.span > 1 else 24) * units // (width * panel.span)))
        for j, name in enumerate(panel.columns):
            x = start + j * panel.span
            places.append(f"{x},{panel.span}")
            if j % every == 0:
                tilted = grid.tilted or panel.span > 1
                spare = width > SMALL and len(panel.columns) > FEW and j // every % 3 > 0
                columns.append(
                    {"x": length((x + panel.span / 2) / units), "label": _cut(name), "tilted": tilted, "spare": spare}
                )
        for i, row in enumerate(panel.values):
            _draw_row(paths, row, panel.largest, start, i, panel.span)
        start += across + 1
    below = max(1, -(-14 * count // height))
    decimals = digits([value for panel in grid.panels for row in panel.values for value in row if value is not None])
    return {
        "key": grid.key,
        "title": grid.title,
        "summary": grid.summary,
        "label": grid.label,
        "tilted": any(column["tilted"] for column in columns),
        "words": grid.tilted,
        "wordy": max(map(len, grid.rows)) > 5,
        "width": width,
        "height": height,
        "units": units,
        "count": count,
        "grounds": grounds,
        "paths": [(level, "".join(parts)) for level, parts in sorted(paths.items())],
        "places": " ".join(places),
        "columns": columns,
        "rows": [{"y": length((i + 0.5) / count), "label": _cut(grid.rows[i])} for i in range(0, count, below)],
        "scales": [
            {
                "name": panel.name,
                "side": side,
                "largest": power(panel.largest, 2),
                "beyond": _beyond(grid, panel),
                "columns": len(panel.columns),
            }
            for panel, side in zip(grid.panels, ("left", "right") if len(grid.panels) == 2 else ("",), strict=True)
        ],
        "head": [(_cut(c), name) for panel in grid.panels for c, name in zip(panel.columns, panel.names, strict=True)],
        "body": [
            (name, ["" if v is None else signed(v, decimals) for panel in grid.panels for v in panel.values[i]])
            for i, name in enumerate(grid.rows)
        ],
    }


def _beyond(grid: Heat, panel: Panel) -> str:
    """Return the values outside a scale of colour: the largest by name, and the number of the others."""
    found = panel.beyond
    named = [f"{grid.label} {grid.rows[i]}, {panel.names[j]}: {signed(value, 2)}" for i, j, value in found[:NAMED]]
    return "; ".join(named) + (f"; {len(found) - NAMED} more" if len(found) > NAMED else "")


def _draw_row(
    paths: dict[str, list[str]], row: tuple[float | None, ...], largest: float, start: int, i: int, span: int
) -> None:
    """Add the cells of a row to the paths of their shades; neighbours of one shade are one rectangle."""
    levels = [
        "none" if v is None else f"{max(-LEVELS, min(LEVELS, round(LEVELS * v / (largest or 1.0))))}" for v in row
    ]
    j = 0
    while j < len(levels):
        end = j + 1
        while end < len(levels) and levels[end] == levels[j]:
            end += 1
        if levels[j] != "0":
            across = span * (end - j)
            paths.setdefault(levels[j], []).append(f"M{start + span * j} {i}h{across}v1h-{across}z")
        j = end


def _cut(name: str) -> str:
    """Return a name short enough for the edge of a grid."""
    return name if len(name) <= 12 else f"{name[:11]}…"
