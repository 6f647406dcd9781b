"""Measure a GPU beside its limits: what it can do, dequantization, and sweeps; then say what to do next.

    python tools/make_synthetic_gguf.py --preset llama-3.3-70b --layers 10 --vocabulary 4096 -o /dev/shm/m.gguf
    python tools/benchmarks/device.py /dev/shm/m.gguf [--device cuda] [--seconds 480] [--card 24GiB] [--json FILE]
    python tools/benchmarks/device.py --quick --device cpu    # a rehearsal: the demo, small sizes, no conclusion

1. Ceilings: copies on the device and to it; products with as many rows as a sweep has, whole and in tiles.
2. Dequantization of the common types, by torch's operators and by the kernels of `ggjac.kernels`, whose bits are
   compared; in brackets, the share of what a copy of as many bytes would allow.
3. Sweeps of a whole stack of vectors, weights kept dense, quantized, in pinned memory or in the file. The limit of each
   is the larger of the bus, and of dequantizing and then multiplying at rates measured alone (`ggjac.planner.bench`).
   By torch's profiler: the share of the time in which the device works, and that of products in it.
4. The conclusion, by four rules that were set before any measurement (docs/benchmarks.md).

A part that fails is named, and the others go on; past `--seconds`, the rest is skipped. `--card` makes CUDA behave like
a smaller card.
"""

import argparse
import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ggjac import planner, quants
from ggjac.gguf.types import TYPES, GGMLType, row_bytes
from ggjac.model import open_model
from ggjac.planner import bench, machine
from ggjac.sizes import LARGE_PIECES, SMALL_PIECES, Pieces
from ggjac.units import size

COMMON = ("Q4_K", "Q6_K", "Q5_K", "Q8_0", "Q4_0", "IQ4_XS", "MXFP4")
COLUMNS = 8192  # of a matrix of a 70B model
OUT = 28672
RANK = 8


class Setting(NamedTuple):
    """A sweep: where its weights wait, dtype, tokens, sizes of tiles and slabs, and whether kernels are used."""

    place: str
    dtype: str = "float32"
    tokens: int = 8
    pieces: Pieces = LARGE_PIECES
    kernels: bool = True


SETTINGS = (
    Setting("device", pieces=SMALL_PIECES, kernels=False),
    Setting("device", kernels=False),
    Setting("device"),
    Setting("device", "bfloat16"),
    Setting("dense"),
    Setting("dense", "bfloat16"),
    Setting("pinned"),
    Setting("file"),
    Setting("device", tokens=400),
    Setting("dense", "float64"),
)
QUICK = (Setting("dense", pieces=SMALL_PIECES, kernels=False), Setting("file", "bfloat16"))


class Run:
    """One run: the device, the time left, and what has been measured, printed as it comes."""

    def __init__(self, device: torch.device, seconds: float, small: bool):
        self.device, self.small = device, small
        self._end = time.monotonic() + seconds
        self.found: dict[str, Any] = {}
        self.failed: list[str] = []

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Report an error in this block, and go on after it."""
        try:
            yield
        except Exception as error:  # a card that is new to us may fail in any part
            self.failed.append(name)
            print(f"{name}: FAILED: {(str(error).splitlines() or [repr(error)])[0]}", flush=True)

    @property
    def over(self) -> bool:
        """Whether the time is up."""
        return time.monotonic() > self._end

    def note(self, name: str, value: float, unit: str, limit: float | None = None, more: str = "") -> None:
        """Keep a number and print it, with the share of its limit."""
        self.found[name] = {"value": value, "unit": unit, "limit": limit, "note": more}
        share = "" if limit is None else f" ({value / limit:.2f} of {limit:.3g})"
        print(f"{name:64} {value:9.3g} {unit}{share}{more and '; '}{more}", flush=True)

    def seconds(self, call: Callable[[], object]) -> float:
        """Return the seconds of a call, the device's work included."""

        def once() -> None:
            call()
            bench.wait(str(self.device))

        return bench.seconds_of(once, 0.05)


def ceilings(run: Run) -> float:
    """Measure copies and products; return the bytes per second that a copy on the device reads and writes."""
    by = 64 if run.small else 1
    a = torch.ones((1 << 32) // by, dtype=torch.uint8, device=run.device)
    b = torch.empty_like(a)
    copy = 2 * a.nbytes / run.seconds(lambda: b.copy_(a))
    run.note("copy on the device, read and written", copy / 1e9, "GB/s")
    del a, b
    if run.device.type != "cpu":
        pinned = bench.pinned_rate(str(run.device))
        run.note("to the device from pinned memory", pinned / 1e9, "GB/s")
        for pieces in (SMALL_PIECES, LARGE_PIECES):
            rate = bench.bus_rate(str(run.device), pieces.tile)
            run.note(f"to the device as tiles of {pieces.tile >> 20} M travel", rate / 1e9, "GB/s", pinned / 1e9)
    for rows in (256, 2560):
        products(run, rows)
    return copy


def products(run: Run, rows: int) -> None:
    """Measure products of some rows with a matrix of a 70B model, whole and in tiles."""
    scale = 16 if run.small else 1
    into, out = COLUMNS // scale, OUT // scale

    def rate(dtype: torch.dtype, step: int = out) -> float:
        x, w = (torch.ones(n, into, dtype=dtype, device=run.device) for n in (rows, out))
        y = torch.empty(rows, out, dtype=dtype, device=run.device)

        def tiled() -> None:
            for start in range(0, out, step):
                y[:, start : start + step].addmm_(x, w[start : start + step].T, beta=0)

        return 2 * rows * into * out / run.seconds(tiled) / 1e12

    whole = rate(torch.float32)
    run.note(f"product float32, {rows} rows", whole, "TFLOP/s")
    for step in (1024 // scale, 8192 // scale):
        run.note(f"product float32, {rows} rows, tiles of {step}", rate(torch.float32, step), "TFLOP/s", whole)
    torch.set_float32_matmul_precision("high")
    run.note(f"product tf32, {rows} rows", rate(torch.float32), "TFLOP/s")
    torch.set_float32_matmul_precision("highest")
    for dtype in (torch.bfloat16, torch.float64):
        run.note(f"product {str(dtype).removeprefix('torch.')}, {rows} rows", rate(dtype), "TFLOP/s")


def dequantization(run: Run, copy: float) -> None:
    """Measure types, sizes of tiles and dtypes, by torch and by kernels, beside a copy of as many bytes."""
    named = {type.name: type for type in TYPES.values()}
    for name in COMMON:
        for mega in (8, 64):
            for dtype in (torch.float32, torch.bfloat16):
                if not run.over:
                    dequantized(run, copy, named[name], mega, dtype)


def dequantized(run: Run, copy: float, type: GGMLType, mega: int, dtype: torch.dtype) -> None:
    """Measure a tile of one type."""
    rows = (mega << 20) // COLUMNS // (64 if run.small else 1)
    # Bytes below 60 make every scale finite.
    raw = np.random.default_rng(0).integers(0, 60, (rows, row_bytes(type, COLUMNS)), dtype=np.uint8)
    data = torch.from_numpy(raw).to(run.device)

    def by_torch() -> torch.Tensor:
        return quants.FORMATS[type.name].decode(data.reshape(-1, type.block_bytes)).to(dtype)

    weights = rows * COLUMNS / 1e9
    limit = copy / (type.block_bytes / type.block_size + dtype.itemsize) / 1e9
    label = f"dequantize {type.name} to {str(dtype).removeprefix('torch.')}, {mega} M weights"
    run.note(f"{label}, torch", weights / run.seconds(by_torch), "Gweights/s", limit)
    kernel = quants._kernel(type, run.device) if data.is_cuda else None
    if kernel is None:
        return
    same = torch.equal(kernel(data, dtype).flatten(), by_torch().flatten())
    rate = weights / run.seconds(partial(kernel, data, dtype))
    run.note(f"{label}, kernel", rate, "Gweights/s", limit, "same bits" if same else "OTHER BITS")
    if not same:
        run.failed.append(f"{label}: other bits")


@contextlib.contextmanager
def without_kernels(off: bool) -> Iterator[None]:
    """Leave the kernels out, if `off`."""
    before = os.environ.get("GGJAC_NATIVE")
    if off:
        os.environ["GGJAC_NATIVE"] = "0"
    quants._kernel.cache_clear()
    try:
        yield
    finally:
        os.environ.pop("GGJAC_NATIVE", None)
        if before is not None:
            os.environ["GGJAC_NATIVE"] = before
        quants._kernel.cache_clear()


class Swept(NamedTuple):
    """Seconds of a sweep, its limit and dequantizing; by the profiler, of the device's work, and its products."""

    each: float
    limit: float
    dequantize: float
    busy: float | None = None
    products: float | None = None


def swept(run: Run, path: Path | None, setting: Setting) -> Swept:
    """Measure one sweep down, after one that makes weights ready."""
    model = open_model(path, device=run.device, dtype=setting.dtype)
    ids = [3 + i % 200 for i in range(setting.tokens)]
    plan = model.plan(ids, "svd", rank=RANK)
    layers = tuple(replace(layer, place=setting.place) for layer in plan.layers)
    plan = replace(plan, layers=layers, pieces=setting.pieces)
    rates = bench.measure(
        model.gguf,
        plan.columns,
        plan.trace.types,
        dtype=setting.dtype,
        device=str(run.device),
        tile=plan.pieces.tile,
    )
    limit = next(part for part in planner.seconds(plan, rates).parts if part.what == "svd")
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(run.device)
    model.fit(plan)
    J = model.trace(ids).jacobian()
    step = next(step for step in plan.work.sweeps if step.what == "svd")
    Y = torch.ones(step.vectors, *J.out_shape, device=J.device, dtype=J.dtype)
    each, flop = run.seconds(lambda: J.rmatmat(Y)), step.vectors * plan.sweep_of(step.region).flop
    found = Swept(each, limit.each, limit.dequantize)
    label = f"sweep: {setting.place}, {setting.dtype}, {setting.tokens} tokens, tiles of {plan.pieces.tile >> 20} M"
    label += "" if setting.kernels else ", torch"
    more = f"{step.vectors} vectors, {flop / each / 1e12:.3g} TFLOP/s, error {J.reconstruction_error:.0e}"
    if run.device.type == "cuda":
        busy, products = profiled(lambda: J.rmatmat(Y))
        found = found._replace(busy=busy, products=products)
        peak = size(torch.cuda.max_memory_reserved(run.device))
        more += f", busy {busy:.3g} s, products {products:.3g} s, memory {peak} (planned {size(plan.vram_peak)})"
    run.note(label, 1 / each, "sweeps/s", 1 / limit.each, more)
    return found


def profiled(call: Callable[[], object]) -> tuple[float, float]:
    """Return the seconds in which the device works during a call, and those of products among them."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as seen:
        call()
        torch.cuda.synchronize()
    on_device = [event for event in seen.events() if event.device_type == torch.autograd.DeviceType.CUDA]

    def total(*names: str) -> float:
        return sum(e.time_range.elapsed_us() for e in on_device if any(n in e.name.lower() for n in names)) / 1e6

    return total(""), total("gemm", "cutlass", "nvjet")


def conclusion(sweeps: dict[Setting, Swept], bus: tuple[float, float] | None) -> list[str]:
    """Return what to do next, by the rules of docs/benchmarks.md; `bus` has the rates of tiles and of pinned memory."""
    found = sweeps.get(Setting("device"))
    if found is None or found.busy is None or found.products is None:
        return ["no conclusion: it takes a sweep of quantized weights on a CUDA device"]
    lines = []
    if found.busy < 0.7 * found.each:
        lines.append("the device works less than 0.7 of the time: larger pieces or fewer launches come first")
    if found.dequantize > 0.3 * found.busy:
        lines.append("dequantization takes more than 0.3 of the work: make the kernels faster (load words, not bytes)")
    if found.products > 0.8 * found.busy:
        lines.append("float32 products take more than 0.8 of the work: offer them as three of TF32, with their error")
    if bus is not None and bus[0] < 0.8 * bus[1]:
        lines.append("tiles travel at less than 0.8 of the bus: the host's side comes first")
    return lines or ["nothing stands out: the sweep is near its limits"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", help="default: the demo")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=480, help="after which no further measurement begins")
    parser.add_argument("--quick", action="store_true", help="small sizes and few sweeps")
    parser.add_argument("--json", type=Path, help="write all numbers to this file, too")
    parser.add_argument(
        "--card", type=machine.parse_size, help="the memory that CUDA may use, as if there were no more"
    )
    options = parser.parse_args()
    device = torch.device(options.device)
    run = Run(device, options.seconds, options.quick)
    if options.card:
        torch.cuda.set_per_process_memory_fraction(options.card / torch.cuda.mem_get_info(device)[1], device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    print(f"{name}, torch {torch.__version__}")

    copy, sweeps = float("inf"), {}
    with run.part("ceilings"):
        copy = ceilings(run)
    with run.part("dequantization"):
        dequantization(run, copy)
    for setting in QUICK if options.quick else SETTINGS:
        if run.over:
            print(f"no time left for {setting}")
            continue
        with run.part(f"sweep {setting}"), without_kernels(not setting.kernels):
            sweeps[setting] = swept(run, options.model, setting)
    tiles = run.found.get(f"to the device as tiles of {LARGE_PIECES.tile >> 20} M travel")
    lines = conclusion(sweeps, tiles and (tiles["value"], tiles["limit"]))
    print("\n".join(["", *lines]))
    if options.json:
        content = {"device": name, "torch": torch.__version__, "numbers": run.found, "conclusion": lines}
        options.json.write_text(json.dumps(content, indent=1), encoding="utf-8")
    if run.failed:
        raise SystemExit("failed: " + "; ".join(run.failed))


if __name__ == "__main__":
    main()
