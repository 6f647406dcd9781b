"""Arguments of functions, checked before any work starts: a wrong one is named, with its value and what it may be."""

import re
from collections.abc import Iterable, Sequence
from operator import index
from typing import Any, Literal

BRIEF = 200  # characters of a list of numbers in a sentence

NUMBER = r"-?\d{1,40}"  # more digits than there is anything of: what is out of range says so
_LISTED = re.compile(rf"({NUMBER})(?:-({NUMBER}))?", re.ASCII)


def whole(name: str, value: Any, least: int | None = 1, most: int | None = None) -> int:
    """Return a whole number, of whatever type that counts as one; truth values do not.

    Args:
        name: of the argument, for messages.
        value: the argument.
        least, most: its range, both included; None for no bound.

    Raises:
        ValueError: it is not a whole number, or out of range.
    """
    try:
        number = None if isinstance(value, bool) else index(value)
    except TypeError:
        number = None
    if number is None:
        raise ValueError(f"{name} {_short(value)} is not a whole number")
    if least is not None and number < least:
        raise ValueError(f"{name} {number} is out of range: it must be at least {least}")
    if most is not None and number > most:
        raise ValueError(f"{name} {number} is out of range: it must be at most {most}")
    return number


def seed(value: Any) -> int:
    """Return the seed of a random generator; errors as those of `whole`."""
    return whole("seed", value, 0, 2**63 - 1)


def plain(value: Any) -> Any:
    """Return an argument as JSON holds it: a whole number of any type as `int`, and what has several as a list."""
    if value is None or isinstance(value, bool | float | str):
        return value
    try:
        return index(value)
    except TypeError:
        return [plain(one) for one in value] if isinstance(value, Iterable) else value


def listed(text: str) -> list[tuple[int, int]]:
    """Return the ranges, by their two ends, that a text such as `0,10-20,-1` or `all` lists.

    Raises:
        ValueError: it is not such a list.
    """
    if text == "all":
        return [(0, -1)]
    parts = [_LISTED.fullmatch(part.strip()) for part in text.split(",")]
    if None in parts:
        raise ValueError("write numbers and ranges as 0,10-20,-1, or all")
    return [(int(part[1]), int(part[2] or part[1])) for part in parts if part]


def canonical(given: str | Sequence[int]) -> str:
    """Return the text for numbers that `chosen` takes, the same for all ways to write them.

    Numbers counted from the start are in order and each once, and so are those counted from the end; what both name is
    known only where there is a count. `all` stays.

    Raises:
        ValueError: it is not such a list.
    """
    if isinstance(given, str) and given == "all":
        return given
    ranges = listed(given) if isinstance(given, str) else [(whole("number", one, None),) * 2 for one in given]
    found: list[tuple[int, int]] = []
    for odd, end, (first, last) in sorted((a > b or a < 0 <= b, a < 0, (a, b)) for a, b in set(ranges)):
        if found and not odd and (found[-1][0] < 0) == end and found[-1][1] + 1 >= first:
            found[-1] = found[-1][0], max(found[-1][1], last)
        else:
            found.append((first, last))
    return ",".join(f"{first}" if first == last else f"{first}-{last}" for first, last in found)


def brief(given: Sequence[int]) -> str:
    """Return numbers as `canonical` writes them, for people: of a long list the start."""
    text = canonical(given)
    return text if len(text) <= BRIEF else f"{text[:BRIEF].rpartition(',')[0]},..."


def chosen(name: str, given: str | Sequence[int], count: int, known: str) -> list[int]:
    """Return the numbers that an argument chooses among 0 to `count - 1`, ascending, each once.

    Args:
        name: of the argument, for messages.
        given: numbers, negative ones counted from the end; or a text as `listed` takes it.
        count: how many there are.
        known: what there is, for messages: `the prompt has positions 0 to 4`.

    Raises:
        ValueError: there is no number, or one is not whole, or out of range; or a range is empty.
    """
    asked = f"{name}={given[:40] if isinstance(given, str) else _short(given)}"
    try:
        ranges = listed(given) if isinstance(given, str) else ((whole(name, one, None),) * 2 for one in given)
    except ValueError as error:
        raise ValueError(f"{asked}: {error}") from error
    found: set[int] = set()
    for ends in ranges:
        for end in ends:
            if not -count <= end < count:
                which = "" if str(end) == given else f": {end}"
                raise ValueError(f"{asked}{which} is out of range; {known}")
        first, last = (end % count for end in ends)
        if first > last:
            raise ValueError(f"{asked}: {ends[0]} comes after {ends[1]}; write {ends[1]}-{ends[0]}")
        found.update(range(first, last + 1))
    if not found:
        raise ValueError(f"{asked}: give at least one; {known}")
    return sorted(found)


def output_positions(given: str | Sequence[int], n: int) -> list[int]:
    """Return output positions of a prompt of `n` tokens, ascending; arguments and errors as of `chosen`.

    Raises:
        ValueError: as `chosen`.
    """
    return chosen("position", given, n, f"the prompt has positions 0 to {n - 1}")


def input_positions(given: str | Sequence[int] | None, n: int, exclude: Sequence[int] = ()) -> list[int]:
    """Return some of the `n` positions that a map reads, ascending; arguments and errors as of `chosen`.

    None are all of them: those that its output depends on, without those to `exclude`.

    Raises:
        ValueError: as `chosen`; or a position is excluded.
    """
    if given is None:
        return [i for i in range(n) if i not in exclude]
    found = chosen("input_position", given, n, f"the output depends on positions 0 to {n - 1}")
    if wrong := [i for i in found if i in exclude]:
        raise ValueError(f"input_position={wrong[0]} is excluded: the map does not read it; leave it out of either")
    return found


def excluded_positions(given: str | Sequence[int] | None, n: int) -> list[int]:
    """Return those of the `n` positions that an output depends on which are no input of its map, ascending.

    Arguments and errors as of `chosen`; None are none.

    Raises:
        ValueError: as `chosen`; or none is left.
    """
    if given is None or (not isinstance(given, str) and not len(given)):
        return []
    found = chosen("exclude", given, n, f"the output depends on positions 0 to {n - 1}")
    if len(found) == n:
        which = "position 0 alone" if n == 1 else f"positions 0 to {n - 1} alone"
        asked = f"exclude={given}" if isinstance(given, str) else f"exclude={canonical(given)}"
        raise ValueError(f"{asked[:48]} leaves the map no input: the output depends on {which}; exclude fewer")
    return found


def key_positions(given: str | Sequence[int], query: int, name: str = "key") -> list[int]:
    """Return positions of keys that a query sees, ascending; arguments and errors as of `chosen`.

    Raises:
        ValueError: as `chosen`.
    """
    return chosen(name, given, query + 1, f"the query sees positions 0 to {query}")


def depths(layers: str | Sequence[int], blocks: int) -> list[int]:
    """Return depths of a model with `blocks` blocks, in blocks applied, ascending; arguments and errors as of `chosen`.

    Raises:
        ValueError: as `chosen`.
    """
    return chosen("layers", layers, blocks + 1, f"this model has depths 0 to {blocks}, counted in blocks applied")


Place = Literal["output", "layer", "attn", "mlp"]
# Directions that the distribution of the next token has of its own: they are at the output.
_COMPUTED = re.compile(r"entropy|fisher:([1-9][0-9]{0,8})", re.ASCII)


def computed(direction: str) -> int | None:
    """Return the number of a Fisher direction, named `fisher:K`, 0 for the entropy's, or None for one in a file."""
    found = _COMPUTED.fullmatch(direction)
    return None if found is None else int(found[1] or 0)


def place(direction: str, at: Place | None, layer: int | None, blocks: int) -> tuple[Place, int]:
    """Return what is projected on a direction: its kind, `output` or that of a tap, and the number of blocks applied.

    Args:
        direction: `entropy` or `fisher:K`, whose place is the output, or a file.
        at: the kind; default the residual stream, or the output for those.
        layer: blocks applied, the branch's own included; negative from the end.
        blocks: of the model.

    Raises:
        ValueError: there is no such place, or none is named.
    """
    own = computed(direction) is not None
    kind: Place = at or ("output" if own else "layer")
    if own and (kind != "output" or layer is not None):
        raise ValueError(f"{direction} is a direction of the output, after all blocks; name no other place (layer, at)")
    if kind == "output":
        if layer is not None:
            raise ValueError("the output comes after all blocks; leave out layer, or take another place (at)")
        return kind, blocks
    if layer is None:
        raise ValueError("name the depth at which it is projected, in blocks applied; or at=output, after the norm")
    depth = layer + 1 + blocks if layer < 0 else layer
    if not 1 <= depth <= blocks:
        raise ValueError(
            f"layer={layer} is out of range; this model has layers 1 to {blocks}, counted in blocks applied"
        )
    return kind, depth


def compared(prompts: int, rank: int) -> None:
    """Check that vectors of prompts, `rank` of each, have enough of other prompts to be compared with.

    Raises:
        ValueError: there is one prompt, or one vector of others: its scores have no standard deviation.
    """
    if prompts < 2:
        raise ValueError(f"calibration needs at least two prompts, not {prompts}: their scores are compared")
    if (prompts - 1) * rank < 2:
        raise ValueError("two prompts with one vector each are too few to calibrate; give three, or a larger rank")


def has_parts(at: str, by: str) -> None:
    """Check that what is projected has such parts; all has shares of tokens.

    Raises:
        ValueError: it is what a branch adds, which is one part, but for the heads of attention and an MLP's experts.
    """
    finer = {"attn": "head", "mlp": "expert"}.get(at)
    if finer and by not in ("token", finer):
        mixture = " a mixture" if finer == "expert" else ""
        raise ValueError(f"what {at} adds is one part by {by}; split it by token, or{mixture} by {finer}")


def has_experts(routed: Sequence[bool], at: str = "output") -> None:
    """Check that what is split has experts; `routed` says of each block up to its end whether that has any.

    Raises:
        ValueError: it has none.
    """
    if not any(routed[-1:] if at == "mlp" else routed):
        none = {
            "output": "this model has no experts; split its logits by layer or head",
            "mlp": "that block has no experts; split what its MLP adds by token",
        }
        raise ValueError("by=expert: " + none.get(at, "no block up to there has experts; split the stream by layer"))


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 40 else f"{text[:39]}…"
