"""What a result may hold, stated as data and checked before anything is drawn: JSON may come from strangers.

A *check* is a function `(value, where) -> value` that returns what the report may use, or raises a one-line `Wrong`
that names the place. Keys that are unknown are dropped, parts that are missing or null become None, and text loses what
could steer a reader's eye: control and bidi characters, halves of surrogate pairs.
"""

from collections.abc import Callable, Mapping
from typing import Any

from ggjac.runs import RunError

Check = Callable[[Any, str], Any]

# Lists longer than this are no result of ours: the longest, tokens and ranks, stay far below.
MAX_ITEMS = 1_000_000
# Of the lists inside lists, which multiply: blocks of a model, heads of a block, vectors and words at one place.
MAX_BLOCKS, MAX_HEADS, MAX_VECTORS, MAX_WORDS = 4096, 4096, 65_536, 4096
# Differences and ratios of two numbers within this bound (and above its inverse) neither overflow nor vanish.
LARGEST = 1e100
# Invisible, yet part of words and of emoji.
_JOINERS = "\u200c\u200d"


class Wrong(ValueError):
    """A value of another form; the message names its place and what was expected there."""


def _wrong(where: str, expected: str, value: Any) -> Wrong:
    found = type(value).__name__ if isinstance(value, dict | list) else ascii(value)
    found = found if len(found) <= 40 else f"{found[:37]}..."
    return Wrong(f"{where}: expected {expected}, found {found}")


def text(value: Any, where: str) -> str:
    """Accept text; show its invisible characters as escapes."""
    if not isinstance(value, str):
        raise _wrong(where, "text", value)
    return "".join(c if c.isprintable() or c in "\n" + _JOINERS else _escape(c) for c in value)


def _escape(character: str) -> str:
    code = ord(character)
    named = {"\t": "\\t", "\r": "\\r"}
    return named.get(character) or (f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}")


def number(value: Any, where: str) -> float:
    """Accept a number of a size that can be drawn; what is smaller than any result is 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= LARGEST:
        raise _wrong(where, "a number", value)
    return float(value) if abs(value) * LARGEST >= 1 else 0.0


def integer(value: Any, where: str) -> int:
    """Accept a whole number that is not negative, as counts, positions and token ids are."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
        raise _wrong(where, "a whole number", value)
    return value


def flag(value: Any, where: str) -> bool:
    """Accept true or false."""
    if not isinstance(value, bool):
        raise _wrong(where, "true or false", value)
    return value


def one_of(*names: str) -> Check:
    """Accept one of some words."""

    def check(value: Any, where: str) -> str:
        if value not in names:
            raise _wrong(where, " or ".join(names), value)
        return value

    return check


def maybe(check: Check) -> Check:
    """Accept null too; JSON has no infinity and no NaN, which are saved as null."""
    return lambda value, where: None if value is None else check(value, where)


def each(check: Check, *, least: int = 0, most: int = MAX_ITEMS) -> Check:
    """Accept a list."""

    def check_all(value: Any, where: str) -> list[Any]:
        if not isinstance(value, list) or len(value) < least:
            raise _wrong(where, f"a list of {least} or more" if least else "a list", value)
        if len(value) > most:
            raise Wrong(f"{where}: expected a list of at most {most}, found {len(value)}")
        return [check(item, f"{where}[{i}]") for i, item in enumerate(value)]

    return check_all


def table(check: Check) -> Check:
    """Accept an object whose keys are free names."""

    def check_all(value: Any, where: str) -> dict[str, Any]:
        if not isinstance(value, dict) or len(value) > MAX_ITEMS:
            raise _wrong(where, "an object", value)
        return {text(key, where): check(item, f"{where}.{text(key, where)[:40]}") for key, item in value.items()}

    return check_all


def record(required: Mapping[str, Check], optional: Mapping[str, Check] | None = None) -> Check:
    """Accept an object with these keys; `optional` ones are None where they are missing or null."""

    def check_all(value: Any, where: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise _wrong(where, "an object", value)
        path = "" if where == "" else f"{where}."
        missing = [key for key in required if key not in value]
        if missing:
            raise Wrong(f"{path}{missing[0]}: is missing")
        found = {key: check(value[key], path + key) for key, check in required.items()}
        rest = {key: maybe(check)(value.get(key), path + key) for key, check in (optional or {}).items()}
        return found | rest

    return check_all


def position(value: Any, where: str) -> int | str:
    """Accept a position, or the word for all of them."""
    return "all" if value == "all" else integer(value, where)


_words = each(text, most=MAX_WORDS)
_TOKEN = record({"id": integer, "token": text}, {"logit": number, "probability": number})
_PIECE = record({"text": text}, {"id": integer, "position": integer})
_ESTIMATE = record({"value": maybe(number)}, {"error": number, "frobenius": number})
_TRIPLET = {"singular_value": number, "residual": maybe(number)}
_MODEL = record({"path": text}, {"name": text, "architecture": text, "bytes": integer, "fingerprint": text})
_HEALTH = record(
    {"error": maybe(number), "limit": number, "healthy": flag}, {"offset_norm": number, "output_norm": number}
)
_MEASURES = ("std_ratio", "std_ratio_output", "max_abs", "pearson", "spearman", "kl", "top_agreement")
_AGREEMENT = record({"error": maybe(number)}, dict.fromkeys(_MEASURES, number) | {"top": integer, "top1": flag})
_BOTH = record({"a": number, "b": number})

# A logit, or the difference of two, and what it is made of: of input tokens, or of the branches of blocks.
_WHOLE = {"target": _TOKEN, "logit": number}
_WHOSE = {"position": integer, "token": text, "versus": _TOKEN, "softcap": number, "unexplained": number}
_SHARES = record(
    _WHOLE | {"shares": each(record({"position": integer, "token": text, "share": number}), least=1)},
    _WHOSE | {"offset": number},
)
_BRANCHES = record(
    _WHOLE
    | {
        "embedding": number,
        "blocks": each(
            record(
                {"block": integer, "attn": number, "mlp": number},
                {"heads": each(number, most=MAX_HEADS), "attn_bias": number},
            ),
            least=1,
            most=MAX_BLOCKS,
        ),
    },
    _WHOSE | {"bias": number},
)


def attribution(value: Any, where: str) -> dict[str, Any]:
    """Accept the shares in one logit, or in one at every position, by token, layer or head.

    Returns:
        `{"by", "one", "positions"}`: the entry of one position or None, those of several or None.
    """
    if not isinstance(value, dict):
        raise _wrong(where, "an object", value)
    by = one_of("token", "layer", "head")("token" if value.get("by") is None else value["by"], f"{where}.by")
    entry = _SHARES if by == "token" else _BRANCHES
    several = value.get("positions")
    return {
        "by": by,
        "one": entry(value, where) if several is None or "target" in value else None,
        "positions": maybe(each(_placed(entry), least=1))(several, f"{where}.positions"),
    }


def _placed(entry: Check) -> Check:
    """Accept an entry that says of which position it is."""

    def check(value: Any, where: str) -> dict[str, Any]:
        record({"position": integer, "token": text})(value, where)
        return entry(value, where)

    return check


_NULLED = each(maybe(number), most=MAX_VECTORS)
_COHERENCE = record(
    {"scores": _NULLED, "chance": _NULLED, "shuffled": record({"mean": maybe(number), "sd": maybe(number)})},
    {"above": _NULLED},
)
_SVD = record(
    {
        "converged": flag,
        "triplets": each(
            record(
                _TRIPLET
                | {
                    "left": _words,
                    "right": each(
                        record({"position": integer, "token": text, "weight": maybe(number), "nearest": _words})
                    ),
                }
            ),
            most=MAX_VECTORS,
        ),
    },
    {
        "seed": integer,
        "tol": number,
        "sweeps": integer,
        "stopped_by": text,
        "readability": record({"left": _COHERENCE, "right": _COHERENCE}),
        "per_token": each(
            record(
                {
                    "position": integer,
                    "token": text,
                    "triplets": each(record(_TRIPLET | {"left": _words, "right": _words}), most=MAX_VECTORS),
                },
                {"sweeps": integer, "converged": flag, "stopped_by": text},
            )
        ),
    },
)
_GENERATED = record(
    {"strength": number, "text": text},
    {
        "tokens": each(_PIECE),
        "kl_first": number,
        "concept_mass_first": number,
        "concept_hits": integer,
        "direction_norm": number,
    },
)
_LENGTHS = each(record({"norm": maybe(number), "tokens": _words}, {"component": integer}), most=MAX_VECTORS)

#: What a result may hold beside its `tokens`. The sections of the report, which use it, say in their docstrings what it
#: means.
PARTS: dict[str, Check] = {
    "created": text,
    "versions": table(text),
    "platform": text,
    "command": each(text),
    "prompt": text,
    "warning": text,
    "position": position,
    "device": text,
    "dtype": text,
    "mlp_path": text,
    "threads": integer,
    "seconds": table(number),
    "peak_memory_bytes": integer,
    "predictions": each(_TOKEN),
    "parity": record(
        {"verdict": maybe(flag)},
        {
            "reason": text,
            "mode": text,
            "tolerance": number,
            "top1_equal": flag,
            "top1": record({"token": text}),
            "kl": number,
            "kl_last": number,
            "logits_error": number,
            "cause": text,
            "layers": each(
                record(
                    {"name": text, "error": maybe(number)}, {"worst_position": integer, "worst_error": maybe(number)}
                )
            ),
        },
    ),
    "reconstruction": _HEALTH,
    "svd": _SVD,
    "stable_rank": _ESTIMATE,
    "attribution": attribution,
    "branches": _BRANCHES,
    "layers": record(
        {
            "taps": each(
                record(
                    {
                        "map": one_of("cumulative", "blockwise", "to_end"),
                        "kind": one_of("layer", "attn", "mlp"),
                        "index": integer,
                        "triplets": each(record(_TRIPLET | {"left": each(_TOKEN)}, {"arriving": each(_TOKEN)})),
                    },
                    {"stable_rank": _ESTIMATE},
                )
            )
        },
        {
            "readout": each(record({"index": integer, "top": each(_TOKEN)})),
            "ranks": record(
                {
                    "tokens": each(_TOKEN),
                    "depths": each(record({"index": integer, "ranks": each(integer)})),
                }
            ),
            "path": each(record({"index": integer, "values": each(number, least=2)})),
        },
    ),
    "contrast": record({"ordinary": _AGREEMENT}, {"detached": _AGREEMENT}),
    "norms": record(
        {"positions": each(record({"position": integer, "token": text, "columns": _LENGTHS, "rows": _LENGTHS}))}
    ),
    "jacobian": record(
        {
            "positions": each(
                record({"position": integer, "token": text}, {"frobenius": number, "contribution_norm": number})
            )
        },
        {"shape": each(integer, most=9), "frobenius": number, "reconstruction": _HEALTH},
    ),
    "ranks": record(
        {
            "prompts": each(
                record(
                    {"tokens": each(record({"text": text, "stable_rank": _ESTIMATE}, {"id": integer}), least=1)},
                    {"prompt": text, "joint": _ESTIMATE, "next": _TOKEN, "stopped_by": text, "reconstruction": _HEALTH},
                ),
                least=1,
            ),
            "by_position": each(
                record(
                    {"position": integer, "prompts": integer},
                    dict.fromkeys(("mean", "error", "median", "least", "most"), number),
                )
            ),
        }
    ),
    "other_model": _MODEL,
    "compare": record(
        {
            "singular_values": each(record({"a": number, "b": number}, {"residual": number}), most=MAX_VECTORS),
            "angles": record({"left": _NULLED, "right": _NULLED}),
            "target": _TOKEN,
            "logit": _BOTH,
            "offset": _BOTH,
            "shares": each(record({"position": integer, "token": text, "a": number, "b": number})),
            "positions": each(
                record(
                    {"position": integer, "token": text, "kl": maybe(number)},
                    {"top1": record({"a": text, "b": text}), "same_top1": flag},
                )
            ),
        },
        {
            "reconstruction": record({"a": _HEALTH, "b": _HEALTH}),
            "tol": number,
            "converged": flag,
            "seed": integer,
            "output_distance": number,
            "softcap": number,
            "kl": number,
            "mean_kl": number,
            "top1_agreement": number,
        },
    ),
    "steering": record(
        {"method": text, "layer": integer, "baseline": _GENERATED, "steered": each(_GENERATED, most=MAX_VECTORS)},
        {
            "changed_after_blocks": integer,
            "blocks": integer,
            "seed": integer,
            "concept": record({}, {"text": text, "tokens": each(_PIECE), "top": each(_TOKEN)}),
            "controls": each(_GENERATED, most=MAX_VECTORS),
        },
    ),
}
_PROMPT = each(record({"position": integer, "id": integer, "text": text}), least=1)

#: What `run.json` may hold, and what commands print; and a result about many prompts, which has none of its own.
RUN = record({"model": _MODEL, "tokens": _PROMPT}, PARTS)
RUN_OF_MANY = record({"model": _MODEL}, PARTS)


def checked(content: Any, source: str = "run.json", again: str = "analyse the prompt again") -> dict[str, Any]:
    """Return the parts of a result that the report draws, each of the stated form.

    `attribution` becomes the shares of tokens at one position, `branches` those of blocks and heads, `everywhere` those
    at all positions, `{"by", "entries"}`; `position` is a number, the last one where `all_positions` were asked for.

    Args:
        content: what was read.
        source: the file's name.
        again: how to come by a better one.

    Raises:
        RunError: a part is of another form; the message names it.
    """
    try:
        many = (
            isinstance(content, dict) and "ranks" in content and not {"tokens", "prompt", "position"} & content.keys()
        )
        run = RUN_OF_MANY(content, "") | {"tokens": []} if many else RUN(content, "")
        return _arranged(run)
    except Wrong as error:
        raise RunError(f"{source}: {error}; {again}") from error


def _arranged(run: dict[str, Any]) -> dict[str, Any]:
    """Check what several parts must agree about, and give each section its own."""
    n = len(run["tokens"])
    everywhere = run["position"] == "all"
    position = max(0, n - 1) if run["position"] is None or everywhere else run["position"]
    if n and position >= n:
        raise Wrong(f"position: {position} is beyond the {n} tokens")
    ranks = (run["layers"] or {}).get("ranks") or {"tokens": [], "depths": []}
    for depth in ranks["depths"]:
        if len(depth["ranks"]) != len(ranks["tokens"]):
            raise Wrong(
                f"layers.ranks: {len(depth['ranks'])} ranks at depth {depth['index']} for {len(ranks['tokens'])} tokens"
            )
    _check_coherence(run["svd"])
    given = run["attribution"] or {"by": "token", "one": None, "positions": None}
    by_token = given["by"] == "token"
    several = given["positions"] and {"by": given["by"], "entries": given["positions"]}
    branches = run["branches"] if by_token or run["branches"] else given["one"]
    for entries in ([branches] if branches else [], several["entries"] if several and not by_token else []):
        _check_blocks(entries)
    return run | {
        "position": position,
        "all_positions": everywhere,
        "attribution": given["one"] if by_token else None,
        "branches": branches,
        "everywhere": several,
        "reconstruction": run["reconstruction"] or (run["jacobian"] or {}).get("reconstruction"),
    }


def _check_coherence(svd: dict[str, Any] | None) -> None:
    """Check that every decoded vector has its score."""
    for side, found in ((svd or {}).get("readability") or {}).items():
        for name in ("scores", "chance"):
            if svd and len(found[name]) != len(svd["triplets"]):
                raise Wrong(
                    f"svd.readability.{side}.{name}: {len(found[name])} numbers for {len(svd['triplets'])} triplets"
                )


def _check_blocks(entries: list[dict[str, Any]]) -> None:
    """Check that all have the same blocks, and these the same heads."""
    if entries:
        forms = {tuple(None if b["heads"] is None else len(b["heads"]) for b in entry["blocks"]) for entry in entries}
        if len(forms) > 1 or len(set(forms.pop())) > 1:
            raise Wrong("attribution: blocks differ in their number, or in that of their heads")
