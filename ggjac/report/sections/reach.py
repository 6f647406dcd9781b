"""How far the map holds: errors of its predictions along paths of edits, and the effects of tokens left out."""

from typing import Any

from ggjac.drawing.charts import Chart, Series, from_to, logarithmic
from ggjac.report.numbers import percent
from ggjac.report.schema import (
    HERE,
    MAX_VECTORS,
    MAX_WORDS,
    TOKEN,
    Check,
    each,
    integer,
    number,
    record,
    spelled,
    text,
)
from ggjac.report.sections.common import Run, Section, capital, open_end, source_name
from ggjac.report.sections.effects import EFFECTS, effects
from ggjac.report.summary import caveat
from ggjac.units import MISSING, edit_path, minus, passing

DRAWN = 24  # paths that have a chart; the table has all

_POINT = record(
    {"t": number, "unchanged": number, "detached": number},
    {"ordinary": number, "size": number, "logit": number},
)
_PASSES = record({}, {"0.1": number, "0.5": number})
_CURVE = record(
    {"kind": text, "name": text, "points": each(_POINT, least=1, most=MAX_VECTORS)},
    {
        "token": spelled(HERE),
        "other": TOKEN,
        "layer": integer,
        "passes": record({}, {"unchanged": _PASSES, "detached": _PASSES, "ordinary": _PASSES}),
    },
)
FORM: dict[str, Check] = {
    "reach": record(
        {"target": TOKEN, "logit": number, "curves": each(_CURVE, most=MAX_WORDS)},
        {
            "versus": TOKEN,
            "softcap": number,
            "mlp_path": text,
            "seed": integer,
            "effects": EFFECTS,
            "residual": number,
            "tol": number,
        },
    ),
}
#: Predictions, as the table and the legend name them, and the tones of their lines.
PREDICTIONS = {
    "unchanged": ("no change", "faint"),
    "detached": ("detached map", "accent"),
    "ordinary": ("ordinary map", "ink"),
}


def _path(curve: dict[str, Any]) -> str:
    """Return a path of edits in words, for a heading: the name of a file or vector does not begin it."""
    kind, name, tokens = curve["kind"], curve["name"], None
    if kind == "swap" and curve["token"] and curve["other"]:
        tokens = curve["token"]["token"], curve["other"]["token"]
    name = f"direction {source_name(name)}" if kind == "direction" else name
    return edit_path(kind, name, tokens=tokens, layer=curve["layer"])


def curve_charts(run: Run) -> list[Chart]:
    """Draw the errors along each of the first paths, on logarithmic scales that all share."""
    found = run.content["reach"]
    if not found or not found["curves"]:
        return []
    drawn = found["curves"][:DRAWN]
    every = [point for curve in drawn for point in curve["points"]]
    errors = [value for point in every for name in PREDICTIONS if (value := point[name]) is not None and value > 0]
    x, y = logarithmic("step", [point["t"] for point in every]), logarithmic("relative error", errors)
    charts = []
    for i, curve in enumerate(drawn):
        series = []
        for name, (words, tone) in PREDICTIONS.items():
            points = tuple((p["t"], p[name]) for p in curve["points"] if (p[name] or 0) > 0 < p["t"])
            series.append(Series(words, points, tone))
        shown = tuple(s for s in series if s.points)
        summary = "; ".join(from_to(s.name, s.points) for s in shown) + "."
        charts.append(Chart(f"reach-{i}", capital(_path(curve)), x, y, shown, summary=summary))
    return charts


def reach(run: Run) -> dict[str, Any] | None:
    """Prepare the errors along every path, and the effects of tokens that are left out."""
    found = run.content["reach"]
    if not found:
        return None
    rows = []
    for curve in found["curves"]:
        first, last, passes = curve["points"][0], curve["points"][-1], curve["passes"] or {}
        for name, (words, _) in PREDICTIONS.items():
            if last[name] is None:
                continue
            own = passes.get(name) or {"0.1": None, "0.5": None}
            steps = [passing(own[level], first["t"], last["t"]) for level in ("0.1", "0.5")]
            rows.append(
                {
                    "path": capital(_path(curve)) if name == "unchanged" else "",
                    "prediction": words,
                    "passes": list(map(minus, steps)),
                    "errors": [percent(point[name]) for point in (first, last)],
                }
            )
    steps = [f"{found['curves'][0]['points'][i]['t']:g}" for i in (0, -1)] if found["curves"] else [MISSING] * 2
    return {
        "target": found["target"],
        "versus": found["versus"],
        "capped": bool(found["softcap"]),
        "rule": found["mlp_path"],
        "charts": curve_charts(run),
        "more": max(0, len(found["curves"]) - DRAWN),
        "rows": rows,
        "steps": steps,
        "open_end": open_end(found["residual"], found["tol"]),
        "effects": effects(found["effects"]),
        "caveat": caveat(run.content),
    }


SECTIONS = (
    Section(
        "reach",
        "How far the map holds",
        reach,
        "The map is exact at this prompt. At changed embeddings it is a prediction of the output, as is that of the "
        "ordinary Jacobian, the derivative; the model itself computes what becomes of the output. “No change” predicts "
        "the prompt’s own output: a map whose error is not below that says nothing about such a change.",
        curve_charts,
    ),
)
