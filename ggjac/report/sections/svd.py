"""Singular values and decoded singular vectors: of the joint map, and of each position's own."""

from typing import Any

from ggjac.checks import brief
from ggjac.drawing.charts import Axis, Chart, Series, curves, from_to, known, linear, scales
from ggjac.report.numbers import aligned, fixed, percent
from ggjac.report.schema import (
    ESTIMATE,
    FOLLOWING,
    HERE,
    MAX_VECTORS,
    MAX_WORDS,
    SINK,
    TRIPLET,
    WORDS,
    Check,
    each,
    flag,
    integer,
    maybe,
    number,
    record,
    spelled,
    text,
)
from ggjac.report.sections.common import SHOWN, WHOLE, WORDS_SHOWN, Run, Section, sink
from ggjac.units import cut_after, power

# Tables for each position: the number of triplets up to which all stand open, and the number shown where there are
# more than `WHOLE` positions.
OPEN, TRIPLETS = 40, 2

_RIGHT = {
    "weight": maybe(number),  # the share of the vector's squared norm at this position
    "nearest": WORDS,  # the tokens with the nearest embeddings there
}
#: Scores in standard deviations: of a random direction's, and of those of unrelated prompts.
_Z = {"z": number, "z_prompts": number}
_TRIPLET = record(
    TRIPLET | {"left": each(spelled({}, _Z), most=MAX_WORDS), "right": each(spelled(HERE | _RIGHT))}
)  # left: the tokens it promotes, best first
_PER_TOKEN = spelled(
    HERE | {"triplets": each(record(TRIPLET | {"left": WORDS, "right": WORDS}), most=MAX_VECTORS)},
    {"sweeps": integer, "converged": flag, "stopped_by": text},
)
#: Of the map that reads the excluded positions, too; the weight is that of these in the right vector.
_WHOLE = record(
    {
        "converged": flag,
        "triplets": each(record(TRIPLET | {"left": WORDS, "excluded_weight": maybe(number)}), most=MAX_VECTORS),
    },
    {"stopped_by": text},
)
_MIDDLE: dict[str, Check] = {"median": number, "p95": number}
_FIRST = record(
    {"vectors": integer} | _MIDDLE, {"largest": record({"of": integer, "groups": integer} | _MIDDLE)}
)  # largest: of the vectors of each group
_SVD = record(
    {"converged": flag, "triplets": each(_TRIPLET, most=MAX_VECTORS)},  # the largest singular value first
    {
        "seed": integer,
        "tol": number,
        "method": text,
        "sweeps": integer,
        "rough_sweeps": integer,  # of these, in a narrower dtype
        "stopped_by": text,
        "sink": SINK,  # of the first right vector's weight
        "next_singular_value": FOLLOWING,
        # What these are compared with: the largest z of so many tokens by chance, and first tokens that mean nothing.
        "calibration": record(
            {}, {"tokens": integer, "expected_maximum": number, "prompts": integer, "own": _FIRST, "random": _FIRST}
        ),
        "per_token": each(_PER_TOKEN),  # the triplets of each position's own map
        "whole": _WHOLE,  # where positions are excluded
    },
)


FORM: dict[str, Check] = {
    "svd": _SVD,
    "stable_rank": ESTIMATE,
}

# -- singular values ---------------------------------------------------------------------------------------------------


def singular_values(run: Run) -> list[Chart]:
    """Draw the singular values, in both scales; nothing where there are none."""
    found = run.content["svd"] or {}
    values, whole = (
        [triplet["singular_value"] for triplet in (each or {}).get("triplets", [])]
        for each in (found, found.get("whole"))
    )
    if not values:
        return []
    excluded = brief(run.content["exclude"] or [])
    drawn = [(f"without {excluded}" if whole else "σ", values, "accent")]
    drawn += [("all positions", whole, "ink")] if whole else []
    chart = Chart(
        key="singular-values",
        title="Singular values of the detached Jacobian",
        x=linear("index", range(1, len(values) + 1), whole=True, pad=0.03),
        y=Axis("σ", 0.0, 1.0, ()),
        series=tuple(
            Series(name, tuple((float(j), value) for j, value in enumerate(each, 1)), tone)
            for name, each, tone in drawn
        ),
        summary=f"{len(values)} singular values, from {values[0]:.4g} down to {values[-1]:.4g}.",
    )
    return scales(chart, values + whole)


def svd(run: Run) -> dict[str, Any] | None:
    """Prepare the singular values."""
    found = singular_values(run)
    if not found:
        return None
    rank = run.content["stable_rank"] or {}
    stable = rank.get("value")
    return {
        "charts": found,
        "stable": None if stable is None else f"{stable:.4g}",
        "error": rank.get("error") and f"{rank['error']:.1g}",
        "frobenius": rank.get("frobenius") and f"{rank['frobenius']:.4g}",
    }


# -- singular vectors --------------------------------------------------------------------------------------------------


def vectors(run: Run) -> dict[str, Any] | None:
    """Prepare the decoded singular vectors."""
    found = run.content["svd"] or {}
    triplets = found.get("triplets")
    if not triplets:
        return None
    sigmas = aligned([t["singular_value"] for t in triplets])
    about = found["calibration"]
    known = [t["left"][0][name] is not None for t in triplets if t["left"] for name in ("z", "z_prompts")]
    compared = ("z", "z_prompts") if about and about["own"] and about["random"] and all(known) else ()
    rows = []
    for j, t in enumerate(triplets):
        heaviest = sorted(t["right"], key=lambda r: -(r["weight"] or 0.0))[:SHOWN]
        rows.append(
            {
                "index": j + 1,
                "sigma": sigmas[j],
                "residual": power(t["residual"]),
                "left": t["left"],
                "z": [fixed(t["left"][0][name], 1) for name in compared] if t["left"] else [""] * len(compared),
                "right": [r | {"share": percent(r["weight"], 0), "nearest": r["nearest"][:SHOWN]} for r in heaviest],
                "strip": _strip(t["right"]),
            }
        )
    cut = cut_after(triplets[-1]["singular_value"], len(triplets), found["next_singular_value"])
    return {
        "rows": rows,
        "sink": sink(found["sink"]),
        "cut": cut,
        "compared": _compared(about) if compared else None,
        "both": _both(run, triplets, found["whole"]),
    }


def _both(run: Run, rest: list[dict[str, Any]], whole: dict[str, Any] | None) -> dict[str, Any] | None:
    """Prepare the vectors of the map of all positions beside those without some; None where none are excluded."""
    if not whole or not whole["triplets"]:
        return None
    sigmas = [aligned([t["singular_value"] for t in each]) for each in (whole["triplets"], rest)]
    return {
        "excluded": brief(run.content["exclude"] or []),
        "one": len(run.content["exclude"] or []) == 1,
        "open_end": whole["converged"] is False,
        "rows": [
            {
                "index": j + 1,
                "sigmas": [each[j] for each in sigmas],
                "weight": percent(a["excluded_weight"], 0),
                "left": [t["left"][:WORDS_SHOWN] for t in (a, b)],
            }
            for j, (a, b) in enumerate(zip(whole["triplets"], rest, strict=False))
        ],
    }


def _compared(about: dict[str, Any]) -> dict[str, Any]:
    """Prepare what the z of first tokens are compared with."""
    firsts = {key: _shown(about[key]) | {"largest": _shown(about[key]["largest"])} for key in ("own", "random")}
    return about | firsts | {"most": fixed(about["expected_maximum"], 1)}


def _shown(first: dict[str, Any] | None) -> dict[str, Any]:
    """Prepare the median of some z, and what 95 % of them are below; nothing for one vector, or where it is unknown."""
    if not first or first.get("of") == 1:
        return {}
    return first | {name: fixed(first[name], 1) for name in ("median", "p95")}


def _strip(right: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the bars of a right vector's shares by position; nothing for one position or very many."""
    if not 1 < len(right) <= 512:
        return []
    largest = max((r["weight"] or 0.0 for r in right), default=0.0) or 1.0
    return [{"x": i, "height": round(max(0.0, (r["weight"] or 0.0) / largest), 3)} for i, r in enumerate(right)]


# -- position by position ----------------------------------------------------------------------------------------------


def largest(run: Run) -> list[Chart]:
    """Draw the largest singular value of each position's own map, in both scales."""
    entries = (run.content["svd"] or {}).get("per_token") or []
    points = known((e["position"], e["triplets"][0]["singular_value"]) for e in entries if e["triplets"])
    summary = f"{len(points)} positions: {from_to('σ₁', points)}."
    title = "Largest singular value of each position's own map"
    return curves("svd-per-token", title, ("position", "σ₁"), [Series("σ₁", points)], summary)


def per_token(run: Run) -> dict[str, Any] | None:
    """Prepare the singular vectors of each position's own map."""
    entries = (run.content["svd"] or {}).get("per_token")
    if not entries:
        return None
    triplets, words = (None, None) if len(entries) <= WHOLE else (TRIPLETS, WORDS_SHOWN)
    sigmas = iter(aligned([t["singular_value"] for entry in entries for t in entry["triplets"][:triplets]]))
    return {
        "charts": largest(run),
        "open": sum(len(entry["triplets"]) for entry in entries) <= OPEN,
        "cut": max(len(entry["triplets"]) for entry in entries) > TRIPLETS if triplets else False,
        "positions": [
            {
                "position": entry["position"],
                "token": entry["token"],
                "open_end": entry["converged"] is False,
                "triplets": [
                    {
                        "sigma": next(sigmas),
                        "residual": power(t["residual"]),
                        "left": t["left"][:words],
                        "right": t["right"][:words],
                    }
                    for t in entry["triplets"][:triplets]
                ],
            }
            for entry in entries
        ],
    }


SECTIONS = (
    Section(
        "svd",
        "Singular values",
        svd,
        "The gains of the map along its leading directions. The stable rank, ‖J‖²_F ⁄ σ₁², "
        "measures the number of directions that the map effectively uses.",
        singular_values,
    ),
    Section(
        "svd-vectors",
        "Singular vectors",
        vectors,
        "Each pair reads one direction of the input (the right vector) and writes one direction of the output (the "
        "left vector). A left vector is decoded through the LM head to the tokens it promotes; a right vector to the "
        "positions that carry most of it and the input embeddings nearest to it there.",
    ),
    Section(
        "svd-per-token",
        "Position by position",
        per_token,
        "The singular vectors of each position’s own map, from the embedding at that position to the output. The "
        "vectors of the joint map mix positions; these do not.",
        largest,
    ),
)
