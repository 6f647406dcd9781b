"""Shares of the input tokens in a logit, whose sum is exact.

Along the live paths of the whole network, `w` being the head's row of the target (minus that of a second token, for
what sets the two apart):

    logit = w · y = Σ_i w · J_i x_i + w · offset

This is an identity of the frozen network: it states the contribution of each token, not the effect of changing it.
Another exact split, over blocks and heads, is `ggjac.analysis.branches`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, count
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from ggjac.checks import output_positions
from ggjac.jacobian import DetachedJacobian, FrozenNetwork, Progress
from ggjac.jacobian.targets import Asked, ask
from ggjac.results import NO_WORDS, Bars, Plotted, Result, Table, Words
from ggjac.shares import common_columns, entry_of, logit_columns, placed, split_name, token_columns
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
        place = placed([self.position], torch.tensor([self.target]))
        return place | {"logits": logits, "shares": self.shares[None], "offsets": offsets}

    @property
    def unexplained(self) -> float:
        """`logit - Σ shares - offset`: rounding, and so a measure of what the dtype costs."""
        return self.logit - float(self.shares.sum()) - self.offset

    def _table(self, words: Words) -> Table:
        total = float(self.shares.sum()) + self.offset
        return Table(
            f"Shares in {split_name(words, self.target, self.versus)}",
            token_columns(words, [len(self.shares)]) | {"share": [*self.shares.tolist(), self.offset]},
            (
                f"shares and offset sum to {total:.4f}; forward pass: {self.logit:.4f}",
                CAVEAT.format(rule=self.mlp_path),
            ),
            common_columns(words, self) | {"mlp path": self.mlp_path},
        )

    def _plot(self, words: Words) -> Bars:
        title = f"Shares in {split_name(words, self.target, self.versus)}"
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
            f"Shares in {split_name(words, self.up.target, self.up.versus)} under both freezing rules",
            token_columns(words, [len(self.up.shares)]) | columns,
            (note, CAVEAT.format(rule="up and gate")),
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
            entry_of(self, "token", row, words)
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
        return placed(self.positions, self.targets) | saved

    @property
    def unexplained(self) -> Float[Tensor, " m"]:
        """The rest of each logit: rounding."""
        return self.logits - self.shares.sum(1) - self.offsets

    def _table(self, words: Words) -> Table:
        counts = [output + 1 for output in self.positions]
        outputs = [m for m, count in enumerate(counts) for _ in range(count + 1)]
        shares = [[*self.shares[m, :count].tolist(), float(self.offsets[m])] for m, count in enumerate(counts)]
        return Table(
            f"Shares in {split_name(words, None, self.versus)} of each output position",
            logit_columns(words, self, outputs)
            | token_columns(words, counts)
            | {"share": [*chain.from_iterable(shares)]},
            (CAVEAT.format(rule=self.mlp_path),),
            words.one("versus", self.versus) | {"mlp path": self.mlp_path},
        )


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
    asked = ask(jacobian.output[None], jacobian.network.head, target, versus)
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

    offsets = _offsets(network, places, asked, report)
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
    network: FrozenNetwork, places: Int[Tensor, " m"], asked: Asked, report: Callable[[], None]
) -> Float[Tensor, " m"]:
    """Return what all biases add to the logits at some positions: one upward pass with an input of zero."""
    stop, one = int(places[-1]) + 1, network.x.new_ones(1)
    X, banks = torch.zeros_like(network.x[None, :stop]), dict[int, Tensor]()
    for _, _, frozen in network.walk(range(stop)):
        X = frozen.matmat(X, one, banks)
        report()
    Y = network.norm.at(slice(stop)).operator().matmat(X, one)[0, places]
    return (Y.cpu().double() * asked.w.cpu().double()).sum(1) + asked.bias
