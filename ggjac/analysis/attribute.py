"""Shares of the input tokens in a logit, or in the projection of a vector on a direction, whose sum is exact.

Along the live paths of the whole network, `w` being the head's row of the target (minus that of a second token, for
what sets the two apart):

    logit = w · y = Σ_i w · J_i x_i + w · offset

The projection of a vector inside the network splits likewise, along the paths to it, `w` being the direction.

This is an identity of the frozen network: it states the contribution of each token, not the effect of changing it.
Another exact split, over blocks and heads, is `ggjac.analysis.branches`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, count
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from ggjac.checks import input_positions, output_positions
from ggjac.correlation import spearman
from ggjac.directions import Direction
from ggjac.effects import Effects
from ggjac.jacobian import DetachedJacobian, FrozenNetwork, Progress
from ggjac.jacobian.targets import Asked, ask, asked_at
from ggjac.results import NO_WORDS, Bars, Plotted, Result, Table, Words
from ggjac.shares import (
    Projection,
    asked_data,
    common_columns,
    entry_of,
    folded,
    logit_columns,
    placed,
    split_name,
    token_columns,
    value_name,
)
from ggjac.sizes import TOKENS_AT_ONCE, MlpPath, chunk_floats

# What a share by token does not say; under every table of them.
CAVEAT = "mlp-path {rule}: the sum is exact, its division depends on the freezing rule; a share is not importance"


@dataclass(frozen=True)
class Attribution(Plotted):
    """The shares of the input positions in one logit, in the difference of two, or in a projection.

    Attributes:
        target: token id whose logit is split; None of a projection.
        logit: `w · y` (plus the head's bias), from the forward pass, before any soft cap; or the projection.
        shares: `[n]`, float64: the contribution of each input position; 0 of excluded ones.
        offset: the contribution of the biases, the head's included, and of the excluded positions; 0 without any.
        versus: token id whose logit is subtracted, or None.
        position: of the output.
        softcap: of the head's logits (not applied here); 0 for none.
        mlp_path: the freezing rule, which decides the shares but not their sum.
        excluded: the contribution of each excluded position, which `offset` has.
        along: what is projected on what; None of a logit.
        effects: of leaving each token out, measured beside the shares; or None.
    """

    target: int | None
    logit: float
    shares: Float[Tensor, " n"]
    offset: float
    versus: int | None
    position: int
    softcap: float
    mlp_path: MlpPath
    excluded: dict[int, float] = field(default_factory=dict)
    along: Projection | None = None
    effects: Effects | None = None

    def data(self, words: Words = NO_WORDS) -> dict[str, Any]:
        """Return what is split and every input position's share; those that are in the offset are `excluded`."""
        return asked_data(words, self.target, self.versus, self.logit, self.softcap, self.along) | {
            "shares": [words.here(i) | {"share": float(self.shares[i])} for i in self.inputs],
            **_excluded(self.excluded, words),
            "offset": self.offset,
            "unexplained": self.unexplained,
            "sink": words.sink(float(self.shares[0]) / self.logit, len(self.shares)) if self.logit > 0 else None,
            "mlp_path": self.mlp_path,
            **({} if self.effects is None else {"effects": self.effects.data(words)}),
        }

    def tensors(self) -> dict[str, Tensor]:
        """Return what is saved, as of `TokenShares`, of one position; of a projection, its direction `[d]`."""
        logits, offsets = (torch.tensor([value], dtype=torch.float64) for value in (self.logit, self.offset))
        place = placed([self.position], None if self.target is None else torch.tensor([self.target]), self.along)
        found = place | {f"{value_name(self)}s": logits, "shares": self.shares[None], "offsets": offsets}
        return found if self.effects is None else found | {"effects": self.effects.effects}

    @property
    def inputs(self) -> list[int]:
        """The positions that have a share of their own, ascending."""
        return input_positions(None, len(self.shares), [*self.excluded])

    @property
    def unexplained(self) -> float:
        """`logit - Σ shares - offset`: rounding, and so a measure of what the dtype costs."""
        return self.logit - float(self.shares.sum()) - self.offset

    def _table(self, words: Words) -> Table:
        total = float(self.shares.sum()) + self.offset
        return Table(
            f"Shares in {split_name(words, self.target, self.versus, self.along)}",
            token_columns(words, [len(self.shares)], [*self.excluded])
            | {"share": [*self.shares[self.inputs].tolist(), self.offset]}
            | _effect_column(self),
            (
                f"shares and offset sum to {total:.4f}; forward pass: {self.logit:.4f}",
                *folded([*self.excluded]),
                CAVEAT.format(rule=self.mlp_path),
                *([] if self.effects is None else self.effects.notes()),
            ),
            common_columns(words, self) | {"mlp path": self.mlp_path},
        )

    def _plot(self, words: Words) -> Bars:
        title = f"Shares in {split_name(words, self.target, self.versus, self.along)}"
        label = f"share; all shares and the offset sum to {self.logit:.4f}"
        return Bars(title, label, words.labels(self.inputs), self.shares[self.inputs].tolist())


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
        rules = (("up", self.up), ("gate", self.gate))
        columns: dict[str, list[float | None]] = {
            rule: [*one.shares[one.inputs].tolist(), one.offset] for rule, one in rules
        }
        columns |= _effect_column(self.up)
        ranked = "of one token is not defined" if math.isnan(self.spearman) else f"{self.spearman:.2f}"
        note = f"rank correlation {ranked}; absolute differences sum to {self.difference:.4f}"
        return Table(
            f"Shares in {split_name(words, self.up.target, self.up.versus, self.up.along)} under both freezing rules",
            token_columns(words, [len(self.up.shares)], [*self.up.excluded]) | columns,
            (
                note,
                *folded([*self.up.excluded]),
                CAVEAT.format(rule="up and gate"),
                *([] if self.up.effects is None else self.up.effects.notes()),
            ),
            common_columns(words, self.up),
        )


@dataclass(frozen=True)
class TokenShares(Result):
    """`Attribution` of `m` output positions, each of its own target.

    Attributes:
        positions: the `m` output positions, ascending.
        targets: `[m]`, token ids.
        versus: token id whose logit is subtracted everywhere, or None.
        logits: `[m]`, float64: from the forward pass, before any soft cap.
        shares: `[m, n]`, float64: the contribution of each input position; 0 after the output position, and of excluded
            positions.
        offsets: `[m]`, float64: the contribution of the biases, the head's included, and of the excluded positions.
        softcap: of the head's logits (not applied here); 0 for none.
        mlp_path: the freezing rule, which decides the shares but not their sum.
        excluded: `[m]`, float64, for each excluded position: its contribution, which `offsets` has.
    """

    positions: list[int]
    targets: Int[Tensor, " m"]
    versus: int | None
    logits: Float[Tensor, " m"]
    shares: Float[Tensor, "m n"]
    offsets: Float[Tensor, " m"]
    softcap: float
    mlp_path: MlpPath
    excluded: dict[int, Float[Tensor, " m"]] = field(default_factory=dict)
    along: None = None

    def data(self, words: Words = NO_WORDS) -> list[dict[str, Any]]:
        """Return a record for each output position: its target, and the shares of the positions up to it."""
        return [
            entry_of(self, "token", row, words)
            | {
                "shares": [words.here(i) | {"share": float(self.shares[row, i])} for i in self._inputs(row)],
                **_excluded({i: float(each[row]) for i, each in self.excluded.items() if i <= output}, words),
                "offset": float(self.offsets[row]),
                "unexplained": float(self.unexplained[row]),
                "mlp_path": self.mlp_path,
            }
            for row, output in enumerate(self.positions)
        ]

    def _inputs(self, row: int) -> list[int]:
        """Return the positions that have a share in an output of their own."""
        return input_positions(None, self.positions[row] + 1, [*self.excluded])

    def tensors(self) -> dict[str, Tensor]:
        """Return what is saved: `positions`, `targets`, `logits`, `offsets` `[m]` and `shares` `[m, n]`."""
        saved = {name: getattr(self, name) for name in ("logits", "shares", "offsets")}
        return placed(self.positions, self.targets) | saved

    @property
    def unexplained(self) -> Float[Tensor, " m"]:
        """The rest of each logit: rounding."""
        return self.logits - self.shares.sum(1) - self.offsets

    def _table(self, words: Words) -> Table:
        counts = [output + 1 for output in self.positions]
        places = list(map(self._inputs, range(len(counts))))
        outputs = [m for m, inputs in enumerate(places) for _ in (*inputs, None)]
        shares = [[*self.shares[m, inputs].tolist(), float(self.offsets[m])] for m, inputs in enumerate(places)]
        return Table(
            f"Shares in {split_name(words, None, self.versus)} of each output position",
            logit_columns(words, self, outputs)
            | token_columns(words, counts, [*self.excluded])
            | {"share": [*chain.from_iterable(shares)]},
            (
                *folded([*self.excluded]),
                CAVEAT.format(rule=self.mlp_path),
            ),
            words.one("versus", self.versus) | {"mlp path": self.mlp_path},
        )


def _effect_column(one: Attribution) -> dict[str, list[float | None]]:
    """Return the column of measured effects, if there are any; the offset has none, nor have later positions."""
    if one.effects is None:
        return {}
    measured = one.effects.effects.tolist()
    return {"effect": [*measured, *[None] * (len(one.shares) + 1 - len(measured))]}


def _excluded(shares: Mapping[int, float], words: Words) -> dict[str, Any]:
    """Return the part of the data that says what excluded positions contribute; nothing without any."""
    return {"excluded": [words.here(i) | {"share": share} for i, share in shares.items()]} if shares else {}


def attribute(
    jacobian: DetachedJacobian,
    target: int | str | None = None,
    versus: int | str | None = None,
    *,
    direction: Direction | Float[Tensor, " _"] | None = None,
    progress: Progress | None = None,
) -> Attribution:
    """Split a logit, or the projection on a direction, over the input positions; one downward sweep.

    Args:
        jacobian: from the embeddings to the output; for a direction, to anywhere, as `trace.jacobian(position, span,
            raw=True)` gives it. The shares of positions that it excludes are in the offset.
        target: id or text of the token whose logit is split; default the most likely next one.
        versus: id or text of a token whose logit is subtracted.
        direction: what is at the Jacobian's end is projected on it, in place of a logit; `[d]`, or as
            `ggjac.read_direction`, `ggjac.entropy_direction` and `ggjac.fisher_direction` return it.
        progress: called as `progress("block", done, total)` after each block.

    Raises:
        PromptError: `target` or `versus` is not in the vocabulary, or a text that is not one token.
        DirectionError: the direction does not fit.
        ValueError: one of them is neither a text nor a whole number, or both are the same token; or a direction is
            given as well.
    """
    target, versus = jacobian.token_id(target), jacobian.token_id(versus)
    asked = asked_at(jacobian, target, versus, direction)
    whole = jacobian.excluding(None)  # whose product has the excluded positions, too
    with whole.reporting(progress):
        pulled = whole.rmatmat(asked.w)[0].cpu().double()
    shares = (pulled * jacobian.x.cpu().double()).sum(1)
    excluded = {i: float(shares[i]) for i in jacobian.exclude}
    shares[jacobian.exclude] = 0
    return Attribution(
        target=int(asked.targets[0]) if isinstance(asked, Asked) else None,
        logit=float(asked.logits[0]),
        shares=shares,
        offset=float(asked.w[0].cpu().double() @ jacobian.offset.cpu().double() + asked.bias[0]),
        versus=versus,
        position=jacobian.position,
        softcap=jacobian.network.head.softcap,
        mlp_path=jacobian.mlp_path,
        excluded=excluded,
        along=None if isinstance(asked, Asked) else asked.along,
    )


def both_rules(up: Attribution, gate: Attribution) -> BothRules:
    """Set the shares of one logit under both freezing rules side by side.

    Args:
        up, gate: `attribute` of two Jacobians of one prompt and position, one with either `mlp_path`.

    Raises:
        ValueError: they are not of one logit under both rules.
    """
    rules = up.mlp_path, gate.mlp_path
    whats = [a.target if a.along is None else a.along.name for a in (up, gate)]
    logits = [(what, a.versus, a.position, len(a.shares)) for what, a in zip(whats, (up, gate), strict=True)]
    if rules != ("up", "gate") or logits[0] != logits[1]:
        raise ValueError(
            f"the shares are of mlp_path {rules[0]} and {rules[1]}, of (target, versus, position, tokens) {logits[0]} "
            f"and {logits[1]}; give those of one logit under up and gate"
        )
    if up.effects is not None:
        up = replace(up, effects=up.effects.beside({"other_share": gate.shares}))
    sizes = [float(one.shares.abs().sum()) for one in (up, gate)]
    inputs = [i for i in up.inputs if i <= up.position]
    return BothRules(
        up=up,
        gate=gate,
        spearman=spearman(up.shares[inputs], gate.shares[inputs]),
        difference=float((up.shares - gate.shares).abs().sum()),
        size=sum(sizes) / 2,
    )


def attribute_positions(
    jacobian: DetachedJacobian,
    target: int | str | list[int] | None = None,
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
        jacobian: of the prompt; the shares of positions that it excludes are in the offsets.
        target: id or text of the token whose logit is split, or a list of ids, one for each position, ascending;
            default the most likely one at each position.
        versus: id or text of a token whose logit is subtracted.
        positions: output positions, negative ones from the end, or such a text as `"0,10-20,-1"`; default all.
        progress: called as `progress("block", done, total)` after each block.

    Raises:
        PromptError: `target` or `versus` is not in the vocabulary, or a text that is not one token.
        ValueError: one of them is neither a text nor a whole number, both are the same token, a position is out of
            range, or a list of targets is not as long as that of positions.
    """
    network, x = jacobian.network, jacobian.network.x
    n, d = x.shape
    places = torch.tensor(output_positions("all" if positions is None else positions, n))
    target = [network.token(one) for one in target] if isinstance(target, list) else jacobian.token_id(target)
    versus = jacobian.token_id(versus)
    asked = ask(network.outputs[places], network.head, target, versus)
    cotangents = torch.zeros_like(x)
    cotangents[places] = asked.w
    read = network.norm.operator().rmatmat(cotangents[None])[0]  # what the head reads from the stream, by position
    floats = chunk_floats(n, d, network.frame.config.hidden_units)
    parts = places.split(max(1, min(TOKENS_AT_ONCE, jacobian.chunk_bytes // (floats * x.itemsize))))
    steps = count(1)

    def report() -> None:
        if progress:
            progress("block", next(steps), (1 + len(parts)) * len(network.tapes))

    offsets = _offsets(network, places, asked, jacobian.exclude, report)
    shares = []
    for part in parts:
        X = x.new_zeros(len(part), int(part[-1]) + 1, read.shape[1])
        X[torch.arange(len(part)), part] = read[part]
        banks: dict[int, Tensor] = {}
        for _, _, frozen in network.walk(range(X.shape[1]), down=True):
            X = frozen.rmatmat(X, banks)  # [k, m, d]
            report()
        wide = x[: X.shape[1]].cpu().double()
        # One by one: float64 copies are large.
        shares += [pad((pulled.cpu().double() * wide).sum(1), (0, n - len(wide))) for pulled in X]
    found = torch.stack(shares)
    excluded = {i: found[:, i].clone() for i in jacobian.exclude}
    found[:, jacobian.exclude] = 0
    return TokenShares(
        positions=places.tolist(),
        targets=asked.targets,
        versus=versus,
        logits=asked.logits,
        shares=found,
        offsets=offsets,
        softcap=network.head.softcap,
        mlp_path=jacobian.mlp_path,
        excluded=excluded,
    )


def _offsets(
    network: FrozenNetwork,
    places: Int[Tensor, " m"],
    asked: Asked,
    exclude: Sequence[int],
    report: Callable[[], None],
) -> Float[Tensor, " m"]:
    """Return what biases and excluded positions add to the logits at some positions: one pass, other inputs zero."""
    stop, one = int(places[-1]) + 1, network.x.new_ones(1)
    X, banks = torch.zeros_like(network.x[None]), dict[int, Tensor]()
    held = torch.tensor(exclude, dtype=torch.long)
    X[0, held] = network.x[held]
    X = X[:, :stop]
    for _, _, frozen in network.walk(range(stop)):
        X = frozen.matmat(X, one, banks)
        report()
    Y = network.norm.at(slice(stop)).operator().matmat(X, one)[0, places]
    return (Y.cpu().double() * asked.w.cpu().double()).sum(1) + asked.bias
