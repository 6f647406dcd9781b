"""Vectors to tokens: the LM head for output vectors, the nearest input embeddings for input vectors.

Both stream the vocabulary matrix tile by tile and keep only the best candidates: the matrix is never dense.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ggjac.linop import TiledMatrix
from ggjac.weights import Weight

# Rows of the vocabulary that are multiplied at a time: they stay in the cache, so that it takes a seventh of the time.
ROWS = 1024


class Ranked(NamedTuple):
    """The best tokens for each of `k` vectors, in descending order of score.

    Attributes:
        ids: of the tokens.
        scores: their scores.
        z: of logits of directions, the scores in standard deviations of a random direction's (see
            `ggjac.calibration`): `√d cos(w, y)`, at most `√d`. None of other scores.
    """

    ids: Int[Tensor, "k top"]
    scores: Float[Tensor, "k top"]
    z: Float[Tensor, "k top"] | None = None

    def part(self, rows: slice | int) -> "Ranked":
        """Return the tokens of some vectors, or of one."""
        return Ranked(self.ids[rows], self.scores[rows], None if self.z is None else self.z[rows])


class Head(NamedTuple):
    """The LM head: `logits = softcap(scale (y Wᵀ) + bias)`.

    Attributes:
        matrix: `[v, d]`, W.
        bias: `[v]`, or None.
        scale: factor of all logits (Granite, Command R), and of the matrix where it has one.
        softcap: `c` in `c tanh(z / c)`, applied last (Gemma); 0 for none.
    """

    matrix: Weight
    bias: Float[Tensor, " v"] | None = None
    scale: float = 1.0
    softcap: float = 0.0

    def logits(self, Y: Float[Tensor, "k d"]) -> Float[Tensor, "k v"]:
        """Return the logits of `k` outputs of the final norm; tokens without a valid row are the least likely."""
        z = self.scale * torch.cat([Y @ tile.T for *_, tile in self.matrix.tiles()], 1)
        if self.bias is not None:
            z = z + self.bias
        if invalid := self.matrix.invalid:
            z[:, invalid] = z.amin(1, keepdim=True)
        return self.softcap * torch.tanh(z / self.softcap) if self.softcap else z


@dataclass(frozen=True)
class Embeddings:
    """The embeddings of all tokens as block 0 gets them, up to a common factor and positions: a `TiledMatrix`.

    Attributes:
        matrix: `[v, d]`, as stored.
        norm: of rows, or None.
    """

    matrix: Weight
    norm: Callable[[Tensor], Tensor] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Tokens and elements, `(v, d)`."""
        return self.matrix.shape

    @property
    def dtype(self) -> torch.dtype:
        """Element type of the rows."""
        return self.matrix.dtype

    @property
    def device(self) -> torch.device:
        """Where the rows are produced."""
        return self.matrix.device

    def take(self, ids: Sequence[int]) -> Float[Tensor, "n d"]:
        """Return the embeddings of tokens."""
        rows = self.matrix.take(ids)
        return rows if self.norm is None else self.norm(rows)

    def tiles(self) -> Iterator[tuple[int, int, Tensor]]:
        """Yield `(start, stop, rows start:stop)` in order; rows of zeros, which belong to no token, stay zeros."""
        for start, stop, tile in self.matrix.tiles():
            if self.norm is not None:
                tile = tile.clone()  # the norm reads its weights into the same scratch memory
                tile = self.norm(tile) * tile.any(1, keepdim=True)
            yield start, stop, tile

    def read_ahead(self) -> None:
        """Prefetch the tiles."""
        self.matrix.read_ahead()


def top_logits(matrix: TiledMatrix, Y: Float[Tensor, "k d"], count: int, *, hidden: Sequence[int] = ()) -> Ranked:
    """Return the `count` tokens of highest `y Wᵀ` for each direction: the paper's decoding of left singular vectors.

    Bias, scale and cap do not apply to a direction: only the head's matrix is used. Tokens `hidden` are left out.
    """
    found, lengths = _best(matrix, Y, count, hidden, unit_rows=False)
    size = lengths * Y.float().norm(dim=1)[:, None] / Y.shape[1] ** 0.5
    return found._replace(z=found.scores.float() / torch.where(size > 0, size, torch.inf))


def nearest(embedding: TiledMatrix, V: Float[Tensor, "k d"], count: int, *, hidden: Sequence[int] = ()) -> Ranked:
    """Return the `count` tokens whose embeddings have the highest cosine with each vector.

    The paper's decoding of right singular vectors. Scores are cosines. A row of zeros, as some padding tokens have,
    never ranks first (score -inf). Tokens `hidden` are left out.
    """
    lengths = V.norm(dim=1, keepdim=True)
    return _best(embedding, V / torch.where(lengths > 0, lengths, 1), count, hidden, unit_rows=True)[0]


def _best(
    matrix: TiledMatrix, vectors: Float[Tensor, "k d"], count: int, hidden: Sequence[int], *, unit_rows: bool
) -> tuple[Ranked, Float[Tensor, "k count"]]:
    """Keep the best `count` rows that are not hidden while streaming the matrix; ties go to the smaller id.

    Also return the lengths of these rows.
    """
    shown = torch.ones(matrix.shape[0], dtype=torch.bool)
    shown[list(hidden)] = False
    count = min(count, matrix.shape[0] - len(hidden))
    ids = torch.empty(len(vectors), 0, dtype=torch.long, device=vectors.device)
    scores = vectors.new_empty(len(vectors), 0)
    sizes = vectors.new_empty(len(vectors), 0, dtype=torch.float32)
    for start, stop, tile in matrix.tiles():
        products = vectors.new_empty(len(vectors), stop - start)
        for some, part in zip(tile.split(ROWS), products.split(ROWS, 1), strict=True):
            part.addmm_(vectors, some.T, beta=0)
        lengths = tile.norm(dim=1)
        if unit_rows:
            # A row of zeros, or of numbers whose squares are, has no direction: NaN.
            products /= torch.where(lengths > 0, lengths, torch.nan)
        products.nan_to_num_(-torch.inf, torch.inf, -torch.inf)
        rows = shown[start:stop].nonzero()[:, 0]
        if len(rows) < stop - start:
            rows = rows.to(vectors.device)
            products = products[:, rows]
            new = _first_best(products, min(count, len(rows)))
            found = rows[new] + start
        else:
            new = _first_best(products, min(count, len(rows)))
            found = new + start
        # Every id here is larger than those kept so far, so that a stable sort leaves ties in order of id.
        scores, ids = torch.cat([scores, products.gather(1, new)], 1), torch.cat([ids, found], 1)
        sizes = torch.cat([sizes, lengths.float()[found - start]], 1)
        scores, by_score = scores.sort(dim=1, descending=True, stable=True)
        scores, ids = scores[:, :count], ids.gather(1, by_score)[:, :count]
        sizes = sizes.gather(1, by_score)[:, :count]
    return Ranked(ids, scores), sizes


def _first_best(scores: Float[Tensor, "k v"], count: int) -> Int[Tensor, "k count"]:
    """Return the indices of the `count` largest of each row, ascending; `topk` alone breaks ties arbitrarily.

    None of them may be NaN.
    """
    if count == 0:
        return scores.new_empty(len(scores), 0, dtype=torch.long)
    values, best = scores.topk(min(count + 1, scores.shape[1]), dim=1)
    found = best[:, :count].sort(dim=1).values
    least = values[:, count - 1, None]
    tied = (values[:, count:] == least).any(1)  # with a value that was left out: rare except in 16 bit
    scores, least = scores[tied], least[tied]
    above, equal = scores > least, scores == least
    taken = above | (equal & (equal.cumsum(1, dtype=torch.int32) <= count - above.sum(1, keepdim=True)))
    found[tied] = taken.nonzero()[:, 1].view(len(scores), count)
    return found


def divergence(logits: Float[Tensor, " v"], other: Float[Tensor, " v"]) -> float:
    """Return `KL(softmax(logits) ‖ softmax(other))` in nats, computed in float64 on the CPU."""
    logp, logq = (part.cpu().double().log_softmax(0) for part in (logits, other))
    return float((logp.exp() * (logp - logq)).sum().clamp_min(0))  # rounding can take 0 below 0
