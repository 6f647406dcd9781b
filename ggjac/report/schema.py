"""What a run folder may hold, stated as data and checked before anything is drawn: run.json may come from strangers.

A *check* is a function `(value, where) -> value` that returns what the report may use, or raises a one-line `RunError`
that names the place. Keys that are unknown are dropped, parts that are missing or null become None, and text loses what
could steer a reader's eye: control and bidi characters, halves of surrogate pairs.
"""

from collections.abc import Callable, Mapping
from typing import Any

from ggjac.runs import RunError

Check = Callable[[Any, str], Any]

# Lists longer than this are no result of ours: the longest, tokens and ranks, stay far below.
MAX_ITEMS = 1_000_000
# Differences and ratios of two numbers within this bound (and above its inverse) neither overflow nor vanish.
LARGEST = 1e100
# Invisible, yet part of words and of emoji.
_JOINERS = "\u200c\u200d"


def _wrong(where: str, expected: str, value: Any) -> RunError:
    found = type(value).__name__ if isinstance(value, dict | list) else ascii(value)
    found = found if len(found) <= 40 else f"{found[:37]}..."
    return RunError(f"run.json: {where}: expected {expected}, found {found}; analyse the prompt again")


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


def each(check: Check, *, least: int = 0) -> Check:
    """Accept a list."""

    def check_all(value: Any, where: str) -> list[Any]:
        if not isinstance(value, list) or not least <= len(value) <= MAX_ITEMS:
            raise _wrong(where, f"a list of {least} or more" if least else "a list", value)
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
            raise RunError(f"run.json: {path}{missing[0]}: is missing; analyse the prompt again")
        found = {key: check(value[key], path + key) for key, check in required.items()}
        rest = {key: maybe(check)(value.get(key), path + key) for key, check in (optional or {}).items()}
        return found | rest

    return check_all


_TOKEN = record({"id": integer, "token": text}, {"logit": number, "probability": number})
_ESTIMATE = record({"value": maybe(number)}, {"error": number, "frobenius": number})
_TRIPLET = {"singular_value": number, "residual": maybe(number)}
_MEASURES = ("std_ratio", "std_ratio_output", "max_abs", "pearson", "spearman", "kl", "top_agreement")
_AGREEMENT = record({"error": maybe(number)}, dict.fromkeys(_MEASURES, number) | {"top": integer, "top1": flag})

#: What `run.json` may hold. The sections of the report, which use it, say in their docstrings what it means.
RUN = record(
    {
        "model": record({"path": text}, {"name": text, "architecture": text, "bytes": integer, "fingerprint": text}),
        "tokens": each(record({"position": integer, "id": integer, "text": text}), least=1),
    },
    {
        "created": text,
        "versions": table(text),
        "platform": text,
        "command": each(text),
        "prompt": text,
        "warning": text,
        "position": integer,
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
                "top1_equal": flag,
                "top1": record({"token": text}),
                "kl": number,
                "kl_last": number,
                "logits_error": number,
                "cause": text,
            },
        ),
        "reconstruction": record(
            {"error": maybe(number), "limit": number, "healthy": flag},
            {"offset_norm": number, "output_norm": number},
        ),
        "svd": record(
            {
                "converged": flag,
                "triplets": each(
                    record(
                        _TRIPLET
                        | {
                            "left": each(text),
                            "right": each(
                                record(
                                    {
                                        "position": integer,
                                        "token": text,
                                        "weight": maybe(number),
                                        "nearest": each(text),
                                    }
                                )
                            ),
                        }
                    )
                ),
            },
            {"seed": integer, "tol": number, "sweeps": integer, "stopped_by": text},
        ),
        "stable_rank": _ESTIMATE,
        "attribution": record(
            {
                "target": _TOKEN,
                "logit": number,
                "shares": each(record({"position": integer, "token": text, "share": number}), least=1),
            },
            {"softcap": number, "offset": number, "unexplained": number},
        ),
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
    },
)


def checked(content: Any) -> dict[str, Any]:
    """Return the parts of `run.json` that the report draws, each of the stated form.

    Raises:
        RunError: a part is of another form; the message names it.
    """
    run = RUN(content, "")
    n = len(run["tokens"])
    position = n - 1 if run["position"] is None else run["position"]
    if position >= n:
        raise RunError(f"run.json: position: {position} is beyond the {n} tokens; analyse the prompt again")
    ranks = (run["layers"] or {}).get("ranks") or {"tokens": [], "depths": []}
    for depth in ranks["depths"]:
        if len(depth["ranks"]) != len(ranks["tokens"]):
            raise RunError(
                f"run.json: layers.ranks: {len(depth['ranks'])} ranks at depth {depth['index']} for "
                f"{len(ranks['tokens'])} tokens; analyse the prompt again"
            )
    return run | {"position": position}
