"""`ggjac norms`: the longest columns and rows of the dense detached Jacobian, decoded."""

from pathlib import Path

import click

from ggjac.cli.options import ModelOptions, model_options, output, output_format, position, top
from ggjac.cli.planning import dry_run


@click.command()
@model_options()
@dry_run
@position
@click.option("--count", type=click.IntRange(min=1), default=3, show_default=True, help="Columns and rows a position.")
@top("Tokens per column; half per row.")
@output("Save `columns` [n, d], `rows` [n, d] (norms) and `ids` [n] to this safetensors file.")
@output_format
def norms(what: ModelOptions, position: int, count: int, top: int, output: Path | None, output_format: str) -> None:
    """Find the longest columns and rows of the dense detached Jacobian at each position, and decode them.

    A column is what one component of a position's embedding does to the output: it decodes through the LM head. A row
    is what one component of the output reads at a position: it decodes to the nearest input embeddings. Exit code 3 if
    the reconstruction error is out of bounds.

    \b
    ggjac norms -m model.gguf -p "The capital of France is"
    """
    from ggjac.cli import sections
    from ggjac.cli.session import Session, save

    session = Session(what, position=position, output=output)
    content = {"reconstruction": sections.reconstruction(session)}
    result = sections.run_norms(session, count, top)
    content["norms"] = sections.norms_data(session, result)
    if output:
        save(session, output, {"columns": result.columns, "rows": result.rows})
    sections.finish(session, content, output_format, output, norms=sections.show_norms)
