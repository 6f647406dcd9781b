"""The coherence of a decoded vector's top tokens, with a chance baseline from shuffled vectors.

Any direction has top tokens, and eight tokens out of many thousands can always be read as a story. So the tokens of a
vector get a score that no reader gives, and so do those of vectors that mean nothing: the same vectors with their
components shuffled, which keeps the sizes of the components and destroys their meaning.

The score is the mean cosine between the input embeddings of a vector's top tokens, over all pairs: tokens about one
thing have similar embeddings, and those of a random direction only what all embeddings have in common.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ggjac.decode import Ranked, nearest, top_logits
from ggjac.jacobian import DetachedJacobian, Progress
from ggjac.results import NO_WORDS, Result, Table, Words
from ggjac.sizes import SHUFFLES
from ggjac.weights import Weight

Decode = Callable[[Tensor, int], Ranked]

# Vectors scored at a time: the embeddings of the tokens of all vectors could outweigh a streamed model.
AT_ONCE = 16


@dataclass(frozen=True)
class Coherence(Result):
    """Coherence of decoded vectors, and of shuffled ones.

    Attributes:
        scores: `[k]`, float64: mean cosine between the embeddings of each vector's top tokens, from -1 to 1.
        shuffled: `[s]`, float64: the same for shuffled vectors, which stand for chance.
    """

    scores: Float[Tensor, " k"]
    shuffled: Float[Tensor, " s"]

    @property
    def mean(self) -> float:
        """Mean score of shuffled vectors."""
        return float(self.shuffled.mean())

    @property
    def sd(self) -> float:
        """Standard deviation of the scores of shuffled vectors."""
        return float(self.shuffled.std())

    @property
    def above(self) -> Float[Tensor, " k"]:
        """Each score's distance above that mean, in standard deviations."""
        return (self.scores - self.mean) / self.sd

    @property
    def chance(self) -> Float[Tensor, " k"]:
        """The share of shuffled vectors that reach each score, counting one more."""
        reached = (self.shuffled >= self.scores[:, None]).sum(1)
        return (1 + reached).double() / (1 + len(self.shuffled))

    def data(self, words: Words = NO_WORDS) -> dict[str, Any]:
        """Return the scores with those of shuffled vectors."""
        return {
            "scores": self.scores.tolist(),
            "above": self.above.tolist(),
            "chance": self.chance.tolist(),
            "shuffled": {"mean": self.mean, "sd": self.sd, "count": len(self.shuffled)},
        }

    def _table(self, words: Words) -> Table:
        columns = {"score": self.scores.tolist(), "above": self.above.tolist(), "chance": self.chance.tolist()}
        note = f"{len(self.shuffled)} shuffled vectors score {self.mean:.3f} ± {self.sd:.3f}"
        return Table("Coherence of decoded vectors", columns, (note,))


@dataclass(frozen=True)
class Readability(Result):
    """Coherence of both ends of singular triplets: left vectors by the head, right vectors by the embeddings."""

    left: Coherence
    right: Coherence

    def data(self, words: Words = NO_WORDS) -> dict[str, Any]:
        """Return both sides."""
        return {"left": self.left.data(), "right": self.right.data()}

    def _table(self, words: Words) -> Table:
        left, right = (side._table(words) for side in (self.left, self.right))
        columns = {f"left {name}": values for name, values in left.columns.items()}
        columns |= {f"right {name}": values for name, values in right.columns.items()}
        return Table(left.title, columns, (f"left: {left.notes[0]}", f"right: {right.notes[0]}"))


def readability(
    jacobian: DetachedJacobian,
    left: Float[Tensor, "k d"],
    right: Float[Tensor, "k d"],
    *,
    top: int = 8,
    shuffles: int = SHUFFLES,
    seed: int = 0,
    progress: Progress | None = None,
) -> Readability:
    """Score the decoded tokens of left and right singular vectors, and of vectors with shuffled components.

    Args:
        jacobian: of the prompt; its head and embeddings decode.
        left: vectors of the output, decoded by the LM head.
        right: vectors of an input embedding, decoded to the nearest embeddings; of a joint map those at the position
            with most of their weight (`Spectrum.heaviest`).
        top: tokens of each vector; at least 2 are scored, and no more than there are.
        shuffles: vectors of each baseline.
        seed: of the shuffles.
        progress: called as `progress("side", done, 2)`.

    Raises:
        ValueError: fewer than two shuffled vectors: their spread would be unknown.
    """
    head, embedding = jacobian.network.head, jacobian.network.embedding
    top = max(2, min(top, embedding.shape[0]))
    report = progress or (lambda *_: None)

    def promoted(V: Tensor, count: int) -> Ranked:
        return top_logits(head.matrix, V, count)

    def neighbours(V: Tensor, count: int) -> Ranked:
        return nearest(embedding, V, count)

    first = coherence(left.to(embedding.dtype), promoted, embedding, top=top, shuffles=shuffles, seed=seed)
    report("side", 1, 2)
    second = coherence(right.to(embedding.dtype), neighbours, embedding, top=top, shuffles=shuffles, seed=seed)
    report("side", 2, 2)
    return Readability(first, second)


def coherence(
    vectors: Float[Tensor, "k d"],
    decode: Decode,
    embedding: Weight,
    *,
    top: int = 8,
    shuffles: int = SHUFFLES,
    seed: int = 0,
) -> Coherence:
    """Score the `top` tokens of each vector, and those of `shuffles` vectors with shuffled components.

    Args:
        vectors: left or right singular vectors, or any.
        decode: turns vectors and a count into tokens: `top_logits` of the head, or `nearest` of the embeddings.
        embedding: `[v, d]`, whose rows are compared; for either side the input embeddings.
        top: tokens of each vector, at least 2.
        shuffles: vectors of the baseline; the given ones are shuffled in turn. `decode` sees all at once.
        seed: of the shuffles.

    Raises:
        ValueError: fewer than two tokens or shuffled vectors: nothing to compare.
    """
    if top < 2 or shuffles < 2:
        raise ValueError(f"top={top}, shuffles={shuffles}: coherence takes two tokens, its spread two shuffled vectors")
    generator = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.randperm(vectors.shape[1], generator=generator) for _ in range(shuffles)])
    rows = vectors[torch.arange(shuffles) % len(vectors)].gather(1, order.to(vectors.device))
    ids = decode(torch.cat([vectors, rows]), top).ids
    scores = mean_cosine(ids, embedding)
    return Coherence(scores[: len(vectors)], scores[len(vectors) :])


def mean_cosine(ids: Int[Tensor, "k top"], embedding: Weight) -> Float[Tensor, " k"]:
    """Return the mean cosine between the embeddings of all pairs of each row's tokens; a zero embedding counts as 0."""
    return torch.cat([_mean_cosine(part, embedding) for part in ids.cpu().split(AT_ONCE)])


def _mean_cosine(ids: Int[Tensor, "k top"], embedding: Weight) -> Float[Tensor, " k"]:
    distinct, which = ids.unique(return_inverse=True)
    rows = embedding.take(distinct.tolist()).cpu().double()
    rows = torch.nn.functional.normalize(rows, dim=1)[which]
    top = ids.shape[1]
    # Of the sum of unit vectors: the squared length counts every pair twice, and each vector with itself.
    return (rows.sum(1).square().sum(1) - rows.square().sum((1, 2))) / (top * (top - 1))
