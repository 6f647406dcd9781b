"""The sections of the page, in their order. Each says what it needs of a run and prepares it for its template.

A section is a function of the run that returns what its template `templates/KEY.html` draws, or None where the run
lacks the data: then the page does without it. Its docstring states the form of the data (`schema.RUN` checks it).
A new analysis is a new function, a row of `SECTIONS` and a template.
"""

import math
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import numpy as np

from ggjac.report import charts
from ggjac.report.load import Run
from ggjac.report.numbers import aligned, duration, fixed, percent, power, signed, size

SHORT = 32  # prompts up to this many tokens show their tables open
SHOWN = 3  # tokens in a cell of the layer grid, and positions beside a right vector
ROUNDING = 5e-2  # of Σ|shares|: what 16-bit arithmetic may leave unexplained
LEVELS = 10  # shades of a diverging colour, each way
MAX_RANKS = 300_000  # ranks that travel with the page; the tokens listed first have theirs


@dataclass(frozen=True)
class Section:
    """A part of the page: its anchor, its heading, how to read it, and what prepares its data."""

    key: str
    title: str
    build: Callable[[Run], dict[str, Any] | None]
    note: str = ""


def header(run: Run) -> dict[str, Any]:
    """Prepare the title: the prompt, and the token predicted after it."""
    c = run.content
    model, tokens, position = c["model"], c["tokens"], c["position"]
    # The prompt as it was typed, if all of it is read; else the tokens up to the position that is.
    whole = position == len(tokens) - 1 and c["prompt"] is not None
    prompt = c["prompt"] if whole else _joined([t["text"] for t in tokens[: position + 1]])
    best = (c["predictions"] or [None])[0]
    return {
        "prompt": prompt if len(prompt) <= 420 else f"… {prompt[-400:]}",
        "long": len(prompt) > 120,
        "rest": "" if whole else _joined([t["text"] for t in tokens[position + 1 :]])[:200],
        "next": best and _joined([best["token"]]),
        "chance": best and percent(best["probability"]),
        "name": model["name"] or PurePath(model["path"]).name,
        "facts": _pairs(
            ("File", PurePath(model["path"].replace("\\", "/")).name),
            ("Architecture", model["architecture"]),
            ("Size", model["bytes"] and size(model["bytes"])),
            ("Tokens", str(len(tokens))),
            ("Arithmetic", " on ".join(filter(None, (c["dtype"], c["device"])))),
            ("Made", (c["created"] or "").partition("T")[0]),
        ),
    }


def _joined(tokens: list[str]) -> str:
    """Return running text from visible tokens: `␣` at their edges was a space."""
    inner = [token.strip("␣") for token in tokens]
    return "".join(
        " " * (len(t) - len(t.lstrip("␣"))) + i + " " * (len(t.rstrip("␣")) < len(t) and bool(i))
        for t, i in zip(tokens, inner, strict=True)
    )


def _pairs(*rows: tuple[str, str | None]) -> list[tuple[str, str]]:
    """Return the rows that say something."""
    return [(name, value) for name, value in rows if value]


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
                "bar": _percent(row["probability"] or 0.0),
            }
            for row in rows
        ]
    }


def tokens(run: Run) -> dict[str, Any]:
    """Prepare the token table.

    `tokens`: a list of `{"position", "id", "text"}`, the text made visible; `warning`: text or null.
    """
    c = run.content
    return {
        "rows": [t | {"read": i == c["position"]} for i, t in enumerate(c["tokens"])],
        "short": len(c["tokens"]) <= SHORT,
        "warning": c["warning"],
    }


def certificate(run: Run) -> dict[str, Any]:
    """Prepare the checks, and what is needed to make the run again.

    `reconstruction`: `{"error", "limit", "healthy", "offset_norm", "output_norm"}`; `parity`: llama.cpp's verdict,
    `{"verdict": true | false | null, "reason", ...}`; `svd`: `{"converged", "tol", "sweeps", "stopped_by", ...}`;
    `versions` and `seconds`: tables of text and of numbers; `command`: a list of words.
    """
    c = run.content
    checks = [check for check in (_reconstruction(c), _parity(c), _convergence(c)) if check]
    seed = (c["svd"] or {}).get("seed")
    facts = _pairs(
        ("Arithmetic", c["dtype"]),
        ("Live factor of gated MLPs", c["mlp_path"]),
        ("Position read", str(c["position"])),
        ("Seed", None if seed is None else str(seed)),
        ("Device", c["device"]),
        ("Threads", c["threads"] and str(c["threads"])),
        ("Peak memory", c["peak_memory_bytes"] and size(c["peak_memory_bytes"])),
        ("Made", (c["created"] or "").replace("T", " ").replace("Z", " UTC")),
        ("Platform", c["platform"]),
        ("Model fingerprint", c["model"]["fingerprint"]),
    )
    seconds = c["seconds"] or {}
    return {
        "checks": checks,
        "facts": facts,
        "versions": sorted((c["versions"] or {}).items()),
        "seconds": [(name, duration(value)) for name, value in seconds.items()],
        "total": duration(sum(seconds.values())) if seconds else None,
        "command": shlex.join(c["command"]) if c["command"] else None,
    }


def _reconstruction(c: dict[str, Any]) -> dict[str, Any] | None:
    found = c["reconstruction"]
    if not found:
        return None
    share = (found["offset_norm"] or 0.0) / (found["output_norm"] or 1.0)
    offset = f"The biases contribute an offset of {percent(share)} of ‖y‖." if share else "No biases: the offset is 0."
    return {
        "name": "Reconstruction",
        "state": "pass" if found["healthy"] else "fail",
        "value": power(found["error"]),
        "limit": f"{'at most' if found['healthy'] else 'not at most'} {power(found['limit'])}",
        "says": f"‖J x + offset − y‖ ⁄ ‖y‖, a health check of the arithmetic. {offset}",
    }


def _parity(c: dict[str, Any]) -> dict[str, Any] | None:
    found = c["parity"]
    if not found:
        return None
    if found["verdict"] is None:
        return {
            "name": "llama.cpp",
            "state": "none",
            "value": "not compared",
            "limit": "",
            "says": found["reason"] or "",
        }
    kl = found["kl_last"] if found["kl_last"] is not None else found["kl"]
    says = [
        f"{_capital(found['reason'])}." if found["reason"] else "",
        "" if kl is None else f"KL divergence {power(kl)} nats.",
        f"Expected: {found['cause']}." if found["cause"] else "",
    ]
    return {
        "name": "llama.cpp",
        "state": "pass" if found["verdict"] else "fail",
        "value": "agrees" if found["verdict"] else "disagrees",
        "limit": "on the file as it is" if found["mode"] == "as is" else found["mode"] or "",
        "says": " ".join(filter(None, says)),
    }


def _capital(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]


def _convergence(c: dict[str, Any]) -> dict[str, Any] | None:
    found = c["svd"]
    if not found or not found["triplets"]:
        return None
    residuals = [t["residual"] for t in found["triplets"] if t["residual"] is not None]
    sweeps = "" if found["sweeps"] is None else f" after {found['sweeps']} sweeps"
    stopped = found["stopped_by"] and f" Stopped by: {found['stopped_by']}."
    return {
        "name": "Singular vectors",
        # One that stopped at its dtype's own precision is as good as that allows, and no failure.
        "state": "fail" if found["stopped_by"] == "sweeps" else "pass" if found["converged"] else "none",
        "value": power(max(residuals)) if residuals else "–",
        "limit": "" if found["tol"] is None else f"asked {power(found['tol'])}",
        "says": f"Worst residual of {len(found['triplets'])} triplets relative to σ, "
        f"{'converged' if found['converged'] else 'not converged'}{sweeps}.{stopped or ''}",
    }


def attribution(run: Run) -> dict[str, Any] | None:
    """Prepare the exact shares of the input tokens in a logit.

    `attribution`: `{"target": {"id", "token"}, "logit", "softcap", "shares": [{"position", "token", "share"}],
    "offset", "unexplained"}`, with Σ shares + offset + unexplained = logit.
    """
    found = run.content["attribution"]
    if not found:
        return None
    largest = max(abs(s["share"]) for s in found["shares"]) or 1.0
    total = sum(s["share"] for s in found["shares"]) + (found["offset"] or 0.0)
    low, high = (f(0.0, *(s["share"] for s in found["shares"])) for f in (min, max))
    digits = 4 if largest < 100 else 2

    def relative(share: float) -> str:
        return percent(share / found["logit"]) if found["logit"] > 0 else ""

    return {
        "target": found["target"],
        "capped": bool(found["softcap"]),
        "largest": fixed(largest, 2),
        "rows": [
            s
            | {
                "value": signed(s["share"], digits),
                "percent": relative(s["share"]),
                "level": round(LEVELS * s["share"] / largest),
                "bar": _bar(s["share"], low, high),
            }
            for s in found["shares"]
        ],
        "offset": signed(found["offset"] or 0.0, digits),
        "offset_percent": relative(found["offset"] or 0.0),
        "sum": signed(total, digits),
        "logit": fixed(found["logit"], digits),
        "unexplained": power(found["logit"] - total),
        "complete": abs(found["logit"] - total) <= ROUNDING * (sum(abs(s["share"]) for s in found["shares"]) or 1.0),
        "zero": _percent(-low / (high - low or 1.0)),
        "relative": found["logit"] > 0,
        "short": len(found["shares"]) <= SHORT,
        "legend": [*range(-LEVELS, LEVELS + 1, 2)],
    }


def _bar(share: float, low: float, high: float) -> dict[str, str]:
    """Return a bar that starts at the zero of a scale from `low` to `high`."""
    span = high - low or 1.0
    return {"x": _percent((min(share, 0.0) - low) / span), "width": _percent(abs(share) / span)}


def _percent(share: float) -> str:
    """Return a length for SVG."""
    return f"{100 * share:.2f}".rstrip("0").rstrip(".") + "%"


def spectrum(run: Run) -> dict[str, Any] | None:
    """Prepare the singular values.

    `svd.triplets`: a list of `{"singular_value", "residual", ...}`, the largest first; `stable_rank`: `{"value",
    "error", "frobenius"}`, the error one standard error, 0 where the value is exact.
    """
    found = charts.singular_values(run)
    if not found:
        return None
    rank = run.content["stable_rank"] or {}
    stable = rank.get("value")
    return {
        "charts": found,
        "stable": None if stable is None else f"{stable:.4g}",
        "error": rank.get("error") and f"{rank['error']:.1g}",
        "frobenius": rank.get("frobenius") and f"{rank['frobenius']:.4g}",
    }


def vectors(run: Run) -> dict[str, Any] | None:
    """Prepare the decoded singular vectors.

    `svd.triplets`: a list of `{"singular_value", "residual", "left": [tokens], "right": [{"position", "token",
    "weight", "nearest": [tokens]}]}`: the tokens a left vector promotes, the best first; for a right vector the share
    of its squared norm at each position and the tokens nearest to it there.
    """
    triplets = (run.content["svd"] or {}).get("triplets")
    if not triplets:
        return None
    sigmas = aligned([t["singular_value"] for t in triplets])
    rows = []
    for j, t in enumerate(triplets):
        heaviest = sorted(t["right"], key=lambda r: -(r["weight"] or 0.0))[:SHOWN]
        rows.append(
            {
                "index": j,
                "sigma": sigmas[j],
                "residual": power(t["residual"]),
                "left": t["left"],
                "right": [r | {"share": percent(r["weight"], 0), "nearest": r["nearest"][:SHOWN]} for r in heaviest],
                "strip": _strip(t["right"]),
            }
        )
    return {"rows": rows}


def _strip(right: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the bars of a right vector's shares by position; nothing for one position or very many."""
    if not 1 < len(right) <= 512:
        return []
    largest = max((r["weight"] or 0.0 for r in right), default=0.0) or 1.0
    return [{"x": i, "height": round(max(0.0, (r["weight"] or 0.0) / largest), 3)} for i, r in enumerate(right)]


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
    return {"group": _capital(group), "name": _capital(name), "columns": columns, "rows": rows, "caption": caption}


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


def scatter(run: Run) -> dict[str, Any] | None:
    """Prepare the reconstruction scatter.

    tensors.safetensors: `y`, `offset`, `linear_output` (J x) and, for the contrast, `ordinary_output` (the ordinary
    Jacobian times x), all `[d]`. `contrast`: `{"detached": {...}, "ordinary": {...}}`, each `{"error": relative L2,
    "std_ratio": of error and reconstruction, "max_abs", "pearson", "spearman", "top", "top_agreement": share of the
    `top` tokens after the head that are the same, "kl": nats after the head}`, all but the error optional.
    """
    found = charts.scatters(run)
    rows = _agreements(run, found)
    return {"charts": found, "rows": rows, "measured": bool(run.content["contrast"])} if found else None


def _agreements(run: Run, found: list[charts.Chart]) -> list[dict[str, Any]]:
    """Return a row for each reconstruction: what the run says of it, and what its vectors say themselves."""
    saved, v = run.content["contrast"] or {}, run.vectors
    rows = []
    for chart in found:
        detached = chart.key == "reconstruction-detached"
        values = v["linear_output"] + v["offset"] if detached else v["ordinary_output"]
        given = saved.get("detached" if detached else "ordinary") or {}
        top = given.get("top")
        rows.append(
            {
                "name": "Detached" if detached else "Ordinary",
                "error": power(float(np.linalg.norm(values - v["y"]) / (np.linalg.norm(v["y"]) or 1.0))),
                "max_abs": power(float(np.abs(values - v["y"]).max())),
                "std_ratio": power(given.get("std_ratio")),
                "pearson": fixed(given.get("pearson"), 5),
                "spearman": fixed(given.get("spearman"), 5),
                "top": percent(given.get("top_agreement"), 0) + (f" of {top}" if top else ""),
                "kl": power(given.get("kl")),
            }
        )
    return rows


SECTIONS = (
    Section("prediction", "Prediction", prediction, "The most likely next tokens, from the model's own forward pass."),
    Section(
        "attribution",
        "Attribution",
        attribution,
        "At this prompt the network is exactly a linear map of its input embeddings, so a logit splits into one share "
        "for each input token, without remainder. A share says what a token contributes along the live path; it does "
        "not say what would happen if the token were changed.",
    ),
    Section(
        "certificate",
        "Certificate",
        certificate,
        "What was checked, and all it takes to make this run again.",
    ),
    Section(
        "spectrum",
        "Singular values",
        spectrum,
        "How strongly the map acts along its leading directions. The stable rank, Σσ² ⁄ σ₀², counts how many "
        "directions it really uses.",
    ),
    Section(
        "vectors",
        "Singular vectors",
        vectors,
        "Each pair reads one direction of the input and writes one direction of the output. A left vector is decoded "
        "to the tokens it promotes; a right vector to the positions that carry it and the embeddings nearest to it "
        "there.",
    ),
    Section(
        "layers",
        "Layer by layer",
        grid,
        "Depth runs downwards. Choose a token to pin it and follow its rank through the depths: the place it takes "
        "when the residual stream is read through the final norm and the LM head.",
    ),
    Section(
        "stable-rank",
        "Stable rank by depth",
        stable_rank,
        "How many directions the map uses at each depth: few where the network has made up its mind. Bars are one "
        "standard error, where the value was estimated.",
    ),
    Section(
        "scatter",
        "Reconstruction",
        scatter,
        "Every component of the output against the same component rebuilt by the linear map. The detached Jacobian "
        "reproduces it by construction, up to rounding; the ordinary Jacobian need not.",
    ),
    Section("tokens", "Tokens", tokens, "The prompt as the model sees it. Spaces and invisible bytes are shown."),
)
