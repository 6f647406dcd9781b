"""Two files of one model on one prompt, or two prompts on one file: `a` and `b`."""

from typing import Any

from ggjac.drawing.charts import PARTS, Chart, Series, curves, from_to, known
from ggjac.report.numbers import aligned, fixed, percent, signed
from ggjac.report.schema import (
    HERE,
    MAX_BLOCKS,
    MAX_VECTORS,
    MAX_WORDS,
    MODEL,
    NUMBERS,
    RECONSTRUCTION,
    TOKEN,
    Check,
    each,
    flag,
    integer,
    maybe,
    number,
    record,
    spelled,
    text,
)
from ggjac.report.sections.attribute import asked
from ggjac.report.sections.common import LEGEND, LEVELS, SHORT, Run, Section, bars, digits, file_name
from ggjac.report.sections.layers import KINDS
from ggjac.report.summary import caveat
from ggjac.units import MISSING, power

SIDES = {"compare": "file", "compare_prompts": "prompt"}
SMALLEST_ANGLE = 1e-3  # degrees; smaller ones are rounding of vectors that are the same

_BOTH = record({"a": number, "b": number})
_TOP = record({"a": spelled({}), "b": spelled({})})
_NEXT = spelled(HERE | {"kl": maybe(number)}, {"top1": _TOP, "same_top1": flag})  # kl: nats
_ANGLES = record({"left": NUMBERS, "right": NUMBERS})  # principal angles in degrees, the largest first
_COMMON: dict[str, Check] = {
    "singular_values": each(record({"a": number, "b": number}, {"residual": number}), most=MAX_VECTORS),
    "angles": _ANGLES,
    "target": TOKEN,
    "logit": _BOTH,  # of the target, minus that of `versus`
    "offset": _BOTH,
}
_MORE: dict[str, Check] = {
    "versus": TOKEN,
    "reconstruction": record({"a": RECONSTRUCTION, "b": RECONSTRUCTION}),
    "tol": number,
    "converged": flag,
    "seed": integer,
    "output_distance": number,  # ‖y_b − y_a‖ ⁄ ‖y_a‖
    "softcap": number,
    "kl": number,  # nats, at the output position
    # The same logit by block: embedding + Σ (attn + mlp) + bias.
    "embedding": _BOTH,
    "blocks": each(record({"block": integer, "attn": _BOTH, "mlp": _BOTH}, {"mixer": text}), most=MAX_BLOCKS),
    "bias": _BOTH,
}
_PLACE = spelled(HERE)
_CHANCE = spelled({"probability": number, "other": number})  # after the same prompt, and after the other one
FORM: dict[str, Check] = {
    "other_model": MODEL,  # b
    "compare": record(
        _COMMON
        | {
            "shares": each(spelled(HERE | {"a": number, "b": number})),
            "positions": each(_NEXT),
        },
        _MORE
        | {
            "mean_kl": number,  # nats, over all positions
            "top1_agreement": number,  # the share of positions with the same most likely token
        },
    ),
    "other_prompt": record(  # b
        {"tokens": each(_PLACE)}, {"prompt": text, "warnings": each(text, most=MAX_WORDS), "position": integer}
    ),
    "compare_prompts": record(
        _COMMON
        | {
            # A side is null where the token of the other one stands alone.
            "shares": each(record({}, {side: spelled(HERE | {"share": number}) for side in ("a", "b")})),
            "positions": each(  # aligned ones
                record({"a": _PLACE, "b": _PLACE, "kl": maybe(number)}, {"top1": _TOP, "same_top1": flag})
            ),
            "next": record({side: each(_CHANCE, most=MAX_WORDS) for side in ("a", "b")}),
        },
        _MORE | {"weight": _BOTH},  # the part of the right vectors' squared length at aligned positions
    ),
}


def spectra(run: Run, part: str = "compare") -> list[Chart]:
    """Draw the singular values of both files or prompts, in both scales."""
    values = (run.content[part] or {}).get("singular_values") or []
    series = [
        Series(side, known(enumerate((value[side] for value in values), 1)), tone)
        for side, tone in (("a", "accent"), ("b", "ink"))
    ]
    summary = "; ".join(from_to(s.name, s.points) for s in series) + "."
    title = f"Singular values of both {SIDES[part]}s"
    return curves(f"{_key(part)}-singular-values", title, ("index", "σ"), series, summary)


def angles(run: Run, part: str = "compare") -> list[Chart]:
    """Draw the principal angles between the spans of both sides' vectors, the smallest first; not those of rounding."""
    given = (run.content[part] or {}).get("angles") or {"left": [], "right": []}
    if max((angle or 0.0 for side in given.values() for angle in side), default=0.0) < SMALLEST_ANGLE:
        return []
    series = [
        Series(side, known(enumerate(reversed(given[side]), 1)), tone)
        for side, tone in (("left", "accent"), ("right", "ink"))
        if given[side]
    ]
    summary = "; ".join(from_to(s.name, s.points) for s in series) + " degrees."
    title = "Principal angles between the spans, smallest first"
    return curves(f"{_key(part)}-angles", title, ("angle", "degrees"), series, summary)


def block_changes(run: Run, part: str = "compare") -> list[Chart]:
    """Draw how the shares of each block's attention and MLP in the logit change, by depth."""
    found = run.content[part]
    if not found or not found["blocks"]:
        return []
    blocks = found["blocks"]
    names = {"attn": KINDS["attn"] if all(block["mixer"] is None for block in blocks) else "token mixers", "mlp": "MLP"}
    series = [
        Series(name, tuple((float(b["block"]), b[kind]["b"] - b[kind]["a"]) for b in blocks), PARTS[kind])
        for kind, name in names.items()
    ]
    summary = "; ".join(from_to(s.name, s.points) for s in series) + "."
    title = f"Change of the shares in {asked(found)}, by block"
    return curves(f"{_key(part)}-blocks", title, ("block", "b − a"), series, summary, log=False)


def _key(part: str) -> str:
    return part.replace("_", "-")


def divergences(run: Run) -> list[Chart]:
    """Draw the KL divergence between the predictions of both files at each position, in both scales."""
    rows = (run.content["compare"] or {}).get("positions") or []
    points = known((row["position"], row["kl"]) for row in rows)
    title, axes = "KL divergence of the next token by position", ("position", "KL, nats")
    return curves("compare-kl", title, axes, [Series("KL", points)], from_to("KL", points) + " nats.")


def drawings(run: Run) -> list[Chart]:
    """Return the section's figures."""
    return [*block_changes(run), *spectra(run), *angles(run), *divergences(run)]


def prompt_drawings(run: Run) -> list[Chart]:
    """Return the figures of two prompts."""
    part = "compare_prompts"
    return [*block_changes(run, part), *spectra(run, part), *angles(run, part)]


def _decimals(found: dict[str, Any], shares: list[float]) -> int:
    return digits([*shares, *(found[name][side] for name in ("offset", "logit") for side in ("a", "b"))])


def _change(both: dict[str, Any], decimals: int) -> dict[str, Any]:
    """Return a number of both sides and its change, as cells."""
    a, b = both["a"], both["b"]
    return {"a": signed(a, decimals), "b": signed(b, decimals), "change": signed(b - a, decimals)}


def _in_common(run: Run, part: str) -> dict[str, Any]:
    """Prepare what is compared of two files as of two prompts: the split logit, its blocks, spectra and angles."""
    found = run.content[part]
    values, blocks = found["singular_values"], found["blocks"] or []
    a, b = (aligned([value[side] for value in values]) for side in ("a", "b"))
    left, right = (list(reversed(found["angles"][side])) for side in ("left", "right"))
    decimals = digits([block[kind][side] for block in blocks for kind in ("attn", "mlp") for side in ("a", "b")])
    return {
        "charts": [block_changes(run, part)] if blocks else [],
        "spectra": spectra(run, part),
        "angle_charts": angles(run, part),
        "smallest": f"{SMALLEST_ANGLE:g}",
        "triplets": [
            {
                "index": j + 1,
                "a": a[j],
                "b": b[j],
                "change": percent(v["b"] / v["a"] - 1, 1) if v["a"] else MISSING,
                "left": _angle(left, j),
                "right": _angle(right, j),
            }
            for j, v in enumerate(values)
        ],
        "blocks": [
            {"name": f"L{block['block']}", "mixer": block["mixer"]}
            | {kind: _change(block[kind], decimals) for kind in ("attn", "mlp")}
            for block in blocks
        ],
        "rest": [
            (name, _change(found[key], decimals))
            for key, name in (("embedding", "Embedding"), ("bias", "Biases of norm and head"))
            if blocks and found[key] and (key == "embedding" or any(found[key].values()))
        ],
        "target": found["target"],
        "versus": found["versus"],
        "capped": bool(found["softcap"]),
        "caveat": caveat(run.content),
        "open_end": found["converged"] is False and (power(found["tol"]) if found["tol"] else "the tolerance"),
    }


def compare(run: Run) -> dict[str, Any] | None:
    """Prepare the comparison of two files of one model, `a` and `b`."""
    found = run.content["compare"]
    if not found:
        return None
    parts = [*found["shares"], {"a": found["offset"]["a"], "b": found["offset"]["b"]}]
    changes = [s["b"] - s["a"] for s in parts]
    drawn, zero = bars(changes)
    decimals = digits([s[side] for s in parts for side in ("a", "b")])
    rows = [
        _change(s, decimals) | {"position": s["position"], "token": s["token"], "bar": bar, "less": change < 0}
        for s, bar, change in zip(found["shares"], drawn, changes, strict=False)
    ]
    return _in_common(run, "compare") | {
        "a": file_name(run.content["model"]),
        "b": run.content["other_model"] and file_name(run.content["other_model"]),
        "kl_charts": divergences(run),
        "shares": rows,
        "zero": zero,
        "offset": _change(parts[-1], decimals) | {"bar": drawn[-1], "less": changes[-1] < 0},
        "logit": _change(found["logit"], decimals),
        "positions": [
            {
                "position": row["position"],
                "token": row["token"],
                "a": row["top1"]["a"]["token"] if row["top1"] else "",
                "b": row["top1"]["b"]["token"] if row["top1"] else "",
                "kl": power(row["kl"]),
                "same": row["same_top1"] is not False,
            }
            for row in found["positions"]
        ],
        "short": len(found["positions"]) <= SHORT,
        "says": [
            (words, value)
            for words, value in (
                ("KL divergence at the output, nats", _power(found["kl"])),
                ("Mean KL divergence over positions, nats", _power(found["mean_kl"])),
                ("Same top token", found["top1_agreement"] is not None and percent(found["top1_agreement"], 0)),
                ("‖y_b − y_a‖ ⁄ ‖y_a‖", _power(found["output_distance"])),
            )
            if value
        ],
    }


def compare_prompts(run: Run) -> dict[str, Any] | None:
    """Prepare the comparison of two prompts on one file, `a` and `b`."""
    found = run.content["compare_prompts"]
    if not found:
        return None
    pairs = [[row["a"], row["b"]] for row in found["shares"]]
    shares = [side["share"] for pair in pairs for side in pair if side]
    largest, decimals = max(map(abs, shares), default=0.0) or 1.0, _decimals(found, shares)

    def cell(side: dict[str, Any] | None) -> dict[str, Any] | None:
        level = side and round(LEVELS * side["share"] / largest)
        return side and side | {"value": signed(side["share"], decimals), "level": level}

    return _in_common(run, "compare_prompts") | {
        "pairs": [
            {
                "a": cell(a),
                "b": cell(b),
                "token": (a or b)["token"],
                "change": signed(b["share"] - a["share"], decimals) if a and b else "",
            }
            for a, b in pairs
            if a or b
        ],
        "largest": fixed(largest, 2),
        "legend": LEGEND,
        "offset": _change(found["offset"], decimals),
        "logit": _change(found["logit"], decimals),
        "next": {
            side: [t | {name: percent(t[name]) for name in ("probability", "other")} for t in found["next"][side]]
            for side in ("a", "b")
        },
        "positions": [
            row | {"kl": power(row["kl"]), "same": row["same_top1"] is not False} for row in found["positions"]
        ],
        "aligned": len(found["positions"]),
        "weight": found["weight"] and {side: percent(weight, 0) for side, weight in found["weight"].items()},
        "right": bool(found["angles"]["right"]),
        "short": len(found["shares"]) <= SHORT,
        "says": [
            (words, _power(found[key]))
            for words, key in (
                ("KL divergence of b from a, nats", "kl"),
                ("‖y_b − y_a‖ ⁄ ‖y_a‖", "output_distance"),
            )
            if found[key] is not None
        ],
    }


def _power(value: float | None) -> str | None:
    return None if value is None else power(value)


def _angle(angles: list[float | None], j: int) -> str:
    return MISSING if j >= len(angles) or angles[j] is None else f"{angles[j]:.3f}°"


SECTIONS = (
    Section(
        "compare",
        "Two files",
        compare,
        "One prompt on two files of one model: how much quantization changes the map, the shares and the predictions.",
        drawings,
    ),
    Section(
        "compare-prompts",
        "Two prompts",
        compare_prompts,
        "Two prompts on one file. Tokens that are the same and in the same order are aligned, one above the other; "
        "only there are positions compared.",
        prompt_drawings,
    ),
)
