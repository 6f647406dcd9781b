"""Results on stdout: tables, with tokens shown visibly and escaped, or JSON."""

import json
import math
import shutil
import sys
import textwrap
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ggjac import display, runs
from ggjac.cli.options import shows_scores

if TYPE_CHECKING:
    from ggjac.results import Result, Table

PIPE_WIDTH = 120  # columns where stdout is not a terminal
MIN_WIDTH = 60  # columns below which numbers would be cut; a narrower terminal wraps the lines itself


def width() -> int:
    """Return the columns to fill."""
    return max(MIN_WIDTH, shutil.get_terminal_size().columns) if on_terminal() else PIPE_WIDTH


def on_terminal() -> bool:
    """Return whether stdout is a terminal."""
    return sys.stdout is not None and sys.stdout.isatty()


def write(text: str) -> None:
    """Write to stdout at once.

    Raises:
        BrokenPipeError: the reader has gone.
        OSError: any other failure, with a message.
    """
    if sys.stdout is None:  # closed by the shell: >&-
        raise OSError("the result cannot be written, for stdout is closed; redirect it elsewhere")
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OSError(f"the result cannot be written to stdout ({error.strerror}); redirect it elsewhere") from error


def table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], alarming: Container[int] = frozenset()
) -> None:
    """Print a table; columns whose heading starts with `#` hold numbers: aligned right, never cut.

    Cells are plain text: a token such as `[red]` is not markup. Lines are broken between words, which are whole where
    the columns have room for them. The rows whose numbers are in `alarming` are red on a terminal.
    """
    from rich import box
    from rich.cells import cell_len
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    rows = [[str(cell) for cell in row] for row in rows]
    longest = [
        max((cell_len(word) for cell in [name, *cells] for word in (cell.split() or [""])), default=0)
        for name, *cells in zip(columns, *rows, strict=True)
    ]
    texts = [size for name, size in zip(columns, longest, strict=True) if not name.startswith("#")]
    room = width() - 3 * (len(columns) - 1) - (sum(longest) - sum(texts))
    for column, size in zip(columns, longest, strict=True):
        number = column.startswith("#")
        justify: Any = "right" if number else "left"
        least = None if number else min(size, max(1, room // len(texts)))
        grid.add_column(
            Text(column.removeprefix("#")), justify=justify, no_wrap=number, overflow="fold", min_width=least
        )
    for index, row in enumerate(rows):
        grid.add_row(*(Text(cell) for cell in row), style="bold red" if index in alarming else None)
    # FORCE_COLOR, which CI sets, must not put escape codes into a file or a pipe.
    console = Console(highlight=False, width=width(), force_terminal=on_terminal())
    with console.capture() as captured:
        console.print(Text(title, "bold"))
        console.print(grid)
    write("\n".join(text.rstrip(" ") for text in captured.get().split("\n")) + "\n")


def line(text: str) -> None:
    """Print a line of text, on a terminal broken between words."""
    if on_terminal():
        text = wrapped(text, width(), len(text) - len(text.lstrip(" ")) + 2)
    write(f"{text}\n")


def sink(data: Mapping[str, Any] | None, of: str) -> None:
    """Print that the first position takes most of something, where a result says so."""
    if data:
        takes = f"position 0 ({display.token(data)}) takes {data['fraction']:.0%} of {of}"
        line(f"{takes}, as an attention sink does; --exclude 0 leaves it out")


def more(*parts: tuple[int, str, str]) -> None:
    """Print how many parts of which kind a table leaves out, if any, and the options that show them."""
    if left := [f"{count} more {what}: {option}" for count, what, option in parts if count > 0]:
        line(f"{'; '.join(left)}, or --format json")
        line("")


def emit_json(content: Mapping[str, Any]) -> None:
    """Print JSON; NaN and infinity become null, which JSON has. In ASCII, where stdout's encoding lacks a character."""
    text = runs.json_text(runs.finite(content))
    try:
        text.encode((sys.stdout and sys.stdout.encoding) or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(json.loads(text), indent=2) + "\n"
    write(text)


def wrapped(text: str, columns: int, indent: int) -> str:
    """Return a text broken between words, its lines after the first one indented."""
    options: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False, "drop_whitespace": True}
    return textwrap.fill(text, max(columns, 2 * indent), subsequent_indent=" " * indent, **options)


def words(tokens: Sequence[Mapping[str, Any]]) -> str:
    """Return tokens of a result in a row, with `--scores` each with its own."""
    scored = shows_scores()
    return " ".join(
        display.token(token) + (f"({token['score']:.2f})" if scored and "score" in token else "") for token in tokens
    )


def emit_tables(
    results: Sequence["Result"],
    trace: Any,
    output_format: str,
    warnings: Iterable[str],
    cut: Callable[["Table"], "Table"] = lambda table: table,
) -> None:
    """Print the first result as CSV, or the tables for print of all results as LaTeX.

    Warnings go to stderr, or where LaTeX has comments. `cut` shortens each table.
    """
    if output_format == "csv":
        for warning in warnings:
            print(f"Warning: {warning}", file=sys.stderr)
        write(cut(results[0].sheet(trace)).to_csv())
    else:
        said = "".join(f"% Warning: {warning}\n" for warning in warnings)
        tables = [cut(table) for result in results for table in result.exhibits(trace)]
        write(said + "\n".join(table.to_latex() for table in tables))


def bar(value: float, largest: float) -> str:
    """Return a bar whose length is proportional to a value; negative values have a lighter one."""
    full = 24 if width() >= 80 else 10
    return ("█" if value > 0 else "░") * round(full * abs(value) / largest)


def numbers(values: Sequence[float]) -> list[str]:
    """Return the cells of a column, their points in line and the smallest with four significant digits."""
    sizes = [abs(value) for value in values if value and math.isfinite(value)] or [1.0]
    digits = max(0, 3 - math.floor(math.log10(min(sizes))))
    fixed = digits <= 6 and max(sizes) < 1e6
    return [f"{value:.{digits}f}" if fixed else f"{value:.3e}" for value in values]


def stable_rank(data: dict[str, Any]) -> str:
    """Return a stable rank, with its standard error where it was estimated."""
    return f"{data['value']:.4g}" + (f" ± {data['error']:.1g}" if data["error"] else "")
