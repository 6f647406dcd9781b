"""Depth: the layer x rank grids, the rank of a token by depth, and the stable rank."""

import math
from typing import Any

from ggjac.report import charts
from ggjac.report.load import Run
from ggjac.report.numbers import percent, power
from ggjac.report.sections.common import SHOWN, capital

MAX_RANKS = 300_000  # ranks that travel with the page; the tokens listed first have theirs


def grid(run: Run) -> dict[str, Any] | None:
    """Prepare the layer x rank grids, and the rank by depth of the tokens in them.

    `layers.taps`: a list of `{"map": "cumulative" | "blockwise" | "to_end", "kind": "layer" | "attn" | "mlp", "index",
    "stable_rank", "triplets"}`. A tap is a place in the network, seen through the final norm frozen there: `layer` is
    the residual stream after `index` blocks, `attn` and `mlp` are what block `index` (counted from 1) adds to it. `map`
    says which map's singular triplets these are: from the prompt's embeddings to the tap, of block `index` alone, or
    from the tap's residual stream to the output. `triplets`: a list of `{"singular_value", "residual", "left": [{"id",
    "token"}], "arriving"}`, the largest first, `left` the tokens that the left vector promotes through the LM head,
    `arriving` (optional) those of what it becomes at the output.

    `layers.readout`: a list of `{"index", "top": [{"id", "token", "probability"}]}`: the residual stream itself after
    `index` blocks, read through final norm and head; the most likely first; 0 blocks may be there.

    `layers.ranks`: `{"tokens": [{"id", "token"}], "depths": [{"index", "ranks": [...]}]}`: the rank, from 1, that each
    of these tokens has in the readout at each depth, in the order of `tokens`, 0 where it is not known; `tokens` should
    be all that `taps` and `readout` name, the most important first (the page takes as many as it can carry).
    """
    layers = run.content["layers"]
    if not layers:
        return None
    ranks = layers["ranks"] or {"tokens": [], "depths": []}
    depths = sorted(ranks["depths"], key=lambda depth: depth["index"])
    carried = ranks["tokens"][: MAX_RANKS // max(1, len(depths))]
    ids = {token["id"] for token in carried}
    panels = [*_vector_grids(layers["taps"], ids), *_readout_grid(layers["readout"] or [], ids)]
    if not panels:
        return None
    axes = charts.rank_axes(run)
    best = (run.content["predictions"] or [{"id": None}])[0]["id"]
    groups: dict[str, list[tuple[int, str]]] = {}
    for i, panel in enumerate(panels):
        groups.setdefault(panel["group"], []).append((i, panel["name"]))
    return {
        "panels": panels,
        "groups": groups,
        "axes": axes,
        "data": axes
        and {
            "tokens": [[token["id"], token["token"]] for token in carried],
            "depths": [depth["index"] for depth in depths],
            "x": [round(axes.x.place(depth["index"]), 4) for depth in depths],
            "ranks": [depth["ranks"][: len(carried)] for depth in depths],
            "span": [math.log(axes.y.low), math.log(axes.y.high)],
            "pinned": best if best in ids else None,
        },
    }


def _vector_grids(taps: list[dict[str, Any]], pinnable: set[int]) -> list[dict[str, Any]]:
    """Return a grid for each map and kind: a row for each depth, a column for each singular vector."""
    found = []
    for name, words in charts.MAPS.items():
        for kind, label in charts.KINDS.items():
            own = sorted((t for t in taps if t["map"] == name and t["kind"] == kind), key=lambda t: t["index"])
            if any(t["triplets"] for t in own):
                caption = f"Left singular vectors of the map {words}, {label}: the tokens each promotes"
                found.append(_vector_grid(own, "left", words, label, caption, pinnable))
            if any(v["arriving"] for t in own for v in t["triplets"]):
                caption = (
                    f"The same vectors of the map {words}, {label}, carried on to the output: the tokens each promotes"
                )
                found.append(_vector_grid(own, "arriving", words, f"{label} at the output", caption, pinnable))
    return found


def _vector_grid(
    taps: list[dict[str, Any]], what: str, group: str, name: str, caption: str, pinnable: set[int]
) -> dict[str, Any]:
    """Return one of them; `what` is the decoding that is shown, `left` or `arriving`."""
    width = max(len(t["triplets"]) for t in taps)
    rows = [
        {
            "index": t["index"],
            "cells": [
                {"sigma": power(v["singular_value"], 2), "tokens": _cell((v[what] or [])[:SHOWN], pinnable)}
                for v in t["triplets"]
            ]
            + [{"sigma": "", "tokens": []}] * (width - len(t["triplets"])),
        }
        for t in taps
    ]
    columns = [f"u{str(j).translate(_LOWERED)}" for j in range(width)]
    return {"group": capital(group), "name": capital(name), "columns": columns, "rows": rows, "caption": caption}


_LOWERED = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")


def _readout_grid(readout: list[dict[str, Any]], pinnable: set[int]) -> list[dict[str, Any]]:
    """Return the grid of the residual stream's own readout: a row for each depth, a column for each rank."""
    width = max((len(row["top"]) for row in readout), default=0)
    if not width:
        return []
    rows = [
        {
            "index": row["index"],
            "cells": [
                {
                    "sigma": "" if t["probability"] is None else percent(t["probability"], 0),
                    "tokens": _cell([t], pinnable),
                }
                for t in row["top"]
            ]
            + [{"sigma": "", "tokens": []}] * (width - len(row["top"])),
        }
        for row in sorted(readout, key=lambda row: row["index"])
    ]
    return [
        {
            "group": "Readout",
            "name": "Most likely tokens",
            "columns": [str(rank + 1) for rank in range(width)],
            "rows": rows,
            "caption": "The residual stream read through final norm and LM head: its most likely tokens",
        }
    ]


def _cell(tokens: list[dict[str, Any]], pinnable: set[int]) -> list[dict[str, Any]]:
    return [{"id": t["id"], "token": t["token"], "pins": t["id"] in pinnable} for t in tokens]


def stable_rank(run: Run) -> dict[str, Any] | None:
    """Prepare the stable rank by depth.

    `layers.taps[].stable_rank`: `{"value", "error", "frobenius"}` of the tap's map; the error one standard error, 0
    where the value is exact.
    """
    found = charts.stable_ranks(run)
    return {"groups": found, "path": charts.paths(run)} if found else None
