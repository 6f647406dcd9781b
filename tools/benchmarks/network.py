"""Predict how long a sweep takes on several processes, by arithmetic: nothing is measured, and no network is used.

    python tools/benchmarks/network.py

Three ways to share one prompt's sweep: *terms* (what ggjac does: each has some hidden units and heads, and all add up
after each branch), *vectors* (each has all weights and some of the stacked vectors), and a *pipeline* (each has some
blocks, and vectors in micro-batches pass through them). Assumptions: a ring all-reduce at the line's rate, not
overlapped with work; weights stay in memory where they fit, and otherwise are read while others are computed; every
process has the same share. Rates are in dequantized weights, float32 operations, and bytes of the disk, each a second.
"""

import math
from typing import NamedTuple


class Shape(NamedTuple):
    """A model: live weights of a sweep, bytes of a weight, the part that is attention, key/value heads."""

    name: str
    blocks: int
    d: int
    live: float
    bytes_each: float
    attention: float
    heads: int = 8


class Box(NamedTuple):
    """A machine, or one GPU of it."""

    name: str
    weights: float
    flop: float
    memory: float
    disk: float


class Net(NamedTuple):
    """A network: bytes and messages in a second."""

    name: str
    bytes: float
    latency: float


SHAPES = [Shape("70B", 80, 8192, 43.6e9, 0.602, 0.138), Shape("405B", 126, 16384, 255.8e9, 0.6, 0.14)]
TWO_CORES = Box("2 cores (measured)", 2.8e9, 285e9, 20e9, 0.9e9)
DESKTOP = Box("16-core desktop", 20e9, 1.3e12, 52e9, 5e9)
H100 = Box("H100", 90e9, 50e12, 74e9, 50e9)
NETS = {
    net.name: net
    for net in [
        Net("1 Gb", 0.117e9, 100e-6),
        Net("10 Gb", 1.17e9, 50e-6),
        Net("100 Gb", 11.7e9, 20e-6),
        Net("NVLink", 300e9, 15e-6),
    ]
}


def work(shape: Shape, box: Box, columns: float, part: float = 1.0, passes: int = 1) -> float:
    """Return the seconds of a part of the weights, dequantized `passes` times."""
    seconds = part * shape.live * (passes / box.weights + 2 * columns / box.flop)
    return max(seconds, max(0.0, part * shape.live * shape.bytes_each - box.memory) / box.disk)


def terms(shape: Shape, box: Box, net: Net, n: int, vectors: int, ranks: int) -> float:
    """Return the seconds of a sweep whose terms are divided, with two all-reduces in every block."""
    part = (1 - shape.attention) / ranks + shape.attention / min(ranks, shape.heads)
    size = vectors * n * shape.d * 4
    once = 2 * (ranks - 1) / ranks * size / net.bytes + 2 * math.ceil(math.log2(ranks)) * net.latency
    return work(shape, box, n * vectors, part) + 2 * shape.blocks * once


def stacked(shape: Shape, box: Box, net: Net, n: int, vectors: int, ranks: int) -> float:
    """Return the seconds of a sweep whose vectors are divided."""
    own = math.ceil(vectors / ranks)
    return work(shape, box, n * own) + vectors * n * shape.d * 4 / net.bytes


def pipeline(shape: Shape, box: Box, net: Net, n: int, vectors: int, ranks: int) -> float:
    """Return the seconds of a sweep whose blocks are divided, with the best number of micro-batches."""

    def seconds(batches: int) -> float:
        stage = work(shape, box, n * vectors / batches, 1 / ranks)
        hop = vectors * n * shape.d * 4 / batches / net.bytes + net.latency
        return (batches + ranks - 1) * max(stage, hop)

    return min(seconds(batches) for batches in range(1, vectors + 1))


def main() -> None:
    """Print the table."""
    print("| model, tokens, vectors | machines | network | processes | alone | vectors | pipeline | terms |")
    print("|---|---|---|---|---|---|---|---|")
    cases = [(SHAPES[0], TWO_CORES, 8, 32), (SHAPES[0], DESKTOP, 400, 24), (SHAPES[1], DESKTOP, 8, 32)]
    rows = [(*case, net, ranks) for case in cases for net in ("1 Gb", "10 Gb") for ranks in (2, 8)]
    rows += [(SHAPES[1], H100, 8, 32, net, 8) for net in ("100 Gb", "NVLink")]
    for shape, box, n, vectors, net, ranks in rows:
        alone = work(shape, box, n * vectors)
        ways = [way(shape, box, NETS[net], n, vectors, ranks) for way in (stacked, pipeline, terms)]
        cells = " | ".join(f"{seconds:.3g} s ({alone / seconds:.1f}x)" for seconds in ways)
        print(f"| {shape.name}, {n}, {vectors} | {box.name} | {net} | {ranks} | {alone:.3g} s | {cells} |")


if __name__ == "__main__":
    main()
