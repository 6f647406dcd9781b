"""Checks from which the sections state their forms, as data: JSON may come from strangers.

A *check* is a function `(value, where) -> value` that returns the value as the report may use it, or raises a one-line
`Wrong` that names the place. Unknown keys are dropped, parts that are missing or null become None, and control and bidi
characters and halves of surrogate pairs in text, which could mislead a reader, become escapes.
"""

import unicodedata
from collections.abc import Callable, Mapping
from typing import Any

from ggjac import display

Check = Callable[[Any, str], Any]

# The longest lists of a result, tokens and ranks, stay far below this.
MAX_ITEMS = 1_000_000
# Of the lists inside lists, which multiply: blocks of a model, heads of a block, vectors and words at one place.
MAX_BLOCKS, MAX_HEADS, MAX_VECTORS, MAX_WORDS = 4096, 4096, 65_536, 4096
# Differences and ratios of two numbers within this bound (and above its inverse) neither overflow nor vanish.
LARGEST = 1e100
# Invisible, yet part of words and of emoji.
_JOINERS = "\u200c\u200d"


class Wrong(ValueError):
    """A value of another form; the message names its place and the form expected there."""


def wrong(where: str, expected: str, value: Any) -> Wrong:
    """Return the error for a value that is not of the expected form."""
    found = type(value).__name__ if isinstance(value, dict | list) else ascii(value)
    found = found if len(found) <= 40 else f"{found[:37]}..."
    return Wrong(f"{where}: expected {expected}, found {found}")


def text(value: Any, where: str) -> str:
    """Accept text; its invisible characters become escapes."""
    if not isinstance(value, str):
        raise wrong(where, "text", value)
    return "".join(
        c if c.isprintable() or c in "\n" + _JOINERS else c.encode("unicode_escape").decode("ascii") for c in value
    )


def number(value: Any, where: str) -> float:
    """Accept a number of a size that can be drawn; one smaller than any result becomes 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= LARGEST:
        raise wrong(where, "a number", value)
    return float(value) if abs(value) * LARGEST >= 1 else 0.0


def integer(value: Any, where: str) -> int:
    """Accept a whole number that is not negative, as counts, positions and token ids are."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
        raise wrong(where, "a whole number", value)
    return value


def flag(value: Any, where: str) -> bool:
    """Accept true or false."""
    if not isinstance(value, bool):
        raise wrong(where, "true or false", value)
    return value


def one_of(*names: str) -> Check:
    """Accept one of these words."""

    def check(value: Any, where: str) -> str:
        if value not in names:
            raise wrong(where, " or ".join(names), value)
        return value

    return check


def maybe(check: Check) -> Check:
    """Accept null as well: infinity and NaN, which JSON does not have, are saved as null."""
    return lambda value, where: None if value is None else check(value, where)


def each(check: Check, *, least: int = 0, most: int = MAX_ITEMS) -> Check:
    """Accept a list of at least `least` and at most `most` values, each accepted by a check."""

    def check_all(value: Any, where: str) -> list[Any]:
        if not isinstance(value, list) or len(value) < least:
            raise wrong(where, f"a list of {least} or more" if least else "a list", value)
        if len(value) > most:
            raise Wrong(f"{where}: expected a list of at most {most}, found {len(value)}")
        return [check(item, f"{where}[{i}]") for i, item in enumerate(value)]

    return check_all


def table(check: Check) -> Check:
    """Accept an object with any keys, its values accepted by a check."""

    def check_all(value: Any, where: str) -> dict[str, Any]:
        if not isinstance(value, dict) or len(value) > MAX_ITEMS:
            raise wrong(where, "an object", value)
        return {text(key, where): check(item, f"{where}.{text(key, where)[:40]}") for key, item in value.items()}

    return check_all


def record(required: Mapping[str, Check], optional: Mapping[str, Check] | None = None) -> Check:
    """Accept an object with these keys; `optional` ones become None where they are missing or null."""

    def check_all(value: Any, where: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise wrong(where, "an object", value)
        path = "" if where == "" else f"{where}."
        missing = [key for key in required if key not in value]
        if missing:
            raise Wrong(f"{path}{missing[0]}: is missing")
        found = {key: check(value[key], path + key) for key, check in required.items()}
        rest = {key: maybe(check)(value.get(key), path + key) for key, check in (optional or {}).items()}
        return found | rest

    return check_all


def agreeing(check: Check, rule: Callable[[Any, str], None]) -> Check:
    """Accept a value of some form whose parts also agree; the rule raises `Wrong` where they do not."""

    def check_all(value: Any, where: str) -> Any:
        found = check(value, where)
        rule(found, where)
        return found

    return check_all


# -- forms of small things that occur in several parts -----------------------------------------------------------------


def spelled(required: Mapping[str, Check], optional: Mapping[str, Check] | None = None) -> Check:
    """Accept an object about a token; under `token` it also returns the token as it is shown."""
    own = {"id": integer, "bytes": _hexadecimal, "type": text, "score": number}
    check = record({"text": _plain} | dict(required), own | dict(optional or {}))

    def check_all(value: Any, where: str) -> dict[str, Any]:
        found = check(value, where)
        return found | {"token": _standing(text(display.token(found), where))}

    return check_all


def _standing(shown: str) -> str:
    """Return text that does not join what precedes it: a combining mark at its start stands on a dotted circle."""
    return f"\N{DOTTED CIRCLE}{shown}" if shown and unicodedata.category(shown[0]).startswith("M") else shown


def _plain(value: Any, where: str) -> str:
    """Accept text as it is: of a token, which `display` escapes."""
    if not isinstance(value, str):
        raise wrong(where, "text", value)
    return value


def _hexadecimal(value: Any, where: str) -> str:
    """Accept the bytes of a token."""
    try:
        return bytes.fromhex(value).hex()
    except (ValueError, TypeError):
        raise wrong(where, "bytes in hexadecimal", value) from None


NUMBERS = each(maybe(number), most=MAX_VECTORS)  # one for each singular vector
TOKEN = spelled({"id": integer}, {"logit": number, "probability": number})
HERE = {"position": integer}  # and the token there
SINK = spelled(HERE | {"fraction": number})  # the first position, where it has most of a whole
WORDS = each(spelled({}), most=MAX_WORDS)
#: `error` is one standard error, 0 where the value is exact; `frobenius` is the norm of the same map.
ESTIMATE = record({"value": maybe(number)}, {"error": number, "frobenius": number})
FOLLOWING = record({"value": number, "converged": flag}, {"residual": number})  # the singular value after the last one
TRIPLET = {"singular_value": number, "residual": maybe(number)}  # the residual is relative to σ
MODEL = record(
    {"path": text},
    dict.fromkeys(("asked", "name", "architecture", "fingerprint", "warning"), text) | {"bytes": integer},
)
#: ‖J x + offset − y‖ ⁄ ‖y‖ and the limit up to which it is healthy.
RECONSTRUCTION = record(
    {"error": maybe(number), "limit": number, "healthy": flag},
    {"offset_norm": number, "output_norm": number, "cancellation": number},
)
