"""Decompose a Jacobian within a memory budget; print each sweep beside its limits, and the memory it took.

    python tools/benchmarks/svd.py model.gguf [--tokens 8] [--rank 8] [--dtype float32] [--ram-budget 2GiB]
                                              [--trace FOLDER] [--sweeps N]

The limits are measured in the same run, on the file's own tensors: reading it from the disk, and dequantizing and
multiplying alone (two blocks, scaled up), between the sweeps, since a shared machine's speed changes. A sweep cannot
be faster than the slower of reading what is not in memory, and dequantizing and then multiplying; `of limit` is that
bound over the time it took. Memory is the process's anonymous memory, sampled.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ggjac import planner
from ggjac.jacobian import DetachedJacobian
from ggjac.jacobian.tapes import Tapes
from ggjac.model import Model, open_model
from ggjac.planner import machine, work
from ggjac.planner.bench import disk_rate
from ggjac.sizes import SLAB, TILE_ELEMENTS
from ggjac.svd import svd
from ggjac.units import size

SAMPLE = 2  # blocks in which the limits are measured


def once(call: Callable[[], object]) -> float:
    """Return the time of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def live(model: Model, i: int) -> list:
    """Return the matrices of a block that a sweep reads; dense models."""
    w = model.block(i)
    up = "ffn_up.weight"
    return [w.matrix(name) for name in ("attn_v.weight", "attn_output.weight", up, "ffn_down.weight")]


def dequantize(model: Model, blocks: range) -> None:
    for i in blocks:
        for weight in live(model, i):
            for _ in weight.tiles():
                pass


def multiply(model: Model, blocks: range, columns: int) -> Callable[[], None]:
    """Return a function that multiplies dense tiles of the live matrices, as a sweep does, with so many columns."""
    shapes = [weight.shape for weight in live(model, 0)]
    # Hidden units come in slabs.
    pieces = [(out, min(into, SLAB) if into > model.config.d else into) for out, into in shapes]
    dense = {piece: torch.randn(min(piece[0], TILE_ELEMENTS // piece[1]), piece[1]).to(model.dtype) for piece in pieces}
    inputs = {piece: torch.randn(columns, piece[1]).to(model.dtype) for piece in pieces}

    def run() -> None:
        for _ in blocks:
            for (_out, whole), piece in zip(shapes, pieces, strict=True):
                tile, x = dense[piece], inputs[piece]
                for _ in range(0, whole, piece[1]):
                    for start in range(0, piece[0], len(tile)):
                        x @ tile[: min(len(tile), piece[0] - start)].T

    return run


class Measured(DetachedJacobian):
    """A Jacobian that measures each of its sweeps, and the limits just before it."""

    path_to_file: Path
    model: Model
    disk: float

    def limits(self, k: int) -> tuple[float, float]:
        """Return the seconds that dequantizing, and multiplying, a whole sweep take."""
        blocks, count = range(SAMPLE), len(self.network.tapes)
        dequantized = once(lambda: dequantize(self.model, blocks))
        product = multiply(self.model, blocks, k * (self.position + 1))
        product()
        multiplied = once(product)
        # The last block multiplies at one position only.
        return dequantized * count / SAMPLE, multiplied * (count - 1) / SAMPLE

    def _timed(self, name: str, k: int, product: Callable[[], Tensor]) -> Tensor:
        before = self.limits(k)
        cached = machine.cached_bytes(self.path_to_file)
        stored = sum(weight.info.nbytes for i in range(len(self.network.tapes)) for weight in live(self.model, i))
        start, flop = time.perf_counter(), self.sweep.flop
        result = product()
        took = time.perf_counter() - start
        dequantized, multiplied = (statistics.mean(pair) for pair in zip(before, self.limits(k), strict=True))
        size = self.path_to_file.stat().st_size
        missing = 0 if cached is None else max(0.0, stored * (1 - cached / size))
        bound = max(missing / self.disk, dequantized + multiplied)
        TIMES.append(took)
        print(
            f"{name:5} {took:8.2f} s  {(self.sweep.flop - flop) / took / 1e9:5.0f} GFLOP/s  "
            f"{stored / took / 1e9:5.2f} GB/s | {missing / 1e9:5.1f} GB not cached {missing / self.disk:6.1f} s, "
            f"dequantization {dequantized:6.1f} s, multiplication {multiplied:6.1f} s | {bound / took:.2f} of limit",
            flush=True,
        )
        return result

    def matmat(self, X: Tensor, t: Tensor | None = None) -> Tensor:
        """Sweep up."""
        return self._timed("up", len(X), lambda: DetachedJacobian.matmat(self, X, t))

    def rmatmat(self, Y: Tensor) -> Tensor:
        """Sweep down."""
        return self._timed("down", len(Y), lambda: DetachedJacobian.rmatmat(self, Y))


TIMES: list[float] = []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--tol", type=float, default=1e-3)
    parser.add_argument("--sweeps", type=int, default=40, help="at most")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--ram-budget", type=machine.parse_size, default=2 << 30)
    parser.add_argument("--tapes-on-disk", action="store_true")
    options = parser.parse_args()

    machine.return_freed_memory()
    threads = torch.get_num_threads()
    with machine.PeakMemory() as memory, tempfile.TemporaryDirectory() as folder:
        model = open_model(options.model, dtype=options.dtype)
        n = options.tokens
        plan = planner.make(
            model.gguf,
            model.config,
            work.command_work("svd", model.config, n, options.dtype, rank=options.rank),
            threads=threads,
            budget=planner.Budget(options.ram_budget),
            tapes_on_disk=options.tapes_on_disk,
        )
        model.fit(plan)
        disk, _ = disk_rate(model.gguf)
        print(f"{options.model.name}: {model.gguf.nbytes / 1e9:.1f} GB, {model.config.block_count} blocks; ", end="")
        print(f"{n} tokens, k={options.rank}, {options.dtype}, budget {size(options.ram_budget)}; ", end="")
        print(f"{threads} threads, load {os.getloadavg()[0]:.1f}; disk {disk / 1e9:.2f} GB/s")
        print(f"plan: peak {size(plan.ram_peak)}, {plan.places.count('dense')} blocks kept dense")
        tapes = Tapes(Path(folder), {}, resident=False) if options.tapes_on_disk else True
        start = time.perf_counter()
        trace = model.trace([3 + i % 200 for i in range(n)], tapes=tapes)
        took = time.perf_counter() - start
        print(f"trace {took:8.2f} s  {model.gguf.nbytes / took / 1e9:5.2f} GB/s", flush=True)
        J = Measured(trace.network, n - 1)
        J.model, J.path_to_file, J.disk = model, options.model, disk
        start = time.perf_counter()
        found = svd(J, options.rank, tol=options.tol, max_sweeps=options.sweeps)
        print(f"{found.sweeps} sweeps, median {statistics.median(TIMES):.2f} s, in all {sum(TIMES):.1f} s; ", end="")
        print(f"stopped by {found.reason}; worst residual {float(found.residual.max()):.1e}")
        print("singular values " + " ".join(f"{s:.4g}" for s in found.S.tolist()))
    print(f"anonymous memory: peak {size(memory.nbytes)} (plan {size(plan.ram_peak)})")


if __name__ == "__main__":
    main()
