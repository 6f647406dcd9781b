"""DeepSeek-V4's attention, written a second time: one head of keys that are the values too, and a compressed memory.

After llama.cpp's `deepseek4.cpp` and its `llama-kv-cache-dsv4.cpp`, one key and one query at a time. `w` are a block's
tensors, by their names without `blk.N.` and `.weight`.

A position sees the positions in its window, and of groups of `ratio` positions the keys of all that are complete. A
group's key is a mean of its positions, with shares for each channel; groups of 4 overlap: the first half of a
position's channels goes to the group after its own, the other half to its own.
"""

import math
from collections.abc import Callable, Mapping

import torch
from oracle_latent import normed
from torch import Tensor


def memory(w: Mapping[str, Tensor], h: Tensor, ratio: int, size: int, *, frozen: bool) -> list[Tensor]:
    """Return what each complete group's key is made of [size], before its norm."""
    made, gates = h @ w["attn_compressor_kv"].T, h @ w["attn_compressor_gate"].T
    overlaps, found = made.shape[1] > size, []
    for group in range(len(h) // ratio):
        sources = [(i, slice(-size, None)) for i in range(group * ratio, (group + 1) * ratio)]
        if overlaps and group:
            sources += [(i, slice(0, size)) for i in range((group - 1) * ratio, group * ratio)]
        p = torch.stack([gates[i, at] + w["attn_compressor_ape"][i % ratio, at] for i, at in sources]).softmax(0)
        p = p.detach() if frozen else p
        found.append((p * torch.stack([made[i, at] for i, at in sources])).sum(0))
    return found


def attention(
    w: Mapping[str, Tensor],
    h: Tensor,
    *,
    heads: int,
    groups: int,
    eps: float,
    turn: Callable[[Tensor, int, int], Tensor],
    ratio: int,
    window: int,
    frozen: bool,
) -> Tensor:
    """Return what the block adds to the stream, from its normed input h [n, d].

    `turn` rotates vectors [m, size] of one position, by 1 or back by -1; `groups` is how many projections heads share.
    """
    size = len(w["attn_kv_a_norm"])
    q = (normed(h @ w["attn_q_a"].T, w["attn_q_a_norm"], eps, frozen=False) @ w["attn_q_b"].T).unflatten(1, (heads, -1))
    q = q * torch.rsqrt(q.square().mean(-1, keepdim=True) + eps)
    kv = normed(h @ w["attn_kv"].T, w["attn_kv_a_norm"], eps, frozen=frozen)
    keys = [turn(kv[i : i + 1], i, 1)[0] for i in range(len(h))]
    remembered = []
    for group, mean in enumerate(memory(w, h, ratio, size, frozen=frozen) if ratio else []):
        key = normed(mean, w["attn_compressor_norm"], eps, frozen=frozen)
        remembered.append(turn(key[None], group * ratio, 1)[0])
    rows = []
    for i in range(len(h)):
        seen = keys[max(0, i + 1 - window) : i + 1] + (remembered[: (i + 1) // ratio] if ratio else [])
        v = torch.stack(seen)
        scores = torch.cat([turn(q[i], i, 1) @ v.T / math.sqrt(size), w["attn_sinks"][:, None]], 1)
        p = scores.softmax(-1)[:, :-1]
        read = turn((p.detach() if frozen else p) @ v, i, -1)
        parts = zip(read.chunk(groups), w["attn_output_a"].chunk(groups), strict=True)
        rows.append(torch.cat([matrix @ part.flatten() for part, matrix in parts]))
    return torch.stack(rows) @ w["attn_output_b"].T
