"""Which way to the singular triplets of a prompt's Jacobian costs less: sweeps, and how wide, or the matrix and LAPACK.

The iteration (`ggjac.svd.iteration`) sends a block of vectors through the network in every sweep, for each map; the
matrix takes one vector for each of its `d` rows, and has the maps of all positions in it. On large models `d` is far
more than sweeps times vectors, on small ones it is less. Sizes decide, at rates of one core that were measured once
(docs/benchmarks.md), not a clock: a command takes the same way on every machine, and whenever it is resumed.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from ggjac.config import Layer, ModelConfig
from ggjac.config.mixers import MIXERS
from ggjac.sizes import EXPECTED_SWEEPS, MATRIX_BYTES, block_width, chunk_floats

# FLOP per second of one core: in products of a sweep, and in LAPACK's decomposition.
PRODUCTS, LAPACK = 100e9, 35e9
# Weights that one core dequantizes per second.
DEQUANTIZED = 1e9

# Sweeps of an iteration on a matrix for few triplets, to residuals of `ggjac.svd.CLOSE`, and seconds of each that are
# not its products': most is the algebra of small matrices.
MATRIX_SWEEPS, MATRIX_SWEEP = 16, 1.2e-3

# Seconds of one core that another way must save. Where nothing takes long, results keep their digits.
WORTH = 0.25

# Live weights up to which sweeps are as cheap as their arithmetic. Those of larger models may come from the disk each
# time, at a price that depends on the machine.
KEPT = 1 << 28
# Sweeps that a narrow block takes where a wide one takes `EXPECTED_SWEEPS`.
NARROW_SWEEPS = 10


class Task(NamedTuple):
    """Triplets to be found at one prompt.

    Attributes:
        rank: triplets of each map.
        joint: number of maps from all positions: one, or with the same but for positions that it excludes two.
        tokens: number of positions whose own maps are decomposed.
    """

    rank: int
    joint: int = 1
    tokens: int = 0


class Block(NamedTuple):
    """How many vectors of each map an iteration stacks, and the sweeps that are expected of it."""

    width: int
    sweeps: int


def block(config: ModelConfig, rank: int, n: int, size: int) -> Block:
    """Return the block of an iteration for `rank` triplets, whose input vectors have `size` elements.

    A wide one saves sweeps, a narrow one arithmetic: of 8 triplets to 1e-3, 32 vectors take 8 sweeps and 16 take 10.
    """
    wide = Block(min(block_width(rank, size), config.d), EXPECTED_SWEEPS)
    narrow = Block(min(rank + 8, wide.width), NARROW_SWEEPS)
    flop = sum(_vector_flop(config, i) for i in range(config.block_count))
    saved = (wide.width * wide.sweeps - narrow.width * narrow.sweeps) * n * flop / PRODUCTS
    more = (narrow.sweeps - wide.sweeps) * (flop / 2) / DEQUANTIZED
    return narrow if saved - more > WORTH and flop / 2 <= KEPT else wide


class Ways(NamedTuple):
    """What each way takes: seconds of one core."""

    sweeps: float
    matrix: float


def ways(config: ModelConfig, task: Task, n: int, start: int = 0, stop: int | None = None) -> Ways:
    """Return what a task takes on a prompt whose output depends on `n` positions, by maps of blocks `start:stop`."""
    d, wide = config.d, config.width(start)
    blocks = range(start, config.block_count if stop is None else stop)
    vectors = task.tokens * math.prod(block(config, task.rank, n, wide))
    vectors += task.joint * math.prod(block(config, task.rank, n, n * wide))
    iterated = vectors * n * sum(_vector_flop(config, i) for i in blocks)
    rows = d * n * sum(_flop_of(config, i, d) for i in blocks)
    parts = [*([wide] * task.tokens), *([n * wide] * task.joint)]
    decomposed = sum(decomposition(task.rank, d, columns).seconds for columns in parts)
    return Ways(iterated / PRODUCTS, rows / PRODUCTS + decomposed)


def takes_matrix(config: ModelConfig, task: Task, n: int, item: int, start: int = 0, stop: int | None = None) -> bool:
    """Return whether the matrix, `[d, n d]`, is the way: clearly cheaper, exact, and of at most `MATRIX_BYTES`.

    A budget does not decide: results would depend on how many processes share the memory.

    Args:
        config, task, n, start, stop: as `ways` takes them.
        item: bytes of an element; rows in 16 bits would hide their own rounding from the residuals.
    """
    if item < 4 or n * config.width(start) * config.d * item > MATRIX_BYTES:
        return False
    found = ways(config, task, n, start, stop)
    return found.matrix + WORTH < found.sweeps


def take_matrices(config: ModelConfig, rank: int, n: int, item: int, spans: Sequence[tuple[int, int]]) -> bool:
    """Return whether maps inside the network come from their matrices, which one pass makes for all of them.

    Those of one block alone never do.

    Args:
        config, n, item: as `takes_matrix` takes them.
        rank: triplets of each map.
        spans: the first block of each map, and the one after its last: from one start, or to one end.
    """
    if item < 4 or all(stop == start + 1 for start, stop in spans):
        return False
    d, size, wide = config.d, n * config.d, max(config.width(stop - 1) for _, stop in spans)
    vectors = d if share_rows(spans) else size
    if vectors * chunk_floats(n, wide, config.hidden_units) * item > MATRIX_BYTES:
        return False
    width, sweeps = block(config, rank, n, size)
    iterated = made = 0.0
    for i in range(config.block_count):
        if aboard := width * sum(start <= i < stop for start, stop in spans):
            iterated += sweeps * aboard * n * _flop_of(config, i, aboard)
            made += vectors * n * _flop_of(config, i, vectors)
    decomposed = sum(decomposition(rank, d, n * config.width(start)).seconds for start, _ in spans)
    return made / PRODUCTS + decomposed + WORTH < iterated / PRODUCTS


def share_rows(spans: Sequence[tuple[int, int]]) -> bool:
    """Return whether the matrices of maps come from rows that go down, and not from columns that go up.

    Maps to one end share their rows, maps from one start their columns. Of one map alone there are fewer rows.
    """
    return len(spans) == 1 or len({start for start, _ in spans}) > 1


def _vector_flop(config: ModelConfig, i: int) -> int:
    """Return the FLOP of a vector in a block for each position: projections of its mixers, and its networks."""
    own, d = config.layers[i], config.d
    units = own.hidden_units + sum(experts.used * experts.units for experts in config.mixtures(own))
    units += config.expert_shared_feed_forward_length if own.routed else 0
    return 2 * d * (_mixed(config, i) + 2 * units)


def _flop_of(config: ModelConfig, i: int, vectors: int) -> float:
    """Return the FLOP of one of many vectors, which multiply by the matrix of a dense network; see `linop.Network`."""
    d, units = config.d, config.layers[i].hidden_units
    return _vector_flop(config, i) - max(0.0, 4 * d * units - 2 * d * (units * d / vectors + d))


def _mixed(config: ModelConfig, i: int) -> int:
    """Return the widths of what a block's mixers read and write, values and heads."""
    own, state, width = config.layers[i], config.recurrence, 0
    for mixer in own.mixers:
        if MIXERS[mixer].recurrent:
            width += 2 * state.heads * state.value_size
        elif MIXERS[mixer].convolution:
            width += 2 * config.d
        elif MIXERS[mixer].grouped:  # of `rank` rows, each has the columns of a group
            sizes = own.compressed
            made = own.value_size * (1 + (sizes.windows if sizes.ratio else 0))
            width += made + sizes.groups * sizes.rank + sizes.rank * own.heads * own.value_size // config.d
        else:
            width += (own.heads + own.kv_heads) * own.value_size
    return width


class Algebra(NamedTuple):
    """How triplets of a matrix are found: whether by iteration on it, and what that takes: seconds of one core."""

    iterated: bool
    seconds: float


def decomposition(rank: int, d: int, columns: int, item: int = 4) -> Algebra:
    """Return the cheaper way to the `rank` largest triplets of a matrix `[d, columns]`, of elements of `item` bytes.

    LAPACK finds all of them, of a wide matrix after its triangular factor. In float64, where an iteration would have to
    go much further to give the same digits, that is the way.
    """
    lapack = ((2 * columns * d**2 if columns > d else 0) + 10 * d**3) / LAPACK
    width = rank + 8
    small = 5 * (MATRIX_SWEEPS * width / 2) ** 3 / LAPACK  # decompositions of what the bases hold
    iterated = MATRIX_SWEEPS * (2 * d * columns * width / PRODUCTS + small + MATRIX_SWEEP)
    return Algebra(True, iterated) if item == 4 and iterated < lapack else Algebra(False, lapack)


def mixed_width(config: ModelConfig, own: Layer, mixer: str) -> int:
    """Return the elements of what a mixer's heads have mixed at a position."""
    if MIXERS[mixer].recurrent:
        return config.recurrence.heads * config.recurrence.value_size
    return own.heads * own.value_size if MIXERS[mixer].has_heads else config.d


def edge_readers(config: ModelConfig, block: int) -> int:
    """Return the components of a block that read the stream: heads, or mixers without any, the MLP and others."""
    own = config.layers[block]
    kinds = [MIXERS[mixer] for mixer in own.mixers]
    heads = sum((config.recurrence.heads if kind.recurrent else own.heads) if kind.has_heads else 1 for kind in kinds)
    return heads + (config.row.laurel and bool(kinds)) + bool(own.routed or own.hidden_units) + bool(config.inputs)


def edge_rows(config: ModelConfig, block: int, top: int) -> int:
    """Return the cotangents that the output projections of a block are given, in a pass from before block `top`."""
    own = config.layers[block]
    above = sum(edge_readers(config, i) for i in range(block + 1, top))
    joined = bool(config.inputs) + (bool(own.routed or own.hidden_units) and not config.row.parallel)
    return 1 + (top == config.block_count) + above + joined


class EdgePass(NamedTuple):
    """The blocks whose readers travel down together, from before `top` to `bottom`, and their `rows` in the end."""

    top: int
    bottom: int
    rows: int


def edge_passes(config: ModelConfig, n: int, item: int, chunk_bytes: int) -> list[EdgePass]:
    """Return the passes in which `ggjac.analysis.edges` finds all edges, with `item` bytes for each float."""
    found, top = list[EdgePass](), config.block_count
    while not found or top:
        rows, bottom = 1 + (not found), 0
        for i in reversed(range(top)):
            rows += edge_readers(config, i)
            if i and rows > 1 and rows * n * config.width(i) * item > chunk_bytes:
                bottom = i
                break
        found.append(EdgePass(top, bottom, rows))
        top = bottom
    return found
