"""Mixtures: the share of every expert in a logit, and the tokens that chose it."""

from typing import Any

from ggjac.report.numbers import fixed, signed
from ggjac.report.schema import (
    HERE,
    MAX_BLOCKS,
    MAX_HEADS,
    Check,
    Wrong,
    agreeing,
    each,
    integer,
    number,
    record,
    spelled,
    text,
)
from ggjac.report.sections.attribute import AT_ONE, LARGEST, ROUNDING, WHOLE, WHOSE, placed, question, whole
from ggjac.report.sections.common import SHORT, Run, Section, bars, digits

NAMED = 8  # tokens that chose an expert, with the largest weights
# The other networks of a block, and constants after them.
NETWORKS = {"shared": "shared expert", "dense": "dense MLP", "rest": "rest of the MLP"}

_EXPERT = record({"kind": text, "expert": integer, "weight": number, "share": number})
_BLOCK = record(
    {"block": integer, "attn": number, "mlp": number, "experts": each(_EXPERT, most=MAX_HEADS)},
    dict.fromkeys(NETWORKS, number) | {"mixer": text},  # in place of attention
)
_ENTRY = record(
    WHOLE | {"embedding": number, "blocks": each(_BLOCK, least=1, most=MAX_BLOCKS)}, WHOSE | {"bias": number}
)
FORM: dict[str, Check] = {
    "experts": agreeing(
        record(
            {
                "positions": each(placed(whole(_ENTRY)), least=1),
                "chosen_by": each(
                    record(
                        {"block": integer, "kind": text, "expert": integer}
                        | {"tokens": each(spelled(HERE | {"weight": number}))}
                    )
                ),
            }
        ),
        lambda found, where: _check(found, where),
    )
}


def _check(found: dict[str, Any], where: str) -> None:
    """Check that outputs agree in their blocks."""
    if len({tuple(block["block"] for block in entry["blocks"]) for entry in found["positions"]}) > 1:
        raise Wrong(f"{where}.positions: blocks differ between outputs")


def _parts(entry: dict[str, Any]) -> list[dict[str, Any]]:
    """Return all that was added to the residual stream: names, shares, and what identifies an expert."""
    parts: list[dict[str, Any]] = [{"name": "Embedding", "share": entry["embedding"]}]
    for block in entry["blocks"]:
        name = f"L{block['block']}"
        parts.append({"name": f"{name} {block['mixer'] or 'attention'}", "share": block["attn"]})
        parts += [
            expert | {"name": f"{name} {expert['kind']} {expert['expert']}", "block": block["block"]}
            for expert in block["experts"]
        ]
        parts += [{"name": f"{name} {shown}", "share": block[key] or 0.0} for key, shown in NETWORKS.items()]
    return [*parts, {"name": "Biases of norm and head", "share": entry["bias"] or 0.0}]


def experts(run: Run) -> dict[str, Any] | None:
    """Prepare the largest shares of an output with the tokens that chose an expert, or a line for each output."""
    found = run.content["experts"]
    if not found:
        return None
    entries = found["positions"]
    users = {(one["block"], one["kind"], one["expert"]): one["tokens"] for one in found["chosen_by"]}
    rows = []
    for entry in entries:
        parts = sorted((part for part in _parts(entry) if part["share"]), key=lambda part: -abs(part["share"]))
        top = parts[: AT_ONE if len(entries) > 1 else 2 * LARGEST]
        shares = [part["share"] for part in parts]
        decimals, total = digits(shares), sum(shares)
        drawn, zero = bars([part["share"] for part in top])
        rows.append(
            {
                "position": entry["position"],
                "token": entry["token"],
                "target": entry["target"] and entry["target"]["token"],
                "sum": signed(total, decimals),
                "logit": fixed(entry["logit"], decimals),
                "complete": abs(entry["logit"] - total) <= ROUNDING * (sum(map(abs, shares)) or 1.0),
                "zero": zero,
                "rest": len(parts) - len(top),
                "rest_sum": signed(total - sum(part["share"] for part in top), decimals),
                "parts": [_row(part, bar, users, decimals) for part, bar in zip(top, drawn, strict=True)],
            }
        )
    return question(entries[0]) | {
        "one": rows[0] if len(rows) == 1 else None,
        "rows": rows,
        "short": len(rows) <= SHORT,
    }


def _row(
    part: dict[str, Any], bar: dict[str, str], users: dict[tuple[int, str, int], list[dict[str, Any]]], decimals: int
) -> dict[str, Any]:
    """Return a part with its bar; of an expert, its weight and the tokens that chose it, with the largest weights."""
    row = {
        "name": part["name"],
        "value": signed(part["share"], decimals),
        "less": part["share"] < 0,
        "bar": bar,
        "weight": "",
        "tokens": [],
        "more": 0,
    }
    if "expert" not in part:
        return row
    tokens = sorted(users.get((part["block"], part["kind"], part["expert"]), []), key=lambda token: -token["weight"])
    named = [token["token"] for token in tokens[:NAMED]]
    return row | {"weight": fixed(part["weight"], 3), "tokens": named, "more": len(tokens) - len(named)}


SECTIONS = (
    Section(
        "attribute-experts",
        "Experts",
        experts,
        "Direct logit attribution of mixtures: what each expert added to the residual stream, times the router’s "
        "weight, read through the frozen final norm and the LM head, or projected on a direction. The choice of "
        "experts and their weights are frozen: a share does not say what another choice would have added.",
    ),
)
