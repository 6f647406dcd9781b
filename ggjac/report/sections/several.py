"""More than one of a kind: two files of one model, and many prompts."""

from typing import Any

from ggjac.report import charts
from ggjac.report.load import Run
from ggjac.report.numbers import MISSING, aligned, percent, power, signed
from ggjac.report.sections.common import SHORT, bars, digits
from ggjac.report.sections.frame import file_name

MAX_PROMPTS = 200  # whose tokens are listed; the chart has them all


def compare(run: Run) -> dict[str, Any] | None:
    """Prepare the comparison of two files of one model, `a` and `b`.

    `compare`: `{"singular_values": [{"a", "b", "residual"}], "angles": {"left", "right"} (degrees, largest first),
    "target", "softcap", "logit": {"a", "b"}, "offset": {"a", "b"}, "shares": [{"position", "token", "a", "b"}],
    "positions": [{"position", "token", "kl", "top1": {"a", "b"}, "same_top1"}], "kl", "mean_kl", "top1_agreement",
    "output_distance", "converged", "tol"}`; `other_model` is `b`.
    """
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
        "spectra": charts.spectra(run),
        "angle_charts": charts.angles(run),
        "kl_charts": charts.divergences(run),
        "triplets": [
            {
                "index": j,
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
                "a": row["top1"]["a"] if row["top1"] else "",
                "b": row["top1"]["b"] if row["top1"] else "",
                "kl": power(row["kl"]),
                "same": row["same_top1"] is not False,
            }
            for row in found["positions"]
        ],
        "short": len(found["positions"]) <= SHORT,
        "says": [
            (words, value)
            for words, value in (
                ("KL divergence at the output, nats", _power(found["kl"])),
                ("in the mean over positions", _power(found["mean_kl"])),
                ("Same top token", found["top1_agreement"] is not None and percent(found["top1_agreement"], 0)),
                ("‖y_b − y_a‖ ⁄ ‖y_a‖", _power(found["output_distance"])),
            )
            if value
        ],
        "open_end": found["converged"] is False and (power(found["tol"]) if found["tol"] else "what was asked"),
    }


def _power(value: float | None) -> str | None:
    return None if value is None else power(value)


def _angle(angles: list[float | None], j: int) -> str:
    return MISSING if j >= len(angles) or angles[j] is None else f"{angles[j]:.3f}°"


def ranks(run: Run) -> dict[str, Any] | None:
    """Prepare the stable ranks over many prompts.

    `ranks`: `{"prompts": [{"prompt", "tokens": [{"text", "stable_rank": {"value", "error"}}], "joint": {"value",
    "error"}, "next": {"token"}, "stopped_by"}], "by_position": [{"position", "prompts", "mean", "error", "median",
    "least", "most"}]}`: of each token's own map at the last position, of the joint one, and by the token's position
    over all prompts.
    """
    found = run.content["ranks"]
    if not found:
        return None
    prompts = found["prompts"]
    return {
        "charts": charts.ranks_over_prompts(run),
        "many": len(prompts) > 1,
        "by_position": [
            {
                "position": row["position"],
                "prompts": row["prompts"],
                **{key: _rank(row[key]) for key in ("mean", "median", "least", "most")},
                "error": "" if row["error"] is None else f"{row['error']:.2g}",
            }
            for row in found["by_position"]
        ],
        "short_positions": len(found["by_position"]) <= SHORT,
        "prompts": [
            {
                "tokens": [(t["text"], _rank(t["stable_rank"]["value"])) for t in prompt["tokens"]],
                "next": prompt["next"] and prompt["next"]["token"],
                "joint": _rank((prompt["joint"] or {}).get("value")),
                "error": f"± {prompt['joint']['error']:.1g}" if prompt["joint"] and prompt["joint"]["error"] else "",
            }
            for prompt in prompts[:MAX_PROMPTS]
        ],
        "count": len(prompts),
        "short_prompts": len(prompts) <= SHORT // 2,
        "slow": sum(prompt["stopped_by"] == "sweeps" for prompt in prompts),
        "unhealthy": sum(
            bool(prompt["reconstruction"]) and not prompt["reconstruction"]["healthy"] for prompt in prompts
        ),
    }


def _rank(value: float | None) -> str:
    return MISSING if value is None else f"{value:.4g}" if value < 1e5 else power(value, 3)
