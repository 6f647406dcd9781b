"""Direct logit attribution of mixtures: the share of every expert in a logit, and which tokens chose it.

Or in the projection of the stream, or of what one mixture adds, on a direction.

At the output position the feed-forward branch of a block is a sum over the experts that the router chose there, a
shared one and perhaps a dense network:

    mlp = norm_out (Σ_e weight_e expert_e(h) + shared(h) + dense(h))

The head reads each term through the frozen norm and past all later branches, as it reads the branch. What an expert
added is split so, not what made the router choose it: choice and weights are frozen.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ggjac.blocks import BlockTape, FrozenBlock, Term, every_network, terms
from ggjac.checks import has_experts
from ggjac.config.mixers import name_of_mixers
from ggjac.directions import Direction
from ggjac.jacobian import DetachedJacobian, FrozenNetwork, Progress
from ggjac.jacobian.direct import DirectReading, ask_for_parts, later, read_directly
from ggjac.results import NO_WORDS, Result, Table, Words
from ggjac.shares import Projection, entry_of, logit_columns, placed, split_name, value_name

# Of the kinds of routed experts, by the end of their tensors' names: their names here.
ROUTED = {"_exps": "expert", "_chexps": "adjugate expert"}


class Mixture(NamedTuple):
    """The routed experts of a block that some output position uses, ascending, `e` of them.

    Attributes:
        block: its number.
        kind: `"expert"`, or `"adjugate expert"` for those that read the sum of the experts before them.
        experts: their numbers.
        shares: `[m, e]`, float64: 0 at an output that does not use the expert.
        weights: `[n, e]`, float64: of the router, at all positions up to the last output.
        chosen: `[n, e]`: whether a position uses the expert.
    """

    block: int
    kind: str
    experts: Int[Tensor, " e"]
    shares: Float[Tensor, "m e"]
    weights: Float[Tensor, "n e"]
    chosen: Tensor


@dataclass(frozen=True)
class ExpertShares(Result):
    """The shares of experts in the logits of `m` output positions, beside those of all else.

    Attributes:
        positions: the `m` output positions, ascending.
        targets: `[m]`, token ids; None of a projection.
        versus: token id whose logit is subtracted everywhere, or None.
        logits: `[m]`, float64: from the forward pass, before any soft cap; or the projection.
        embedding: `[m]`, float64: the position's own input of block 0.
        attn: `[m, L]`, float64: the attention branch of each of `L` blocks.
        mixtures: the routed experts of each block that has any.
        shared: `[m, L]`, float64: the expert that every position uses; 0 for none.
        dense: `[m, L]`, float64: the dense network of a block, alone or beside a mixture; 0 for none.
        rest: `[m, L]`, float64: of constants after the networks, such as a norm's bias, and of inputs of a block's own.
        bias: `[m]`, float64: of the final norm and of the head.
        mixers: the name of what mixes positions in each block; None of attention alone.
        softcap: of the head's logits (not applied here); 0 for none.
        along: what is projected on what; None of logits. The blocks are then those before that.
    """

    positions: list[int]
    targets: Int[Tensor, " m"] | None
    versus: int | None
    logits: Float[Tensor, " m"]
    embedding: Float[Tensor, " m"]
    attn: Float[Tensor, "m L"]
    mixtures: list[Mixture]
    shared: Float[Tensor, "m L"]
    dense: Float[Tensor, "m L"]
    rest: Float[Tensor, "m L"]
    bias: Float[Tensor, " m"]
    mixers: list[str | None]
    softcap: float
    along: Projection | None = None

    @cached_property
    def mlp(self) -> Float[Tensor, "m L"]:
        """The whole feed-forward branch of each block, as `attribute_branches` has it."""
        found = self.shared + self.dense + self.rest
        for mixture in self.mixtures:
            found[:, mixture.block] += mixture.shares.sum(1)
        return found

    @property
    def unexplained(self) -> Float[Tensor, " m"]:
        """The rest of each logit: rounding."""
        return self.logits - self.embedding - self.attn.sum(1) - self.mlp.sum(1) - self.bias

    def data(self, words: Words = NO_WORDS) -> dict[str, Any]:
        """Return a record for each output position, and for each expert the positions that use it."""
        return {
            "positions": [
                entry_of(self, "expert", row, words)
                | {
                    "embedding": float(self.embedding[row]),
                    "blocks": [self._block(row, i) for i in range(self.attn.shape[1])],
                    "bias": float(self.bias[row]),
                    "unexplained": float(self.unexplained[row]),
                }
                for row in range(len(self.positions))
            ],
            "chosen_by": [
                {
                    "block": mixture.block,
                    "kind": mixture.kind,
                    "expert": expert,
                    "tokens": self._tokens(mixture, e, words),
                }
                for mixture in self.mixtures
                for e, expert in enumerate(mixture.experts.tolist())
            ],
        }

    def _block(self, row: int, i: int) -> dict[str, Any]:
        at = self.positions[row]
        experts = [
            {
                "kind": m.kind,
                "expert": int(m.experts[e]),
                "weight": float(m.weights[at, e]),
                "share": float(m.shares[row, e]),
            }
            for m in self.mixtures
            if m.block == i
            for e in m.chosen[at].nonzero().flatten().tolist()
        ]
        parts = {name: float(getattr(self, name)[row, i]) for name in ("attn", "mlp", "shared", "dense", "rest")}
        mixer = {"mixer": self.mixers[i]} if self.mixers[i] else {}
        return {"block": i} | mixer | parts | {"experts": experts}

    @staticmethod
    def _tokens(mixture: Mixture, e: int, words: Words) -> list[dict[str, Any]]:
        users = mixture.chosen[:, e].nonzero().flatten().tolist()
        return [words.here(p) | {"weight": float(mixture.weights[p, e])} for p in users]

    def tensors(self) -> dict[str, Tensor]:
        """Return what is saved: the attributes, and of all mixtures together `e` experts with their blocks."""
        names = ("embedding", "attn", "shared", "dense", "rest", "bias")
        blocks = [torch.full_like(mixture.experts, mixture.block) for mixture in self.mixtures]
        return (
            placed(self.positions, self.targets, self.along)
            | {f"{value_name(self)}s": self.logits}
            | {name: getattr(self, name) for name in names}
            | {
                "expert_blocks": torch.cat(blocks),
                "experts": torch.cat([mixture.experts for mixture in self.mixtures]),
                "expert_shares": torch.cat([mixture.shares for mixture in self.mixtures], 1),
                "expert_weights": torch.cat([mixture.weights for mixture in self.mixtures], 1),
            }
        )

    def _table(self, words: Words) -> Table:
        parts = [(m, *part) for m in range(len(self.positions)) for part in self._parts(m)]
        outputs, blocks, names, weights, shares = (list(column) for column in zip(*parts, strict=True))
        alone = None if self.targets is None or len(self.positions) > 1 else int(self.targets[0])
        logit = float(self.logits[-1])
        note = f"last output: all shares sum to {logit - float(self.unexplained[-1]):.4f}; forward pass: {logit:.4f}"
        return Table(
            f"Shares in {split_name(words, alone, self.versus, self.along)}, by expert",
            logit_columns(words, self, outputs) | {"block": blocks, "part": names, "weight": weights, "share": shares},
            (note,),
            words.one("versus", self.versus) | ({} if self.along is None else {"of": self.along.name}),
        )

    def _parts(self, row: int) -> Iterator[tuple[int | None, str, float | None, float]]:
        """Yield all that adds up to a logit: its block, name, weight and share."""
        yield None, "embedding", None, float(self.embedding[row])
        for i in range(self.attn.shape[1]):
            block = self._block(row, i)
            yield i, block.get("mixer", "attention"), None, block["attn"]
            for expert in block["experts"]:
                yield i, f"{expert['kind']} {expert['expert']}", expert["weight"], expert["share"]
            for name, shown in NAMES.items():
                if block[name]:
                    yield i, shown, None, block[name]
        if bias := float(self.bias[row]):
            yield None, "biases of norm and head", None, bias


NAMES = {"shared": "shared expert", "dense": "dense MLP", "rest": "rest of the MLP"}


def attribute_experts(
    jacobian: DetachedJacobian,
    target: int | str | None = None,
    versus: int | str | None = None,
    *,
    direction: Direction | Float[Tensor, " _"] | None = None,
    positions: str | Sequence[int] | None = None,
    progress: Progress | None = None,
) -> ExpertShares:
    """Split a logit over the experts of every block, the embedding, attention, and all other networks.

    One pass over the weights of the live paths, for all positions at once, as in `attribute_branches`.

    Args:
        jacobian: of the prompt.
        target: id or text of the token whose logit is split; default the most likely one at each position.
        versus: id or text of a token whose logit is subtracted.
        direction: what is at the Jacobian's end is projected on it, in place of a logit, as `ggjac.attribute` takes it:
            the stream, or what an MLP adds; the embedding and the blocks before the end have shares.
        positions: output positions, as `attribute_positions` takes them; default the Jacobian's own.
        progress: called as `progress("block", done, total)` after each block.

    Raises:
        PromptError: `target` or `versus` is not in the vocabulary, or a text that is not one token.
        DirectionError: the direction does not fit.
        ValueError: the model has no experts, or none before the end; a token is neither a text nor a whole number, both
            are the same; a position is out of range; or a direction is of several positions, or of what has no such
            parts.
    """
    network, versus = jacobian.network, jacobian.token_id(versus)
    asked, end, norm, places = ask_for_parts(jacobian, target, versus, direction, positions, "expert")
    layers = network.config.layers[: end.index]
    has_experts([layer.routed for layer in layers], "output" if direction is None else end.kind)
    direct, one = read_directly(network, end, norm, asked.w, places), network.x.new_ones(1)
    banks: dict[int, Tensor] = {}
    attn, networks, mixtures, scales = list[Tensor](), list[dict[str, Tensor]](), list[Mixture](), list[float]()
    mixers: list[str | None] = []
    for i, tape, frozen in network.walk(direct.span, blocks=range(end.index)):
        stream, added = frozen.matmat_attn(tape.x[None, : direct.span.stop], one, banks)
        attn.append(direct.share(added[0], direct.attn[i]))
        mixers.append(name_of_mixers(tape.attn.kinds))
        own, routed = _shares(network, i, direct, _terms(network, i, tape, frozen, direct, stream, added))
        networks.append(own)
        mixtures += _mixtures(network, i, tape, direct, routed)
        scales.append(1.0 if frozen.scale is None or end.kind != "layer" else float(frozen.scale))
        if progress:
            progress("block", i + 1, end.index)
    carried = later(scales)
    return ExpertShares(
        positions=places,
        targets=asked.targets,
        versus=versus,
        logits=asked.logits,
        embedding=direct.share(network.x[direct.span.start : direct.span.stop], direct.embedding) * carried[0],
        attn=torch.stack(attn, 1) * carried,
        mixtures=[mixture._replace(shares=mixture.shares * carried[mixture.block]) for mixture in mixtures],
        **{name: torch.stack([own[name] for own in networks], 1) * carried for name in NAMES},
        bias=direct.constant + asked.bias,
        mixers=mixers,
        softcap=network.head.softcap,
        along=asked.along,
    )


def _terms(
    network: FrozenNetwork,
    i: int,
    tape: BlockTape,
    frozen: FrozenBlock,
    direct: DirectReading,
    stream: Float[Tensor, "1 p i"],
    added: Float[Tensor, "1 p d"],
) -> Iterator[Term]:
    """Yield what a block adds after attention, from the stream past that and what that adds, with its reading."""
    w, scale, read = network.weights(i), network.frame.config.residual_scale, direct.mlp[i]
    branch = tape.ffn.at(slice(direct.span.start, direct.span.stop))
    if not branch.empty:
        middle = stream + (added if frozen.spread is None else frozen.spread[0].matmat(added))
        yield from terms(w, branch, (stream if frozen.parallel else middle)[0], read, scale)
    if branch.beside is not None:
        yield from terms(w, branch.beside, stream[0], read, scale)
    if frozen.inputs is not None:
        one = stream.new_ones(1)
        out = frozen.written(*frozen.matmat_ffn(stream, added, one))
        yield Term(None, frozen.inputs.matmat(out, one)[0], direct.ends[i])


def _shares(
    network: FrozenNetwork, i: int, direct: DirectReading, found: Iterator[Term]
) -> tuple[dict[str, Float[Tensor, " m"]], dict[str, Float[Tensor, "m e"]]]:
    """Return the shares of a block's networks by name, `NAMES`, and those of all routed experts by kind."""
    config, w, s = network.config, network.weights(i), len(direct.span)
    named = {name: torch.zeros(s, 1, dtype=torch.float64) for name in NAMES}
    kinds = config.mixtures(config.layers[i])
    routed = {kind.kind: torch.zeros(s, kind.total, dtype=torch.float64) for kind in kinds}
    for part, added, read in found:
        share = (added.cpu().double() * read.cpu().double()).sum(1)
        if part is None or part.positions is None or part.expert is None:
            named["rest" if part is None else "shared" if part.kind else "dense"][:, 0] += share
        else:
            routed[part.kind][:, part.expert].index_add_(0, part.positions, share)
    for name, stem in (("shared", "ffn_down_shexp"), ("dense", "ffn_down")):
        named[name] = w.gathered(named[name], stem)
    rows = direct.rows
    gathered = {kind: w.gathered(shares, "ffn_down_exps")[rows] for kind, shares in routed.items()}
    return {name: share[rows, 0] for name, share in named.items()}, gathered


def _mixtures(
    network: FrozenNetwork, i: int, tape: BlockTape, direct: DirectReading, shares: dict[str, Float[Tensor, "m e"]]
) -> Iterator[Mixture]:
    """Yield the mixtures of a block, with the positions that use each expert, up to the last output."""
    n, rows, w = direct.span.stop, torch.tensor(direct.positions), network.weights(i)
    for kind, own in shares.items():
        weights, uses = torch.zeros(2, n, own.shape[1], dtype=torch.float64)
        for part in every_network(tape.ffn.at(slice(0, n))):
            if part.kind == kind and part.positions is not None and part.weight is not None and part.expert is not None:
                weights[:, part.expert].index_add_(0, part.positions, part.weight.cpu().double())
                uses[:, part.expert].index_add_(0, part.positions, torch.ones(len(part.positions), dtype=uses.dtype))
        weights, uses = (w.gathered(each, "ffn_down_exps") for each in (weights, uses))
        used = uses[rows].any(0).nonzero().flatten()
        yield Mixture(i, ROUTED[kind], used, own[:, used], weights[:, used], uses[:, used] > 0)
