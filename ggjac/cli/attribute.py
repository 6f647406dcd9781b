"""`ggjac attribute`: the exact share of every input token, branch or head in a logit."""

from pathlib import Path
from typing import Any, Literal

import click

from ggjac.cli.options import ModelOptions, model_options, output, output_format
from ggjac.cli.planning import dry_run


class PositionOrAll(click.ParamType):
    """An output position, or all of them (None)."""

    name = "position"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        """Parse `-1` or `all`."""
        try:
            return None if value == "all" else int(value)
        except ValueError:
            self.fail(f"{value!r} is neither a position nor all; positions count from 0, or back from -1", param, ctx)


@click.command()
@model_options()
@dry_run
@click.option(
    "--position",
    type=PositionOrAll(),
    default="-1",
    show_default=True,
    help="Output position, negative counts from the end; or all.",
)
@click.option("--target", help="Token whose logit is split: its id, or a text of one token.  [default: the top one]")
@click.option("--versus", help="Token whose logit is subtracted: what sets the two apart?")
@click.option(
    "--by",
    type=click.Choice(["token", "layer", "head"]),
    default="token",
    show_default=True,
    help="Over input tokens, or over what attention and MLP, or each head and MLP, added to the stream.",
)
@output(
    "Save `targets` and `logits` [m], and `shares` [m, n], `offsets` [m]; or `embedding`, `bias` [m], `attn`, `mlp` "
    "[m, blocks], `heads` [m, blocks, heads], `attn_bias` [m, blocks]; and `ids` [n] to this safetensors file."
)
@output_format
def attribute(
    what: ModelOptions,
    position: int | None,
    target: str | None,
    versus: str | None,
    by: Literal["token", "layer", "head"],
    output: Path | None,
    output_format: str,
) -> None:
    """Split a token's logit, or the difference of two, exactly; the shares and the biases sum to it.

    By token, a share follows the live paths from an input embedding to the logit. By layer or head, it is what the
    final norm, frozen, and the head read from what that part added to the stream at the output position. Exit code 3 if
    the reconstruction error is out of bounds.

    \b
    ggjac attribute -m model.gguf -p "The capital of France is" --target " Paris" --versus " Rome" --by head
    """
    from ggjac.cli import sections, shares
    from ggjac.cli.session import Session, save

    everywhere = position is None
    session = Session(what, position=-1 if position is None else position, output=output)
    ids = session.one_token(target), session.one_token(versus, "--versus")
    content: dict[str, Any] = {"position": "all"} if everywhere else {}
    content["reconstruction"] = sections.reconstruction(session)
    if by == "token" and not everywhere:
        result = sections.run_attribution(session, *ids)
        content["attribution"] = {"by": by} | sections.attribution_data(session, result)
        tensors, show = shares.tensors(shares.of_one(result, session.position)), sections.show_attribution
    else:
        found = shares.run(session, by, *ids, everywhere=everywhere)
        entries = shares.data(session, by, found)
        content["attribution"] = {"by": by, "positions": entries} if everywhere else entries[0]
        tensors, show = shares.tensors(found), shares.show
    if output:
        save(session, output, tensors, by=by, versus=ids[1])
    sections.finish(session, content, output_format, output, attribution=show)
