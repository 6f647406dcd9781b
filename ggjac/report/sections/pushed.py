"""Steering: the texts that a push makes, beside what the model writes without it."""

from typing import Any

from ggjac.report import charts
from ggjac.report.load import Run
from ggjac.report.numbers import MISSING, fixed, minus, percent, power


def steering(run: Run) -> dict[str, Any] | None:
    """Prepare the texts that a push makes, beside the baseline and a random control.

    `steering`: `{"method", "layer", "blocks", "changed_after_blocks", "concept": {"text", "tokens": [{"id", "text"}],
    "top": [{"id", "token", "probability"}]}, "baseline", "steered": [...], "controls": [...]}`; a text is
    `{"strength", "text", "tokens", "kl_first", "concept_mass_first", "concept_hits"}`: what was generated, and of its
    first token the KL divergence from the baseline's distribution and the probability of the concept's `top` tokens,
    and how many of those were generated. `controls` (if any) are pushed by a random operator, in the order of
    `steered`.
    """
    found = run.content["steering"]
    if not found:
        return None
    concept = found["concept"] or {"text": None, "tokens": None, "top": None}
    rows = [_row("Baseline", found["baseline"], "")]
    for i, text in enumerate(found["steered"]):
        strength = minus(f"{text['strength']:g}")
        rows.append(_row("Concept", text, strength))
        rows += [_row("Random", control, strength) for control in (found["controls"] or [])[i : i + 1]]
    spans = f"{found['layer']} of {found['blocks']}" if found["blocks"] else str(found["layer"])
    return {
        "rows": rows,
        "charts": charts.steering(run),
        "method": found["method"],
        "spans": spans,
        "changed": found["changed_after_blocks"],
        "concept": concept["text"],
        "concept_tokens": [t["text"] for t in concept["tokens"] or []],
        "top": [t | {"chance": percent(t["probability"])} for t in concept["top"] or []],
        "controls": bool(found["controls"]),
    }


def _row(who: str, text: dict[str, Any], strength: str) -> dict[str, Any]:
    """Return a text and what is known of it."""
    count = len(text["tokens"]) if text["tokens"] is not None else None
    hits = MISSING if text["concept_hits"] is None else str(text["concept_hits"])
    return {
        "who": who,
        "strength": strength,
        "text": text["text"],
        "kl": power(text["kl_first"]) if strength else "",
        "mass": MISSING if text["concept_mass_first"] is None else percent(text["concept_mass_first"]),
        "hits": f"{hits} of {count}" if count is not None else hits,
        "length": fixed(text["direction_norm"], 2),
    }
