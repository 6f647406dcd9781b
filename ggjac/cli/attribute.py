"""`ggjac attribute`: the share of every input token, layer or head in a logit; the sum is exact."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from ggjac import display
from ggjac.cli.options import Many, ModelOptions, many_options, model_options, output, positions, tabular_format
from ggjac.cli.planning import dry_run

if TYPE_CHECKING:
    from ggjac.session import Session

# Parts in a table of heads; the smaller ones are added up in one line.
SHOWN = 24
# Parts of each position, where there are several.
LARGEST = 3
# What shares do not say, by token and by block; under every table of them.
CAVEAT = "The sum is exact; its division depends on the freezing rule (--mlp-path both). A share is not importance."
DIRECT = "Direct logit attribution, the same under both freezing rules: what a part adds, wherever it read that from."
SPLIT = {"token": "every input token", "layer": "every block's attention and MLP", "head": "every head and MLP"}
ALL = 2**31  # more parts than any table has


@click.command()
@model_options(both=True)
@many_options
@dry_run
@positions
@click.option(
    "--target",
    help="Token whose logit is split: a text of one token, or its id, as id:4.  [default: the most likely one]",
)
@click.option("--versus", help="Token whose logit is subtracted, named like --target: split the difference.")
@click.option(
    "--by",
    type=click.Choice(["token", "layer", "head"]),
    default="token",
    show_default=True,
    help="Parts: the input tokens; or, as direct logit attribution, the attention and MLP of each layer, or each head.",
)
@click.option(
    "--count",
    type=click.IntRange(min=1),
    help=f"Number of parts in the tables, the largest first.  [default: all tokens or layers; {SHOWN} heads; {LARGEST} "
    "at each of several positions]",
)
@click.option("--all", "whole", is_flag=True, help="Show all parts in the tables.")
@output(
    "Save `positions`, `targets` and `logits` [m], and `shares` [m, n], `offsets` [m]; or `embedding`, `bias` [m], "
    "`attn`, `mlp` [m, blocks], `heads` [m, blocks, heads], `attn_bias` [m, blocks]; and `ids` [n] to this "
    "safetensors file."
)
@tabular_format
def attribute(
    what: ModelOptions,
    many: Many,
    position: int | str,
    target: str | None,
    versus: str | None,
    by: Literal["token", "layer", "head"],
    count: int | None,
    whole: bool,
    output: Path | None,
    output_format: str,
) -> None:
    """Split a token's logit, or a logit difference, into shares; they and the biases sum to it exactly.

    By token, a share follows the live (not frozen) paths from an input embedding to the logit. Which paths are live is
    a rule, --mlp-path: under the other rule the sum is the same and the shares are not. A share is not importance. By
    layer or head it is direct logit attribution: what that part adds to the residual stream at the output position,
    read through the frozen final norm and the LM head; the same under both rules. Exit code 3 if the reconstruction
    error is out of bounds.

    \b
    ggjac attribute -m model.gguf -p "The capital of France is" --target " Paris" --versus " Rome" --by head
    """
    if what.both_rules:
        if isinstance(position, str) or by != "token" or what.trace:
            raise click.UsageError(
                "--mlp-path both compares the shares of the tokens at one position, from two forward passes; leave "
                "several positions, --by and --trace out"
            )
        if many.each_line:
            raise click.UsageError("--mlp-path both is not for --each-line: run either rule by itself")

    from ggjac.analysis.attribute import largest
    from ggjac.cli.result import finish
    from ggjac.cli.session import note_likelier, one_token, open_session
    from ggjac.cli.studies import over_prompts
    from ggjac.studies.measures import answer_attribute

    if what.both_rules and isinstance(position, int):
        return both(what, position, target, versus, output, output_format, ALL if whole else count)
    several, place = (position, -1) if isinstance(position, str) else (None, position)
    options: dict[str, Any] = {"by": by, "positions": several}
    if many.each_line:
        options |= {"target": target, "versus": versus}
        return over_prompts(what, many, "attribute", output, output_format, position=place, **options)
    session = open_session(what, position=position, output=output)
    ids: dict[str, Any] = {"target": one_token(session, target), "versus": one_token(session, versus, "--versus")}
    check_difference(session, *ids.values(), several=several is not None)
    answer = answer_attribute(session, **ids, **options)
    if several is None:
        note_likelier(session, target, ids["target"])
        note_likelier(session, versus, ids["versus"], "--versus")
    if output:
        session.save(output, answer.tensors, by=by, versus=ids["versus"])
    count = ALL if whole else count
    shown, cut = partial(show, count=count), partial(largest, count=count or ALL)
    finish(session, answer.content, output_format, output, results=answer.results, cut=cut, attribution=shown)


def both(
    what: ModelOptions,
    position: int,
    target: str | None,
    versus: str | None,
    output: Path | None,
    output_format: str,
    count: int | None,
) -> None:
    """Split one logit under either freezing rule, one after the other: two forward passes at once may not fit."""
    from ggjac.analysis.attribute import attribute, both_rules, largest
    from ggjac.cli.result import finish
    from ggjac.cli.session import note_likelier, one_token, open_session

    session = open_session(what, position=position, output=output)
    ids = one_token(session, target), one_token(session, versus, "--versus")
    check_difference(session, *ids)
    minus = ids[1]
    rebuilt = [session.reconstruction()]
    first = session.run("attribution", attribute, *ids)
    note_likelier(session, target, first.target)
    note_likelier(session, versus, minus, "--versus")
    again = replace(what, mlp_path="gate", prompt=None, file=None, chat=None, system=None, tokens=session.ids)
    text, notes, seconds = session.text, session.notes, session.stages.seconds
    del session  # its forward pass is not needed any more
    session = open_session(again, position=position, output=output)
    session.text, session.notes = text, notes
    rebuilt.append(session.reconstruction())
    result = both_rules(first, session.run("attribution", attribute, first.target, minus))
    worse = max(rebuilt, key=lambda found: found.error)
    for stage, first_seconds in seconds.items():
        session.stages.seconds[stage] = round(session.stages.seconds[stage] + first_seconds, 3)
    split = {"by": "token"} | result.data(session.words)
    if output:
        session.save(output, result.tensors(), by="token", versus=minus, mlp_path="both")
    content = {"mlp_path": "both", "reconstruction": worse.data(), "attribution": split}
    shown, cut = partial(show, count=count), partial(largest, count=count or ALL)
    finish(session, content, output_format, output, results=[result], cut=cut, attribution=shown)


def check_difference(session: "Session", target: int | None, versus: int | None, *, several: bool = False) -> None:
    """Refuse the difference of a logit and itself; where each position has a target of its own, some may be.

    Raises:
        click.UsageError: `versus` is the target.
    """
    if versus is None or (several and target is None):
        return
    if versus == (int(session.logits.argmax()) if target is None else target):
        name = "the most likely token, whose logit is split" if target is None else "the token of --target"
        word = session.model.word(versus)
        raise click.UsageError(f"--versus: {word} is {name}: the difference is 0; name another token")


def show(data: dict[str, Any], count: int | None = None) -> None:
    """Print the `count` largest shares at one position part by part, at several in a line each; and their sums."""
    entries = data.get("positions", [data])
    if len(entries) > 1:
        show_positions(entries, count or LARGEST)
    elif entries[0].get("by", "token") == "token":
        show_tokens(entries[0], count or ALL)
    elif entries[0]["by"] == "head" or count:
        show_parts(entries[0], count or SHOWN)
    else:
        show_blocks(entries[0])


def show_tokens(data: dict[str, Any], count: int) -> None:
    """Print all shares in order, or the largest, with bars, and their sum; those of both rules side by side."""
    from ggjac.cli.render import bar, line, sink, table

    rules = [data] + ([data["other_rule"]] if "other_rule" in data else [])
    alone = len(rules) == 1  # bars of two rules are too wide for a terminal
    lines = _characters(rules)
    if rest := max(0, len(lines) - count):
        lines = sorted(lines, key=lambda line: -max(map(abs, line[1])))[:count]
    largest = max(abs(sums[0]) for _, sums in lines) or 1.0
    rows: list[tuple] = []
    for parts, sums in lines:
        place = display.span(parts[0]), display.together(parts[0])
        drawn = [bar(sums[0], largest)] if alone else []
        rows.append((*place, *(f"{value:+.4f}" for value in sums), *drawn))
        if len(parts[0]) > 1:  # the bytes of one character
            for each in zip(*parts, strict=True):
                values = (f"({s['share']:+.4f})" for s in each)
                rows.append((each[0]["position"], display.token(each[0]), *values, *([""] if alone else [])))
    if rest:
        left = [
            sum(s["share"] for s in rule["shares"]) - sum(sums[i] for _, sums in lines) for i, rule in enumerate(rules)
        ]
        rows.append(("", f"{rest} more: --all", *(f"{value:+.4f}" for value in left), *([""] if alone else [])))
    end = [f"logit {data['logit']:.4f}"]
    rows.append(("", "offset (biases)", *(f"{rule['offset']:+.4f}" for rule in rules), *([""] if alone else [])))
    rows.append(("", "sum", *map(_sum, rules), *(end if alone else [])))
    names = ["#share", ""] if alone else [f"#mlp-path {rule['mlp_path']}" for rule in rules]
    of = f" (mlp-path {data['mlp_path']})" if alone else ""
    table(f"Share of every input token in {asked_logit(data)}{of}", ["#position", "token", *names], rows)
    if not alone:
        found = data["agreement"]
        ranked = "of one token is not defined" if found["spearman"] is None else f"{found['spearman']:.2f}"
        line(
            f"Rank correlation of the rules {ranked}; their absolute differences sum to "
            f"{found['difference']:.4g}, their absolute shares to {found['size']:.4g} on average."
        )
    if alone:
        sink(data.get("sink"), asked_logit(data))
    line(CAVEAT)


def _characters(rules: list[dict[str, Any]]) -> list[tuple[list[list[dict[str, Any]]], list[float]]]:
    """Return the shares of each token, or of tokens that only together make up a character: by rule, and summed."""
    found, start = [], 0
    for group in display.characters(rules[0]["shares"]):
        parts = [rule["shares"][start : start + len(group)] for rule in rules]
        found.append((parts, [sum(s["share"] for s in part) for part in parts]))
        start += len(group)
    return found


def asked_logit(data: dict[str, Any]) -> str:
    """Return the name of the split quantity: a logit, or the difference of two."""
    name = f"the logit of {display.token(data['target'])}"
    if data["versus"]:
        name += f" minus that of {display.token(data['versus'])}"
    return name + (" before the soft cap" if data["softcap"] else "")


def _sum(data: dict[str, Any]) -> str:
    return f"{data['logit'] - data['unexplained']:+.4f}"


def show_blocks(data: dict[str, Any]) -> None:
    """Print two columns: the shares of the attention, or what is in its place, and of the MLP of each block."""
    from ggjac.cli.render import bar, line, table

    blocks = data["blocks"]
    attends = not any("mixer" in block for block in blocks)  # everywhere
    largest = max(abs(block[kind]) for block in blocks for kind in ("attn", "mlp")) or 1.0
    rows: list[tuple] = [("embedding", f"{data['embedding']:+.4f}", "", "", "")]
    for block in blocks:
        attn, mlp = block["attn"], block["mlp"]
        name = f"L{block['block']}" + ("" if attends else f" ({block.get('mixer', 'attention')})")
        rows.append((name, f"{attn:+.4f}", bar(attn, largest), f"{mlp:+.4f}", bar(mlp, largest)))
    if data["bias"]:
        rows.append(("biases of norm and head", f"{data['bias']:+.4f}", "", "", ""))
    attn, mlp = (sum(block[kind] for block in blocks) for kind in ("attn", "mlp"))
    rows.append(("all blocks", f"{attn:+.4f}", "", f"{mlp:+.4f}", ""))
    rows.append(("sum", _sum(data), f"logit {data['logit']:.4f}", "", ""))
    columns = ["", "#attention" if attends else "#token mixers", "", "#MLP", ""]
    table(f"Share of every block's attention and MLP in {asked_logit(data)}", columns, rows)
    line(DIRECT)


def _parts(data: dict[str, Any]) -> list[tuple[str, float]]:
    """Return all that was added to the residual stream, by name."""
    parts = [("embedding", data["embedding"])]
    for block in data["blocks"]:
        name = f"L{block['block']}"
        if "heads" in block:
            heads = block.get("head_names")
            heads = [f" {head}" for head in heads] if heads else [f"H{i}" for i in range(len(block["heads"]))]
            parts += [(f"{name}{head}", share) for head, share in zip(heads, block["heads"], strict=True)]
            parts.append((f"{name} bias of {block.get('mixer', 'attention')}", block["attn_bias"]))
        else:
            parts.append((f"{name} {block.get('mixer', 'attention')}", block["attn"]))
        parts.append((f"{name} MLP", block["mlp"]))
    return [*parts, ("biases of norm and head", data["bias"])]


def show_parts(data: dict[str, Any], count: int) -> None:
    """Print the largest shares, and the sum of all others."""
    from ggjac.cli.render import bar, line, table

    parts = sorted(_parts(data), key=lambda part: -abs(part[1]))
    shown, rest = parts[:count], [share for _, share in parts[count:] if share]
    largest = max(abs(share) for _, share in shown) or 1.0
    rows = [(name, f"{share:+.4f}", bar(share, largest)) for name, share in shown if share]
    if rest:
        rows.append((f"{len(rest)} more: --count N or --all", f"{sum(rest):+.4f}", ""))
    rows.append(("sum", _sum(data), f"logit {data['logit']:.4f}"))
    table(f"Share of {SPLIT[data['by']]} in {asked_logit(data)}", ["", "#share", ""], rows)
    line(DIRECT)


def show_positions(entries: list[dict[str, Any]], count: int) -> None:
    """Print a line for each position: its target, the largest shares and the sum."""
    from ggjac.cli.render import line, table

    rows = []
    for data in entries:
        if data["by"] == "token":
            parts = [(display.token(s), s["share"]) for s in data["shares"]] + [("offset", data["offset"])]
        else:
            parts = _parts(data)
        top = sorted(parts, key=lambda part: -abs(part[1]))[:count]
        rows.append(
            (
                data["position"],
                display.token(data),
                display.token(data["target"]),
                f"{data['logit']:.4f}",
                ", ".join(f"{name} {share:+.2f}" for name, share in top if share),
                _sum(data),
            )
        )
    less = f", minus the logit of {display.token(entries[0]['versus'])}" if entries[0]["versus"] else ""
    columns = ["#position", "token", "target", "#logit", "largest shares", "#sum of all"]
    rule = f" (mlp-path {entries[0]['mlp_path']})" if entries[0]["by"] == "token" else ""
    table(f"Share of {SPLIT[entries[0]['by']]} in a logit at each position{less}{rule}", columns, rows)
    line(CAVEAT if rule else DIRECT)
