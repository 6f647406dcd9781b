"""`ggjac attribute`: the exact share of every input token in a logit."""

import click

from ggjac.cli.options import ModelOptions, model_options, output_format, position


@click.command()
@model_options
@position
@click.option("--target", help="Token whose logit is split: its id, or a text of one token.  [default: the top one]")
@output_format
@click.pass_context
def attribute(ctx: click.Context, what: ModelOptions, position: int, target: str | None, output_format: str) -> None:
    """Split a token's logit exactly over the input tokens; the shares and the offset sum to it.

    Exit code 3 if the reconstruction error is out of bounds.

    \b
    ggjac attribute -m model.gguf -p "The capital of France is" --target " Paris"
    """
    from ggjac.cli import render, sections
    from ggjac.cli.session import Session

    session = Session(what, position=position)
    shares = sections.run_attribution(session, session.one_token(target))
    content = {
        "reconstruction": sections.reconstruction(session),
        "attribution": sections.attribution_data(session, shares),
    }
    if output_format == "json":
        render.emit_json(session.envelope() | content)
    else:
        session.show_tokens()
        sections.show_reconstruction(content["reconstruction"])
        sections.show_attribution(content["attribution"])
    if sections.failed_checks(content):
        ctx.exit(3)
