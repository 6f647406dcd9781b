"""`ggjac attend`: why a head attends; the scores of its keys split over pairs of parts."""

import re
from functools import partial
from pathlib import Path
from typing import Any, Literal

import click

from ggjac import display
from ggjac.cli.help import Command
from ggjac.cli.options import ModelOptions, Position, model_options, output, tabular_format
from ggjac.cli.planning import dry_run

SHOWN = 5  # pairs of each key
NOTE = (
    "A score counts beside those of other keys only: what all keys have in common changes no weight (see --versus). "
    "A share is not importance."
)


class Head(click.IntRange):
    """The number of a head in its block."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the number; of a name, as tables have it, say which two options it is."""
        if found := re.fullmatch(r"L([0-9]{1,6})H([0-9]{1,6})", str(value), re.ASCII):
            self.fail(f"{value} is written --layer {found[1]} --head {found[2]}", param, ctx)
        return super().convert(value, param, ctx)


@click.command(cls=Command)
@model_options()
@dry_run
@click.option(
    "--query",
    "position",
    type=Position(several=False),
    metavar="POSITION",
    default="-1",
    show_default=True,
    help="Position of the query; negative counts from the end.",
)
@click.option("--layer", type=click.IntRange(min=0), help="Block of the head, from 0.")
@click.option(
    "--head",
    type=Head(min=0),
    help="Number of the head, through all mixers of its block; of Mamba-1, of the channel.  [default: the head with "
    "the largest share in the most likely token's logit]",
)
@click.option(
    "--key",
    "keys",
    type=Position(several=True),
    metavar="POSITION",
    help="Keys whose scores are split, as 0,10-20,-1, or all.  [default: the 5 of the largest weights]",
)
@click.option(
    "--versus",
    type=Position(several=False),
    metavar="POSITION",
    help="Key whose score is subtracted from those of the others.",
)
@click.option(
    "--by",
    "parts",
    type=click.Choice(["block", "token"]),
    default="block",
    show_default=True,
    help="Of attention: parts of the stream at the query and at a key, what each block's attention and MLP wrote there "
    "or what each input token became there.",
)
@click.option(
    "--count", type=click.IntRange(min=1), help=f"Of attention: pairs of each key in the tables.  [default: {SHOWN}]"
)
@output(
    "Save `pairs` [keys, query parts, key parts], `keys`, `scores`, `softcap`, `distance` [keys] and `weights` [n], or "
    "of a recurrence `entries`, `write`, `product`, `kept`, `removed` [n]; and `ids` [n] to this safetensors file."
)
@tabular_format
def attend(
    what: ModelOptions,
    position: int,
    layer: int | None,
    head: int | None,
    keys: int | str | None,
    versus: int | None,
    parts: Literal["block", "token"],
    count: int | None,
    output: Path | None,
    output_format: str,
) -> None:
    """Split the scores of a head's keys over pairs of parts: of the query's residual stream, and of the key's.

    Before the softmax, a score is bilinear in the two streams, with norms, rotations and clamps held at the prompt: the
    pairs sum to it exactly. By token they follow the live paths, which depend on --mlp-path. Soft cap and distance are
    rows of their own. A recurrence has no scores: each entry of its pattern is shown as write strength x decay x (key ·
    query), and what a delta rule removed. Exit code 3 if the reconstruction error is out of bounds.

    \b
    ggjac attend -m model.gguf -p "The capital of France is" --layer 5 --head 3
    """
    from ggjac.checks import key_positions
    from ggjac.cli.result import finish
    from ggjac.cli.session import open_session
    from ggjac.config import find_head
    from ggjac.studies.measures import answer_attend

    session = open_session(what, position=position, output=output)
    try:
        if versus is not None:
            key_positions(str(versus), session.position, "versus")
        if layer is not None and head is not None:
            find_head(session.model.config, layer, head, channels=True)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    chosen = None if keys is None else str(keys)
    try:
        answer = answer_attend(session, layer=layer, head=head, keys=chosen, versus=versus, parts=parts)
    except ValueError as error:
        if type(error) is not ValueError:
            raise
        raise click.UsageError(str(error)) from error
    if output:
        session.save(output, answer.tensors)
    shown = partial(show, count=count or SHOWN)
    finish(session, answer.content, output_format, output, results=answer.results, attend=shown)


def show(data: dict[str, Any], count: int = SHOWN) -> None:
    """Print the pattern of a head, and for each key the largest pairs of its score."""
    if data["by"] == "factors":
        show_factors(data)
    else:
        show_scores(data, count)


def whose(data: dict[str, Any]) -> str:
    """Return the name of a head and of its query."""
    kind = "" if data["mixer"] == "attention" else f" ({data['mixer']})"
    return (
        f"L{data['layer']}H{data['head']}{kind} at position {data['query']['position']} {display.token(data['query'])}"
    )


def part_name(part: dict[str, Any]) -> str:
    """Return the name of a part of the stream."""
    if "position" in part:
        return f"{part['position']} {display.token(part)}"
    if "block" not in part:
        return part["part"]
    return f"L{part['block']} {'MLP' if part['part'] == 'mlp' else part.get('mixer', 'attention')}"


def show_scores(data: dict[str, Any], count: int) -> None:
    """Print the weights and scores of keys, and the largest pairs of each score."""
    from ggjac.cli.render import bar, line, table

    minus = f", minus that of {data['versus']['position']} {display.token(data['versus'])}" if data["versus"] else ""
    constants = [(name, label) for name, label in CONSTANTS if any(key[name] for key in data["keys"])]
    rows = [
        (
            key["position"], display.token(key), f"{key['weight']:.2%}", f"{key['score']:+.4f}",
            *(f"{key[name]:+.4f}" for name, _ in constants),
        )
        for key in data["keys"]
    ]  # fmt: skip
    rest = sum(each["weight"] for each in data["weights"]) - sum(key["weight"] for key in data["keys"])
    blank = [""] * (1 + len(constants))
    rows += [("", name, f"{weight:.2%}", *blank) for name, weight in _others(data, rest) if abs(weight) > 5e-7]
    columns = ["#key", "", "#weight", "#score", *(f"#{label}" for _, label in constants)]
    table(f"Keys of {whose(data)}{minus}", columns, rows)
    for key in data["keys"]:
        pairs = key["pairs"][:count]
        largest = max((abs(pair["share"]) for pair in pairs), default=0.0) or 1.0
        lines = [
            (
                part_name(data["query_parts"][pair["query"]]), part_name(data["key_parts"][pair["key"]]),
                f"{pair['share']:+.4f}", bar(pair["share"], largest),
            )
            for pair in pairs
        ]  # fmt: skip
        total = key["score"] - key["unexplained"]
        if others := total - sum(pair["share"] for pair in pairs):
            lines.append(("all other pairs", "", f"{others:+.4f}", ""))
        lines.append(("sum", "", f"{total:+.4f}", f"score {key['score']:+.4f}"))
        rule = f" (mlp-path {data['mlp_path']})" if data["by"] == "token" else ""
        title = f"Pairs in the score of key {key['position']} {display.token(key)}{minus}{rule}"
        table(title, ["query's part", "key's part", "#share", ""], lines)
    line(NOTE)


CONSTANTS = (("softcap", "soft cap"), ("distance", "distance"))


def _others(data: dict[str, Any], rest: float) -> list[tuple[str, float]]:
    """Return what else has weight: keys that are not shown, a sink without a value, groups of tokens."""
    return [("all other keys", rest), ("sink (no value)", data["sink"]), ("groups of tokens", data["groups"])]


def show_factors(data: dict[str, Any]) -> None:
    """Print the factors of every entry of a recurrence's pattern."""
    from ggjac.cli.render import line, numbers, table

    entries = data["entries"]
    removes = any(entry["removed"] for entry in entries)
    names = ["entries", "write", "product"] + ["removed"] * removes
    cells = {name: numbers([entry[name] for entry in entries]) for name in names}
    decays = ["" if entry["decay"] is None else f"{entry['decay']:.4g}" for entry in entries]
    rows = [
        (
            entry["position"], display.token(entry), cells["entries"][i], cells["write"][i], decays[i],
            cells["product"][i], *([cells["removed"][i]] if removes else []),
        )
        for i, entry in enumerate(entries)
    ]  # fmt: skip
    columns = ["#position", "token", "#entry", "#write", "#decay", "#key · query", *(["#removed"] if removes else [])]
    table(f"Pattern of {whose(data)}", columns, rows)
    own = f" + {data['own']:.4g} at the query's own position" if data["own"] else ""
    line(f"entry = write x decay x (key · query){' + removed' if removes else ''}{own}")
    line("")
