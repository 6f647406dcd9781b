"""What every part of a block needs: its tensors as protocols, the settings at one prompt, and projections.

Tensors keep GGUF's names, without the `blk.N.` prefix.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ggjac.blocks.activations import Activation
from ggjac.config import ModelConfig, Rope
from ggjac.linop import Linear, LinearOperator, Scale, TiledMatrix
from ggjac.sizes import MlpPath


@runtime_checkable
class WeightMatrix(TiledMatrix, Protocol):
    """A streamed matrix with access to some of its rows or columns."""

    def rows(self, start: int, stop: int) -> "WeightMatrix":
        """Return rows `start:stop`."""

    def columns(self, start: int, stop: int) -> "WeightMatrix":
        """Return columns `start:stop`; both must be boundaries of quantization blocks."""


@runtime_checkable
class BlockWeights(Protocol):
    """The tensors of one block by their short names, such as `attn_q.weight`."""

    @property
    def slab(self) -> int:
        """Hidden units of a feed-forward network that exist at a time."""

    @property
    def outside(self) -> "BlockWeights":
        """The tensors that belong to no block."""

    def __contains__(self, name: str) -> bool:
        """Return whether the file has the tensor."""

    def matrix(self, name: str, expert: int | None = None) -> WeightMatrix:
        """Return a streamed matrix; from a stack of experts, that of one expert."""

    def vector(self, name: str, expert: int | None = None) -> Tensor:
        """Return a small dense tensor; from a stack of experts, the row of one expert."""

    def gain(self, name: str, expert: int | None = None) -> float:
        """Return the constant factor of a matrix, 1 where the file has none."""

    def wide_vector(self, name: str) -> Tensor:
        """Return a small dense tensor in float32 at least, also where computation is in a narrower dtype."""

    def shares(self, stem: str) -> bool:
        """Return whether these weights have only some terms of the sum that ends with a projection; see `joined`."""

    def holds(self, expert: int) -> bool:
        """Return whether a routed expert is among these weights, where others have some of them."""

    def agreed(self, found: Tensor) -> Tensor:
        """Return a choice as the first of those has made it who have parts of the weights."""

    def joined(self, part: LinearOperator, *, inputs: bool = True, outputs: bool = True) -> LinearOperator:
        """Return an operator from these weights' terms, completed by those that others have.

        Args:
            part: the operator.
            inputs: whether all read the same input, so that its cotangents are added up.
            outputs: whether the outputs are added up.
        """

    def gathered(self, own: Tensor, stem: str) -> Tensor:
        """Return numbers `[m, h]` of each head of the mixer that ends with a projection, from those of some heads.

        Of a network or of experts, they are added up over all who have parts of the weights.
        """


Positions = slice | Int[Tensor, " m"]  # some of a tape's, the numbers on the host


class NumericsError(ValueError):
    """The forward pass left the range of its dtype; results computed from it would be meaningless."""


def overflow(place: str, dtype: torch.dtype) -> NumericsError:
    """Return the error about numbers of a dtype that are not finite, at some place in the forward pass."""
    wider = "float32" if dtype.itemsize == 2 else "float64"
    advice = f"try dtype={wider}. If it persists, the file may be damaged"
    name = str(dtype).removeprefix("torch.")
    return NumericsError(f"{place} overflowed {name}; {'the file may be damaged' if name == wider else advice}")


class Frame(NamedTuple):
    """Settings and tables shared by all blocks at one prompt.

    Attributes:
        config: sizes and constants.
        rotations: cos and sin at every position, for each rotary embedding in use.
        mlp_path: the freezing rule of gated feed-forwards.
        activations: the activation of each block's feed-forward.
        inputs: what each block reads of the tokens beside the stream, at the positions that are recorded; or None.
        values: of an earlier block, at these positions, if the block that is recorded reads them; or None.
        between: weight of the norm between passes over all blocks, or None.
        held: the second of two streams in the first pass, or None.
        choices: of the first blocks, the experts of each token at these positions, and perhaps of later ones.
    """

    config: ModelConfig
    rotations: Mapping[Rope, tuple[Tensor, Tensor]]
    mlp_path: MlpPath
    activations: Sequence[Activation]
    inputs: Float[Tensor, "n L w"] | None = None
    values: Float[Tensor, "n gv"] | None = None
    between: Float[Tensor, " d"] | None = None
    held: Float[Tensor, " d"] | None = None
    choices: Sequence[Int[Tensor, "p used"]] = ()


def linear(
    w: BlockWeights,
    stem: str,
    n: int,
    kind: str = "",
    expert: int | None = None,
    *,
    rows: slice | None = None,
    columns: slice | None = None,
) -> Linear:
    """Return a projection with its bias, if the file has one; of several parts by columns, the first has the bias."""
    name = f"{stem}{kind}"
    matrix = w.matrix(f"{name}.weight", expert)
    bias = w.vector(f"{name}.bias", expert) if f"{name}.bias" in w else None
    if rows:
        matrix, bias = matrix.rows(rows.start, rows.stop), None if bias is None else bias[rows]
    if columns:
        matrix, bias = matrix.columns(columns.start, columns.stop), None if columns.start else bias
    return Linear(matrix, n, bias, w.gain(f"{name}.weight", expert))


def affine(operator: LinearOperator, x: Float[Tensor, "n d"]) -> Float[Tensor, "m e"]:
    """Return `A x + b` for one input."""
    return operator.matmat(x[None], x.new_ones(1))[0]


class Made(NamedTuple):
    """A value at the prompt, and the operator that makes it, each step of it recorded at what those before it made."""

    value: Float[Tensor, "m e"]
    operator: LinearOperator

    def then(self, step: LinearOperator | None) -> "Made":
        """Return what a further step makes of the value; None leaves it as it is."""
        return self if step is None else Made(affine(step, self.value), step @ self.operator)


def made_by(operator: LinearOperator, x: Float[Tensor, "n d"]) -> Made:
    """Return what an operator makes of one input."""
    return Made(affine(operator, x), operator)


def scaled(operator: LinearOperator, factor: float) -> LinearOperator:
    """Return an operator times a constant."""
    if factor == 1:
        return operator
    return Scale(torch.full(operator.out_shape, factor, dtype=operator.dtype, device=operator.device)) @ operator


def before(h: Float[Tensor, "m d"], past: Float[Tensor, "1 d"] | None) -> Float[Tensor, "m d"]:
    """Return the position before each one, the first of which is a past one; or zeros, before the first of all."""
    return torch.cat([torch.zeros_like(h[:1]) if past is None else past, h[:-1]])
