"""What a GGUF model computes, written a second time: plain float64 torch, to judge the package by.

Nothing is shared with the package and nothing is clever. Bytes are decoded by the `gguf` package, the model is one
readable function that follows llama.cpp's rules, and the detached Jacobian is autograd's, with `.detach()` on the
factors that the method freezes. Itself tested in `test_oracle.py` against llama.cpp and the paper's own code.
Meant for short prompts and small models: all weights are dense float64.
"""

import math
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import gguf
import torch
from torch import Tensor


class Oracle(NamedTuple):
    """A file's metadata (architecture prefix removed from its keys) and dense float64 weights, by GGUF name."""

    architecture: str
    metadata: dict[str, Any]
    weights: dict[str, Tensor]


class Jacobian(NamedTuple):
    """The detached Jacobian J [d, n, d] of y [d] with respect to x [n, d]; offset = y - J x."""

    J: Tensor
    y: Tensor
    offset: Tensor
    x: Tensor


def load(path: str | os.PathLike[str]) -> Oracle:
    """Read a (single) GGUF file into float64."""
    reader = gguf.GGUFReader(os.fspath(path))
    fields = {name: f.contents() for name, f in reader.fields.items() if not name.startswith("tokenizer.ggml.")}
    architecture = fields["general.architecture"]
    weights = {
        t.name: torch.from_numpy(gguf.quants.dequantize(t.data, t.tensor_type).copy()).double() for t in reader.tensors
    }
    return Oracle(architecture, {k.removeprefix(f"{architecture}."): v for k, v in fields.items()}, weights)


def scalar(value: Any, layer: int) -> Any:
    """Some sizes may be stored per layer."""
    return value[layer] if isinstance(value, (list, tuple)) else value


def linear(model: Oracle, name: str, x: Tensor) -> Tensor:
    """Apply W x + b; the bias is optional for every matrix."""
    y = x @ model.weights[f"{name}.weight"].T
    b = model.weights.get(f"{name}.bias")
    return y if b is None else y + b


def rms_norm(model: Oracle, name: str, x: Tensor, *, frozen: bool) -> Tensor:
    scale = 1 / torch.sqrt((x * x).mean(-1, keepdim=True) + model.metadata["attention.layer_norm_rms_epsilon"])
    return x * (scale.detach() if frozen else scale) * model.weights[f"{name}.weight"]


def rope_angles(model: Oracle, n: int, n_rot: int) -> tuple[Tensor, float]:
    """Return the angles [n, n_rot / 2] of every pair and the magnitude M that multiplies cos and sin."""
    meta = model.metadata
    base = meta.get("rope.freq_base", 10000.0)
    kind = meta.get("rope.scaling.type", "linear")
    factor = meta.get("rope.scaling.factor", meta.get("rope.scale_linear", 1.0)) or 1.0
    magnitude = meta.get("rope.scaling.attn_factor", 1.0)
    pair = torch.arange(n_rot // 2, dtype=torch.float64)
    frequency = base ** (-2 * pair / n_rot)
    if "rope_freqs.weight" in model.weights:
        frequency = frequency / model.weights["rope_freqs.weight"]
    if kind == "linear":
        frequency = frequency / factor
    elif kind == "yarn":
        original = meta.get("rope.scaling.original_context_length", meta["context_length"])

        def pair_with(turns: float) -> float:
            """Return the (fractional) pair that turns so often within the original context."""
            return n_rot * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

        low = max(0, math.floor(pair_with(32.0)))
        high = min(n_rot - 1, math.ceil(pair_with(1.0)))
        kept = 1 - ((pair - low) / max(0.001, high - low)).clamp(0, 1)
        frequency = frequency * kept + frequency / factor * (1 - kept)
        magnitude *= 1 + 0.1 * math.log(factor)
    else:
        assert kind == "none", f"rope scaling {kind}"
    return torch.arange(n, dtype=torch.float64)[:, None] * frequency, magnitude


def rotate(x: Tensor, angles: Tensor, magnitude: float) -> Tensor:
    """Rotate adjacent pairs (0, 1), (2, 3), ... of x [n, heads, hd]."""
    cos, sin = magnitude * angles.cos()[:, None], magnitude * angles.sin()[:, None]
    a, b = x[..., 0::2], x[..., 1::2]
    out = torch.empty_like(x)
    out[..., 0::2] = a * cos - b * sin
    out[..., 1::2] = a * sin + b * cos
    return out


def attention(model: Oracle, layer: int, h: Tensor, *, frozen: bool) -> Tensor:
    """Causal attention on the normed input h [n, d], through the output projection."""
    meta, b, n = model.metadata, f"blk.{layer}", len(h)
    heads = scalar(meta["attention.head_count"], layer)
    kv_heads = scalar(meta.get("attention.head_count_kv", heads), layer)
    hd = meta.get("attention.key_length", meta["embedding_length"] // heads)
    assert meta.get("attention.value_length", hd) == meta.get("rope.dimension_count", hd) == hd
    if f"{b}.attn_qkv.weight" in model.weights:
        qkv = linear(model, f"{b}.attn_qkv", h)
        if f"{b}.attn_qkv.bias" not in model.weights and f"{b}.attn_q.bias" in model.weights:
            qkv = qkv + torch.cat([model.weights[f"{b}.attn_{part}.bias"] for part in "qkv"])
        q, k, v = qkv.split([heads * hd, kv_heads * hd, kv_heads * hd], dim=-1)
    else:
        q, k, v = (linear(model, f"{b}.attn_{part}", h) for part in "qkv")
    angles, magnitude = rope_angles(model, n, hd)
    q = rotate(q.reshape(n, heads, hd), angles, magnitude)
    k = rotate(k.reshape(n, kv_heads, hd), angles, magnitude)
    v = v.reshape(n, kv_heads, hd)
    future = torch.ones(n, n, dtype=torch.bool).triu(1)
    outputs = []
    for head in range(heads):
        group = head // (heads // kv_heads)
        scores = (q[:, head] @ k[:, group].T / math.sqrt(hd)).masked_fill(future, -math.inf)
        p = scores.softmax(-1)
        outputs.append((p.detach() if frozen else p) @ v[:, group])
    return linear(model, f"{b}.attn_output", torch.cat(outputs, dim=-1))


def feed_forward(model: Oracle, layer: int, h: Tensor, *, freeze: str | None) -> Tensor:
    """SwiGLU: down(silu(gate) * up)."""
    b = f"blk.{layer}"
    gate, up = linear(model, f"{b}.ffn_gate", h), linear(model, f"{b}.ffn_up", h)
    if freeze == "up":  # the path through `up` stays alive
        hidden = (gate * gate.sigmoid()).detach() * up
    elif freeze == "gate":  # the linear factor of silu(gate) = gate * sigmoid(gate) stays alive
        hidden = gate * gate.sigmoid().detach() * up.detach()
    else:
        hidden = gate * gate.sigmoid() * up
    return linear(model, f"{b}.ffn_down", hidden)


def forward(
    model: Oracle, ids: Sequence[int] | Tensor, *, freeze: str | None = None, x: Tensor | None = None
) -> dict[str, Tensor]:
    """Compute every state of the model on token `ids` [n], or on block-0 inputs `x` [n, d] in their place.

    `freeze` names the live path of the feed-forward, "up" or "gate", and detaches norm scales, attention and the
    other factor; None is the ordinary model. The values do not depend on it, only the derivatives do.

    Returns llama.cpp's names: `x` [n, d], per layer `attn_out-i`, `ffn_out-i` and `l_out-i` [n, d], `result_norm`
    [n, d], `logits` [n, v].
    """
    assert freeze in (None, "up", "gate"), freeze
    assert model.architecture == "llama", f"the oracle does not know {model.architecture}"
    frozen = freeze is not None
    if x is None:
        x = model.weights["token_embd.weight"][torch.as_tensor(ids)]
    out = {"x": x}
    for layer in range(model.metadata["block_count"]):
        h = rms_norm(model, f"blk.{layer}.attn_norm", x, frozen=frozen)
        out[f"attn_out-{layer}"] = attention(model, layer, h, frozen=frozen)
        x = x + out[f"attn_out-{layer}"]
        h = rms_norm(model, f"blk.{layer}.ffn_norm", x, frozen=frozen)
        out[f"ffn_out-{layer}"] = feed_forward(model, layer, h, freeze=freeze)
        x = x + out[f"ffn_out-{layer}"]
        out[f"l_out-{layer}"] = x
    out["result_norm"] = rms_norm(model, "output_norm", x, frozen=frozen)
    head = "output" if "output.weight" in model.weights else "token_embd"
    out["logits"] = linear(model, head, out["result_norm"])
    return out


def jacobian(
    source: Oracle | str | os.PathLike[str],
    ids: Sequence[int] | Tensor,
    *,
    mlp_path: str | None,
    position: int = -1,
    x: Tensor | None = None,
) -> Jacobian:
    """Differentiate the final norm's output at `position` with respect to the block-0 inputs, by autograd.

    `mlp_path` None gives the ordinary Jacobian, in which nothing is frozen. At a position before the last, the
    columns of J for later inputs are zero.
    """
    model = source if isinstance(source, Oracle) else load(source)
    if x is None:
        x = forward(model, ids)["x"]
    x = x.detach().double().requires_grad_()
    y = forward(model, ids, freeze=mlp_path, x=x)["result_norm"][position]
    identity = torch.eye(len(y), dtype=torch.float64)
    (J,) = torch.autograd.grad(y, x, identity, is_grads_batched=True)
    y, x = y.detach(), x.detach()
    return Jacobian(J, y, y - torch.einsum("end,nd->e", J, x), x)
