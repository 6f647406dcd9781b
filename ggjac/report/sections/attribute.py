"""The parts of a logit: input tokens, at one position or at all, and blocks and heads (direct logit attribution).

Or those of a projection on a direction, in place of a logit.
"""

from typing import Any

from ggjac.drawing.charts import PARTS, Bars, Chart, Heat, Panel, Series, curves, from_to, known
from ggjac.report.numbers import fixed, percent, signed
from ggjac.report.schema import (
    HERE,
    MAX_BLOCKS,
    MAX_HEADS,
    SINK,
    TOKEN,
    Check,
    Wrong,
    agreeing,
    each,
    integer,
    maybe,
    number,
    one_of,
    record,
    spelled,
    text,
    wrong,
)
from ggjac.report.sections.common import LEGEND, LEVELS, MAX_CELLS, SHORT, Run, Section, bars, digits, heat, sink
from ggjac.report.sections.effects import EFFECTS, effects
from ggjac.report.sections.layers import KINDS
from ggjac.report.summary import caveat, remark
from ggjac.units import power

LARGEST = 12  # parts in the table of the largest ones
MANY, FIRST = 64, 20  # tokens above which a prompt is folded, and the largest shares shown then
AT_ONE = 3  # the same, of each of many positions
ROUNDING = 5e-2  # of Σ|shares|: the difference from the logit that 16-bit dtypes may leave

Part = tuple[str, float]

WHOLE = {"target": TOKEN, "logit": number}  # the logit, minus that of `versus`
#: In place of both: a projection, its name, and what there is to say of the direction.
_FACTS = {"entropy": number, "eigenvalue": number, "all_eigenvalues": number, "residual": number}
_PROJECTION = record({"value": number, "words": text, "direction": record({"kind": text, "norm": number}, _FACTS)}, {})
WHOSE = {
    "versus": TOKEN,
    "softcap": number,  # the logit is the one before it
    "unexplained": number,  # the rest, left by rounding
}


def whole(entry: Check) -> Check:
    """Accept an entry of a logit, or one of a projection: it then has no target, and `logit` is the projection."""

    def check(value: Any, where: str) -> dict[str, Any]:
        if not isinstance(value, dict) or value.get("projection") is None:
            return entry(value, where) | {"projection": None}
        along = _PROJECTION(value["projection"], f"{where}.projection")
        same = {"target": {"id": 0, "text": ""}, "versus": None, "softcap": None, "logit": along["value"]}
        return entry(value | same, where) | {"target": None, "projection": along}

    return check


#: Σ shares + offset + unexplained = logit; no shares where all tokens up to a position are excluded.
_BY_TOKEN = WHOLE | {"shares": each(spelled(HERE | {"share": number}))}
#: offset: of biases, and of excluded positions, whose shares are known; sink: of the logit.
_OFFSET = {
    "offset": number,
    "sink": SINK,
    "mlp_path": text,
    "excluded": each(spelled(HERE | {"share": number})),
}
_SHARES = record(
    _BY_TOKEN,
    WHOSE
    | _OFFSET
    | {
        "effects": EFFECTS,  # of leaving each token out
        "other_rule": whole(record(_BY_TOKEN, WHOSE | _OFFSET)),  # the same logit under the other freezing rule
        "agreement": record({"difference": number, "size": number}, {"spearman": number}),  # of both
    },
)
#: `attn` is Σ heads + attn_bias; embedding + Σ (attn + mlp) + bias + unexplained = logit.
_BLOCK = record(
    {"block": integer, "attn": number, "mlp": number},
    {
        "heads": each(number, most=MAX_HEADS),
        "attn_bias": number,
        "mixer": text,  # in place of attention
        "head_names": each(text, most=MAX_HEADS),
    },
)
_BRANCHES = record(
    WHOLE | {"embedding": number, "blocks": each(_BLOCK, least=1, most=MAX_BLOCKS)},
    WHOSE | {"bias": number},  # of the final norm and the LM head
)


def attribution(value: Any, where: str) -> dict[str, Any]:
    """Accept the parts of a logit, or of those of several positions, by token, layer or head.

    Returns:
        `{"by", "one", "positions"}`: the entry of one position or None, those of several or None.
    """
    if not isinstance(value, dict):
        raise wrong(where, "an object", value)
    by = one_of("token", "layer", "head")("token" if value.get("by") is None else value["by"], f"{where}.by")
    entry = whole(_SHARES if by == "token" else _BRANCHES)
    several = value.get("positions")
    return {
        "by": by,
        "one": entry(value, where) if several is None or {"target", "projection"} & value.keys() else None,
        "positions": maybe(each(placed(entry), least=1))(several, f"{where}.positions"),
    }


def placed(entry: Check) -> Check:
    """Accept an entry that names its position."""
    return lambda value, where: spelled(HERE)(value, where) | entry(value, where)


def _check_blocks(entries: list[dict[str, Any]], where: str) -> None:
    """Check that entries agree in their blocks and heads, blocks in whether heads are known, and names with heads."""
    forms = {tuple(None if b["heads"] is None else len(b["heads"]) for b in entry["blocks"]) for entry in entries}
    if len(forms) > 1 or len({count is None for form in forms for count in form}) > 1:
        raise Wrong(f"{where}: blocks differ in their number, or in that of their heads")
    for block in [block for entry in entries for block in entry["blocks"] if block["head_names"] is not None]:
        if len(block["head_names"]) != len(block["heads"] or ()):
            raise Wrong(f"{where}: block {block['block']} has names for other heads than it has")


def _check_attribution(found: dict[str, Any], where: str) -> None:
    one = found["one"]
    if found["by"] == "token" and one and not one["shares"]:
        raise wrong(f"{where}.shares", "a list of 1 or more", [])
    if found["by"] == "token" and one and (other := one["other_rule"]) and len(other["shares"]) != len(one["shares"]):
        raise Wrong(f"{where}.other_rule: {len(other['shares'])} shares for {len(one['shares'])} tokens")
    if found["by"] != "token":
        _check_blocks([found["one"]] if found["one"] else [], where)
        _check_blocks(found["positions"] or [], where)


FORM: dict[str, Check] = {
    "attribution": agreeing(attribution, _check_attribution),
    "branches": agreeing(whole(_BRANCHES), lambda found, where: _check_blocks([found], where)),
}


def _by_token(run: Run) -> dict[str, Any] | None:
    """Return the shares of input tokens at one position."""
    given = run.content["attribution"]
    return given["one"] if given and given["by"] == "token" else None


def _by_branch(run: Run) -> dict[str, Any] | None:
    """Return the shares of blocks and heads at one position, which `analyze` saves as a part of their own."""
    given = run.content["attribution"]
    return run.content["branches"] or (given["one"] if given and given["by"] != "token" else None)


def _several(run: Run) -> dict[str, Any] | None:
    """Return the shares at several positions."""
    given = run.content["attribution"]
    return given if given and given["positions"] else None


# -- shared by the sections --------------------------------------------------------------------------------------------


def asked(entry: dict) -> str:
    """Return the name of the logit, of the difference of two, or of the projection, that is split."""
    if entry.get("projection"):
        return entry["projection"]["words"]
    less = f", minus that of {entry['versus']['token']}" if entry["versus"] else ""
    return f"the logit of {entry['target']['token']}{less}"


def question(entry: dict[str, Any]) -> dict[str, Any]:
    """Return what is split, as the templates name it."""
    along = entry.get("projection")
    return {
        "along": along and {"words": along["words"], "remark": remark(along["direction"])},
        "target": entry["target"],
        "versus": entry["versus"],
        "capped": bool(entry["softcap"]),
        "relative": entry["logit"] > 0 and not entry["versus"] and not along,
    }


def _relative(share: float, entry: dict[str, Any]) -> str:
    return percent(share / entry["logit"]) if question(entry)["relative"] else ""


def _equation(entry: dict[str, Any], parts: list[float]) -> dict[str, Any]:
    """Return the sum of all parts, the logit and their difference."""
    decimals, total = digits(parts), sum(parts)
    return {
        "sum": signed(total, decimals),
        "logit": fixed(entry["logit"], decimals),
        "unexplained": power(entry["logit"] - total),
        "complete": abs(entry["logit"] - total) <= ROUNDING * (sum(map(abs, parts)) or 1.0),
    }


def _branch_parts(entry: dict[str, Any]) -> list[Part]:
    """Return every part of the residual stream by name: heads where they are known, else attention."""
    parts = [("Embedding", entry["embedding"])]
    for block in entry["blocks"]:
        name = f"L{block['block']}"
        if block["heads"] is None:
            parts.append((f"{name} {_mixer(block)}", block["attn"]))
        else:
            heads = block["head_names"]
            heads = [f" {head}" for head in heads] if heads else [f"H{i}" for i in range(len(block["heads"]))]
            parts += [(f"{name}{head}", share) for head, share in zip(heads, block["heads"], strict=True)]
            parts.append((f"{name} bias of {_mixer(block)}", block["attn_bias"] or 0.0))
        parts.append((f"{name} MLP", block["mlp"]))
    return [*parts, ("Biases of norm and head", entry["bias"] or 0.0)]


def _mixer(block: dict[str, Any]) -> str:
    """Return the name of what mixes positions in a block."""
    return "attention" if block["mixer"] is None else block["mixer"]


def _kinds(entry: dict[str, Any]) -> dict[str, str]:
    """Return the names of both branches of all blocks: not every model has attention alone."""
    attends = all(block["mixer"] is None for block in entry["blocks"])
    return {"attn": KINDS["attn"] if attends else "token mixers", "mlp": KINDS["mlp"]}


# -- input tokens ------------------------------------------------------------------------------------------------------


def token_bars(run: Run) -> list[Bars]:
    """Draw the shares of the input tokens."""
    found = _by_token(run)
    if not found:
        return []
    other = found["other_rule"]
    return [
        Bars(
            key="attribute" if rule is found else "attribute-other-rule",
            title=f"Shares in {asked(found)}" + (f", mlp-path {rule['mlp_path']}" if other else ""),
            label="share; all shares and the offset sum to the "
            f"{'projection' if found['projection'] else 'logit'} {rule['logit']:.4f}",
            names=[share["token"] for share in rule["shares"]],
            values=[share["share"] for share in rule["shares"]],
        )
        for rule in (found, other)
        if rule
    ]


def attribute(run: Run) -> dict[str, Any] | None:
    """Prepare the exact shares of the input tokens in a logit, or in the difference of two."""
    found = _by_token(run)
    if not found:
        return None
    shares = [s["share"] for s in found["shares"]]
    largest = max(map(abs, shares), default=0.0) or 1.0
    offset = found["offset"] or 0.0
    drawn, zero = bars(shares)
    decimals = digits(shares)
    other = found["other_rule"]
    beside = [s["share"] for s in other["shares"]] if other else [None] * len(shares)
    rows = [
        s
        | {
            "value": signed(s["share"], decimals),
            "other": signed(second, decimals),
            "percent": _relative(s["share"], found),
            "level": round(LEVELS * s["share"] / largest),
            "bar": bar,
        }
        for s, second, bar in zip(found["shares"], beside, drawn, strict=True)
    ]
    excluded = [s | {"value": signed(s["share"], decimals)} for s in found["excluded"] or []]
    foremost = sorted(rows, key=lambda row: -abs(row["share"]))[:FIRST] if len(rows) > MANY else []
    return question(found) | {
        "largest": fixed(largest, 2),
        "rows": rows,
        "foremost": foremost,
        "others": signed(sum(shares) - sum(row["share"] for row in foremost), decimals),
        "both": _both(found, foremost),
        "stream": _stream(rows, excluded),
        "whole": _stream(rows, excluded, coloured=True),
        "excluded": excluded,
        "offset": signed(offset, decimals),
        "offset_percent": _relative(offset, found),
        "equation": _equation(found, [*shares, offset]),
        "zero": zero,
        "sink": sink(found["sink"]),
        "caveat": caveat(run.content),
        "effects": effects(found["effects"]),
        "short": len(found["shares"]) <= SHORT,
        "legend": LEGEND,
    }


def _stream(
    rows: list[dict[str, Any]], excluded: list[dict[str, Any]], *, coloured: bool = False
) -> list[dict[str, Any]]:
    """Return the tokens of a prompt in order, with their colours: those that are excluded have one only if asked.

    With theirs, the scale is that of all shares.
    """
    if not coloured:
        out = [s | {"level": None, "value": f"{s['value']}, in the offset", "percent": ""} for s in excluded]
        return sorted([*rows, *out], key=lambda row: row["position"])
    largest = max((abs(s["share"]) for s in (*rows, *excluded)), default=0.0) or 1.0
    levels = [s | {"level": round(LEVELS * s["share"] / largest), "percent": ""} for s in (*rows, *excluded)]
    return sorted(levels, key=lambda row: row["position"])


def _both(found: dict[str, Any], foremost: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Prepare the shares under the other freezing rule, beside those of the first; None where there are none."""
    other, agreement = found["other_rule"], found["agreement"]
    if not other:
        return None
    shares = {s["position"]: s["share"] for s in other["shares"]}
    decimals = digits([s["share"] for s in found["shares"]])
    offset = other["offset"] or 0.0
    return {
        "names": (found["mlp_path"] or "one", other["mlp_path"] or "the other"),
        "others": signed(sum(shares.values()) - sum(shares[row["position"]] for row in foremost), decimals),
        "offset": signed(offset, decimals),
        "equation": _equation(other, [*shares.values(), offset]),
        "spearman": agreement and fixed(agreement["spearman"], 2),
        "difference": agreement and fixed(agreement["difference"], decimals),
        "size": agreement and fixed(agreement["size"], decimals),
    }


# -- blocks and heads --------------------------------------------------------------------------------------------------


def branch_lines(run: Run) -> list[Chart]:
    """Draw the shares of each block's attention and MLP by depth."""
    given = _by_branch(run)
    if not given:
        return []
    series = [
        Series(name, known((block["block"], block[kind]) for block in given["blocks"]), PARTS[kind])
        for kind, name in _kinds(given).items()
    ]
    summary = "; ".join(from_to(s.name, s.points) for s in series) + "."
    title = f"Shares in {asked(given)} by block"
    return curves("attribute-branches", title, ("block", "share"), series, summary, log=False)


def branch_grid(run: Run) -> list[Heat]:
    """Draw the shares of every block's attention, MLP and heads; nothing where the heads are not known or too many."""
    given = _by_branch(run)
    if not given or not any(block["heads"] for block in given["blocks"]):
        return []
    blocks, count = given["blocks"], max(len(block["heads"]) for block in given["blocks"])
    names = tuple(_kinds(given).values())
    sides = Panel(
        " and ".join(names),
        ("attn", "MLP"),
        names,
        tuple((block["attn"], block["mlp"]) for block in blocks),
        max(1, round(count / 20)),
    )
    heads = Panel(
        "heads",
        tuple(map(str, range(count))),
        tuple(f"head {i}" for i in range(count)),
        tuple((*block["heads"], *[0.0] * (count - len(block["heads"]))) for block in blocks),
    )
    largest = max(((abs(s), b["block"], i) for b in blocks for i, s in enumerate(b["heads"])), default=(0.0, 0, 0))
    grid = Heat(
        key="attribute-branches-heads",
        title=f"Shares in {asked(given)} by block and head",
        label="block",
        rows=tuple(f"L{block['block']}" for block in blocks),
        panels=(sides, heads),
        summary=f"{len(blocks)} blocks of up to {count} heads; the largest share of a head is that of "
        f"L{largest[1]}H{largest[2]}.",
    )
    return [grid] if grid.cells <= MAX_CELLS else []


def branch_drawings(run: Run) -> list[Chart | Heat]:
    """Return the figures of blocks and heads."""
    return [*branch_lines(run), *branch_grid(run)]


def branches(run: Run) -> dict[str, Any] | None:
    """Prepare the exact shares of every block's attention, MLP and heads in a logit."""
    found = _by_branch(run)
    if not found:
        return None
    parts, blocks = _branch_parts(found), found["blocks"]
    totals: list[Part] = [
        ("Embedding", found["embedding"]),
        (f"{_kinds(found)['attn'].capitalize()}, all blocks", sum(_attention(block) for block in blocks)),
        ("MLP, all blocks", sum(block["mlp"] for block in blocks)),
        ("Biases of norm and head", found["bias"] or 0.0),
    ]
    largest = sorted((part for part in parts if part[1]), key=lambda part: -abs(part[1]))[:LARGEST]
    grids = branch_grid(run)
    decimals = digits([share for _, share in parts])
    return question(found) | {
        "totals": _rows([part for part in totals if part[1] or part[0] != totals[-1][0]], found, decimals),
        "largest": _rows(largest, found, decimals),
        "rest": len([part for part in parts if part[1]]) - len(largest),
        "rest_sum": signed(sum(s for _, s in parts) - sum(s for _, s in largest), decimals),
        "heats": [heat(grid) for grid in grids],
        "lines": branch_lines(run),
        "table": None if grids else _block_table(found),
        "caveat": caveat(run.content, "layer"),
        "mixing": _kinds(found)["attn"],
        "equation": _equation(found, [share for _, share in parts]),
        "legend": LEGEND,
        "short": len(blocks) <= SHORT and sum(len(block["heads"] or ()) for block in blocks) <= 4 * SHORT,
    }


def _attention(block: dict[str, Any]) -> float:
    """Return the share of a block's attention: the sum of its heads, where they are known."""
    return block["attn"] if block["heads"] is None else sum(block["heads"]) + (block["attn_bias"] or 0.0)


def _rows(parts: list[Part], entry: dict[str, Any], decimals: int) -> list[dict[str, Any]]:
    """Return named shares with their bars."""
    shares = [share for _, share in parts]
    drawn, zero = bars(shares)
    return [
        {
            "name": name,
            "value": signed(share, decimals),
            "percent": _relative(share, entry),
            "less": share < 0,
            "bar": bar,
            "zero": zero,
        }
        for (name, share), bar in zip(parts, drawn, strict=True)
    ]


def _block_table(entry: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return the shares of each block's attention and MLP."""
    decimals = digits([block[kind] for block in entry["blocks"] for kind in ("attn", "mlp")])
    return [(f"L{b['block']}", signed(b["attn"], decimals), signed(b["mlp"], decimals)) for b in entry["blocks"]]


# -- several positions -------------------------------------------------------------------------------------------------


def position_grid(run: Run) -> list[Heat]:
    """Draw the shares in the logits of several positions: of every earlier token, or of the branches of every block."""
    given = _several(run)
    if not given:
        return []
    entries = given["positions"]
    rows = tuple(f"{entry['position']} {entry['token']}" for entry in entries)
    if given["by"] == "token":
        places = {s["position"]: s["token"] for entry in entries for s in entry["shares"]}
        order = sorted(places)
        shares = [{s["position"]: s["share"] for s in entry["shares"]} for entry in entries]
        tokens = tuple(places[i] for i in order)
        values = tuple(tuple(share.get(i) for i in order) for share in shares)
        names = tuple(f"{i} {places[i]}" for i in order)
        panels: tuple[Panel, ...] = (Panel("input tokens", tokens, names, values),)
    else:
        blocks = [block["block"] for block in entries[0]["blocks"]]
        panels = tuple(
            Panel(
                name,
                tuple(map(str, blocks)),
                tuple(f"L{i} {name}" for i in blocks),
                tuple(tuple(block[kind] for block in entry["blocks"]) for entry in entries),
            )
            for kind, name in _kinds(entries[0]).items()
        )
    grid = Heat(
        key="attribute-positions",
        title="Shares in the logit of each position",
        label="position",
        rows=rows,
        panels=panels,
        summary=f"{len(rows)} positions; each row is one prediction.",
        tilted=given["by"] == "token",
    )
    return [grid] if 0 < grid.cells <= MAX_CELLS else []


def positions(run: Run) -> dict[str, Any] | None:
    """Prepare the shares in the logits of several positions."""
    found = _several(run)
    if not found:
        return None
    rows = []
    for entry in found["positions"]:
        if found["by"] == "token":
            parts = [(f"{s['token']} at {s['position']}", s["share"]) for s in entry["shares"]]
            parts.append(("Offset", entry["offset"] or 0.0))
        else:
            parts = _branch_parts(entry)
        largest = sorted((part for part in parts if part[1]), key=lambda part: -abs(part[1]))[:AT_ONE]
        equation = _equation(entry, [share for _, share in parts])
        rows.append(
            {
                "position": entry["position"],
                "token": entry["token"],
                "target": entry["target"]["token"],
                "largest": [(name, signed(share, 2)) for name, share in largest],
            }
            | equation
        )
    grids = position_grid(run)
    return {
        "rows": rows,
        "heats": [heat(grid) for grid in grids],
        "of": {"token": "input token", "layer": "block's branches", "head": "head and MLP"}[found["by"]],
        "versus": found["positions"][0]["versus"],
        "caveat": caveat(run.content, found["by"]),
        "complete": all(row["complete"] for row in rows),
        "short": len(rows) <= SHORT,
        "legend": LEGEND,
    }


SECTIONS = (
    Section(
        "attribute",
        "Attribution",
        attribute,
        "At this prompt the output is exactly a linear map of the input embeddings, plus an offset from biases. So a "
        "logit, or the projection on a direction, splits into one share for each input token and one for the offset, "
        "without remainder.",
        token_bars,
    ),
    Section(
        "attribute-branches",
        "Blocks and heads",
        branches,
        "Direct logit attribution: the logit, split by what each head and MLP adds to the residual stream, "
        "read through the frozen final norm and the LM head; or the projection on a direction, split likewise. "
        "Point at a cell, or use the arrow keys, to see its value.",
        branch_drawings,
    ),
    Section(
        "attribute-positions",
        "Each position",
        positions,
        "Each row splits the logit of one position’s own prediction. Point at a cell, or use the arrow keys, to see "
        "its value.",
        position_grid,
    ),
)
