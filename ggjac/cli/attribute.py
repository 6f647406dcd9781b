"""`ggjac attribute`: the exact share of every input token in a logit."""

import click

from ggjac.cli.options import ModelOptions, model_options, output_format, position


@click.command()
@model_options
@position
@click.option("--target", help="Token whose logit is split: its id, or a text of one token.  [default: the top one]")
@output_format
def attribute(what: ModelOptions, position: int, target: str | None, output_format: str) -> None:
    """Split a token's logit exactly over the input tokens; the shares and the offset sum to it.

    \b
    ggjac attribute -m model.gguf -p "The capital of France is" --target " Paris"
    """
    from ggjac.cli import render, sections
    from ggjac.cli.session import Session

    session = Session(what, position=position)
    data = sections.attribution_data(session, sections.run_attribution(session, session.one_token(target)))
    if output_format == "json":
        content = {"reconstruction": sections.reconstruction(session), "attribution": data}
        render.emit_json(session.envelope() | content)
        return
    session.show_tokens()
    sections.show_reconstruction(sections.reconstruction(session))
    sections.show_attribution(data)
