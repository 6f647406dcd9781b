"""A whole answer: the logit of each of its tokens, by the tokens before it and by what these belong to."""

from typing import Any

from ggjac.checks import brief
from ggjac.drawing.charts import Heat, Panel
from ggjac.report.numbers import fixed, percent, signed
from ggjac.report.schema import HERE, TOKEN, Check, Wrong, agreeing, each, integer, number, record, spelled, table, text
from ggjac.report.sections.attribute import AT_ONE, ROUNDING
from ggjac.report.sections.common import LEGEND, MAX_CELLS, SHORT, Run, Section, heat
from ggjac.report.summary import caveat

COMMON = ("first", "special")  # groups that are in nearly every logit: they have a scale of colour of their own
HEADINGS = {"first": "Position 0", "answer": "Answer so far"}

FORM: dict[str, Check] = {
    "answer": agreeing(
        record(
            {
                "start": integer,  # the number of tokens of the prompt
                "sources": each(spelled(HERE | {"group": text}), least=2),  # of prompt and answer
                "tokens": each(  # of the answer
                    spelled(
                        HERE | {"logit": number, "probability": number},
                        {"likeliest": TOKEN, "shares": each(number), "offset": number, "groups": table(number)},
                    ),
                    least=1,
                ),
            },
            {"text": text, "versus": TOKEN, "softcap": number, "mlp_path": text},
        ),
        lambda found, where: _check(found, where),
    )
}


def _check(found: dict[str, Any], where: str) -> None:
    """Check that the answer follows its prompt, and that there is a share for each token before one, or for none."""
    start, tokens = found["start"], found["tokens"]
    if not 0 < start or len(found["sources"]) != start + len(tokens):
        raise Wrong(
            f"{where}: {start} tokens and {len(tokens)} of an answer are not the {len(found['sources'])} sources"
        )
    for row, token in enumerate(tokens):
        if (token["groups"] or {}).keys() != (tokens[0]["groups"] or {}).keys():
            raise Wrong(f"{where}.tokens[{row}]: groups are others than those of the first token")
        if (token["shares"] is None) != (tokens[0]["groups"] is None):
            raise Wrong(f"{where}.tokens[{row}]: of shares and groups one is missing")
        if token["shares"] is not None and len(token["shares"]) != start + row:
            raise Wrong(f"{where}.tokens[{row}]: {len(token['shares'])} shares of the {start + row} tokens before it")


def _named(sources: list[dict[str, Any]], places: list[int], rows: list[dict[str, Any]], name: str) -> Panel:
    """Return the columns of some sources."""
    shares = [row["shares"] for row in rows]
    return Panel(
        name,
        tuple(sources[i]["token"] for i in places),
        tuple(f"{i} {sources[i]['token']} ({sources[i]['group']})" for i in places),
        tuple(tuple(each[i] if i < len(each) else None for i in places) for each in shares),
    )


def answer_grid(run: Run) -> list[Heat]:
    """Draw the shares of all tokens before each token of the answer; nothing where there are none, or too many."""
    found = run.content["answer"]
    if not found or found["tokens"][0]["shares"] is None:
        return []
    sources, tokens = found["sources"], found["tokens"]
    excluded = run.content["exclude"] or []
    inputs = [i for i in range(len(sources) - 1) if i not in excluded]  # nothing follows the last token
    common = [i for i in inputs if sources[i]["group"] in COMMON]
    others = [i for i in inputs if sources[i]["group"] not in COMMON]
    panels = [
        _named(sources, places, tokens, name)
        for places, name in ((common, "position 0 and special tokens"), (others, "all other tokens"))
        if places
    ]
    grid = Heat(
        key="attribute-answer",
        title="Shares in the logit of each token of the answer",
        label="answer",
        rows=tuple(f"{token['position']} {token['token']}" for token in tokens),
        panels=tuple(panels),
        summary=f"{len(tokens)} tokens of the answer, a row each; {len(inputs)} tokens before them, a column each.",
        tilted=True,
    )
    return [grid] if grid.cells <= MAX_CELLS else []


def answer(run: Run) -> dict[str, Any] | None:
    """Prepare the tokens of an answer: logits, probabilities, and the shares of what stands before them."""
    found = run.content["answer"]
    if not found:
        return None
    sources, tokens = found["sources"], found["tokens"]
    by_token = tokens[0]["shares"] is not None
    kinds = [*(tokens[0]["groups"] or {})]
    sums = [[token["groups"][kind] for kind in kinds] for token in tokens]
    offset = any(token["offset"] for token in tokens)
    rows = []
    for row, token in enumerate(tokens):
        best = token["likeliest"]
        rows.append(
            token
            | {
                "value": fixed(token["logit"], 2),
                "chance": percent(token["probability"]),
                "instead": None if best is None or best["id"] == token["id"] else best["token"],
                "instead_chance": best and best["probability"] is not None and percent(best["probability"]),
                "sums": [signed(value, 2) for value in sums[row]],
                "offset": signed(token["offset"] or 0.0, 2) if offset else None,
                "largest": _largest(token["shares"], sources) if by_token else [],
                "complete": not by_token or _complete(token),
            }
        )
    means = [sum(column) / len(tokens) for column in zip(*sums, strict=True)]
    return {
        "rows": rows,
        "kinds": [HEADINGS.get(kind, kind.capitalize()) for kind in kinds],
        "means": [signed(value, 2) for value in means],
        "mean": fixed(sum(token["logit"] for token in tokens) / len(tokens), 2),
        "mean_offset": signed(sum(token["offset"] or 0.0 for token in tokens) / len(tokens), 2),
        "offset": offset,
        "excluded": brief(run.content["exclude"] or []),
        "many": len(run.content["exclude"] or []) > 1,
        "instead": any(row["instead"] for row in rows),
        "heats": [heat(grid) for grid in answer_grid(run)],
        "versus": found["versus"],
        "capped": bool(found["softcap"]),
        "complete": all(row["complete"] for row in rows),
        "by_token": by_token,
        "caveat": caveat(run.content),
        "short": len(rows) <= SHORT,
        "legend": LEGEND,
    }


def _largest(shares: list[float], sources: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Return the largest shares of single tokens, without those that are in nearly every logit."""
    parts = [(source, share) for source, share in zip(sources, shares, strict=False) if source["group"] not in COMMON]
    parts.sort(key=lambda part: -abs(part[1]))
    return [(source["token"], signed(share, 2)) for source, share in parts[:AT_ONE] if share]


def _complete(token: dict[str, Any]) -> bool:
    """Return whether the shares and the offset make up the logit, but for rounding."""
    parts = [*token["shares"], token["offset"] or 0.0]
    return abs(token["logit"] - sum(parts)) <= ROUNDING * (sum(map(abs, parts)) or 1.0)


SECTIONS = (
    Section(
        "attribute-answer",
        "Answer",
        answer,
        "Each row splits the logit of one token of the answer over all tokens before it. The first position and "
        "special tokens, which are in nearly every logit, have a scale of colour of their own. Point at a cell, or use "
        "the arrow keys, to see its value.",
        answer_grid,
    ),
)
