"""The distribution of the next token at the prompt, and the directions of the output along which it changes.

With `z` the logits that an output `y` has, soft cap included, `p` their softmax and `w_v = ∂z_v / ∂y` the rows of the
head (times the slope of the cap at the prompt):

    entropy              H = -Σ_v p_v log p_v            ∂H/∂y = -Σ_v p_v (log p_v + H) w_v
    Fisher information   F = Σ_v p_v (w_v - w̄)(w_v - w̄)ᵀ    w̄ = Σ_v p_v w_v

To second order, an output moved by `ε u` has a distribution of `KL = ε² uᵀF u / 2` from the prompt's; the leading
eigenvectors of `F` are the directions in which it changes most (see Amari, *Natural gradient works efficiently in
learning*, 1998). Sums over the vocabulary are streamed, tile by tile, in float32 at least.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ggjac.decode import Head
from ggjac.directions import DirectionError
from ggjac.linop import Homogeneous, LinearOperator
from ggjac.svd import svd

# Relative residual of an eigenvector of `F`, and the most products that it may take.
TOLERANCE = 1e-5
SWEEPS = 60
# Eigenvectors that may be asked for: each needs a few more products with the head.
MOST_DIRECTIONS = 64


class Entropy(NamedTuple):
    """The entropy of the next token after `m` outputs, and its gradient.

    Attributes:
        value: `[m]`, float64, in nats.
        gradient: `[m, d]`, by the output, before the head; in the head's dtype.
    """

    value: Float[Tensor, " m"]
    gradient: Float[Tensor, "m d"]


class FisherDirections(NamedTuple):
    """Leading eigenvectors of the Fisher information of the next token, by the output before the head.

    Attributes:
        vectors: `[k, d]`, orthonormal; each is turned so that along it the most likely token gains on the average.
        values: `[k]`, float64: eigenvalues, descending; twice the KL divergence of a step of length 1, to second order.
        total: sum of all eigenvalues.
        residual: the largest relative residual of an eigenvector.
    """

    vectors: Float[Tensor, "k d"]
    values: Float[Tensor, " k"]
    total: float
    residual: float


def entropy(head: Head, outputs: Float[Tensor, "m d"]) -> Entropy:
    """Return the entropy of the next token after each output, and its gradient; two passes over the head."""
    log_p, slopes = _log_chances(head, outputs)
    value = -(log_p.exp() * log_p).sum(1)
    # The coefficients of the rows times their slopes; they sum to zero, so that any row may be subtracted from all.
    by_logit = -log_p.exp() * (log_p + value[:, None])
    wide = torch.promote_types(outputs.dtype, torch.float32)
    found = torch.zeros(outputs.shape, dtype=wide, device=outputs.device)
    for m, top in enumerate(log_p.argmax(1).tolist()):
        rows = _Rows(head, slopes[m], top, wide)
        weights = by_logit[m].to(rows.slopes)
        for start, stop, tile in rows.tiles():
            found[m] += weights[start:stop] @ tile
    return Entropy(value, found.to(outputs.dtype))


def fisher_directions(head: Head, output: Float[Tensor, " d"], count: int, *, seed: int = 0) -> FisherDirections:
    """Return the `count` leading eigenvectors of the Fisher information of the next token after an output.

    Each step of the iteration is a pass over the head.

    Raises:
        DirectionError: so many are not there, or the next token is certain, so that no direction changes anything.
    """
    information = FisherInformation(head, output)
    most = min(MOST_DIRECTIONS, *head.matrix.shape)
    if not 1 <= count <= most:
        raise DirectionError(f"Fisher direction {count} is out of range; there are 1 to {most}")
    found = svd(information, count, tol=TOLERANCE, max_sweeps=SWEEPS, seed=seed)
    values = found.S.cpu().double()
    if not values[-1] > torch.finfo(information.dtype).eps * max(information.total, torch.finfo().tiny):
        raise DirectionError(
            f"Fisher direction {count} changes nothing: the next token is all but certain, or has few candidates; name "
            "an earlier direction or another position"
        )
    vectors = found.Vh.to(output.dtype)
    turned = torch.where((information.top_over_mean.to(vectors) @ vectors.T) < 0, -1.0, 1.0).to(vectors)
    return FisherDirections(turned[:, None] * vectors, values, information.total, float(found.residual.max()))


class FisherInformation(LinearOperator):
    """The Fisher information of the next token by an output before the head, `[d]` to `[d]`; symmetric.

    Attributes:
        total: its trace.
        top_over_mean: `[d]`, the most likely token's row less the mean row.
    """

    def __init__(self, head: Head, output: Float[Tensor, " d"]):
        log_p, slopes = _log_chances(head, output[None])
        self.dtype, self.device = torch.promote_types(output.dtype, torch.float32), output.device
        self.in_shape = self.out_shape = tuple(output.shape)
        self._chances = log_p[0].exp().to(self.device, self.dtype)
        # All rows are taken from the most likely token's: where it is almost certain, all that is left is small, and
        # differences of large sums would lose it.
        self._rows = _Rows(head, slopes[0], int(log_p.argmax()), self.dtype)
        self._mean, squares = output.new_zeros(output.shape, dtype=self.dtype), 0.0
        for start, stop, tile in self._rows.tiles():
            chances = self._chances[start:stop]
            self._mean += chances @ tile
            squares += float((chances @ tile.square().sum(1)).cpu().double())
        self.total = squares - float(self._mean.cpu().double().square().sum())
        self.top_over_mean = -self._mean

    def matmat(self, X: Float[Tensor, "k d"], t: Homogeneous = None) -> Float[Tensor, "k d"]:
        """Return `F x` for each of `k` stacked vectors."""
        found = -(X @ self._mean)[:, None] * self._mean
        for start, stop, tile in self._rows.tiles():
            found += (X @ tile.T * self._chances[start:stop]) @ tile
        return found

    def rmatmat(self, Y: Float[Tensor, "k d"]) -> Float[Tensor, "k d"]:
        """Return the same, as `F` is symmetric."""
        return self.matmat(Y)


class _Rows:
    """The rows `w_v` of the head, less that of one token, streamed."""

    def __init__(self, head: Head, slopes: Float[Tensor, " v"], reference: int, dtype: torch.dtype):
        self.matrix, self.dtype = head.matrix, dtype
        self.slopes = slopes.to(head.matrix.device, dtype)
        self.reference = self.slopes[reference] * head.matrix.take([reference])[0].to(dtype)

    def tiles(self) -> Iterator[tuple[int, int, Tensor]]:
        for start, stop, tile in self.matrix.tiles():
            yield start, stop, self.slopes[start:stop, None] * tile.to(self.dtype) - self.reference


def _log_chances(head: Head, outputs: Float[Tensor, "m d"]) -> tuple[Float[Tensor, "m v"], Float[Tensor, "m v"]]:
    """Return `log p` and the slopes of the logits, by which the rows are multiplied; float64, on the CPU."""
    z = head.logits(outputs).cpu().double()
    slopes = 1 - (z / head.softcap).square() if head.softcap else torch.ones_like(z)
    return z.log_softmax(1), head.scale * slopes
