"""A whole answer in `ggjac attribute`: checks of its options, and the tables of its shares for the terminal."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import click

from ggjac import display
from ggjac.cli.options import Many, ModelOptions, TokenIds

# Sources of each token of the answer in the table of the largest ones.
SOURCES = 4
# Groups whose tokens that table leaves out: they are in nearly every logit, and stand in the table before it.
COMMON = ("first", "special")
HEADINGS = {"first": "position 0", "answer": "answer so far"}

max_tokens = click.option(
    "--max-tokens",
    type=click.IntRange(min=1),
    metavar="N",
    help="Let the model answer with N tokens at most, and split the logits of all of them.",
)
answer = click.option("--answer", metavar="TEXT", help="Split the logits of all tokens of this answer to the prompt.")
answer_tokens = click.option("--answer-tokens", type=TokenIds(), help="Token ids of the answer, instead of a text.")


def whole_answer(
    what: ModelOptions,
    many: Many,
    output: Path | None,
    output_format: str,
    *,
    answer: str | list[int] | None,
    versus: str | None,
    count: int | None,
    **options: Any,
) -> None:
    """Split the logits of all tokens of an answer, a text or ids, or else generated, and print the shares.

    `options` are those of `ggjac.studies.measures.answer_answer`.

    Raises:
        click.UsageError: an option is out of range.
    """
    from ggjac.cli.result import finish
    from ggjac.cli.session import fit_command, one_token, open_session, usage_errors
    from ggjac.cli.shares import show_positions
    from ggjac.cli.studies import over_prompts
    from ggjac.shares import largest
    from ggjac.studies.measures import answer_answer

    if many.each_line:
        return over_prompts(what, many, "answer", output, output_format, answer=answer, versus=versus, **options)
    session = open_session(what, output=output, fit=False)
    with usage_errors():
        answer = what.answer_ids(answer, session.model.tokenizer)
    minus = one_token(session, versus, "--versus")
    fit_command(session, answer=answer)
    with usage_errors():
        found = answer_answer(session, answer=answer, versus=minus, **options)
    if output:
        session.save(output, found.tensors, by=options["by"], versus=minus, answer_start=session.answer_start)
    shown: dict[str, Callable[[Any], None]] = {"answer": partial(show, count=count)}
    if "attribution" in found.content:
        shown["attribution"] = lambda data: show_positions(data["positions"], count or SOURCES)

    def cut(table: Any) -> Any:
        return largest(table, count) if count else table

    finish(session, found.content, output_format, output, results=found.results, cut=cut, **shown)


def show(data: Mapping[str, Any], count: int | None = None) -> None:
    """Print a line for each token of an answer: its logit, its probability, and the sums of shares by group."""
    from ggjac.cli.render import line, table

    tokens = data["tokens"]
    by_token = "shares" in tokens[0]
    groups = [*tokens[0]["groups"]] if by_token else []
    surprises = any(token["id"] != token["likeliest"]["id"] for token in tokens)
    sums = [[token["groups"][group] for group in groups] for token in tokens]
    if by_token and any(token["offset"] for token in tokens):
        groups.append("offset")
        sums = [[*row, token["offset"]] for row, token in zip(sums, tokens, strict=True)]
    rows = []
    for token, row in zip(tokens, sums, strict=True):
        cells = [token["position"], display.token(token), f"{token['logit']:.4f}", f"{token['probability']:.4f}"]
        rows.append((*cells, *([_instead(token)] if surprises else []), *(f"{value:+.3f}" for value in row)))
    if by_token:
        mean = sum(token["logit"] for token in tokens) / len(tokens)
        means = [sum(column) / len(tokens) for column in zip(*sums, strict=True)]
        rows.append(("", "mean", f"{mean:.4f}", "", *([""] if surprises else []), *(f"{each:+.3f}" for each in means)))
    columns = ["#position", "token", "#logit", "#probability", *(["most likely"] if surprises else [])]
    columns += [f"#{HEADINGS.get(group, group)}" for group in groups]
    minus = f" minus that of {display.token(data['versus'])}" if data["versus"] else ""
    cap = " before the soft cap" if data["softcap"] else ""
    if data["text"]:
        line(f"Answer: {display.visible(data['text'])}")
        line("")
    by_group = f", by what stands before it (mlp-path {data['mlp_path']})" if by_token else ""
    table(f"The logit of each token of the answer{minus}{cap}{by_group}", columns, rows)
    if by_token:
        rest = max(abs(token["unexplained"]) for token in tokens)
        line(f"Each row sums to its logit; rounding leaves {rest:.1e} at most.")
        line("")
        show_largest(data, count or SOURCES)


def _instead(token: Mapping[str, Any]) -> str:
    """Return the most likely token with its probability, where that is another one."""
    best = token["likeliest"]
    return "" if token["id"] == best["id"] else f"{display.token(best)} ({best['probability']:.4f})"


def show_largest(data: Mapping[str, Any], count: int) -> None:
    """Print the largest shares of single tokens in each logit, without those that are in nearly every one."""
    from ggjac.cli.render import line, table
    from ggjac.cli.shares import CAVEAT

    sources, rows = data["sources"], []
    for token in data["tokens"]:
        parts = [
            (f"{source['position']} {display.token(source)}", share)
            for source, share in zip(sources, token["shares"], strict=False)
            if source["group"] not in COMMON
        ]
        top = sorted(parts, key=lambda part: -abs(part[1]))[:count]
        rows.append((display.token(token), ", ".join(f"{name} {share:+.2f}" for name, share in top)))
    table("The largest shares of single tokens", ["token", "position, token and share"], rows)
    line(CAVEAT)
