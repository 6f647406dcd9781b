"""What the leading singular vectors of a detached Jacobian say, in tokens (Golden, arXiv 2505.24293, section 3.2).

Left vectors live where the LM head reads, and decode to the tokens they promote. Right vectors live in the input
embeddings, one slice per position, and decode to the nearest tokens there.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from ggjac.decode import Head, Ranked, nearest, top_logits
from ggjac.frobenius import StableRank, stable_ranks
from ggjac.jacobian import DetachedJacobian
from ggjac.results import Plotted, Points, Table, Words
from ggjac.sizes import EXACT_ROWS, PROBES
from ggjac.svd import SVD
from ggjac.weights import Weight


@dataclass(frozen=True)
class Spectrum(Plotted):
    """Singular triplets with their tokens.

    Attributes:
        svd: the triplets, signed so that each left vector points along the output: `⟨J x, u⟩ >= 0`.
        left: tokens of highest logit for each left vector, `[k, top]`.
        right: tokens of nearest embedding (cosine) for each right vector at each position, `[k * n, top]`.
        weight: `[k, n]`, the share of each right vector's squared norm at each position; rows sum to 1.
    """

    svd: SVD
    left: Ranked
    right: Ranked
    weight: torch.Tensor

    def _table(self, words: Words) -> Table:
        found = self.svd._table(words)
        k, n = self.weight.shape
        positions = self.weight.argmax(1).tolist()
        left, right = self.left.ids.tolist(), self.right.ids.tolist()
        columns = {
            "left": [words.each(ids) for ids in left],
            **words.at(positions),
            "weight": self.weight.amax(1).tolist(),
            "right": [words.each(right[i * n + positions[i]]) for i in range(k)],
        }
        note = "left: tokens the vector promotes; right: nearest tokens at the position with most of its weight"
        return Table(found.title, {**found.columns, **columns}, (*found.notes, note))

    def _plot(self, words: Words) -> Points:
        return self.svd._plot(words)


def spectrum(
    jacobian: DetachedJacobian,
    head: Head,
    embedding: Weight,
    rank: int = 8,
    *,
    top: int = 8,
    tol: float = 1e-3,
    seed: int = 0,
    max_sweeps: int = 40,
    progress: Callable[[int, float], None] | None = None,
) -> Spectrum:
    """Compute `rank` singular triplets of the joint `[d, n d]` map and decode both ends to `top` tokens each.

    Tokens of right vectors at positions after the Jacobian's own are meaningless, since the map is zero there; their
    `weight` is 0.
    """
    triplets = signed(jacobian, jacobian.svd(rank, tol=tol, seed=seed, max_sweeps=max_sweeps, progress=progress))
    U, Vh = triplets.U.to(head.matrix.dtype), triplets.Vh.to(embedding.dtype)
    return Spectrum(
        svd=triplets,
        left=top_logits(head.matrix, U, top),
        right=nearest(embedding, Vh.flatten(0, 1), top),
        weight=triplets.Vh.square().sum(2),
    )


def signed(jacobian: DetachedJacobian, triplets: SVD) -> SVD:
    """Flip each pair of vectors so that the left one points along `J x`; a singular vector's own sign is arbitrary."""
    along = triplets.U @ jacobian.linear_output.to(triplets.U.dtype)
    sign = torch.where(along < 0, -1.0, 1.0).to(triplets.U)
    return replace(triplets, U=triplets.U * sign[:, None], Vh=triplets.Vh * sign[:, None, None])


def stable_rank(jacobian: DetachedJacobian, triplets: SVD, *, probes: int = PROBES, seed: int = 0) -> StableRank:
    """Compute the stable rank of the joint `[d, n d]` map from its leading `triplets` and the rest of `‖J‖_F`.

    The known triplets count exactly. The rest is averaged over seeded Gaussian probes in one downward sweep, or summed
    over all rows where there are at most `EXACT_ROWS`, as many at a time as fit into the Jacobian's `chunk_bytes`.
    """
    chunk = jacobian.rows_at_once() if jacobian.out_shape[0] <= EXACT_ROWS else None
    (found,) = stable_ranks(
        [jacobian], [triplets], down=lambda Y: [jacobian.rmatmat(Y[0])], chunk=chunk, probes=probes, seed=seed
    )
    return found
