"""Print how much of the GEMM rate the dense Jacobian reaches, in one pass over the weights.

    python tools/benchmarks/dense.py [--layers 2] [--tokens 8] [--dtype float32] [--rows 4096]

A temporary synthetic file with the blocks of an 8B Llama in Q4_K_M. The GEMM rate is that of the sweep's own largest
product (a slab's tile of `ffn_up` with all stacked columns), measured before and after; the rate of the sweep counts
its multiplications by matrices only, over its whole time, dequantization included.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from ggjac.model import open_model
from ggjac.planner import machine
from ggjac.units import size

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import make_synthetic_gguf

SHAPE = replace(make_synthetic_gguf.PRESETS["llama-3.1-8b"], vocabulary=512)


def gemm_rate(columns: int, dtype: torch.dtype) -> float:
    """Return FLOP per second of tiles like the sweep's, with so many columns."""
    tile, x = torch.randn(2048, SHAPE.d).to(dtype), torch.randn(columns, SHAPE.d).to(dtype)
    times = []
    for _ in range(4):
        start = time.perf_counter()
        x @ tile.T
        times.append(time.perf_counter() - start)
    return 2 * tile.numel() * columns / statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--rows", type=int, default=SHAPE.d, help="of the Jacobian, in one sweep")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    machine.return_freed_memory()
    with tempfile.TemporaryDirectory() as folder, machine.PeakMemory() as peak:
        path = Path(folder) / "synthetic.gguf"
        make_synthetic_gguf.write(path, replace(SHAPE, layers=options.layers), "Q4_K_M")
        model = open_model(path, dtype=options.dtype)
        J = model.trace([3 + i % 200 for i in range(options.tokens)]).jacobian()
        columns = options.rows * options.tokens
        before = gemm_rate(columns, J.dtype)
        model.weights.reads.clear()
        start = time.perf_counter()
        _, _, rows = next(J.rows(options.rows))
        took = time.perf_counter() - start
        rate = statistics.mean((before, gemm_rate(columns, J.dtype)))
        passes = max(count / model.gguf.tensors[name].rows for name, count in model.weights.reads.items())
    print(f"{options.layers} blocks, {len(rows)} rows of {options.tokens} tokens, {options.dtype}; ", end="")
    print(f"load {os.getloadavg()[0]:.1f} of {os.cpu_count()} CPUs; each weight read {passes:.0f} time(s)")
    print(f"{took:.1f} s, {J.sweep.flop / took / 1e9:.0f} GFLOP/s; GEMM alone {rate / 1e9:.0f} GFLOP/s: ", end="")
    print(f"{J.sweep.flop / took / rate:.2f} of it; peak {size(peak.nbytes)}")


if __name__ == "__main__":
    main()
