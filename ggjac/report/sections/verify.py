"""Parity with llama.cpp, tensor by tensor; its verdict is in the certificate."""

from typing import Any

from ggjac.drawing.charts import Chart, Series, curves, from_to, known
from ggjac.report.schema import Check, each, flag, integer, maybe, number, record, spelled, text
from ggjac.report.sections.common import SHORT, Run, Section
from ggjac.units import MISSING, power

_TENSOR = record(
    {"name": text, "error": maybe(number)},  # relative L2
    {"worst_position": integer, "worst_error": maybe(number)},
)
_LOCAL = record({"name": text, "error": maybe(number), "tolerance": number})
FORM: dict[str, Check] = {
    "parity": record(
        {"verdict": maybe(flag)},  # null where nothing was compared
        {
            "reason": text,
            "mode": text,  # `as is` or `strict`
            "tolerance": number,  # the largest relative L2 that a tensor may have
            "top1_equal": flag,
            "top1": spelled({}),
            "top1_ours": spelled({}),
            "kl": number,  # nats, the mean over positions
            "kl_last": number,  # nats, at the last position
            "logits_error": number,
            "cause": text,  # of a difference that is expected
            "layers": each(_TENSOR),  # in the order of computation
            "local": each(_LOCAL),  # likewise, each given llama.cpp's own input
            "amplification": number,  # of rounding, in eps
        },
    ),
}


def departures(run: Run) -> list[Chart]:
    """Draw the distance of every tensor from llama.cpp's, in the order of computation."""
    parity = run.content["parity"] or {}
    points = known(enumerate(row["error"] for row in parity.get("layers") or []))
    series = [Series("relative L2", points)]
    local = {row["name"]: row["error"] for row in parity.get("local") or []}
    own = known(enumerate(local.get(row["name"]) for row in parity.get("layers") or []))
    series.append(Series("given llama.cpp's own input", own, "ink"))
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
    limit, local = found["tolerance"], {row["name"]: row for row in found["local"] or []}
    excused = found["amplification"] is not None and found["verdict"]  # by rounding that the model amplifies
    return {
        "charts": drawn,
        "limit": None if limit is None else power(limit),
        "local": bool(local),
        "amplification": None if found["amplification"] is None else power(found["amplification"]),
        "short": len(found["layers"]) <= SHORT,
        "rows": [
            {
                "name": row["name"],
                "error": power(row["error"]),
                "position": MISSING if row["worst_position"] is None else str(row["worst_position"]),
                "worst": power(row["worst_error"]),
                "local": power(local[row["name"]]["error"]) if row["name"] in local else MISSING,
                "fails": _departs(row, None if excused else limit)
                or (row["name"] in local and _departs(local[row["name"]], local[row["name"]]["tolerance"])),
            }
            for row in found["layers"]
        ],
    }


def _departs(row: dict[str, Any], limit: float | None) -> bool:
    return limit is not None and not (row["error"] is not None and row["error"] <= limit)


SECTIONS = (
    Section(
        "verify",
        "Agreement with llama.cpp",
        verify,
        "Every tensor of the forward pass, compared with the same tensor of llama.cpp, in the order of computation.",
        departures,
    ),
)
