"""Results for the eye: tables on stdout, tokens shown visibly and harmlessly, or JSON for machines."""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console

PIPE_WIDTH = 120  # columns where stdout is no terminal


@cache
def console() -> "Console":
    """Return the console that writes to stdout; colour only on a terminal."""
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print a table; columns whose heading starts with `#` hold numbers and are aligned right.

    Cells are plain text: a token such as `[red]` is not markup.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    grid = Table(title=Text(title, "bold"), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        number = column.startswith("#")
        grid.add_column(Text(column.removeprefix("#")), justify="right" if number else "left", no_wrap=number)
    for row in rows:
        grid.add_row(*(Text(str(cell)) for cell in row))
    console().print(grid)


def line(text: str) -> None:
    """Print a line of text as it is."""
    click.echo(text)


def emit_json(content: Mapping[str, Any]) -> None:
    """Print JSON; NaN and infinity become null, which JSON has."""
    click.echo(json.dumps(finite(content), indent=2, ensure_ascii=False))


def size(nbytes: float) -> str:
    """Return bytes in binary units."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.1f} TiB"


def finite(value: Any) -> Any:
    """Return plain data with NaN and infinity replaced by None."""
    if isinstance(value, Mapping):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    if isinstance(value, float) and not abs(value) < float("inf"):
        return None
    return value
