"""Compare ggjac's top-8 SVD with the reference's method: the dense Jacobian by autograd, then a dense SVD.

    python tools/benchmarks/autograd.py [model.gguf] [--tokens 8] [--rank 8] [--dtype bfloat16]

The reference is written out below as the paper's code does it (vectorized reverse mode over a network in which norm
scales, attention patterns and gates are detached; `torch.linalg.svd` of the result, in float32), on dense copies of
the same weights, for files of the llama architecture. Both run in processes of their own, one after the other, weights
loaded before the clock starts for the reference, and not for ggjac. Memory is the peak of anonymous memory. Without a
file, a temporary synthetic one is made (d = 1024, 8 blocks, ff 4096).
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ggjac.model import Model, open_model
from ggjac.planner import machine

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import make_synthetic_gguf

STEMS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


def dense_weights(model: Model) -> list[dict[str, Tensor]]:
    """Return every block's weights as dense matrices."""
    blocks = []
    for i in range(model.config.block_count):
        w = model.block(i)
        dense = {stem: w.matrix(f"{stem}.weight").dense() for stem in STEMS}
        blocks.append(dense | {name: w.vector(f"{name}.weight") for name in ("attn_norm", "ffn_norm")})
    return blocks


def norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon)
    return x * scale.detach() * weight


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate adjacent pairs, as files of the llama architecture have them; `[n, h, s]`."""
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


def reference(model: Model, ids: list[int], rank: int) -> dict[str, Any]:
    """Return the singular values, seconds and memory of the reference's method."""
    config, blocks = model.config, dense_weights(model)
    final, x0 = model.weights["output_norm.weight"].dense(), model.embedding.take(ids)
    own = config.layers[0]
    n, h, g, s = len(ids), own.heads, own.kv_heads, own.key_size
    base = float(model.gguf.metadata[f"{config.architecture}.rope.freq_base"])
    angles = torch.arange(n)[:, None] * base ** (-torch.arange(0, s, 2) / s)
    if "rope_freqs.weight" in model.weights:
        angles = angles / model.weights["rope_freqs.weight"].dense()
    cos, sin = angles.cos()[:, None].to(x0.dtype), angles.sin()[:, None].to(x0.dtype)
    hidden = torch.ones(n, n, dtype=torch.bool).triu(1)

    def forward(x: Tensor) -> Tensor:
        for w in blocks:
            a = norm(x, w["attn_norm"], config.norm_epsilon)
            q = rotated((a @ w["attn_q"].T).view(n, h, s), cos, sin)
            k = rotated((a @ w["attn_k"].T).view(n, g, s), cos, sin).repeat_interleave(h // g, 1)
            v = (a @ w["attn_v"].T).view(n, g, s).repeat_interleave(h // g, 1)
            scores = torch.einsum("qhs,khs->hqk", q, k) / s**0.5
            pattern = scores.masked_fill(hidden, -torch.inf).softmax(-1).detach()
            x = x + torch.einsum("hqk,khs->qhs", pattern, v).flatten(1) @ w["attn_output"].T
            m = norm(x, w["ffn_norm"], config.norm_epsilon)
            gate = torch.nn.functional.silu(m @ w["ffn_gate"].T).detach()
            x = x + (gate * (m @ w["ffn_up"].T)) @ w["ffn_down"].T
        return norm(x, final, config.norm_epsilon)[-1]

    start = time.perf_counter()
    J = torch.autograd.functional.jacobian(forward, x0, vectorize=True, strategy="reverse-mode")
    dense = time.perf_counter() - start
    S = torch.linalg.svd(J.reshape(len(J), -1).float(), full_matrices=False)[1]
    return {"dense": dense, "seconds": time.perf_counter() - start, "S": S[:rank].tolist()}


def ours(path: Path, ids: list[int], rank: int, dtype: str) -> dict[str, Any]:
    """Return the singular values, seconds and memory of ggjac: opening, trace and SVD, nothing kept dense."""
    start = time.perf_counter()
    J = open_model(path, device="cpu", dtype=dtype).trace(ids).jacobian()
    traced = time.perf_counter() - start
    found = J.svd(rank)
    seconds = time.perf_counter() - start
    return {"trace": traced, "seconds": seconds, "S": found.S.tolist(), "sweeps": found.sweeps}


def measure(which: str, path: Path, ids: list[int], rank: int, dtype: str) -> None:
    """Print one method's results as JSON."""
    machine.return_freed_memory()
    with machine.PeakMemory() as peak:
        if which == "ours":
            result = ours(path, ids, rank, dtype)
        else:
            result = reference(open_model(path, device="cpu", dtype=dtype), ids, rank)
    print(json.dumps(result | {"memory": peak.nbytes}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--only", choices=["ours", "reference"], help="measure one, in this process")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = options.model or Path(folder) / "synthetic.gguf"
        if options.model is None:
            make_synthetic_gguf.write(path, make_synthetic_gguf.PRESETS["bench-1024"], "Q4_K_M")
        ids = [3 + i % 200 for i in range(options.tokens)]
        if options.only:
            return measure(options.only, path, ids, options.rank, options.dtype)
        found = {}
        for which in ("ours", "reference"):
            command = [sys.executable, __file__, str(path), "--only", which]
            command += ["--tokens", str(options.tokens), "--rank", str(options.rank), "--dtype", options.dtype]
            found[which] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    a, b = found["ours"], found["reference"]
    print(
        f"ggjac      {a['seconds']:8.2f} s (trace {a['trace']:.2f} s, {a['sweeps']} sweeps) "
        f"{a['memory'] / 2**20:6.0f} MiB"
    )
    print(f"reference  {b['seconds']:8.2f} s (Jacobian {b['dense']:.2f} s)          {b['memory'] / 2**20:6.0f} MiB")
    worst = max(abs(x - y) / y for x, y in zip(a["S"], b["S"], strict=True))
    print(f"{b['seconds'] / a['seconds']:.1f} times faster, {a['memory'] / b['memory']:.2f} of the memory; ", end="")
    print(f"singular values within {worst:.1e}")
    return None


if __name__ == "__main__":
    main()
