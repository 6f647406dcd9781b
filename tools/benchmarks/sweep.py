"""Print the speed of a sweep beside its limits on the same machine at the same moment.

    python tools/benchmarks/sweep.py [--layers 2] [--k 16] [--n 8] [--dtype float32]

A temporary synthetic file with the blocks of an 8B Llama in Q4_K_M is traced and swept down and up. Beside each sweep
stand the two things it is made of, measured alone: dequantizing every live tensor once, and multiplying as many dense
weights with as many vectors; their sum is the limit of a sweep that does one after the other. Medians; ratios mean more
than seconds on a shared machine.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from ggjac.model import Model, open_model
from ggjac.planner.bench import seconds_of

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import make_synthetic_gguf

SHAPE = replace(make_synthetic_gguf.PRESETS["llama-3.1-8b"], vocabulary=512)
LIVE = ("attn_v", "attn_output", "ffn_up", "ffn_down")


def dequantize_live(model: Model) -> None:
    """Dequantize every tensor of a sweep once."""
    for i in range(model.config.block_count):
        for name in LIVE:
            for _ in model.weights[f"blk.{i}.{name}.weight"].tiles():
                pass


def multiply_live(model: Model, vectors: int) -> Callable[[], None]:
    """Return a function that does a sweep's multiplications, on one dense tile of each shape."""
    # The last block works on one position only and is left to the sweep: the limit is a little pessimistic.
    shapes = [model.weights[f"blk.0.{name}.weight"].shape for name in LIVE]
    tiles = [torch.randn(min(out, (1 << 24) // into), into).to(model.dtype) for out, into in shapes]
    inputs = [torch.randn(vectors, tile.shape[1]).to(model.dtype) for tile in tiles]

    def run() -> None:
        for _ in range(model.config.block_count):
            for (out, _into), tile, x in zip(shapes, tiles, inputs, strict=True):
                for start in range(0, out, len(tile)):
                    x @ tile[: min(len(tile), out - start)].T

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--k", type=int, default=16, help="stacked vectors")
    parser.add_argument("--n", type=int, default=8, help="tokens")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "synthetic.gguf"
        make_synthetic_gguf.write(path, replace(SHAPE, layers=options.layers), "Q4_K_M")
        model = open_model(path, dtype=options.dtype)
        live = [model.weights[f"blk.{i}.{name}.weight"].info for i in range(options.layers) for name in LIVE]
        weights, nbytes = sum(info.elements for info in live), sum(info.nbytes for info in live)
        flop = 2 * weights * options.k * options.n
        print(
            f"{options.layers} blocks, {weights / 1e6:.0f} M live weights, {nbytes / 2**20:.0f} MiB quantized; ", end=""
        )
        print(f"k={options.k}, n={options.n}, {options.dtype}; load {os.getloadavg()[0]:.1f} of {os.cpu_count()} CPUs")

        copied = torch.empty(1 << 26)
        source = torch.ones(1 << 26)
        copy = seconds_of(lambda: copied.copy_(source), 0, options.repeats)
        print(f"memory copy                {2 * source.nbytes / copy / 1e9:8.1f} GB/s read and written")

        start = time.perf_counter()
        J = model.trace(list(range(options.n))).jacobian()
        print(f"trace                      {time.perf_counter() - start:8.2f} s")

        dequantized = seconds_of(lambda: dequantize_live(model), 0, options.repeats)
        moved = (nbytes + 4 * weights) / dequantized / (2 * source.nbytes / copy)
        print(
            f"dequantization alone       {dequantized:8.2f} s  {weights / dequantized / 1e9:6.2f} Gweights/s, ", end=""
        )
        print(f"{moved:.2f} of memory copy")
        multiplied = seconds_of(multiply_live(model, options.k * options.n), 0, options.repeats)
        print(f"multiplication alone       {multiplied:8.2f} s  {flop / multiplied / 1e9:6.0f} GFLOP/s")
        limit = dequantized + multiplied

        down = torch.randn(options.k, SHAPE.d)
        up = torch.randn(options.k, options.n, SHAPE.d)
        for name, call in (("sweep down", lambda: J.rmatmat(down)), ("sweep up", lambda: J.matmat(up))):
            took = seconds_of(call, 0, options.repeats)
            print(f"{name:26} {took:8.2f} s  {weights / took / 1e9:6.2f} Gweights/s, ", end="")
            print(f"{limit / took:.2f} of dequantization + multiplication")


if __name__ == "__main__":
    main()
