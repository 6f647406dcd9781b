"""Results as plain data, and in a notebook as a table, a pandas DataFrame or a matplotlib figure.

A result owns its data: `data(words)` is the JSON that commands print and the report reads, `tensors()` what `-o` saves.
It also gives its columns and, where a plot makes sense, its points; the rest is here. Results hold numbers, so that
texts of tokens come from the trace that they were computed from: `result.table(trace)` shows tokens where the bare
`result` shows ids.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from html import escape
from itertools import cycle
from typing import Any, NamedTuple, Protocol

MAX_ROWS = 100  # of a table on the page; a DataFrame has all

_TABLE = "border-collapse:collapse;color:inherit;font-size:90%"
_CELL = "padding:0.15em 0.7em;vertical-align:top;border:0"
_RULE = "border-bottom:1px solid currentColor"


class Prompt(Protocol):
    """The tokens of a prompt and their texts, as a trace has them."""

    @property
    def ids(self) -> list[int]:
        """Token ids of the prompt."""

    @property
    def model(self) -> Any:
        """The model, whose `word(id)`, `text(ids)` and `tokenizer` have the texts of tokens."""


class Words:
    """Texts of tokens, where there is a trace to take them from."""

    def __init__(self, trace: Prompt | None = None):
        self.trace = trace

    def __call__(self, id: int) -> str | int:
        """Return a token on one line, with everything visible; without a trace its id."""
        return id if self.trace is None else self.trace.model.word(int(id))

    def each(self, ids: Sequence[int]) -> list[str | int]:
        """Return several tokens."""
        return [self(id) for id in ids]

    def text(self, ids: Sequence[int]) -> str:
        """Return tokens as the text that they make up; without a trace an empty one."""
        return "" if self.trace is None else self.trace.model.text(ids)

    def token(self, id: Any, score: Any = None) -> dict[str, Any]:
        """Return a token as plain data: `id` and `text`, and what else there is to say.

        `text` is true: nothing in it is escaped. Where the bytes of a token are not whole UTF-8, `text` has U+FFFD, and
        `bytes` has all of them in hexadecimal. `type` is the vocabulary's, where it is not `"normal"`; `score` is that
        of a token that was ranked. Without a trace the text is not known.
        """
        data: dict[str, Any] = {"id": int(id)}
        if self.trace is not None:
            tokenizer = self.trace.model.tokenizer
            name, kind = tokenizer.name(int(id)), tokenizer.kind(int(id))
            data["text"] = name.decode("utf-8", errors="replace")
            if data["text"].encode("utf-8") != name:
                data["bytes"] = name.hex()
            if kind != "normal":
                data["type"] = kind
        return data if score is None else data | {"score": float(score)}

    def ranked(self, ids: Any, scores: Any) -> list[dict[str, Any]]:
        """Return ranked tokens as plain data, `ids` and `scores` each `[top]`."""
        return [self.token(*each) for each in zip(ids.tolist(), scores.tolist(), strict=True)]

    def here(self, position: int) -> dict[str, Any]:
        """Return a position of the prompt as plain data, with its token where that is known."""
        return {"position": position} | (self.token(self.trace.ids[position]) if self.trace else {})

    def name(self, id: int) -> str:
        """Return a token for a sentence."""
        return str(self(id)) if self.trace else f"token {id}"

    def at(self, positions: Sequence[int]) -> dict[str, list[Any]]:
        """Return a column of positions, and one of the prompt's tokens there if they are known."""
        column: dict[str, list[Any]] = {"position": list(positions)}
        return column | ({"token": self.each([self.trace.ids[i] for i in positions])} if self.trace else {})

    def labels(self, positions: Sequence[int]) -> list[str]:
        """Return the prompt's tokens at some positions, or the positions."""
        return [str(self(self.trace.ids[i]) if self.trace else i) for i in positions]


NO_WORDS = Words()  # of results whose tokens stay ids


@dataclass(frozen=True)
class Table:
    """Columns of equal length under a title.

    Attributes:
        title: one line.
        columns: by name, in order; a cell is a number, a text, a truth value, None, or a list of tokens.
        notes: lines under the table.
    """

    title: str
    columns: Mapping[str, Sequence[Any]]
    notes: tuple[str, ...] = ()

    def to_pandas(self) -> Any:
        """Return a `pandas.DataFrame` of all rows, the notes and the title in its `attrs`.

        Raises:
            ModuleNotFoundError: pandas is missing.
        """
        try:
            import pandas
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("data frames need pandas; pip install pandas", name="pandas") from error
        frame = pandas.DataFrame(dict(self.columns))
        frame.attrs |= {"title": self.title, "notes": self.notes}
        return frame

    def _repr_html_(self) -> str:
        """Return an HTML table in the colours of the notebook, whatever they are; tokens come from strangers."""
        rows = list(zip(*self.columns.values(), strict=True))
        numeric = [all(isinstance(cell, int | float | None) for cell in column) for column in self.columns.values()]
        sides = ["right" if right else "left" for right in numeric]
        names = [_cell("th", name, side, _RULE) for name, side in zip(self.columns, sides, strict=True)]
        lines = [
            "".join(_cell("td", _text(cell), side) for cell, side in zip(row, sides, strict=True))
            for row in rows[:MAX_ROWS]
        ]
        more = (f"… {len(rows) - MAX_ROWS} more rows: .to_pandas() has all",) if len(rows) > MAX_ROWS else ()
        return (
            f'<table style="{_TABLE}"><caption style="caption-side:top;text-align:left;color:inherit">'
            f"{escape(self.title)}</caption><thead><tr>{''.join(names)}</tr></thead>"
            f"<tbody>{''.join(f'<tr>{line}</tr>' for line in lines)}</tbody></table>"
            + "".join(f'<div style="font-size:90%">{escape(note)}</div>' for note in (*more, *self.notes))
        )


def _cell(tag: str, text: str, side: str, more: str = "") -> str:
    return f'<{tag} style="text-align:{side};{_CELL};{more}">{escape(text)}</{tag}>'


def _text(cell: Any) -> str:
    """Return a cell as it reads: four digits of a number, a minus as wide as a plus."""
    if cell is None:
        return "–"
    if isinstance(cell, float):
        return f"{cell:.4g}".replace("-", "−")
    return " ".join(map(str, cell)) if isinstance(cell, list | tuple) else str(cell)


class Result:
    """A result that gives its data, and shows itself in a notebook. By default both are its fields of single values."""

    def data(self, words: Words = NO_WORDS) -> Any:
        """Return the result as plain data, ready for JSON: what the command prints and the report reads."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        return {name: value for name, value in found.items() if isinstance(value, int | float | str | None)}

    def _table(self, words: Words) -> Table:
        found = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        return Table(
            "".join(f" {c.lower()}" if c.isupper() else c for c in type(self).__name__).strip().capitalize(),
            {name: [value] for name, value in found.items() if isinstance(value, int | float | str)},
        )

    def table(self, trace: Prompt | None = None) -> Table:
        """Return the result as a table; with the trace it was computed from, tokens are texts instead of ids."""
        return self._table(Words(trace))

    def to_pandas(self, trace: Prompt | None = None) -> Any:
        """Return the table as a `pandas.DataFrame`.

        Raises:
            ModuleNotFoundError: pandas is missing.
        """
        return self.table(trace).to_pandas()

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


class Points(NamedTuple):
    """Lines or scattered points: `series` by name, each `x`, `y` and the standard errors of `y`, if any."""

    title: str
    x: str
    y: str
    series: Mapping[str, tuple[Sequence[float], Sequence[float], Sequence[float]]]
    log: bool = False
    scatter: bool = False  # against the diagonal
    flipped: bool = False  # logarithmic y downwards, as of ranks
    parts: tuple[str, ...] = ()  # of the network, one for each series: they have the same tones in every chart


class Bars(NamedTuple):
    """A bar for each name."""

    title: str
    label: str
    names: Sequence[str]
    values: Sequence[float]


class Plotted(Result):
    """A result that can also be drawn."""

    def _plot(self, words: Words) -> Points | Bars:
        raise NotImplementedError

    def figure(self, trace: Prompt | None = None) -> Any:
        """Return a `matplotlib.figure.Figure` in the style of the report; pyplot is left alone.

        Raises:
            ValueError: there is nothing to draw, or matplotlib is missing.
        """
        return _draw(self._plot(Words(trace)))


def _draw(plot: Points | Bars) -> Any:
    """Draw with the axes and tones of the report."""
    from ggjac.drawing import charts, figures

    if isinstance(plot, Bars):
        return figures.draw(charts.Bars("", *plot))
    own = [charts.PARTS[part] for part in plot.parts]
    tones = dict(zip(plot.series, own or cycle(("accent", "ink", "faint")), strict=False))
    series = tuple(
        charts.Series(
            name,
            tuple(zip(map(float, x), map(float, y), strict=True)),
            tones[name],
            line=not plot.scatter,
            error=tuple(error),
        )
        for name, (x, y, error) in plot.series.items()
        if len(x)
    )
    if not series:
        raise ValueError(f"{plot.title}: there is nothing to draw, the result is empty")
    xs, ys = ([point[axis] for s in series for point in s.points] for axis in (0, 1))
    x = charts.linear(plot.x, xs, whole=all(map(float.is_integer, xs)), pad=0.04)
    y = (
        charts.logarithmic(plot.y, ys, flipped=plot.flipped)
        if plot.log
        else charts.linear(plot.y, ys, zero=not plot.scatter, pad=0.05)
    )
    return figures.draw(charts.Chart("", plot.title, x, y, series, diagonal=plot.scatter, square=plot.scatter))
