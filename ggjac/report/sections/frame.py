"""What the page begins and ends with: the prompt, its prediction, its tokens."""

from pathlib import PurePath
from typing import Any

from ggjac.report.load import Run
from ggjac.report.numbers import fixed, percent, size
from ggjac.report.sections.common import SHORT, joined, length, pairs


def header(run: Run) -> dict[str, Any]:
    """Prepare the title: the prompt, and the token predicted after it; of many prompts, how many."""
    c = run.content
    model, tokens, position = c["model"], c["tokens"], c["position"]
    # The prompt as it was typed, if all of it is read; else the tokens up to the position that is.
    whole = position == len(tokens) - 1 and c["prompt"] is not None
    prompt = c["prompt"] if whole else joined([t["text"] for t in tokens[: position + 1]])
    if not tokens:
        prompt = f"{len(c['ranks']['prompts'])} prompts"
    best = (c["predictions"] or [None])[0]
    other = c["other_model"]
    return {
        "prompt": prompt if len(prompt) <= 420 else f"… {prompt[-400:]}",
        "long": len(prompt) > 120,
        "rest": "" if whole else joined([t["text"] for t in tokens[position + 1 :]])[:200],
        "next": best and joined([best["token"]]),
        "chance": best and percent(best["probability"]),
        "name": model["name"] or file_name(model),
        "facts": pairs(
            ("File", file_name(model)),
            ("Beside", other and file_name(other)),
            ("Architecture", model["architecture"]),
            ("Size", model["bytes"] and size(model["bytes"])),
            ("Tokens", str(len(tokens)) if tokens else None),
            ("Arithmetic", " on ".join(filter(None, (c["dtype"], c["device"])))),
            ("Made", (c["created"] or "").partition("T")[0]),
        ),
        "source": run.source,
    }


def file_name(model: dict[str, Any]) -> str:
    """Return the name of a model's file, whichever system wrote its path."""
    return PurePath(model["path"].replace("\\", "/")).name


def prediction(run: Run) -> dict[str, Any] | None:
    """Prepare the most likely next tokens.

    `predictions`: a list of `{"id", "token", "logit", "probability"}`, the most likely first.
    """
    rows = run.content["predictions"]
    return rows and {
        "rows": [
            row
            | {
                "logit": fixed(row["logit"]),
                "chance": percent(row["probability"], 2),
                "bar": length(row["probability"] or 0.0),
            }
            for row in rows
        ]
    }


def tokens(run: Run) -> dict[str, Any] | None:
    """Prepare the token table.

    `tokens`: a list of `{"position", "id", "text"}`, the text made visible; `warning`: text or null.
    """
    c = run.content
    if not c["tokens"]:
        return None
    return {
        "rows": [t | {"read": i == c["position"] and not c["all_positions"]} for i, t in enumerate(c["tokens"])],
        "short": len(c["tokens"]) <= SHORT,
        "warning": c["warning"],
    }
