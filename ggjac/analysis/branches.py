"""Direct logit attribution: shares of blocks and heads in a logit, whose sum is exact.

By the additions to the residual stream at the output position, with the final norm `N` frozen at the prompt and `w` the
head's row of the target (the head's reading of each part, wherever that part's own input came from):

    logit = w · N (x_p + Σ_i attn_i + Σ_i mlp_i),    attn_i = norm_out (Σ_h W_h z_h + bias)

with `z_h` what head `h` read at the position and `W_h` its columns of the output projection. Where a number multiplies
the stream after a block, or a frozen norm goes past a branch in place of the stream, the parts added so far are
multiplied too. This is an identity of the frozen network: it states the contribution of each part, not the effect of
changing that part.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ggjac.blocks import BlockTape, FrozenBlock, attention_halves
from ggjac.config.mixers import MIXERS, name_of_mixers
from ggjac.directions import Direction
from ggjac.jacobian import DetachedJacobian, FrozenNetwork, Progress
from ggjac.jacobian.direct import DirectReading, ask_for_parts, later, read_directly
from ggjac.results import NO_WORDS, Plotted, Points, Table, Words
from ggjac.shares import Projection, entry_of, logit_columns, placed, split_name, value_name


@dataclass(frozen=True)
class BranchShares(Plotted):
    """The additions to the residual stream of `m` output positions, as the final norm and the head read them.

    Attributes:
        positions: the `m` output positions, ascending.
        targets: `[m]`, token ids; None of a projection.
        versus: token id whose logit is subtracted everywhere, or None.
        logits: `[m]`, float64: from the forward pass, before any soft cap; or the projection.
        embedding: `[m]`, float64: the position's own input of block 0.
        attn: `[m, L]`, float64: the attention branch of each of `L` blocks, after any post-norm and scale.
        mlp: `[m, L]`, float64: the feed-forward branch, likewise, and what the block adds by inputs of its own.
        bias: `[m]`, float64: of the final norm and of the head, and what is held at first where two stacks run in
            cycles; 0 for models without them.
        heads: `[m, L, h]`, float64: `attn` split by head; None if not asked for. A convolution counts as one head;
            where blocks differ, `h` is the largest number, and heads that a block does not have add 0.
        mixers: the kind of each of a block's mixers (see `ggjac.config.mixers`) and the number of its heads.
        attn_bias: `[m, L]`, float64: the part of `attn` of no head: the bias of its output projection.
        softcap: of the head's logits (not applied here); 0 for none.
        along: what is projected on what; None of logits. The blocks are then those before that.
    """

    positions: list[int]
    targets: Int[Tensor, " m"] | None
    versus: int | None
    logits: Float[Tensor, " m"]
    embedding: Float[Tensor, " m"]
    attn: Float[Tensor, "m L"]
    mlp: Float[Tensor, "m L"]
    bias: Float[Tensor, " m"]
    heads: Float[Tensor, "m L h"] | None
    attn_bias: Float[Tensor, "m L"] | None
    mixers: list[list[tuple[str, int]]]
    softcap: float
    along: Projection | None = None

    def data(self, words: Words = NO_WORDS) -> list[dict[str, Any]]:
        """Return a record for each output position: its target, and the additions of each block's branches or heads.

        A block whose `attn` is not attention alone has the kinds of its mixers (or `"none"`), and names of their heads.
        """
        by = "layer" if self.heads is None else "head"
        return [
            entry_of(self, by, row, words)
            | {
                "embedding": float(self.embedding[row]),
                "blocks": [self._block(row, i) for i in range(self.attn.shape[1])],
                "bias": float(self.bias[row]),
                "unexplained": float(self.unexplained[row]),
            }
            for row in range(len(self.positions))
        ]

    def _block(self, row: int, i: int) -> dict[str, Any]:
        block: dict[str, Any] = {"block": i, "attn": float(self.attn[row, i]), "mlp": float(self.mlp[row, i])}
        mixers = self.mixers[i]
        name = name_of_mixers([kind for kind, _ in mixers])
        if name:
            block["mixer"] = name
        if self.heads is not None and self.attn_bias is not None:
            own = self.heads[row, i, : sum(count for _, count in mixers)]
            block |= {"heads": own.tolist(), "attn_bias": float(self.attn_bias[row, i])}
            if name:
                block["head_names"] = [name for kind, count in mixers for name in _head_names(kind, count)]
        return block

    def tensors(self) -> dict[str, Tensor]:
        """Return what is saved, one row for each of `m` positions; see the attributes."""
        names = ("embedding", "attn", "mlp", "bias", "heads", "attn_bias")
        saved = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return placed(self.positions, self.targets, self.along) | {f"{value_name(self)}s": self.logits} | saved

    @property
    def unexplained(self) -> Float[Tensor, " m"]:
        """The rest of each logit: rounding. With heads, the sum is over them instead of `attn`."""
        attn = self.attn.sum(1)
        if self.heads is not None and self.attn_bias is not None:
            attn = self.heads.sum((1, 2)) + self.attn_bias.sum(1)
        return self.logits - self.embedding - attn - self.mlp.sum(1) - self.bias

    def _table(self, words: Words) -> Table:
        parts = [(m, *part) for m in range(len(self.positions)) for part in self._parts(m)]
        outputs, blocks, names, shares = (list(column) for column in zip(*parts, strict=True))
        logit = float(self.logits[-1])
        alone = None if self.targets is None or len(self.positions) > 1 else int(self.targets[0])
        note = f"last output: all shares sum to {logit - float(self.unexplained[-1]):.4f}; forward pass: {logit:.4f}"
        return Table(
            f"Shares in {split_name(words, alone, self.versus, self.along)}, by block",
            logit_columns(words, self, outputs) | {"block": blocks, "part": names, "share": shares},
            (note,),
            words.one("versus", self.versus) | ({} if self.along is None else {"of": self.along.name}),
        )

    def _parts(self, row: int) -> Iterator[tuple[int | None, str, float]]:
        """Yield all that adds up to a logit, with its block and name; biases where there are any."""
        yield None, "embedding", float(self.embedding[row])
        for i in range(self.attn.shape[1]):
            block = self._block(row, i)
            mixer = block.get("mixer", "attention")
            if "heads" in block:
                names = block.get("head_names") or [f"head {h}" for h in range(len(block["heads"]))]
                yield from ((i, *head) for head in zip(names, block["heads"], strict=True))
                if block["attn_bias"]:
                    yield i, f"bias of {mixer}", block["attn_bias"]
            else:
                yield i, mixer, block["attn"]
            yield i, "MLP", block["mlp"]
        if bias := float(self.bias[row]):
            yield None, "biases of norm and head", bias

    def _plot(self, words: Words) -> Points:
        blocks = range(self.attn.shape[1])
        attends = not any(name_of_mixers([kind for kind, _ in mixers]) for mixers in self.mixers)
        series = {
            "attention" if attends else "token mixers": (blocks, self.attn[-1].tolist(), ()),
            "MLP": (blocks, self.mlp[-1].tolist(), ()),
        }
        target = None if self.targets is None else int(self.targets[-1])
        title = f"Shares in {split_name(words, target, self.versus, self.along)}"
        return Points(title, "block", "share", series, parts=("attn", "mlp"))


def _head_names(kind: str, count: int) -> list[str]:
    """Return the names of a mixer's heads; a convolution, which has none, is one part."""
    return [f"{kind} head {i}" for i in range(count)] if MIXERS[kind].has_heads else [kind]


def attribute_branches(
    jacobian: DetachedJacobian,
    target: int | str | list[int] | None = None,
    versus: int | str | None = None,
    *,
    direction: Direction | Float[Tensor, " _"] | None = None,
    positions: str | Sequence[int] | None = None,
    by_head: bool = False,
    progress: Progress | None = None,
) -> BranchShares:
    """Split a logit over the embedding and the branches of every block, and over the attention heads if asked.

    Args:
        jacobian: of the prompt.
        target: id or text of the token whose logit is split, or a list of ids, one for each position, ascending;
            default the most likely one at each position.
        versus: id or text of a token whose logit is subtracted.
        direction: what is at the Jacobian's end is projected on it, in place of a logit, as `ggjac.attribute` takes it;
            the embedding and the blocks before the end have shares. What attention adds is split by head only.
        positions: output positions, as `attribute_positions` takes them; default the Jacobian's own.
        by_head: split attention by query head; the output projections are then read twice.
        progress: called as `progress("block", done, total)` after each block.

    Returns:
        Shares at all these positions at once, in one pass over the weights of the live paths: each branch is applied to
        the stream that the trace recorded, as the forward pass did, and written from the first of them to the last.

    Raises:
        PromptError: `target` or `versus` is not in the vocabulary, or a text that is not one token.
        DirectionError: the direction does not fit.
        ValueError: one of them is neither a text nor a whole number, both are the same token, a position is out of
            range, or a list of targets is not as long as that of positions; or a direction is of several positions, or
            of what has no such parts.
    """
    network, versus = jacobian.network, jacobian.token_id(versus)
    by = "head" if by_head else "layer"
    asked, end, norm, places = ask_for_parts(jacobian, target, versus, direction, positions, by)
    direct = read_directly(network, end, norm, asked.w, places)
    found = _parts(network, direct, by_head=by_head, progress=progress)
    return BranchShares(
        positions=places,
        targets=asked.targets,
        versus=versus,
        logits=asked.logits,
        bias=direct.constant + asked.bias,
        softcap=network.head.softcap,
        along=asked.along,
        **found,
    )


def _parts(
    network: FrozenNetwork, direct: DirectReading, *, by_head: bool, progress: Progress | None
) -> dict[str, Any]:
    """Return what is read of the embedding and of all that blocks up to the end add, as fields of `BranchShares`."""
    one = network.x.new_ones(1)
    span, rows, share, end = direct.span, direct.rows, direct.share, direct.end
    attn, mlp, heads, attn_bias, mixers, scales = [], [], [], [], [], []
    banks: dict[int, Tensor] = {}
    for i, tape, frozen in network.walk(span, blocks=range(end.index)):
        after_attn = direct.attn[i]
        stream = tape.x[None, : span.stop]
        mixers.append([(mixer.kind, mixer.heads) for mixer in tape.attn.mixers])
        mixers[-1] += [("laurel", 1)] if tape.attn.beside else []
        if by_head:
            stream, added, constant, parts = _by_head(network, direct, i, tape, frozen, stream, banks)
            mixers[-1] = [(kind, part.shape[1]) for (kind, _), part in zip(mixers[-1], parts, strict=True)]
            heads.append(torch.cat([torch.zeros(len(rows), 0, dtype=torch.float64), *parts], 1))
            attn_bias.append(share(constant, after_attn))
        else:
            stream, added = frozen.matmat_attn(stream, one, banks)
        attn.append(share(added[0], after_attn))
        middle, added = frozen.matmat_ffn(stream, added, one)
        mlp.append(share(added[0], direct.mlp[i]))
        if frozen.inputs is not None:
            mlp[-1] += share(frozen.inputs.matmat(frozen.written(middle, added), one)[0], direct.ends[i])
        scales.append(1.0 if frozen.scale is None or end.kind != "layer" else float(frozen.scale))
        if progress:
            progress("block", i + 1, end.index)
    carried = later(scales)
    return {
        "embedding": share(network.x[span.start : span.stop], direct.embedding) * carried[0],
        "attn": torch.stack(attn, 1) * carried,
        "mlp": torch.stack(mlp, 1) * carried,
        "heads": pad_sequence([own.T for own in heads], True).movedim(2, 0) * carried[:, None] if by_head else None,
        "attn_bias": torch.stack(attn_bias, 1) * carried if by_head else None,
        "mixers": mixers,
    }


def _by_head(
    network: FrozenNetwork,
    direct: DirectReading,
    i: int,
    tape: BlockTape,
    frozen: FrozenBlock,
    stream: Float[Tensor, "1 n _"],
    banks: dict[int, Tensor],
) -> tuple[Float[Tensor, "1 m _"], Float[Tensor, "1 m d"], Float[Tensor, "m d"], list[Float[Tensor, "r _"]]]:
    """Return what attention leaves of the stream, what it adds, its biases, and shares of the heads of each mixer.

    LAuReL, which has no heads, is one part, after those of the mixers.
    """
    span, after_attn, one = direct.span, direct.attn[i], stream.new_ones(1)
    stream = stream if frozen.entry is None else frozen.entry.matmat(stream, one)
    # Where the feed-forward reads one position more, attention writes it.
    m = frozen.attn.out_shape[0]
    mixing = tape.attn.at(slice(span.stop - m, span.stop))
    halves = attention_halves(network.weights(i), network.frame.config, mixing, span.stop, m)
    asking = torch.cat([after_attn.new_zeros(m - len(span), after_attn.shape[1]), after_attn])
    added, constant = torch.zeros_like(asking[None]), torch.zeros_like(asking)
    parts = []
    values = frozen.mixed(stream, one, banks)
    for mixer, (reading, writing) in zip(tape.attn.mixers, halves, strict=True):
        z = reading.matmat(values if mixer.shared else stream, one)
        own, bias = writing.matmat(torch.cat([z, torch.zeros_like(z)]), one.expand(2)).split(1)
        added, constant = added + own, constant + bias[0]
        # Each position has its own vector, and the projection acts at each position alone: one stack is enough.
        shares = writing.rmatmat(asking[None])[0].cpu().double() * z[0].cpu().double()
        own_heads = shares[m - len(span) :][direct.rows].unflatten(1, (mixer.heads, -1)).sum(2)
        parts.append(network.weights(i).gathered(own_heads, MIXERS[mixer.kind].output))
    if frozen.laurel is not None:
        own = frozen.laurel.matmat(stream, one)
        added = added + own
        parts.append(direct.share(own[0], after_attn)[:, None])
    return frozen.residual.matmat(stream), added, constant, parts
