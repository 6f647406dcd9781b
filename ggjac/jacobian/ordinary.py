"""The ordinary Jacobian of one prompt, `∂y/∂x` with nothing frozen, for contrast with the detached one.

There is no second model. Recording a block at its input (`ggjac.blocks`) also applies it: differentiated by autograd,
with everything live, that is the ordinary Jacobian of the block. Products go block by block, so that only one block's
graph exists at a time; it keeps no weights (see `_Forgetful`).
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ggjac.blocks import (
    BlockWeights,
    Past,
    WeightMatrix,
    block_inputs,
    entered,
    record_attention,
    record_rest,
    taken_up,
)
from ggjac.jacobian import FrozenNetwork
from ggjac.linop import Homogeneous, LinearOperator
from ggjac.sizes import CHUNK_BYTES


class OrdinaryJacobian(LinearOperator):
    """The derivative of one output vector `[d]` by all input embeddings `[n, d]`, exact (by autograd).

    Or by the residual stream after `layer` blocks, `[n, i]`, all else that later blocks read as it is at the prompt:
    keys and values of earlier blocks, and inputs of their own.

    `matmat` is forward mode, upwards, and `rmatmat` reverse mode, downwards; each block is computed again at the input
    in its tape. Either reads every weight once or twice, whatever the number of stacked vectors. For `k` of
    them, memory is about `k` times one block's activations, attention scores (heads x n²) or states of a recurrence
    (heads x elements of a key x n) among them.

    Attributes:
        position: the output position, counted from 0; later positions have no influence.
        layer: number of blocks before the stream by which it is the derivative; 0 for the embeddings.
        progress: if set, called as `progress(done, total)` after each block of a product.
        chunk_bytes: working memory that a chunk of dense rows may take.
    """

    def __init__(self, network: FrozenNetwork, position: int, layer: int = 0):
        n, d = network.x.shape
        self.layer = layer
        self.in_shape, self.out_shape = (n, network.config.width(layer)), (d,)
        self.dtype, self.device = network.x.dtype, network.x.device
        self.network, self.position = network, position
        self.progress: Callable[[int, int], None] | None = None
        self.chunk_bytes = CHUNK_BYTES
        rotations = {rope: (c[: position + 1], s[: position + 1]) for rope, (c, s) in network.frame.rotations.items()}
        self._frame = network.frame._replace(rotations=rotations)
        self._blocks = network.frame.config.block_count
        self._pasts: dict[int, State] = {}
        self._table = network.table()

    def matmat(self, X: Float[Tensor, "k n i"], t: Homogeneous = None) -> Float[Tensor, "k d"]:
        """Return `J x` for stacked tangents; a derivative has no constant term, so `t` is ignored."""
        state = {STREAM: X[:, : self.position + 1].to(self.device, self.dtype)}  # [k, m, i]
        if not self.layer:
            state = _pushed(self._start(self.network.outside), {STREAM: self._stream(0)}, state)
        for done, i in enumerate(range(self.layer, self._blocks), start=1):
            state = _pushed(self._block(i, self.network.weights(i)), self._state(i), state)
            self._report(done)
        return _pushed(self._norm(), {STREAM: self._last_stream}, {STREAM: state[STREAM]})[STREAM]

    def rmatmat(self, Y: Float[Tensor, "k d"]) -> Float[Tensor, "k n i"]:
        """Return `Jᵀ y` for stacked cotangents."""
        weights = _Forgetful(self.network.outside)
        state = {STREAM: Y.to(self.device, self.dtype)}
        state = _pulled(self._norm(weights), {STREAM: self._last_stream}, state, weights.forgetting())  # [k, m, d]
        for done, i in enumerate(reversed(range(self.layer, self._blocks)), start=1):
            weights = _Forgetful(self.network.weights(i))
            state = _pulled(self._block(i, weights), self._state(i), state, weights.forgetting())
            self._report(done)
        if not self.layer:
            weights = _Forgetful(self.network.outside)
            state = _pulled(self._start(weights), {STREAM: self._stream(0)}, state, weights.forgetting())
        X = Y.new_zeros(len(Y), *self.in_shape, device=self.device, dtype=self.dtype)
        X[:, : self.position + 1] = state[STREAM]
        return X

    def rows(self, chunk: int | None = None) -> Iterator[tuple[int, int, Tensor]]:
        """Yield rows of the dense Jacobian; by default as many at a time as fit into `chunk_bytes`."""
        config, (n, d) = self.network.frame.config, self.in_shape
        own, scores = config.recurrence, max(layer.heads for layer in config.layers) * n
        states = own.heads * (2 * own.key_size + min(n, 4 * own.key_size))  # and the pattern, or its chunks
        floats = 4 * n * (d + config.hidden_units) + 3 * n * max(scores, states)
        return super().rows(chunk or max(1, self.chunk_bytes // (floats * self.dtype.itemsize)))

    @cached_property
    def _last_stream(self) -> Float[Tensor, "m d"]:
        """The residual stream after all blocks, which is on no tape."""
        i = self._blocks - 1
        return self._block(i, self.network.weights(i))(self._state(i))[STREAM]

    def _stream(self, i: int) -> Float[Tensor, "m d"]:
        """Return the input of block `i` at the prompt, up to the output's position."""
        return self.network.tapes[i].x[: self.position + 1]

    def _state(self, i: int) -> "State":
        """Return all that block `i` reads at the prompt."""
        config, state = self._frame.config, {STREAM: self._stream(i)}
        state |= self._inputs
        for writer in config.writers & set(range(i)):
            state |= self._kept(writer)
        return state

    @cached_property
    def _inputs(self) -> "State":
        """The blocks' own inputs at the prompt; nothing where they have none."""
        return self._start(self.network.outside)({STREAM: self._stream(0)})

    def _kept(self, writer: int) -> "State":
        """Return the keys and values at the prompt of a block from which later ones read."""
        if writer not in self._pasts:
            x = self._stream(writer)
            past = record_attention(self.network.weights(writer), self._frame, writer, x).past[0]
            self._pasts[writer] = _named(writer, past)
        return self._pasts[writer]

    def _start(self, w: BlockWeights) -> "Function":
        """Return what blocks read of the input of block 0, as a function of it: the stream, and inputs of their own."""
        config, table = self._frame.config, self._table

        def start(state: State) -> State:
            if table is None:
                return {}
            return {INPUTS: block_inputs(w, config, table[: self.position + 1], state[STREAM])}

        return start

    def _block(self, i: int, w: BlockWeights) -> "Function":
        """Return block `i` as a function of all that it may read."""
        config = self._frame.config
        source = config.layers[i].source

        def block(state: State) -> State:
            past = None if source is None else Past(state.get(f"keys {source}"), state[f"values {source}"])
            frame = self._frame._replace(inputs=state.get(INPUTS))
            # `record_block`, but the tape of attention is freed before the feed-forward.
            x = entered(w, frame, i, state[STREAM])[1]
            attn = record_attention(w, frame, i, x, past)
            made = _named(i, attn.past[0]) if i in config.writers else {}
            middle = taken_up(config, attn.tape, x, attn.added)
            del attn
            return made | {STREAM: record_rest(w, frame, i, x, middle)[2]}

        return block

    def _norm(self, w: BlockWeights | None = None) -> "Function":
        """Return the final norm at the output's position, by the tensors outside the blocks, as a function."""

        def norm(state: State) -> State:
            h = state[STREAM]
            return {STREAM: self.network.freeze_norm(h[-1:], w).apply(h[-1:])[0]}

        return norm

    def _report(self, done: int) -> None:
        if self.progress:
            self.progress(done, self._blocks - self.layer)


# All that blocks read: the residual stream, inputs of their own, and the keys and values of earlier blocks, by name.
State = dict[str, Tensor]
# The parts of the state that it returns replace those before, or are new; the others stay as they are.
Function = Callable[[State], State]
STREAM, INPUTS = "stream", "inputs"


def _named(i: int, past: Past) -> State:
    """Return the keys and values of block `i` under their names; a recurrence has no keys that others read."""
    assert past.v is not None
    return {f"values {i}": past.v} if past.k is None else {f"keys {i}": past.k, f"values {i}": past.v}


def _pushed(f: Function, x: State, X: State) -> State:
    """Return the derivatives of the state after `f` at `x` along `k` directions: forward mode, all of them at once.

    A part of `x` that has none in `X` is constant.
    """
    k = len(X[STREAM])
    if not k:
        return X | {name: y.new_zeros(0, *y.shape) for name, y in f(x).items()}
    names: list[str] = []

    def along(c: Float[Tensor, " k"]) -> tuple[Tensor, ...]:
        y = f({name: part + torch.tensordot(c, X[name], 1) if name in X else part for name, part in x.items()})
        names[:] = y
        return tuple(y.values())

    with torch.no_grad():  # forward mode needs no graph; the columns of this Jacobian, at c = 0, are the derivatives
        columns = torch.autograd.functional.jacobian(
            along, X[STREAM].new_zeros(k), vectorize=True, strategy="forward-mode"
        )
    return X | {name: part.movedim(-1, 0) for name, part in zip(names, columns, strict=True)}


def _pulled(f: Function, x: State, Y: State, saving: AbstractContextManager | None = None) -> State:
    """Return the transposed derivative at `x` applied to `k` cotangents of the state after `f`: reverse mode.

    A part that `f` returns and nothing reads later has no cotangents.
    """
    if not len(Y[STREAM]):
        return {name: part.new_zeros(0, *part.shape) for name, part in x.items()}
    x = {name: part.detach().requires_grad_() for name, part in x.items()}
    with saving or nullcontext(), torch.enable_grad():
        y = f(x)
    read = [name for name in y if name in Y]
    X = {name: Y[name] for name in x if name not in y and name in Y}  # what stays as it is
    if not read:
        return X
    found = torch.autograd.grad(
        [y[name] for name in read],
        list(x.values()),
        [Y[name] for name in read],
        is_grads_batched=True,
        allow_unused=True,
    )
    for name, part in zip(x, found, strict=True):
        if part is not None:
            X[name] = X[name] + part if name in X else part
    return X


class _Tile(NamedTuple):
    """A saved tile, as a graph keeps it: the rows of the matrix to read again, and the view that the graph had."""

    matrix: WeightMatrix
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int


class _Forgetful:
    """The tensors of a block, whose tiles no graph keeps: they are read again when the backward pass needs them.

    A graph that saved them would keep the block dense, or the wrong numbers where tiles share a scratch buffer.
    """

    def __init__(self, weights: BlockWeights):
        self._weights = weights
        self._on_loan: dict[int, WeightMatrix] = {}  # by address, while a product uses them
        self.slab = weights.slab

    @property
    def outside(self) -> "_Forgetful":
        """The tensors that belong to no block, likewise."""
        found = _Forgetful(self._weights.outside)
        found._on_loan = self._on_loan
        return found

    def __contains__(self, name: str) -> bool:
        return name in self._weights

    def matrix(self, name: str, expert: int | None = None) -> WeightMatrix:
        """Return a matrix whose tiles are recognised when a graph saves them."""
        return _Lent(self._weights.matrix(name, expert), self._on_loan)

    def vector(self, name: str, expert: int | None = None) -> Tensor:
        """Return a small dense tensor; it is not in a scratch buffer, so that a graph may keep it."""
        return self._weights.vector(name, expert)

    def gain(self, name: str, expert: int | None = None) -> float:
        """Return the constant factor of a matrix."""
        return self._weights.gain(name, expert)

    def wide_vector(self, name: str) -> Tensor:
        """Return a small dense tensor in float32 at least."""
        return self._weights.wide_vector(name)

    def shares(self, stem: str) -> bool:
        """Return whether others have more terms of a sum."""
        return self._weights.shares(stem)

    def holds(self, expert: int) -> bool:
        """Return whether an expert is among these weights."""
        return self._weights.holds(expert)

    def agreed(self, found: Tensor) -> Tensor:
        """Return a choice as all make it."""
        return self._weights.agreed(found)

    def joined(self, part: LinearOperator, *, inputs: bool = True, outputs: bool = True) -> LinearOperator:
        """Return an operator, completed by those who have the rest of it."""
        return self._weights.joined(part, inputs=inputs, outputs=outputs)

    def gathered(self, own: Tensor, stem: str) -> Tensor:
        """Return numbers of each head, from those of some."""
        return self._weights.gathered(own, stem)

    def forgetting(self) -> AbstractContextManager:
        """Return a context in which graphs are built without the tiles."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)

    def _pack(self, saved: Tensor) -> Tensor | _Tile:
        matrix = self._on_loan.get(saved.untyped_storage().data_ptr())
        if matrix is None:
            return saved.detach()  # the tensor itself would keep alive the node that saves it
        return _Tile(matrix, saved.shape, saved.stride(), int(saved.storage_offset()))


def _unpack(kept: Tensor | _Tile) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    ((_, _, tile),) = kept.matrix.tiles()
    return tile.as_strided(kept.shape, kept.stride, kept.offset)


class _Lent:
    """A matrix that notes the address of the tile in use."""

    def __init__(self, matrix: WeightMatrix, on_loan: dict[int, WeightMatrix]):
        self._matrix, self._on_loan = matrix, on_loan
        self.shape, self.dtype, self.device = matrix.shape, matrix.dtype, matrix.device

    def tiles(self) -> Iterator[tuple[int, int, Tensor]]:
        """Yield the tiles, noting each until the next one is requested."""
        for start, stop, tile in self._matrix.tiles():
            address = tile.untyped_storage().data_ptr()
            self._on_loan[address] = self._matrix.rows(start, stop)
            yield start, stop, tile
            del self._on_loan[address]

    def read_ahead(self) -> None:
        """Prefetch the matrix."""
        self._matrix.read_ahead()

    def rows(self, start: int, stop: int) -> WeightMatrix:
        """Return rows of the matrix, tracked likewise."""
        return _Lent(self._matrix.rows(start, stop), self._on_loan)

    def columns(self, start: int, stop: int) -> WeightMatrix:
        """Return columns of the matrix, tracked likewise."""
        return _Lent(self._matrix.columns(start, stop), self._on_loan)
