"""Why a head attends: its pattern at one query, and the scores of keys by pairs of parts; or a recurrence's factors."""

from typing import Any

from ggjac.drawing.charts import Bars, Heat, Panel
from ggjac.report.numbers import fixed, percent, signed
from ggjac.report.schema import (
    HERE,
    MAX_HEADS,
    Check,
    Wrong,
    agreeing,
    each,
    integer,
    number,
    one_of,
    record,
    spelled,
    text,
    wrong,
)
from ggjac.report.sections.common import LEGEND, MAX_CELLS, SHORT, Run, Section, bars, digits, heat
from ggjac.report.summary import caveat
from ggjac.units import power

MAX_KEYS = 4096
SHOWN = 8  # pairs of each key

_WHOSE = {"layer": integer, "head": integer, "mixer": text, "query": spelled(HERE)}
_PAIR = record({"query": integer, "key": integer, "share": number})
#: Σ pairs + others + unexplained = score; Σ query_shares = Σ key_shares = Σ pairs + others.
_KEY = spelled(
    HERE
    | {
        "weight": number,
        "score": number,
        "query_shares": each(number),
        "key_shares": each(number),
        "pairs": each(_PAIR, most=MAX_HEADS),
        "others": number,
    },
    {"softcap": number, "distance": number, "unexplained": number},
)
_SCORES = record(
    _WHOSE
    | {
        "weights": each(spelled(HERE | {"weight": number}), least=1),
        "keys": each(_KEY, least=1, most=MAX_KEYS),
        "query_parts": each(lambda value, where: _part(value, where), least=1),
        "key_parts": each(lambda value, where: _part(value, where), least=1),
    },
    {"versus": spelled(HERE), "sink": number, "groups": number, "mlp_path": text, "normalizer": number},
)
_ENTRY = spelled(
    HERE | {"entries": number, "write": number, "product": number, "removed": number},
    {"decay": number, "kept": number},
)
_FACTORS = record(_WHOSE | {"entries": each(_ENTRY, least=1)}, {"own": number})


def _part(value: Any, where: str) -> str:
    """Accept a part of the stream, and return its name."""
    if isinstance(value, dict) and "position" in value:
        found = spelled(HERE)(value, where)
        return f"{found['position']} {found['token']}"
    found = record({"part": text}, {"block": integer, "mixer": text})(value, where)
    name = found["mixer"] or {"attn": "attention", "mlp": "MLP"}.get(found["part"], found["part"])
    return name if found["block"] is None else f"L{found['block']} {name}"


def attended(value: Any, where: str) -> dict[str, Any]:
    """Accept the scores of keys, by block or token, or the factors of a recurrence's pattern."""
    if not isinstance(value, dict):
        raise wrong(where, "an object", value)
    by = one_of("block", "token", "factors")(value.get("by"), f"{where}.by")
    return (_FACTORS if by == "factors" else _SCORES)(value, where) | {"by": by}


def _check(found: dict[str, Any], where: str) -> None:
    """Check that every key has a share of each part, and pairs of parts that there are."""
    if found["by"] == "factors":
        return
    sizes = {"query": len(found["query_parts"]), "key": len(found["key_parts"])}
    for i, key in enumerate(found["keys"]):
        for side, size in sizes.items():
            if len(key[f"{side}_shares"]) != size:
                raise Wrong(f"{where}.keys[{i}].{side}_shares: {len(key[f'{side}_shares'])} shares of {size} parts")
            if any(pair[side] >= size for pair in key["pairs"]):
                raise Wrong(f"{where}.keys[{i}].pairs: a pair names a part that there is not")


FORM: dict[str, Check] = {"attend": agreeing(attended, _check)}


def _name(found: dict[str, Any]) -> str:
    return f"L{found['layer']}H{found['head']}" + ("" if found["mixer"] == "attention" else f" ({found['mixer']})")


def _short(part: str) -> str:
    """Return a part's name in a grid, as `3 attn` for `L3 attention`."""
    return part.removeprefix("L").replace("attention", "attn")


def part_grid(run: Run) -> list[Heat]:
    """Draw what each part, on either side, adds to the score of each key."""
    found = run.content["attend"]
    if not found or found["by"] == "factors":
        return []
    panels = tuple(
        Panel(
            f"{side}'s parts",
            tuple(map(_short, found[f"{side}_parts"])) if found["by"] == "block" else tuple(found[f"{side}_parts"]),
            tuple(f"{side}'s {name}" for name in found[f"{side}_parts"]),
            tuple(tuple(key[f"{side}_shares"]) for key in found["keys"]),
        )
        for side in ("query", "key")
    )
    minus = f", minus that of {found['versus']['position']} {found['versus']['token']}" if found["versus"] else ""
    grid = Heat(
        key="attend",
        title=f"What the score of each key of {_name(found)} is made of{minus}",
        label="key",
        rows=tuple(f"{key['position']} {key['token']}" for key in found["keys"]),
        panels=panels,
        summary=f"{len(found['keys'])} keys; each half of a row sums to the key's score.",
        tilted=True,
    )
    return [grid] if grid.cells <= MAX_CELLS else []


def entry_bars(run: Run) -> list[Bars]:
    """Draw the pattern of the head at the query."""
    found = run.content["attend"]
    if not found:
        return []
    part, name = ("entries", "entries") if found["by"] == "factors" else ("weights", "weight")
    names, values = [each["token"] for each in found[part]], [each[name] for each in found[part]]
    label = "entry of the pattern" if found["by"] == "factors" else "weight"
    query = f"{found['query']['position']} {found['query']['token']}"
    return [Bars("attend-pattern", f"Pattern of {_name(found)} at {query}", label, names, values)]


def drawings(run: Run) -> list[Heat | Bars]:
    """Return the figures."""
    return [*entry_bars(run), *part_grid(run)]


def attend(run: Run) -> dict[str, Any] | None:
    """Prepare a head's pattern at a query, and why it is what it is."""
    found = run.content["attend"]
    if not found:
        return None
    both: dict[str, Any] = {"name": _name(found), "query": found["query"], "by": found["by"], "legend": LEGEND}
    return both | (_factors(found) if found["by"] == "factors" else _scores(found, run))


def _scores(found: dict[str, Any], run: Run) -> dict[str, Any]:
    """Prepare the pairs of every key."""
    weights = [each["weight"] for each in found["weights"]]
    drawn, _ = bars(weights)
    rows = [
        each | {"value": percent(each["weight"]), "less": False, "bar": bar}
        for each, bar in zip(found["weights"], drawn, strict=True)
    ]
    rest = [(name, found[name]) for name in ("sink", "groups") if found[name]]
    named = {"sink": "sink, which has no value", "groups": "groups of tokens in the compressed memory"}
    return {
        "versus": found["versus"],
        "weights": rows,
        "rest": [(named[name], percent(value)) for name, value in rest],
        "heats": [heat(grid) for grid in part_grid(run)],
        "keys": [_key(key, found) for key in found["keys"]],
        "caveat": caveat(run.content) if found["by"] == "token" else "",
        "short": len(rows) <= SHORT,
    }


def _key(key: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """Prepare the largest pairs of a key, and their sum."""
    pairs = key["pairs"][:SHOWN]
    shares = [pair["share"] for pair in pairs]
    total = sum(pair["share"] for pair in key["pairs"]) + key["others"]
    decimals, (drawn, zero) = digits([*shares, total]), bars(shares)
    constants = [(name, key[part]) for part, name in (("softcap", "soft cap"), ("distance", "distance")) if key[part]]
    return {
        "position": key["position"],
        "token": key["token"],
        "weight": percent(key["weight"]),
        "rows": [
            {
                "names": (found["query_parts"][pair["query"]], found["key_parts"][pair["key"]]),
                "value": signed(pair["share"], decimals),
                "less": pair["share"] < 0,
                "bar": bar,
            }
            for pair, bar in zip(pairs, drawn, strict=True)
        ],
        "zero": zero,
        "others": signed(total - sum(shares), decimals),
        "sum": signed(total, decimals),
        "score": signed(key["score"], decimals),
        "unexplained": power(key["score"] - total),
        "constants": [(name, signed(value, decimals)) for name, value in constants],
    }


def _factors(found: dict[str, Any]) -> dict[str, Any]:
    """Prepare the factors of a recurrence's pattern."""
    entries = found["entries"]
    decimals = digits([each["entries"] for each in entries])
    drawn, zero = bars([each["entries"] for each in entries])
    return {
        "versus": None,
        "entries": [
            each
            | {name: signed(each[name], decimals) for name in ("entries", "product", "removed")}
            | {name: fixed(each[name], decimals) for name in ("write", "decay")}
            | {"less": each["entries"] < 0, "bar": bar}
            for each, bar in zip(entries, drawn, strict=True)
        ],
        "zero": zero,
        "removes": any(each["removed"] for each in entries),
        "own": signed(found["own"], decimals) if found["own"] else "",
        "short": len(entries) <= SHORT,
    }


SECTIONS = (
    Section(
        "attend",
        "Why it attends",
        attend,
        "With norms and rotations held at the prompt, a score before the softmax is bilinear in two residual streams: "
        "that of the query and that of the key. So it splits into one share for each pair of their parts, without "
        "remainder. Shares that all keys have in common change no weight. A recurrence has no softmax: there each "
        "entry of the pattern is a product of factors.",
        drawings,
    ),
)
