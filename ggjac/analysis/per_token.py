"""The singular vectors of each position's own map `J_i`, `[d, d]`; those of the joint map `[d, n d]` mix positions.

`y = Σ_i J_i x_i + offset` (Golden, arXiv 2505.24293, eq. 15): `J_i` maps the embedding at one position to
the output.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ggjac import units
from ggjac.checks import input_positions, whole
from ggjac.decode import Ranked, nearest, top_logits
from ggjac.jacobian import DetachedJacobian, Progress
from ggjac.results import NO_WORDS, Plotted, Points, Result, Table, Words
from ggjac.svd import SVD, check_options, roughly_first, svd_together
from ggjac.ways import Task


@dataclass(frozen=True)
class TokenSpectrum(Plotted):
    """Singular triplets of one position's map, with their tokens.

    Attributes:
        position: of the input.
        svd: the triplets, `U` `[k, d]` and `Vh` `[k, d]`, signed so that each left vector points along what the
            position contributes: `⟨J_i x_i, u⟩ >= 0`.
        left: tokens of highest logit for each left vector, `[k, top]`.
        right: tokens of nearest embedding (cosine) for each right vector, `[k, top]`.
    """

    position: int
    svd: SVD
    left: Ranked
    right: Ranked

    def data(self, words: Words = NO_WORDS) -> dict[str, Any]:
        """Return the position and its triplets, the largest first, with the tokens of both ends."""
        found = self.svd.data()
        found["triplets"] = [
            triplet | {side: words.ranked(*getattr(self, side).part(j)) for side in ("left", "right")}
            for j, triplet in enumerate(found["triplets"])
        ]
        return words.here(self.position) | found

    def _table(self, words: Words) -> Table:
        found = self.svd._table(words)
        left, right = (words.column(side, getattr(self, side).ids.tolist()) for side in ("left", "right"))
        (name,) = words.labels([self.position])
        return Table(f"{found.title} of position {name}", {**found.columns, **left, **right}, found.notes, found.common)

    def _plot(self, words: Words) -> Points:
        return self.svd._plot(words)


class TokenSpectra(list[TokenSpectrum], Result):
    """The maps of positions, in order."""

    def data(self, words: Words = NO_WORDS) -> list[dict[str, Any]]:
        """Return a record for each position."""
        return [each.data(words) for each in self]

    def _table(self, words: Words) -> Table:
        rows = [(each.position, each._table(words).columns, j) for each in self for j in range(len(each.svd.S))]
        names = list(rows[0][1]) if rows else []
        columns = {name: [columns[name][j] for _, columns, j in rows] for name in names}
        return Table("Singular vectors of each position's own map", words.at([i for i, *_ in rows]) | columns)


def per_token(
    jacobian: DetachedJacobian,
    rank: int = 8,
    *,
    positions: str | Sequence[int] | None = None,
    top: int = 8,
    hide_special: bool = False,
    tol: float = 1e-3,
    seed: int = 0,
    max_sweeps: int = 40,
    search_dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> TokenSpectra:
    """Compute `rank` singular triplets of every `J_i` and decode both ends to `top` tokens each.

    All positions advance in the same sweeps over the weights, in chunks of `rows_at_once` vectors, or all rows are
    computed once where that costs less (`ggjac.ways`); options as of `ggjac.svd.svd`, and `search_dtype` as of
    `DetachedJacobian.svd`. `hide_special` leaves control, unused and byte tokens out of the decoding.

    `positions` are input positions, or such a text as `"0,10-20,-1"`; negative ones count from the Jacobian's own, up
    to which the default takes all that the map reads. Later ones have a map of zero. Fewer positions take fewer
    vectors.

    Raises:
        ValueError: a position, `top`, rank, `tol`, `max_sweeps` or `seed` is out of range.
    """
    top, n = whole("top", top), jacobian.position + 1
    places = input_positions(positions, n, jacobian.exclude)
    settings: dict[str, Any] = {"tol": tol, "max_sweeps": max_sweeps, "seed": seed}
    check_options(jacobian.at_position(places[0]), rank, **settings)

    def report(what: str, done: int, total: int, rounds: int = 0) -> None:
        if progress:
            progress(f"all rows, {what}", done, total)

    with jacobian.reporting(report):
        matrix = jacobian.whole.matrix(Task(rank, joint=0, tokens=len(places)))  # if that is the cheaper way
    if matrix is None:
        found, contributed = _by_sweeps(jacobian, places, rank, search_dtype, progress, **settings)
    else:
        maps = [matrix[:, i] for i in places]  # [d, d] each
        found = [jacobian.svd_of(part, rank, tol=tol) for part in maps]
        contributed = torch.stack([part @ jacobian.x[i] for i, part in zip(places, maps, strict=True)])
    found = [svd.pointing_along(output) for svd, output in zip(found, contributed, strict=True)]
    head, embedding = jacobian.network.head, jacobian.network.embedding
    U, V = (torch.cat([getattr(svd, side) for svd in found]) for side in ("U", "Vh"))
    hidden = jacobian.hidden_ids(hide_special)
    left = top_logits(head.matrix, U.to(head.matrix.dtype), top, hidden=hidden)
    right = nearest(embedding, V.to(embedding.dtype), top, hidden=hidden)
    rows = [slice(i * rank, (i + 1) * rank) for i in range(len(found))]
    return TokenSpectra(
        TokenSpectrum(i, svd, left.part(part), right.part(part))
        for i, svd, part in zip(places, found, rows, strict=True)
    )


def _by_sweeps(
    jacobian: DetachedJacobian,
    positions: Sequence[int],
    rank: int,
    search_dtype: torch.dtype | None,
    progress: Progress | None,
    *,
    seed: int,
    **settings: Any,
) -> tuple[list[SVD], Float[Tensor, "m d"]]:
    """Return the triplets of some `J_i`, all advanced in the same sweeps, and what each position contributes."""
    operators = [jacobian.at_position(i) for i in positions]
    n, d = jacobian.in_shape

    sweep, worst, ended = 0, "", False

    def together(side: Callable[[Tensor], Tensor], stack: Tensor) -> Tensor:
        nonlocal sweep
        sweep += 1
        return torch.cat([side(part) for part in stack.split(jacobian.rows_at_once())])

    def up(stacks: list[Tensor]) -> list[Tensor]:
        """Put each stack at its own position and push all of them: `[k, 1, d]` to `[k, d]`."""
        sizes = [len(part) for part in stacks]
        places = torch.tensor(positions).repeat_interleave(torch.tensor(sizes))
        vectors = torch.cat(stacks)[:, 0]

        def pushed(rows: Tensor) -> Tensor:
            X = vectors.new_zeros(len(rows), n, d)
            X[torch.arange(len(rows)), places[rows]] = vectors[rows]
            return jacobian.matmat(X)

        return list(together(pushed, torch.arange(len(vectors))).split(sizes))

    def down(stacks: list[Tensor]) -> list[Tensor]:
        """Pull all of them, and take each stack's own position: `[k, d]` to `[k, 1, d]`."""
        sizes = [len(part) for part in stacks]
        places = torch.tensor(positions).repeat_interleave(torch.tensor(sizes))
        vectors = torch.cat(stacks)

        def pulled(rows: Tensor) -> Tensor:
            return jacobian.rmatmat(vectors[rows])[torch.arange(len(rows)), places[rows]][:, None]

        return list(together(pulled, torch.arange(len(vectors))).split(sizes))

    def swept(sweeps: int, residual: float) -> None:
        nonlocal worst
        worst = units.worst(residual)

    def report(what: str, done: int, total: int, rounds: int = 0) -> None:
        if progress:
            progress(f"signs, {what}" if ended else f"sweep {sweep}{worst}, {what}", done, total)

    solve = partial(svd_together, operators, rank, up=up, down=down, block=jacobian.block(rank, d), seed=seed)
    with jacobian.reporting(report):
        found = roughly_first(solve, jacobian.sweep.rounded, search_dtype, progress=swept, **settings)
        ended = True
        contributed = torch.cat(up([jacobian.x[i].reshape(1, 1, d) for i in positions]))
    return [replace(svd, Vh=svd.Vh[:, 0]) for svd in found], contributed  # [k, 1, d] -> [k, d]


def tensors(found: Sequence[TokenSpectrum]) -> dict[str, Tensor]:
    """Return what is saved: token_position `[m]`, token_U `[m, k, d]`, token_S `[m, k]`, token_Vh, token_residual."""
    return {"token_position": torch.tensor([each.position for each in found])} | {
        f"token_{name}": torch.stack([getattr(each.svd, name) for each in found])
        for name in ("U", "S", "Vh", "residual")
    }
