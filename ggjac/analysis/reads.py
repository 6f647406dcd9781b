"""What a head reads: its share in a logit, split by the position whose values it reads; the sum is exact.

With everything frozen, what head `h` mixes at the output position `t` is linear in the values `v` of the positions up
to it, so that its direct share in a logit is a sum over them (`W_h` its columns of the output projection, `r` what the
head of the model reads of the branch):

    share_h = Σ_s pattern[t, s] r · W_h v_s + constant

It holds for attention and recurrences alike. A value stands at its position after its projection and, where the mixer
has one, its convolution in time: it may hold more than that position's token. The share of a position is not the weight
of its key: a head may look at a position and read nothing that counts for the logit.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ggjac.blocks import (
    BlockTape,
    BlockWeights,
    FrozenBlock,
    MixerTape,
    affine,
    attention_halves,
    block,
    mixing,
    stream_scale,
    valued,
)
from ggjac.config import Head, ModelConfig, find_head, heads_of
from ggjac.config.mixers import MIXERS
from ggjac.jacobian import DetachedJacobian, FrozenNetwork, Progress, Tap
from ggjac.jacobian.direct import later, read_directly
from ggjac.jacobian.targets import ask
from ggjac.linop import LinearOperator
from ggjac.results import NO_WORDS, Bars, Plotted, Table, Words
from ggjac.shares import split_name
from ggjac.sizes import HEADS_READ


@dataclass(frozen=True)
class HeadReads(Plotted):
    """The direct shares of some heads in a logit, by source position; made by `attribute_reads`.

    Attributes:
        target: token id whose logit is split.
        versus: token id whose logit is subtracted, or None.
        position: of the output.
        heads: block and number of each of `H` heads, counted through all mixers of its block, as by head.
        kinds: of their mixers.
        totals: `[H]`, float64: the share of each head.
        shares: `[H, n]`, float64: of the values of each position up to the output's.
        constants: `[H]`, float64: of no position, such as the bias of a norm of the head.
        weights: `[H, n]`, float64: the row of each head's pattern; NaN where each channel has its own.
        softcap: of the logits of the model's head (not applied here); 0 for none.
    """

    target: int
    versus: int | None
    position: int
    heads: list[tuple[int, int]]
    kinds: list[str]
    totals: Float[Tensor, " H"]
    shares: Float[Tensor, "H n"]
    constants: Float[Tensor, " H"]
    weights: Float[Tensor, "H n"]
    softcap: float

    @property
    def unexplained(self) -> Float[Tensor, " H"]:
        """The rest of each head's share: rounding."""
        return self.totals - self.shares.sum(1) - self.constants

    def data(self, words: Words = NO_WORDS) -> dict[str, Any]:
        """Return each head's share, and those of the positions that it reads, with its pattern's row."""
        return {
            "target": words.token(self.target),
            "versus": None if self.versus is None else words.token(self.versus),
            "softcap": self.softcap or None,
            "heads": [self._head(k, words) for k in range(len(self.heads))],
        }

    def _head(self, k: int, words: Words) -> dict[str, Any]:
        weights = [None if weight.isnan() else float(weight) for weight in self.weights[k]]
        pairs = enumerate(zip(self.shares[k].tolist(), weights, strict=True))
        return {
            "layer": self.heads[k][0],
            "head": self.heads[k][1],
            "mixer": self.kinds[k],
            "share": float(self.totals[k]),
            "sources": [words.here(i) | {"share": share, "weight": weight} for i, (share, weight) in pairs],
            "constant": float(self.constants[k]),
            "unexplained": float(self.unexplained[k]),
        }

    def tensors(self) -> dict[str, Tensor]:
        """Return what is saved: `read_heads` `[H, 2]`, and the attributes' numbers, `read_totals` and so on."""
        saved = {f"read_{name}": getattr(self, name) for name in ("totals", "shares", "constants", "weights")}
        return saved | {"read_heads": torch.tensor(self.heads)}

    def _table(self, words: Words) -> Table:
        n = self.shares.shape[1]
        heads = [f"L{layer}H{head}" for layer, head in self.heads for _ in range(n)]
        return Table(
            f"What heads read, in {split_name(words, self.target, self.versus)}",
            {"head": heads}
            | words.at([*range(n)] * len(self.heads))
            | {"weight": self.weights.flatten().tolist(), "share": self.shares.flatten().tolist()},
            (f"shares of L{self.heads[0][0]}H{self.heads[0][1]} sum to {float(self.shares[0].sum()):.4f}",),
            words.one("target", self.target) | words.one("versus", self.versus),
        )

    def _plot(self, words: Words) -> Bars:
        layer, head = self.heads[0]
        title = f"What L{layer}H{head} reads, in {split_name(words, self.target, self.versus)}"
        label = f"share; all shares sum to {float(self.totals[0]):.4f}"
        return Bars(title, label, words.labels(range(self.shares.shape[1])), self.shares[0].tolist())


def attribute_reads(
    jacobian: DetachedJacobian,
    heads: Sequence[tuple[int, int]],
    target: int | str | None = None,
    versus: int | str | None = None,
    *,
    progress: Progress | None = None,
) -> HeadReads:
    """Split the direct shares of heads in a logit by the positions whose values they read.

    Args:
        jacobian: of the prompt; the logit is that of its position.
        heads: block and number of each, counted through all mixers of the block; at least one.
        target: id or text of the token whose logit is split; default the most likely next one.
        versus: id or text of a token whose logit is subtracted.
        progress: called as `progress("block", done, total)` after each block of the heads.

    Raises:
        PromptError: `target` or `versus` is not in the vocabulary, or a text that is not one token.
        ValueError: both are the same token, there is no such head, or several ranks share the model.
    """
    network, p = jacobian.network, jacobian.position
    if network.frame.config != network.config:
        raise ValueError("what heads read is not split where several ranks share a model; run it in one process")
    named = [find_head(network.config, layer, head) for layer, head in dict.fromkeys(heads)]
    if not named:
        raise ValueError("no head is named; give some, as block and number")
    target, versus = jacobian.token_id(target), jacobian.token_id(versus)
    asked, here = ask(network.outputs[p][None], network.head, target, versus), slice(p, p + 1)
    end = Tap("layer", len(network.tapes))
    asking = read_directly(network, end, network.norm.at(here).operator(), asked.w, [p]).attn
    parts: dict[Head, _Read] = {}
    layers = [(layer, list(each)) for layer, each in groupby(sorted(named), key=lambda head: head.layer)]
    for done, (layer, each) in enumerate(layers, start=1):
        parts |= _read(network, layer, each, asking[layer], p)
        if progress:
            progress("block", done, len(layers))
    found, factors = [parts[head] for head in named], _factors(network, named)
    return HeadReads(
        target=int(asked.targets[0]),
        versus=versus,
        position=p,
        heads=[(head.layer, head.number) for head in named],
        kinds=[head.kind for head in named],
        totals=torch.stack([part.total for part in found]) * factors,
        shares=torch.stack([part.shares for part in found]) * factors[:, None],
        constants=torch.stack([part.constant for part in found]) * factors,
        weights=torch.stack([part.weights for part in found]),
        softcap=network.head.softcap,
    )


def largest_heads(config: ModelConfig, shares: Float[Tensor, "L h"]) -> list[tuple[int, int]]:
    """Return block and number of the heads with the largest shares in a logit, the largest first."""
    heads = [head[:2] for layer in range(config.block_count) for head in heads_of(config, layer)]
    return sorted(heads, key=lambda head: -abs(float(shares[head])))[:HEADS_READ]


class _Read(NamedTuple):
    """What one head reads, as `HeadReads` has it."""

    total: Float[Tensor, ""]
    shares: Float[Tensor, " n"]
    constant: Float[Tensor, ""]
    weights: Float[Tensor, " n"]


def _factors(network: FrozenNetwork, heads: Sequence[Head]) -> Float[Tensor, " H"]:
    """Return what multiplies what each head adds on its way to the end, float64."""
    first, scales = min(head.layer for head in heads), []
    for i in range(first, len(network.tapes)):
        tape = network.tapes[i]
        scale = stream_scale(network.weights(i), network.frame.config, tape.x, tape.factor)
        scales.append(1.0 if scale is None else float(scale))
    return later(scales)[[head.layer - first for head in heads]]


def _read(
    network: FrozenNetwork, layer: int, heads: Sequence[Head], asking: Float[Tensor, "1 d"], p: int
) -> dict[Head, _Read]:
    """Return what some heads of a block read at position `p`, where `asking` reads what the block's attention adds."""
    config, w, tape = network.frame.config, network.weights(layer), network.tapes[layer]
    frozen = block(w, config, tape, range(p, p + 1), config.bank(layer))
    m = frozen.attn.out_shape[0]  # one more where the feed-forward reads the position before
    own = tape.attn.at(slice(p + 1 - m, p + 1))
    stream = _stream(frozen, tape, p)
    values = frozen.mixed(stream, stream.new_ones(1), _banks(network, layer, frozen, p))[0]
    asking = torch.cat([asking.new_zeros(m - 1, config.d), asking])
    found = {}
    for kind, each in groupby(heads, key=lambda head: head.kind):
        which = config.layers[layer].mixers.index(kind)
        mixer, writing = own.mixers[which], attention_halves(w, config, own, p + 1, m)[which][1]
        normed = stream[0] if own.norm_in is None else affine(own.norm_in.operator(), stream[0])
        v = values if mixer.shared or frozen.bank is not None else affine(valued(w, mixer, p + 1), normed)
        cotangent = writing.rmatmat(asking[None])[0].unflatten(1, (mixer.heads, -1))  # [m, h, v]
        for head in each:
            R = torch.zeros_like(cotangent)
            R[:, head.own] = cotangent[:, head.own]
            found[head] = _of_head(w, mixer, R.flatten(1), v, normed, head.own)
    return found


def _stream(frozen: FrozenBlock, tape: BlockTape, p: int) -> Float[Tensor, "1 n i"]:
    """Return what the mixers of a block read, before their norm, at the positions up to `p`."""
    x = tape.x[None, : p + 1]
    return x if frozen.entry is None else frozen.entry.matmat(x, x.new_ones(1))


def _banks(network: FrozenNetwork, layer: int, frozen: FrozenBlock, p: int) -> dict[int, Tensor]:
    """Return the values of an earlier block, by its number, if a block reads those."""
    bank = frozen.bank
    if not frozen.reads_bank or bank is None:
        return {}
    tape = network.tapes[bank]
    source = block(network.weights(bank), network.frame.config, tape, range(p, p + 1), bank)
    assert source.values is not None
    stream = _stream(source, tape, p)
    return {bank: source.values.matmat(stream, stream.new_ones(1))}


def _of_head(
    w: BlockWeights,
    mixer: MixerTape,
    R: Float[Tensor, "m hv"],
    v: Float[Tensor, "n gv"],
    normed: Float[Tensor, "n d"],
    own: int,
) -> _Read:
    """Return what a head reads of the values `v`, where `R` reads what it mixes; other heads have zeros in `R`."""
    n, m = len(v), len(R)
    parts = [(mixing(w, mixer, n, m, v.shape[1]), v)]
    if mixer.memory is not None:
        parts.append((mixer.memory.operator(w, MIXERS[mixer.kind].memory, n), normed))
    wide, one = R.cpu().double(), v.new_ones(1)
    total = constant = wide.new_zeros(())
    shares = wide.new_zeros(n)
    for operator, x in parts:
        total = total + (affine(operator, x).cpu().double() * wide).sum()
        constant = constant + (operator.matmat(torch.zeros_like(x[None]), one)[0].cpu().double() * wide).sum()
        shares = shares + (operator.rmatmat(R[None])[0].cpu().double() * x.cpu().double()).sum(1)
    weights = wide.new_full((n,), torch.nan)
    if mixer.channels is None:
        bare: LinearOperator = mixing(w, mixer._replace(normed=None, beside=None), n, m, v.shape[1])
        first = torch.zeros_like(R)
        first[-1, own * (R.shape[1] // mixer.heads)] = 1
        weights = bare.rmatmat(first[None])[0].sum(1).cpu().double()
    return _Read(total, shares, constant, weights)
