"""How a logit reads the residual stream of its own position directly: what each addition to it meets on its way.

With the final norm frozen at the prompt, the head reads each addition past all later branches, and not through them:
direct logit attribution.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ggjac.blocks import entering, skip
from ggjac.jacobian.sweep import FrozenNetwork
from ggjac.jacobian.targets import Asked, ask
from ggjac.linop import LinearOperator


@dataclass(frozen=True)
class DirectReading:
    """What the head reads of the additions to the stream at `m` output positions; made by `read_directly`.

    All vectors are of the `s` positions from the first output to the last, and zero between the outputs. Factors on
    the stream at the end of blocks are not in them.

    Attributes:
        positions: the `m` output positions, ascending.
        asked: of their outputs.
        embedding: `[s, d]`, of the input of block 0.
        attn, mlp: `[s, d]` of each block, of what the branch adds.
        ends: `[s, i]` of the end of each block; only where blocks have inputs of their own, which they add there.
        bias: `[m]`, float64: what constants add to the logits: of norms, of the entry of blocks, and of the head.
    """

    positions: list[int]
    asked: Asked
    embedding: Float[Tensor, "s d"]
    attn: list[Float[Tensor, "s d"]]
    mlp: list[Float[Tensor, "s d"]]
    ends: list[Float[Tensor, "s _"]]
    bias: Float[Tensor, " m"]

    @property
    def span(self) -> range:
        """The positions from the first output to the last."""
        return range(self.positions[0], self.positions[-1] + 1)

    def share(self, added: Float[Tensor, "_ d"], read: Float[Tensor, "s d"]) -> Float[Tensor, " m"]:
        """Return what is read of an addition at the outputs, float64; it may have further positions before them."""
        products = added[len(added) - len(read) :].cpu().double() * read.cpu().double()
        return products.sum(1)[torch.tensor(self.positions) - self.positions[0]]


def read_directly(
    network: FrozenNetwork, positions: Sequence[int], target: int | list[int] | None, versus: int | None
) -> DirectReading:
    """Return how the logits of outputs read the stream; `target` and `versus` are as `ask` takes them."""
    config, span = network.frame.config, slice(positions[0], positions[-1] + 1)
    rows = torch.tensor(positions) - span.start
    asked = ask(network.outputs[span][rows], network.head, target, versus)
    w = asked.w.new_zeros(span.stop - span.start, config.d)  # nothing is read between the positions
    w[rows] = asked.w
    final = network.norm.at(span).operator()
    read, constant = final.rmatmat(w[None])[0], _constant(final, w)
    count = len(network.tapes)
    if config.reads == 1:
        return DirectReading(
            [*positions], asked, read, [read] * count, [read] * count, [read] * count, constant[rows] + asked.bias
        )
    attn, mlp, ends = list[Tensor](), list[Tensor](), list[Tensor]()
    for i in reversed(range(count)):
        tape = network.tapes[i]
        if config.inputs:
            ends.append(read)
        for branch, found in ((tape.ffn, mlp), (tape.attn, attn)):
            spread = branch.streams and branch.streams.at(span).spread(config.d)
            found.append(read if spread is None else spread.rmatmat(read[None])[0])
            past = skip(config, branch, span)
            read = read if past is None else past.rmatmat(read[None])[0]
        if tape.entry is not None:
            entry = entering(network.weights(i), config, tape.entry.at(span))
            constant = constant + _constant(entry, read)
            read = entry.rmatmat(read[None])[0]
    return DirectReading([*positions], asked, read, attn[::-1], mlp[::-1], ends[::-1], constant[rows] + asked.bias)


def later(scales: Sequence[float]) -> Float[Tensor, " L"]:
    """Return what multiplies each block's additions on their way to the end, from the factor after each, float64."""
    return torch.tensor(scales, dtype=torch.float64).flip(0).cumprod(0).flip(0)


def _constant(operator: LinearOperator, w: Float[Tensor, "m o"]) -> Float[Tensor, " m"]:
    """Return what the constant of an operator, such as a norm's bias, adds to logits that read `w` of its output."""
    y = operator.matmat(w.new_zeros(1, *operator.in_shape), w.new_ones(1))[0]
    return (y.cpu().double() * w.cpu().double()).sum(1)
