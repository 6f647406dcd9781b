"""Two files of one model, `a` and `b`, on one prompt."""

from typing import Any

from ggjac.drawing.charts import Chart, Series, curves, from_to, known
from ggjac.report.numbers import aligned, percent, signed
from ggjac.report.schema import (
    HERE,
    MAX_VECTORS,
    MODEL,
    NUMBERS,
    RECONSTRUCTION,
    TOKEN,
    Check,
    each,
    flag,
    integer,
    maybe,
    number,
    record,
    spelled,
)
from ggjac.report.sections.common import SHORT, Run, Section, bars, digits, file_name
from ggjac.report.summary import caveat
from ggjac.units import MISSING, power

SMALLEST_ANGLE = 1e-3  # degrees; smaller ones are rounding of vectors that are the same

_BOTH = record({"a": number, "b": number})
_NEXT = spelled(
    HERE | {"kl": maybe(number)},  # nats
    {"top1": record({"a": spelled({}), "b": spelled({})}), "same_top1": flag},
)
FORM: dict[str, Check] = {
    "other_model": MODEL,  # b
    "compare": record(
        {
            "singular_values": each(record({"a": number, "b": number}, {"residual": number}), most=MAX_VECTORS),
            "angles": record({"left": NUMBERS, "right": NUMBERS}),  # principal angles in degrees, the largest first
            "target": TOKEN,
            "logit": _BOTH,
            "offset": _BOTH,
            "shares": each(spelled(HERE | {"a": number, "b": number})),
            "positions": each(_NEXT),
        },
        {
            "reconstruction": record({"a": RECONSTRUCTION, "b": RECONSTRUCTION}),
            "tol": number,
            "converged": flag,
            "seed": integer,
            "output_distance": number,  # ‖y_b − y_a‖ ⁄ ‖y_a‖
            "softcap": number,
            "kl": number,  # nats, at the output position
            "mean_kl": number,  # nats, over all positions
            "top1_agreement": number,  # the share of positions with the same most likely token
        },
    ),
}


def spectra(run: Run) -> list[Chart]:
    """Draw the singular values of two files of one model, in both scales."""
    values = (run.content["compare"] or {}).get("singular_values") or []
    series = [
        Series(side, known(enumerate((value[side] for value in values), 1)), tone)
        for side, tone in (("a", "accent"), ("b", "ink"))
    ]
    summary = "; ".join(from_to(s.name, s.points) for s in series) + "."
    return curves("compare-singular-values", "Singular values of both files", ("index", "σ"), series, summary)


def angles(run: Run) -> list[Chart]:
    """Draw the principal angles between the spans of two files' vectors, the smallest first; not those of rounding."""
    given = (run.content["compare"] or {}).get("angles") or {"left": [], "right": []}
    if max((angle or 0.0 for side in given.values() for angle in side), default=0.0) < SMALLEST_ANGLE:
        return []
    series = [
        Series(side, known(enumerate(reversed(given[side]), 1)), tone)
        for side, tone in (("left", "accent"), ("right", "ink"))
    ]
    summary = "; ".join(from_to(s.name, s.points) for s in series) + " degrees."
    title = "Principal angles between the spans, smallest first"
    return curves("compare-angles", title, ("angle", "degrees"), series, summary)


def divergences(run: Run) -> list[Chart]:
    """Draw the KL divergence between the predictions of both files at each position, in both scales."""
    rows = (run.content["compare"] or {}).get("positions") or []
    points = known((row["position"], row["kl"]) for row in rows)
    title, axes = "KL divergence of the next token by position", ("position", "KL, nats")
    return curves("compare-kl", title, axes, [Series("KL", points)], from_to("KL", points) + " nats.")


def drawings(run: Run) -> list[Chart]:
    """Return the section's figures."""
    return [*spectra(run), *angles(run), *divergences(run)]


def compare(run: Run) -> dict[str, Any] | None:
    """Prepare the comparison of two files of one model, `a` and `b`."""
    found = run.content["compare"]
    if not found:
        return None
    values = found["singular_values"]
    a, b = (aligned([value[side] for value in values]) for side in ("a", "b"))
    left, right = (list(reversed(found["angles"][side])) for side in ("left", "right"))
    parts = [*found["shares"], {"a": found["offset"]["a"], "b": found["offset"]["b"]}]
    changes = [s["b"] - s["a"] for s in parts]
    drawn, zero = bars(changes)
    decimals = digits([s[side] for s in parts for side in ("a", "b")])

    def shares(row: dict[str, Any]) -> dict[str, str]:
        change = signed(row["b"] - row["a"], decimals)
        return {"a": signed(row["a"], decimals), "b": signed(row["b"], decimals), "change": change}

    rows = [
        shares(s) | {"position": s["position"], "token": s["token"], "bar": bar, "less": change < 0}
        for s, bar, change in zip(found["shares"], drawn, changes, strict=False)
    ]
    return {
        "a": file_name(run.content["model"]),
        "b": run.content["other_model"] and file_name(run.content["other_model"]),
        "spectra": spectra(run),
        "angle_charts": angles(run),
        "smallest": f"{SMALLEST_ANGLE:g}",
        "kl_charts": divergences(run),
        "triplets": [
            {
                "index": j + 1,
                "a": a[j],
                "b": b[j],
                "change": percent(v["b"] / v["a"] - 1, 1) if v["a"] else MISSING,
                "left": _angle(left, j),
                "right": _angle(right, j),
            }
            for j, v in enumerate(values)
        ],
        "target": found["target"],
        "versus": None,
        "capped": bool(found["softcap"]),
        "shares": rows,
        "zero": zero,
        "offset": shares(parts[-1]) | {"bar": drawn[-1], "less": changes[-1] < 0},
        "logit": shares(found["logit"]),
        "positions": [
            {
                "position": row["position"],
                "token": row["token"],
                "a": row["top1"]["a"]["token"] if row["top1"] else "",
                "b": row["top1"]["b"]["token"] if row["top1"] else "",
                "kl": power(row["kl"]),
                "same": row["same_top1"] is not False,
            }
            for row in found["positions"]
        ],
        "caveat": caveat(run.content),
        "short": len(found["positions"]) <= SHORT,
        "says": [
            (words, value)
            for words, value in (
                ("KL divergence at the output, nats", _power(found["kl"])),
                ("Mean KL divergence over positions, nats", _power(found["mean_kl"])),
                ("Same top token", found["top1_agreement"] is not None and percent(found["top1_agreement"], 0)),
                ("‖y_b − y_a‖ ⁄ ‖y_a‖", _power(found["output_distance"])),
            )
            if value
        ],
        "open_end": found["converged"] is False and (power(found["tol"]) if found["tol"] else "the tolerance"),
    }


def _power(value: float | None) -> str | None:
    return None if value is None else power(value)


def _angle(angles: list[float | None], j: int) -> str:
    return MISSING if j >= len(angles) or angles[j] is None else f"{angles[j]:.3f}°"


SECTIONS = (
    Section(
        "compare",
        "Two files",
        compare,
        "One prompt on two files of one model: how much quantization changes the map, the shares and the predictions.",
        drawings,
    ),
)
