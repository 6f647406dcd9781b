"""`ggjac attribute`: the share of every input token, layer or head in a logit; the sum is exact."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import click

from ggjac.cli.answers import SOURCES, answer, answer_tokens, max_tokens, whole_answer
from ggjac.cli.apart import Apart, Needs, apart
from ggjac.cli.components import components
from ggjac.cli.effects import ablate
from ggjac.cli.help import Command
from ggjac.cli.options import Many, ModelOptions, many_options, model_options, output, positions, tabular_format
from ggjac.cli.planning import dry_run
from ggjac.cli.projection import Along, check_direction, directed, direction_options, projection
from ggjac.cli.reads import Heads, check_heads, reads_option, show_reads
from ggjac.cli.shares import ALL, AT_ONE, SHOWN, show
from ggjac.sizes import Ablation

ANSWER = ("--max-tokens", "--answer", "--answer-tokens")
COMPONENTS = ("--by expert", "--by edge")
BRANCHES = ("--by layer", "--by head", *COMPONENTS)
ONE_LOGIT = ("--target", "--position", "--mlp-path both", "--ablate", "--reads", "--direction")
RULES = (
    Apart(["--max-tokens"], "lets the model answer", ["--answer", "--answer-tokens"]),
    Apart(["--answer"], "gives the answer", ["--answer-tokens"]),
    Apart(ANSWER, "splits the logit of every token of an answer", [*ONE_LOGIT, *COMPONENTS]),
    Needs(["--layer", "--at"], ["--direction"]),
    Apart(["--direction"], "splits a projection, not logits", ["--target", "--versus", "--ablate", "--by edge"]),
    Apart(["--direction"], "splits one projection over all that adds to it", ["--reads", "--position several"]),
    Apart(["--ablate"], "measures the effects of all tokens on one logit", [*BRANCHES, "--exclude"]),
    Apart(["--ablate"], "measures effects at one position", ["--position several"]),
    Needs(["--reads"], ["--by head"]),
    Apart(["--reads"], "splits shares of heads at one position of one prompt", ["--position several", "--each-line"]),
    Apart(["--exclude"], "is about input tokens", BRANCHES),
    Apart(["--mlp-path both"], "compares the shares of tokens in one logit", [*BRANCHES, "--position several"]),
    Apart(["--mlp-path both"], "takes two forward passes of one prompt", ["--trace", "--each-line"]),
    Apart(COMPONENTS, "is a question about one prompt", ["--each-line"]),
    Apart(["--by edge"], "is about one output", ["--position several"]),
    Apart(["--by edge"], "has more edges than a table can show (-o saves all)", ["--all"]),
)


@click.command(cls=Command)
@model_options(both=True, exclude=True)
@many_options
@apart(*RULES)
@dry_run
@positions
@click.option(
    "--target",
    help="Token whose logit is split: a text of one token, or its id, as id:4.  [default: the most likely one]",
)
@click.option("--versus", help="Token whose logit is subtracted, named like --target: split the difference.")
@max_tokens
@answer
@answer_tokens
@direction_options
@click.option(
    "--by",
    type=click.Choice(["token", "layer", "head", "expert", "edge"]),
    default="token",
    show_default=True,
    help="Parts: the input tokens; or, as direct logit attribution, the attention and MLP of each layer, each head, or "
    "each expert; or the edges from each head and MLP into each later one.",
)
@ablate
@reads_option
@click.option(
    "--count",
    type=click.IntRange(min=1),
    help=f"Number of parts in the tables, the largest first.  [default: all tokens or layers; {SHOWN} heads, experts "
    f"or edges; {AT_ONE} at each of several positions; {SOURCES} of each token of an answer]",
)
@click.option("--all", "whole", is_flag=True, help="Show all parts in the tables.")
@output(
    "Save `positions`, `targets` and `logits` [m] (or `projections` and `direction` [d]), and `shares` [m, n], "
    "`offsets` [m]; or `embedding`, `bias` [m], `attn`, `mlp` [m, blocks], `heads` [m, blocks, heads], `attn_bias` "
    "[m, blocks]; or the shares of experts, or all edges; and `ids` [n] to this safetensors file."
)
@tabular_format
def attribute(
    what: ModelOptions,
    many: Many,
    position: int | str,
    target: str | None,
    versus: str | None,
    max_tokens: int | None,
    answer: str | None,
    answer_tokens: list[int] | None,
    along: Along,
    by: Literal["token", "layer", "head", "expert", "edge"],
    ablate: Ablation | None,
    reads: Heads | None,
    count: int | None,
    whole: bool,
    output: Path | None,
    output_format: str,
) -> None:
    """Split a token's logit, a logit difference, or a projection into shares; they and the biases sum to it exactly.

    By token, a share follows the live (not frozen) paths from an input embedding to the logit. Which paths are live is
    a rule, --mlp-path: under the other rule the sum is the same and the shares are not. A share is not importance. By
    layer or head it is direct logit attribution: what that part adds to the residual stream at the output position,
    read through the frozen final norm and the LM head; the same under both rules. Exit code 3 if the reconstruction
    error is out of bounds.

    With --max-tokens or --answer, the logits of all tokens of an answer are split, each over all tokens before it.

    \b
    ggjac attribute -m model.gguf -p "The capital of France is" --target " Paris" --versus " Rome" --by head
    """
    parts = ALL if whole else count
    if max_tokens is not None or answer is not None or answer_tokens is not None:
        how: dict[str, Any] = {"max_tokens": max_tokens, "versus": versus, "by": by, "count": parts}
        given = answer if answer_tokens is None else answer_tokens
        return whole_answer(what, many, output, output_format, answer=given, **how)
    if what.both_rules and isinstance(position, int):
        return both(what, position, target, versus, along, ablate, output, output_format, parts)
    if by in ("expert", "edge"):
        return components(what, position, target, versus, by, parts, output, output_format, along)
    if along.direction is not None and isinstance(position, int):
        return projection(what, many, along, output, output_format, position=position, by=by, count=parts)

    from ggjac.cli.result import finish
    from ggjac.cli.session import check_difference, note_likelier, one_token, open_session
    from ggjac.cli.studies import over_prompts
    from ggjac.shares import largest
    from ggjac.studies.measures import answer_attribute

    several, place = (position, -1) if isinstance(position, str) else (None, position)
    options: dict[str, Any] = {"by": by, "positions": several, "ablate": ablate}
    if many.each_line:
        options |= {"target": target, "versus": versus}
        return over_prompts(what, many, "attribute", output, output_format, position=place, **options)
    session = open_session(what, position=position, output=output)
    ids: dict[str, Any] = {"target": one_token(session, target), "versus": one_token(session, versus, "--versus")}
    check_difference(session, *ids.values(), several=several is not None)
    if reads:
        check_heads(session, reads)
        options["reads"] = reads
    found = answer_attribute(session, **ids, **options)
    if several is None:
        note_likelier(session, target, ids["target"])
        note_likelier(session, versus, ids["versus"], "--versus")
    if output:
        session.save(output, found.tensors, by=by, versus=ids["versus"])
    shown, cut = partial(show, count=parts), partial(largest, count=parts or ALL)
    also = {"reads": show_reads} if reads else {}
    finish(session, found.content, output_format, output, results=found.results, cut=cut, attribution=shown, **also)


def both(
    what: ModelOptions,
    position: int,
    target: str | None,
    versus: str | None,
    along: Along,
    ablate: Ablation | None,
    output: Path | None,
    output_format: str,
    count: int | None,
) -> None:
    """Split a logit or a projection under either freezing rule, one after the other: two passes may not fit at once."""
    from ggjac.analysis.attribute import attribute, both_rules
    from ggjac.cli.result import finish
    from ggjac.cli.session import check_difference, fit_command, note_likelier, one_token, open_session
    from ggjac.shares import largest
    from ggjac.studies.measures import measured, projected

    def split(session: Any, target: int | None, versus: int | None) -> Any:
        if along.direction is None:
            return session.run("attribution", attribute, target, versus)
        with directed():
            return projected(session, along=along.direction, at=along.at, layer=along.layer)

    session = open_session(what, position=position, output=output)
    check_direction(session, along)
    ids = one_token(session, target), one_token(session, versus, "--versus")
    check_difference(session, *ids)
    minus = ids[1]
    rebuilt = [session.reconstruction()]
    first = split(session, *ids)
    first = measured(session, first, ablate) if ablate else first
    note_likelier(session, target, first.target)
    note_likelier(session, versus, minus, "--versus")
    again = replace(what, mlp_path="gate", prompt=None, file=None, chat=None, system=None, tokens=session.ids)
    text, notes, seconds = session.text, session.notes, session.stages.seconds
    del session  # its forward pass is not needed any more
    session = open_session(again, position=position, output=output, fit=False)
    fit_command(session, ablate=None)  # done in the first pass
    session.text, session.notes = text, notes
    rebuilt.append(session.reconstruction())
    result = both_rules(first, split(session, first.target, minus))
    worse = max(rebuilt, key=lambda found: found.error)
    for stage, first_seconds in seconds.items():
        session.stages.seconds[stage] = round(session.stages.seconds.get(stage, 0.0) + first_seconds, 3)
    shares = {"by": "token"} | result.data(session.words)
    if output:
        session.save(output, result.tensors(), by="token", versus=minus, mlp_path="both")
    content = {"mlp_path": "both", "reconstruction": worse.data(), "attribution": shares}
    shown, cut = partial(show, count=count), partial(largest, count=count or ALL)
    finish(session, content, output_format, output, results=[result], cut=cut, attribution=shown)
