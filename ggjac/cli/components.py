"""`ggjac attribute --by expert` and `--by edge`: their checks, calls and tables for the terminal."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ggjac import display
from ggjac.cli.options import ModelOptions
from ggjac.cli.shares import ALL, AT_ONE, DIRECT, SHOWN, asked_logit

if TYPE_CHECKING:
    from ggjac.results import Table

# Edges that are kept by position, at least.
KEPT = 100
# Tokens named in a row: those that chose an expert with the largest weights, or that have most of an edge.
NAMED = 3
FROZEN = "Patterns, norms and gates are frozen: an edge is a part of the logit, not the effect of cutting it."


def components(
    what: ModelOptions,
    position: int | str,
    target: str | None,
    versus: str | None,
    by: str,
    count: int | None,
    output: Path | None,
    output_format: str,
) -> None:
    """Split the logit over experts or over edges, print it and save it."""
    from ggjac.analysis.edges import attribute_edges
    from ggjac.analysis.experts import attribute_experts
    from ggjac.cli.result import finish
    from ggjac.cli.session import check_difference, note_likelier, one_token, open_session
    from ggjac.shares import largest

    session = open_session(what, position=position, output=output)
    ids = one_token(session, target), one_token(session, versus, "--versus")
    several = position if isinstance(position, str) else None
    check_difference(session, *ids, several=several is not None)
    content: dict[str, Any] = {"reconstruction": session.reconstruction().data()}
    result: Any
    if by == "edge":
        result = session.run("attribution", attribute_edges, *ids, count=max(KEPT, count or 0))
    else:
        result = session.run("attribution", attribute_experts, *ids, positions=several)
    if several is None:
        note_likelier(session, target, ids[0])
        note_likelier(session, versus, ids[1], "--versus")
    else:
        content["position"] = "all" if several == "all" else result.positions
    if output:
        session.save(output, result.tensors(), by=by, versus=ids[1])
    key, show = ("edges", show_edges) if by == "edge" else ("experts", show_experts)
    cut = partial(largest, count=count or ALL) if by == "expert" else partial(_first, count=count or ALL)
    content[key] = result.data(session.words)
    finish(session, content, output_format, output, results=[result], cut=cut, **{key: partial(show, count=count)})


def _first(table: "Table", count: int) -> "Table":
    """Return the first rows of a table, which are the largest."""
    return replace(table, columns={name: column[:count] for name, column in table.columns.items()})


def show_experts(data: dict[str, Any], count: int | None = None) -> None:
    """Print the `count` largest shares and the sum of all others, with the tokens that chose an expert."""
    from ggjac.cli.render import bar, line, table

    entries = data["positions"]
    if len(entries) > 1:
        return _experts_by_position(entries, count or AT_ONE)
    entry = entries[0]
    users = {(e["block"], e["kind"], e["expert"]): e["tokens"] for e in data["chosen_by"]}
    parts = sorted(_parts(entry), key=lambda part: -abs(part[2]))
    shown, rest = parts[: count or SHOWN], [share for *_, share in parts[count or SHOWN :] if share]
    largest = max(abs(share) for *_, share in shown) or 1.0
    rows = []
    for name, expert, share in shown:
        weight, chosen = "", ""
        if expert is not None:
            weight = f"{expert['weight']:.3f}"
            tokens = users[expert["block"], expert["kind"], expert["expert"]]
            named = sorted(tokens, key=lambda token: -token["weight"])[:NAMED]
            more = f" and {len(tokens) - len(named)} more" if len(tokens) > len(named) else ""
            chosen = ", ".join(map(display.token, named)) + more
        if share:
            rows.append((name, weight, f"{share:+.4f}", bar(share, largest), chosen))
    if rest:
        rows.append((f"{len(rest)} more: --count N or --all", "", f"{sum(rest):+.4f}", "", ""))
    rows.append(("sum", "", f"{entry['logit'] - entry['unexplained']:+.4f}", f"logit {entry['logit']:.4f}", ""))
    table(f"Share of every expert in {asked_logit(entry)}", ["", "#weight", "#share", "", "chosen by"], rows)
    line(DIRECT)


def _parts(entry: dict[str, Any]) -> list[tuple[str, dict[str, Any] | None, float]]:
    """Return all that was added to the residual stream: its name, the expert if it is one, and its share."""
    from ggjac.analysis.experts import NAMES

    parts: list[tuple[str, dict[str, Any] | None, float]] = [("embedding", None, entry["embedding"])]
    for block in entry["blocks"]:
        name = f"L{block['block']}"
        parts.append((f"{name} {block.get('mixer', 'attention')}", None, block["attn"]))
        for expert in block["experts"]:
            numbered = f"{name} {expert['kind']} {expert['expert']}"
            parts.append((numbered, expert | {"block": block["block"]}, expert["share"]))
        parts += [(f"{name} {shown}", None, block[key]) for key, shown in NAMES.items()]
    return [*parts, ("biases of norm and head", None, entry["bias"])]


def _experts_by_position(entries: list[dict[str, Any]], count: int) -> None:
    """Print a line for each position: its target, the largest shares and the sum."""
    from ggjac.cli.render import line, table

    rows = []
    for entry in entries:
        top = sorted(_parts(entry), key=lambda part: -abs(part[2]))[:count]
        shares = ", ".join(f"{name} {share:+.2f}" for name, _, share in top if share)
        total = f"{entry['logit'] - entry['unexplained']:+.4f}"
        target, logit = display.token(entry["target"]), f"{entry['logit']:.4f}"
        rows.append((entry["position"], display.token(entry), target, logit, shares, total))
    less = f", minus the logit of {display.token(entries[0]['versus'])}" if entries[0]["versus"] else ""
    columns = ["#position", "token", "target", "#logit", "largest shares", "#sum of all"]
    table(f"Share of every expert in a logit at each position{less}", columns, rows)
    line(DIRECT)


def show_edges(data: dict[str, Any], count: int | None = None) -> None:
    """Print the `count` largest edges, the positions that have most of each, and a bound on all others together."""
    from ggjac.cli.render import bar, line, table

    shown, nodes = data["edges"][: count or SHOWN], data["nodes"]
    largest = max((abs(edge["value"]) for edge in shown), default=0.0) or 1.0
    rows = []
    for edge in shown:
        most = sorted(range(len(edge["parts"])), key=lambda p: -abs(edge["parts"][p]))[:NAMED]
        places = ", ".join(f"{p} {edge['parts'][p]:+.2f}" for p in most if edge["parts"][p])
        ends = nodes[edge["source"]]["name"], nodes[edge["reader"]]["name"]
        rows.append((*ends, f"{edge['value']:+.4f}", bar(edge["value"], largest), places))
    columns = ["from", "to", "#edge", "", "at positions"]
    table(f"Largest edges in {asked_logit(data)} (mlp-path {data['mlp_path']})", columns, rows)
    left = data["size"] - sum(abs(edge["value"]) for edge in shown)
    line(
        f"{len(shown)} of {data['count']} edges: absolute values {data['size'] - left:.4g} of {data['size']:.4g}, "
        f"beside a logit of {data['logit']:.4g}; no sum of others is larger than {max(0.0, left):.4g}."
    )
    line(FROZEN)
