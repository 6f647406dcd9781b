"""`ggjac norms`: the longest columns and rows of the dense detached Jacobian, decoded."""

from pathlib import Path
from typing import Any

import click

from ggjac.cli.help import Command
from ggjac.cli.options import ModelOptions, hide_special, model_options, output, position, scores, tabular_format, top
from ggjac.cli.planning import dry_run


@click.command(cls=Command)
@model_options()
@dry_run
@position
@click.option(
    "--count", type=click.IntRange(min=1), default=3, show_default=True, help="Columns and rows per position."
)
@top("Tokens per column; half as many per row.")
@hide_special
@scores
@output("Save `columns` [n, d], `rows` [n, d] (norms) and `ids` [n] to this safetensors file.")
@tabular_format
def norms(
    what: ModelOptions, position: int, count: int, top: int, hide_special: bool, output: Path | None, output_format: str
) -> None:
    """Find the longest columns and rows of the dense detached Jacobian at each position, and decode them.

    A column is the effect of one component of a position's embedding on the output, and decodes through the LM head. A
    row is the weight of a position's embedding in one component of the output, and decodes to the nearest input
    embeddings. Exit code 3 if the reconstruction error is out of bounds.

    \b
    ggjac norms -m model.gguf -p "The capital of France is"
    """
    from ggjac.analysis.norms import norms
    from ggjac.cli.result import finish
    from ggjac.cli.session import open_session

    session = open_session(what, position=position, output=output)
    content: dict[str, Any] = {"reconstruction": session.reconstruction().data()}
    decoding = {"column_words": top, "row_words": max(1, top // 2), "hide_special": hide_special}
    result = session.run("norms", norms, count, **decoding)
    content["norms"] = result.data(session.words)
    if output:
        session.save(output, result.tensors())
    finish(session, content, output_format, output, results=[result], norms=show)


def show(data: dict[str, Any]) -> None:
    """Print the longest columns and rows of every position."""
    from ggjac import display
    from ggjac.cli.render import numbers, table, words

    entries = [(p, column, row) for p in data["positions"] for column, row in zip(p["columns"], p["rows"], strict=True)]
    columns, rows = (numbers([entry[side]["norm"] for entry in entries]) for side in (1, 2))
    cells = [
        (p["position"], display.token(p), c, words(column["tokens"]), r, words(row["tokens"]))
        for (p, column, row), c, r in zip(entries, columns, rows, strict=True)
    ]
    headings = ["#position", "token", "#‖column‖", "tokens it promotes", "#‖row‖", "nearest tokens"]
    table("Longest columns and rows of the dense detached Jacobian", headings, cells)
