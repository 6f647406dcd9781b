"""The singular vectors of each position's own map `J_i`, `[d, d]`, beside those of the joint one `[d, n d]`.

`y = Σ_i J_i x_i + offset` (Golden, arXiv 2505.24293, eq. 15): a `J_i` is what the network makes of the embedding at one
position. The joint map's vectors mix positions; these do not.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from ggjac.decode import Head, Ranked, nearest, top_logits
from ggjac.jacobian import DetachedJacobian
from ggjac.results import Plotted, Points, Table, Words
from ggjac.svd import SVD, svd_together
from ggjac.weights import Weight


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

    def _table(self, words: Words) -> Table:
        found = self.svd._table(words)
        sides = {side: getattr(self, side).ids.tolist() for side in ("left", "right")}
        columns = {side: [words.each(row) for row in rows] for side, rows in sides.items()}
        (name,) = words.labels([self.position])
        return Table(f"{found.title} of position {name}", {**found.columns, **columns}, found.notes)

    def _plot(self, words: Words) -> Points:
        return self.svd._plot(words)


def per_token(
    jacobian: DetachedJacobian,
    head: Head,
    embedding: Weight,
    rank: int = 4,
    *,
    top: int = 8,
    tol: float = 1e-3,
    seed: int = 0,
    max_sweeps: int = 40,
    progress: Callable[[int, float], None] | None = None,
) -> list[TokenSpectrum]:
    """Compute `rank` singular triplets of every `J_i` and decode both ends to `top` tokens each.

    Positions up to the Jacobian's own; later ones have a map of zero. All positions advance in the same sweeps over the
    weights, as long as their vectors are no more than dense rows that go together; options as of `ggjac.svd.svd`.
    """
    positions = range(jacobian.position + 1)
    operators = [jacobian.at_position(i) for i in positions]
    n, d = jacobian.in_shape

    def together(side: Callable[[Tensor], Tensor], stack: Tensor) -> Tensor:
        return torch.cat([side(part) for part in stack.split(jacobian.rows_at_once())])

    def up(stacks: list[Tensor]) -> list[Tensor]:
        """Put each stack at its own position and push all of them: `[k, 1, d]` to `[k, d]`."""
        sizes = [len(part) for part in stacks]
        places = torch.arange(len(stacks)).repeat_interleave(torch.tensor(sizes))
        vectors = torch.cat(stacks)[:, 0]

        def pushed(rows: Tensor) -> Tensor:
            X = vectors.new_zeros(len(rows), n, d)
            X[torch.arange(len(rows)), places[rows]] = vectors[rows]
            return jacobian.matmat(X)

        return list(together(pushed, torch.arange(len(vectors))).split(sizes))

    def down(stacks: list[Tensor]) -> list[Tensor]:
        """Pull all of them, and take each stack's own position: `[k, d]` to `[k, 1, d]`."""
        sizes = [len(part) for part in stacks]
        places = torch.arange(len(stacks)).repeat_interleave(torch.tensor(sizes))
        vectors = torch.cat(stacks)

        def pulled(rows: Tensor) -> Tensor:
            return jacobian.rmatmat(vectors[rows])[torch.arange(len(rows)), places[rows]][:, None]

        return list(together(pulled, torch.arange(len(vectors))).split(sizes))

    found = svd_together(
        operators, rank, up=up, down=down, tol=tol, seed=seed, max_sweeps=max_sweeps, progress=progress
    )
    contributed = torch.cat(up([jacobian.x[i].reshape(1, 1, d) for i in positions]))
    found = [_signed(svd, along) for svd, along in zip(found, contributed, strict=True)]
    U, V = (torch.cat([getattr(svd, side) for svd in found]) for side in ("U", "Vh"))
    left = top_logits(head.matrix, U.to(head.matrix.dtype), top)
    right = nearest(embedding, V.to(embedding.dtype), top)
    rows = [slice(i * rank, (i + 1) * rank) for i in range(len(found))]
    return [
        TokenSpectrum(i, svd, *(Ranked(side.ids[part], side.scores[part]) for side in (left, right)))
        for i, svd, part in zip(positions, found, rows, strict=True)
    ]


def _signed(svd: SVD, along: Float[Tensor, " d"]) -> SVD:
    """Flip each pair of vectors so that the left one points along a direction, and drop the axis of one position."""
    sign = torch.where(svd.U @ along.to(svd.U) < 0, -1.0, 1.0).to(svd.U)[:, None]
    return replace(svd, U=svd.U * sign, Vh=svd.Vh[:, 0] * sign)
