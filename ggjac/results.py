"""Results as plain data, and in a notebook as a table, a pandas DataFrame or a matplotlib figure.

A result owns its data: `data(words)` is the JSON that commands print and the report reads, `tensors()` what `-o` saves.
It also gives its columns and, where a plot makes sense, its points; the rest is here. Results hold numbers, so that
texts of tokens come from the trace that they were computed from: `result.table(trace)` shows tokens where the bare
`result` shows ids.
"""

import csv
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from html import escape
from io import StringIO
from itertools import cycle
from typing import Any, NamedTuple, Protocol
from unicodedata import combining, east_asian_width

# The first position is an attention sink where it has more than this fraction of a logit, or of a vector's weight.
# Of fewer positions, one may well have as much for its own sake.
SINK, SINK_POSITIONS = 0.5, 4
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
    """Texts of tokens, where there is a trace to take them from; in columns of tables with their `ids`, if asked."""

    def __init__(self, trace: Prompt | None = None, *, ids: bool = False):
        self.trace, self.ids = trace, ids

    def __call__(self, id: int) -> str | int:
        """Return a token on one line, with everything visible; without a trace its id."""
        return id if self.trace is None else self.trace.model.word(int(id))

    def each(self, ids: Sequence[int]) -> list[str | int]:
        """Return several tokens."""
        return [self(id) for id in ids]

    def text(self, ids: Sequence[int]) -> str:
        """Return tokens as the text that they make up; without a trace an empty one."""
        return "" if self.trace is None else self.trace.model.text(ids)

    def token(self, id: Any, score: Any = None, **more: float) -> dict[str, Any]:
        """Return a token as plain data: `id` and `text`, and what else there is to say.

        `text` is true: nothing in it is escaped. Where the bytes of a token are not whole UTF-8, `text` has U+FFFD, and
        `bytes` has all of them in hexadecimal. `type` is the vocabulary's, where it is not `"normal"`; `score` is that
        of a token that was ranked, and `more` what else there is of it. Without a trace the text is not known.
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
        return data if score is None else data | {"score": float(score)} | more

    def ranked(self, ids: Any, scores: Any, z: Any = None, z_prompts: Any = None) -> list[dict[str, Any]]:
        """Return ranked tokens as plain data; each is `[top]`, the last two if there are any."""
        given = {"z": z, "z_prompts": z_prompts}
        more = {name: each.tolist() for name, each in given.items() if each is not None}
        rows = zip(ids.tolist(), scores.tolist(), strict=True)
        return [self.token(*row, **{name: each[i] for name, each in more.items()}) for i, row in enumerate(rows)]

    def here(self, position: int) -> dict[str, Any]:
        """Return a position of the prompt as plain data, with its token where that is known."""
        return {"position": position} | (self.token(self.trace.ids[position]) if self.trace else {})

    def sink(self, fraction: float, positions: int) -> dict[str, Any] | None:
        """Return the first position as plain data with its `fraction`, if that makes it an attention sink; else None.

        It does where one of at least `SINK_POSITIONS` positions has more than `SINK` of a whole.
        """
        clear = positions >= SINK_POSITIONS and fraction > SINK
        return self.here(0) | {"fraction": fraction} if clear else None

    def name(self, id: int) -> str:
        """Return a token for a sentence."""
        return str(self(id)) if self.trace else f"token {id}"

    def column(self, name: str, ids: Sequence[Any]) -> dict[str, list[Any]]:
        """Return a column of tokens, of lists of them or None, by its name; and before it one of ids, if asked."""
        texts = [self.each(id) if isinstance(id, list) else None if id is None else self(id) for id in ids]
        return ({f"{name} id": list(ids)} if self.trace and self.ids else {}) | {name: texts}

    def one(self, name: str, id: int | None) -> dict[str, Any]:
        """Return a token that all rows of a table have in common, as `column` has it; nothing for None."""
        return {} if id is None else {key: value for key, (value,) in self.column(name, [id]).items()}

    def at(self, positions: Sequence[int | None]) -> dict[str, list[Any]]:
        """Return a column of positions, and one of the prompt's tokens there if they are known; None stays None."""
        column: dict[str, list[Any]] = {"position": list(positions)}
        if self.trace is None:
            return column
        ids = self.trace.ids
        return column | self.column("token", [None if i is None else ids[i] for i in positions])

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
        common: by name, what all rows have in common. Title and notes say it to a reader; CSV has a column for each.
    """

    title: str
    columns: Mapping[str, Sequence[Any]]
    notes: tuple[str, ...] = ()
    common: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, title: str, facts: Mapping[str, Any]) -> "Table":
        """Return a table of a thing: a row for each fact, its name and value as text."""
        return cls(title, {"": list(facts), "value": [str(value) for value in facts.values()]})

    def to_pandas(self) -> Any:
        """Return a `pandas.DataFrame` of all rows; title, notes and what the rows have in common are in its `attrs`.

        Raises:
            ModuleNotFoundError: pandas is missing.
        """
        try:
            import pandas
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("data frames need pandas; pip install pandas", name="pandas") from error
        frame = pandas.DataFrame(dict(self.columns))
        frame.attrs |= {"title": self.title, "notes": self.notes, **self.common}
        return frame

    def __str__(self) -> str:
        """Return an aligned table of text, its title above and its notes below."""
        numeric = [_numeric(column) for column in self.columns.values()]
        cells = [list(map(_text, column[:MAX_ROWS])) for column in self.columns.values()]
        widths = [max(map(_width, [name, *column])) for name, column in zip(self.columns, cells, strict=True)]

        def line(row: Sequence[str]) -> str:
            parts = zip(row, widths, numeric, strict=True)
            spaced = [(text, " " * (width - _width(text)), right) for text, width, right in parts]
            return "   ".join(gap + text if right else text + gap for text, gap, right in spaced).rstrip()

        rule = "─" * (sum(widths) + 3 * (len(widths) - 1))
        rows = [line(row) for row in zip(*cells, strict=True)]
        return "\n".join([self.title, line(list(self.columns)), rule, *rows, *self._more(), *self.notes])

    __repr__ = __str__

    def to_csv(self) -> str:
        """Return all rows as comma-separated values: numbers with all digits, a column for each of several tokens.

        Texts are as tables show them; one that a spreadsheet would take for a formula gets an apostrophe before it.
        """
        rows = max(map(len, self.columns.values()), default=0)
        columns: dict[str, Sequence[Any]] = {name: [value] * rows for name, value in self.common.items()}
        for name, column in self.columns.items():
            if any(isinstance(cell, list | tuple) for cell in column):
                most = max(len(cell or ()) for cell in column)
                columns |= {f"{name} {i + 1}": [[*(c or ()), *[None] * most][i] for c in column] for i in range(most)}
            else:
                columns[name] = column
        text = StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerows([columns, *(map(_inert, row) for row in zip(*columns.values(), strict=True))])
        return text.getvalue()

    def to_latex(self) -> str:
        """Return all rows as a LaTeX table for the package booktabs; some scripts need XeLaTeX or LuaLaTeX."""
        sides = "".join("r" if _numeric(column) else "l" for column in self.columns.values())
        cells = [map(_latex, map(_text, row)) for row in zip(*self.columns.values(), strict=True)]
        head, *rows = (" & ".join(row) + r" \\" for row in (map(_heading, self.columns), *cells))
        body = [r"\toprule", head, r"\midrule", *rows, r"\bottomrule"]
        said = [f"% {line}" for line in (self.title, *self.notes)]
        return "\n".join([*said, rf"\begin{{tabular}}{{{sides}}}", *body, r"\end{tabular}", ""])

    def _more(self) -> tuple[str, ...]:
        """Return a note on the rows that are not shown."""
        rows = max(map(len, self.columns.values()), default=0)
        return (f"… {rows - MAX_ROWS} more rows: .to_pandas() has all",) if rows > MAX_ROWS else ()

    def _repr_html_(self) -> str:
        """Return an HTML table in the colours of the notebook, whatever they are; tokens come from strangers."""
        rows = list(zip(*self.columns.values(), strict=True))
        sides = ["right" if _numeric(column) else "left" for column in self.columns.values()]
        names = [_cell("th", name, side, _RULE) for name, side in zip(self.columns, sides, strict=True)]
        lines = [
            "".join(_cell("td", _text(cell), side) for cell, side in zip(row, sides, strict=True))
            for row in rows[:MAX_ROWS]
        ]
        return (
            f'<table style="{_TABLE}"><caption style="caption-side:top;text-align:left;color:inherit">'
            f"{escape(self.title)}</caption><thead><tr>{''.join(names)}</tr></thead>"
            f"<tbody>{''.join(f'<tr>{line}</tr>' for line in lines)}</tbody></table>"
            + "".join(f'<div style="font-size:90%">{escape(note)}</div>' for note in (*self._more(), *self.notes))
        )


# With these a spreadsheet lets a formula begin.
_FORMULA = tuple("=+-@＝＋－＠")


def _inert(cell: Any) -> Any:
    """Return a cell that stays a text where a spreadsheet opens it: tokens come from strangers."""
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(_FORMULA) else cell


# Characters that LaTeX reads as commands, options of the line before, or joins, or that its fonts lack, and how it
# prints them.
_IN_LATEX = {
    **{character: rf"\{character}" for character in "&%$#_{}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "␣": r"\textvisiblespace{}"},
    **{"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", "`": r"\textasciigrave{}"},
    **{"−": "$-$", "–": "--", "σ": r"$\sigma$", "-": "{-}", "[": "{[}", "*": "{*}"},
}


def _latex(text: str) -> str:
    """Return a text as LaTeX prints it; no token of a stranger's file is a command."""
    return "".join(_IN_LATEX.get(character, character) for character in text)


_SYMBOLS = {"σ": r"\sigma", "u": "u"}


def _heading(name: str) -> str:
    """Return the heading of a column, `σ1` or `u1` as a symbol with an index."""
    symbol = re.fullmatch("([σu])([0-9]+)", name)
    return rf"${_SYMBOLS[symbol[1]]}_{{{symbol[2]}}}$" if symbol else _latex(name)


def _numeric(column: Sequence[Any]) -> bool:
    return all(isinstance(cell, int | float | None) for cell in column)


def _width(text: str) -> int:
    """Return the columns that a terminal gives a text: two to East Asian characters, none to combining marks."""
    return sum(2 if east_asian_width(c) in "WF" else 0 if combining(c) or c == "\ufe0f" else 1 for c in text)


def _cell(tag: str, text: str, side: str, more: str = "") -> str:
    return f'<{tag} style="text-align:{side};{_CELL};{more}">{escape(text)}</{tag}>'


def _text(cell: Any) -> str:
    """Return a cell as it reads: four digits of a number, a minus as wide as a plus."""
    if cell is None:
        return "–"
    if isinstance(cell, float):
        return f"{cell:.4g}".replace("-", "−")
    return " ".join(map(_text, cell)) if isinstance(cell, list | tuple) else str(cell)


class Result:
    """A result that gives its data, and shows itself in a notebook. By default both are its fields of single values."""

    def __init_subclass__(cls, **options: Any) -> None:
        """Let no dataclass print its tensors."""
        super().__init_subclass__(**options)
        cls.__repr__ = Result.__repr__  # type: ignore[method-assign]

    def __repr__(self) -> str:
        """Return kind, title and size on one line."""
        table = self.table()
        return f"{type(self).__name__}({table.title!r}, {max(map(len, table.columns.values()), default=0)} rows)"

    def data(self, words: Words = NO_WORDS) -> Any:
        """Return the result as plain data, ready for JSON: what the command prints and the report reads."""
        found = {each.name: getattr(self, each.name) for each in fields(self)}  # type: ignore[arg-type]
        return {name: value for name, value in found.items() if isinstance(value, int | float | str | None)}

    def _table(self, words: Words) -> Table:
        found = {each.name: getattr(self, each.name) for each in fields(self)}  # type: ignore[arg-type]
        return Table(
            "".join(f" {c.lower()}" if c.isupper() else c for c in type(self).__name__).strip().capitalize(),
            {name: [value] for name, value in found.items() if isinstance(value, int | float | str)},
        )

    def exhibits(self, trace: Prompt | None = None) -> list[Table]:
        """Return the tables for print: the one of `table`, unless a kind of result has its own."""
        return [self.table(trace)]

    def sheet(self, trace: Prompt | None = None) -> Table:
        """Return the table for CSV: the one of `table`, with an id for each text; or a kind of result's own."""
        return self._sheet(Words(trace, ids=True))

    def _sheet(self, words: Words) -> Table:
        return self._table(words)

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
