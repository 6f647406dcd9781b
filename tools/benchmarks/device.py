"""Decompose a Jacobian on a device; print each sweep beside what the bus, dequantizing and multiplying take alone.

    python tools/benchmarks/device.py model.gguf [--device cuda] [--dtype float32] [--tokens 8] [--rank 8]
                                                 [--vram-budget 20GiB] [--ram-budget 8GiB] [--card 24GiB]

Where weights wait is what `ggjac plan` chooses within the budgets; `--card` makes CUDA behave like a smaller one. The
limits are rates measured in the same process (`ggjac.planner.bench`): a sweep cannot be faster than copying what is not
on the device, nor than dequantizing and then multiplying. Device memory is the allocator's own peak. Files:
tools/make_synthetic_gguf.py.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch

from ggjac import planner
from ggjac.model import open_model
from ggjac.planner import bench, machine
from ggjac.units import size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--ram-budget")
    parser.add_argument("--vram-budget")
    parser.add_argument(
        "--card", type=machine.parse_size, help="the memory that CUDA may use, as if there were no more"
    )
    options = parser.parse_args()

    model = open_model(options.model, device=options.device, dtype=options.dtype)
    device, ids = model.device, [3 + i % 200 for i in range(options.tokens)]
    if options.card:
        torch.cuda.set_per_process_memory_fraction(options.card / torch.cuda.mem_get_info(device)[1], device)
    vram = options.vram_budget or options.card
    plan = model.plan(ids, "svd", rank=options.rank, ram_budget=options.ram_budget, vram_budget=vram)
    rates = bench.measure(model.gguf, plan.columns, plan.trace.types, dtype=options.dtype, device=str(device))
    limits = {part.what: part for part in planner.seconds(plan, rates).parts}
    print(f"{options.model.name} on {device}, {options.dtype}, {options.tokens} tokens, k={options.rank}")
    print("\n".join(rates.lines()) + f"; bus {rates.bus / 1e9:.1f} GB/s")
    waiting = ", ".join(f"{plan.places.count(p)} {p}" for p in ("dense", "device", "pinned", "file"))
    print(f"blocks wait: {waiting}; plan: {size(plan.vram_peak)} of device memory")

    model.fit(plan)
    start = time.perf_counter()
    J = model.trace(ids).jacobian()
    bench.wait(str(device))
    print(f"trace {time.perf_counter() - start:8.2f} s (limit {limits['trace'].each:.2f} s)", flush=True)

    limit, times = limits["svd"], []
    start = time.perf_counter()

    def swept(sweeps: int, residual: float) -> None:
        nonlocal start
        bench.wait(str(device))
        times.append(time.perf_counter() - start)
        print(f"sweep {sweeps}: {times[-1]:8.2f} s, residual {residual:.1e}", flush=True)
        start = time.perf_counter()

    found = J.svd(options.rank, progress=swept)
    median = statistics.median(times[1:] or times)  # the first makes weights ready
    print(
        f"median {median:.3f} s; alone: bus {limit.bus:.3f} s, dequantization {limit.dequantize:.3f} s, multiplication "
        f"{limit.gemm:.3f} s | {limit.each / median:.2f} of limit; stopped by {found.reason}"
    )
    if device.type == "cuda":
        print(f"device memory: peak {size(torch.cuda.max_memory_reserved(device))}")


if __name__ == "__main__":
    main()
