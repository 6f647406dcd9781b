"""How much a decoded token's score says: against random directions, and against vectors of unrelated prompts.

The score of token `v` for a unit vector `u` is `w_v · u`, with `w_v` the token's row of the head. Two questions:

    z            could it be any direction? Of a uniformly random unit vector of R^d (so of every basis vector of a
                 uniformly random subspace) the score has mean 0 and standard deviation ‖w_v‖ / √d: z = √d cos(w_v, u).
    z_prompts    does every prompt say it? The score minus the mean, over the standard deviation, of the same token's
                 scores for the leading left vectors of unrelated prompts.

The tokens of a vector are the best of the whole vocabulary, so that the largest of as many z of chance is what to
compare with: see `expected_maximum`, and the first tokens of random subspaces of equal rank and of the unrelated
vectors themselves. Each vector of such a subspace's basis is a random direction; but who looks for the best of `k`
vectors should compare it with the best of the `k` of a subspace.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ggjac.checks import compared
from ggjac.decode import Ranked, top_logits
from ggjac.jacobian import DetachedJacobian, Progress
from ggjac.results import NO_WORDS, Result, Table, Words
from ggjac.sizes import RANDOM_SUBSPACES
from ggjac.weights import Weight


def expected_maximum(count: int) -> float:
    """Return the expected largest of `count` independent standard normal numbers, by Blom's approximation.

    Scores of tokens are correlated, and their cosines bounded, so that the largest z of a random direction is less.
    """
    return NormalDist().inv_cdf((count - 0.375) / (count + 0.25)) if count > 1 else 0.0


@dataclass(frozen=True)
class Spread:
    """The z of first tokens that mean nothing in particular.

    Attributes:
        z: `[m, k]`, of the first token of each of `k` orthonormal vectors in `m` groups.
    """

    z: Float[Tensor, "m k"]

    def data(self) -> dict[str, Any]:
        """Return how many there are, their median, what 95 % are below, and the same of the `largest` of each group."""
        largest = {"of": self.z.shape[1], "groups": len(self.z)} | _middle(self.z.amax(1))
        return {"vectors": self.z.numel()} | _middle(self.z.flatten()) | {"largest": largest}


def _middle(z: Float[Tensor, " N"]) -> dict[str, float]:
    """Return the median, and what 95 % are below."""
    middle, high = z.double().quantile(torch.tensor([0.5, 0.95], dtype=torch.float64)).tolist()
    return {"median": middle, "p95": high}


@dataclass(frozen=True)
class Calibration(Result):
    """The leading left vectors of unrelated prompts, to which the scores of tokens are compared; from `calibrate`.

    Attributes:
        vectors: `[p, k, d]`, unit vectors of `p` prompts, signed to point along each prompt's output.
        own: z_prompts of the first token of each of these, against the vectors of the other prompts; `[p, k]`.
        random: z of the first token of each basis vector of `RANDOM_SUBSPACES` random subspaces of rank `k`.
    """

    vectors: Float[Tensor, "p k d"]
    own: Spread
    random: Spread

    def data(self, words: Words = NO_WORDS) -> dict[str, Any]:
        """Return the number of prompts and vectors, and the z of first tokens that mean nothing in particular."""
        prompts, rank, _ = self.vectors.shape
        return {"prompts": prompts, "rank": rank, "own": self.own.data(), "random": self.random.data()}

    def _table(self, words: Words) -> Table:
        rows = {"unrelated prompts": self.own.data(), "random subspaces": self.random.data()}
        columns = {name: [row[name] for row in rows.values()] for name in ("vectors", "median", "p95")}
        largest = {f"largest {name}": [row["largest"][name] for row in rows.values()] for name in ("median", "p95")}
        note = f"largest: of the {self.vectors.shape[1]} vectors of each prompt, or of each subspace"
        return Table("z of first tokens", {"of": list(rows)} | columns | largest, (note,))

    def z(self, matrix: Weight, ranked: Ranked) -> Float[Tensor, "k top"]:
        """Return z_prompts of decoded tokens; 0 where the score of a token is the same for all vectors."""
        return _against(matrix, ranked, self.vectors.flatten(0, 1))


def _against(matrix: Weight, ranked: Ranked, vectors: Float[Tensor, "N d"]) -> Float[Tensor, "k top"]:
    """Return scores in standard deviations of the same tokens' scores for other vectors, from their mean."""
    ids, which = ranked.ids.unique(return_inverse=True)
    scores = matrix.take(ids.tolist()).cpu().double() @ vectors.cpu().double().T  # [t, N]
    mean, deviation = scores.mean(1)[which.cpu()], scores.std(1)[which.cpu()]
    z = (ranked.scores.cpu().double() - mean) / torch.where(deviation > 0, deviation, torch.inf)
    return z.to(torch.float32)


def calibrate(
    jacobians: Iterable[DetachedJacobian],
    rank: int = 8,
    *,
    tol: float = 1e-3,
    seed: int = 0,
    max_sweeps: int = 40,
    search_dtype: torch.dtype | None = None,
    hide_special: bool = False,
    progress: Progress | None = None,
) -> Calibration:
    """Compute `rank` leading left vectors of each of several prompts' maps, to compare decoded vectors with.

    Args:
        jacobians: of unrelated prompts on one model. They are taken one after another, so that a generator holds one
            trace at a time: `(model.trace(prompt).jacobian() for prompt in NEUTRAL)`.
        rank, tol, seed, max_sweeps, search_dtype: as `DetachedJacobian.svd` takes them.
        hide_special: leave control, unused and byte tokens out of the decoding of first tokens.
        progress: called as `progress(what, blocks done, blocks in all)`.

    Raises:
        ValueError: there are fewer than two prompts, or two and one vector of each, or an argument is out of range.
    """
    found: list[Tensor] = []
    head, hidden = None, list[int]()
    for jacobian in jacobians:
        head, hidden = jacobian.network.head.matrix, jacobian.hidden_ids(hide_special)

        def report(what: str, done: int, total: int, rounds: int = 0) -> None:
            if progress:
                progress(f"prompt {len(found) + 1}, {what}", done, total)

        with jacobian.reporting(report):
            how: dict[str, Any] = {"tol": tol, "seed": seed, "max_sweeps": max_sweeps, "search_dtype": search_dtype}
            found.append(jacobian.svd(rank, **how).U)
        del jacobian
    compared(len(found), rank)
    assert head is not None
    vectors = torch.stack(found)
    generator = torch.Generator().manual_seed(seed)
    shape = RANDOM_SUBSPACES, vectors.shape[2], rank
    random = torch.linalg.qr(torch.randn(shape, generator=generator, dtype=torch.float64)).Q.mT  # [m, k, d]
    every = torch.cat([vectors.flatten(0, 1), random.flatten(0, 1).to(vectors)])
    first = top_logits(head, every.to(head.dtype), 1, hidden=hidden)
    assert first.z is not None
    own = []
    for i in range(len(vectors)):
        rows = slice(i * rank, (i + 1) * rank)
        others = torch.cat([vectors[:i], vectors[i + 1 :]]).flatten(0, 1)
        own.append(_against(head, Ranked(first.ids[rows], first.scores[rows]), others)[:, 0])
    by_chance = first.z[len(found) * rank :, 0].cpu().float().unflatten(0, (RANDOM_SUBSPACES, rank))
    return Calibration(vectors, Spread(torch.stack(own)), Spread(by_chance))
