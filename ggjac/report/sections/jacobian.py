"""The dense map: the size of each position's part, and of its contribution to the output."""

from typing import Any

from ggjac.drawing.charts import Chart, Series, curves, from_to, known
from ggjac.report.numbers import aligned
from ggjac.report.schema import HERE, RECONSTRUCTION, Check, each, integer, number, record, spelled
from ggjac.report.sections.common import WHOLE, Run, Section

_POSITION = spelled(
    HERE,
    {"frobenius": number, "contribution_norm": number},  # ‖J_i‖ and ‖J_i x_i‖
)
FORM: dict[str, Check] = {
    "jacobian": record(
        {"positions": each(_POSITION)},
        {"shape": each(integer, most=9), "frobenius": number, "reconstruction": RECONSTRUCTION},
    ),
}


def sizes(run: Run) -> list[list[Chart]]:
    """Draw the size of each position's part of the map, and of its contribution: each in both scales."""
    entries = (run.content["jacobian"] or {}).get("positions") or []
    found = []
    for key, title, label in (
        ("frobenius", "Size of each position's map", "‖J_i‖ (Frobenius)"),
        ("contribution_norm", "Contribution of each position", "‖J_i x_i‖"),
    ):
        points = known((e["position"], e[key]) for e in entries)
        axes = "position", label
        found.append(
            curves(f"dense-{key.split('_')[0]}", title, axes, [Series(label, points)], from_to(label, points) + ".")
        )
    return [variants for variants in found if variants]


def drawings(run: Run) -> list[Chart]:
    """Return the section's figures."""
    return [chart for variants in sizes(run) for chart in variants]


def jacobian(run: Run) -> dict[str, Any] | None:
    """Prepare the parts of the dense map, and the contribution of each."""
    found = run.content["jacobian"]
    if not found or not found["positions"]:
        return None
    rows = found["positions"]
    lengths, terms = (aligned([row[key] for row in rows]) for key in ("frobenius", "contribution_norm"))
    return {
        "groups": sizes(run),
        "shape": " × ".join(map(str, found["shape"] or [])),
        "frobenius": found["frobenius"] and f"{found['frobenius']:.4g}",
        "short": len(rows) <= WHOLE,
        "rows": [
            {"position": row["position"], "token": row["token"], "size": size, "term": term}
            for row, size, term in zip(rows, lengths, terms, strict=True)
        ],
    }


SECTIONS = (
    Section(
        "jacobian",
        "The dense map",
        jacobian,
        "The map splits into one part for each position: its size, and the length of the vector that it contributes "
        "to the output.",
        drawings,
    ),
)
