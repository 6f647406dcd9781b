"""Print how fast each type is dequantized, beside the memory copy of the same machine at the same moment.

    python tools/benchmarks/dequantize.py [--types Q4_K,Q6_K] [--threads 2] [--megaweights 16] [--repeats 5]

Gweights/s, medians. In brackets: bytes read and written per second, as a share of what a copy of float32 of that size
reads and writes with as many threads, measured just before. Above 1.0 is possible: a copy reads as much as it writes,
a dequantizer reads less. `native x gguf` is the last column by gguf-py's.
"""

import argparse
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import gguf
import numpy as np
import torch

from ggjac import quants
from ggjac.gguf.types import TYPES, GGMLType, row_bytes
from ggjac.planner.bench import seconds_of

COLUMNS = 4096
# F32 is a view, there and in torch: nothing to time.
GGUF_KNOWS = {qtype.name for qtype in gguf.quants._type_traits} | {"F16"}


@contextmanager
def without_native() -> Iterator[None]:
    """Leave libggml out."""
    before = os.environ.get("GGJAC_NATIVE")
    os.environ["GGJAC_NATIVE"] = "0"
    quants.native_library.cache_clear()
    quants._native.cache_clear()
    try:
        yield
    finally:
        os.environ.pop("GGJAC_NATIVE")
        if before is not None:
            os.environ["GGJAC_NATIVE"] = before
        quants.native_library.cache_clear()
        quants._native.cache_clear()


def measure(type: GGMLType, rows: int, threads: int, repeats: int) -> str:
    """Return one line of the table."""
    # Bytes below 64 make every f16 scale finite and every path do its ordinary work.
    raw = np.random.default_rng(0).integers(0, 64, (rows, row_bytes(type, COLUMNS)), dtype=np.uint8)
    source, out = torch.zeros(rows, COLUMNS), torch.zeros(rows, COLUMNS)

    def cell(call: Callable[[], object], threads: int, part: int = rows) -> tuple[float, str]:
        torch.set_num_threads(threads)
        copied = 2 * out.nbytes / seconds_of(lambda: out.copy_(source), 0, repeats)
        took = seconds_of(call, 0, repeats)
        rate = part * COLUMNS / took
        moved = part * (raw.shape[1] + 4 * COLUMNS) / took
        return rate, f"{rate / 1e9:6.2f} ({moved / copied:4.2f})"

    cells = []
    slow = None
    if type.name in GGUF_KNOWS:
        few = max(1, rows // 4)  # gguf-py is that slow
        qtype = gguf.GGMLQuantizationType(type.id)
        slow, text = cell(lambda: gguf.quants.dequantize(raw[:few], qtype), 1, few)
        cells.append(text)
    else:
        cells.append("-")
    if type.name in quants.FORMATS:
        data = torch.from_numpy(raw)
        cells.append("-" if type.name == "F32" else cell(lambda: quants.dequantize(data, type), threads)[1])
        with without_native():
            cells.append(cell(lambda: quants.dequantize_rows(raw, type, out), threads)[1])
    else:
        cells += ["-", "-"]
    fast = None
    for count in (1, threads):
        if quants._native(type) is None:
            cells.append("-")
        else:
            fast, text = cell(partial(quants.dequantize_rows, raw, type, out, threads=count), count)
            cells.append(text)
    cells.append(f"{fast / slow:.0f}x" if fast and slow else "-")
    return f"{type.name:8}" + "".join(f"{text:>15}" for text in cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [type.name for type in TYPES.values() if quants.supported(type)]
    parser.add_argument("--types", default=",".join(names), help="comma-separated; default all")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--megaweights", type=int, default=16, help="elements of the tensor, in 2^20")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    unknown = set(options.types.split(",")) - set(names)
    if unknown:
        parser.error(f"unknown types {', '.join(sorted(unknown))}; known: {', '.join(names)}")

    rows = max(1, (options.megaweights << 20) // COLUMNS)
    n = options.threads
    titles = ("gguf-py", f"torch x{n}", f"torch tiles x{n}", "native x1", f"native x{n}", "native x gguf")
    print(
        f"Gweights/s (share of memory copy); {rows} x {COLUMNS}; load {os.getloadavg()[0]:.1f} of {os.cpu_count()} CPUs"
    )
    print(f"{'type':8}" + "".join(f"{title:>15}" for title in titles))
    for type in TYPES.values():
        if type.name in options.types.split(","):
            print(measure(type, rows, n, options.repeats), flush=True)


if __name__ == "__main__":
    main()
