"""Several residual streams (hyper-connections), written a second time: plain float64 torch, one stream at a time.

After llama.cpp's `hy-v4.cpp`, whose hyper-connections do not mix streams. States are [n, streams * d], one stream after
the other; before the first block there is one stream, of which all are copies.

And after its `hrm-text.cpp`, where two stacks of blocks make `zL` and `zH` in turn: a state is what runs through the
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


def connection(
    w: Mapping[str, Tensor], meta: Mapping[str, Any], stem: str, x: Tensor, *, frozen: bool
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Return what a branch reads of a state, and the state after it as a function of what the branch returns."""
    count, eps = meta["hyper_connection.count"], meta["hyper_connection.epsilon"]
    streams = opened(x, meta["embedding_length"], count)
    raw = weights(w, stem, streams, meta["attention.layer_norm_rms_epsilon"])
    scale, base = w[f"{stem}_scale.weight"], w[f"{stem}_base.weight"]
    read = torch.sigmoid(raw[:, :count] * scale[0] + base[:count]) + eps
    written = meta["hyper_connection.magnitude"] * torch.sigmoid(raw[:, count:] * scale[1] + base[count:]) + eps
    if frozen:
        read, written = read.detach(), written.detach()

    def after(added: Tensor) -> Tensor:
        return torch.cat([stream + written[:, i, None] * added for i, stream in enumerate(streams)], dim=1)

    return sum((read[:, i, None] * stream for i, stream in enumerate(streams)), torch.zeros_like(streams[0])), after


def collected(w: Mapping[str, Tensor], meta: Mapping[str, Any], x: Tensor, *, frozen: bool) -> Tensor:
    """Return what the head reads of a state: a weighted sum of the streams."""
    count, width = meta["hyper_connection.count"], meta["embedding_length"]
    if x.shape[1] == width:
        return x
    streams = opened(x, width, count)
    raw = weights(w, "output_hc", streams, meta["attention.layer_norm_rms_epsilon"])
    read = (
        torch.sigmoid(raw * w["output_hc_scale.weight"] + w["output_hc_base.weight"]) + meta["hyper_connection.epsilon"]
    )
    read = read.detach() if frozen else read
    return sum((read[:, i, None] * stream for i, stream in enumerate(streams)), torch.zeros_like(streams[0]))


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
