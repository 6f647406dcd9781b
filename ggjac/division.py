"""Which terms of every branch are whose, where several ranks share a model: decided by the headers of its file alone.

A branch is a sum: over the hidden units of its networks, over its experts, over the heads of its attention, over the
channels of its convolutions. Each rank has some of them, on both sides of the sum: rows of the matrices that make them,
and columns of the one that adds them up. What cannot be divided is computed whole by every rank, and `Division.whole`
says why. The planner counts by the same division by which `ggjac.parallel` computes.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, NamedTuple

from ggjac.config import ModelConfig
from ggjac.config.mixers import MIXERS
from ggjac.config.model import Layer

if TYPE_CHECKING:  # NumPy would be imported for types alone
    from ggjac.gguf import TensorInfo

# Why a branch is computed whole by every rank.
RECURRENCE = "recurrence"
ALL_HEADS = "attention with a norm over all heads together"
ALL_UNITS = "network with a norm, or a least gate, of all its hidden units"
PROJECTION = "projection in place of attention"
SEVERAL = "attention whose keys and values several blocks read"
FEW_HEADS = "attention with too few heads for so many ranks, or narrower than stored blocks of weights"
NARROW = "network narrower than a stored block of weights for each rank"
CHANNELS = "convolution narrower than a stored block of weights for each rank"


class Cut(NamedTuple):
    """A rank's part of a tensor: of its rows (and of the bias beside it), its columns, or its stacked matrices."""

    axis: Literal["rows", "columns", "stack"]
    start: int
    stop: int

    @property
    def size(self) -> int:
        """Number of rows, columns or matrices."""
        return self.stop - self.start


class Heads(NamedTuple):
    """A rank's heads: of queries, and of keys and values."""

    queries: range
    keys: range


@dataclass(frozen=True)
class Division:
    """What of every block is one rank's.

    Attributes:
        rank, ranks: the rank, from 0, and the number of ranks.
        config: sizes, of which the numbers of heads are those of this rank.
        cuts: of each block, this rank's part of the tensors that are divided, by stem.
        whole: of each block, what every rank computes.
    """

    rank: int
    ranks: int
    config: ModelConfig
    cuts: tuple[Mapping[str, Cut], ...]
    whole: tuple[tuple[str, ...], ...]

    @property
    def sizes(self) -> ModelConfig:
        """Sizes of this rank's part: numbers of heads and, of networks, hidden units."""

        def units(kind: str, whole: int, cuts: Mapping[str, Cut]) -> int:
            return cuts[f"ffn_down{kind}"].size if f"ffn_down{kind}" in cuts else whole

        config, shared = self.config, self.config.expert_shared_feed_forward_length
        layers = zip(config.layers, self.cuts, strict=True)
        return replace(
            config,
            layers=tuple(replace(own, hidden_units=units("", own.hidden_units, cuts)) for own, cuts in layers),
            expert_shared_feed_forward_length=max(units("_shexp", shared, cuts) for cuts in self.cuts),
        )

    def experts(self, total: int) -> int:
        """Return how many of some experts, numbered from 0, are this rank's."""
        return len(range(self.rank, total, self.ranks))


def holds(expert: int, rank: int, ranks: int) -> bool:
    """Return whether a routed expert, which one rank has whole, is this rank's."""
    return expert % ranks == rank


def divide(config: ModelConfig, tensors: "Mapping[str, TensorInfo]", rank: int, ranks: int) -> Division:
    """Share out the terms of every block; return what one rank has."""
    layers, cuts, whole = [], [], []
    for i, own in enumerate(config.layers):
        found: dict[str, Cut] = {}
        reasons: list[str] = []
        heads = _heads(config, i, tensors, rank, ranks)
        if isinstance(heads, Heads):
            found |= _attention_cuts(config, own, heads)
            alibi = own.alibi and replace(own.alibi, heads=heads.queries)
            own = replace(own, heads=len(heads.queries), kv_heads=len(heads.keys), alibi=alibi)
        elif heads:
            reasons.append(heads)
        for stems, columns, reason in _sums(config, i, tensors):
            if f"{config.prefix(i)}ffn_sub_norm.weight" in tensors or own.sparsity:
                reasons.append(ALL_UNITS)
                continue
            share = _share(columns.shape[-1], columns.type.block_size, rank, ranks)
            if share is None:
                reasons.append(reason)
            else:
                *rows, output = stems
                found |= {stem: Cut("rows", share.start, share.stop) for stem in rows}
                found[output] = Cut("columns", share.start, share.stop)
        if any(MIXERS[mixer].recurrent for mixer in own.mixers):
            reasons.append(RECURRENCE)
        if "linear" in own.mixers:
            reasons.append(PROJECTION)
        layers.append(own)
        cuts.append(found)
        whole.append(tuple(dict.fromkeys(reasons)))
    return Division(rank, ranks, replace(config, layers=tuple(layers)), tuple(cuts), tuple(whole))


def largest(config: ModelConfig, tensors: "Mapping[str, TensorInfo]", ranks: int) -> Division | None:
    """Return the part of the rank that has most: where not all have as many experts the first, and else the last.

    None for a single rank, which shares with nobody.
    """
    if ranks == 1:
        return None
    return divide(config, tensors, 0 if config.expert_count % ranks else ranks - 1, ranks)


def _share(total: int, unit: int, rank: int, ranks: int) -> range | None:
    """Return a rank's range, on multiples of a unit; None where there are not enough of them for all."""
    units, rest = divmod(total, unit)
    if rest or units < ranks:
        return None
    return range(units * rank // ranks * unit, units * (rank + 1) // ranks * unit)


def _sums(
    config: ModelConfig, layer: int, tensors: "Mapping[str, TensorInfo]"
) -> "Iterator[tuple[tuple[str, ...], TensorInfo, str]]":
    """Yield the sums of a block over channels or hidden units that all positions use.

    Of each the stems, the last of which adds up, that one's tensor, and why a rank might not have a part of it.
    """
    if "convolution" in config.layers[layer].mixers:
        own = MIXERS["convolution"]
        stems = (*own.frozen, own.values, own.convolution, own.output)
        yield stems, tensors[f"{config.prefix(layer)}{own.output}.weight"], CHANNELS
    for kind in ("", "_shexp"):
        down = tensors.get(f"{config.prefix(layer)}ffn_down{kind}.weight")
        if down is not None:
            yield (f"ffn.act{kind}", *(f"ffn_{stem}{kind}" for stem in ("up", "gate", "down"))), down, NARROW


def _heads(config: ModelConfig, layer: int, tensors: "Mapping[str, TensorInfo]", rank: int, ranks: int) -> Heads | str:
    """Return a rank's heads; or why all ranks have all, which is nothing where the block has no attention.

    Heads that share keys and values stay together, unless there are more ranks than groups of them. Cuts lie between
    stored blocks of the output projection.
    """
    own = config.layers[layer]
    mixers = [MIXERS[mixer] for mixer in own.mixers if MIXERS[mixer].softmax]
    if not mixers:
        return ""
    if own.compressed.groups:
        return _groups(config, layer, tensors, rank, ranks)
    if own.source is not None or layer in config.writers:
        return SEVERAL
    whole_norm = config.row.qk_norm == "full" or config.row.inner_norms
    if "attention" in own.mixers and whole_norm:
        return ALL_HEADS
    each = own.heads // own.kv_heads
    stored = tensors[f"{config.prefix(layer)}attn_output.weight"].type.block_size

    def unit(width: int) -> int:
        return math.lcm(stored, width) // width

    if own.kv_heads >= ranks:
        groups = _share(own.kv_heads, unit(each * own.value_size), rank, ranks)
        return FEW_HEADS if groups is None else Heads(range(groups.start * each, groups.stop * each), groups)
    several, rest = divmod(ranks, own.kv_heads)
    if rest:
        return FEW_HEADS
    group, place = divmod(rank, several)
    members, first = _share(each, unit(own.value_size), place, several), group * each
    if members is None:
        return FEW_HEADS
    return Heads(range(first + members.start, first + members.stop), range(group, group + 1))


def _groups(config: ModelConfig, layer: int, tensors: "Mapping[str, TensorInfo]", rank: int, ranks: int) -> Heads | str:
    """Return a rank's heads, in whole groups that share a projection; all have the one head of keys."""
    own = config.layers[layer]
    each, width = own.heads // own.compressed.groups, own.compressed.rank
    stored = tensors[f"{config.prefix(layer)}attn_output_b.weight"].type.block_size
    groups = _share(own.compressed.groups, math.lcm(stored, width) // width, rank, ranks)
    return FEW_HEADS if groups is None else Heads(range(groups.start * each, groups.stop * each), range(1))


def _attention_cuts(config: ModelConfig, own: Layer, heads: Heads) -> dict[str, Cut]:
    """Return the parts of attention's tensors that belong to some heads, of either kind of attention."""

    def rows(of: range, width: int) -> Cut:
        return Cut("rows", of.start * width, of.stop * width)

    queries, keys = heads
    if own.compressed.groups:
        each = own.heads // own.compressed.groups
        groups = rows(range(queries.start // each, queries.stop // each), own.compressed.rank)
        return {
            "attn_q_b": rows(queries, own.key_size),
            "attn_sinks": rows(queries, 1),
            "attn_output_a": groups,
            "attn_output_b": groups._replace(axis="columns"),
        }
    nope = own.key_size - own.latent.rotary
    cuts = {
        "attn_q": rows(queries, own.key_size * (2 if config.row.gated_queries else 1)),
        "attn_output": rows(queries, own.value_size)._replace(axis="columns"),
        "attn_sinks": rows(queries, 1),
        "attn_gate": rows(queries, own.gate),
    }
    if "latent" in own.mixers:
        return cuts | {
            "attn_q_b": rows(queries, own.key_size),
            "attn_k_nope": rows(queries, nope),
            "attn_k_b": rows(queries, 1)._replace(axis="stack"),
            "attn_v_b": rows(queries, own.value_size),
        }
    cuts |= {"attn_k": rows(keys, own.key_size), "attn_v": rows(keys, own.value_size)}
    if config.row.qk_norm in ("heads", "gained"):  # weights of each head's own
        cuts |= {"attn_q_norm": rows(queries, 1), "attn_k_norm": rows(keys, 1)}
    return cuts
