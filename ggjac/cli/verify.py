"""`ggjac verify`: the same tokens, logits and layers as llama.cpp?"""

import click

from ggjac.cli.options import ModelOptions, model_options, output_format
from ggjac.cli.planning import dry_run


@click.command()
@model_options()
@dry_run
@click.option(
    "--strict",
    is_flag=True,
    help="Let llama.cpp run a temporary copy rewritten as F32 (4 bytes per weight), where all must agree to rounding.",
)
@output_format
def verify(what: ModelOptions, strict: bool, output_format: str) -> None:
    """Compare tokens, logits and every layer with llama.cpp on the same file; exit code 3 if they disagree.

    On a quantized file llama.cpp rounds activations to 8 bit, so that only the top token is held to agree; --strict
    removes that difference.

    \b
    ggjac verify -m model.gguf --strict
    """
    from ggjac.cli import sections
    from ggjac.cli.session import Session

    session = Session(what, tapes=False)
    result = sections.run_parity(session, strict=strict, layers=True)
    content = {"parity": sections.parity_data(session, result)}
    sections.finish(session, content, output_format, parity=sections.show_parity)
