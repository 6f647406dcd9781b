"""How long a plan takes on a machine whose rates are known; `ggjac.planner.bench` measures them."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from ggjac.planner import machine
from ggjac.planner.network import Network
from ggjac.planner.passes import Pass, total
from ggjac.planner.plan import Plan
from ggjac.planner.work import Decomposition, Lookup, Sweeps
from ggjac.sizes import ITEM_BYTES


class Rates(Protocol):
    """The rates of a machine, per second."""

    @property
    def disk(self) -> float:
        """Bytes read from the model's disk."""

    @property
    def bus(self) -> float:
        """Bytes copied to the device; infinite on the CPU."""

    @property
    def copy(self) -> float:
        """Bytes of memory that a copy reads and writes together."""

    @property
    def touch(self) -> float:
        """Bytes of memory that is written for the first time: the system clears it page by page."""

    @property
    def call(self) -> float:
        """Seconds, not per second: the cost of applying a matrix besides its bytes, weights and FLOP."""

    @property
    def host(self) -> float:
        """FLOP of products on the CPU, where a device does the others."""

    @property
    def rounding(self) -> float:
        """How many times as fast weights are dequantized and multiplied in bfloat16; no rate."""

    def dequantize(self, type: str) -> float:
        """Weights of a storage type."""

    def gemm(self, columns: int) -> float:
        """FLOP of a product of tiles with this number of columns."""


@dataclass(frozen=True)
class Time:
    """Seconds of one part of the work; `count` passes, each with these shares.

    Attributes:
        what: label of the part.
        count: number of passes.
        disk, bus: reading the file, and copying to the device; both overlap with the other shares.
        dequantize, gemm, writes: dequantizing, multiplying, and writing products, one after another.
        calls: fixed cost of applying matrices.
        net: adding up with other ranks, which overlaps with nothing.
    """

    what: str
    count: int
    disk: float
    bus: float
    dequantize: float
    gemm: float
    writes: float
    calls: float
    net: float = 0.0

    @property
    def each(self) -> float:
        """Seconds of one pass: the slowest of reading, copying and computing, the calls, and the network."""
        return max(self.disk, self.bus, self.dequantize + self.gemm + self.writes) + self.calls + self.net

    @property
    def total(self) -> float:
        """Seconds of all passes."""
        return self.count * self.each


@dataclass(frozen=True)
class Times:
    """The parts of the work in order; `total` is their sum in seconds."""

    parts: tuple[Time, ...]

    @property
    def total(self) -> float:
        """Seconds of all the work."""
        return sum(part.total for part in self.parts)

    def data(self) -> dict[str, Any]:
        """Return the times as plain data, ready for JSON, in seconds."""
        parts = [asdict(part) | {"each": part.each, "total": part.total} for part in self.parts]
        return {"total": self.total, "parts": parts}


def krylov_flop(size: int, width: int, sweeps: int) -> int:
    """Return the mean FLOP that a sweep of a decomposition costs in addition to its product.

    Every other product is in the large space of `size`: it is projected twice on a basis of half its final length, and
    factored by QR.
    """
    basis = width * math.ceil(sweeps / 2) // 2
    return (8 * width * basis + 8 * width * width) * size // 2


def seconds(
    plan: Plan,
    rates: Rates,
    *,
    cached: int | None = None,
    free: int | None = None,
    network: Network | None = None,
) -> Times:
    """Return the time of the trace and of each step at measured rates.

    Bytes that are not in the page cache come from the disk. The first sweep begins where the trace ended, and later
    ones alternate their direction, so each finds in the cache what the previous one left there.

    Args:
        plan: the work and where its weights stay.
        rates: of this machine.
        cached: bytes of the file in the page cache now; default none.
        free: bytes that the work and the page cache may take; default the memory that is free now.
        network: between the ranks that share the model; None leaves its time out.
    """
    free = machine.free_memory() if free is None else free
    room = max(0, free - plan.ram_peak)  # left for the page cache
    dense = total(layer.kept for layer in plan.stored if layer.place == "dense")
    item, prompts, rounds = ITEM_BYTES[plan.work.dtype], plan.work.prompts, plan.work.rounds
    each = prompts / rounds  # prompts that a pass is for: what it computes for one, it computes for all

    def dequantizing(types: Mapping[str, int]) -> float:
        return sum((weights / rates.dequantize(kind) for kind, weights in types.items()), start=0.0)

    def writing(floats: int) -> float:
        """Return the seconds of writing products, and of writing once more what is computed from each elementwise."""
        return 2 * floats * item / rates.touch

    def adding(work: Pass, vectors: int = 1) -> float:
        """Return the seconds in which ranks add up what each has of a pass."""
        return network.seconds(vectors * plan.summed_bytes(work), work.sums, plan.ranks) if network else 0.0

    def streamed(what: str, count: int, work: Pass, present: int) -> Time:
        """Return the time of passes that read all their weights, of which `present` bytes are in the page cache."""
        missing = max(0, work.nbytes - present)
        gemm = each * work.flop / rates.gemm(work.columns())
        disk, bus = missing / rates.disk, work.nbytes / rates.bus
        writes, calls = each * writing(work.written), each * work.calls * rates.call
        return Time(what, rounds * count, disk, bus, dequantizing(work.types), gemm, writes, calls, each * adding(work))

    def sweeping(step: Sweeps) -> Time:
        """Return the time of sweeps, which find some weights where they were kept."""
        types: Counter[str] = Counter()
        from_file = copied = 0
        for layer in plan.layers:
            here, kept = layer.sweep_of(step.region), layer.kept
            types += Counter(here.types) - Counter(kept.types if layer.place == "dense" else {})
            from_file += max(0, here.nbytes - (0 if layer.place == "file" else kept.nbytes))
            copied += max(0, here.nbytes - (kept.nbytes if layer.place in ("device", "dense") else 0))
        work, faster = plan.sweep_of(step.region), rates.rounding if step.rough else 1.0
        gemm = step.vectors * work.flop / rates.gemm(work.columns(step.vectors)) / faster
        for bases in step.bases:
            share = bases.maps * bases.sweeps / step.count
            flop = krylov_flop(bases.size, bases.width, bases.sweeps)
            gemm += share * flop / rates.gemm(bases.width)
        if plan.device == "cpu":  # weights kept dense come from memory, not from the processor's cache
            gemm += (work.weights - types.total()) * item / rates.copy
        disk = max(0, from_file - room) / rates.disk
        bus = copied / rates.bus
        writes, calls = each * writing(step.vectors * work.written), each * work.calls * rates.call
        net = each * adding(work, step.vectors)
        times = disk, bus, dequantizing(types) / faster, each * gemm, writes, calls, net
        return Time(step.what, rounds * step.count, *times)

    parts = [streamed("trace", 1, plan.trace, cached or 0)]
    prepared = not dense.weights
    for step in plan.work.steps:
        if isinstance(step, Lookup):
            parts.append(streamed(step.what, step.count, plan.lookup(step), room))
            continue
        if isinstance(step, Decomposition):
            gemm = step.flop / (rates.gemm(step.rows) if plan.device == "cpu" else rates.host)
            parts.append(Time(step.what, prompts * step.count, 0.0, 0.0, 0.0, gemm, 0.0, 0.0))
            continue
        if not prepared:  # before the first sweep
            disk, prepared = max(0, dense.nbytes - room) / rates.disk, True
            computing = dequantizing(dense.types) + dense.weights * item / rates.touch
            bus = dense.nbytes / rates.bus
            parts.append(Time("making layers ready", plan.work.preparations, disk, bus, computing, 0.0, 0.0, 0.0))
        parts.append(sweeping(step))
    return Times(tuple(parts))
