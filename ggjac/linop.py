"""Linear operators on stacked tensors: a few primitives, and chain, sum and transpose.

A vector is a tensor of shape `in_shape`, such as `(n, d)`; `k` vectors are stacked on a new leading axis. `matmat` maps
`[k, *in_shape]` to `[k, *out_shape]` and `rmatmat` applies the transpose. (SciPy's `matmat` stacks columns instead;
`to_scipy` converts.)

An operator may carry a constant term, as `Linear` does when it has a bias: it then stands for the affine map
`A x + b`. `matmat` takes the homogeneous coordinate `t` of each stacked vector and returns `A x + t b`; `t = 0` (the
default) is the linear part, `t = 1` the affine map, and `x = 0, t = 1` yields the constant pushed through everything
above it.

Nothing here is specific to transformers: the frozen blocks of `ggjac.blocks` are expressions in these operators.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple, Protocol, overload, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ggjac.sizes import forms

if TYPE_CHECKING:
    import scipy.sparse.linalg

Homogeneous = Float[Tensor, " k"] | None

# Stacked positions that are multiplied at a time. With more, oneDNN copies whole 16-bit operands to scratch memory, and
# is not faster.
ROWS = 4096


@runtime_checkable
class TiledMatrix(Protocol):
    """A matrix `[out, in]` that is produced a few rows at a time and never needs to exist as a whole."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns, `(out, in)`."""

    @property
    def dtype(self) -> torch.dtype:
        """Element type of the tiles."""

    @property
    def device(self) -> torch.device:
        """Where the tiles live."""

    def tiles(self) -> Iterator[tuple[int, int, Tensor]]:
        """Yield `(start, stop, rows start:stop)` in order; a tile is valid until the next one is requested."""

    def read_ahead(self) -> None:
        """Prefetch the tiles."""


class LinearOperator:
    """A linear map between tensors of fixed shapes, with its transpose and an optional constant term."""

    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    parts: tuple["LinearOperator", ...] = ()  # of a combinator

    def matmat(self, X: Tensor, t: Homogeneous = None) -> Tensor:
        """Return `A x + t b` for each of `k` stacked vectors: `[k, *in_shape]` to `[k, *out_shape]`."""
        raise NotImplementedError

    def rmatmat(self, Y: Tensor) -> Tensor:
        """Return `Aᵀ y` for each of `k` stacked vectors: `[k, *out_shape]` to `[k, *in_shape]`."""
        raise NotImplementedError

    def __repr__(self) -> str:
        """Return the kind of operator and its shapes on one line."""
        return f"{type(self).__name__} {list(self.in_shape)} -> {list(self.out_shape)}"

    def check_shape(self, given: Tensor, shape: tuple[int, ...]) -> None:
        """Refuse what is not a stack of vectors of a shape.

        Raises:
            ValueError: the message names both shapes.
        """
        if tuple(given.shape[1:]) != shape or given.dim() != len(shape) + 1:
            sizes = ", ".join(map(str, shape))
            raise ValueError(
                f"this operator takes stacked vectors [k, {sizes}], got {list(given.shape)}; make a stack of one "
                "vector with x[None]"
            )

    def read_ahead(self) -> None:
        """Prefetch the weights of the next product, so that the disk is read while something else is computed."""
        for part in self.parts:
            part.read_ahead()

    def agreed(self, found: Tensor) -> Tensor:
        """Return numbers that decide how a computation goes on: those of one of the processes that share the operator.

        Processors of different makes may differ in a last bit, and so decide differently.
        """
        for part in self.parts:
            found = part.agreed(found)
        return found

    @property
    def flop(self) -> int:
        """Floating-point operations of one product with one vector, multiplications by matrices only."""
        return sum(part.flop for part in self.parts)

    @property
    def T(self) -> "LinearOperator":
        """The transpose of the linear part."""
        return Transpose(self)

    @overload
    def __matmul__(self, other: "LinearOperator") -> "LinearOperator": ...
    @overload
    def __matmul__(self, other: Tensor) -> Tensor: ...
    def __matmul__(self, other: "LinearOperator | Tensor") -> "LinearOperator | Tensor":
        """Compose with an operator, or apply to one vector of shape `in_shape`."""
        if isinstance(other, LinearOperator):
            return Chain(self, other)
        if tuple(other.shape) != self.in_shape:
            raise ValueError(f"this operator takes a vector of shape {self.in_shape}, got {tuple(other.shape)}")
        return self.matmat(other[None])[0]

    def __add__(self, other: "LinearOperator") -> "LinearOperator":
        return Sum(self, other)

    def rows(self, chunk: int | None = None) -> Iterator[tuple[int, int, Tensor]]:
        """Yield `(start, stop, rows)` of the dense matrix, rows `[stop - start, *in_shape]`, one transposed sweep each.

        `chunk` rows at a time; default all at once.
        """
        size = math.prod(self.out_shape)
        step = max(1, chunk or size)
        for start in range(0, size, step):
            stop = min(start + step, size)
            basis = torch.zeros(stop - start, size, dtype=self.dtype, device=self.device)
            basis[torch.arange(stop - start), torch.arange(start, stop)] = 1
            yield start, stop, self.rmatmat(basis.reshape(-1, *self.out_shape))

    def to_dense(self, chunk: int | None = None) -> Tensor:
        """Return the dense matrix `[*out_shape, *in_shape]`, computed `chunk` rows at a time (default all at once)."""
        matrix = torch.empty(math.prod(self.out_shape), *self.in_shape, dtype=self.dtype, device=self.device)
        for start, stop, rows in self.rows(chunk):
            matrix[start:stop] = rows
            del rows  # before the next ones are computed
        return matrix.reshape(*self.out_shape, *self.in_shape)

    def to_scipy(self) -> "scipy.sparse.linalg.LinearOperator":
        """Return a `scipy.sparse.linalg.LinearOperator` on flattened vectors (columns stacked, as SciPy does).

        Raises:
            ModuleNotFoundError: SciPy is not installed.
        """
        try:
            from scipy.sparse.linalg import LinearOperator as ScipyOperator
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("to_scipy needs SciPy, which is not installed; pip install scipy") from error

        def columns(apply: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> Callable:
            def product(X):  # numpy [size, k], or [size]
                stacked = torch.as_tensor(X.T.reshape(-1, *shape).copy()).to(self.device, self.dtype)
                result = apply(stacked).flatten(1).T.to("cpu", scipy_dtype)
                return result.reshape(len(result), *X.shape[1:]).numpy()

            return product

        # NumPy has no bfloat16, and SciPy's solvers need at least single precision.
        scipy_dtype = torch.promote_types(self.dtype, torch.float32)
        forward, backward = columns(self.matmat, self.in_shape), columns(self.rmatmat, self.out_shape)
        return ScipyOperator(
            shape=(math.prod(self.out_shape), math.prod(self.in_shape)),
            matvec=forward,
            rmatvec=backward,
            matmat=forward,
            rmatmat=backward,
            dtype=str(scipy_dtype).removeprefix("torch."),
        )


class Identity(LinearOperator):
    """`x` itself: the residual connection."""

    def __init__(self, shape: Sequence[int], *, dtype: torch.dtype, device: torch.device):
        self.in_shape = self.out_shape = tuple(shape)
        self.dtype, self.device = dtype, device

    def matmat(self, X: Tensor, t: Homogeneous = None) -> Tensor:
        """Return `X`."""
        return X

    def rmatmat(self, Y: Tensor) -> Tensor:
        """Return `Y`."""
        return Y


class Zero(LinearOperator):
    """The map to zero: a branch that a block does not have."""

    def __init__(self, in_shape: Sequence[int], out_shape: Sequence[int], *, dtype: torch.dtype, device: torch.device):
        self.in_shape, self.out_shape = tuple(in_shape), tuple(out_shape)
        self.dtype, self.device = dtype, device

    def matmat(self, X: Tensor, t: Homogeneous = None) -> Tensor:
        """Return zeros."""
        return X.new_zeros(len(X), *self.out_shape)

    def rmatmat(self, Y: Tensor) -> Tensor:
        """Return zeros."""
        return Y.new_zeros(len(Y), *self.in_shape)


def indices_on(device: torch.device, indices: Int[Tensor, "*m"]) -> Int[Tensor, "*m"]:
    """Return indices on a device, without waiting for what it has to do before them."""
    return indices.to(device, non_blocking=device.type != "mps")  # Apple's may read the source too late


class Select(LinearOperator):
    """Keep some of `n` positions, `[n, d]` to `[m, d]`; the transpose puts zeros at the others."""

    def __init__(self, positions: Int[Tensor, " m"], n: int, d: int, *, dtype: torch.dtype, device: torch.device):
        self.positions = indices_on(device, positions)
        self.in_shape, self.out_shape = (n, d), (len(positions), d)
        self.dtype, self.device = dtype, device

    def matmat(self, X: Float[Tensor, "k n d"], t: Homogeneous = None) -> Float[Tensor, "k m d"]:
        """Take the selected positions."""
        return X[:, self.positions]

    def rmatmat(self, Y: Float[Tensor, "k m d"]) -> Float[Tensor, "k n d"]:
        """Scatter to the selected positions."""
        X = Y.new_zeros(len(Y), *self.in_shape)
        return X.index_add_(1, self.positions, Y)


class Scale(LinearOperator):
    """Multiply elementwise by a frozen `[n, d]` diagonal, such as norm scale times norm weight, or a gate.

    `constant`, `[n, d]` or `[d]`, is multiplied by the homogeneous coordinate and added: the bias of a LayerNorm, or
    the limit of a clamp.
    """

    def __init__(self, diagonal: Float[Tensor, "n d"], constant: Float[Tensor, "*n d"] | None = None):
        self.diagonal, self.constant = diagonal, constant
        self.in_shape = self.out_shape = tuple(diagonal.shape)
        self.dtype, self.device = diagonal.dtype, diagonal.device

    def matmat(self, X: Float[Tensor, "k n d"], t: Homogeneous = None) -> Float[Tensor, "k n d"]:
        """Multiply; add `t` times the constant."""
        Y = X * self.diagonal
        return Y if self.constant is None or t is None else Y + t[:, None, None] * self.constant

    def rmatmat(self, Y: Float[Tensor, "k n d"]) -> Float[Tensor, "k n d"]:
        """Multiply; a diagonal is its own transpose."""
        return Y * self.diagonal


class Center(LinearOperator):
    """Subtract the mean over the last axis, as LayerNorm does, or over each of some equal parts of it; symmetric."""

    def __init__(self, shape: Sequence[int], parts: int = 1, *, dtype: torch.dtype, device: torch.device):
        self.in_shape = self.out_shape = tuple(shape)
        self.count = parts
        self.dtype, self.device = dtype, device

    def matmat(self, X: Tensor, t: Homogeneous = None) -> Tensor:
        """Return `X` minus its mean at each position."""
        if self.count == 1:
            return X - X.mean(-1, keepdim=True)
        parted = X.unflatten(-1, (self.count, -1))
        return (parted - parted.mean(-1, keepdim=True)).flatten(-2)

    def rmatmat(self, Y: Tensor) -> Tensor:
        """Return `Y` minus its mean at each position."""
        return self.matmat(Y)


class Shift(LinearOperator):
    """Move each of `n` positions towards the one before it, `x + share (before - x)`, `[n, d]` to `[n, d]`.

    `share`, `[n, d]` or `[d]`, is frozen. Before the first position there are zeros.
    """

    def __init__(self, share: Float[Tensor, "*n d"], n: int):
        self.share = share
        self.in_shape = self.out_shape = (n, share.shape[-1])
        self.dtype, self.device = share.dtype, share.device

    def matmat(self, X: Float[Tensor, "k n d"], t: Homogeneous = None) -> Float[Tensor, "k n d"]:
        """Mix each position with the one before it."""
        Y = X * (1 - self.share)
        Y[:, 1:].addcmul_(X[:, :-1], self._later())
        return Y

    def rmatmat(self, Y: Float[Tensor, "k n d"]) -> Float[Tensor, "k n d"]:
        """Return cotangents of each position: from itself, and from the one after it."""
        X = Y * (1 - self.share)
        X[:, :-1].addcmul_(Y[:, 1:], self._later())
        return X

    def _later(self) -> Float[Tensor, "*l d"]:
        """Return the shares of the positions that have one before them."""
        return self.share[1:] if self.share.dim() > 1 else self.share


class Repeat(LinearOperator):
    """Give each of `g` heads to `each` heads that share it: `[n, g c]` to `[n, g each c]`."""

    def __init__(self, n: int, size: int, groups: int, each: int, *, dtype: torch.dtype, device: torch.device):
        self.size, self.each = size, each
        self.in_shape, self.out_shape = (n, groups * size), (n, groups * each * size)
        self.dtype, self.device = dtype, device

    def matmat(self, X: Float[Tensor, "k n in"], t: Homogeneous = None) -> Float[Tensor, "k n out"]:
        """Repeat each head."""
        return X.unflatten(-1, (-1, self.size)).repeat_interleave(self.each, -2).flatten(-2)

    def rmatmat(self, Y: Float[Tensor, "k n out"]) -> Float[Tensor, "k n in"]:
        """Add up the cotangents of the heads that share one."""
        return Y.unflatten(-1, (-1, self.each, self.size)).sum(-2).flatten(-2)


class Conv(LinearOperator):
    """Convolve each of `c` channels over `n` positions with taps of its own, causally: `[n, c]` to `[n, c]`.

    `y[t] = Σᵢ taps[:, i] * x[t - K + 1 + i] (+ bias)`: the last of the `K` taps is at the position itself, and before
    the first position there are zeros. `flop` leaves its products out, as they are elementwise.
    """

    def __init__(self, taps: Float[Tensor, "c taps"], n: int, bias: Float[Tensor, " c"] | None = None):
        self.taps, self.bias = taps, bias
        self.in_shape = self.out_shape = (n, len(taps))
        self.dtype, self.device = taps.dtype, taps.device

    def matmat(self, X: Float[Tensor, "k n c"], t: Homogeneous = None) -> Float[Tensor, "k n c"]:
        """Add up the input, shifted by each tap's distance; add `t` times the bias."""
        Y = X * self.taps[:, -1]
        for distance, tap in self._earlier():
            Y[:, distance:].addcmul_(X[:, :-distance], tap)
        if self.bias is not None and t is not None:
            Y += t[:, None, None] * self.bias
        return Y

    def rmatmat(self, Y: Float[Tensor, "k n c"]) -> Float[Tensor, "k n c"]:
        """Convolve with the same taps, forward in time."""
        X = Y * self.taps[:, -1]
        for distance, tap in self._earlier():
            X[:, :-distance].addcmul_(Y[:, distance:], tap)
        return X

    def _earlier(self) -> Iterator[tuple[int, Float[Tensor, " c"]]]:
        """Yield the taps at earlier positions, with their distance in positions, where there are such positions."""
        n, count = self.in_shape[0], self.taps.shape[1]
        return ((distance, self.taps[:, -1 - distance]) for distance in range(1, min(n, count)))


class Linear(LinearOperator):
    """`gain x Wᵀ (+ bias)` at each of `n` positions, `[n, in]` to `[n, out]`, one tile of W's rows at a time.

    `gain` is a constant factor of the whole matrix; it does not multiply the bias. Where the tiles are of a narrower
    dtype than the vectors, these are rounded to it for the product, which is added up in their own.
    """

    def __init__(self, weight: TiledMatrix, n: int, bias: Float[Tensor, " out"] | None = None, gain: float = 1.0):
        self.weight, self.bias, self.gain = weight, bias, gain
        out, d = weight.shape
        self.in_shape, self.out_shape = (n, d), (n, out)
        self.dtype, self.device = weight.dtype, weight.device

    @property
    def flop(self) -> int:
        """One multiplication and one addition for each weight and position."""
        return 2 * self.in_shape[0] * math.prod(self.weight.shape)

    def read_ahead(self) -> None:
        """Prefetch the weight."""
        self.weight.read_ahead()

    def matmat(self, X: Float[Tensor, "k n d"], t: Homogeneous = None) -> Float[Tensor, "k n out"]:
        """Multiply by W tile by tile; add `t` times the bias."""
        flat = X.reshape(-1, X.shape[2]).to(self.weight.dtype)  # [k n, d]
        Y = X.new_empty(len(flat), self.out_shape[1])
        for start, stop, tile in self.weight.tiles():
            for some in _panels(len(flat)):  # in place: for many vectors a tile's part is large too
                _add_product(Y[some, start:stop], flat[some], tile.T, beta=0, alpha=self.gain)
        Y = Y.reshape(len(X), *self.out_shape)
        if self.bias is not None and t is not None:
            Y += t[:, None, None] * self.bias
        return Y

    def rmatmat(self, Y: Float[Tensor, "k n out"]) -> Float[Tensor, "k n d"]:
        """Multiply by Wᵀ, accumulating over tiles."""
        flat = Y.reshape(-1, Y.shape[2]).to(self.weight.dtype)  # [k n, out]
        X = Y.new_zeros(len(flat), self.in_shape[1])
        for start, stop, tile in self.weight.tiles():
            for some in _panels(len(flat)):
                _add_product(X[some], flat[some, start:stop], tile, beta=1, alpha=self.gain)
        return X.reshape(len(Y), *self.in_shape)


def _add_product(total: Tensor, X: Tensor, W: Tensor, *, beta: int, alpha: float) -> None:
    """Set `total` to `beta total + alpha X @ W`, in place; a product in a narrower dtype is rounded to it first."""
    if W.dtype == total.dtype:
        total.addmm_(X, W, beta=beta, alpha=alpha)
    elif beta:
        total.add_(X @ W, alpha=alpha)
    else:
        torch.mul(X @ W, alpha, out=total)


def _panels(count: int) -> Iterator[slice]:
    """Yield the slices of stacked positions that are multiplied at a time."""
    return (slice(start, start + ROWS) for start in range(0, count, ROWS))


class Mix(LinearOperator):
    """Mix positions by a frozen pattern, of attention or of a recurrence: `[n, g hd]` to `[m, h hd]`.

    `h` query heads share `g` key/value heads in consecutive groups (query head `i` reads value head `i // (h // g)`),
    as in grouped-query attention. Row `pattern[i, q]` contains the weights of all positions for query position `q` of
    head `i`.
    """

    def __init__(self, pattern: Float[Tensor, "h m n"], groups: int, head_size: int):
        heads, m, n = pattern.shape
        self.pattern = pattern.reshape(groups, heads // groups, m, n)  # [g, h / g, m, n]
        self.head_size = head_size
        self.in_shape, self.out_shape = (n, groups * head_size), (m, heads * head_size)
        self.dtype, self.device = pattern.dtype, pattern.device

    @property
    def flop(self) -> int:
        """One multiplication and one addition for each entry of the pattern and component of a head."""
        return 2 * self.pattern.numel() * self.head_size

    def matmat(self, X: Float[Tensor, "k n in"], t: Homogeneous = None) -> Float[Tensor, "k m out"]:
        """Return the pattern-weighted sums of values, heads concatenated."""
        values = X.unflatten(2, (-1, self.head_size))  # [k, n, g, hd]
        return torch.einsum("ghmn,kngd->kmghd", self.pattern, values).flatten(2)

    def rmatmat(self, Y: Float[Tensor, "k m out"]) -> Float[Tensor, "k n in"]:
        """Return the pattern-weighted sums of the heads' cotangents, at the value heads and positions they read."""
        groups, per_group = self.pattern.shape[:2]
        heads = Y.unflatten(2, (groups, per_group, self.head_size))  # [k, m, g, h / g, hd]
        return torch.einsum("ghmn,kmghd->kngd", self.pattern, heads).flatten(2)


class Scan(LinearOperator):
    """Mix positions by a linear recurrence, in chunks of `C` positions: `[n, h c]` to the last `m` of `n`, `[m, h c]`.

    Each of `h` heads has a state `S`, `[s, c]`, and values of its own, `[n, c]`. Starting from `S = 0`, each chunk with
    values `v`, `[C, c]`, gives

        outputs of the chunk     = within @ v + reading @ S
        state for the next chunk = writing @ v + moving @ S

    All four matrices are frozen. `within` is the part inside the chunk of a pattern `[n, n]` that `Mix` would apply;
    the others are factors of the rest of it. The last chunk in use may be filled in part, and chunks beyond it are
    ignored.
    """

    def __init__(
        self,
        within: Float[Tensor, "h b C C"],
        reading: Float[Tensor, "h b C s"],
        writing: Float[Tensor, "h b s C"],
        moving: Float[Tensor, "h b s s"],
        n: int,
        m: int | None = None,
        *,
        value_size: int,
    ):
        self.within, self.reading, self.writing, self.moving = within, reading, writing, moving
        self.value_size = value_size
        heads, m = len(within), n if m is None else m
        self.in_shape, self.out_shape = (n, heads * value_size), (m, heads * value_size)
        self.dtype, self.device = within.dtype, within.device

    @property
    def flop(self) -> int:
        """One multiplication and one addition for each entry of the matrices in use and component of a value."""
        heads, _, _, s = self.reading.shape
        entries = 0
        for chunk in self._chunks():
            length = chunk.used.stop
            written = length - chunk.written.start
            entries += written * length + (0 if chunk.first else written * s)
            entries += 0 if chunk.last else s * length + (0 if chunk.first else s * s)
        return 2 * heads * entries * self.value_size

    def matmat(self, X: Float[Tensor, "k n in"], t: Homogeneous = None) -> Float[Tensor, "k m out"]:
        """Go through the chunks, and carry the state."""
        Y, state = X.new_empty(len(X), *self.out_shape), X.new_empty(0)
        for chunk in self._chunks():
            b, used, written = chunk.number, chunk.used, chunk.written
            values = self._by_head(X[:, chunk.read])
            output = self.within[:, b, written, used] @ values
            if not chunk.first:
                output.baddbmm_(self.reading[:, b, written], state)
            Y[:, chunk.put] = self._by_vector(output, len(X))
            if not chunk.last:
                added = self.writing[:, b, :, used] @ values
                state = added if chunk.first else added.baddbmm_(self.moving[:, b], state)
        return Y

    def rmatmat(self, Y: Float[Tensor, "k m out"]) -> Float[Tensor, "k n in"]:
        """Go through the chunks backwards, and carry the cotangent of the state."""
        X, state = Y.new_empty(len(Y), *self.in_shape), Y.new_empty(0)
        for chunk in reversed(list(self._chunks())):
            b, used, written = chunk.number, chunk.used, chunk.written
            output = self._by_head(Y[:, chunk.put])
            values = self.within[:, b, written, used].mT @ output
            if not chunk.last:
                values.baddbmm_(self.writing[:, b, :, used].mT, state)
            X[:, chunk.read] = self._by_vector(values, len(Y))
            if not chunk.first:
                read = self.reading[:, b, written].mT @ output
                state = read if chunk.last else read.baddbmm_(self.moving[:, b].mT, state)
        return X

    def _chunks(self) -> Iterator["_Chunk"]:
        """Yield the chunks in order."""
        size, n, skipped = self.within.shape[2], self.in_shape[0], self.in_shape[0] - self.out_shape[0]
        for number, start in enumerate(range(0, n, size)):
            stop = min(start + size, n)
            first = min(max(start, skipped), stop)  # of the positions that are written
            put = slice(max(0, first - skipped), max(0, stop - skipped))
            used, written = slice(0, stop - start), slice(first - start, stop - start)
            yield _Chunk(number, slice(start, stop), used, written, put, start == 0, stop == n)

    def _by_head(self, X: Float[Tensor, "k l hc"]) -> Float[Tensor, "h l kc"]:
        """Return stacked values with the heads first and the vectors side by side: one product serves all vectors."""
        return X.unflatten(2, (-1, self.value_size)).permute(2, 1, 0, 3).flatten(2)

    def _by_vector(self, values: Float[Tensor, "h l kc"], k: int) -> Float[Tensor, "k l hc"]:
        """Return `k` stacked vectors of values that come by head."""
        return values.unflatten(2, (k, self.value_size)).permute(2, 1, 0, 3).flatten(2)


class _Chunk(NamedTuple):
    """Some consecutive positions of a `Scan`.

    Attributes:
        number: of its matrices.
        read: its positions.
        used, written: of the chunk's rows, those that have a position, and of them those that are written.
        put: where the latter are in the output.
        first, last: whether no state comes in, and whether none goes out.
    """

    number: int
    read: slice
    used: slice
    written: slice
    put: slice
    first: bool
    last: bool


class ChannelScan(LinearOperator):
    """Mix positions by a linear recurrence in each channel: `[n, c]` to the last `m` of `n`, `[m, c]`.

    Each of `c` channels has a state `S`, `[s]`, which starts at 0. At each position, with the channel's value `v`,

        S ← exp(step rate) S + step v key        o = query · S + skip v

    All but the values is frozen. A pattern would take `n²` floats for each channel; this is one step after the other,
    in the dtype of the steps.
    """

    def __init__(
        self,
        step: Float[Tensor, "n c"],
        rate: Float[Tensor, "c s"],
        key: Float[Tensor, "n s"],
        query: Float[Tensor, "n s"],
        skip: Float[Tensor, " c"],
        m: int | None = None,
    ):
        self.step, self.rate, self.key, self.query, self.skip = step, rate, key, query, skip
        n, channels = step.shape
        self.in_shape, self.out_shape = (n, channels), (n if m is None else m, channels)
        self.dtype, self.device = step.dtype, step.device

    @property
    def flop(self) -> int:
        """Of each number of a state, and at each position: its decay, what is written, and what is read of it."""
        return 2 * (2 * self.in_shape[0] + self.out_shape[0]) * self.rate.numel()

    def matmat(self, X: Float[Tensor, "k n c"], t: Homogeneous = None) -> Float[Tensor, "k m c"]:
        """Go through the positions, and carry the states."""
        return self.run(X, self.step.new_zeros(len(X), *self.rate.shape))[0]

    def run(
        self, X: Float[Tensor, "k n c"], state: Float[Tensor, "k c s"]
    ) -> tuple[Float[Tensor, "k m c"], Float[Tensor, "k c s"]]:
        """Return the outputs of values that follow a state, and the state after them."""
        Y, skipped = X.new_empty(len(X), *self.out_shape), self.in_shape[0] - self.out_shape[0]
        for p in range(self.in_shape[0]):
            written = self.step[p] * X[:, p]
            state = torch.addcmul(state * self._decay(p), written[:, :, None], self.key[p])
            if p >= skipped:
                Y[:, p - skipped] = state @ self.query[p] + self.skip * X[:, p]
        return Y, state

    def rmatmat(self, Y: Float[Tensor, "k m c"]) -> Float[Tensor, "k n c"]:
        """Go through the positions backwards, and carry the cotangents of the states."""
        (n, channels), m = self.in_shape, self.out_shape[0]
        X = Y.new_empty(len(Y), n, channels)
        state = self.step.new_zeros(len(Y), *self.rate.shape)
        for p in reversed(range(n)):
            read = Y[:, p - n + m] if p >= n - m else None
            if read is not None:
                state.addcmul_(read[:, :, None].to(state), self.query[p])
            X[:, p] = self.step[p] * (state @ self.key[p])
            if read is not None:
                X[:, p] += self.skip * read
            state *= self._decay(p)
        return X

    def _decay(self, position: int) -> Float[Tensor, "c s"]:
        """Return the factor by which states decay at a position."""
        return torch.exp(self.step[position][:, None] * self.rate)


class Pool(LinearOperator):
    """Add up the positions of each of `c` consecutive groups by shares of each channel, `[n, o e]` to `[c, e]`.

    A position has `o` parts of `e` channels. The last of them goes to the position's own group of `r`, the one before
    it to the group after that, and so on. Positions after the last group are left out. `flop` leaves the products out,
    as they are elementwise.
    """

    def __init__(self, shares: Float[Tensor, "c o r e"], n: int):
        self.shares = shares
        count, parts, _, width = shares.shape
        self.in_shape, self.out_shape = (n, parts * width), (count, width)
        self.dtype, self.device = shares.dtype, shares.device

    def matmat(self, X: Float[Tensor, "k n oe"], t: Homogeneous = None) -> Float[Tensor, "k c e"]:
        """Return weighted sums of the positions of each group, and of groups before it."""
        count, parts, size, _ = self.shares.shape
        grouped = X[:, : count * size].unflatten(1, (count, size)).unflatten(3, (parts, -1))  # [k, c, r, o, e]
        Y = (grouped[..., -1, :] * self.shares[:, -1]).sum(2)
        for back in range(1, min(parts, count)):
            part = grouped[:, : count - back, :, -1 - back]
            Y[:, back:] += (part * self.shares[back:, -1 - back]).sum(2)
        return Y

    def rmatmat(self, Y: Float[Tensor, "k c e"]) -> Float[Tensor, "k n oe"]:
        """Give the cotangents of each group to its positions, and to those of groups before it."""
        count, parts, size, _ = self.shares.shape
        X = Y.new_zeros(len(Y), *self.in_shape)
        grouped = X[:, : count * size].unflatten(1, (count, size)).unflatten(3, (parts, -1))
        for back in range(min(parts, count)):
            grouped[:, : count - back, :, -1 - back] = self.shares[back:, -1 - back] * Y[:, back:, None]
        return X


class Beside(LinearOperator):
    """Operators side by side, each on its own part of the channels: a block-diagonal matrix at each position."""

    def __init__(self, *parts: LinearOperator):
        self.parts = parts
        n = parts[0].in_shape[0]
        self._in, self._out = [part.in_shape[1] for part in parts], [part.out_shape[1] for part in parts]
        self.in_shape, self.out_shape = (n, sum(self._in)), (n, sum(self._out))
        self.dtype, self.device = parts[0].dtype, parts[0].device

    def matmat(self, X: Float[Tensor, "k n in"], t: Homogeneous = None) -> Float[Tensor, "k n out"]:
        """Apply each part to its channels."""
        pairs = zip(self.parts, X.split(self._in, 2), strict=True)
        return torch.cat([part.matmat(own, t) for part, own in pairs], 2)

    def rmatmat(self, Y: Float[Tensor, "k n out"]) -> Float[Tensor, "k n in"]:
        """Apply the transpose of each part to its channels."""
        pairs = zip(self.parts, Y.split(self._out, 2), strict=True)
        return torch.cat([part.rmatmat(own) for part, own in pairs], 2)


class Concat(LinearOperator):
    """Operators with one input, their outputs side by side: all of the first, then the second; or so in each head."""

    def __init__(self, *parts: LinearOperator, heads: int = 1):
        self.parts, self.heads = parts, heads
        self._sizes = [part.out_shape[1] // heads for part in parts]
        self.in_shape, self.out_shape = parts[0].in_shape, (parts[0].in_shape[0], heads * sum(self._sizes))
        self.dtype, self.device = parts[0].dtype, parts[0].device

    def matmat(self, X: Float[Tensor, "k n in"], t: Homogeneous = None) -> Float[Tensor, "k n out"]:
        """Apply each part."""
        return torch.cat([part.matmat(X, t).unflatten(2, (self.heads, -1)) for part in self.parts], 3).flatten(2)

    def rmatmat(self, Y: Float[Tensor, "k n out"]) -> Float[Tensor, "k n in"]:
        """Add up the cotangents of the input of each part."""
        own = Y.unflatten(2, (self.heads, -1)).split(self._sizes, 3)
        return Sum._added(Y, (part.rmatmat(y.flatten(2)) for part, y in zip(self.parts, own, strict=True)))


class Take(LinearOperator):
    """Keep some of `e` channels, in order, `[n, e]` to `[n, c]`; the transpose puts zeros at the others."""

    def __init__(self, channels: Int[Tensor, " c"], n: int, e: int, *, dtype: torch.dtype, device: torch.device):
        self.channels = indices_on(device, channels)
        self.in_shape, self.out_shape = (n, e), (n, len(channels))
        self.dtype, self.device = dtype, device

    def matmat(self, X: Float[Tensor, "k n e"], t: Homogeneous = None) -> Float[Tensor, "k n c"]:
        """Take the channels."""
        return X[:, :, self.channels]

    def rmatmat(self, Y: Float[Tensor, "k n c"]) -> Float[Tensor, "k n e"]:
        """Put the channels back."""
        return Y.new_zeros(len(Y), *self.in_shape).index_add_(2, self.channels, Y)


class StreamMix(LinearOperator):
    """Mix `i` streams of `d` elements, side by side, at each position by a matrix of its own: `[n, i d]` to `[n, o d]`.

    `constant`, `[o d]`, is multiplied by the homogeneous coordinate and added at every position. `flop` leaves products
    out: they are few beside those of any matrix.
    """

    def __init__(self, weights: Float[Tensor, "n o i"], d: int, constant: Float[Tensor, " b"] | None = None):
        self.weights, self.d, self.constant = weights, d, constant
        n, out, into = weights.shape
        self.in_shape, self.out_shape = (n, into * d), (n, out * d)
        self.dtype, self.device = weights.dtype, weights.device

    def matmat(self, X: Float[Tensor, "k n a"], t: Homogeneous = None) -> Float[Tensor, "k n b"]:
        """Return weighted sums of the streams."""
        Y = (self.weights @ X.unflatten(2, (-1, self.d))).flatten(2)
        return Y if self.constant is None or t is None else Y + t[:, None, None] * self.constant

    def rmatmat(self, Y: Float[Tensor, "k n b"]) -> Float[Tensor, "k n a"]:
        """Return weighted sums by the transposed matrices."""
        return (self.weights.mT @ Y.unflatten(2, (-1, self.d))).flatten(2)


class Network(LinearOperator):
    """A feed-forward network with frozen factors, `down @ Scale(factor) @ up` at each position, as a sum over slabs.

    Many vectors are multiplied by the matrix of each position, `[out, in]`, where making it and using it takes fewer
    FLOP: for all dense rows, three quarters or less, since it has no hidden units.
    """

    def __init__(self, slabs: Sequence[tuple[Linear, Scale, Linear]]):
        """Take the `down`, factor and `up` of each slab of hidden units."""
        self.slabs = slabs
        self.parts = tuple(down @ scale @ up for down, scale, up in slabs)
        self.sum = Sum(*self.parts)
        self.in_shape, self.out_shape = self.sum.in_shape, self.sum.out_shape
        self.dtype, self.device = self.sum.dtype, self.sum.device

    def matmat(self, X: Float[Tensor, "k n d"], t: Homogeneous = None) -> Float[Tensor, "k n out"]:
        """Add up the results of the slabs, or multiply by the matrices and add `t` times the constant."""
        if not self._forms(len(X)):
            return self.sum.matmat(X, t)
        Y = X.new_empty(len(X), *self.out_shape)
        for p, matrix in enumerate(self.matrices()):
            _add_product(Y[:, p], X[:, p].to(self.dtype), matrix.T, beta=0, alpha=1.0)
        if t is not None:
            Y += t[:, None, None] * self.sum.matmat(X.new_zeros(1, *self.in_shape), t.new_ones(1))
        return Y

    def rmatmat(self, Y: Float[Tensor, "k n out"]) -> Float[Tensor, "k n d"]:
        """Add up the results of the transposed slabs, or multiply by the matrix of each position."""
        if not self._forms(len(Y)):
            return self.sum.rmatmat(Y)
        X = Y.new_empty(len(Y), *self.in_shape)
        for p, matrix in enumerate(self.matrices()):
            _add_product(X[:, p], Y[:, p].to(self.dtype), matrix, beta=0, alpha=1.0)
        return X

    def _forms(self, vectors: int) -> bool:
        """Return whether the matrices are the way for so many vectors."""
        widths = [scale.in_shape[1] for _, scale, _ in self.slabs]
        return forms(vectors, self.out_shape[1], self.in_shape[1], sum(widths), max(widths))

    def matrices(self) -> Float[Tensor, "n out d"]:
        """Return the matrix of each position."""
        n, (_, out), (_, d) = self.in_shape[0], self.out_shape, self.in_shape
        made = torch.zeros(n, out, d, dtype=self.dtype, device=self.device)
        for down, scale, up in self.slabs:
            inner = torch.cat([tile.clone() for *_, tile in up.weight.tiles()])  # [slab, d]
            for start, stop, tile in down.weight.tiles():
                scaled = torch.empty_like(tile)
                for matrix, factor in zip(made, scale.diagonal, strict=True):
                    torch.mul(tile, factor, out=scaled)
                    matrix[start:stop].addmm_(scaled, inner, alpha=down.gain * up.gain)
        return made


class Experts(LinearOperator):
    """A sum of operators that each act on some positions only: gather, apply, add back. `[n, d]` to `[n, d]`.

    The routed experts of a mixture, with routing and weights frozen. Each part is an operator on `[m, d]` for its own
    `m` positions, which may be on the host.
    """

    def __init__(self, routed: Sequence[tuple[Int[Tensor, " m"], LinearOperator]], n: int):
        every = indices_on(routed[0][1].device, torch.cat([positions for positions, _ in routed]))  # one copy
        self.positions = every.split([len(positions) for positions, _ in routed])
        self.parts = tuple(part for _, part in routed)
        self.in_shape = self.out_shape = (n, self.parts[0].in_shape[1])
        self.dtype, self.device = self.parts[0].dtype, self.parts[0].device

    def matmat(self, X: Float[Tensor, "k n d"], t: Homogeneous = None) -> Float[Tensor, "k n d"]:
        """Add up the results of the parts, each at its own positions."""
        Y = torch.zeros_like(X)
        for positions, part in zip(self.positions, self.parts, strict=True):
            Y.index_add_(1, positions, part.matmat(X[:, positions], t))
        return Y

    def rmatmat(self, Y: Float[Tensor, "k n d"]) -> Float[Tensor, "k n d"]:
        """Add up the results of the transposed parts, each at its own positions."""
        X = torch.zeros_like(Y)
        for positions, part in zip(self.positions, self.parts, strict=True):
            X.index_add_(1, positions, part.rmatmat(Y[:, positions]))
        return X


class Chain(LinearOperator):
    """The product `parts[0] @ parts[1] @ …`: the last part is applied first."""

    def __init__(self, *parts: LinearOperator):
        for left, right in pairwise(parts):
            if left.in_shape != right.out_shape:
                raise ValueError(
                    f"cannot chain {type(left).__name__} of input {left.in_shape} after "
                    f"{type(right).__name__} of output {right.out_shape}"
                )
        self.parts = parts
        self.in_shape, self.out_shape = parts[-1].in_shape, parts[0].out_shape
        self.dtype, self.device = parts[0].dtype, parts[0].device

    def matmat(self, X: Tensor, t: Homogeneous = None) -> Tensor:
        """Apply the parts from last to first."""
        for part in reversed(self.parts):
            X = part.matmat(X, t)
        return X

    def rmatmat(self, Y: Tensor) -> Tensor:
        """Apply the transposed parts from first to last."""
        for part in self.parts:
            Y = part.rmatmat(Y)
        return Y


class Sum(LinearOperator):
    """The sum of operators of equal shapes, such as `I + attn`."""

    def __init__(self, *parts: LinearOperator):
        for part in parts[1:]:
            if (part.in_shape, part.out_shape) != (parts[0].in_shape, parts[0].out_shape):
                raise ValueError(
                    f"cannot add operators {parts[0].in_shape} -> {parts[0].out_shape} and "
                    f"{part.in_shape} -> {part.out_shape}"
                )
        self.parts = parts
        self.in_shape, self.out_shape = parts[0].in_shape, parts[0].out_shape
        self.dtype, self.device = parts[0].dtype, parts[0].device

    def matmat(self, X: Tensor, t: Homogeneous = None) -> Tensor:
        """Add the results of the parts."""
        return self._added(X, (part.matmat(X, t) for part in self.parts))

    def rmatmat(self, Y: Tensor) -> Tensor:
        """Add the results of the transposed parts."""
        return self._added(Y, (part.rmatmat(Y) for part in self.parts))

    @staticmethod
    def _added(given: Tensor, terms: Iterator[Tensor]) -> Tensor:
        """Add up in place, as stacks may be large; but not into the argument, which `Identity` returns as it is."""
        total = next(terms)
        for term in terms:
            total = total + term if total is given else total.add_(term)
            del term  # before the next one is computed
        return total


class Transpose(LinearOperator):
    """The transpose of an operator's linear part; it carries no constant term."""

    def __init__(self, operator: LinearOperator):
        self.operator = operator
        self.parts = (operator,)
        self.in_shape, self.out_shape = operator.out_shape, operator.in_shape
        self.dtype, self.device = operator.dtype, operator.device

    def __repr__(self) -> str:
        """Return the operator and the shapes of its transpose on one line."""
        return f"{type(self.operator).__name__}.T {list(self.in_shape)} -> {list(self.out_shape)}"

    @property
    def T(self) -> LinearOperator:
        """The operator itself."""
        return self.operator

    def matmat(self, X: Tensor, t: Homogeneous = None) -> Tensor:
        """Apply the operator's transpose."""
        return self.operator.rmatmat(X)

    def rmatmat(self, Y: Tensor) -> Tensor:
        """Apply the operator."""
        return self.operator.matmat(Y)


class Matrix(NamedTuple):
    """A dense matrix as a `TiledMatrix` with one tile."""

    values: Float[Tensor, "out d"]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns, `(out, in)`."""
        return (self.values.shape[0], self.values.shape[1])

    @property
    def dtype(self) -> torch.dtype:
        """Element type."""
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        """Where the matrix lives."""
        return self.values.device

    def tiles(self) -> Iterator[tuple[int, int, Tensor]]:
        """Yield the whole matrix."""
        yield 0, len(self.values), self.values

    def read_ahead(self) -> None:
        """Do nothing: the matrix is in memory."""


def dot_test(operator: LinearOperator, generator: torch.Generator, k: int = 4) -> float:
    """Return how far `⟨A x, y⟩` and `⟨x, Aᵀ y⟩` are apart, relative to `‖A x‖ ‖y‖`, worst of `k` random pairs.

    The products are relative to the norms because the inner product itself may vanish. A correct pair stays within a
    modest multiple of the dtype's eps (the dot test of Claerbout, "Earth Soundings Analysis", 1992).
    """
    X = torch.randn(k, *operator.in_shape, generator=generator, dtype=torch.float64)
    Y = torch.randn(k, *operator.out_shape, generator=generator, dtype=torch.float64)
    X, Y = X.to(operator.device, operator.dtype), Y.to(operator.device, operator.dtype)
    AX, AtY, X, Y = (part.flatten(1).cpu().double() for part in (operator.matmat(X), operator.rmatmat(Y), X, Y))
    scale = (AX.norm(dim=1) * Y.norm(dim=1)).clamp_min(torch.finfo(torch.float64).tiny)
    return float((((AX * Y).sum(1) - (X * AtY).sum(1)).abs() / scale).max())
