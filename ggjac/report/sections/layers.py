"""Depth by depth: the vectors of every map, the logit lens, ranks of tokens, stable ranks."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ggjac.drawing.charts import PARTS, Axis, Chart, Series, linear, logarithmic, scales
from ggjac.report.numbers import percent
from ggjac.report.schema import (
    ESTIMATE,
    FOLLOWING,
    SINK,
    TOKEN,
    TRIPLET,
    Check,
    Wrong,
    agreeing,
    each,
    integer,
    number,
    one_of,
    record,
)
from ggjac.report.sections.common import SHOWN, Run, Section, capital
from ggjac.units import is_close, power

NAMED_PLACES = 8  # depths or blocks that a remark names
MAX_RANKS = 300_000  # ranks in the page; of more, those of the tokens listed first

#: A tap is a place in the network, seen through the final norm frozen there: the residual stream at depth `index`,
#: counted in blocks applied, or what the attention or MLP of `block` adds to it (`index - 1`: blocks count from 0).
KINDS = {"layer": "layer", "attn": "attention", "mlp": "MLP"}
#: The map between a tap and an end: from the embeddings to the tap, of `block` alone, from the tap to the output.
MAPS = {
    "cumulative": "from the input to this depth",
    "blockwise": "each block alone",
    "to_end": "from this depth to the output",
}

_TAP = record(
    {
        "map": one_of(*MAPS),
        "kind": one_of(*KINDS),
        "index": integer,
        # The largest singular value first. `left`: the tokens that the left vector promotes through the LM head;
        # `arriving`: those of the same vector carried on to the output.
        "triplets": each(record(TRIPLET | {"left": each(TOKEN)}, {"arriving": each(TOKEN)})),
    },
    {
        "block": integer,
        "stable_rank": ESTIMATE,
        "next_singular_value": FOLLOWING,
        "sink": SINK,  # of the first right vector's weight
    },
)
_RANKS = record(
    {
        "tokens": each(TOKEN),  # the most important first
        "depths": each(record({"index": integer, "ranks": each(integer)})),  # of each token, from 1; 0 if unknown
    }
)
_LAYERS = record(
    {"taps": each(_TAP)},
    {
        "readout": each(record({"index": integer, "top": each(TOKEN)})),  # logit lens at depth `index`, 0 included
        "ranks": _RANKS,  # in the readout at each depth
        "path": each(record({"index": integer, "values": each(number, least=2)})),  # along the output's directions
    },
)


def _check_ranks(layers: dict[str, Any], where: str) -> None:
    """Check that every token has its rank at every depth."""
    ranks = layers["ranks"] or {"tokens": [], "depths": []}
    count = len(ranks["tokens"])
    for depth in ranks["depths"]:
        if len(depth["ranks"]) != count:
            raise Wrong(f"{where}.ranks: {len(depth['ranks'])} ranks at depth {depth['index']} for {count} tokens")


FORM: dict[str, Check] = {
    "layers": agreeing(_LAYERS, _check_ranks),
}

# -- grids and ranks ---------------------------------------------------------------------------------------------------


def rank_axes(run: Run) -> Chart | None:
    """Draw empty axes for the rank of a token by depth; the page's script and `ranks_by_depth` fill them."""
    ranks = (run.content["layers"] or {}).get("ranks")
    if not ranks or not ranks["tokens"] or not ranks["depths"]:
        return None
    depths = [depth["index"] for depth in ranks["depths"]]
    worst = max((rank for depth in ranks["depths"] for rank in depth["ranks"]), default=1)
    return Chart(
        key="rank-by-depth",
        title="Rank by depth",
        x=linear("depth", depths, whole=True, pad=0.03),
        y=logarithmic("rank", [1, max(10, worst)], flipped=True),
        series=(),
        summary="The table below has the numbers.",
    )


def ranks_by_depth(run: Run) -> list[Chart]:
    """Draw the predicted token's rank by depth, as the page does when it opens."""
    axes, predictions = rank_axes(run), run.content["predictions"]
    if axes is None or not predictions:
        return []
    ranks = run.content["layers"]["ranks"]
    ids = [token["id"] for token in ranks["tokens"]]
    if predictions[0]["id"] not in ids:
        return []
    column = ids.index(predictions[0]["id"])
    rows = sorted(ranks["depths"], key=lambda depth: depth["index"])
    points = tuple((float(row["index"]), float(row["ranks"][column])) for row in rows if row["ranks"][column] > 0)
    if not points:
        return []
    name = ranks["tokens"][column]["token"]
    return [replace(axes, title=f"Rank of {name} by depth", series=(Series(name, points),))]


def layers(run: Run) -> dict[str, Any] | None:
    """Prepare the grids of vectors and the logit lens, and the rank by depth of the tokens in them."""
    found = run.content["layers"]
    if not found:
        return None
    ranks = found["ranks"] or {"tokens": [], "depths": []}
    depths = sorted(ranks["depths"], key=lambda depth: depth["index"])
    carried = ranks["tokens"][: MAX_RANKS // max(1, len(depths))]
    ids = {token["id"] for token in carried}
    panels = [*_vector_grids(found["taps"], ids), *_logit_lens(found["readout"] or [], ids)]
    if not panels:
        return None
    axes = rank_axes(run)
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
    for name, words in MAPS.items():
        for kind, label in KINDS.items():
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
    taps: list[dict[str, Any]], key: str, group: str, name: str, caption: str, pinnable: set[int]
) -> dict[str, Any]:
    """Return the grid of one map and kind; `key` is the decoding shown, `left` or `arriving`."""
    width = max(len(t["triplets"]) for t in taps)
    rows: list[dict[str, Any]] = [
        {
            "index": place(t),
            "cells": [
                {
                    "sigma": power(v["singular_value"], 2),
                    "tokens": _cell((v[key] or [])[:SHOWN], pinnable),
                    "rest": [token["token"] for token in (v[key] or [])[SHOWN:]],
                }
                for v in t["triplets"]
            ]
            + [{"sigma": "", "tokens": [], "rest": []}] * (width - len(t["triplets"])),
        }
        for t in taps
    ]
    columns = [f"u{str(j).translate(_LOWERED)}" for j in range(1, width + 1)]
    most = max(SHOWN + len(cell["rest"]) for row in rows for cell in row["cells"])
    return {
        "group": capital(group),
        "name": capital(name),
        "axis": "Depth" if taps[0]["block"] is None else "Block",
        "columns": columns,
        "rows": rows,
        "caption": caption,
        "more": most if most > SHOWN else None,
        "notes": remarks(taps),
    }


def remarks(taps: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what the table of a map's vectors does not show: attention sinks, and cuts through clusters."""
    found = []
    if sinks := [tap for tap in taps if tap.get("sink")]:
        shares = [tap["sink"]["fraction"] for tap in sinks]
        takes = " to ".join(dict.fromkeys(f"{share:.0%}" for share in (min(shares), max(shares))))
        where = _places(sinks, taps)
        found.append(f"Position 0 takes {takes} of the weight of right vector 1 at {where}, as an attention sink does.")
    ends = [(tap, tap["triplets"][-1]["singular_value"]) for tap in taps if tap["triplets"]]
    if cut := [tap for tap, last in ends if is_close(last, tap.get("next_singular_value"))]:
        k = len(cut[0]["triplets"])
        found.append(f"σ{k + 1} is close to σ{k} at {_places(cut, taps)}: there the cut goes through a cluster.")
    return found


def _places(some: Sequence[Mapping[str, Any]], taps: Sequence[Mapping[str, Any]]) -> str:
    """Return where some of the maps in a table are: their names, or where these are many their number."""
    of_block = some[0].get("block") is not None
    if len(some) > NAMED_PLACES:
        return f"{len(some)} of {len(taps)} {'blocks' if of_block else 'depths'}"
    return ("" if of_block else "depth ") + ", ".join(map(place, some))


def place(tap: Mapping[str, Any]) -> str:
    """Return how tables name a map: by its block, or by its depth."""
    return str(tap["index"]) if tap.get("block") is None else f"L{tap['block']}"


_LOWERED = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")


def _logit_lens(readout: list[dict[str, Any]], pinnable: set[int]) -> list[dict[str, Any]]:
    """Return the grid of the logit lens: a row for each depth, a column for each rank."""
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
                    "rest": [],
                }
                for t in row["top"]
            ]
            + [{"sigma": "", "tokens": [], "rest": []}] * (width - len(row["top"])),
        }
        for row in sorted(readout, key=lambda row: row["index"])
    ]
    return [
        {
            "group": "Logit lens",
            "name": "Most likely tokens",
            "axis": "Depth",
            "columns": [str(rank + 1) for rank in range(width)],
            "rows": rows,
            "caption": "Logit lens: the most likely tokens of the residual stream, read through final norm and LM head",
            "more": None,
            "notes": [],
        }
    ]


def _cell(tokens: list[dict[str, Any]], pinnable: set[int]) -> list[dict[str, Any]]:
    return [{"id": t["id"], "token": t["token"], "pins": t["id"] in pinnable} for t in tokens]


# -- stable rank -------------------------------------------------------------------------------------------------------


def stable_ranks(run: Run) -> list[list[Chart]]:
    """Draw the stable rank by depth: for each map a chart in both scales, a series for layer, attention and MLP."""
    taps = [tap for tap in (run.content["layers"] or {}).get("taps", []) if _stable(tap) is not None]
    found = []
    for name, words in MAPS.items():
        series = []
        for kind, tone in PARTS.items():
            own = sorted((t for t in taps if t["map"] == name and t["kind"] == kind), key=lambda t: t["index"])
            if own:
                points = tuple((float(t["index"]), t["stable_rank"]["value"]) for t in own)
                error = tuple(t["stable_rank"]["error"] or 0.0 for t in own)
                series.append(Series(KINDS[kind], points, tone, error=error))
        if not series:
            continue
        values = [y for s in series for _, y in s.points]
        depths = [x for s in series for x, _ in s.points]
        ends = [f"{s.name} {s.points[0][1]:.3g} to {s.points[-1][1]:.3g}" for s in series]
        chart = Chart(
            key=f"stable-rank-{name.replace('_', '-')}",
            title=f"Stable rank by depth, {words}",
            x=linear("depth", depths, whole=True, pad=0.03),
            y=Axis("stable rank", 0.0, 1.0, ()),
            series=tuple(series),
            summary=f"Stable rank from the first depth to the last: {'; '.join(ends)}.",
        )
        found.append(scales(chart, values))
    return found


def _stable(tap: dict) -> float | None:
    return (tap["stable_rank"] or {}).get("value")


def paths(run: Run) -> list[Chart]:
    """Draw the residual stream along the output's two leading directions, depth by depth (paper, analysis A14)."""
    rows = sorted((run.content["layers"] or {}).get("path") or [], key=lambda row: row["index"])
    if len(rows) < 2:
        return []
    points = tuple((row["values"][0], row["values"][1]) for row in rows)
    first, last = points[0], points[-1]
    x = linear("along direction 1", [x for x, _ in points], zero=True, pad=0.06)
    y = linear("along direction 2", [y for _, y in points], zero=True, pad=0.06)
    # Enough labels to see the direction, and no two on each other: the ends first.
    every, labelled = max(1, len(rows) // 6), list[int]()
    for i in (len(rows) - 1, *range(0, len(rows) - 1, every)):
        places = [(x.place(points[k][0]), y.place(points[k][1])) for k in (i, *labelled)]
        if all(math.dist(places[0], other) > 0.06 for other in places[1:]):
            labelled.append(i)
    labels = tuple((i, str(rows[i]["index"])) for i in sorted(labelled))
    return [
        Chart(
            key="path",
            title="Path along the output's two leading directions",
            x=x,
            y=y,
            series=(Series("depth", points, labels=labels),),
            square=True,
            summary=f"{len(rows)} depths, from ({first[0]:.2g}, {first[1]:.2g}) to ({last[0]:.2g}, {last[1]:.2g}).",
        )
    ]


def drawings(run: Run) -> list[Chart]:
    """Return the figures of the stable rank's section."""
    return [*(chart for variants in stable_ranks(run) for chart in variants), *paths(run)]


def stable_rank(run: Run) -> dict[str, Any] | None:
    """Prepare the stable rank by depth."""
    found = stable_ranks(run)
    return {"groups": found, "path": paths(run)} if found else None


SECTIONS = (
    Section(
        "layers",
        "Layer by layer",
        layers,
        "Depth is the number of blocks applied and increases downwards; depth 1 is after L0, for blocks and heads are "
        "counted from 0. Click a token to pin it and follow its rank by depth in the logit lens: its place "
        "among all tokens when the residual stream is read through the final norm and the LM head.",
        ranks_by_depth,
    ),
    Section(
        "layers-stable-rank",
        "Stable rank by depth",
        stable_rank,
        "The number of directions that the map effectively uses at each depth. Error bars show one standard error "
        "where the value was estimated.",
        drawings,
    ),
)
