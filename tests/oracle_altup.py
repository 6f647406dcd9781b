"""Streams that are predicted and corrected (AltUp), written a second time: plain float64 torch, one stream at a time.

After llama.cpp's `gemma3n.cpp`. A state is [n, streams * d], one stream after the other; between the branches of a
block, what attention leaves is before the predictions. Branches read and write the first stream.
"""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

COUNT = 4


def to_length(x: Tensor, like: Tensor, *, frozen: bool) -> Tensor:
    """Return x, as long as others at each position."""
    ratio = like.norm(dim=1, keepdim=True) / x.norm(dim=1, keepdim=True)
    return x * (ratio.detach() if frozen else ratio)


def opened(w: Mapping[str, Tensor], x: Tensor, *, frozen: bool) -> Tensor:
    """Return all streams, made from the embeddings."""
    return torch.cat([x, *(to_length(x @ matrix.T, x, frozen=frozen) for matrix in w["altup_proj.weight"])], dim=1)


def closed(w: Mapping[str, Tensor], x: Tensor, *, frozen: bool) -> Tensor:
    """Return the mean of all streams, each turned back and as long as the first."""
    first, *others = x.chunk(COUNT, dim=1)
    matrices = w["altup_unembd_proj.weight"]
    turned = [to_length(s @ m.T, first, frozen=frozen) for s, m in zip(others, matrices, strict=True)]
    return (first + sum(turned)) / COUNT


def modalities(w: Mapping[str, Tensor], x: Tensor, eps: float) -> Tensor:
    """Return the router's numbers [n, streams]."""
    normed = x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * w["altup_router_norm.weight"]
    return torch.tanh((normed / x.shape[1]) @ w["altup_router.weight"].T)


def before_attention(
    w: Mapping[str, Tensor], x: Tensor, eps: float, *, frozen: bool
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Return what attention reads, before its norm, and the state after it as a function of what it adds."""
    streams = x.chunk(COUNT, dim=1)
    mix = modalities(w, streams[0], eps) @ w["altup_predict_coef.weight"].T  # to stream i from stream j: 4 i + j
    mix = mix.detach() if frozen else mix
    predictions = [
        streams[i] + sum(mix[:, COUNT * i + j, None] * streams[j] for j in range(COUNT)) for i in range(COUNT)
    ]
    return predictions[0], lambda added: torch.cat([(predictions[0] + added) / math.sqrt(2), *predictions], dim=1)


def before_ffn(
    w: Mapping[str, Tensor], x: Tensor, eps: float, *, frozen: bool
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Return what the feed-forward reads, before its norm, and the state after it as a function of what it adds."""
    own, *predictions = x.chunk(1 + COUNT, dim=1)

    def after(added: Tensor) -> Tensor:
        made = own + added
        by = modalities(w, made, eps) @ w["altup_correct_coef.weight"].T + 1
        by = by.detach() if frozen else by
        return torch.cat([p + by[:, i, None] * (made - predictions[0]) for i, p in enumerate(predictions)], dim=1)

    return own, after
