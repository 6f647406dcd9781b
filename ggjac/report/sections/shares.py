"""What a logit is made of: shares of input tokens, at one position or at all, and of branches and heads."""

from typing import Any

from ggjac.report import charts
from ggjac.report.load import Run
from ggjac.report.numbers import fixed, percent, power, signed
from ggjac.report.sections.common import LEGEND, LEVELS, ROUNDING, SHORT, bars, digits, heat

LARGEST = 12  # parts in the table of the largest ones
AT_ONE = 3  # the same, of each of many positions

Part = tuple[str, float]


def attribution(run: Run) -> dict[str, Any] | None:
    """Prepare the exact shares of the input tokens in a logit, or in what sets two apart.

    `attribution`: `{"target": {"id", "token"}, "versus", "logit", "softcap", "shares": [{"position", "token",
    "share"}], "offset", "unexplained"}`, with Σ shares + offset + unexplained = logit; `versus` is the token whose
    logit was subtracted, or null.
    """
    found = run.content["attribution"]
    if not found:
        return None
    shares = [s["share"] for s in found["shares"]]
    largest = max(map(abs, shares)) or 1.0
    offset = found["offset"] or 0.0
    drawn, zero = bars(shares)
    decimals = digits(shares)

    return _asked(found) | {
        "largest": fixed(largest, 2),
        "rows": [
            s
            | {
                "value": signed(s["share"], decimals),
                "percent": _relative(s["share"], found),
                "level": round(LEVELS * s["share"] / largest),
                "bar": bar,
            }
            for s, bar in zip(found["shares"], drawn, strict=True)
        ],
        "offset": signed(offset, decimals),
        "offset_percent": _relative(offset, found),
        "equation": _equation(found, [*shares, offset]),
        "zero": zero,
        "short": len(found["shares"]) <= SHORT,
        "legend": LEGEND,
    }


def _asked(entry: dict[str, Any]) -> dict[str, Any]:
    """Return what was split."""
    return {
        "target": entry["target"],
        "versus": entry["versus"],
        "capped": bool(entry["softcap"]),
        "relative": entry["logit"] > 0 and not entry["versus"],
    }


def _relative(share: float, entry: dict[str, Any]) -> str:
    return percent(share / entry["logit"]) if _asked(entry)["relative"] else ""


def _equation(entry: dict[str, Any], parts: list[float]) -> dict[str, Any]:
    """Return the sum of all parts beside the logit."""
    decimals, total = digits(parts), sum(parts)
    return {
        "sum": signed(total, decimals),
        "logit": fixed(entry["logit"], decimals),
        "unexplained": power(entry["logit"] - total),
        "complete": abs(entry["logit"] - total) <= ROUNDING * (sum(map(abs, parts)) or 1.0),
    }


def branch_parts(entry: dict[str, Any]) -> list[Part]:
    """Return everything that was added to the stream, by name: heads where they are known, else attention."""
    parts = [("Embedding", entry["embedding"])]
    for block in entry["blocks"]:
        name = f"Block {block['block']}"
        if block["heads"] is None:
            parts.append((f"{name}, attention", block["attn"]))
        else:
            parts += [(f"{name}, head {i}", share) for i, share in enumerate(block["heads"])]
            parts.append((f"{name}, bias of attention", block["attn_bias"] or 0.0))
        parts.append((f"{name}, MLP", block["mlp"]))
    return [*parts, ("Biases of norm and head", entry["bias"] or 0.0)]


def branches(run: Run) -> dict[str, Any] | None:
    """Prepare the exact shares of every block's attention, MLP and heads in a logit.

    `branches`: `{"target", "versus", "logit", "softcap", "embedding", "blocks": [{"block", "attn", "mlp", "heads",
    "attn_bias"}], "bias", "unexplained"}`: what the final norm, frozen, and the LM head read from what each part added
    to the stream at the output position; `heads` (optional) are those of a block, `attn_bias` what its attention adds
    for no head. Everything sums to the logit.
    """
    found = run.content["branches"]
    if not found:
        return None
    parts, blocks = branch_parts(found), found["blocks"]
    totals: list[Part] = [
        ("Embedding", found["embedding"]),
        ("Attention, all blocks", sum(_attention(block) for block in blocks)),
        ("MLP, all blocks", sum(block["mlp"] for block in blocks)),
        ("Biases of norm and head", found["bias"] or 0.0),
    ]
    largest = sorted((part for part in parts if part[1]), key=lambda part: -abs(part[1]))[:LARGEST]
    grids = charts.branch_grid(run)
    decimals = digits([share for _, share in parts])
    return _asked(found) | {
        "totals": _rows([part for part in totals if part[1] or part[0] != totals[-1][0]], found, decimals),
        "largest": _rows(largest, found, decimals),
        "rest": len([part for part in parts if part[1]]) - len(largest),
        "rest_sum": signed(sum(s for _, s in parts) - sum(s for _, s in largest), decimals),
        "heats": [heat(grid) for grid in grids],
        "lines": charts.branch_lines(run),
        "table": None if grids else _block_table(found),
        "equation": _equation(found, [share for _, share in parts]),
        "legend": LEGEND,
        "short": len(blocks) <= SHORT and sum(len(block["heads"] or ()) for block in blocks) <= 4 * SHORT,
    }


def _attention(block: dict[str, Any]) -> float:
    """Return what attention added: the sum of its heads, where they are known."""
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


def _block_table(entry: dict[str, Any]) -> list[tuple[int, str, str]]:
    """Return what each block's attention and MLP added."""
    decimals = digits([block[kind] for block in entry["blocks"] for kind in ("attn", "mlp")])
    return [(b["block"], signed(b["attn"], decimals), signed(b["mlp"], decimals)) for b in entry["blocks"]]


def positions(run: Run) -> dict[str, Any] | None:
    """Prepare the shares in the logits of all positions.

    `attribution`: `{"by": "token" | "layer" | "head", "positions": [...]}`, an entry for each output position, of the
    form of `attribution` or of `branches`, each with its `position` and the `token` there; targets may differ.
    """
    found = run.content["everywhere"]
    if not found:
        return None
    rows = []
    for entry in found["entries"]:
        if found["by"] == "token":
            parts = [(f"{s['token']} at {s['position']}", s["share"]) for s in entry["shares"]]
            parts.append(("Offset (biases)", entry["offset"] or 0.0))
        else:
            parts = branch_parts(entry)
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
    grids = charts.position_grid(run)
    return {
        "rows": rows,
        "heats": [heat(grid) for grid in grids],
        "of": {"token": "input token", "layer": "block's branches", "head": "head and MLP"}[found["by"]],
        "versus": found["entries"][0]["versus"],
        "complete": all(row["complete"] for row in rows),
        "short": len(rows) <= SHORT,
        "legend": LEGEND,
    }
