"""A compressed memory: keys of groups of tokens, which are the values too (DeepSeek-V4's CSA and HCA).

    heads = Mix(pattern) @ Turn @ norm @ Pool(shares) @ Linear(attn_compressor_kv)

Each key is a mean of the tokens of its group, and of the group before it where groups overlap, with shares for each
channel: a softmax of what `attn_compressor_gate` makes, frozen as the pattern is. A token sees the groups that are
complete.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ggjac.blocks.frame import BlockWeights, affine, linear
from ggjac.blocks.norms import NormTape, record_norm, widened
from ggjac.config import ModelConfig
from ggjac.linop import LinearOperator, Mix, Pool
from ggjac.rope import Turn


class MemoryTape(NamedTuple):
    """The frozen quantities of a memory of `c` groups of `r` tokens.

    Attributes:
        shares: of each token in the `o` parts of a group's key, the last of which is of the group itself.
        norm: of the keys.
        turn: cos and sin of their rotation.
        pattern: weights from the groups to `m` output positions; None while it is recorded.
    """

    shares: Float[Tensor, "c o r e"]
    norm: NormTape
    turn: Float[Tensor, "2 c p"]
    pattern: Float[Tensor, "h m c"] | None = None

    def at(self, queries: slice) -> "MemoryTape | None":
        """Return the tape of some output positions, and of the groups up to the last of them; None without groups."""
        groups = slice(queries.stop // self.shares.shape[2])
        if not groups.stop:
            return None
        pattern = None if self.pattern is None else self.pattern[:, queries, groups]
        return MemoryTape(self.shares[groups], self.norm.at(groups), self.turn[:, groups], pattern)

    def keys(self, n: int) -> LinearOperator:
        """Return the keys of what they are made from at `n` positions, `[n, o e]` to `[c, e]`."""
        return Turn(self.turn, self.shares.shape[3]) @ self.norm.operator() @ Pool(self.shares, n)

    def operator(self, w: BlockWeights, stem: str, n: int) -> LinearOperator:
        """Return what heads read of the memory, `[n, d]` to `[m, h e]`; `stem` is the projection that it is made by."""
        assert self.pattern is not None
        return Mix(self.pattern, 1, self.shares.shape[3]) @ self.keys(n) @ linear(w, stem, n)


def record_memory(
    w: BlockWeights,
    config: ModelConfig,
    layer: int,
    made: Float[Tensor, "n oe"],
    gates: Float[Tensor, "n oe"],
    turn: Float[Tensor, "2 m p"],
) -> tuple[MemoryTape | None, Float[Tensor, "c e"]]:
    """Freeze a memory, but for its pattern, and return it with its keys; None, and no keys, before a group is complete.

    Args:
        w, config, layer: of the block.
        made: what the keys are means of, at all positions.
        gates: what shares are made from.
        turn: cos and sin at all positions, and perhaps later ones; a group's is that of its first token.
    """
    own = config.layers[layer]
    parts, ratio = own.compressed.windows, own.compressed.ratio
    count = len(made) // ratio
    if not count:
        return None, made.new_zeros(0, own.key_size)
    logits = widened(gates[: count * ratio]).unflatten(0, (count, ratio)) + w.wide_vector("attn_compressor_ape.weight")
    logits = logits.unflatten(2, (parts, -1)).transpose(1, 2)  # [c, o, r, e]
    missing = logits.new_full((parts - 1, ratio, own.key_size), -torch.inf)  # before the first group
    shifted = [torch.cat((missing[:back], logits[: count - back, -1 - back])) for back in reversed(range(parts))]
    shares = torch.stack(shifted, 1).flatten(1, 2).softmax(1).unflatten(1, (parts, ratio)).to(made)
    means = affine(Pool(shares, len(made)), made)
    norm = record_norm(w, config, ("attn_compressor_norm",), means)
    assert norm is not None
    tape = MemoryTape(shares, norm, turn[:, : count * ratio : ratio])
    return tape, affine(tape.keys(len(made)), made)
