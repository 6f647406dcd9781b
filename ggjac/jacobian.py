"""The detached Jacobian of one prompt as a linear operator over streamed blocks.

For input embeddings `x` and the output `y` (one position after the final norm, before the LM head),

    y = J x + offset,    J = Scale(norm) @ block[L-1] @ ... @ block[0]    (Golden, arXiv 2505.24293, eq. 2 and 15)

with the blocks of `ggjac.blocks`, frozen at the prompt. `offset` is what biases contribute; it is exactly zero for
models without biases on the live path.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ggjac.blocks import BlockTape, BlockWeights, Frame, NormTape, block
from ggjac.linop import Chain, Homogeneous, LinearOperator, Select
from ggjac.svd import SVD, svd

# Working memory that a chunk of dense rows may take on its way down the blocks, in bytes.
CHUNK_BYTES = 1 << 30

# Reconstruction error within which a dtype's arithmetic is healthy.
HEALTHY = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2}


class DetachedJacobian(LinearOperator):
    """The linear map from all input embeddings `[n, d]` to one output vector `[d]`, exact at its prompt.

    Products stream the blocks' live weights once, whatever the number of stacked vectors. Positions after `position`
    have no influence (attention is causal): their part of the map is zero.

    Attributes:
        x: `[n, d]`, input of block 0: embeddings after any scaling.
        output: `[d]`, the forward pass's output at `position`, after the final norm.
        ids: the `n` token ids.
        position: which output position this is, counted from 0.
        mlp_path: the freezing rule of gated feed-forwards, `"up"` or `"gate"`.
        progress: if set, called as `progress(done, total)` after each block of a product.
    """

    def __init__(
        self,
        blocks: Sequence[BlockWeights],
        tapes: Sequence[BlockTape],
        norm: NormTape,
        frame: Frame,
        *,
        x: Float[Tensor, "n d"],
        output: Float[Tensor, " d"],
        ids: Sequence[int],
        position: int,
    ):
        n, d = x.shape
        self.in_shape, self.out_shape = (n, d), (d,)
        self.dtype, self.device = x.dtype, x.device
        self.x, self.output, self.ids, self.position = x, output, list(ids), position
        self.mlp_path = frame.mlp_path
        self.progress: Callable[[int, int], None] | None = None

        reached = range(position + 1)
        spans = [reached] * (len(blocks) - 1) + [range(position, position + 1)]
        layers = [
            block(weights, frame.config, tape, span) for weights, tape, span in zip(blocks, tapes, spans, strict=True)
        ]
        self._floats_per_vector = max(3 * n * d, 2 * max(tape.hidden_units for tape in tapes))
        final = norm.at(slice(position, position + 1)).operator()
        first = Select(torch.arange(position + 1), n, d, dtype=x.dtype, device=x.device)
        self.chain = Chain(final, *reversed(layers), first, after=self._report, ahead=True)

    def matmat(self, X: Float[Tensor, "k n d"], t: Homogeneous = None) -> Float[Tensor, "k d"]:
        """Return `J x + t offset` for stacked inputs: one upward sweep."""
        return self.chain.matmat(X.to(self.device, self.dtype), t)[:, 0]

    def rmatmat(self, Y: Float[Tensor, "k d"]) -> Float[Tensor, "k n d"]:
        """Return `Jᵀ y` for stacked output cotangents: one downward sweep."""
        return self.chain.rmatmat(Y.to(self.device, self.dtype)[:, None])

    def rows(self, chunk: int | None = None) -> Iterator[tuple[int, int, Tensor]]:
        """Yield rows of the dense Jacobian; by default as many at a time as fit into `CHUNK_BYTES`."""
        fitting = CHUNK_BYTES // (self._floats_per_vector * self.x.element_size())
        return super().rows(chunk or max(1, fitting))

    def svd(self, rank: int, **options: Any) -> SVD:
        """Return the leading singular triplets of the `[d, n d]` matrix; options as `ggjac.svd.svd` takes them."""
        return svd(self, rank, **options)

    @property
    def linear_output(self) -> Float[Tensor, " d"]:
        """`J x`: what the linear part alone reproduces of the output; in float32 at least."""
        return self._pushed[:2].to(torch.promote_types(self.dtype, torch.float32)).sum(0)

    @property
    def offset(self) -> Float[Tensor, " d"]:
        """`y - J x`, computed by pushing the biases through the frozen blocks; zero where there are none."""
        return self._pushed[2]

    @property
    def reconstruction_error(self) -> float:
        """`‖J x + offset - y‖ / ‖y‖`. Small by construction: a health check of the arithmetic, no evidence.

        `J x` is the sum of two products, with the even and with the odd positions of `x`. One product would repeat the
        forward pass bit by bit, and show nothing of what the dtype costs.
        """
        wide = [part.double() for part in (self.linear_output, self.offset, self.output)]
        return float((wide[0] + wide[1] - wide[2]).norm() / wide[2].norm())

    @property
    def reconstruction_limit(self) -> float:
        """The reconstruction error that is healthy in this dtype; 16-bit rounding adds up over more than 32 blocks."""
        blocks = len(self.chain.parts) - 2
        return HEALTHY[self.dtype] * (max(1.0, (blocks / 32) ** 0.5) if self.dtype.itemsize == 2 else 1.0)

    @cached_property
    def _pushed(self) -> Float[Tensor, "3 d"]:
        """Both halves of `J x`, and `offset`: inputs `x` even, `x` odd and 0, with homogeneous coordinates 0, 0, 1."""
        even = torch.zeros_like(self.x)
        even[::2] = self.x[::2]
        return self.matmat(
            torch.stack([even, self.x - even, torch.zeros_like(even)]), self.x.new_tensor([0.0, 0.0, 1.0])
        )

    def _report(self, done: int) -> None:
        """Count blocks: the chain's first and last parts, in either direction, are none."""
        blocks = len(self.chain.parts) - 2
        if self.progress and 0 < done - 1 <= blocks:
            self.progress(done - 1, blocks)
