"""`ggjac predict`: the most likely next tokens."""

from pathlib import Path
from typing import Any

import click

from ggjac.cli.help import Command
from ggjac.cli.options import Many, ModelOptions, many_options, model_options, output, position, tabular_format
from ggjac.cli.planning import dry_run


@click.command(cls=Command)
@model_options(trace=False)
@many_options
@dry_run
@position
@click.option("-k", "--top", type=click.IntRange(min=1), default=5, show_default=True, help="Tokens to show.")
@click.option("--all-positions", is_flag=True, help="Save the logits of every position.")
@output("Save `logits` and `ids` to this safetensors file.")
@tabular_format
def predict(
    what: ModelOptions,
    many: Many,
    position: int,
    top: int,
    all_positions: bool,
    output: Path | None,
    output_format: str,
) -> None:
    """Show the most likely next tokens.

    \b
    ggjac predict -m model.gguf -p "The capital of France is"
    """
    from ggjac.cli.result import finish
    from ggjac.cli.session import open_session
    from ggjac.cli.studies import over_prompts
    from ggjac.studies.measures import answer_predict

    if all_positions and not output:
        raise click.UsageError("--all-positions changes what is saved; name a file with -o")
    if many.each_line:
        if all_positions:
            raise click.UsageError("--all-positions is not for --each-line: it saves the logits of one prompt")
        return over_prompts(what, many, "predict", output, output_format, position=position, top=top)
    session = open_session(what, position=position, output=output, tapes=False)
    answer = answer_predict(session, top=top)
    if output:
        session.save(output, {"logits": session.trace.all_logits() if all_positions else session.logits})
    finish(session, answer.content, output_format, output, results=answer.results, predictions=show)


def show(rows: list[dict[str, Any]]) -> None:
    """Print the next-token table."""
    from ggjac import display
    from ggjac.cli.render import table

    cells = [(display.token(r), r["id"], f"{r['logit']:.3f}", f"{r['probability']:.4f}") for r in rows]
    table("Next token", ["token", "#id", "#logit", "#probability"], cells)
