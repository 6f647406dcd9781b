"""Rotary position embedding: angles from the model's settings, and the rotation of queries and keys.

Follows llama.cpp (ggml's `rope_yarn` and `ggml_rope_yarn_corr_dims`); YaRN is Peng et al., arXiv 2309.00071.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from ggjac.config import Rope
from ggjac.linop import Homogeneous, LinearOperator


def rotation(rope: Rope, n: int, factors: Tensor | None = None) -> tuple[Float[Tensor, "n p"], Float[Tensor, "n p"]]:
    """Return cos and sin, float64, for positions 0 to n - 1 and each of the `p` rotating pairs.

    `factors`, of at least `p` pairs, divide the frequencies: Llama 3's, precomputed by the converter
    (`rope_freqs.weight`), or those of LongRoPE.

    If `rope.rounded`, angles are those of llama.cpp: in float32, and multiplied up from pair to pair. The relative
    error of an angle grows by up to 1e-7 with every pair below it, which matters at far positions.
    """
    pairs = torch.arange(rope.dimensions // 2, dtype=torch.float64)
    # The angle per position, [1, p]; or the angle at each position, [n, p].
    turning = _multiplied_up(rope, n) if rope.rounded else rope.base ** (-2 * pairs[None] / rope.dimensions)
    if factors is not None:
        turning = turning / factors[: len(pairs)].cpu().to(turning.dtype)
    interpolated = turning * (1 / rope.factor)
    if rope.yarn:

        def pair_turning(times: float) -> float:
            """Return the pair that turns this number of times within the original context."""
            return rope.dimensions * math.log(rope.original_context / (2 * math.pi * times)) / (2 * math.log(rope.base))

        low = max(0, math.floor(pair_turning(rope.beta_fast)))
        high = min(rope.dimensions - 1, math.ceil(pair_turning(rope.beta_slow)))
        # Rounded where ggml rounds, since at a far position the last bit of an angle counts: `keep` to the dtype of the
        # angles, and the first product not at all, because compilers fuse it with the sum.
        keep = 1 - ((pairs - low) / max(0.001, high - low)).to(turning.dtype).clamp(0, 1)
        interpolated = (interpolated.double() * (1 - keep) + turning * keep).to(turning.dtype)
    interpolated[:, list(rope.still)] = 0
    angles = interpolated.double() if rope.rounded else torch.arange(n, dtype=torch.float64)[:, None] * interpolated
    return rope.magnitude * angles.cos(), rope.magnitude * angles.sin()


def _multiplied_up(rope: Rope, n: int) -> Float[Tensor, "n p"]:
    """Return the angles of unscaled positions as ggml's `ggml_rope_cache_init` has them, float32."""
    base, exponent = torch.tensor([rope.base, -2 / rope.dimensions], dtype=torch.float32).double()
    angles, ratio = [torch.arange(n, dtype=torch.float32)], (base**exponent).float()
    for _ in range(1, rope.dimensions // 2):
        angles.append(angles[-1] * ratio)
    return torch.stack(angles, 1)


def rotate(
    x: Float[Tensor, "*k n h s"], pairs: str, cos: Float[Tensor, "n p"], sin: Float[Tensor, "n p"]
) -> Float[Tensor, "*k n h s"]:
    """Rotate the leading dims of each head, whose pairs are `"adjacent"` or `"halves"`; the others pass through."""
    dimensions = 2 * cos.shape[1]
    turning, rest = x[..., :dimensions], x[..., dimensions:]
    axis = -1 if pairs == "adjacent" else -2  # [p, 2] holds dims 2i, 2i+1; [2, p] holds dims i, i + p
    a, b = turning.unflatten(-1, (-1, 2) if axis == -1 else (2, -1)).unbind(axis)
    cos, sin = cos.to(x)[:, None], sin.to(x)[:, None]
    turned = torch.stack((a * cos - b * sin, a * sin + b * cos), axis)
    return torch.cat((turned.flatten(-2), rest), -1)


class Rotate(LinearOperator):
    """Rotate the queries or keys of heads that are side by side, `[n, h s]`, as `rotate` does, from some dim on.

    `flop` leaves the products out, as they are elementwise.
    """

    def __init__(
        self, pairs: str, cos: Float[Tensor, "n p"], sin: Float[Tensor, "n p"], size: int, heads: int, *, first: int = 0
    ):
        """Take the kind of pairs, cos and sin at each position, and the elements of a head.

        Dims before the `first` pass through, and those after the turning ones too.
        """
        self.pairs, self.cos, self.sin, self.heads, self.first = pairs, cos, sin, heads, first
        self.in_shape = self.out_shape = (len(cos), heads * size)
        self.dtype, self.device = cos.dtype, cos.device

    def matmat(self, X: Float[Tensor, "k n hs"], t: Homogeneous = None) -> Float[Tensor, "k n hs"]:
        """Rotate."""
        return self._turned(X, self.sin)

    def rmatmat(self, Y: Float[Tensor, "k n hs"]) -> Float[Tensor, "k n hs"]:
        """Rotate the other way."""
        return self._turned(Y, -self.sin)

    def _turned(self, X: Float[Tensor, "k n hs"], sin: Float[Tensor, "n p"]) -> Float[Tensor, "k n hs"]:
        still, turning = X.unflatten(2, (self.heads, -1)).tensor_split([self.first], -1)
        return torch.cat((still, rotate(turning, self.pairs, self.cos, sin)), -1).flatten(2)


class Turn(LinearOperator):
    """Rotate the last dims of heads that are side by side, in adjacent pairs, `[n, h s]`; or `back` by as much.

    `flop` leaves the products out, as they are elementwise.
    """

    def __init__(self, angles: Float[Tensor, "2 n p"], size: int, heads: int = 1, *, back: bool = False):
        """Take cos and sin at each position, and the elements of a head."""
        self.angles, self.size, self.back = angles, size, back
        self.in_shape = self.out_shape = (angles.shape[1], heads * size)
        self.dtype, self.device = angles.dtype, angles.device

    def matmat(self, X: Float[Tensor, "k n hs"], t: Homogeneous = None) -> Float[Tensor, "k n hs"]:
        """Rotate."""
        return self._turned(X, back=self.back)

    def rmatmat(self, Y: Float[Tensor, "k n hs"]) -> Float[Tensor, "k n hs"]:
        """Rotate the other way."""
        return self._turned(Y, back=not self.back)

    def _turned(self, X: Float[Tensor, "k n hs"], *, back: bool) -> Float[Tensor, "k n hs"]:
        cos, sin = self.angles
        still, turning = X.unflatten(2, (-1, self.size)).tensor_split([self.size - 2 * cos.shape[1]], -1)
        turned = rotate(turning, "adjacent", cos, -sin if back else sin)
        return torch.cat((still, turned), -1).flatten(2)
