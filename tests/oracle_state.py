"""The oracle's state space mixers: Mamba and Mamba-2 as the plain recurrences of their papers, token after token.

Every function takes the model, a layer's number and the normed input h [n, d] of that layer, and returns what the
mixer adds to the residual stream [n, d]. `frozen` detaches all but the path of the values: the rows of the input
projection that make them, their convolution, and the output projection.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from oracle import Oracle


def silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def softplus(x: Tensor) -> Tensor:
    return torch.log1p(torch.exp(-x.abs())) + x.clamp(min=0)


def causal_convolution(x: Tensor, taps: Tensor) -> Tensor:
    """Return y_t = sum_i taps[:, i] x_{t - K + 1 + i}, channel by channel; before the prompt x [n, c] is 0."""
    width = taps.shape[1]
    padded = torch.cat([x.new_zeros(width - 1, x.shape[1]), x])
    return torch.stack([(padded[t : t + width] * taps.T).sum(0) for t in range(len(x))])


def gated_norm(y: Tensor, gate: Tensor, weight: Tensor | None, eps: float, *, frozen: bool) -> Tensor:
    """Gate y [n, inner], then divide each of its groups by its own root mean square.

    `weight` is [groups, inner / groups]; None: there is no norm.
    """
    y = y * gate
    if weight is None:
        return y
    grouped = y.reshape(len(y), *weight.shape)
    scale = 1 / torch.sqrt(grouped.square().mean(-1, keepdim=True) + eps)
    return (grouped * (scale.detach() if frozen else scale) * weight).flatten(1)


def of_heads(parts: Tensor, heads: int) -> Tensor:
    """Give every head what its group has [n, groups, state]; the heads of a group are neighbours."""
    return parts.repeat_interleave(heads // parts.shape[1], dim=1)


def state_space(x: Tensor, dt: Tensor, a: Tensor, write: Tensor, read: Tensor) -> Tensor:
    """Return y [n, heads, p] of S_t = exp(dt_t a) S_{t-1} + dt_t x_t B_t^T, y_t = S_t C_t, each head by itself.

    x is [n, heads, p], dt [n, heads], a [heads]; B (`write`) and C (`read`) are [n, heads, state].
    """
    state = x.new_zeros(*x.shape[1:], write.shape[-1])
    outputs = []
    for t in range(len(x)):
        decay = torch.exp(dt[t] * a)
        state = decay[:, None, None] * state + (dt[t][:, None] * x[t])[:, :, None] * write[t][:, None, :]
        outputs.append((state * read[t][:, None, :]).sum(-1))
    return torch.stack(outputs)


def mamba2(model: "Oracle", layer: int, h: Tensor, *, frozen: bool, context: int) -> Tensor:
    """Mamba-2: a state space with one decay per head, behind a convolution, gated and then normed.

    Live: the rows of `ssm_in` that make x, the convolution of x with its bias, D and `ssm_out`.
    """
    b, meta, n = f"blk.{layer}", model.metadata, len(h)
    inner, size = meta["ssm.inner_size"], meta["ssm.state_size"]
    groups, heads = meta["ssm.group_count"], meta["ssm.time_step_rank"]
    weights = {name.removeprefix(f"{b}.ssm_"): w for name, w in model.weights.items() if name.startswith(f"{b}.ssm_")}

    def held(factor: Tensor) -> Tensor:
        return factor.detach() if frozen else factor

    def shared(parts: Tensor) -> Tensor:
        return held(of_heads(silu(parts).reshape(n, groups, size), heads))

    z, x, write, read, dt = (h @ weights["in.weight"].T).split(
        [inner, inner, groups * size, groups * size, heads], dim=-1
    )
    convolved = causal_convolution(torch.cat([x, write, read], dim=-1), weights["conv1d.weight"])
    convolved = convolved + weights.get("conv1d.bias", 0.0)
    x, write, read = convolved.split([inner, groups * size, groups * size], dim=-1)
    x = (x * held(torch.sigmoid(x))).reshape(n, heads, inner // heads)
    dt = held(softplus(dt + weights["dt.bias"]))
    y = state_space(x, dt, weights["a"].flatten(), shared(write), shared(read)) + weights["d"] * x
    eps = meta["attention.layer_norm_rms_epsilon"]
    y = gated_norm(y.flatten(1), held(silu(z)), weights.get("norm.weight"), eps, frozen=frozen)
    return y @ weights["out.weight"].T


def selective_scan(x: Tensor, dt: Tensor, a: Tensor, write: Tensor, read: Tensor) -> Tensor:
    """Return y [n, inner] of S_t = exp(dt_t a) S_{t-1} + dt_t x_t B_t^T, y_t = S_t C_t, with a decay for each entry.

    x and dt are [n, inner], a is [inner, state]; B (`write`) and C (`read`) are [n, state].
    """
    state, outputs = torch.zeros_like(a), []
    for t in range(len(x)):
        state = torch.exp(torch.outer(dt[t], torch.ones_like(a[0])) * a) * state + torch.outer(dt[t] * x[t], write[t])
        outputs.append(state @ read[t])
    return torch.stack(outputs)


def mamba(model: "Oracle", layer: int, h: Tensor, *, frozen: bool, context: int) -> Tensor:
    """Mamba-1: a state space with a decay for each channel and entry of its state, behind a convolution, and gated.

    Time steps, B and C are made from the values. Live: the rows of `ssm_in` that make x, the convolution with its bias,
    D and `ssm_out`.
    """
    b, meta = f"blk.{layer}", model.metadata
    inner, size, rank = meta["ssm.inner_size"], meta["ssm.state_size"], meta["ssm.time_step_rank"]
    weights = {name.removeprefix(f"{b}.ssm_"): w for name, w in model.weights.items() if name.startswith(f"{b}.ssm_")}

    def held(factor: Tensor) -> Tensor:
        return factor.detach() if frozen else factor

    def normed(part: Tensor, name: str) -> Tensor:
        if f"{name}_norm.weight" not in weights and not meta.get("ssm.dt_b_c_rms"):
            return part
        size = torch.sqrt(part.square().mean(-1, keepdim=True) + meta["attention.layer_norm_rms_epsilon"])
        return part / size * weights.get(f"{name}_norm.weight", 1.0)

    x, z = (h @ weights["in.weight"].T).chunk(2, dim=-1)
    x = causal_convolution(x, weights["conv1d.weight"]) + weights["conv1d.bias"]
    x = x * held(torch.sigmoid(x))
    parts = (x @ weights["x.weight"].T).split([rank, size, size], dim=-1)
    dt, write, read = (normed(part, name) for part, name in zip(parts, ("dt", "b", "c"), strict=True))
    dt = softplus(dt @ weights["dt.weight"].T + weights["dt.bias"])
    y = selective_scan(x, held(dt), weights["a"], held(write), held(read)) + weights["d"] * x
    assert y.shape[1] == inner
    return (y * held(silu(z))) @ weights["out.weight"].T


def plamo2(model: "Oracle", layer: int, h: Tensor, *, frozen: bool, context: int) -> Tensor:
    """PLaMo 2: Mamba-2's state space, with time steps, B and C made from the values and normed, as Mamba-1 may do.

    The rows of `ssm_in` are, for each head, its gates and then its values. No convolution has a bias.
    """
    b, meta, n = f"blk.{layer}", model.metadata, len(h)
    inner, size, heads = meta["ssm.inner_size"], meta["ssm.state_size"], meta["ssm.time_step_rank"]
    weights = {name.removeprefix(f"{b}.ssm_"): w for name, w in model.weights.items() if name.startswith(f"{b}.ssm_")}

    def held(factor: Tensor) -> Tensor:
        return factor.detach() if frozen else factor

    z, x = ((h @ weights["in.weight"].T).reshape(n, heads, 2, inner // heads)).unbind(2)
    x = causal_convolution(x.flatten(1), weights["conv1d.weight"])
    x = x * held(torch.sigmoid(x))
    parts = (x @ weights["x.weight"].T).split([size, size, weights["dt.weight"].shape[1]], dim=-1)
    root = meta["attention.layer_norm_rms_epsilon"]
    write, read, dt = (
        part / torch.sqrt(part.square().mean(-1, keepdim=True) + root) * weights[f"{name}_norm"]
        for name, part in zip(("b", "c", "dt"), parts, strict=True)
    )
    dt = held(softplus(dt @ weights["dt.weight"].T + weights["dt.bias"]))
    x, write, read = (
        x.reshape(n, heads, -1),
        held(of_heads(write[:, None], heads)),
        held(of_heads(read[:, None], heads)),
    )
    y = state_space(x, dt, weights["a"], write, read) + weights["d"][:, None] * x
    return (y * held(silu(z))).flatten(1) @ weights["out.weight"].T
