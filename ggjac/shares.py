"""Tables of shares: the names of what is split into parts, the parts' columns, and the largest of them.

Every analysis that splits a logit, or another number, into parts whose sum is exact shows them with these.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ggjac.checks import canonical, input_positions
from ggjac.results import Table, Words


class Split(Protocol):
    """One logit, or the difference of two, that is split."""

    @property
    def target(self) -> int:
        """Token id whose logit is split."""

    @property
    def versus(self) -> int | None:
        """Token id whose logit is subtracted."""

    @property
    def position(self) -> int:
        """Output position."""

    @property
    def logit(self) -> float:
        """The logit."""


class Splits(Protocol):
    """The logits of `m` output positions that are split."""

    @property
    def positions(self) -> list[int]:
        """Output positions."""

    @property
    def targets(self) -> Int[Tensor, " m"]:
        """Token ids whose logits are split."""

    @property
    def versus(self) -> int | None:
        """Token id whose logit is subtracted everywhere."""

    @property
    def logits(self) -> Float[Tensor, " m"]:
        """The logits."""

    @property
    def softcap(self) -> float:
        """Soft cap of the head's logits, which is not applied; 0 for none."""


def placed(positions: Sequence[int], targets: Int[Tensor, " m"]) -> dict[str, Tensor]:
    """Return the part of what is saved that says which logits are split."""
    return {"positions": torch.tensor(positions), "targets": targets}


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
    return {"output": split.position, **names, "logit": split.logit}


def logit_columns(words: Words, shares: "Splits", rows: Sequence[int]) -> dict[str, Sequence[Any]]:
    """Return the columns that name the logits of rows."""
    return {
        "output": [shares.positions[m] for m in rows],
        **words.column("target", shares.targets[rows].tolist()),
        "logit": shares.logits[rows].tolist(),
    }


def largest(table: Table, count: int) -> Table:
    """Return a table of shares with the `count` largest parts of each logit, and their rest as one row, `others`.

    The offset keeps its own row, so that the rows still add up to the logit.
    """
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
        others = {name: group[0][name] for name in ("output", "target id", "target", "logit") if name in group[0]}
        others |= {"part": "others"} | {name: sum(row[name] for row in parts[count:]) for name in values}
        offset = [row for row in group if row["part"] == "offset"]
        kept += [*parts[:count], dict.fromkeys(table.columns) | others, *offset]
    return replace(table, columns={name: [row[name] for row in kept] for name in table.columns})


def entry_of(shares: "Splits", by: str, row: int, words: Words) -> dict[str, Any]:
    """Return the data of the logit at an output position, however it is split."""
    return {
        "by": by,
        **words.here(shares.positions[row]),
        "target": words.token(shares.targets[row]),
        "versus": None if shares.versus is None else words.token(shares.versus),
        "logit": float(shares.logits[row]),
        "softcap": shares.softcap or None,
    }


def split_name(words: Words, target: int | None, versus: int | None) -> str:
    """Return the name of the split quantity: the logit of one target, or of each output's own."""
    logit = "the logit" if target is None else f"the logit of {words.name(target)}"
    return logit if versus is None else f"{logit} minus that of {words.name(versus)}"
