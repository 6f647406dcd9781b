"""`ggjac contrast`: the output rebuilt by the detached Jacobian, and by the ordinary one."""

from pathlib import Path

import click

from ggjac.cli.options import ModelOptions, model_options, output, output_format, position, top
from ggjac.cli.planning import dry_run


@click.command()
@model_options()
@dry_run
@position
@top("Likely tokens to compare.", 10)
@output("Save `y`, `linear_output` (J x), `offset`, `ordinary_output` [d] and `ids` [n] to this safetensors file.")
@output_format
def contrast(what: ModelOptions, position: int, top: int, output: Path | None, output_format: str) -> None:
    """Rebuild the output by the detached and by the ordinary Jacobian, and compare both with it.

    The ordinary Jacobian is the derivative with nothing frozen, exact, by automatic differentiation of the same
    streamed blocks. The detached one reproduces the output; the ordinary one has no reason to. Exit code 3 if the
    detached one does not.

    \b
    ggjac contrast -m model.gguf -p "The capital of France is"
    """
    from ggjac.cli import sections
    from ggjac.cli.session import Session, save

    session = Session(what, position=position, output=output)
    content = {"reconstruction": sections.reconstruction(session)}
    result = sections.run_contrast(session, top)
    content["contrast"] = sections.contrast_data(result)
    if output:
        J = session.jacobian
        save(session, output, {"y": J.output, "offset": J.offset} | sections.contrast_tensors(session, result))
    sections.finish(session, content, output_format, output, contrast=sections.show_contrast)
