"""Which way to the singular triplets of a prompt's Jacobian costs less: sweeps, or the matrix itself and LAPACK.

The iteration (`ggjac.svd.iteration`) sends a block of vectors through the network in every sweep, for each map; the
matrix takes one vector for each of its `d` rows, and has the maps of all positions in it. On large models `d` is far
more than sweeps times vectors, on small ones it is less. Sizes decide, at rates of one core that were measured once
(docs/benchmarks.md), not a clock: a command takes the same way on every machine, and whenever it is resumed.
"""

from typing import NamedTuple

from ggjac.config import ModelConfig
from ggjac.config.mixers import MIXERS
from ggjac.sizes import EXPECTED_SWEEPS, block_width

# FLOP per second of one core: in products of a sweep, and in LAPACK's decomposition.
PRODUCTS, LAPACK = 100e9, 35e9

# Seconds of one core that the matrix must save. Where nothing takes long, results stay those of the iteration, whose
# digits depend on its tolerance.
WORTH = 1.0


class Task(NamedTuple):
    """Triplets to be found at one prompt.

    Attributes:
        rank: triplets of each map.
        joint: whether of the map from all positions.
        tokens: number of positions whose own maps are decomposed.
    """

    rank: int
    joint: bool = True
    tokens: int = 0


class Ways(NamedTuple):
    """What each way takes: seconds of one core."""

    sweeps: float
    matrix: float


def ways(config: ModelConfig, task: Task, n: int, start: int = 0, stop: int | None = None) -> Ways:
    """Return what a task takes on a prompt whose output depends on `n` positions, by maps of blocks `start:stop`."""
    d = config.d
    blocks = range(start, config.block_count if stop is None else stop)
    vectors = task.tokens * min(block_width(task.rank, d), d)
    vectors += min(block_width(task.rank, n * d), d) if task.joint else 0
    iterated = EXPECTED_SWEEPS * vectors * n * sum(_vector_flop(config, i) for i in blocks)
    rows = d * n * sum(_row_flop(config, i) for i in blocks)
    decomposed = task.tokens * _svd_flop(d, d) + (_svd_flop(d, n * d) if task.joint else 0)
    return Ways(iterated / PRODUCTS, rows / PRODUCTS + decomposed / LAPACK)


def takes_matrix(
    config: ModelConfig, task: Task, n: int, item: int, room: int, start: int = 0, stop: int | None = None
) -> bool:
    """Return whether the matrix is the way: clearly cheaper, in room for its bytes, and exact.

    Args:
        config, task, n, start, stop: as `ways` takes them.
        item: bytes of an element; rows in 16 bits would hide their own rounding from the residuals.
        room: bytes that the matrix, `[d, n d]`, may take.
    """
    if item < 4 or n * config.d**2 * item > room:
        return False
    found = ways(config, task, n, start, stop)
    return found.matrix + WORTH < found.sweeps


def _vector_flop(config: ModelConfig, i: int) -> int:
    """Return the FLOP of a vector in a block for each position: projections of its mixers, and its networks."""
    own, d = config.layers[i], config.d
    units = own.hidden_units + own.experts_used * own.expert_units
    units += config.expert_shared_feed_forward_length if own.routed else 0
    return 2 * d * (_mixed(config, i) + 2 * units)


def _row_flop(config: ModelConfig, i: int) -> int:
    """Return the FLOP of one of all `d` rows, which multiply by the matrix of a dense network; see `linop.Network`."""
    d, units = config.d, config.layers[i].hidden_units
    return _vector_flop(config, i) - max(0, 4 * d * units - 2 * d * (units + d))


def _mixed(config: ModelConfig, i: int) -> int:
    """Return the widths of what a block's mixers read and write, values and heads."""
    own, sizes, width = config.layers[i], config.recurrence, 0
    for mixer in own.mixers:
        if MIXERS[mixer].recurrent:
            width += 2 * sizes.heads * sizes.value_size
        elif MIXERS[mixer].convolution:
            width += 2 * config.d
        else:
            width += (own.heads + own.kv_heads) * own.value_size
    return width


def _svd_flop(d: int, columns: int) -> int:
    """Return the FLOP of all triplets of a matrix `[d, columns]`: its factor from the right, and that one's SVD."""
    return 6 * columns * d**2 + 10 * d**3
