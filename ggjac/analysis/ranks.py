"""The stable rank of each token's own map, and its distribution over many prompts (Golden, arXiv 2505.24293, figure 3).

`y = Σ_i J_i x_i + offset`: the number of directions of its embedding that the network uses at position `i`.
"""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ggjac import display
from ggjac.frobenius import StableRank, exact_stable_rank, squared_norm, stable_ranks
from ggjac.jacobian import DetachedJacobian
from ggjac.results import NO_WORDS, Bars, Plotted, Points, Prompt, Table, Words
from ggjac.sizes import EXACT_ROWS, PROBES
from ggjac.svd import SVD, Method, roughly_first, svd_together
from ggjac.ways import Task


@dataclass(frozen=True)
class TokenRanks(Plotted):
    """Stable ranks at one prompt.

    Attributes:
        joint: of the joint `[d, n d]` map.
        tokens: of each position's `J_i`, up to the Jacobian's own position; later maps are zero.
        residual: the worst of the leading triplets' residuals, as in `ggjac.svd.SVD`.
        sweeps: passes over the weights that these took.
        stopped_by: what ended the slowest of them.
        method, rough_sweeps: as in `ggjac.svd.SVD`.
    """

    joint: StableRank
    tokens: list[StableRank]
    residual: float
    sweeps: int
    stopped_by: str
    method: Method = "sweeps"
    rough_sweeps: int = 0

    def _table(self, words: Words) -> Table:
        columns = {name: [getattr(rank, name) for rank in self.tokens] for name in StableRank.__annotations__}
        note = f"joint map: {self.joint.value:.4g}"
        return Table("Stable rank of each position's map", words.at(range(len(self.tokens))) | columns, (note,))

    def _plot(self, words: Words) -> Bars:
        values = [rank.value for rank in self.tokens]
        return Bars("Stable rank of each position's map", "stable rank", words.labels(range(len(values))), values)


def token_ranks(
    jacobian: DetachedJacobian,
    *,
    at_once: int | None = None,
    tol: float = 1e-3,
    seed: int = 0,
    max_sweeps: int = 40,
    search_dtype: torch.dtype | None = None,
    probes: int = PROBES,
) -> TokenRanks:
    """Compute the stable rank of the joint map and of every position's own, all in shared sweeps or from all rows.

    `ggjac.ways` decides by sizes; from all rows, they are exact.

    Args:
        jacobian: from the embeddings.
        at_once: stacked vectors in one sweep, at most; beyond, it is repeated. Never more than dense rows would be.
        tol, seed, max_sweeps: of the iterations for the largest singular values, as `ggjac.svd.svd` takes them.
        search_dtype: of these, as `DetachedJacobian.svd` takes it.
        probes: of the estimated norms, where there are more than `EXACT_ROWS` outputs.

    Raises:
        ValueError: `tol` or `max_sweeps` is out of range.
    """
    n, d = jacobian.in_shape
    matrix = jacobian.matrix(Task(1, tokens=jacobian.position + 1))  # if that is the cheaper way
    if matrix is not None:
        maps = [matrix.flatten(1), *matrix.unbind(1)[: jacobian.position + 1]]
        found = [jacobian.svd_of(part, 1, tol=tol) for part in maps]
        norms = map(squared_norm, maps)
        return _token_ranks(found, [exact_stable_rank(*pair) for pair in zip(found, norms, strict=True)])
    places = [None, *range(jacobian.position + 1)]
    operators = [jacobian if i is None else jacobian.at_position(i) for i in places]
    limit = min(at_once or jacobian.rows_at_once(), jacobian.rows_at_once())

    # Vectors get all positions, and lose those that are not their map's, as late and as soon as can be.
    def up(stacks: list[Tensor]) -> list[Tensor]:
        parts = [jacobian.x.new_zeros(0, d)]
        for some in _portions(places, stacks, limit):
            X = jacobian.x.new_zeros(len(some), n, d)
            for row, (at, vector) in zip(X, some, strict=True):
                row[at] = vector
            parts.append(jacobian.matmat(X))
        return list(torch.cat(parts).split([len(stack) for stack in stacks]))

    def down(stacks: list[Tensor]) -> list[Tensor]:
        if all(stack is stacks[0] for stack in stacks):  # dense rows: one product has them all
            pulled = jacobian.rmatmat(stacks[0])
            return [pulled[:, _own(i)] for i in places]
        rows: list[Tensor] = []
        for some in _portions(places, stacks, limit):
            product = jacobian.rmatmat(torch.stack([vector for _, vector in some]))
            rows += [row[at].clone() for row, (at, _) in zip(product, some, strict=True)]
            del product
        found = iter(rows)
        empty = [jacobian.x.new_zeros(0, n if i is None else 1, d) for i in places]
        return [
            torch.stack([next(found) for _ in stack]) if len(stack) else none
            for stack, none in zip(stacks, empty, strict=True)
        ]

    solve = partial(svd_together, operators, 1, up=up, down=down, seed=seed)
    found = roughly_first(solve, jacobian.sweep.rounded, search_dtype, tol=tol, max_sweeps=max_sweeps)
    chunk = limit if d <= EXACT_ROWS else None
    return _token_ranks(found, stable_ranks(operators, found, down=down, chunk=chunk, probes=probes, seed=seed))


def _token_ranks(found: list[SVD], ranks: list[StableRank]) -> TokenRanks:
    """Return the stable ranks of the joint map and of the others, with how their triplets were found."""
    joint, *tokens = ranks
    slowest = max(found, key=lambda triplet: (triplet.reason == "sweeps", triplet.sweeps))
    residual = max(float(triplet.residual.max()) for triplet in found)
    sweeps, rough = max(one.sweeps for one in found), slowest.rough_sweeps
    return TokenRanks(joint, tokens, residual, sweeps, slowest.reason, slowest.method, rough)


def _own(position: int | None) -> slice:
    """Return the positions that a map reads: all, or its own."""
    return slice(None) if position is None else slice(position, position + 1)


def _portions(places: list[int | None], stacks: list[Tensor], limit: int) -> Iterator[list[tuple[slice, Tensor]]]:
    """Yield the vectors of all stacks with the positions of their maps, at most `limit` at a time."""
    every = [(_own(i), vector) for i, stack in zip(places, stacks, strict=True) for vector in stack]
    for start in range(0, len(every), limit):
        yield every[start : start + limit]


@dataclass(frozen=True)
class Ranks(Plotted):
    """Stable ranks over many prompts.

    Attributes:
        records: one for each prompt, in the order given: plain data, as the lines of the file are.
        ready: how many of them were in the file already.
        envelope: of the session of the last prompt: where the results came from and how all were computed.
    """

    records: list[dict[str, Any]]
    ready: int
    envelope: dict[str, Any]

    def data(self, words: Words = NO_WORDS) -> dict[str, Any]:
        """Return all records, and the distribution of stable ranks at each token index."""
        return {"prompts": self.records, "by_position": list(by_position(self.records))}

    def _table(self, words: Words) -> Table:
        rows = list(by_position(self.records))
        return Table("Stable rank by token index", {name: [row[name] for row in rows] for name in rows[0]})

    def _sheet(self, words: Words) -> Table:
        """Return a row for each token of each prompt."""
        rows = [(i, record, token) for i, record in enumerate(self.records) for token in record["tokens"]]
        columns: dict[str, list[Any]] = {
            "prompt": [i for i, *_ in rows],
            "text": [_shown(record) for _, record, _ in rows],
            "next id": [record["next"]["id"] for _, record, _ in rows],
            "next": [display.token(record["next"]) for _, record, _ in rows],
            "joint": [record["joint"]["value"] for _, record, _ in rows],
            "position": [token["position"] for *_, token in rows],
            "token id": [token["id"] for *_, token in rows],
            "token": [display.token(token) for *_, token in rows],
        }
        ranks = [token["stable_rank"] for *_, token in rows]
        columns |= {name: [rank[key] for rank in ranks] for name, key in (("stable rank", "value"), ("error", "error"))}
        return Table("Stable rank of each token's map", columns)

    def exhibits(self, trace: Prompt | None = None) -> list[Table]:
        """Return two tables for print: by prompt and by token index."""
        columns = {
            "prompt": [_shown(record) for record in self.records],
            "next": [display.token(record["next"]) for record in self.records],
            "joint": [record["joint"]["value"] for record in self.records],
            "each token": [[f"{value:.3g}" for value in token_values(record)] for record in self.records],
        }
        notes = ("joint: of the joint map; each token: of each token's own map",)
        return [Table("Stable rank of each prompt", columns, notes), self.table(trace)]

    def _plot(self, words: Words) -> Points:
        rows = list(by_position(self.records))
        means = [row["mean"] for row in rows], [row["error"] or 0.0 for row in rows]
        return Points(
            "Stable rank by token index", "token index", "mean stable rank", {"mean": (range(len(rows)), *means)}
        )


def by_position(records: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the distribution of stable ranks at each token index: count, mean, its standard error, extremes."""
    for i in range(max(len(record["tokens"]) for record in records)):
        values = [token_values(record)[i] for record in records if i < len(record["tokens"])]
        yield {"position": i} | distribution(values)


def distribution(values: Sequence[float]) -> dict[str, Any]:
    """Return how a number is distributed over prompts; sums are exact, so that their order leaves no trace."""
    return {
        "prompts": len(values),
        "mean": statistics.fmean(values),
        "error": statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None,
        "median": statistics.median(values),
        "least": min(values),
        "most": max(values),
    }


def _shown(record: dict[str, Any]) -> str:
    """Return a prompt on one line."""
    text = display.joined(record["tokens"]) if record["prompt"] is None else record["prompt"]
    return display.visible(text)


def token_values(record: dict[str, Any]) -> list[float]:
    """Return the stable rank of each token of a prompt."""
    return [token["stable_rank"]["value"] for token in record["tokens"]]
