"""Token mixers without softmax, written a second time: plain float64 torch, one token after the other.

Gated DeltaNet is Yang, Kautz and Hatamizadeh's (arXiv:2412.06464) as Hugging Face's `Qwen3NextGatedDeltaNet` has it,
the gated short convolution is its `Lfm2ShortConv`; Kimi Delta Attention is Kimi Linear's (arXiv:2510.26692).
Every function takes its block's tensors (`w`, by name without `blk.i.`), the metadata and the normed input h [n, d],
and applies the output projection, too. With `frozen` all is detached but the path of the values: their projection, the
convolution on them, what the state hands on, and the output projection.
"""

import math
from typing import Any

import torch
from torch import Tensor


def convolve(x: Tensor, taps: Tensor) -> Tensor:
    """Apply a filter in time to each channel of x [n, c]; of its taps [c, K] the last is for the token itself."""
    n, kernel = len(x), taps.shape[1]
    padded = torch.cat([x.new_zeros(kernel - 1, x.shape[1]), x])
    return sum((padded[i : i + n] * taps[:, i] for i in range(kernel)), torch.zeros_like(x))


def silu(x: Tensor, *, frozen: bool) -> Tensor:
    share = torch.sigmoid(x)
    return x * (share.detach() if frozen else share)


def unit(x: Tensor, eps: float) -> Tensor:
    """Scale the last axis to length one."""
    return x / torch.sqrt((x * x).sum(-1, keepdim=True) + eps)


def delta_rule(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor) -> Tensor:
    """Read from a state that each token first lets fade and then corrects; all [n, S], beta [n], of one head.

    What the faded state holds at the token's key is replaced by its value, to the share beta. `decay` may differ
    between the channels of the key, or be [n, 1].
    """
    state = torch.zeros(v.shape[1], k.shape[1], dtype=v.dtype)
    outputs = []
    for t in range(len(v)):
        state = state * decay[t]
        state = state + beta[t] * torch.outer(v[t] - state @ k[t], k[t])
        outputs.append(state @ q[t])
    return torch.stack(outputs)


def gated_norm(x: Tensor, weight: Tensor, gate: Tensor, eps: float, *, frozen: bool) -> Tensor:
    """Apply RMSNorm over the last axis, then the gate; all but x itself may be frozen."""
    factor = torch.rsqrt((x * x).mean(-1, keepdim=True) + eps) * weight * gate
    return x * (factor.detach() if frozen else factor)


def lightning(w: dict[str, Tensor], meta: dict[str, Any], h: Tensor, *, depth: float, frozen: bool) -> Tensor:
    """Apply MiniMax-01's lightning attention (arXiv:2501.08313) in the block at `depth`, from 0 (first) to 1 (last)."""
    n, heads = len(h), meta["attention.head_count"]
    q, k, v = silu(h @ w["attn_qkv.weight"].T, frozen=frozen).reshape(n, heads, 3, -1).unbind(2)
    outputs = []
    for head in range(heads):
        slope = 2 ** (-8 * (head + 1) / heads) * (1 - depth + 1e-5)
        state, rows = torch.zeros(v.shape[2], k.shape[2], dtype=v.dtype), []
        for t in range(n):
            key, query = (x[t, head].detach() if frozen else x[t, head] for x in (k, q))
            state = state * math.exp(-slope) + torch.outer(v[t, head], key)
            rows.append(state @ query)
        outputs.append(torch.stack(rows))
    gate = torch.sigmoid(h @ w["attn_gate.weight"].T)
    eps = meta["attention.layer_norm_rms_epsilon"]
    read = gated_norm(torch.cat(outputs, dim=-1), w["attn_norm_2.weight"], gate, eps, frozen=frozen)
    return read @ w["attn_output.weight"].T


def delta_inputs(w: dict[str, Tensor], meta: dict[str, Any], h: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return q, k and v side by side [n, c], z [n, heads, S], and the raw beta and alpha [n, heads], of any layout."""
    n, size, keys, heads = len(h), meta["ssm.state_size"], meta["ssm.group_count"], meta["ssm.time_step_rank"]
    if "ssm_in.weight" in w:  # for each key head its q, k, values and gates
        parts = (h @ w["ssm_in.weight"].T).reshape(n, keys, -1).split([size, size, *2 * [size * heads // keys]], dim=-1)
        *qkv, z = (part.flatten(1) for part in parts)
        mixed = torch.cat(qkv, dim=-1)
    else:
        mixed, z = h @ w["attn_qkv.weight"].T, h @ w["attn_gate.weight"].T
    if "ssm_ba.weight" in w:
        beta, alpha = (half.flatten(1) for half in (h @ w["ssm_ba.weight"].T).reshape(n, keys, -1).chunk(2, dim=-1))
    else:
        beta, alpha = h @ w["ssm_beta.weight"].T, h @ w["ssm_alpha.weight"].T
    return mixed, z.reshape(n, heads, size), beta, alpha


def gated_delta(w: dict[str, Tensor], meta: dict[str, Any], h: Tensor, *, frozen: bool, grouped: bool) -> Tensor:
    """Gated DeltaNet: a decay for each head and token; `grouped`: neighbouring value heads share a key head."""
    n, size, keys, heads = len(h), meta["ssm.state_size"], meta["ssm.group_count"], meta["ssm.time_step_rank"]
    eps = meta["attention.layer_norm_rms_epsilon"]
    mixed, z, beta, alpha = delta_inputs(w, meta, h)
    mixed = silu(convolve(mixed, w["ssm_conv1d.weight"]), frozen=frozen)
    q, k, v = (part.reshape(n, -1, size) for part in mixed.split([keys * size, keys * size, heads * size], dim=-1))
    q, k = unit(q, eps) / size**0.5, unit(k, eps)
    beta, decay = torch.sigmoid(beta), torch.exp(w["ssm_a"] * torch.nn.functional.softplus(alpha + w["ssm_dt.bias"]))
    if frozen:
        q, k, beta, decay = q.detach(), k.detach(), beta.detach(), decay.detach()
    outputs = []
    for head in range(heads):
        key = head // (heads // keys) if grouped else head % keys
        o = delta_rule(q[:, key], k[:, key], v[:, head], decay[:, head, None], beta[:, head])
        outputs.append(gated_norm(o, w["ssm_norm.weight"], silu(z[:, head], frozen=False), eps, frozen=frozen))
    return torch.cat(outputs, dim=-1) @ w["ssm_out.weight"].T


def kimi_delta(
    w: dict[str, Tensor], meta: dict[str, Any], h: Tensor, *, frozen: bool, bound: str, key_eps: float = 0.0
) -> Tensor:
    """Kimi Delta Attention: a decay for each channel of the key, which may not fall below a bound.

    `bound` is the sign of the rates of decay in such files, or ""; `key_eps` of the unit vectors, if not that of norms.
    """
    n, size, heads, eps = len(h), meta["kda.head_dim"], w["ssm_a"].numel(), meta["attention.layer_norm_rms_epsilon"]

    def two_steps(name: str) -> Tensor:
        """Project h, through few dimensions where there is a second matrix."""
        y = h @ w[f"{name}_a.weight" if f"{name}_a.weight" in w else f"{name}.weight"].T
        return (y @ w[f"{name}_b.weight"].T if f"{name}_b.weight" in w else y).reshape(n, heads, size)

    names = ["attn_qkv"] if "attn_qkv.weight" in w else ["attn_q", "attn_k", "attn_v"]
    mixed = h @ torch.cat([w[f"{name}.weight"] for name in names]).T
    taps = torch.cat([w[f"ssm_conv1d_{part}.weight"].reshape(heads * size, -1) for part in "qkv"])
    q, k, v = silu(convolve(mixed, taps), frozen=frozen).reshape(n, 3, heads, size).unbind(1)
    q, k = unit(q, key_eps or eps) / size**0.5, unit(k, key_eps or eps)
    step, a = two_steps("ssm_f") + w["ssm_dt.bias"].reshape(heads, size), w["ssm_a"].reshape(heads, 1)
    if bound and "kda.gate_lower_bound" in meta:
        a = a if bound == "positive" else -a
        decay = torch.exp(meta["kda.gate_lower_bound"] * torch.sigmoid(a * step))
    else:
        decay = torch.exp(a * torch.nn.functional.softplus(step))
    beta, gate = torch.sigmoid(h @ w["ssm_beta.weight"].T), torch.sigmoid(two_steps("ssm_g"))
    if frozen:
        q, k, beta, decay = q.detach(), k.detach(), beta.detach(), decay.detach()
    outputs = []
    for i in range(heads):
        o = delta_rule(q[:, i], k[:, i], v[:, i], decay[:, i], beta[:, i])
        outputs.append(gated_norm(o, w["ssm_norm.weight"], gate[:, i], eps, frozen=frozen))
    return torch.cat(outputs, dim=-1) @ w["attn_output.weight"].T


def short_convolution(w: dict[str, Tensor], meta: dict[str, Any], h: Tensor, *, frozen: bool) -> Tensor:
    """LFM2's c * Conv(b * x), without any activation; x is live, the two gates may be frozen."""
    b, c, x = (h @ w["shortconv.in_proj.weight"].T).chunk(3, dim=-1)
    if frozen:
        b, c = b.detach(), c.detach()
    return (c * convolve(b * x, w["shortconv.conv.weight"])) @ w["shortconv.out_proj.weight"].T
