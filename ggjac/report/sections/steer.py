"""Activation steering: the steered texts, and the baseline without it."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ggjac.drawing.charts import Chart, Series, curves, from_to, linear
from ggjac.report.numbers import fixed, percent, signed
from ggjac.report.schema import (
    HERE,
    MAX_VECTORS,
    NUMBERS,
    TOKEN,
    Check,
    each,
    flag,
    integer,
    number,
    record,
    spelled,
    text,
)
from ggjac.report.sections.common import SHORT, Run, Section, open_end, source_name
from ggjac.units import MISSING, minus, power

_TEXT = record(
    {"strength": number, "text": text},
    {
        "tokens": each(spelled({})),
        "kl_first": number,  # nats, of the first token's distribution from the baseline's
        "concept_mass_first": number,  # the probability of the concept's `top` tokens as the first token
        "concept_hits": integer,  # the number of generated tokens among them
        "direction_norm": number,
    },
)
_CONCEPT = record(
    {}, {"text": text, "tokens": each(spelled({})), "top": each(TOKEN)}
)  # top: its most likely next tokens
_CHANCE = spelled({"probability": number})
_SAYS = {"logit": number, "text": text}  # logit: of the target
_MORE = {"probability": number, "top": each(_CHANCE), "tokens": each(spelled({}))}
FORM: dict[str, Check] = {
    "intervention": record(
        {
            "method": text,
            "direction": text,  # its name
            "layer": integer,
            "target": TOKEN,
            "positions": each(spelled(HERE | {"component": number, "length": number})),  # ⟨v̂, h⟩ and ‖h‖
            "baseline": record(_SAYS, _MORE),
            "edited": each(
                record(
                    _SAYS | {"strength": number, "kl": number, "change": number},  # nats; the largest ‖Δh‖
                    _MORE
                    | {
                        "predicted": record({"logit": number}, {"kl": number, "error": number}),  # by the frozen map
                        "random": record({"kl": NUMBERS, "logit": NUMBERS}, {"at_least": integer}),
                    },
                ),
                most=MAX_VECTORS,
            ),
        },
        {"blocks": integer, "seed": integer, "generated": flag, "mlp_path": text, "residual": number, "tol": number},
    ),
    "steering": record(
        {"method": text, "layer": integer, "baseline": _TEXT, "steered": each(_TEXT, most=MAX_VECTORS)},
        {
            "changed_after_blocks": integer,  # the number of blocks before the steered residual stream
            "blocks": integer,
            "seed": integer,
            "concept": _CONCEPT,
            "control": record({"kind": text}, {"text": text, "tokens": each(spelled({}))}),
            "first_position": flag,
            "controls": each(_TEXT, most=MAX_VECTORS),  # steered by the control, in the order of `steered`
        },
    ),
}
#: Measure -> file name, title and axis of its chart.
MEASURES = {
    "kl_first": ("kl", "Shift of the first token’s distribution", "KL, nats"),
    "concept_mass_first": ("mass", "Probability of the concept’s own tokens", "probability"),
    "concept_hits": ("hits", "The concept’s own tokens in the text", "tokens"),
}


def effects(run: Run) -> list[Chart]:
    """Draw the effects of steering by its strength, with the control; nothing for a single strength."""
    given = run.content["steering"]
    if not given or len({t["strength"] for t in given["steered"]}) < 2:
        return []
    found = []
    for measure, (name, title, label) in MEASURES.items():
        series = []
        for texts, words, tone in ((given["steered"], "concept", "accent"), (given["controls"], "control", "faint")):
            whole = [given["baseline"], *texts] if texts else []
            points = sorted((t["strength"], t[measure]) for t in whole if t[measure] is not None)
            series.append(Series(words, tuple((s, float(value)) for s, value in points), tone))
        summary = "; ".join(from_to(s.name, s.points) for s in series) + "."
        drawn = curves(f"steering-{name}", title, ("strength", label), series, summary, whole=False, log=False)
        counted = [y for s in series for _, y in s.points]
        if measure == "concept_hits" and drawn:
            drawn = [replace(drawn[0], y=linear(label, counted, zero=True, whole=True, pad=0.05))]
        found += drawn
    return found


def steer(run: Run) -> dict[str, Any] | None:
    """Prepare the steered texts, with the baseline and a control."""
    found = run.content["steering"]
    if not found:
        return None
    concept = found["concept"] or {"text": None, "tokens": None, "top": None}
    rows = [_row("Baseline", found["baseline"], "")]
    for i, steered in enumerate(found["steered"]):
        strength = minus(f"{steered['strength']:g}")
        rows.append(_row("Concept", steered, strength))
        rows += [_row("Control", control, strength) for control in (found["controls"] or [])[i : i + 1]]
    spans = f"{found['layer']} of {found['blocks']}" if found["blocks"] else str(found["layer"])
    return {
        "rows": rows,
        "charts": effects(run),
        "method": found["method"],
        "spans": spans,
        "changed": found["changed_after_blocks"],
        "concept": concept["text"],
        "concept_tokens": concept["tokens"] or [],
        "top": [t | {"chance": percent(t["probability"])} for t in concept["top"] or []],
        "control": found["control"] if found["controls"] else None,
        "controls": bool(found["controls"]),
    }


def _row(who: str, found: dict[str, Any], strength: str) -> dict[str, Any]:
    """Return a text and its measures."""
    count = len(found["tokens"]) if found["tokens"] is not None else None
    hits = MISSING if found["concept_hits"] is None else str(found["concept_hits"])
    return {
        "who": who,
        "strength": strength,
        "text": found["text"],
        "kl": power(found["kl_first"]) if strength else "",
        "mass": MISSING if found["concept_mass_first"] is None else percent(found["concept_mass_first"]),
        "hits": f"{hits} of {count}" if count is not None else hits,
    }


def logits(run: Run) -> list[Chart]:
    """Draw the target's logit by strength: measured, by the frozen map, and along random directions."""
    given = run.content["intervention"]
    if not given or len({row["strength"] for row in given["edited"]}) < 2:
        return []
    rows, start = sorted(given["edited"], key=lambda row: row["strength"]), given["baseline"]["logit"]

    def series(name: str, of: Callable[[dict[str, Any]], float | None], tone: str) -> Series:
        points = [(row["strength"], value) for row in rows if (value := of(row)) is not None]
        return Series(name, tuple(sorted({*points, (0.0, start)})), tone)

    found = [
        series("measured", lambda row: row["logit"], "accent"),
        series("frozen map", lambda row: row["predicted"] and row["predicted"]["logit"], "ink"),
        series("random directions, mean", lambda row: _mean(row["random"] and row["random"]["logit"]), "faint"),
    ]
    summary = "; ".join(from_to(s.name, s.points) for s in found) + "."
    title = f"Logit of {given['target']['token']} by strength"
    return curves("steer-direction-logit", title, ("strength", "logit"), found, summary, whole=False, log=False)


def _mean(values: list[float | None] | None) -> float | None:
    known = [value for value in values or () if value is not None]
    return sum(known) / len(known) if known else None


def _range(values: list[float | None] | None, digits: int) -> str:
    """Return the smallest and the largest of several numbers."""
    known = [value for value in values or () if value is not None]
    return f"{fixed(min(known), digits)} to {fixed(max(known), digits)}" if known else MISSING


def direction(run: Run) -> dict[str, Any] | None:
    """Prepare the texts with the stream changed along a direction, beside the frozen map's prediction and the null."""
    found = run.content["intervention"]
    if not found:
        return None
    rows = []
    for row in found["edited"]:
        predicted, random = row["predicted"] or {"logit": None, "error": None}, row["random"] or {}
        count, least = len(random.get("kl") or ()), random.get("at_least")
        rows.append(
            {
                "strength": minus(f"{row['strength']:g}"),
                "change": power(row["change"]),
                "logit": fixed(row["logit"]),
                "predicted": fixed(predicted["logit"]),
                "error": MISSING if predicted["error"] is None else percent(predicted["error"], 0),
                "random_logit": _range(random.get("logit"), 2),
                "kl": fixed(row["kl"]),
                "random_kl": _range(random.get("kl"), 3),
                "rank": f"{least} of {count}" if count and least is not None else "",
                "text": row["text"],
            }
        )
    return {
        "name": source_name(found["direction"]),
        "method": found["method"],
        "layer": found["layer"],
        "blocks": found["blocks"],
        "generated": found["generated"],
        "rule": found["mlp_path"],
        "target": found["target"],
        "positions": [
            p | {"component": signed(p["component"]), "length": fixed(p["length"])} for p in found["positions"]
        ],
        "short": len(found["positions"]) <= SHORT,
        "baseline": found["baseline"] | {"logit": fixed(found["baseline"]["logit"])},
        "rows": rows,
        "open_end": open_end(found["residual"], found["tol"]),
        "charts": logits(run),
    }


SECTIONS = (
    Section(
        "steer-direction",
        "Along a direction",
        direction,
        "The prompt, continued with the residual stream changed along one direction. What the frozen map predicts and "
        "the same push along random directions are for comparison: only what differs from the latter is the "
        "direction’s own.",
        logits,
    ),
    Section(
        "steer",
        "Activation steering",
        steer,
        "The prompt, continued while the linear map of another prompt, the concept, steers the residual stream. The "
        "unsteered baseline and a control are for comparison. Greedy decoding amplifies small differences, so "
        "read the numbers as well as the texts.",
        effects,
    ),
)
