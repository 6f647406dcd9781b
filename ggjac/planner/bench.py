"""Measured rates of this machine: disk, dequantization, multiplication, copies. Measuring takes about two seconds.

Everything is measured on the model's own file, with its storage types, the tiles of `ggjac.weights`, and the chosen
threads and dtype, so the rates are those of a sweep. Torch is imported by the first measurement.
"""

import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ggjac.gguf import GGUFFile, TensorInfo
from ggjac.planner import machine
from ggjac.planner.plan import Plan
from ggjac.sizes import ON_THE_WAY, SMALL_PIECES

DISK_REGIONS = 4  # places in the file that are read after dropping them from the page cache
DISK_BYTES = 64 << 20  # read at each, at most
READ_BYTES = 8 << 20
CACHED_RATE = 100e9  # bytes per second, used for the disk where it cannot be measured
# What is copied and written to is larger than caches, and than what an allocator keeps for reuse; and before a command
# there is room for it where its plan has the tile.
COPY_ELEMENTS = 5 << 20
TOUCH_BYTES = 40 << 20
TURNS = 3  # times at least that a tile is dequantized and multiplied, in each direction
# How many times as fast the products of a search must be in another dtype, which adds sweeps.
CLEARLY_FASTER = 1.5
SQUARES = (192, 384, 768, 1536)  # sizes of square matrices, of which the last fill any device
ROUGH_TILE = 1 << 20  # elements of a tile that shows whether a dtype is fast at all
LONG = 0.25  # seconds of one product, too many to go on to larger ones
MOST_COLUMNS = 256  # of a measured product: with more, the rate stays the same and measuring takes too long


@dataclass(frozen=True)
class Measured:
    """The rates of a machine; see `ggjac.planner.Rates`.

    Attributes:
        disk: bytes per second, read sequentially from the model's file.
        disk_method: how that was measured, as text.
        types: weights per second, by storage type, dequantized into tiles of the dtype.
        multiply: FLOP per second, by number of columns (stacked vectors times positions).
        copy: bytes per second that a copy in memory reads and writes together.
        bus: bytes per second to the device; infinite on the CPU.
        touch: bytes per second of memory that is written for the first time; infinite on a device.
        call: seconds of fixed cost for applying a matrix; see `call_seconds`.
        host: FLOP per second of products on the CPU; infinite if that does them all.
        rounding: how many times as fast rough sweeps are; see `search_gain`.
        dtype, threads, device: of the measurement.
        seconds: duration of the measurement.
    """

    disk: float
    disk_method: str
    types: Mapping[str, float]
    multiply: Mapping[int, float]
    copy: float
    bus: float = math.inf
    touch: float = math.inf
    call: float = 0.0
    host: float = math.inf
    rounding: float = 1.0
    dtype: str = "float32"
    threads: int = 1
    device: str = "cpu"
    seconds: float = field(default=0.0, compare=False)

    def dequantize(self, type: str) -> float:
        """Return the rate of a type in weights per second; for one that was not measured, the slowest measured rate."""
        return self.types.get(type) or min(self.types.values())

    def gemm(self, columns: int) -> float:
        """Return FLOP per second with `columns` columns, interpolated between measured rates in logarithms of both."""
        points = sorted(self.multiply.items())
        below = [point for point in points if point[0] <= columns] or points[:1]
        above = [point for point in points if point[0] >= columns] or points[-1:]
        (a, low), (b, high) = below[-1], above[0]
        if a == b:
            # With few columns, reading the tile is the bottleneck: half of them take as long.
            return low * min(1.0, columns / a)
        share = math.log(columns / a) / math.log(b / a)
        return low * (high / low) ** share

    def data(self) -> dict[str, Any]:
        """Return the rates as plain data."""
        return {
            "disk_bytes_per_second": self.disk,
            "disk_method": self.disk_method,
            "weights_per_second": dict(self.types),
            "flop_per_second": {str(columns): rate for columns, rate in self.multiply.items()},
            "copy_bytes_per_second": self.copy,
            "bus_bytes_per_second": None if math.isinf(self.bus) else self.bus,
            "touch_bytes_per_second": None if math.isinf(self.touch) else self.touch,
            "call_seconds": self.call,
            "host_flop_per_second": None if math.isinf(self.host) else self.host,
            "rounding": self.rounding,
            "dtype": self.dtype,
            "threads": self.threads,
            "device": self.device,
            "seconds": self.seconds,
        }

    def lines(self) -> list[str]:
        """Return the rates as lines of text."""
        threads = f"{self.threads} thread{'' if self.threads == 1 else 's'}"
        types = ", ".join(f"{name} {rate / 1e9:.2f}" for name, rate in self.types.items())
        gemm = ", ".join(f"{rate / 1e9:.0f} with {columns} columns" for columns, rate in self.multiply.items())
        return [
            f"disk {self.disk / 1e9:.2f} GB/s ({self.disk_method}); memory copy {self.copy / 1e9:.1f} GB/s",
            f"dequantization {types} Gweights/s; multiplication {gemm} GFLOP/s ({self.dtype}, {threads})",
        ]


# No machine in use is slower: work that is short at these rates need not be predicted from measured ones.
SLOW = Measured(
    disk=5e7,
    disk_method="assumed",
    types={"any": 5e7},
    multiply={1: 5e8, 64: 2e9},
    copy=1e9,
    bus=1e9,
    touch=2e8,
    call=1e-3,
    host=2e9,
)


def seconds_of(call: Callable[[], object], budget: float = 0.15, least: int = 3) -> float:
    """Return the median seconds of a call, repeated for about `budget` seconds after one that is not counted."""
    call()
    times: list[float] = []
    end = time.perf_counter() + budget
    while len(times) < least or (time.perf_counter() < end and len(times) < 100):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure(
    file: GGUFFile,
    columns: Sequence[int],
    types: Mapping[str, int],
    *,
    dtype: str = "float32",
    threads: int | None = None,
    device: str = "cpu",
    tile: int = SMALL_PIECES.tile,
) -> Measured:
    """Measure the rates that a plan for this file needs.

    Args:
        file: the model.
        columns: of the planned products: positions times stacked vectors.
        types: weights to dequantize, by storage type; rare types are not measured.
        dtype: of all computation.
        threads: default as `machine.torch_threads`.
        device: of all computation.
        tile: elements of a tile.
    """
    import torch

    start, before = time.perf_counter(), torch.get_num_threads()
    columns = sorted({min(count, MOST_COLUMNS) for count in columns})
    threads = threads or machine.torch_threads()
    torch.set_num_threads(threads)
    try:
        weights = sum(types.values())
        common = [name for name, count in types.items() if count > weights / 50]
        main = max(common, key=lambda name: types[name])
        by_type = {name: turn_rates(file, name, columns[-1], dtype, threads, device, tile) for name in common}
        fewer = {count: turn_rates(file, main, count, dtype, threads, device, tile)[1] for count in columns[:-1]}
        disk, method = disk_rate(file)
        return Measured(
            disk=disk,
            disk_method=method,
            types={name: weights_per_second for name, (weights_per_second, _) in by_type.items()},
            multiply=fewer | {columns[-1]: by_type[main][1]},
            copy=copy_rate(),
            bus=math.inf if device == "cpu" else bus_rate(device, tile),
            touch=touch_rate() if device == "cpu" else math.inf,
            call=call_seconds(file, main, dtype, threads, device),
            host=math.inf if device == "cpu" else square_rate(dtype, threads=threads),
            dtype=dtype,
            threads=threads,
            device=device,
            seconds=time.perf_counter() - start,
        )
    finally:
        torch.set_num_threads(before)


def disk_rate(file: GGUFFile) -> tuple[float, str]:
    """Return bytes per second of sequential reads from the disk itself, and as text how they bypassed the page cache.

    A few regions of the shards are dropped from the cache first; only their next reader is slower for it.
    """
    if not hasattr(os, "posix_fadvise"):
        return CACHED_RATE, "not measured: this system cannot drop a file from its cache"
    buffer = bytearray(READ_BYTES)
    took, read = 0.0, 0
    shares = [os.path.getsize(path) for path in file.paths]
    regions = max(1, DISK_REGIONS // len(file.paths))
    for path, size in list(zip(file.paths, shares, strict=True))[:DISK_REGIONS]:
        with open(path, "rb", buffering=0) as raw:
            length = min(DISK_BYTES, size // regions)
            for i in range(regions):
                at = (size - length) * i // max(1, regions - 1) // 4096 * 4096
                os.posix_fadvise(raw.fileno(), at, length, os.POSIX_FADV_DONTNEED)
                raw.seek(at)
                start, end = time.perf_counter(), at + length
                while at < end and (count := raw.readinto(memoryview(buffer)[: end - at])):
                    at, read = at + count, read + count
                took += time.perf_counter() - start
                if took > 0.5:
                    break
    return read / max(took, 1e-9), f"{read / 1e6:.0f} MB, dropped from the page cache first"


def dominant(file: GGUFFile, type: str) -> TensorInfo:
    """Return the largest matrix of a storage type."""
    infos = [info for info in file.tensors.values() if info.type.name == type]
    return max(infos, key=lambda info: info.elements)


def turn_rates(
    file: GGUFFile,
    type: str,
    columns: int,
    dtype: str,
    threads: int,
    device: str = "cpu",
    tile: int = SMALL_PIECES.tile,
    budget: float = 0.2,
) -> tuple[float, float]:
    """Return weights per second dequantized, and FLOP per second of products with them, alternating as in a sweep.

    Tiles of the largest matrix of a storage type are read from the page cache, one after another, and multiplied up and
    down alternately. Alternating is slower than either alone, because of cold caches and thread wake-ups. On a device,
    a single tile is measured, already copied there: `bus_rate` measures copying.
    """
    import torch

    from ggjac.weights import Key, WeightStore

    info, kind = dominant(file, type), getattr(torch, dtype)
    store = WeightStore(file, device=torch.device(device), dtype=kind, threads=threads)
    store.place([], {"device": info.nbytes})
    into = info.shape[-1]
    rows = min(info.rows, max(1, tile // into))
    X, Y = (torch.ones(columns, width, dtype=kind, device=device) for width in (into, rows))
    onto_X, onto_Y = torch.empty_like(X), torch.empty_like(Y)
    seconds: dict[str, list[float]] = {"dequantize": [], "up": [], "down": []}

    def timed(what: str, call: Callable[..., torch.Tensor], *given: Any) -> torch.Tensor:
        start = time.perf_counter()
        result = call(*given)
        wait(device)
        seconds[what].append(time.perf_counter() - start)
        return result

    end, turn = time.perf_counter() + budget, 0
    while turn < 2 * TURNS or time.perf_counter() < end:
        at = turn * rows % (info.rows - rows + 1) if device == "cpu" else 0
        dense = timed("dequantize", store.dequantize, Key(info.name, at, at + rows, 0, into), "device")
        if turn % 2:
            timed("up", partial(onto_Y.addmm_, beta=0), X, dense.T)
        else:
            timed("down", partial(onto_X.addmm_, beta=0), Y, dense)
        turn += 1
    dequantize, up, down = (statistics.median(times[1:]) for times in seconds.values())  # without the first of each
    return rows * into / dequantize, 2 * 2 * columns * rows * into / (up + down)


def search_gain(plan: Plan, file: GGUFFile, *, threads: int, device: str) -> float:
    """Return how many times as fast the products of a plan's first search are in bfloat16 as in float32."""
    step = next(step for step in plan.work.sweeps if step.bases)
    sweep = plan.sweep_of(step.region)
    columns = sweep.columns(step.vectors)
    return rounding_gain(file, sweep.types, columns, dtype="bfloat16", threads=threads, device=device)


def rounding_gain(
    file: GGUFFile, types: Mapping[str, int], columns: int, *, dtype: str, threads: int, device: str = "cpu"
) -> float:
    """Return how many times as fast weights are dequantized and multiplied in another dtype as in float32.

    A dtype that is slower on a small tile is not measured on a whole one: CPUs without instructions for it take several
    seconds for that, and copies of the tile that no plan counts.

    Args:
        file: the model.
        types: weights to dequantize, by storage type; the most frequent one is measured.
        columns: of the products: positions times stacked vectors.
        dtype: the other one.
        threads, device: as `measure` takes them.
    """
    type, columns = max(types, key=lambda name: types[name]), min(columns, MOST_COLUMNS)

    def gain(tile: int, budget: float) -> float:
        seconds = []  # that a weight takes
        for kind in ("float32", dtype):
            weights, flop = turn_rates(file, type, columns, kind, threads, device, tile, budget)
            seconds.append(1 / weights + 2 * columns / flop)
        return seconds[0] / seconds[1]

    rough = gain(ROUGH_TILE, 0.05)
    return rough if rough < 1 else gain(SMALL_PIECES.tile, 0.2)


def square_rate(dtype: str, device: str = "cpu", threads: int | None = None, sizes: Sequence[int] = SQUARES) -> float:
    """Return FLOP per second of a product of square matrices: the best rate of the matrix library.

    Sizes grow as long as a product is short: CPUs without instructions for bfloat16 take ten seconds for the largest.
    """
    import torch

    before = torch.get_num_threads()
    if threads:
        torch.set_num_threads(threads)
    best = 0.0
    try:
        for size in sizes:
            a = torch.ones(size, size, dtype=getattr(torch, dtype), device=device)

            def once(a: torch.Tensor = a) -> None:
                a @ a
                wait(device)

            seconds = seconds_of(once, 0.1, 2)
            best = max(best, 2 * size**3 / seconds)
            if 8 * seconds > LONG:  # what one of twice the size takes
                break
        return best
    finally:
        torch.set_num_threads(before)


def moved_bytes(file: GGUFFile, type: str, dtype: str) -> float:
    """Return the bytes that dequantizing one weight reads and writes, on average."""
    import torch

    kind = dominant(file, type).type
    return kind.block_bytes / kind.block_size + getattr(torch, dtype).itemsize


def copy_rate() -> float:
    """Return bytes per second, read and written together, of a copy in memory."""
    import torch

    source, target = torch.ones(COPY_ELEMENTS), torch.ones(COPY_ELEMENTS)
    return 2 * source.nbytes / seconds_of(lambda: target.copy_(source), 0.1)


def touch_rate() -> float:
    """Return bytes per second of writing to new memory, of which the system clears each page first."""
    import torch

    return TOUCH_BYTES / seconds_of(lambda: torch.zeros(TOUCH_BYTES, dtype=torch.uint8).add_(1), 0.05)


def bus_rate(device: str, tile: int = SMALL_PIECES.tile) -> float:
    """Return bytes per second from ordinary memory to a device through buffers in pinned memory, as tiles travel."""
    import numpy as np
    import torch

    from ggjac.weights.bus import Bus

    bus, bytes = Bus(torch.device(device)), np.ones((1, tile), np.uint8)

    def several() -> None:
        for _ in range(2 * ON_THE_WAY):
            with bus.sent(bytes) as there:
                there.view(-1)
        wait(device)

    return 2 * ON_THE_WAY * bytes.nbytes / seconds_of(several, 0.1)


def pinned_rate(device: str) -> float:
    """Return bytes per second from pinned memory to a device: the best rate of the bus."""
    import torch

    source = torch.ones(COPY_ELEMENTS, pin_memory=True)
    target = torch.empty(COPY_ELEMENTS, device=device)

    def once() -> None:
        target.copy_(source, non_blocking=True)
        wait(device)

    return source.nbytes / seconds_of(once, 0.1)


def call_seconds(file: GGUFFile, type: str, dtype: str, threads: int, device: str = "cpu") -> float:
    """Return the seconds that applying a matrix costs in addition to reading, dequantizing and multiplying it.

    Measured on one row of a matrix and the scaling before it: the cost of Python, torch and thread wake-ups. It counts
    twice, since building the operators of a block takes about as long again.
    """
    import torch

    from ggjac.linop import Linear, Scale
    from ggjac.weights import WeightStore

    info = dominant(file, type)
    store = WeightStore(file, device=torch.device(device), dtype=getattr(torch, dtype), threads=threads)
    weight = store[info.name].rows(0, 1)
    X = torch.ones(1, 1, info.shape[-1], dtype=store.dtype, device=store.device)

    def once() -> None:
        (Linear(weight, 1) @ Scale(X[0])).matmat(X)
        wait(device)

    return 2 * seconds_of(once, 0.02, 20)


def wait(device: str) -> None:
    """Wait until a device has finished all queued work: a copy to the host comes after everything before it."""
    if device != "cpu":
        import torch

        torch.empty(1, device=device).cpu()
