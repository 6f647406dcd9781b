"""Reconstruction of the output: by the detached Jacobian, and by the ordinary one for contrast."""

from typing import Any

import numpy as np

from ggjac.drawing.charts import Chart, Series, linear
from ggjac.report.numbers import fixed, percent
from ggjac.report.schema import Check, flag, integer, maybe, number, record
from ggjac.report.sections.common import MAX_POINTS, Run, Section, capital
from ggjac.units import power

_AGREEMENT = record(
    {"error": maybe(number)},  # relative L2
    {
        "std_ratio": number,  # standard deviation of the error relative to that of the reconstruction
        "std_ratio_output": number,  # and to that of the output
        "max_abs": number,
        "pearson": number,
        "spearman": number,
        "kl": number,  # nats, after the LM head
        "top1": flag,  # the same most likely token
        "top": integer,  # number of most likely tokens compared
        "top_agreement": number,  # the share of them that are the same
    },
)
FORM: dict[str, Check] = {
    "contrast": record({"ordinary": _AGREEMENT}, {"detached": _AGREEMENT}),
}


def scatters(run: Run) -> list[Chart]:
    """Draw the output against its reconstructions, those of which the vectors were saved.

    These are `y`, `linear_output` (J x) and `offset` of the detached Jacobian, and `ordinary_output`, the ordinary
    Jacobian times x.
    """
    y, found = run.vectors.get("y"), []
    if y is None:
        return []
    rebuilt = {
        "detached": ("J x + offset", _sum(run.vectors.get("linear_output"), run.vectors.get("offset"))),
        "ordinary": ("ordinary Jacobian × x", run.vectors.get("ordinary_output")),
    }
    for name, (label, values) in rebuilt.items():
        if values is None:
            continue
        shown = _sample(y, values)
        note = () if len(shown) == len(y) else (f"{len(shown)} of {len(y)} components, including the extremes.",)
        error = float(np.linalg.norm(values - y) / (np.linalg.norm(y) or 1.0))
        pairs = tuple((float(y[i]), float(values[i])) for i in shown)
        found.append(
            Chart(
                key=f"reconstruction-{name}",
                title="Reconstruction" if name == "detached" else "The ordinary Jacobian",
                x=linear("y", y, pad=0.04),
                y=linear(label, [*y, *values], pad=0.04),  # at least y's own scale, on which small values look flat
                series=(Series(label, pairs, "accent" if name == "detached" else "ink", line=False),),
                diagonal=True,
                square=True,
                summary=f"{label} against y, {len(y)} components: relative distance {power(error)}.",
                notes=note,
            )
        )
    return found


def _sum(first: np.ndarray | None, second: np.ndarray | None) -> np.ndarray | None:
    return None if first is None or second is None else first + second


def _sample(y: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return the indices of at most `MAX_POINTS` components, with the extremes of both."""
    if len(y) <= MAX_POINTS:
        return np.arange(len(y))
    keep = np.concatenate([np.argsort(v)[[*range(20), *range(-20, 0)]] for v in (y, values, values - y)])
    rest = np.random.default_rng(0).permutation(np.setdiff1d(np.arange(len(y)), keep))
    return np.sort(np.concatenate([np.unique(keep), rest[: MAX_POINTS - len(np.unique(keep))]]))


def contrast(run: Run) -> dict[str, Any] | None:
    """Prepare the reconstructions; a result without vectors has the measures alone."""
    found = scatters(run)
    rows = [row for row in (_agreement(run, name, found) for name in ("detached", "ordinary")) if row]
    return {"charts": found, "rows": rows, "measured": bool(run.content["contrast"])} if rows else None


def _agreement(run: Run, name: str, found: list[Chart]) -> dict[str, Any] | None:
    """Return the measures of a reconstruction: distances from the saved vectors, where there are any."""
    given, v = (run.content["contrast"] or {}).get(name) or {}, run.vectors
    error, largest = given.get("error"), given.get("max_abs")
    if any(chart.key == f"reconstruction-{name}" for chart in found):
        values = v["linear_output"] + v["offset"] if name == "detached" else v["ordinary_output"]
        error = float(np.linalg.norm(values - v["y"]) / (np.linalg.norm(v["y"]) or 1.0))
        largest = float(np.abs(values - v["y"]).max())
    elif not given:
        return None
    top = given.get("top")
    return {
        "name": capital(name),
        "error": power(error),
        "max_abs": power(largest),
        "std_ratio": power(given.get("std_ratio")),
        "pearson": fixed(given.get("pearson"), 5),
        "spearman": fixed(given.get("spearman"), 5),
        "top": percent(given.get("top_agreement"), 0) + (f" of {top}" if top else ""),
        "kl": power(given.get("kl")),
    }


SECTIONS = (
    Section(
        "contrast",
        "Reconstruction",
        contrast,
        "Every component of the output, against the same component reconstructed by the linear map. The detached "
        "Jacobian reproduces the output by construction, up to rounding; the ordinary Jacobian, with nothing frozen, "
        "need not.",
        scatters,
    ),
)
