"""Evidence: what was checked, what it takes to make the run again, and how the output is rebuilt."""

import shlex
from typing import Any

import numpy as np

from ggjac.report import charts
from ggjac.report.load import Run
from ggjac.report.numbers import duration, fixed, percent, power, size
from ggjac.report.sections.common import SHORT, capital, pairs


def certificate(run: Run) -> dict[str, Any]:
    """Prepare the checks, and what is needed to make the run again.

    `reconstruction`: `{"error", "limit", "healthy", "offset_norm", "output_norm"}`; `parity`: llama.cpp's verdict,
    `{"verdict": true | false | null, "reason", ...}`; `svd`: `{"converged", "tol", "sweeps", "stopped_by", ...}`;
    `versions` and `seconds`: tables of text and of numbers; `command`: a list of words.
    """
    c = run.content
    checks = [*_reconstructions(c), *filter(None, (_parity(c), _convergence(c)))]
    seed = next((c[key]["seed"] for key in ("svd", "compare", "steering") if c[key]), None)
    facts = pairs(
        ("Arithmetic", c["dtype"]),
        ("Live factor of gated MLPs", c["mlp_path"]),
        ("Position read", ("all" if c["all_positions"] else str(c["position"])) if c["tokens"] else None),
        ("Seed", None if seed is None else str(seed)),
        ("Device", c["device"]),
        ("Threads", c["threads"] and str(c["threads"])),
        ("Peak memory", c["peak_memory_bytes"] and size(c["peak_memory_bytes"])),
        ("Made", (c["created"] or "").replace("T", " ").replace("Z", " UTC")),
        ("Platform", c["platform"]),
        ("Model fingerprint", c["model"]["fingerprint"]),
    )
    seconds = c["seconds"] or {}
    return {
        "checks": checks,
        "facts": facts,
        "versions": sorted((c["versions"] or {}).items()),
        "seconds": [(name, duration(value)) for name, value in seconds.items()],
        "total": duration(sum(seconds.values())) if seconds else None,
        "command": shlex.join(c["command"]) if c["command"] else None,
    }


def _reconstructions(c: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the check of each model's arithmetic: two, where two files were compared."""
    both = (c["compare"] or {}).get("reconstruction") or {}
    given = {"Reconstruction": c["reconstruction"]} | {f"Reconstruction, file {side}": h for side, h in both.items()}
    return [_reconstruction(name, found) for name, found in given.items() if found]


def _reconstruction(name: str, found: dict[str, Any]) -> dict[str, Any]:
    share = (found["offset_norm"] or 0.0) / (found["output_norm"] or 1.0)
    offset = (
        f" The biases contribute an offset of {percent(share)} of ‖y‖." if share else " No biases: the offset is 0."
    )
    return {
        "name": name,
        "state": "pass" if found["healthy"] else "fail",
        "value": power(found["error"]),
        "limit": f"{'at most' if found['healthy'] else 'not at most'} {power(found['limit'])}",
        "says": "‖J x + offset − y‖ ⁄ ‖y‖, a health check of the arithmetic."
        f"{'' if found['offset_norm'] is None else offset}",
    }


def _parity(c: dict[str, Any]) -> dict[str, Any] | None:
    found = c["parity"]
    if not found:
        return None
    if found["verdict"] is None:
        return {
            "name": "llama.cpp",
            "state": "none",
            "value": "not compared",
            "limit": "",
            "says": found["reason"] or "",
        }
    kl = found["kl_last"] if found["kl_last"] is not None else found["kl"]
    says = [
        f"{capital(found['reason'])}." if found["reason"] else "",
        "" if kl is None else f"KL divergence {power(kl)} nats.",
        f"Expected: {found['cause']}." if found["cause"] else "",
    ]
    return {
        "name": "llama.cpp",
        "state": "pass" if found["verdict"] else "fail",
        "value": "agrees" if found["verdict"] else "disagrees",
        "limit": "on the file as it is" if found["mode"] == "as is" else found["mode"] or "",
        "says": " ".join(filter(None, says)),
    }


def _convergence(c: dict[str, Any]) -> dict[str, Any] | None:
    found = c["svd"]
    if not found or not found["triplets"]:
        return None
    residuals = [t["residual"] for t in found["triplets"] if t["residual"] is not None]
    sweeps = "" if found["sweeps"] is None else f" after {found['sweeps']} sweeps"
    stopped = found["stopped_by"] and f" Stopped by: {found['stopped_by']}."
    return {
        "name": "Singular vectors",
        # One that stopped at its dtype's own precision is as good as that allows, and no failure.
        "state": "fail" if found["stopped_by"] == "sweeps" else "pass" if found["converged"] else "none",
        "value": power(max(residuals)) if residuals else "–",
        "limit": "" if found["tol"] is None else f"asked {power(found['tol'])}",
        "says": f"Worst residual of {len(found['triplets'])} triplets relative to σ, "
        f"{'converged' if found['converged'] else 'not converged'}{sweeps}.{stopped or ''}",
    }


def scatter(run: Run) -> dict[str, Any] | None:
    """Prepare the reconstruction scatter.

    tensors.safetensors: `y`, `offset`, `linear_output` (J x) and, for the contrast, `ordinary_output` (the ordinary
    Jacobian times x), all `[d]`. `contrast`: `{"detached": {...}, "ordinary": {...}}`, each `{"error": relative L2,
    "std_ratio": of error and reconstruction, "max_abs", "pearson", "spearman", "top", "top_agreement": share of the
    `top` tokens after the head that are the same, "kl": nats after the head}`, all but the error optional. A result
    without vectors has the measures alone.
    """
    found = charts.scatters(run)
    rows = [row for row in (_agreement(run, name, found) for name in ("detached", "ordinary")) if row]
    return {"charts": found, "rows": rows, "measured": bool(run.content["contrast"])} if rows else None


def _agreement(run: Run, name: str, found: list[charts.Chart]) -> dict[str, Any] | None:
    """Return what a result says of a reconstruction; the distances from its vectors themselves, where it has them."""
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


def parity(run: Run) -> dict[str, Any] | None:
    """Prepare the comparison with llama.cpp, tensor by tensor.

    `parity.layers`: a list of `{"name", "error", "worst_position", "worst_error"}` in the order of computation, errors
    relative L2; `tolerance` is what none may exceed, or null.
    """
    found = run.content["parity"] or {}
    drawn = charts.departures(run)
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
                "position": "–" if row["worst_position"] is None else str(row["worst_position"]),
                "worst": power(row["worst_error"]),
                "fails": limit is not None and not (row["error"] is not None and row["error"] <= limit),
            }
            for row in found["layers"]
        ],
    }
