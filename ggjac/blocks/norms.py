"""Norms as frozen diagonals: the scale is held at its value at the prompt; LayerNorm's centring and bias stay live."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ggjac.blocks.frame import BlockWeights, Positions, affine
from ggjac.config import ModelConfig
from ggjac.linop import Center, Homogeneous, LinearOperator, Scale, StreamMix


class NormTape(NamedTuple):
    """A norm at one input: the scale of each position, the norm's weight, and LayerNorm's centring and bias.

    `scale` is `1 / rms`, in float32 at least. `streams` are the weights with which it first collects what it reads from
    several residual streams; None for one.
    """

    scale: Float[Tensor, "n 1"]
    weight: Float[Tensor, " d"]
    centred: bool
    bias: Float[Tensor, " d"] | None
    streams: Float[Tensor, "n 1 i"] | None = None

    def at(self, positions: Positions) -> "NormTape":
        """Return the tape of some positions."""
        streams = None if self.streams is None else self.streams[positions]
        return self._replace(scale=self.scale[positions], streams=streams)

    def apply(self, x: Float[Tensor, "n i"]) -> Float[Tensor, "n d"]:
        """Return the norm of `x`."""
        return affine(self.operator(), x)

    def operator(self) -> LinearOperator:
        """Return the frozen norm, `[n, d]` to `[n, d]`, or from several streams, `[n, i d]`."""
        # [n, 1] * [d] -> [n, d]
        norm: LinearOperator = Scale((self.scale * self.weight.to(self.scale)).to(self.weight), self.bias)
        if self.centred:
            norm = norm @ Center(norm.in_shape, dtype=norm.dtype, device=norm.device)
        collecting = self.collecting()
        return norm if collecting is None else norm @ collecting

    def collecting(self) -> LinearOperator | None:
        """Return how it collects what it reads from several streams, `[n, i d]` to `[n, d]`; None for one stream."""
        return None if self.streams is None else StreamMix(self.streams, len(self.weight))


def record_norm(
    w: BlockWeights, config: ModelConfig, names: Sequence[str], x: Float[Tensor, "n d"], epsilon: float = 0.0
) -> NormTape | None:
    """Freeze a norm at its input, or return None where the block has no such norm; see `frozen_norm`."""
    if not config.row.norm_weights:
        return frozen_norm(config, None, None, x, epsilon) if names else None
    found = next(((name, full) for name in names for full in (f"{name}.weight", name) if full in w), None)
    if found is None:
        return None
    name, full = found
    bias = w.vector(f"{name}.bias") if f"{name}.bias" in w else None
    return frozen_norm(config, w.vector(full), bias, x, epsilon)


def frozen_norm(
    config: ModelConfig,
    weight: Float[Tensor, " d"] | None,
    bias: Float[Tensor, " d"] | None,
    x: Float[Tensor, "n d"],
    epsilon: float = 0.0,
) -> NormTape:
    """Freeze the scale `1 / sqrt(mean(x²) + epsilon)` of RMSNorm or LayerNorm at `x`; LayerNorm's centring stays live.

    A missing weight counts as ones, and an epsilon of 0 as the model's. Squares are summed in float32 at least.
    """
    wide = widened(x)
    centred = config.row.norm != "rms"
    if centred:
        wide = wide - wide.mean(-1, keepdim=True)
    return NormTape(
        inverse_rms(wide, config, epsilon), x.new_ones(x.shape[-1]) if weight is None else weight, centred, bias
    )


class HeadNorm(LinearOperator):
    """The frozen norm of the queries or keys of each head, `[n, h s]` to `[n, h s]`, computed in float32 at least.

    `scale` is `1 / rms`. Centring stays live; there is no bias.
    """

    def __init__(
        self, scale: Float[Tensor, "n h 1"], weight: Float[Tensor, "*h s"] | None, like: Float[Tensor, "n hs"],
        *, centred: bool = False,
    ):  # fmt: skip
        """Take the scales, the weights of all heads or of each, and queries or keys, for their shape and dtype."""
        self.scale, self.weight, self.centred = scale, weight, centred
        self.in_shape = self.out_shape = tuple(like.shape)
        self.dtype, self.device = like.dtype, like.device

    def matmat(self, X: Float[Tensor, "k n hs"], t: Homogeneous = None) -> Float[Tensor, "k n hs"]:
        """Centre where the norm does so, and scale."""
        heads = self._heads(X)
        if self.centred:
            heads = heads - heads.mean(-1, keepdim=True)
        heads = heads * self.scale
        return (heads if self.weight is None else heads * self.weight.to(heads)).to(X.dtype).flatten(2)

    def rmatmat(self, Y: Float[Tensor, "k n hs"]) -> Float[Tensor, "k n hs"]:
        """Scale, and centre where the norm does so."""
        heads = self._heads(Y)
        heads = (heads if self.weight is None else heads * self.weight.to(heads)) * self.scale
        if self.centred:
            heads = heads - heads.mean(-1, keepdim=True)
        return heads.to(Y.dtype).flatten(2)

    def _heads(self, X: Float[Tensor, "k n hs"]) -> Float[Tensor, "k n h s"]:
        return widened(X).unflatten(2, (self.scale.shape[1], -1))


def record_head_norm(
    w: BlockWeights, name: str, config: ModelConfig, x: Float[Tensor, "n hs"], heads: int = 1
) -> HeadNorm:
    """Freeze the norm of queries or keys `x`, of each head or (by default) of all at once.

    Its weights are those that the file has under `name`, if any.
    """
    wide, centred = widened(x).unflatten(1, (heads, -1)), config.row.norm == "layer"
    if centred:
        wide = wide - wide.mean(-1, keepdim=True)
    weight = w.vector(f"{name}.weight") if f"{name}.weight" in w else None
    return HeadNorm(inverse_rms(wide, config), weight, x, centred=centred)


def widened(x: Float[Tensor, "*n s"]) -> Float[Tensor, "*n s"]:
    """Return `x` in float32 at least: in 16 bit, sums of squares lose their digits, and in float16 they overflow."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def inverse_rms(x: Float[Tensor, "*n s"], config: ModelConfig, epsilon: float = 0.0) -> Float[Tensor, "*n 1"]:
    """Return `1 / sqrt(mean(x²) + epsilon)` over the last axis, in float32 at least; NaN where squares overflow.

    An epsilon of 0 counts as the model's.

    One over infinity would be 0, as if nothing had happened. Whether numbers are finite is looked at once for each
    block (`ggjac.model`), since a device would wait for each look.
    """
    mean = widened(x).square().mean(-1, keepdim=True)
    wrong = mean.detach() - mean.detach()  # 0, or NaN
    return torch.rsqrt(mean + (epsilon or config.norm_epsilon) + wrong)
