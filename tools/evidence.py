"""Measure what shares predict, and how far the maps hold, on 100 prompts; print the tables of docs/evidence.md.

    python tools/evidence.py measure MODEL FILE      # a line of JSON for each prompt; a rerun continues
    python tools/evidence.py tables FILE [FILE ...]

Takes some ten minutes for each small model on one core.
"""

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import torch

import ggjac
from ggjac.correlation import spearman
from ggjac.model import Model
from ggjac.sizes import ABLATIONS

# Each sentence with ten words: the word before takes the place of the last one in a swap.
SENTENCES = {
    "The capital of {} is": "France Italy Spain Germany Japan China Russia Egypt Greece Norway",
    "The largest city in {} is": "Canada Brazil Australia India Mexico Turkey Kenya Peru Poland Sweden",
    "Most people in {} speak": "Austria Cuba Chile Iran Korea Israel Portugal England Denmark Vietnam",
    "The opposite of {} is": "hot tall light happy early rich hard open fast wet",
    "The color of {} is": "snow grass blood coal gold milk sand rust ink corn",
    "A young {} is called a": "dog cat cow horse sheep goat pig lion bear deer",
    "My friend plays the {} in a": "piano violin guitar drum flute trumpet harp organ bass banjo",
    "He went to the {} to buy some": "market store shop farm mall city village town pharmacy port",
    "She works as a {} in a large": "doctor teacher nurse lawyer cook writer driver singer farmer guard",
    "The word for {} in French is": "water bread house tree sun moon fire book door king",
}
PROMPTS = [sentence.format(word) for sentence, words in SENTENCES.items() for word in words.split()]
STEPS = (0.01, 0.05, 0.1, 0.2, 0.5, 1.0)
DRAWS = 2
ROWS = {
    "share": "share, `up`",
    "gate": "share, `gate`",
    "detached": "prediction of the detached map, `up`",
    "gradient_input": "gradient x input",
    "ordinary": "prediction of the ordinary map",
    "attention": "attention rollout",
    "place": "position in the prompt",
    "share given place": "share, `up`, at a given position",
    "gate given place": "share, `gate`, at a given position",
    "gradient_input given place": "gradient x input, at a given position",
    "mean": "effect by `mean`",
    "replace": "effect by `replace`",
    "zero": "effect by `zero`",
}


def measured(model: Model, ids: list[list[int]], i: int) -> dict[str, Any]:
    """Return one prompt's effects by way, scores, and curves."""
    own = ids[i]
    word = ids[i - 1] if i % 10 else ids[i + 9]
    differs = [p for p, (a, b) in enumerate(zip(own, word, strict=False)) if a != b]
    swaps = [(differs[0], word[differs[0]])] if len(own) == len(word) and len(differs) == 1 else []
    others = (ids[(i + 10 * k + 5) % len(ids)] for k in range(1, len(SENTENCES)))
    toward = next((other for other in others if len(other) == len(own)), None)
    up, gate = (model.trace(own, mlp_path=rule).jacobian() for rule in ("up", "gate"))
    found = ggjac.reach(up, model, rank=1, steps=STEPS, swaps=swaps, toward=toward, ablate="mean")
    assert found.effects is not None
    scores = dict(found.effects.scores) | {"gate": ggjac.attribute(gate).shares}
    effects = {by: ggjac.ablate(up, model, by, draws=DRAWS).effects for by in ABLATIONS if by != "mean"}
    return {
        "prompt": PROMPTS[i],
        "target": model.word(found.target),
        "tokens": [model.word(id) for id in own],
        "effects": {name: one.tolist() for name, one in (effects | {"mean": found.effects.effects}).items()},
        "scores": {name: one.tolist() for name, one in scores.items()},
        "curves": [curve.data() for curve in found.curves],
    }


def measure(path: str, file: Path) -> None:
    """Add a line for each prompt that has none yet."""
    model = ggjac.open_model(path)
    ids = [model.tokenize(prompt) for prompt in PROMPTS]
    done = len(file.read_text().splitlines()) if file.exists() else 0
    for i in range(done, len(ids)):
        with file.open("a") as lines:
            lines.write(json.dumps(measured(model, ids, i)) + "\n")
        print(f"{i + 1} of {len(ids)}", file=sys.stderr)


def correlations(found: list[dict[str, Any]], first: int) -> Iterator[str]:
    """Yield the table of rank correlations from position `first` on: means over prompts, and their standard errors."""
    yield "| score | " + " | ".join(f"`{by}`, signed | sizes" for by in ABLATIONS) + " |"
    yield "|---|" + "---|" * 2 * len(ABLATIONS)
    for name, words in ROWS.items():
        cells = []
        for by in ABLATIONS:
            for sizes in (False, True):
                values = [value for one in found if (value := agreement(one, name, by, first, sizes)) is not None]
                spread = stdev(values) / len(values) ** 0.5 if values else 0.0
                cells.append(f"{mean(values):+.2f} ± {spread:.2f}" if values else "")
        yield f"| {words} | " + " | ".join(cells) + " |"


def agreement(one: dict[str, Any], name: str, by: str, first: int, sizes: bool) -> float | None:
    """Return one prompt's rank correlation of a score, or of other effects, with effects; None where it has none.

    At a given position, it is the partial correlation: what is left where neither is explained by the position.
    """
    name, _, given = name.partition(" given ")
    if name == by or (by != "mean" and name in ("detached", "ordinary")):
        return None  # what a map predicts depends on what takes the token's place
    effects = torch.tensor(one["effects"][by], dtype=torch.float64)
    every = one["scores"] | one["effects"] | {"place": list(range(len(effects)))}
    score, place = (torch.tensor(every[each], dtype=torch.float64)[first:] for each in (name, "place"))
    pair = [part.abs() if sizes else part for part in (score, effects[first:])]
    value = spearman(*pair)
    if given:
        a, b = (spearman(part, place) for part in pair)
        rest = ((1 - a * a) * (1 - b * b)) ** 0.5
        value = (value - a * b) / rest if rest > 1e-9 else math.nan
    return None if math.isnan(value) else value


def distances(found: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the table of curves: medians over prompts."""
    yield "| path | prompts | prediction | passes 10 % at | 50 % at | missed at 0.01 | at 0.1 | at 1 |"
    yield "|---|---|---|---|---|---|---|---|"
    for kind in ("swap", "toward", "singular", "random"):
        own = [curve for one in found for curve in one["curves"] if curve["kind"] == kind]
        for name in ("unchanged", "detached", "ordinary"):
            cells = []
            for level in ("0.1", "0.5"):
                passes = [curve["passes"][name][level] for curve in own]
                middle = median(float("inf") if t is None else t for t in passes)
                cells.append("beyond 1" if middle == float("inf") else f"{middle:.3f}")
            for t in (0.01, 0.1, 1.0):
                points = [next(point for point in curve["points"] if point["t"] == t) for curve in own]
                cells.append(f"{median(point[name] / point['unchanged'] for point in points):.0%}")
            yield f"| {kind} | {len(own)} | {name} | " + " | ".join(cells) + " |"


def tables(file: Path) -> None:
    """Print the tables of one model."""
    found = [json.loads(line) for line in file.read_text().splitlines()]
    lengths = [len(one["tokens"]) for one in found]
    print(f"\n### {file.stem}: {len(found)} prompts of {min(lengths)} to {max(lengths)} tokens\n")
    print("\n".join(correlations(found, 0)), "\nWithout the first position:\n", sep="\n")
    print("\n".join(correlations(found, 1)), "", *distances(found), sep="\n")


if __name__ == "__main__":
    if sys.argv[1] == "measure":
        measure(sys.argv[2], Path(sys.argv[3]))
    else:
        for name in sys.argv[2:]:
            tables(Path(name))
