"""What heads read: their direct shares in a logit by source position, beside the rows of their patterns."""

from typing import Any

from ggjac.drawing.charts import Heat, Panel
from ggjac.report.numbers import signed
from ggjac.report.schema import (
    HERE,
    MAX_HEADS,
    TOKEN,
    Check,
    Wrong,
    agreeing,
    each,
    integer,
    maybe,
    number,
    record,
    spelled,
    text,
)
from ggjac.report.sections.common import LEGEND, MAX_CELLS, SHORT, Run, Section, digits, heat
from ggjac.units import power

#: Σ shares of sources + constant + unexplained = share.
_HEAD = record(
    {
        "layer": integer,
        "head": integer,
        "mixer": text,
        "share": number,
        "sources": each(spelled(HERE | {"share": number, "weight": maybe(number)}), least=1),
    },
    {"constant": number, "unexplained": number},
)
_READS = record({"target": TOKEN, "heads": each(_HEAD, least=1, most=MAX_HEADS)}, {"versus": TOKEN, "softcap": number})


def _check(found: dict[str, Any], where: str) -> None:
    """Check that all heads have the same positions."""
    places = {tuple(source["position"] for source in head["sources"]) for head in found["heads"]}
    if len(places) > 1:
        raise Wrong(f"{where}.heads: heads differ in the positions that they read")


FORM: dict[str, Check] = {"reads": agreeing(_READS, _check)}


def _name(head: dict[str, Any]) -> str:
    return f"L{head['layer']}H{head['head']}"


def reads_grid(run: Run) -> list[Heat]:
    """Draw the pattern's row and the shares of each head by source position."""
    found = run.content["reads"]
    if not found:
        return []
    sources = found["heads"][0]["sources"]
    tokens, names = (
        tuple(source["token"] for source in sources),
        tuple(f"{source['position']} {source['token']}" for source in sources),
    )
    panels = tuple(
        Panel(
            title,
            tokens,
            tuple(f"{title}, {name}" for name in names),
            tuple(tuple(source[part] for source in head["sources"]) for head in found["heads"]),
        )
        for part, title in (("weight", "pattern"), ("share", "share in the logit"))
    )
    grid = Heat(
        key="attribute-reads",
        title=f"What heads read, in the logit of {found['target']['token']}",
        label="head",
        rows=tuple(map(_name, found["heads"])),
        panels=panels,
        summary=f"{len(found['heads'])} heads; on the left where each looks, on the right what it reads there adds.",
        tilted=True,
    )
    return [grid] if grid.cells <= MAX_CELLS else []


def reads(run: Run) -> dict[str, Any] | None:
    """Prepare what heads read."""
    found = run.content["reads"]
    if not found:
        return None
    decimals = digits([source["share"] for head in found["heads"] for source in head["sources"]])
    rows = [
        {
            "name": _name(head),
            "mixer": head["mixer"],
            "foremost": [
                (source["token"], source["position"], signed(source["share"], decimals))
                for source in sorted(head["sources"], key=lambda source: -abs(source["share"]))[:3]
            ],
            "constant": signed(head["constant"], decimals) if head["constant"] else "",
            "share": signed(head["share"], decimals),
            "rest": power(
                head["share"] - sum(source["share"] for source in head["sources"]) - (head["constant"] or 0.0)
            ),
        }
        for head in found["heads"]
    ]
    return {
        "target": found["target"],
        "versus": found["versus"],
        "capped": bool(found["softcap"]),
        "heats": [heat(grid) for grid in reads_grid(run)],
        "rows": rows,
        "constants": any(row["constant"] for row in rows),
        "short": len(found["heads"]) * len(found["heads"][0]["sources"]) <= 4 * SHORT,
        "legend": LEGEND,
    }


SECTIONS = (
    Section(
        "attribute-reads",
        "What heads read",
        reads,
        "A head’s direct share in a logit, split by the position whose value it reads: pattern × value × output, "
        "without remainder. Where a head looks and what it reads there need not agree.",
        reads_grid,
    ),
)
