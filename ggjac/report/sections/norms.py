"""The longest columns and rows of the dense map at each position, in tokens."""

from typing import Any

from ggjac.drawing.charts import Chart, Series, curves, from_to, known
from ggjac.report.schema import HERE, MAX_VECTORS, WORDS, Check, each, integer, maybe, number, record, spelled
from ggjac.report.sections.common import WHOLE, WORDS_SHOWN, Run, Section
from ggjac.units import power

_LONGEST = each(record({"norm": maybe(number), "tokens": WORDS}, {"component": integer}), most=MAX_VECTORS)
_POSITION = {
    "columns": _LONGEST,  # the longest first, with the tokens that each promotes
    "rows": _LONGEST,  # the longest first, with the embeddings nearest to each
}
FORM: dict[str, Check] = {
    "norms": record({"positions": each(spelled(HERE | _POSITION))}),
}


def longest(run: Run) -> list[Chart]:
    """Draw the norm of the longest column and of the longest row at each position, in both scales."""
    entries = (run.content["norms"] or {}).get("positions") or []
    series = [
        Series(words, known((e["position"], e[side][0]["norm"]) for e in entries if e[side]), tone)
        for side, words, tone in (("columns", "longest column", "accent"), ("rows", "longest row", "ink"))
    ]
    summary = "; ".join(from_to(s.name, s.points) for s in series) + "."
    return curves("norms", "Longest column and row by position", ("position", "norm"), series, summary)


def norms(run: Run) -> dict[str, Any] | None:
    """Prepare the longest columns and rows of the dense map at each position."""
    entries = (run.content["norms"] or {}).get("positions")
    if not entries:
        return None
    count, words = (None, None) if len(entries) <= WHOLE else (1, WORDS_SHOWN)

    def lengths(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [
            {
                "component": "" if row["component"] is None else str(row["component"]),
                "norm": power(row["norm"], 3),
                "tokens": row["tokens"][:words],
            }
            for row in rows[:count]
        ]

    return {
        "charts": longest(run),
        "open": len(entries) <= WHOLE,
        "positions": [
            {
                "position": entry["position"],
                "token": entry["token"],
                "sides": [("Columns", lengths(entry["columns"])), ("Rows", lengths(entry["rows"]))],
            }
            for entry in entries
        ],
    }


SECTIONS = (
    Section(
        "norms",
        "Long columns and rows",
        norms,
        "A column of the dense map is the effect of one component of an embedding on the output; a row is the "
        "direction of the embedding that one component of the output reads. The longest ones at each position, decoded "
        "to tokens.",
        longest,
    ),
)
