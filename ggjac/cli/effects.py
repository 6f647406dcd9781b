"""Measured effects of tokens that are left out, in the terminal: `--ablate`, and the table beside their scores."""

from typing import Any

import click

from ggjac import display
from ggjac.sizes import ABLATIONS

# Scores in the headings of the table; in whole words under it.
HEADINGS = {
    "share": "share",
    "other_share": "other rule",
    "detached": "detached",
    "gradient_input": "grad x input",
    "ordinary": "ordinary",
    "attention": "rollout",
}

ablate = click.option(
    "--ablate",
    type=click.Choice(ABLATIONS),
    help="Also leave each token out, and show what that does: drawn tokens take its place (replace), the mean "
    "embedding, or zero.",
)


def show_effects(data: dict[str, Any], logit: str, count: int) -> None:
    """Print the `count` largest effects in order of their size, or all by position, beside the scores; and notes."""
    from ggjac.cli.render import bar, line, table
    from ggjac.effects import agreed
    from ggjac.units import PLACES, SCORES

    rows = data["tokens"]
    if rest := max(0, len(rows) - count):
        rows = sorted(rows, key=lambda row: -abs(row["effect"]))[:count]
    largest = max(abs(row["effect"]) for row in rows) or 1.0
    names = list(data["agreement"])
    drawn = len(names) <= 2  # bars beside more scores are too wide for a terminal
    cells: list[tuple] = []
    for row in rows:
        numbers = [f"{row[name]:+.3f}" for name in ("effect", *names)]
        cells.append((row["position"], display.token(row), *numbers, *([bar(row["effect"], largest)] if drawn else [])))
    for part, words in (("signed", "rank correlation"), ("sizes", "of absolute values")):
        found = [agreed(data["agreement"][name][part]) for name in names]
        cells.append(("", words, "", *found, *([""] if drawn else [])))
    headings = ["#effect", *(f"#{HEADINGS[name]}" for name in names), *([""] if drawn else [])]
    table(f"Effect of leaving each token out on {logit}", ["#position", "token", *headings], cells)
    line(f"effect: the logit, minus that without the token; {PLACES[data['by']]}.")
    told = [f"{HEADINGS[name]}: {SCORES[name]}" for name in names if HEADINGS[name] != SCORES[name]]
    if told:
        line(f"{'; '.join(told)}.")
    if rest:
        line(f"{rest} more tokens: --all")
