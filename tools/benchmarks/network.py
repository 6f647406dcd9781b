"""Predict how long a sweep takes on several processes, by the formulas of `ggjac plan`: no network is used.

    python tools/benchmarks/network.py

Ways to share the sweeps of one prompt: *terms* (what ggjac does: each has some hidden units and heads, and all add up
after each branch), *vectors* (each has all weights and some of the stacked vectors), a *pipeline* (each has some
blocks, and vectors pass through them in micro-batches, of the best number), and *both*: groups in which terms are
divided, and vectors among groups, of the best size.

Terms come from the planner alone (`planner.seconds` of a plan with a division): a ring adds up at the network's rate
while nothing is computed; weights stay in memory as far as the planner keeps them there, dequantized where there is
room, and otherwise are read while others are computed; every process is on a machine of its own. The other ways change
the plan's number of vectors, and add what they send. The machines' rates are assumed: weights dequantized, float32
operations, and bytes of the disk, each a second. Files are headers of the right shape, without weights.
"""

import math
import sys
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from ggjac.config import ModelConfig, read_config
from ggjac.division import largest
from ggjac.gguf import GGUFFile, open_gguf
from ggjac.planner import Budget, Network, Plan, make, parse_rate, seconds
from ggjac.planner.work import command_work

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import make_synthetic_gguf as synthetic

SHAPES = {
    "70B": synthetic.PRESETS["llama-3.3-70b"],
    "405B": replace(synthetic.PRESETS["llama-3.3-70b"], layers=126, d=16384, heads=128, feed_forward=53248),
}


@dataclass(frozen=True)
class Box:
    """A machine, or one GPU of it: its rates, and the bytes of memory that weights and work may take."""

    name: str
    weights: float
    flop: float
    memory: int
    disk: float
    device: str = "cpu"
    bus: float = math.inf
    copy: float = 50e9
    touch: float = math.inf
    call: float = 0.0
    host: float = 1e12
    rounding: float = 1.0

    def dequantize(self, type: str) -> float:
        """Return the same rate for all storage types."""
        return self.weights

    def gemm(self, columns: int) -> float:
        """Return the same rate for all products."""
        return self.flop


TWO_CORES = Box("2 cores, 24 GB", 2.8e9, 285e9, 20 << 30, 0.9e9, copy=20e9)
DESKTOP = Box("16 cores, 64 GB", 20e9, 1.3e12, 52 << 30, 5e9)
H100 = Box("H100", 90e9, 50e12, 74 << 30, 50e9, device="cuda", bus=50e9, copy=3e12)


class Case:
    """A model, a prompt's length, the vectors of a sweep, and what computes it."""

    def __init__(self, folder: Path, shape: str, box: Box, n: int, vectors: int):
        self.name, self.box, self.n, self.vectors = f"{shape}, {n}, {vectors}", box, n, vectors
        self.file, self.config = opened(folder, shape)

    @cache  # noqa: B019  # few cases, that live as long as the program
    def sweep(self, ranks: int = 1, share: int = 1, network: Network | None = None) -> float:
        """Return the seconds of a sweep, of a process that has a part of the terms and of the vectors."""
        found = seconds(self.plan(ranks, share), self.box, free=self.box.memory, network=network)
        return next(part.each for part in found.parts if part.what == "svd")

    def plan(self, ranks: int, share: int) -> Plan:
        """Return the plan of an SVD with a part of the vectors in each sweep."""
        work = command_work("svd", self.config, self.n, "float32")
        own = math.ceil(self.vectors / share)
        narrow = [tuple(one._replace(width=own) for one in step.bases) for step in work.sweeps]
        steps = [replace(step, vectors=own, bases=bases) for step, bases in zip(work.sweeps, narrow, strict=True)]
        on_device = self.box.device != "cpu"
        budget = Budget(ram=64 << 30 if on_device else self.box.memory, vram=self.box.memory if on_device else None)
        division = largest(self.config, self.file.tensors, ranks)
        work = replace(work, steps=tuple(steps))
        return make(self.file, self.config, work, device=self.box.device, budget=budget, division=division)

    @property
    def products(self) -> int:
        """Bytes of the products of a sweep down."""
        return self.vectors * self.n * self.config.d * 4

    def by_vectors(self, network: Network, ranks: int) -> float:
        """Return the seconds of a sweep whose vectors are divided."""
        return self.sweep(1, ranks) + self.products / network.rate

    def pipeline(self, network: Network, ranks: int) -> float:
        """Return the seconds of a sweep whose blocks are divided, with the best number of micro-batches."""

        def with_batches(batches: int) -> float:
            hop = self.products / batches / network.rate + network.latency
            return (batches + ranks - 1) * max(self.sweep(1, batches) / ranks, hop)

        return min(with_batches(1 << i) for i in range(self.vectors.bit_length()))

    def both(self, network: Network, ranks: int) -> float:
        """Return the seconds of a sweep with terms divided in groups of the best size, and vectors among groups."""
        found = [self.sweep(ranks, 1, network)]
        for groups in (1 << i for i in range(1, ranks.bit_length())):
            if groups <= min(ranks, self.vectors):
                each = self.sweep(ranks // groups, groups, network)
                found.append(each + self.products / network.rate)
        return min(found)


@cache
def opened(folder: Path, name: str) -> tuple[GGUFFile, ModelConfig]:
    """Return a file of a shape, which has a header and holes in place of weights."""
    path, shape = folder / f"{name}.gguf", SHAPES[name]
    listed = list(synthetic.tensors(shape, "Q4_K_M"))
    synthetic.header(path, name, shape, "Q4_K_M", listed)
    size = path.stat().st_size
    size += synthetic.padding(size) + sum(one.nbytes + synthetic.padding(one.nbytes) for one in listed)
    with path.open("ab") as written:
        written.truncate(size)
    file = open_gguf(path)
    return file, read_config(file.metadata, {name: info.shape for name, info in file.tensors.items()})


def main() -> None:
    """Print the table."""
    print("| model, tokens, vectors | machines | network | processes | alone | vectors | pipeline | terms | both |")
    print("|---|---|---|---|---|---|---|---|---|")
    with TemporaryDirectory() as place:
        given = [("70B", TWO_CORES, 8, 32), ("70B", DESKTOP, 400, 24), ("405B", DESKTOP, 8, 32)]
        rows = [(Case(Path(place), *one), net, ranks) for one in given for net in ("1Gb", "10Gb") for ranks in (2, 8)]
        card = Case(Path(place), "405B", H100, 8, 32)
        rows += [(card, net, 8) for net in ("100Gb", "300GB")]
        rows += [(rows[0][0], "10Gb", 64), (card, "300GB", 64)]
        for case, net, ranks in rows:
            network, alone = Network(parse_rate(net)), case.sweep()
            ways = [way(network, ranks) for way in (case.by_vectors, case.pipeline)]
            ways += [case.sweep(ranks, 1, network), case.both(network, ranks)]
            cells = " | ".join(f"{took:.3g} s ({alone / took:.1f}x)" for took in ways)
            print(f"| {case.name} | {case.box.name} | {net} | {ranks} | {alone:.3g} s | {cells} |", flush=True)


if __name__ == "__main__":
    main()
