"""Measured effects of tokens that are left out, beside their scores: a table that several sections have."""

from typing import Any

from ggjac.report.numbers import fixed, signed
from ggjac.report.schema import HERE, Check, each, number, record, spelled, text
from ggjac.report.sections.common import bars, capital, digits
from ggjac.units import PLACES, SCORES

_AGREED = record({}, {"signed": number, "sizes": number})  # rank correlations with the effects, and of absolute values
EFFECTS: Check = record(
    {
        "by": text,
        "tokens": each(spelled(HERE | {"effect": number}, dict.fromkeys(SCORES, number)), least=1),
        "agreement": record({}, dict.fromkeys(SCORES, _AGREED)),
    },
    {"mlp_path": text},
)


def effects(found: dict[str, Any] | None) -> dict[str, Any] | None:
    """Prepare the table of effects, one row for each token, and the agreement of each score under it."""
    if not found:
        return None
    rows = found["tokens"]
    names = [name for name in SCORES if all(row[name] is not None for row in rows)]
    drawn, zero = bars([row["effect"] for row in rows])
    decimals = {name: digits([row[name] for row in rows]) - 1 for name in ("effect", *names)}
    rule = f" Share: of mlp-path {found['mlp_path']}." if found["mlp_path"] and "share" in names else ""
    agreed = [found["agreement"][name] or {"signed": None, "sizes": None} for name in names]
    return {
        "headings": [capital(SCORES[name].replace(" x ", " × ")) for name in names],
        "rows": [
            {
                "position": row["position"],
                "token": row["token"],
                "effect": signed(row["effect"], decimals["effect"]),
                "scores": [signed(row[name], decimals[name]) for name in names],
                "bar": bar,
                "less": row["effect"] < 0,
            }
            for row, bar in zip(rows, drawn, strict=True)
        ],
        "zero": zero,
        "agreement": [
            (words, [fixed(each[part], 2) for each in agreed])
            for words, part in ((f"Rank correlation, {len(rows)} tokens", "signed"), ("of absolute values", "sizes"))
        ],
        "note": f"Effect: the logit, minus that without the token; {PLACES.get(found['by'], found['by'])}.{rule}",
    }
