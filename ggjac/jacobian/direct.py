"""What a vector at the end of the network reads of each branch directly, past all later branches."""

import torch
from jaxtyping import Float
from torch import Tensor

from ggjac.blocks import entering, skip
from ggjac.jacobian.sweep import FrozenNetwork, Tap
from ggjac.linop import LinearOperator


def direct_reads(
    network: FrozenNetwork, end: Tap, chosen: slice, read: Float[Tensor, "m i"]
) -> tuple[list[Float[Tensor, "m d"]], list[Float[Tensor, "m _"]], Float[Tensor, " m"]]:
    """Return what is read at `end` of the embedding and of what each branch adds; and of the end of each block.

    The latter only where blocks have inputs of their own, which they add there. They are read past all later branches:
    see `ModelConfig.reads`; factors on the stream are not in them. Also return what is read of constants at the entry
    of blocks.
    """
    config, constant = network.frame.config, torch.zeros(len(read), dtype=torch.float64)
    if end.kind != "layer":  # only one branch is read
        nothing = network.x.new_zeros(len(read), config.width(0))
        wide = [read.new_zeros(len(read), config.width(i + 1)) for i in range(end.index)]
        return [nothing, *(nothing,) * (2 * end.index - 2), read, nothing], wide, constant
    if config.reads == 1:
        return [read] * (2 * end.index + 1), [read] * end.index, constant
    found, ends = list[Tensor](), list[Tensor]()
    for i in reversed(range(end.index)):
        tape = network.tapes[i]
        if config.inputs:
            ends.append(read)
        for branch in (tape.ffn, tape.attn):
            spread = branch.streams and branch.streams.at(chosen).spread(config.d)
            found.append(read if spread is None else spread.rmatmat(read[None])[0])
            past = skip(config, branch, chosen)
            read = read if past is None else past.rmatmat(read[None])[0]
        if tape.entry is not None:
            entry = entering(network.weights(i), config, tape.entry.at(chosen))
            constant += read_constant(entry, read)
            read = entry.rmatmat(read[None])[0]
    return [read, *found[::-1]], ends[::-1], constant


def read_constant(operator: LinearOperator, w: Float[Tensor, "m o"]) -> Float[Tensor, " m"]:
    """Return what the constant of an operator, such as a norm's bias, adds to logits that read `w` of its output."""
    y = operator.matmat(w.new_zeros(1, *operator.in_shape), w.new_ones(1))[0]
    return (y.cpu().double() * w.cpu().double()).sum(1)
