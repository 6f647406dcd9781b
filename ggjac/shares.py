"""Tables of shares: the names of what is split into parts, the parts' columns, and the largest of them.

What is split is a logit, or the difference of two; or the projection of a vector of the network on a direction.

Every analysis that splits a logit, or another number, into parts whose sum is exact shows them with these.
"""

import os
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any, Literal, NamedTuple, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ggjac import display
from ggjac.checks import canonical, input_positions
from ggjac.directions import Direction
from ggjac.results import Table, Words


class Projection(NamedTuple):
    """A direction, and the vector whose projection on it, their product, is split in place of a logit.

    Attributes:
        direction: its elements are those of the network's dtype.
        at: where the vector is: `"output"`, of the final norm; `"layer"`, the residual stream; or `"attn"`, `"mlp"`,
            what that branch adds to it.
        layer: number of blocks applied, the branch's own included.
    """

    direction: Direction
    at: Literal["output", "layer", "attn", "mlp"]
    layer: int

    @property
    def name(self) -> str:
        """What is split, in words."""
        block = f"block {self.layer - 1}"
        place = {"output": "the output", "layer": f"the stream after {block}", "attn": f"what {block}'s attention adds"}
        return f"the projection of {place.get(self.at, f'what the MLP of {block} adds')} on {self._direction}"

    @property
    def _direction(self) -> str:
        one = self.direction
        if one.kind == "file":
            return display.visible(os.fsencode(":".join(filter(None, (os.path.basename(one.file), one.name)))))
        known = {"entropy": "the gradient of the next token's entropy", "given": "a direction"}
        return known.get(one.kind) or f"Fisher direction {one.facts['index']} of the next token"

    def data(self) -> dict[str, Any]:
        """Return direction and place as plain data."""
        return {"words": self.name, "at": self.at, "layer": self.layer, "direction": self.direction.data()}


class Split(Protocol):
    """One logit, or the difference of two, that is split; or a projection."""

    @property
    def target(self) -> int | None:
        """Token id whose logit is split."""

    @property
    def versus(self) -> int | None:
        """Token id whose logit is subtracted."""

    @property
    def position(self) -> int:
        """Output position."""

    @property
    def logit(self) -> float:
        """The logit, or the projection."""

    @property
    def along(self) -> Projection | None:
        """What is projected on what; None of a logit."""


class Splits(Protocol):
    """The logits of `m` output positions that are split."""

    @property
    def positions(self) -> list[int]:
        """Output positions."""

    @property
    def targets(self) -> Int[Tensor, " m"] | None:
        """Token ids whose logits are split."""

    @property
    def versus(self) -> int | None:
        """Token id whose logit is subtracted everywhere."""

    @property
    def logits(self) -> Float[Tensor, " m"]:
        """The logits, or projections."""

    @property
    def along(self) -> Projection | None:
        """What is projected on what; None of logits."""

    @property
    def softcap(self) -> float:
        """Soft cap of the head's logits, which is not applied; 0 for none."""


def placed(
    positions: Sequence[int], targets: Int[Tensor, " m"] | None, along: Projection | None = None
) -> dict[str, Tensor]:
    """Return the part of what is saved that says which logits are split, or what is projected on what."""
    what = {} if targets is None else {"targets": targets}
    what |= {} if along is None else {"direction": along.direction.vector}
    return {"positions": torch.tensor(positions), **what}


def token_columns(words: Words, counts: Sequence[int], exclude: Sequence[int] = ()) -> dict[str, Sequence[Any]]:
    """Return the columns that name the parts of logits by token: for each its first positions, and the offset.

    Those to `exclude` are left out.
    """
    places = [i for count in counts for i in (*input_positions(None, count, exclude), None)]
    return {"part": ["offset" if i is None else "token" for i in places], **words.at(places)}


def folded(exclude: Sequence[int]) -> tuple[str, ...]:
    """Return the note of a table whose offset has the shares of excluded positions; none without any."""
    return (f"offset: with position {canonical(exclude)}, which is excluded",) if exclude else ()


def common_columns(words: Words, split: "Split") -> dict[str, Any]:
    """Return what all shares of a logit have in common, its name and value."""
    names = words.one("target", split.target) | words.one("versus", split.versus)
    if split.along is not None:
        names = {"of": split.along.name}
    return {"output": split.position, **names, value_name(split): split.logit}


def value_name(split: "Split | Splits") -> str:
    """Return what a number is called that is split."""
    return "logit" if split.along is None else "projection"


def logit_columns(words: Words, shares: "Splits", rows: Sequence[int]) -> dict[str, Sequence[Any]]:
    """Return the columns that name the logits of rows."""
    return {
        "output": [shares.positions[m] for m in rows],
        **({} if shares.targets is None else words.column("target", shares.targets[rows].tolist())),
        value_name(shares): shares.logits[rows].tolist(),
    }


def largest(table: Table, count: int) -> Table:
    """Return a table of shares with the `count` largest parts of each logit, and their rest as one row, `others`.

    The offset keeps its own row, so that the rows still add up to the logit. A table that does not split a logit into
    named parts, as of what heads read, stays as it is.
    """
    if "part" not in table.columns:
        return table
    values = [name for name in ("share", "up", "gate") if name in table.columns]
    kept: list[dict[str, Any]] = []
    rows = [dict(zip(table.columns, row, strict=True)) for row in zip(*table.columns.values(), strict=True)]
    for _, each in groupby(rows, key=lambda row: row.get("output")):
        group = list(each)
        parts = [row for row in group if row["part"] != "offset"]
        if len(parts) <= count:
            kept += group
            continue
        parts.sort(key=lambda row: -max(abs(row[name]) for name in values))
        others = {
            name: group[0][name]
            for name in ("output", "target id", "target", "logit", "projection")
            if name in group[0]
        }
        others |= {"part": "others"} | {name: sum(row[name] for row in parts[count:]) for name in values}
        offset = [row for row in group if row["part"] == "offset"]
        kept += [*parts[:count], dict.fromkeys(table.columns) | others, *offset]
    return replace(table, columns={name: [row[name] for row in kept] for name in table.columns})


def entry_of(shares: "Splits", by: str, row: int, words: Words) -> dict[str, Any]:
    """Return the data of the logit at an output position, however it is split."""
    target = None if shares.targets is None else int(shares.targets[row])
    what = asked_data(words, target, shares.versus, float(shares.logits[row]), shares.softcap, shares.along)
    return {"by": by, **words.here(shares.positions[row]), **what}


def asked_data(
    words: Words, target: int | None, versus: int | None, value: float, softcap: float, along: Projection | None
) -> dict[str, Any]:
    """Return what is split, and its value, as plain data."""
    if along is not None:
        return {"projection": {"value": value, **along.data()}}
    return {
        "target": None if target is None else words.token(target),
        "versus": None if versus is None else words.token(versus),
        "logit": value,
        "softcap": softcap or None,
    }


def split_name(words: Words, target: int | None, versus: int | None, along: Projection | None = None) -> str:
    """Return the name of the split quantity: the logit of one target, or of each output's own; or a projection."""
    if along is not None:
        return along.name
    logit = "the logit" if target is None else f"the logit of {words.name(target)}"
    return logit if versus is None else f"{logit} minus that of {words.name(versus)}"
