"""Stable ranks of the tokens of many prompts."""

from dataclasses import replace
from typing import Any

from ggjac.drawing.charts import Chart, Series, curves, from_to, known
from ggjac.report.schema import ESTIMATE, RECONSTRUCTION, TOKEN, Check, each, integer, number, record, spelled, text
from ggjac.report.sections.common import MAX_POINTS, SHORT, Run, Section
from ggjac.units import MISSING, power

MAX_PROMPTS = 200  # listed with their tokens; the chart shows all

_PROMPT = record(
    # The stable rank of each token's own map to the output position.
    {"tokens": each(spelled({"stable_rank": ESTIMATE}), least=1)},
    {
        "prompt": text,
        "joint": ESTIMATE,  # of the map of all tokens together
        "next": TOKEN,  # the predicted one
        "stopped_by": text,
        "reconstruction": RECONSTRUCTION,
    },
)
_BY_POSITION = record(
    {"position": integer, "prompts": integer},
    dict.fromkeys(("mean", "error", "median", "least", "most"), number),  # over prompts; the error is that of the mean
)
FORM: dict[str, Check] = {
    "ranks": record({"prompts": each(_PROMPT, least=1), "by_position": each(_BY_POSITION)}),
}


def ranks_over_prompts(run: Run) -> list[Chart]:
    """Draw the stable rank of each token's own map by its position: of every prompt, and the mean over prompts."""
    given = run.content["ranks"]
    if not given:
        return []
    every = [
        (float(i), token["stable_rank"]["value"])
        for prompt in given["prompts"]
        for i, token in enumerate(prompt["tokens"])
    ]
    points = known(every)
    stride = -(-len(points) // MAX_POINTS) or 1
    rows = [row for row in given["by_position"] if row["mean"] is not None]
    mean = Series(
        "mean ± standard error",
        tuple((float(row["position"]), row["mean"]) for row in rows),
        error=tuple(row["error"] or 0.0 for row in rows),
    )
    cloud = Series("each prompt", points[::stride], "faint", line=False)
    summary = f"{len(given['prompts'])} prompts; {from_to('mean', mean.points)}."
    series = [cloud, mean] if len(given["prompts"]) > 1 else [replace(mean, name="stable rank")]
    title = "Stable rank of each token's own map, by position"
    return curves("ranks-by-position", title, ("position", "stable rank"), series, summary)


def ranks(run: Run) -> dict[str, Any] | None:
    """Prepare the stable ranks over many prompts."""
    found = run.content["ranks"]
    if not found:
        return None
    prompts = found["prompts"]
    return {
        "charts": ranks_over_prompts(run),
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
                "tokens": [(t["token"], _rank(t["stable_rank"]["value"])) for t in prompt["tokens"]],
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


SECTIONS = (
    Section(
        "ranks",
        "Stable rank over prompts",
        ranks,
        "The stable rank of a token’s own map is the number of directions of its embedding that the network "
        "effectively uses; here by the token’s position.",
        ranks_over_prompts,
    ),
)
