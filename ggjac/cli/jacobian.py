"""`ggjac jacobian`: the dense map, streamed to its file."""

from pathlib import Path

import click

from ggjac.cli.options import ModelOptions, model_options, output, output_format, position, resume
from ggjac.cli.planning import dry_run


@click.command()
@model_options()
@dry_run
@position
@output("Save `jacobian` [d, n, d], `x` [n, d], `y` [d], `offset` [d] and `ids` [n] to this safetensors file.")
@resume
@output_format
def jacobian(what: ModelOptions, position: int, output: Path | None, resume: bool, output_format: str) -> None:
    """Compute the dense detached Jacobian and what each position contributes.

    The matrix is computed and written a chunk of rows at a time; it never exists whole in memory. Exit code 3 if it
    does not reproduce the output.

    \b
    ggjac jacobian -m model.gguf -p "The capital of France is" -o jacobian.safetensors
    """
    from ggjac.cli import sections
    from ggjac.cli.session import Session, checkpoint

    session = Session(what, position=position, output=output)
    with session.checkpointed(checkpoint(output, resume), resume=resume, output=output):
        content = {"jacobian": sections.dense(session, output)}
    sections.finish(session, content, output_format, output, jacobian=sections.show_dense)
