"""Edges: the largest ways that a logit takes from what each head and MLP wrote to what each later one reads."""

from typing import Any

from ggjac.drawing.charts import Graph, Spot
from ggjac.report.numbers import fixed, signed
from ggjac.report.schema import HERE, TOKEN, Check, Wrong, agreeing, each, integer, number, record, spelled, text
from ggjac.report.sections.attribute import asked
from ggjac.report.sections.common import Run, Section, bars, digits, length

DRAWN = 24  # edges in the drawing and in the table that is open
NAMED = 3  # positions of each
MLP = 0.88  # the place of MLPs across; all else is to the left of them
SPREAD = 0.78
ROW = 36  # pixels of a row of the drawing
SIDE_BY_SIDE = 7  # names of heads that have room in a row on a phone; of more, it shows every second, or third
MAX_NODES = 100_000
MAX_EDGES = 10_000

_NODE = record({"name": text, "kind": text, "through": number}, {"block": integer, "head": integer} | {"into": number})
_EDGE = record({"source": integer, "reader": integer, "value": number, "parts": each(number, least=1)})
FORM: dict[str, Check] = {
    "edges": agreeing(
        spelled(
            HERE
            | {"target": TOKEN, "logit": number, "size": number, "left_out": number, "count": integer}
            | {"nodes": each(_NODE, least=2, most=MAX_NODES), "edges": each(_EDGE, most=MAX_EDGES)},
            {"versus": TOKEN, "softcap": number, "mlp_path": text},
        ),
        lambda found, where: _check(found, where),
    )
}


def _check(found: dict[str, Any], where: str) -> None:
    """Check that edges lead from one of the nodes to a later one."""
    for i, edge in enumerate(found["edges"]):
        if not edge["source"] < edge["reader"] < len(found["nodes"]):
            raise Wrong(f"{where}.edges[{i}]: leads from node {edge['source']} to {edge['reader']}, not to a later one")


def _row(node: dict[str, Any], blocks: int) -> int:
    """Return the block of a node; before and after all blocks for the embedding and the head."""
    if node["block"] is None:
        return blocks if node["kind"] == "logit" else -1
    return int(node["block"])


def graph(run: Run) -> list[Graph]:
    """Draw the largest edges, in a row for each block that has any."""
    found = run.content["edges"]
    if not found or not found["edges"]:
        return []
    nodes, edges = found["nodes"], found["edges"][:DRAWN]
    blocks = 1 + max((node["block"] for node in nodes if node["block"] is not None), default=0)
    used = sorted({i for edge in edges for i in (edge["source"], edge["reader"])})
    levels = sorted({_row(nodes[i], blocks) for i in used})
    spots, places = list[Spot](), dict[int, int]()
    for row, level in enumerate(levels):
        there = [i for i in used if _row(nodes[i], blocks) == level]
        left = [i for i in there if nodes[i]["kind"] != "mlp"]
        for i in there:
            outside = nodes[i]["block"] is None
            across = MLP if nodes[i]["kind"] == "mlp" else SPREAD * (left.index(i) + 0.5) / len(left)
            places[i] = len(spots)
            name = nodes[i]["name"] if outside else nodes[i]["name"].removeprefix(f"L{nodes[i]['block']}").strip()
            spots.append(Spot(name, row, 0.5 if outside else across))
    names = {-1: "", blocks: ""}
    largest = edges[0]
    ends = [nodes[largest[end]]["name"] for end in ("source", "reader")]
    return [
        Graph(
            key="attribute-edges",
            title=f"Largest edges in {asked(found)}",
            rows=tuple(names.get(level, f"L{level}") for level in levels),
            spots=tuple(spots),
            edges=tuple((places[edge["source"]], places[edge["reader"]], edge["value"]) for edge in edges),
            summary=f"{len(edges)} edges between {len(spots)} nodes; the largest leads from {ends[0]} to {ends[1]}.",
        )
    ]


def edges(run: Run) -> dict[str, Any] | None:
    """Prepare the largest edges, and the bound on all others together."""
    found = run.content["edges"]
    if not found:
        return None
    nodes, every = found["nodes"], found["edges"]
    decimals = digits([edge["value"] for edge in every])
    drawn, zero = bars([edge["value"] for edge in every])
    rows = []
    for edge, bar in zip(every, drawn, strict=True):
        parts = sorted(enumerate(edge["parts"]), key=lambda part: -abs(part[1]))[:NAMED]
        rows.append(
            {
                "source": nodes[edge["source"]]["name"],
                "reader": nodes[edge["reader"]]["name"],
                "value": signed(edge["value"], decimals),
                "less": edge["value"] < 0,
                "bar": bar,
                "places": ", ".join(f"{p}: {signed(value, 2)}" for p, value in parts if value),
            }
        )
    shown = sum(abs(edge["value"]) for edge in every[:DRAWN])
    return {
        "target": found["target"],
        "versus": found["versus"],
        "capped": bool(found["softcap"]),
        "rule": found["mlp_path"],
        "graphs": [_drawn(drawing) for drawing in graph(run)],
        "rows": rows[:DRAWN],
        "others": rows[DRAWN:],
        "zero": zero,
        "count": found["count"],
        "size": fixed(found["size"], 2),
        "shown": fixed(shown, 2),
        "left": fixed(max(0.0, found["size"] - shown), 2),
        "logit": fixed(found["logit"], decimals),
    }


def _drawn(drawing: Graph) -> dict[str, Any]:
    """Return a graph as the template draws it: paths in thousandths, the largest last, and places in per cent."""
    paths: list[dict[str, Any]] = []
    for source, reader, value in reversed(drawing.edges):
        start, *curve = (f"{1000 * x:.0f} {1000 * (1 - y):.0f}" for x, y in drawing.curve(source, reader))
        paths.append(
            {
                "d": f"M{start}C{' '.join(curve)}",
                "less": value < 0,
                "width": max(1, round(6 * drawing.weight(value))),
                "name": f"{_full(drawing, source)} → {_full(drawing, reader)}: {signed(value, 4)}",
            }
        )
    heights = [length(1 - (i + 0.5) / len(drawing.rows)) for i in range(len(drawing.rows))]
    return {
        "key": drawing.key,
        "title": drawing.title,
        "summary": drawing.summary,
        "height": ROW * len(drawing.rows),
        "rows": [{"name": name, "y": y} for name, y in zip(drawing.rows, heights, strict=True) if name],
        "paths": paths,
        "spots": [
            {"name": spot.name, "x": length(spot.across), "y": heights[spot.row], "low": not spot.row, "spare": spare}
            for spot, spare in zip(drawing.spots, _spare(drawing), strict=True)
        ],
    }


def _spare(drawing: Graph) -> list[bool]:
    """Return which spots have no room for their names on a phone; each row has its spots from left to right."""
    found = []
    for row in range(len(drawing.rows)):
        heads = [spot.across < SPREAD for spot in drawing.spots if spot.row == row]
        every = -(-sum(heads) // SIDE_BY_SIDE)
        found += [head and i % every > 0 for i, head in enumerate(heads)]
    return found


def _full(drawing: Graph, i: int) -> str:
    """Return the name of a node with that of its row."""
    spot = drawing.spots[i]
    row = drawing.rows[spot.row]
    return f"{row} {spot.name}" if row else spot.name


SECTIONS = (
    Section(
        "attribute-edges",
        "Edges",
        edges,
        "At the prompt the frozen network is linear: the logit is a sum over all ways from what one head or MLP wrote "
        "into what a later one reads, its values or its live input, and on from there. Attention patterns, norms and "
        "gates are frozen; an edge is a part of the sum, not the effect of cutting it.",
        graph,
    ),
)
