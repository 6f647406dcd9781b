"""Directions: singular values, decoded singular vectors, those of each position, long rows and columns."""

from typing import Any

from ggjac.report import charts
from ggjac.report.load import Run
from ggjac.report.numbers import aligned, fixed, percent, power, signed
from ggjac.report.sections.common import SHOWN

# Of the tables for each position: triplets up to which they stand open, positions up to which they are shown whole, and
# what is shown of each beyond that.
OPEN, WHOLE, TRIPLETS, WORDS = 40, 32, 2, 4


def spectrum(run: Run) -> dict[str, Any] | None:
    """Prepare the singular values.

    `svd.triplets`: a list of `{"singular_value", "residual", ...}`, the largest first; `stable_rank`: `{"value",
    "error", "frobenius"}`, the error one standard error, 0 where the value is exact.
    """
    found = charts.singular_values(run)
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


def vectors(run: Run) -> dict[str, Any] | None:
    """Prepare the decoded singular vectors, and what it is worth that they can be read.

    `svd.triplets`: a list of `{"singular_value", "residual", "left": [tokens], "right": [{"position", "token",
    "weight", "nearest": [tokens]}]}`: the tokens a left vector promotes, the best first; for a right vector the share
    of its squared norm at each position and the tokens nearest to it there.

    `svd.readability`: for `left` and `right` the `scores` of the vectors (mean cosine between the embeddings of their
    tokens; of right vectors at their heaviest position), `chance` (the share of shuffled vectors that score as high),
    and of those `shuffled` the `mean` and `sd`.
    """
    triplets = (run.content["svd"] or {}).get("triplets")
    if not triplets:
        return None
    sigmas = aligned([t["singular_value"] for t in triplets])
    coherence = run.content["svd"]["readability"]
    rows = []
    for j, t in enumerate(triplets):
        heaviest = sorted(t["right"], key=lambda r: -(r["weight"] or 0.0))[:SHOWN]
        rows.append(
            {
                "index": j,
                "sigma": sigmas[j],
                "residual": power(t["residual"]),
                "left": t["left"],
                "right": [r | {"share": percent(r["weight"], 0), "nearest": r["nearest"][:SHOWN]} for r in heaviest],
                "strip": _strip(t["right"]),
                "worth": {side: coherence and _worth(coherence[side], j) for side in ("left", "right")},
            }
        )
    return {
        "rows": rows,
        "charts": charts.readability(run),
        "shuffled": [(side, _shuffled(coherence[side])) for side in ("left", "right")] if coherence else [],
    }


def _worth(found: dict[str, Any], j: int) -> dict[str, str] | None:
    """Return a vector's coherence, and how often chance does as well."""
    score, chance = found["scores"][j], found["chance"][j]
    return None if score is None else {"score": signed(score), "chance": percent(chance), "mark": _mark(chance)}


def _mark(chance: float | None) -> str:
    """Return how a vector's score is marked: it stands out where one shuffled vector in a hundred does as well."""
    return "clear" if chance is not None and chance <= 0.01 else "faint"


def _shuffled(found: dict[str, Any]) -> str:
    return f"{fixed(found['shuffled']['mean'])} ± {fixed(found['shuffled']['sd'])}"


def per_token(run: Run) -> dict[str, Any] | None:
    """Prepare the singular vectors of each position's own map.

    `svd.per_token`: a list of `{"position", "token", "converged", "triplets": [{"singular_value", "residual", "left":
    [tokens], "right": [tokens]}]}`: tokens that a left vector promotes, and those nearest to a right vector.
    """
    entries = (run.content["svd"] or {}).get("per_token")
    if not entries:
        return None
    triplets, words = (None, None) if len(entries) <= WHOLE else (TRIPLETS, WORDS)
    sigmas = iter(aligned([t["singular_value"] for entry in entries for t in entry["triplets"][:triplets]]))
    return {
        "charts": charts.per_token(run),
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


def norms(run: Run) -> dict[str, Any] | None:
    """Prepare the longest columns and rows of the dense map at each position.

    `norms.positions`: a list of `{"position", "token", "columns": [{"component", "norm", "tokens"}], "rows": [...]}`,
    the longest first: a column's tokens are those it promotes, a row's the embeddings nearest to it.
    """
    entries = (run.content["norms"] or {}).get("positions")
    if not entries:
        return None
    count, words = (None, None) if len(entries) <= WHOLE else (1, WORDS)

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
        "charts": charts.longest(run),
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


def dense(run: Run) -> dict[str, Any] | None:
    """Prepare the parts of the dense map, and what each contributes.

    `jacobian`: `{"shape", "frobenius", "reconstruction", "positions": [{"position", "token", "frobenius",
    "contribution_norm"}]}`: of each position the Frobenius norm of its `J_i`, and the length of `J_i x_i`.
    """
    found = run.content["jacobian"]
    if not found or not found["positions"]:
        return None
    rows = found["positions"]
    sizes, terms = (aligned([row[key] for row in rows]) for key in ("frobenius", "contribution_norm"))
    return {
        "groups": charts.dense(run),
        "shape": " × ".join(map(str, found["shape"] or [])),
        "frobenius": found["frobenius"] and f"{found['frobenius']:.4g}",
        "short": len(rows) <= WHOLE,
        "rows": [
            {"position": row["position"], "token": row["token"], "size": size, "term": term}
            for row, size, term in zip(rows, sizes, terms, strict=True)
        ],
    }


def _strip(right: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the bars of a right vector's shares by position; nothing for one position or very many."""
    if not 1 < len(right) <= 512:
        return []
    largest = max((r["weight"] or 0.0 for r in right), default=0.0) or 1.0
    return [{"x": i, "height": round(max(0.0, (r["weight"] or 0.0) / largest), 3)} for i, r in enumerate(right)]
