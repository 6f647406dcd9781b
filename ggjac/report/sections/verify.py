"""Parity with llama.cpp, tensor by tensor; its verdict is in the certificate."""

from typing import Any

from ggjac.drawing.charts import Chart, Series, curves, from_to, known
from ggjac.report.schema import Check, each, flag, integer, maybe, number, record, text
from ggjac.report.sections.common import SHORT, Run, Section
from ggjac.units import MISSING, power

_TENSOR = record(
    {"name": text, "error": maybe(number)},  # relative L2
    {"worst_position": integer, "worst_error": maybe(number)},
)
FORM: dict[str, Check] = {
    "parity": record(
        {"verdict": maybe(flag)},  # null where nothing was compared
        {
            "reason": text,
            "mode": text,  # `as is` or `strict`
            "tolerance": number,  # the largest relative L2 that a tensor may have
            "top1_equal": flag,
            "top1": record({"token": text}),
            "kl": number,  # nats, the mean over positions
            "kl_last": number,  # nats, at the last position
            "logits_error": number,
            "cause": text,  # of a difference that is expected
            "layers": each(_TENSOR),  # in the order of computation
        },
    ),
}


def departures(run: Run) -> list[Chart]:
    """Draw the distance of every tensor from llama.cpp's, in the order of computation."""
    parity = run.content["parity"] or {}
    points = known(enumerate(row["error"] for row in parity.get("layers") or []))
    series = [Series("relative L2", points)]
    if parity.get("tolerance") is not None and points:
        series.append(Series("tolerance", tuple((x, parity["tolerance"]) for x in (0.0, points[-1][0])), "faint"))
    title, axes = "Distance from llama.cpp, tensor by tensor", ("tensor", "relative L2")
    return curves("verify", title, axes, series, f"{from_to('Relative L2', points)}.")[::-1]  # the logarithm first


def verify(run: Run) -> dict[str, Any] | None:
    """Prepare the comparison with llama.cpp, tensor by tensor."""
    found = run.content["parity"] or {}
    drawn = departures(run)
    if not drawn:
        return None
    limit = found["tolerance"]
    return {
        "charts": drawn,
        "limit": None if limit is None else power(limit),
        "short": len(found["layers"]) <= SHORT,
        "rows": [
            {
                "name": row["name"],
                "error": power(row["error"]),
                "position": MISSING if row["worst_position"] is None else str(row["worst_position"]),
                "worst": power(row["worst_error"]),
                "fails": limit is not None and not (row["error"] is not None and row["error"] <= limit),
            }
            for row in found["layers"]
        ],
    }


SECTIONS = (
    Section(
        "verify",
        "Agreement with llama.cpp",
        verify,
        "Every tensor of the forward pass, compared with the same tensor of llama.cpp, in the order of computation.",
        departures,
    ),
)
