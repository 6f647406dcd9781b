"""Several residual streams (hyper-connections), written a second time: plain float64 torch, one stream at a time.

After DeepSeek's manifold-constrained hyper-connections (arXiv 2512.24880) as llama.cpp's `deepseek4.cpp` has them, and
Hunyuan's independent ones (`hy-v4.cpp`), which do not mix streams. States are [n, streams * d], one stream after the
other; before the first block there is one stream, of which all are copies.

After `kimi-k3.cpp`, attention over depth: a state is the stream, and what it was before some earlier blocks.

And after `hrm-text.cpp`, where two stacks of blocks make `zL` and `zH` in turn: a state is what runs through the
blocks of one stack, and then the one of these that is held meanwhile.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


def opened(x: Tensor, width: int, count: int) -> list[Tensor]:
    """Return the streams [n, width] of a state."""
    return [x] * count if x.shape[1] == width else list(x.split(width, dim=1))


def weights(w: Mapping[str, Tensor], stem: str, streams: list[Tensor], eps: float) -> Tensor:
    """Return the raw weights [n, m] of all uses of the streams, before scales and biases."""
    flat = torch.cat(streams, dim=1)
    return (flat / torch.sqrt((flat * flat).mean(-1, keepdim=True) + eps)) @ w[f"{stem}_fn.weight"].T


def balanced(logits: Tensor, eps: float, rounds: int) -> Tensor:
    """Return weights [from, to] of one position that sum to one, about, by rows and by columns."""
    p = torch.softmax(logits, dim=1) + eps
    p = p / (p.sum(0, keepdim=True) + eps)
    for _ in range(rounds - 1):
        p = p / (p.sum(1, keepdim=True) + eps)
        p = p / (p.sum(0, keepdim=True) + eps)
    return p


def connection(
    w: Mapping[str, Tensor], meta: Mapping[str, Any], stem: str, x: Tensor, *, mixed: bool, frozen: bool
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Return what a branch reads of a state, and the state after it as a function of what the branch returns."""
    count, eps = meta["hyper_connection.count"], meta["hyper_connection.epsilon"]
    streams = opened(x, meta["embedding_length"], count)
    raw = weights(w, stem, streams, meta["attention.layer_norm_rms_epsilon"])
    scale, base = w[f"{stem}_scale.weight"], w[f"{stem}_base.weight"]
    read = torch.sigmoid(raw[:, :count] * scale[0] + base[:count]) + eps
    written = torch.sigmoid(raw[:, count : 2 * count] * scale[1] + base[count : 2 * count])
    kept = torch.eye(count, dtype=x.dtype).expand(len(x), count, count)
    if mixed:
        written = 2 * written
        logits = (raw[:, 2 * count :] * scale[2] + base[2 * count :]).reshape(-1, count, count)
        kept = torch.stack([balanced(one, eps, meta["hyper_connection.sinkhorn_iterations"]) for one in logits])
    else:
        written = meta["hyper_connection.magnitude"] * written + eps
    if frozen:
        read, written, kept = read.detach(), written.detach(), kept.detach()

    def after(added: Tensor) -> Tensor:
        made = []
        for to in range(count):
            stream = written[:, to, None] * added
            for source in range(count):
                stream = stream + kept[:, source, to, None] * streams[source]
            made.append(stream)
        return torch.cat(made, dim=1)

    return sum((read[:, i, None] * stream for i, stream in enumerate(streams)), torch.zeros_like(streams[0])), after


def collected(w: Mapping[str, Tensor], meta: Mapping[str, Any], x: Tensor, *, frozen: bool) -> Tensor:
    """Return what the head reads of a state: a weighted sum of the streams, or their mean."""
    count, width = meta["hyper_connection.count"], meta["embedding_length"]
    if x.shape[1] == width:
        return x
    streams = opened(x, width, count)
    if "output_hc_fn.weight" not in w:
        return sum(streams[1:], streams[0]) / count
    raw = weights(w, "output_hc", streams, meta["attention.layer_norm_rms_epsilon"])
    read = (
        torch.sigmoid(raw * w["output_hc_scale.weight"] + w["output_hc_base.weight"]) + meta["hyper_connection.epsilon"]
    )
    read = read.detach() if frozen else read
    return sum((read[:, i, None] * stream for i, stream in enumerate(streams)), torch.zeros_like(streams[0]))


def over_depth(streams: list[Tensor], score: Tensor, eps: float, *, frozen: bool) -> Tensor:
    """Return the average of some streams, by the softmax of what `score` makes of the norm of each."""
    scores = [(x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)) @ score for x in streams]
    shares = torch.stack(scores, dim=1).softmax(1)
    shares = shares.detach() if frozen else shares
    return sum((shares[:, i, None] * x for i, x in enumerate(streams)), torch.zeros_like(streams[0]))


def connection_over_depth(
    w: Mapping[str, Tensor], meta: Mapping[str, Any], layer: int, branch: str, x: Tensor, *, frozen: bool
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Return the same of Kimi K3's attention residuals: what a branch reads, and the state after it.

    A state is the stream, and what it was when it began anew, each time, the last first.
    """
    stream, *past = x.split(meta["embedding_length"], dim=1)
    eps = meta["attention.layer_norm_rms_epsilon"]
    read = over_depth([stream, *past], w[f"{branch}_res_score.weight"], eps, frozen=frozen)
    anew = branch == "attn" and layer % meta["attn_res.block_size"] == 0
    return read, lambda added: torch.cat([*([added, stream] if anew else [stream + added]), *past], dim=1)


def collected_over_depth(w: Mapping[str, Tensor], meta: Mapping[str, Any], x: Tensor, *, frozen: bool) -> Tensor:
    """Return what the head reads of such a state; of a single stream, all of it."""
    streams = list(x.split(meta["embedding_length"], dim=1))
    return over_depth(streams, w["output_res_score.weight"], meta["attention.layer_norm_rms_epsilon"], frozen=frozen)


def turned(
    meta: Mapping[str, Any], first_low: Tensor, layer: int, x: Tensor, normed: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return the state with which a pass over a stack begins at a layer; x is what the last one left, or embeddings."""
    stack, in_cycle = meta["hrm.layers_per_stack"], meta["hrm.l_cycles"] + 1
    is_high = [turn % in_cycle == in_cycle - 1 for turn in range(layer // stack + 1)]
    if layer == 0:
        high, low = x, first_low.expand_as(x)
    else:
        made, held = x.chunk(2, dim=1)
        high, low = (normed(made), held) if is_high[-2] else (held, normed(made))
    return torch.cat([high + low, low if is_high[-1] else high], dim=1)
