"""Multi-head latent attention, written a second time: queries, keys and values expanded, nothing absorbed.

After DeepSeek-V2 (arXiv 2405.04434, section 2.1 and appendix C) and Hugging Face's `DeepseekV3Attention`. Each function
is pure: `w` are a block's tensors, by their names without `blk.N.` and `.weight`.

One latent vector c of each position, normed, makes the keys and the values of all heads; a part of the keys carries the
rotation instead, and is the same in all heads:

    q = [q_nope | turn(q_rope)],  k = [K c | turn(k_rope)],  v = V c
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


def normed(x: Tensor, weight: Tensor, eps: float, *, frozen: bool) -> Tensor:
    """Apply RMSNorm over the last axis; the scale may be frozen, the weight is live."""
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return x * (scale.detach() if frozen else scale) * weight


def queries(w: Mapping[str, Tensor], h: Tensor, eps: float) -> Tensor:
    """Return the queries of all heads [n, heads * (nope + rope)]; most models make them from a latent vector, too."""
    if "attn_q" in w:
        return h @ w["attn_q"].T
    return normed(h @ w["attn_q_a"].T, w["attn_q_a_norm"], eps, frozen=False) @ w["attn_q_b"].T


def expansions(w: Mapping[str, Tensor], heads: int, nope: int) -> tuple[Tensor, Tensor]:
    """Return what makes keys [heads, nope, latent] and values [heads, value, latent] of a latent vector.

    Older files have both in one matrix, the rows of keys above those of values in each head; newer ones have the keys'
    part transposed.
    """
    if "attn_kv_b" in w:
        both = w["attn_kv_b"].unflatten(0, (heads, -1))
        return both[:, :nope], both[:, nope:]
    return w["attn_k_b"].transpose(1, 2), w["attn_v_b"]


def attention(
    w: Mapping[str, Tensor],
    h: Tensor,
    *,
    heads: int,
    eps: float,
    turn: Callable[[Tensor], Tensor],
    factor: Tensor,
    window: int | None = None,
    frozen: bool,
) -> Tensor:
    """Return what the block adds to the stream, from its normed input h [n, d].

    `turn` rotates [n, heads, rope]; the scores of a query are multiplied by its `factor` [n], besides 1 / sqrt(size).
    A position sees so many as `window` says, itself included; None: all before it.
    """
    width = len(w["attn_kv_a_norm"])
    latent, k_rope = (h @ w["attn_kv_a_mqa"].T).tensor_split([width], dim=-1)
    q = queries(w, h, eps).unflatten(-1, (heads, -1))
    nope = q.shape[-1] - k_rope.shape[-1]
    to_keys, to_values = expansions(w, heads, nope)
    c = normed(latent, w["attn_kv_a_norm"], eps, frozen=frozen)
    k, v = (torch.einsum("hol,nl->nho", matrix, c) for matrix in (to_keys, to_values))
    if "attn_k_norm" in w:  # of the part that rotates
        k_rope = normed(k_rope, w["attn_k_norm"], eps, frozen=False)
    q_nope, q_rope = q.tensor_split([nope], dim=-1)
    q = torch.cat([q_nope, turn(q_rope)], dim=-1)
    k = torch.cat([k, turn(k_rope[:, None]).expand(-1, heads, -1)], dim=-1)
    scores = torch.einsum("ihc,jhc->hij", q, k) * factor[:, None] / math.sqrt(q.shape[-1])
    distance = torch.arange(len(h))[:, None] - torch.arange(len(h))
    scores = scores.masked_fill((distance < 0) | (distance >= (window or len(h))), -math.inf)
    if "attn_sinks" in w:
        scores = torch.cat([scores, w["attn_sinks"][:, None, None].expand(-1, len(h), 1)], dim=-1)
    p = scores.softmax(-1)[..., : len(h)]
    read = torch.einsum("hij,jhv->ihv", p.detach() if frozen else p, v)
    if "attn_gate" in w:  # of each head, or of all it has read
        share = torch.sigmoid(h @ w["attn_gate"].T).unflatten(-1, (heads, -1))
        read = read * (share.detach() if frozen else share)
    return read.flatten(1) @ w["attn_output"].T


def stretched(meta: Mapping[str, Any], magnitude: float, mscale: str | None) -> tuple[float, float]:
    """Return the magnitude of the rotation, and the factor of all scores, in a context that is stretched.

    `magnitude` is that of YaRN's own paper, m(1) with m(x) = 1 + 0.1 x ln(factor). DeepSeek has two constants:
    m(mscale) / m(all) is the magnitude of the rotation, and m(all)^2 multiplies the scores. A file states a tenth of
    `all`. What llama.cpp takes the other for, `mscale` says here: "equal" to `all`, "one", or "alone" if `all` is not
    read, which is zero then. llama.cpp multiplies the scores by the square of the rotation's magnitude once more, and
    of m(1) where the stretching is not YaRN's. None: nothing of this, just YaRN.
    """
    if mscale is None:
        return magnitude, 1.0
    kind = meta.get("rope.scaling.type", "linear")
    factor = meta.get("rope.scaling.factor", meta.get("rope.scale_linear", 1.0)) or 1.0
    whole = 0.0 if mscale == "alone" else meta.get("rope.scaling.yarn_log_multiplier", 0.0) / 0.1

    def m(x: float) -> float:
        return 1.0 if kind == "none" else 1 + 0.1 * x * math.log(factor)

    if kind == "yarn" and whole:
        magnitude *= m(whole if mscale == "equal" else 1.0) / m(whole) / m(1.0)
    return magnitude, (magnitude * (1.0 if kind == "yarn" else m(1.0)) * m(whole)) ** 2


def temperatures(meta: Mapping[str, Any], n: int) -> Tensor:
    """Return the factor of every position's scores [n], which grows by steps of `temperature_length`."""
    beta = meta.get("attention.temperature_scale", 0.0)
    if not beta:
        return torch.ones(n, dtype=torch.float64)
    step = torch.arange(n) // meta["attention.temperature_length"]
    return 1 + beta * torch.log(step.double() + 1)
