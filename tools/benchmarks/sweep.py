"""Print the speed of a sweep beside its limits on the same machine at the same moment.

    python tools/benchmarks/sweep.py [--layers 2] [--k 16] [--n 8] [--dtype float32]

A temporary file of random Q4_K and Q6_K weights, shaped like the blocks of an 8B Llama, is traced and swept down and
up. Beside each sweep stand the two things it is made of, measured alone: dequantizing every live tensor once, and
multiplying as many dense weights with as many vectors; their sum is the limit of a sweep that does one after the other.
Medians; ratios mean more than seconds on a shared machine.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import torch

from ggjac.model import Model, open_model

D, FEED_FORWARD, HEADS, KV_HEADS, VOCABULARY = 4096, 14336, 32, 8, 512
LIVE = ("attn_v", "attn_output", "ffn_up", "ffn_down")


def blocks(rows: int, columns: int, type: gguf.GGMLQuantizationType, rng: np.random.Generator) -> np.ndarray:
    """Return random blocks with small finite scales, uint8 [rows, row bytes]."""
    size, nbytes = gguf.GGML_QUANT_SIZES[type]
    data = rng.integers(0, 256, (rows * columns // size, nbytes), dtype=np.uint8)
    scale = np.frombuffer(np.array([1e-4, 6e-4], np.float16).tobytes(), np.uint8)
    if type == gguf.GGMLQuantizationType.Q4_K:
        data[:, :4] = scale  # d, dmin
    else:
        data[:, -2:] = scale[:2] // 8  # Q6_K's d
    return data.reshape(rows, -1)


def write(path: Path, layers: int) -> None:
    """Write the synthetic model."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(layers)
    writer.add_context_length(4096)
    writer.add_embedding_length(D)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(D // HEADS)
    writer.add_tokenizer_model("none")
    key_value = D // HEADS * KV_HEADS
    shapes = {
        "attn_q": (D, D),
        "attn_k": (key_value, D),
        "attn_v": (key_value, D),
        "attn_output": (D, D),
        "ffn_gate": (FEED_FORWARD, D),
        "ffn_up": (FEED_FORWARD, D),
        "ffn_down": (D, FEED_FORWARD),
    }
    writer.add_tensor("token_embd.weight", rng.standard_normal((VOCABULARY, D), np.float32))
    writer.add_tensor("output_norm.weight", np.ones(D, np.float32))
    for i in range(layers):
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{i}.{name}.weight", np.ones(D, np.float32))
        for name, (out, into) in shapes.items():
            # As Q4_K_M does on half of the layers.
            wide = name in ("attn_v", "ffn_down") and i % 2 == 0
            type = gguf.GGMLQuantizationType.Q6_K if wide else gguf.GGMLQuantizationType.Q4_K
            writer.add_tensor(f"blk.{i}.{name}.weight", blocks(out, into, type, rng), raw_dtype=type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def seconds(call: Callable[[], object], repeats: int) -> float:
    """Return the median time of a call, after one that is not counted."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


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
        write(path, options.layers)
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
        copy = seconds(lambda: copied.copy_(source), options.repeats)
        print(f"memory copy                {2 * source.nbytes / copy / 1e9:8.1f} GB/s read and written")

        start = time.perf_counter()
        J = model.trace(list(range(options.n))).jacobian()
        print(f"trace                      {time.perf_counter() - start:8.2f} s")

        dequantized = seconds(lambda: dequantize_live(model), options.repeats)
        moved = (nbytes + 4 * weights) / dequantized / (2 * source.nbytes / copy)
        print(
            f"dequantization alone       {dequantized:8.2f} s  {weights / dequantized / 1e9:6.2f} Gweights/s, ", end=""
        )
        print(f"{moved:.2f} of memory copy")
        multiplied = seconds(multiply_live(model, options.k * options.n), options.repeats)
        print(f"multiplication alone       {multiplied:8.2f} s  {flop / multiplied / 1e9:6.0f} GFLOP/s")
        limit = dequantized + multiplied

        down = torch.randn(options.k, D)
        up = torch.randn(options.k, options.n, D)
        for name, call in (("sweep down", lambda: J.rmatmat(down)), ("sweep up", lambda: J.matmat(up))):
            took = seconds(call, options.repeats)
            print(f"{name:26} {took:8.2f} s  {weights / took / 1e9:6.2f} Gweights/s, ", end="")
            print(f"{limit / took:.2f} of dequantization + multiplication")


if __name__ == "__main__":
    main()
