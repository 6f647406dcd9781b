"""The oracle's RWKV: time mixing of RWKV-6 (arXiv 2404.05892) and RWKV-7 (arXiv 2503.14456), one token after the other.

Every function takes the model, a layer's number and the normed input h [n, d] of that layer, and returns what the
mixer adds to the residual stream [n, d]. `frozen` detaches all but the path of the values: the token shift on them and
their projection, what the state hands on, centring in the norm of each head, and the output projection.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from oracle import Oracle


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def before(h: Tensor) -> Tensor:
    """Return the token before each one of h [n, d]; before the first there are zeros."""
    return torch.cat([torch.zeros_like(h[:1]), h[:-1]])


def keeping(*, frozen: bool) -> Callable[[Tensor], Tensor]:
    return torch.detach if frozen else lambda x: x


def normed_heads(o: Tensor, weight: Tensor, bias: Tensor, hold: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply LayerNorm to each head of o [n, heads, size], with weights for all of them [heads size]."""
    o = o - o.mean(-1, keepdim=True)
    scale = hold(1 / torch.sqrt(o.square().mean(-1, keepdim=True) + 64e-5))
    return (o * scale).flatten(1) * weight + bias


def wkv6(r: Tensor, k: Tensor, v: Tensor, decay: Tensor, first: Tensor | None) -> Tensor:
    """Return what is read of RWKV-6's state, all [n, heads, size]; before the token changes it if it has a bonus."""
    state, outputs = r.new_zeros(*r.shape[1:], v.shape[2]), []  # keys by values
    for t in range(len(r)):
        new = k[t][:, :, None] * v[t][:, None, :]
        after = decay[t][:, :, None] * state + new
        read = after if first is None else state + first[:, :, None] * new
        outputs.append((r[t][:, :, None] * read).sum(1))
        state = after
    return torch.stack(outputs)


def wkv7(r: Tensor, k: Tensor, v: Tensor, decay: Tensor, rate: Tensor, unit: Tensor) -> Tensor:
    """Return what is read of RWKV-7's state, all [n, heads, size]."""
    state, outputs = r.new_zeros(r.shape[1], v.shape[2], r.shape[2]), []  # values by keys
    for t in range(len(r)):
        removed = (state * unit[t][:, None]).sum(-1)  # what the state has under the unit key
        state = state * decay[t][:, None] - removed[:, :, None] * (unit[t] * rate[t])[:, None]
        state = state + v[t][:, :, None] * k[t][:, None]
        outputs.append((state * r[t][:, None]).sum(-1))
    return torch.stack(outputs)


def rwkv6(model: "Oracle", layer: int, h: Tensor, *, frozen: bool, context: int) -> Tensor:
    """RWKV-6; without a bonus for the token itself it is gated linear attention, as in QRWKV-6."""
    b, n, size, hold = f"blk.{layer}.time_mix_", len(h), model.metadata["wkv.head_size"], keeping(frozen=frozen)
    w = {name.removeprefix(b): value for name, value in model.weights.items() if name.startswith(b)}
    heads, past = h.shape[1] // size, before(h)

    def mixed(share: Tensor) -> Tensor:
        return h + (past - h) * share

    low = torch.tanh(mixed(w["lerp_x.weight"]) @ w["w1.weight"].T).reshape(n, 5, -1)
    lerp = w["lerp_fused.weight"] if "lerp_fused.weight" in w else [w[f"lerp_{name}.weight"] for name in "wkvrg"]
    shares = [hold(low[:, i] @ w["w2.weight"][i].T + lerp[i].flatten()) for i in range(5)]
    x = dict(zip(("decay", "key", "value", "receptance", "gate"), map(mixed, shares), strict=True))

    def projected(name: str) -> Tensor:
        """Return [n, heads, size]: heads that share keys and values are neighbours."""
        y = (x[name] @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)).reshape(n, -1, size)
        return y.repeat_interleave(heads // y.shape[1], 1)

    r, k, v, g = (projected(name) for name in ("receptance", "key", "value", "gate"))
    low = torch.tanh(x["decay"] @ w["decay_w1.weight"].T) @ w["decay_w2.weight"].T
    decay = torch.exp(-torch.exp(low + w["decay.weight"])).reshape(n, heads, size)
    linear = "first.weight" not in w
    if linear:
        k, r = k * (1 - decay), r / size**0.5
    o = wkv6(hold(r), hold(k), v, hold(decay), w.get("first.weight"))
    o = o.flatten(1) if linear else normed_heads(o, w["ln.weight"], w["ln.bias"], hold)
    gate = sigmoid(g) if linear else g * sigmoid(g)
    return (o * hold(gate.flatten(1))) @ w["output.weight"].T


def rwkv7(
    model: "Oracle",
    layer: int,
    h: Tensor,
    *,
    frozen: bool,
    context: int,
    source: tuple[int, Tensor] | None = None,
) -> Tensor:
    """RWKV-7. `source`: the first layer and what its mixer reads, for layers that add a share of its values."""
    b, n, size, hold = f"blk.{layer}.time_mix_", len(h), model.metadata["wkv.head_size"], keeping(frozen=frozen)
    w = {name.removeprefix(b): value for name, value in model.weights.items() if name.startswith(b)}
    past = before(h)
    lerp = w["lerp_fused.weight"].reshape(-1, h.shape[1])
    x = {name: h + (past - h) * share for name, share in zip("rwkvag", lerp, strict="g1.weight" in w)}

    def made(name: str, inner: Callable[[Tensor], Tensor], add: Tensor | float) -> Tensor:
        return inner(x[name] @ w[f"{name}1.weight"].T) @ w[f"{name}2.weight"].T + add

    def split(y: Tensor) -> Tensor:
        return y.reshape(n, -1, size)

    r, k, v = (x[name[0]] @ w[f"{name}.weight"].T for name in ("receptance", "key", "value"))
    if source is not None:
        at, read = source
        first = (read + (before(read) - read) * model.weights[f"blk.{at}.time_mix_lerp_fused.weight"][3].flatten()) @ (
            model.weights[f"blk.{at}.time_mix_value.weight"].T
        )
        v = v + (first - v) * hold(sigmoid(made("v", lambda y: y, w["v0.weight"])))
    decay = torch.exp(-0.606531 * sigmoid(made("w", torch.tanh, w["w0.weight"])))
    rate = sigmoid(made("a", lambda y: y, w["a0.weight"]))
    unit = split(k * w["k_k.weight"])
    unit = unit / unit.square().sum(-1, keepdim=True).sqrt()
    k = k * (1 - w["k_a.weight"]) + k * rate * w["k_a.weight"]
    r, k, v, decay, rate, unit = (
        hold(split(r)),
        hold(split(k)),
        split(v),
        hold(split(decay)),
        hold(split(rate)),
        hold(unit),
    )
    o = wkv7(r, k, v, decay, rate, unit)
    o = normed_heads(o, w["ln.weight"], w["ln.bias"], hold) if "ln.weight" in w else o.flatten(1)
    o = o + (v * (r * k * w["r_k.weight"].reshape(-1, size)).sum(-1, keepdim=True)).flatten(1)
    if "g1.weight" in w:
        o = o * hold(made("g", sigmoid, 0.0))
    return o @ w["output.weight"].T


def channel_mix(model: "Oracle", b: str, h: Tensor, *, frozen: bool) -> Tensor:
    """RWKV's feed-forward network with squared ReLU, which reads the token before, too; RWKV-6 has a gate after it."""
    hold, weights = keeping(frozen=frozen), model.weights
    past = before(h)

    def read(name: str) -> Tensor:
        return h + (past - h) * weights[f"{b}.channel_mix_lerp_{name}.weight"]

    k = read("k") @ weights[f"{b}.channel_mix_key.weight"].T
    y = (k * hold(k.clamp(min=0))) @ weights[f"{b}.channel_mix_value.weight"].T
    if f"{b}.channel_mix_receptance.weight" not in weights:
        return y
    return y * hold(sigmoid(read("r") @ weights[f"{b}.channel_mix_receptance.weight"].T))
