"""The activations of feed-forward networks, written `a(g) = g * share(g)` so that either factor can be frozen."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ggjac.config import ModelConfig


class Activation(NamedTuple):
    """A gate's nonlinearity, written `a(g) = g * share(g)`, so that either factor can be frozen.

    With a `limit`, `g` is clamped from above and `up` from both sides; `shift` is added to `up`. `up_share` is the
    factor of `up` in what multiplies the activated gate, if that is not `up` itself.
    """

    share: Callable[[Tensor], Tensor]
    limit: float | None = None
    shift: float = 0.0
    up_share: Callable[[Tensor], Tensor] | None = None


def gelu_share(g: Tensor) -> Tensor:
    """Return GELU's factor in its tanh form, `(1 + tanh(√(2/π) (g + 0.044715 g³))) / 2`, which all GGUF files use."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3)))


def gelu_table_share(g: Tensor) -> Tensor:
    """Return the factor of ggml's GELU on the CPU: a table of half-precision inputs and outputs (ggml-cpu/vec.h)."""
    rounded = g.half().to(g.dtype)
    value = (rounded * gelu_share(rounded)).half().to(g.dtype)
    value = torch.where(g <= -10, 0, torch.where(g >= 10, g, value))
    return torch.where(g == 0, 0.5, value / g)


def xielu_share(z: Tensor, alpha_n: float, alpha_p: float, beta: float) -> Tensor:
    """Return xIELU's factor, which is β at 0; see `ggjac.config.Layer`."""

    def growth(z: Tensor) -> Tensor:
        z = z.clamp(max=-torch.finfo(z.dtype).tiny)  # the limit at 0 is 1, but 0 / 0 is NaN
        return torch.expm1(z) / z

    return torch.add(alpha_n * growth(z) + (beta - alpha_n), z.clamp(min=0), alpha=alpha_p)


def bounded_share(z: Tensor, bound: float) -> Tensor:
    """Return the factor of `bound tanh(z / bound)`, which is 1 at 0."""
    z = z / bound
    z = torch.where(z == 0, torch.finfo(z.dtype).tiny, z)
    return torch.tanh(z) / z


def activation(config: ModelConfig, layer: int, *, table: bool = False) -> Activation:
    """Return the activation of a block's feed-forward; with `table`, GELU is that of ggml on the CPU."""
    name, constants = config.row.activation, config.layers[layer].xielu
    if constants:
        return Activation(lambda z: xielu_share(z, *constants))
    if name == "situ":
        gate, up = config.situ
        return Activation(
            lambda g: bounded_share(g, gate) * torch.sigmoid(g),
            up_share=(lambda u: bounded_share(u, up)) if up else None,
        )
    return ACTIVATIONS["gelu table" if table and name == "gelu" else name]


ACTIVATIONS = {
    "silu": Activation(torch.sigmoid),
    "gelu": Activation(gelu_share),
    "relu": Activation(lambda g: (g > 0).to(g)),
    "relu2": Activation(torch.relu),
    "gelu table": Activation(gelu_table_share),
    "silu_oai": Activation(lambda g: torch.sigmoid(1.702 * g), limit=7.0, shift=1.0),
}
