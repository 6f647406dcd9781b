"""The layers part of a result: every depth's maps and readout, as plain data for JSON, and as tables."""

from dataclasses import asdict
from typing import Any

import torch

from ggjac.analysis.layers import Layers, layers
from ggjac.cli.render import line, numbers, table
from ggjac.cli.session import Session
from ggjac.decode import Ranked
from ggjac.sizes import KINDS

MAP_WORDS = {
    "cumulative": "from the input to this depth",
    "blockwise": "each block alone",
    "to_end": "from this depth to the output",
}
KIND_WORDS = {"layer": "layer", "attn": "attention", "mlp": "MLP"}
VECTORS, WORDS = 3, 3  # of the tables: vectors of each map, tokens of each vector


def run_layers(session: Session, depths: list[int], **options: Any) -> Layers:
    """Decompose the maps of some depths; options as `ggjac.analysis.layers.layers` takes them."""
    with session.report.stage("layers") as update:
        return layers(session.jacobian, session.model.head, depths=depths, progress=update, **options)


def layers_data(session: Session, result: Layers, *, seed: int, tol: float) -> dict[str, Any]:
    """Return maps, readout, ranks and path as plain data, in the form that the report reads."""
    known: dict[int, dict[str, Any]] = {}

    def token(id: torch.Tensor) -> dict[str, Any]:
        return known.setdefault(int(id), {"id": int(id), "token": session.token(int(id))})

    def tokens(ranked: Ranked | None, j: int) -> list[dict[str, Any]]:
        return [] if ranked is None else [token(id) for id in ranked.ids[j]]

    readout, way = result.readout, result.way
    return {
        "seed": seed,
        "tol": tol,
        "converged": all(bool((m.residual <= tol).all()) for m in result.maps),
        "stopped_by": "sweeps" if any(m.stopped_by == "sweeps" for m in result.maps) else "tolerance",
        "taps": [
            {
                "map": m.map,
                "kind": m.tap.kind,
                "index": m.tap.index,
                "sweeps": m.sweeps,
                "stopped_by": m.stopped_by,
                "stable_rank": asdict(m.stable_rank),
                "triplets": [
                    {"singular_value": float(m.S[j]), "residual": float(m.residual[j]), "left": tokens(m.left, j)}
                    | ({} if m.arriving is None else {"arriving": tokens(m.arriving, j)})
                    for j in range(len(m.S))
                ],
            }
            for m in result.maps
        ],
        "readout": [
            {
                "index": depth,
                "top": [
                    token(id) | {"probability": float(chance)}
                    for id, chance in zip(readout.top.ids[i], readout.top.scores[i], strict=True)
                ],
            }
            for i, depth in enumerate(readout.depths)
        ],
        "ranks": {
            "tokens": [token(id) for id in readout.tokens],
            "depths": [
                {"index": depth, "ranks": ranks.tolist()}
                for depth, ranks in zip(readout.depths, readout.ranks, strict=True)
            ],
        },
        # A path is drawn in two dimensions.
        "path": None
        if way is None or way.values.shape[1] < 2
        else [
            {"index": depth, "values": values.tolist()} for depth, values in zip(way.depths, way.values, strict=True)
        ],
    }


def layers_tensors(result: Layers) -> dict[str, torch.Tensor]:
    """Return the saved tensors, named as `cumulative.attn.U`.

    For each map and kind: `index` [m] (blocks applied), `U` [m, k, d], `S` and `residual` [m, k], `stable_rank` [m, 2]
    (value, standard error) and, if they were transported, `transported` [m, k, d]; for all depths `ranks` [depths, t]
    of the tokens `ranked_ids` [t].
    """
    found = {"ranks": result.readout.ranks, "ranked_ids": result.readout.tokens}
    for name in MAP_WORDS:
        for kind in KINDS:
            own = [m for m in result.maps if (m.map, m.tap.kind) == (name, kind)]
            if not own:
                continue
            ranks = [(m.stable_rank.value, m.stable_rank.error) for m in own]
            parts = {
                "index": torch.tensor([m.tap.index for m in own]),
                "U": torch.stack([m.U for m in own]),
                "S": torch.stack([m.S for m in own]),
                "residual": torch.stack([m.residual for m in own]),
                "stable_rank": torch.tensor(ranks, dtype=torch.float64),
            }
            carried = [m.transported for m in own if m.transported is not None]
            if carried:
                parts["transported"] = torch.stack(carried)
            found |= {f"{name}.{kind}.{part}": values for part, values in parts.items()}
    return found


def show_layers(data: dict[str, Any]) -> None:
    """Print a table for each map and kind, the path, and the readout."""
    for name, words in MAP_WORDS.items():
        for kind in KINDS:
            own = [tap for tap in data["taps"] if (tap["map"], tap["kind"]) == (name, kind)]
            if own:
                _show_maps(f"{words[0].upper()}{words[1:]}: {KIND_WORDS[kind]}", own)
    if data["path"]:
        columns = [f"#{j}" for j in range(min(6, len(data["path"][0]["values"])))]
        rows = [(p["index"], *(f"{value:+.3f}" for value in p["values"][: len(columns)])) for p in data["path"]]
        table(
            "The way to the output's directions: s(l) ⟨u(l), u(L)⟩ / s(L)",
            ["#blocks", *(f"#{c}" for c in columns)],
            rows,
        )
    places = [ranks["ranks"][0] for ranks in data["ranks"]["depths"]]
    final = data["ranks"]["tokens"][0]["token"]
    rows = [
        (row["index"], place, "  ".join(f"{t['token']} {t['probability']:.2f}" for t in row["top"][:6]))
        for row, place in zip(data["readout"], places, strict=True)
    ]
    table("The stream read through final norm and head", ["#blocks", f"#rank of {final}", "most likely tokens"], rows)
    state = "all maps converged" if data["converged"] else f"NOT all maps converged to {data['tol']:.0e}"
    sweeps = [tap["sweeps"] for tap in data["taps"]]
    line(f"{state}, in {min(sweeps)} to {max(sweeps)} sweeps" if sweeps else "no map was asked for")
    line("")


def _show_maps(title: str, taps: list[dict[str, Any]]) -> None:
    shown = min(VECTORS, len(taps[0]["triplets"]))
    carried = "arriving" in taps[0]["triplets"][0]
    rows = [
        (
            tap["index"],
            sigma,
            spark([t["singular_value"] for t in tap["triplets"]]),
            stable(tap["stable_rank"]),
            *(_words(t["left"]) for t in tap["triplets"][:shown]),
            *([_words(tap["triplets"][0]["arriving"])] if carried else []),
        )
        for tap, sigma in zip(taps, numbers([tap["triplets"][0]["singular_value"] for tap in taps]), strict=True)
    ]
    vectors = [f"left vector {j}" for j in range(shown)] + ["vector 0 at the output"] * carried
    table(title, ["#blocks", "#σ", "spectrum", "#stable rank", *vectors], rows)


def stable(data: dict[str, Any]) -> str:
    """Return a stable rank, with its standard error where it was estimated."""
    return f"{data['value']:.4g}" + (f" ± {data['error']:.1g}" if data["error"] else "")


def spark(values: list[float]) -> str:
    """Return values as bars, relative to the largest; zero is a blank."""
    largest = max(values, default=0.0) or 1.0
    return "".join(" ▁▂▃▄▅▆▇█"[max(1, round(8 * value / largest)) if value > 0 else 0] for value in values).rstrip()


def _words(tokens: list[dict[str, Any]]) -> str:
    return " ".join(t["token"] for t in tokens[:WORDS])
