"""`ggjac predict`: the most likely next tokens."""

from pathlib import Path

import click

from ggjac.cli.options import ModelOptions, model_options, output, output_format, position
from ggjac.cli.planning import dry_run


@click.command()
@model_options()
@dry_run
@position
@click.option("-k", "--top", type=click.IntRange(min=1), default=5, show_default=True, help="Tokens to show.")
@click.option("--all-positions", is_flag=True, help="Save the logits of every position.")
@output("Save `logits` and `ids` to this safetensors file.")
@output_format
def predict(
    what: ModelOptions, position: int, top: int, all_positions: bool, output: Path | None, output_format: str
) -> None:
    """Show the most likely next tokens.

    \b
    ggjac predict -m model.gguf -p "The capital of France is"
    """
    from ggjac.cli import sections
    from ggjac.cli.session import Session, save

    if all_positions and not output:
        raise click.UsageError("--all-positions changes what is saved; name a file with -o")
    session = Session(what, position=position, output=output, tapes=False)
    content = {"predictions": sections.predictions(session, top)}
    if output:
        logits = session.trace.all_logits() if all_positions else session.logits
        save(session, output, {"logits": logits})
    sections.finish(session, content, output_format, output, predictions=sections.show_predictions)
