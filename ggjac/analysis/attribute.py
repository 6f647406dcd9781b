"""Shares in a logit, whose sum is exact: of the input tokens, or (direct logit attribution) of blocks and heads.

By token, along the live paths of the whole network, `w` being the head's row of the target (minus that of a second
token, for what sets the two apart):

    logit = w · y = Σ_i w · J_i x_i + w · offset

By the additions to the residual stream, with the final norm `N` frozen at the prompt ("direct logit attribution": the
head's reading of each part, wherever that part's own input came from):

    logit = w · N (x_p + Σ_i attn_i + Σ_i mlp_i),    attn_i = norm_out (Σ_h W_h z_h + bias)

with `z_h` what head `h` read at the position and `W_h` its columns of the output projection. Where a number multiplies
the stream after a block, or a frozen norm goes past a branch in place of the stream, the parts added so far are
multiplied too. Either split is an identity of the frozen network: it states the contribution of each part, not the
effect of changing that part.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, count, groupby
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from ggjac.blocks import BlockTape, FrozenBlock, attention_halves, block, entering, skip
from ggjac.checks import output_positions
from ggjac.config.mixers import MIXERS
from ggjac.decode import Head
from ggjac.jacobian import DetachedJacobian, FrozenNetwork, Progress
from ggjac.linop import LinearOperator
from ggjac.results import NO_WORDS, Bars, Plotted, Points, Result, Table, Words
from ggjac.sizes import TOKENS_AT_ONCE, MlpPath, chunk_floats

# What a share by token does not say; under every table of them.
CAVEAT = "mlp-path {rule}: the sum is exact, its division depends on the freezing rule; a share is not importance"


@dataclass(frozen=True)
class Attribution(Plotted):
    """The shares of the input positions in one logit, or in the difference of two.

    Attributes:
        target: token id whose logit is split.
        logit: `w · y` (plus the head's bias), from the forward pass, before any soft cap.
        shares: `[n]`, float64: the contribution of each input position.
        offset: the contribution of the biases, the head's included; 0 for models without them.
        versus: token id whose logit is subtracted, or None.
        position: of the output.
        softcap: of the head's logits (not applied here); 0 for none.
        mlp_path: the freezing rule, which decides the shares but not their sum.
    """

    target: int
    logit: float
    shares: Float[Tensor, " n"]
    offset: float
    versus: int | None
    position: int
    softcap: float
    mlp_path: MlpPath

    def data(self, words: Words = NO_WORDS) -> dict[str, Any]:
        """Return the target and every input position's share."""
        return {
            "target": words.token(self.target),
            "versus": None if self.versus is None else words.token(self.versus),
            "logit": self.logit,
            "softcap": self.softcap or None,
            "shares": [words.here(i) | {"share": float(share)} for i, share in enumerate(self.shares)],
            "offset": self.offset,
            "unexplained": self.unexplained,
            "sink": words.sink(float(self.shares[0]) / self.logit, len(self.shares)) if self.logit > 0 else None,
            "mlp_path": self.mlp_path,
        }

    def tensors(self) -> dict[str, Tensor]:
        """Return what is saved, as of `TokenShares`, of one position."""
        logits, offsets = (torch.tensor([value], dtype=torch.float64) for value in (self.logit, self.offset))
        placed = _placed([self.position], torch.tensor([self.target]))
        return placed | {"logits": logits, "shares": self.shares[None], "offsets": offsets}

    @property
    def unexplained(self) -> float:
        """`logit - Σ shares - offset`: rounding, and so a measure of what the dtype costs."""
        return self.logit - float(self.shares.sum()) - self.offset

    def _table(self, words: Words) -> Table:
        total = float(self.shares.sum()) + self.offset
        return Table(
            f"Shares in {_split(words, self.target, self.versus)}",
            _rows(words, [len(self.shares)]) | {"share": [*self.shares.tolist(), self.offset]},
            (
                f"shares and offset sum to {total:.4f}; forward pass: {self.logit:.4f}",
                CAVEAT.format(rule=self.mlp_path),
            ),
            _logit(words, self) | {"mlp path": self.mlp_path},
        )

    def _plot(self, words: Words) -> Bars:
        title = f"Shares in {_split(words, self.target, self.versus)}"
        label = f"share; all shares and the offset sum to {self.logit:.4f}"
        return Bars(title, label, words.labels(range(len(self.shares))), self.shares.tolist())


@dataclass(frozen=True)
class BothRules(Result):
    """The shares of one logit under both freezing rules, and how far they agree; made by `both_rules`.

    Attributes:
        up, gate: under each rule.
        spearman: correlation of the ranks of their shares, from -1 to 1; NaN for a single token.
        difference: sum of the absolute differences of their shares.
        size: mean of the two sums of absolute shares, to compare `difference` with.
    """

    up: Attribution
    gate: Attribution
    spearman: float
    difference: float
    size: float

    def data(self, words: Words = NO_WORDS) -> dict[str, Any]:
        """Return the data of the rule `up`, that of `gate` as `other_rule`, and their `agreement`."""
        spearman = None if math.isnan(self.spearman) else self.spearman
        agreement = {"spearman": spearman, "difference": self.difference, "size": self.size}
        return self.up.data(words) | {"other_rule": self.gate.data(words), "agreement": agreement}

    def tensors(self) -> dict[str, Tensor]:
        """Return what is saved: the tensors of both rules, `up_shares` and so on."""
        rules = {"up": self.up, "gate": self.gate}
        return {f"{rule}_{name}": tensor for rule, one in rules.items() for name, tensor in one.tensors().items()}

    def _table(self, words: Words) -> Table:
        columns = {rule: [*one.shares.tolist(), one.offset] for rule, one in (("up", self.up), ("gate", self.gate))}
        ranked = "of one token is not defined" if math.isnan(self.spearman) else f"{self.spearman:.2f}"
        note = f"rank correlation {ranked}; absolute differences sum to {self.difference:.4f}"
        return Table(
            f"Shares in {_split(words, self.up.target, self.up.versus)} under both freezing rules",
            _rows(words, [len(self.up.shares)]) | columns,
            (note, CAVEAT.format(rule="up and gate")),
            _logit(words, self.up),
        )


@dataclass(frozen=True)
class TokenShares(Result):
    """`Attribution` of `m` output positions, each of its own target.

    Attributes:
        positions: the `m` output positions, ascending.
        targets: `[m]`, token ids.
        versus: token id whose logit is subtracted everywhere, or None.
        logits: `[m]`, float64: from the forward pass, before any soft cap.
        shares: `[m, n]`, float64: the contribution of each input position; 0 after the output position.
        offsets: `[m]`, float64: the contribution of the biases, the head's included.
        softcap: of the head's logits (not applied here); 0 for none.
        mlp_path: the freezing rule, which decides the shares but not their sum.
    """

    positions: list[int]
    targets: Int[Tensor, " m"]
    versus: int | None
    logits: Float[Tensor, " m"]
    shares: Float[Tensor, "m n"]
    offsets: Float[Tensor, " m"]
    softcap: float
    mlp_path: MlpPath

    def data(self, words: Words = NO_WORDS) -> list[dict[str, Any]]:
        """Return a record for each output position: its target, and the shares of the positions up to it."""
        return [
            _entry(self, "token", row, words)
            | {
                "shares": [words.here(i) | {"share": float(self.shares[row, i])} for i in range(output + 1)],
                "offset": float(self.offsets[row]),
                "unexplained": float(self.unexplained[row]),
                "mlp_path": self.mlp_path,
            }
            for row, output in enumerate(self.positions)
        ]

    def tensors(self) -> dict[str, Tensor]:
        """Return what is saved: `positions`, `targets`, `logits`, `offsets` `[m]` and `shares` `[m, n]`."""
        saved = {name: getattr(self, name) for name in ("logits", "shares", "offsets")}
        return _placed(self.positions, self.targets) | saved

    @property
    def unexplained(self) -> Float[Tensor, " m"]:
        """The rest of each logit: rounding."""
        return self.logits - self.shares.sum(1) - self.offsets

    def _table(self, words: Words) -> Table:
        counts = [output + 1 for output in self.positions]
        outputs = [m for m, count in enumerate(counts) for _ in range(count + 1)]
        shares = [[*self.shares[m, :count].tolist(), float(self.offsets[m])] for m, count in enumerate(counts)]
        return Table(
            f"Shares in {_split(words, None, self.versus)} of each output position",
            _logits(words, self, outputs) | _rows(words, counts) | {"share": [*chain.from_iterable(shares)]},
            (CAVEAT.format(rule=self.mlp_path),),
            words.one("versus", self.versus) | {"mlp path": self.mlp_path},
        )


@dataclass(frozen=True)
class BranchShares(Plotted):
    """The additions to the residual stream of `m` output positions, as the final norm and the head read them.

    Attributes:
        positions: the `m` output positions, ascending.
        targets: `[m]`, token ids.
        versus: token id whose logit is subtracted everywhere, or None.
        logits: `[m]`, float64: from the forward pass, before any soft cap.
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
    """

    positions: list[int]
    targets: Int[Tensor, " m"]
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

    def data(self, words: Words = NO_WORDS) -> list[dict[str, Any]]:
        """Return a record for each output position: its target, and the additions of each block's branches or heads.

        A block whose `attn` is not attention alone has the kinds of its mixers (or `"none"`), and names of their heads.
        """
        by = "layer" if self.heads is None else "head"
        return [
            _entry(self, by, row, words)
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
        mixers, plain = self.mixers[i], _attends(self.mixers[i])
        if not plain:
            block["mixer"] = " and ".join(kind for kind, _ in mixers) or "none"
        if self.heads is not None and self.attn_bias is not None:
            own = self.heads[row, i, : sum(count for _, count in mixers)]
            block |= {"heads": own.tolist(), "attn_bias": float(self.attn_bias[row, i])}
            if not plain:
                block["head_names"] = [name for kind, count in mixers for name in _head_names(kind, count)]
        return block

    def tensors(self) -> dict[str, Tensor]:
        """Return what is saved, one row for each of `m` positions; see the attributes."""
        names = ("logits", "embedding", "attn", "mlp", "bias", "heads", "attn_bias")
        saved = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return _placed(self.positions, self.targets) | saved

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
        alone = int(self.targets[0]) if len(self.positions) == 1 else None
        note = f"last output: all shares sum to {logit - float(self.unexplained[-1]):.4f}; forward pass: {logit:.4f}"
        return Table(
            f"Shares in {_split(words, alone, self.versus)}, by block",
            _logits(words, self, outputs) | {"block": blocks, "part": names, "share": shares},
            (note,),
            words.one("versus", self.versus),
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
        mixing = "attention" if all(map(_attends, self.mixers)) else "token mixers"
        series = {mixing: (blocks, self.attn[-1].tolist(), ()), "MLP": (blocks, self.mlp[-1].tolist(), ())}
        title = f"Shares in {_split(words, int(self.targets[-1]), self.versus)}"
        return Points(title, "block", "share", series, parts=("attn", "mlp"))


def _placed(positions: Sequence[int], targets: Int[Tensor, " m"]) -> dict[str, Tensor]:
    """Return the part of what is saved that says which logits are split."""
    return {"positions": torch.tensor(positions), "targets": targets}


def _attends(mixers: Sequence[tuple[str, int]]) -> bool:
    """Return whether a block's mixer is attention alone."""
    return [MIXERS[kind].softmax for kind, _ in mixers] == [True]


def _head_names(kind: str, count: int) -> list[str]:
    """Return the names of a mixer's heads; a convolution, which has none, is one part."""
    return [f"{kind} head {i}" for i in range(count)] if MIXERS[kind].has_heads else [kind]


def _rows(words: Words, counts: Sequence[int]) -> dict[str, Sequence[Any]]:
    """Return the columns that name the parts of logits by token: for each its first positions, and the offset."""
    places = [i for count in counts for i in (*range(count), None)]
    return {"part": ["offset" if i is None else "token" for i in places], **words.at(places)}


def _logit(words: Words, split: Attribution) -> dict[str, Any]:
    """Return what all shares of a logit have in common, its name and value."""
    names = words.one("target", split.target) | words.one("versus", split.versus)
    return {"output": split.position, **names, "logit": split.logit}


def _logits(words: Words, shares: TokenShares | BranchShares, rows: Sequence[int]) -> dict[str, Sequence[Any]]:
    """Return the columns that name the logits of rows."""
    return {
        "output": [shares.positions[m] for m in rows],
        **words.column("target", shares.targets[rows].tolist()),
        "logit": shares.logits[rows].tolist(),
    }


def largest(table: Table, count: int) -> Table:
    """Return a table of shares with the `count` largest parts of each logit, and their rest as one row, `others`.

    The offset keeps its own row, so that the rows still add up to the logit.
    """
    values = [name for name in ("share", "up", "gate") if name in table.columns]
    kept: list[dict[str, Any]] = []
    rows = [dict(zip(table.columns, row, strict=True)) for row in zip(*table.columns.values(), strict=True)]
    for _, each in groupby(rows, key=lambda row: row.get("output")):
        group = list(each)
        parts = [row for row in group if row["part"] != "offset"]
        if len(parts) <= count:
            kept += group
            continue
        parts.sort(key=lambda row: -max(abs(row[name]) for name in values))
        others = {name: group[0][name] for name in ("output", "target id", "target", "logit") if name in group[0]}
        others |= {"part": "others"} | {name: sum(row[name] for row in parts[count:]) for name in values}
        offset = [row for row in group if row["part"] == "offset"]
        kept += [*parts[:count], dict.fromkeys(table.columns) | others, *offset]
    return replace(table, columns={name: [row[name] for row in kept] for name in table.columns})


def _entry(shares: TokenShares | BranchShares, by: str, row: int, words: Words) -> dict[str, Any]:
    """Return the data of the logit at an output position, however it is split."""
    return {
        "by": by,
        **words.here(shares.positions[row]),
        "target": words.token(shares.targets[row]),
        "versus": None if shares.versus is None else words.token(shares.versus),
        "logit": float(shares.logits[row]),
        "softcap": shares.softcap or None,
    }


def _split(words: Words, target: int | None, versus: int | None) -> str:
    """Return the name of the split quantity: the logit of one target, or of each output's own."""
    logit = "the logit" if target is None else f"the logit of {words.name(target)}"
    return logit if versus is None else f"{logit} minus that of {words.name(versus)}"


def attribute(
    jacobian: DetachedJacobian,
    target: int | str | None = None,
    versus: int | str | None = None,
    *,
    progress: Progress | None = None,
) -> Attribution:
    """Split a logit over the input positions; one downward sweep.

    Args:
        jacobian: from the embeddings to the output.
        target: id or text of the token whose logit is split; default the most likely next one.
        versus: id or text of a token whose logit is subtracted.
        progress: called as `progress("block", done, total)` after each block.

    Raises:
        PromptError: `target` or `versus` is not in the vocabulary, or a text that is not one token.
        ValueError: one of them is neither a text nor a whole number, or both are the same token.
    """
    target, versus = jacobian.token_id(target), jacobian.token_id(versus)
    asked = _ask(jacobian.output[None], jacobian.network.head, target, versus)
    with jacobian.reporting(progress):
        pulled = jacobian.rmatmat(asked.w)[0].cpu().double()
    return Attribution(
        target=int(asked.targets[0]),
        logit=float(asked.logits[0]),
        shares=(pulled * jacobian.x.cpu().double()).sum(1),
        offset=float(asked.w[0].cpu().double() @ jacobian.offset.cpu().double() + asked.bias[0]),
        versus=versus,
        position=jacobian.position,
        softcap=jacobian.network.head.softcap,
        mlp_path=jacobian.mlp_path,
    )


def both_rules(up: Attribution, gate: Attribution) -> BothRules:
    """Set the shares of one logit under both freezing rules side by side.

    Args:
        up, gate: `attribute` of two Jacobians of one prompt and position, one with either `mlp_path`.

    Raises:
        ValueError: they are not of one logit under both rules.
    """
    rules, logits = (up.mlp_path, gate.mlp_path), [(a.target, a.versus, a.position, len(a.shares)) for a in (up, gate)]
    if rules != ("up", "gate") or logits[0] != logits[1]:
        raise ValueError(
            f"the shares are of mlp_path {rules[0]} and {rules[1]}, of (target, versus, position, tokens) {logits[0]} "
            f"and {logits[1]}; give those of one logit under up and gate"
        )
    sizes = [float(one.shares.abs().sum()) for one in (up, gate)]
    ranks = torch.stack([one.shares[: up.position + 1].argsort().argsort().double() for one in (up, gate)])
    a, b = ranks - ranks.mean(1, keepdim=True)
    return BothRules(
        up=up,
        gate=gate,
        spearman=float(a @ b / (a.norm() * b.norm())),
        difference=float((up.shares - gate.shares).abs().sum()),
        size=sum(sizes) / 2,
    )


def attribute_positions(
    jacobian: DetachedJacobian,
    target: int | str | None = None,
    versus: int | str | None = None,
    *,
    positions: str | Sequence[int] | None = None,
    progress: Progress | None = None,
) -> TokenShares:
    """Split a logit at several positions of the prompt over the input positions; default the most likely one at each.

    One downward pass carries a vector for each output position, and an upward one the biases. An output does not depend
    on later positions, so that outputs go down `TOKENS_AT_ONCE` at a time, and each such pass has the positions up to
    the last of its outputs: for all positions of a long prompt, half of the arithmetic. Fewer go at a time where they
    need more than the Jacobian's `chunk_bytes` of working memory. The Jacobian's own position has no influence.

    Args:
        jacobian: of the prompt.
        target: id or text of the token whose logit is split; default the most likely one at each position.
        versus: id or text of a token whose logit is subtracted.
        positions: output positions, negative ones from the end, or such a text as `"0,10-20,-1"`; default all.
        progress: called as `progress("block", done, total)` after each block.

    Raises:
        PromptError: `target` or `versus` is not in the vocabulary, or a text that is not one token.
        ValueError: one of them is neither a text nor a whole number, both are the same token, or a position is out of
            range.
    """
    network, x = jacobian.network, jacobian.network.x
    n, d = x.shape
    places = torch.tensor(output_positions("all" if positions is None else positions, n))
    target, versus = jacobian.token_id(target), jacobian.token_id(versus)
    asked = _ask(network.outputs[places], network.head, target, versus)
    cotangents = torch.zeros_like(x)
    cotangents[places] = asked.w
    read = network.norm.operator().rmatmat(cotangents[None])[0]  # what the head reads from the stream, by position
    floats = chunk_floats(n, d, network.frame.config.hidden_units)
    parts = places.split(max(1, min(TOKENS_AT_ONCE, jacobian.chunk_bytes // (floats * x.itemsize))))
    steps = count(1)

    def report() -> None:
        _report(progress, next(steps), (1 + len(parts)) * len(network.tapes))

    offsets = _offsets(network, places, asked, report)
    shares = []
    for part in parts:
        X = x.new_zeros(len(part), int(part[-1]) + 1, read.shape[1])
        X[torch.arange(len(part)), part] = read[part]
        banks: dict[int, Tensor] = {}
        for _, _, frozen in _walk(network, range(X.shape[1]), down=True):
            X = frozen.rmatmat(X, banks)  # [k, m, d]
            report()
        wide = x[: X.shape[1]].cpu().double()
        # One by one: float64 copies are large.
        shares += [pad((pulled.cpu().double() * wide).sum(1), (0, n - len(wide))) for pulled in X]
    return TokenShares(
        positions=places.tolist(),
        targets=asked.targets,
        versus=versus,
        logits=asked.logits,
        shares=torch.stack(shares),
        offsets=offsets,
        softcap=network.head.softcap,
        mlp_path=jacobian.mlp_path,
    )


def _offsets(
    network: FrozenNetwork, places: Int[Tensor, " m"], asked: "_Asked", report: Callable[[], None]
) -> Float[Tensor, " m"]:
    """Return what all biases add to the logits at some positions: one upward pass with an input of zero."""
    stop, one = int(places[-1]) + 1, network.x.new_ones(1)
    X, banks = torch.zeros_like(network.x[None, :stop]), dict[int, Tensor]()
    for _, _, frozen in _walk(network, range(stop)):
        X = frozen.matmat(X, one, banks)
        report()
    Y = network.norm.at(slice(stop)).operator().matmat(X, one)[0, places]
    return (Y.cpu().double() * asked.w.cpu().double()).sum(1) + asked.bias


def attribute_branches(
    jacobian: DetachedJacobian,
    target: int | str | None = None,
    versus: int | str | None = None,
    *,
    positions: str | Sequence[int] | None = None,
    by_head: bool = False,
    progress: Progress | None = None,
) -> BranchShares:
    """Split a logit over the embedding and the branches of every block, and over the attention heads if asked.

    Args:
        jacobian: of the prompt.
        target: id or text of the token whose logit is split; default the most likely one at each position.
        versus: id or text of a token whose logit is subtracted.
        positions: output positions, as `attribute_positions` takes them; default the Jacobian's own.
        by_head: split attention by query head; the output projections are then read twice.
        progress: called as `progress("block", done, total)` after each block.

    Returns:
        Shares at all these positions at once, in one pass over the weights of the live paths: each branch is applied to
        the stream that the trace recorded, as the forward pass did, and written from the first of them to the last.

    Raises:
        PromptError: `target` or `versus` is not in the vocabulary, or a text that is not one token.
        ValueError: one of them is neither a text nor a whole number, both are the same token, or a position is out of
            range.
    """
    network = jacobian.network
    config = network.frame.config
    places = output_positions([jacobian.position] if positions is None else positions, len(network.x))
    span, rows = range(places[0], places[-1] + 1), torch.tensor(places) - places[0]
    written = slice(span.start, span.stop)
    target, versus = jacobian.token_id(target), jacobian.token_id(versus)
    asked = _ask(network.outputs[written][rows], network.head, target, versus)
    final, one = network.norm.at(written), network.x.new_ones(1)
    w = asked.w.new_zeros(len(span), config.d)  # nothing is read between the positions
    w[rows] = asked.w
    # What the head reads from the stream, through the final norm.
    reads, ends, at_entry = _reads(network, written, final.operator().rmatmat(w[None])[0])

    def share(added: Float[Tensor, "_ d"], read: Float[Tensor, "s d"]) -> Float[Tensor, " m"]:
        return (added[len(added) - len(read) :].cpu().double() * read.cpu().double()).sum(1)[rows]

    attn, mlp, heads, attn_bias, mixers, scales = [], [], [], [], [], []
    banks: dict[int, Tensor] = {}
    for i, tape, frozen in _walk(network, span):
        after_attn, after_mlp = reads[2 * i + 1 : 2 * i + 3]
        stream = tape.x[None, : span.stop]
        mixers.append([(mixer.kind, mixer.heads) for mixer in tape.attn.mixers])
        mixers[-1] += [("laurel", 1)] if tape.attn.beside else []
        if by_head:
            stream = stream if frozen.entry is None else frozen.entry.matmat(stream, one)
            # Where the feed-forward reads one position more, attention writes it.
            m = frozen.attn.out_shape[0]
            mixing = tape.attn.at(slice(span.stop - m, span.stop))
            halves = attention_halves(network.weights(i), config, mixing, span.stop, m)
            asking = torch.cat([after_attn.new_zeros(m - len(span), config.d), after_attn])
            added, constant = torch.zeros_like(asking[None]), torch.zeros_like(asking)
            parts = [torch.zeros(len(places), 0, dtype=torch.float64)]
            values = frozen.mixed(stream, one, banks)
            for mixer, (reading, writing) in zip(tape.attn.mixers, halves, strict=True):
                z = reading.matmat(values if mixer.shared else stream, one)
                own, bias = writing.matmat(torch.cat([z, torch.zeros_like(z)]), one.expand(2)).split(1)
                added, constant = added + own, constant + bias[0]
                # Each position has its own vector, and the projection acts at each position alone: one stack is enough.
                shares = writing.rmatmat(asking[None])[0].cpu().double() * z[0].cpu().double()
                own_heads = shares[m - len(span) :][rows].unflatten(1, (mixer.heads, -1)).sum(2)
                parts.append(network.weights(i).gathered(own_heads, MIXERS[mixer.kind].output))
            if frozen.laurel is not None:  # one part, as it has no heads
                own = frozen.laurel.matmat(stream, one)
                added, own_heads = added + own, share(own[0], after_attn)[:, None]
                parts.append(own_heads)
            mixers[-1] = [(kind, part.shape[1]) for (kind, _), part in zip(mixers[-1], parts[1:], strict=True)]
            stream = frozen.residual.matmat(stream)
            heads.append(torch.cat(parts, 1))
            attn_bias.append(share(constant, after_attn))
        else:
            stream, added = frozen.matmat_attn(stream, one, banks)
        attn.append(share(added[0], after_attn))
        middle, added = frozen.matmat_ffn(stream, added, one)
        mlp.append(share(added[0], after_mlp))
        if frozen.inputs is not None:
            mlp[-1] += share(frozen.inputs.matmat(frozen.written(middle, added), one)[0], ends[i])
        scales.append(1.0 if frozen.scale is None else float(frozen.scale))
        _report(progress, i + 1, len(network.tapes))
    # [L]: what multiplies each block's additions on the way to the end.
    later = torch.tensor(scales, dtype=torch.float64).flip(0).cumprod(0).flip(0)
    return BranchShares(
        positions=places,
        targets=asked.targets,
        versus=versus,
        logits=asked.logits,
        embedding=share(network.x[written], reads[0]) * later[0],
        attn=torch.stack(attn, 1) * later,
        mlp=torch.stack(mlp, 1) * later,
        bias=(_constant(final.operator(), w) + at_entry)[rows] + asked.bias,
        heads=pad_sequence([own.T for own in heads], True).movedim(2, 0) * later[:, None] if by_head else None,
        attn_bias=torch.stack(attn_bias, 1) * later if by_head else None,
        mixers=mixers,
        softcap=network.head.softcap,
    )


def _reads(
    network: FrozenNetwork, chosen: slice, read: Float[Tensor, "m i"]
) -> tuple[list[Float[Tensor, "m d"]], list[Float[Tensor, "m _"]], Float[Tensor, " m"]]:
    """Return what the head reads of the embedding and of what each branch adds; and of the end of each block.

    The latter only where blocks have inputs of their own, which they add there. The head reads them past all later
    branches: see `ModelConfig.reads`; factors on the stream are not in them. Also return what constants at the entry of
    blocks add to the logits.
    """
    config, constant = network.frame.config, torch.zeros(len(read), dtype=torch.float64)
    if config.reads == 1:
        return [read] * (2 * len(network.tapes) + 1), [read] * len(network.tapes), constant
    found, ends = list[Tensor](), list[Tensor]()
    for i in reversed(range(len(network.tapes))):
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
            constant += _constant(entry, read)
            read = entry.rmatmat(read[None])[0]
    return [read, *found[::-1]], ends[::-1], constant


class _Asked(NamedTuple):
    """The logits asked for, as vectors: `logits = w · y + bias`, in float64; `w` is of the network's dtype."""

    targets: Int[Tensor, " m"]
    w: Float[Tensor, "m d"]
    bias: Float[Tensor, " m"]
    logits: Float[Tensor, " m"]


def _ask(outputs: Float[Tensor, "m d"], head: Head, target: int | None, versus: int | None) -> _Asked:
    """Choose a target for each output, and read the head's rows of it."""
    if target is not None and target == versus:
        raise ValueError(f"target and versus are both token id {target}: the difference is 0; give two tokens")
    targets = head.logits(outputs).argmax(1).cpu() if target is None else torch.full((len(outputs),), target)
    distinct, which = targets.unique(return_inverse=True)

    def row(ids: list[int]) -> tuple[Tensor, Tensor]:
        biases = torch.zeros(len(ids)) if head.bias is None else head.bias[ids]
        return head.scale * head.matrix.take(ids), biases.cpu().double()

    w, bias = row(distinct.tolist())
    if versus is not None:
        other, other_bias = row([versus])
        w, bias = w - other, bias - other_bias
    w, bias = w[which.to(w.device)], bias[which]
    return _Asked(targets, w, bias, (w.cpu().double() * outputs.cpu().double()).sum(1) + bias)


def _walk(
    network: FrozenNetwork, positions: range, *, down: bool = False
) -> Iterator[tuple[int, BlockTape, FrozenBlock]]:
    """Yield the blocks, written at some positions, with their tapes, upwards or downwards; the next is prefetched."""

    def build(i: int) -> tuple[int, BlockTape, FrozenBlock]:
        tape = network.tapes[i]
        config = network.frame.config
        return i, tape, block(network.weights(i), config, tape, positions, config.bank(i))

    order = range(len(network.tapes))[:: -1 if down else 1]
    ahead = build(order[0])
    for i in [*order[1:], None]:
        now = ahead
        if i is not None:
            ahead = build(i)
            ahead[2].read_ahead()
        yield now


def _constant(operator: LinearOperator, w: Float[Tensor, "m o"]) -> Float[Tensor, " m"]:
    """Return what the constant of an operator, such as a norm's bias, adds to logits that read `w` of its output."""
    y = operator.matmat(w.new_zeros(1, *operator.in_shape), w.new_ones(1))[0]
    return (y.cpu().double() * w.cpu().double()).sum(1)


def _report(progress: Progress | None, done: int, total: int) -> None:
    if progress:
        progress("block", done, total)
