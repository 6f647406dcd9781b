"""Compare ggjac with the paper's method on a real model: CPU seconds of one thread, side by side in one run.

    pip install "transformers==4.52.4" accelerate scikit-learn
    python tools/benchmarks/paper.py model.gguf [--prompt TEXT] [--depths 8,15,30] [--rank 8] [--dtype float32]
                                                [--repeats 3] [--rows "svd --per-token"]

The paper's code (github.com/jamesgolden1/equivalent-linear-LLMs) replaces files of transformers by its own, in which
norm scales, attention probabilities and gates are detached; here the same lines are replaced in memory. The rest is as
it has it: `torch.autograd.functional.jacobian(vectorize=True)` over transformers' modules, then scikit-learn's
randomized SVD. Files of the llama and gemma3 architectures.

Both start from token ids. Theirs has dense weights in memory, and decodes nothing; ggjac has the quantized file, and
decodes all vectors. Imports and loading are left out. Medians of `--repeats` turns, in processes of their own.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ggjac.analysis.jacobian import dense
from ggjac.analysis.layers import layers
from ggjac.analysis.per_token import per_token
from ggjac.analysis.svd import spectrum
from ggjac.jacobian import DetachedJacobian
from ggjac.model import open_model

ROWS = ("dense", "svd", "svd --per-token", "layers")


def cpu(call: Callable[[], object]) -> float:
    """Return the CPU seconds of a call in this process."""
    before = resource.getrusage(resource.RUSAGE_SELF)
    call()
    after = resource.getrusage(resource.RUSAGE_SELF)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def freeze(llama: Any, gemma: Any) -> None:
    """Detach in transformers' modules what the paper's files detach."""

    def llama_norm(self: Any, x: Tensor) -> Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * (wide * scale.detach()).to(x.dtype)

    def gemma_norm(self: Any, x: Tensor) -> Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (wide * scale.detach() * (1.0 + self.weight.float())).type_as(x)

    def mlp(self: Any, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)).detach() * self.up_proj(x))

    def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        k, v = (llama.repeat_kv(part, module.num_key_value_groups) for part in (k, v))
        scores = q @ k.transpose(2, 3) * options["scaling"] + mask[:, :, :, : k.shape[-2]]
        pattern = scores.softmax(-1, dtype=torch.float32).to(q.dtype).detach()
        return (pattern @ v).transpose(1, 2).contiguous(), pattern

    llama.LlamaRMSNorm.forward, gemma.Gemma3RMSNorm.forward = llama_norm, gemma_norm
    llama.LlamaMLP.forward = gemma.Gemma3MLP.forward = mlp
    llama.eager_attention_forward = gemma.eager_attention_forward = attend


def reference(path: Path, ids: list[int], rank: int, depths: list[int], dtype: str, rows: list[str]) -> dict[str, Any]:
    """Return the CPU seconds of the paper's method, and its singular values."""
    os.environ["TRANSFORMERS_OFFLINE"] = "1"
    transformers, extmath = import_module("transformers"), import_module("sklearn.utils.extmath")
    freeze(*(import_module(f"transformers.models.{name}.modeling_{name}") for name in ("llama", "gemma3")))
    load = partial(transformers.AutoModelForCausalLM.from_pretrained, path.parent, gguf_file=path.name)
    model = load(torch_dtype=getattr(torch, dtype), attn_implementation="eager").eval().requires_grad_(False).model
    gemma = model.config.model_type.startswith("gemma3")
    embeds = model.embed_tokens(torch.tensor([ids]))
    n = len(ids)
    mask = torch.full((n, n), torch.finfo(embeds.dtype).min, dtype=embeds.dtype).triu(1)[None, None]
    rope = {"position_ids": torch.arange(n)[None]}

    def forward(x: Tensor, blocks: int) -> Tensor:
        whole = model.rotary_emb(x, **rope)
        local = model.rotary_emb_local(x, **rope) if gemma else whole
        h = x
        for layer in model.layers[:blocks]:
            angles = local if gemma and layer.self_attn.is_sliding else whole
            attend = partial(layer.self_attn, attention_mask=mask, position_embeddings=angles)
            attn, _ = attend(hidden_states=layer.input_layernorm(h))
            if gemma:
                h = h + layer.post_attention_layernorm(attn)
                h = h + layer.post_feedforward_layernorm(layer.mlp(layer.pre_feedforward_layernorm(h)))
            else:
                h = h + attn
                h = h + layer.mlp(layer.post_attention_layernorm(h))
        return model.norm(h)[0, -1]

    def jacobian(blocks: int = len(model.layers)) -> Tensor:
        f = partial(forward, blocks=blocks)
        return torch.autograd.functional.jacobian(f, embeds, vectorize=True, strategy="reverse-mode")[:, 0]

    def triplets(matrix: Tensor) -> Any:
        return extmath.randomized_svd(matrix.float().numpy(), n_components=rank, random_state=0)

    J = jacobian()
    error = float((torch.einsum("end,nd->e", J, embeds[0]) - forward(embeds, len(model.layers))).norm())
    assert error < 1e-4 * float(forward(embeds, len(model.layers)).norm()), "the map does not give the output"
    seconds = {"dense": cpu(jacobian)}
    seconds["svd"] = seconds["dense"] + cpu(lambda: triplets(J.flatten(1)))
    seconds["svd --per-token"] = seconds["svd"] + cpu(lambda: [triplets(J[:, i]) for i in range(n)])
    if "layers" in rows:
        seconds["layers"] = cpu(lambda: [triplets(jacobian(depth).flatten(1)) for depth in depths])
    return {"seconds": seconds, "S": triplets(J.flatten(1))[1].tolist()}


def ours(path: Path, ids: list[int], rank: int, depths: list[int], dtype: str, rows: list[str]) -> dict[str, Any]:
    """Return the CPU seconds of ggjac, from the quantized file to decoded vectors, and its singular values."""

    def opened() -> DetachedJacobian:
        return open_model(path, device="cpu", dtype=dtype, threads=1).trace(ids).jacobian()

    def every_token() -> None:
        J = opened()
        per_token(J, rank)
        spectrum(J, rank)

    cumulative: dict[str, Any] = {"maps": ("cumulative",), "kinds": ("layer",), "depths": depths}
    calls: dict[str, Callable[[], Any]] = {
        "dense": lambda: dense(opened()),
        "svd": lambda: spectrum(opened(), rank),
        "svd --per-token": every_token,
        "layers": lambda: layers(opened(), rank, **cumulative),
    }
    return {"seconds": {name: cpu(calls[name]) for name in rows}, "S": spectrum(opened(), rank).svd.S.tolist()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--prompt", default="The bridge out of Marin is the")
    parser.add_argument("--depths", default="", help="blocks applied, for layers; default a quarter, half and all")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rows", default=",".join(ROWS), help="which of the rows to measure")
    parser.add_argument("--only", choices=["ours", "reference"], help="measure one, in this process")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = open_model(options.model, device="cpu", threads=1)
    ids, count, rows = model.tokenize(options.prompt), model.config.block_count, options.rows.split(",")
    depths = [int(depth) for depth in options.depths.split(",") if depth] or [count // 4, count // 2, count]
    if options.only:
        measure = ours if options.only == "ours" else reference
        print(json.dumps(measure(options.model, ids, options.rank, depths, options.dtype, rows)))
        return
    found: dict[str, list[dict[str, Any]]] = {"reference": [], "ours": []}
    for _ in range(options.repeats):
        for which in found:
            command = [sys.executable, __file__, *sys.argv[1:], "--only", which]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            found[which].append(json.loads(done.stdout.splitlines()[-1]))
    print(f"{options.model.name}: d = {model.config.d}, {count} blocks, {len(ids)} tokens, {options.dtype}, one thread")
    print(f"{'CPU seconds':18} {'paper':>8} {'ggjac':>8} {'ratio':>7}")
    for row in rows:
        theirs, own = (statistics.median(one["seconds"][row] for one in found[which]) for which in found)
        name = f"{row} {','.join(map(str, depths))}" if row == "layers" else row
        print(f"{name:18} {theirs:8.2f} {own:8.2f} {own / theirs:7.2f}")
    worst = max(abs(a / b - 1) for a, b in zip(found["ours"][0]["S"], found["reference"][0]["S"], strict=True))
    print(f"singular values within {worst:.1e}; load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
