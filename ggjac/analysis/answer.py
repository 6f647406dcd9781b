"""A whole answer: the logit of each of its tokens, split over all tokens before it, in one shared sweep.

One forward pass of prompt and answer gives the logits of all tokens of the answer, each at the position before its own.
The splits are those of `attribute_positions` and `attribute_branches`, with each token's own logit as the target; what
the tokens before it add up to is grouped: the first position (an attention sink in most models), special tokens,
the prompt, or the roles of a conversation, and the answer so far.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ggjac.analysis.attribute import TokenShares, attribute_positions
from ggjac.analysis.branches import BranchShares, attribute_branches
from ggjac.checks import whole
from ggjac.jacobian import DetachedJacobian, FrozenNetwork, Progress
from ggjac.results import NO_WORDS, Result, Table, Words
from ggjac.shares import folded
from ggjac.sizes import TOKENS_AT_ONCE

ANSWER = "answer"  # the group of its tokens
COMMON = ("first", "special")  # groups of tokens that are in nearly every logit


@dataclass(frozen=True)
class AnswerShares(Result):
    """The splits of the logits of `N` tokens, the answer, that follow `start` others, the prompt.

    Attributes:
        ids: of the prompt, and after it of the answer.
        start: the number of tokens of the prompt.
        groups: of each token of both, what it belongs to.
        split: shares in the logits of the answer's tokens, at the positions before their own: by token or by branch.
        chances: `[N]`, float64: the probability that the model gave each token of the answer.
        likeliest: `[N]`, ids of the most likely tokens there.
        most: `[N]`, float64: their probabilities.
    """

    ids: list[int]
    start: int
    groups: list[str]
    split: TokenShares | BranchShares
    chances: Float[Tensor, " N"]
    likeliest: Int[Tensor, " N"]
    most: Float[Tensor, " N"]

    def data(self, words: Words = NO_WORDS) -> dict[str, Any]:
        """Return the tokens that shares are of, and a record for each token of the answer.

        By token, its `shares` are those of the positions before it, in order; `groups` are their sums. Shares of
        excluded positions are 0 there: `excluded` has them, and the offset.
        """
        split = self.split
        by_token = isinstance(split, TokenShares)
        return {
            "start": self.start,
            "text": words.text(self.ids[self.start :]) if words.trace else None,
            "versus": None if split.versus is None else words.token(split.versus),
            "softcap": split.softcap or None,
            **({"mlp_path": split.mlp_path} if isinstance(split, TokenShares) else {}),
            "sources": [words.here(i) | {"group": group} for i, group in enumerate(self.groups)],
            "tokens": [
                self._token(row, words) | (self._shares(row, words) if by_token else {}) for row in range(len(self))
            ],
        }

    def _token(self, row: int, words: Words) -> dict[str, Any]:
        return {
            **words.here(self.start + row),
            **({} if words.trace else words.token(self.ids[self.start + row])),
            "logit": float(self.split.logits[row]),
            "probability": float(self.chances[row]),
            "likeliest": words.token(self.likeliest[row]) | {"probability": float(self.most[row])},
            "unexplained": float(self.split.unexplained[row]),
        }

    def _shares(self, row: int, words: Words) -> dict[str, Any]:
        assert isinstance(self.split, TokenShares)
        shares = self.split.shares[row, : self.start + row].tolist()
        excluded = [words.here(i) | {"share": float(each[row])} for i, each in self.split.excluded.items()]
        found = {"shares": shares, "groups": self.sums(row), "offset": float(self.split.offsets[row])}
        return found | ({"excluded": excluded} if excluded else {})

    def __len__(self) -> int:
        """Return the number of tokens of the answer."""
        return len(self.ids) - self.start

    @property
    def kinds(self) -> list[str]:
        """The groups that there are: the first position, special tokens, others as they come, and the answer.

        Those of excluded positions alone are left out.
        """
        excluded = self.split.excluded if isinstance(self.split, TokenShares) else {}
        there = [group for i, group in enumerate(self.groups[: self.start]) if i not in excluded]
        return list(dict.fromkeys([*(each for each in COMMON if each in there), *there, ANSWER]))

    def sums(self, row: int) -> dict[str, float]:
        """Return the sum of the shares of each group in the logit of one token, with 0 for a group before it."""
        assert isinstance(self.split, TokenShares)
        shares = self.split.shares[row]
        member = {kind: torch.tensor([group == kind for group in self.groups]) for kind in self.kinds}
        return {kind: float(shares[places].sum()) for kind, places in member.items()}

    def tensors(self) -> dict[str, Tensor]:
        """Return what is saved: that of the split, `probabilities` and `likeliest` `[N]`."""
        return self.split.tensors() | {"probabilities": self.chances, "likeliest": self.likeliest}

    def _table(self, words: Words) -> Table:
        """Return a row for each token of the answer; by token, with the sum of each group and the offset."""
        rows = range(len(self))
        columns: dict[str, Sequence[Any]] = {
            **words.at([self.start + row for row in rows]),
            **({} if words.trace else words.column("token", self.ids[self.start :])),
            "logit": self.split.logits.tolist(),
            "probability": self.chances.tolist(),
            **words.column("likeliest", self.likeliest.tolist()),
        }
        if isinstance(self.split, TokenShares):
            sums = [self.sums(row) for row in rows]
            columns |= {kind: [each[kind] for each in sums] for kind in self.kinds}
            columns["offset"] = self.split.offsets.tolist()
        note = "the groups and the offset sum to the logit; a group's sum is not its importance"
        notes = folded([*self.split.excluded]) if isinstance(self.split, TokenShares) else ()
        return Table("Shares in the logit of each token of the answer", columns, (note, *notes))

    def _sheet(self, words: Words) -> Table:
        """Return every share, a row each."""
        return self.split._table(words)


def attribute_answer(
    jacobian: DetachedJacobian,
    start: int,
    versus: int | str | None = None,
    *,
    by: Literal["token", "layer", "head"] = "token",
    groups: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> AnswerShares:
    """Split the logits of all tokens that follow the first `start` ones; each at the position before it.

    The tokens are those of the Jacobian's prompt, of which the first `start` are the question, so to speak: trace
    `[*ids, *ggjac.generate(model, ids)]`. Costs what `attribute_positions` does, or `attribute_branches`, and a pass
    over the head for the probabilities.

    Args:
        jacobian: of prompt and answer; its own position has no influence. The shares of positions that it excludes are
            in the offsets.
        start: the number of tokens of the prompt.
        versus: id or text of a token whose logit is subtracted everywhere.
        by: the parts: tokens before it, or blocks, or blocks and heads (direct logit attribution).
        groups: what each token belongs to, as `ggjac.token_groups` finds; default the first position, the prompt and
            the answer.
        progress: called as `progress("block", done, total)` after each block.

    Raises:
        PromptError: `versus` is not in the vocabulary, or a text that is not one token.
        ValueError: there is no token before `start`, or none after it, or not a group for each token; or `by` is
            unknown.
    """
    if by not in ("token", "layer", "head"):
        raise ValueError(f"by={by!r} is unknown; known: token, layer, head")
    network = jacobian.network
    ids, start = network.ids, whole("start", start)
    if start >= len(ids):
        raise ValueError(
            f"start {start}: prompt and answer have {len(ids)} tokens, of which the answer has at least one"
        )
    found = ["first", *["prompt"] * (start - 1), *[ANSWER] * (len(ids) - start)] if groups is None else list(groups)
    if len(found) != len(ids):
        raise ValueError(f"there are {len(found)} groups for {len(ids)} tokens; give one for each")
    places, targets = range(start - 1, len(ids) - 1), list(ids[start:])
    chances, likeliest, most = _chances(network, places, targets)
    how: dict[str, Any] = {"positions": places, "progress": progress}
    split: TokenShares | BranchShares
    if by == "token":
        split = attribute_positions(jacobian, targets, versus, **how)
    else:
        split = attribute_branches(jacobian, targets, versus, by_head=by == "head", **how)
    return AnswerShares(list(ids), start, found, split, chances, likeliest, most)


def _chances(
    network: FrozenNetwork, places: range, targets: Sequence[int]
) -> tuple[Float[Tensor, " N"], Int[Tensor, " N"], Float[Tensor, " N"]]:
    """Return the probability of a token after each place, and the most likely token there with its own."""
    chances, likeliest, most = list[Tensor](), list[int](), list[Tensor]()
    for begin in range(0, len(places), TOKENS_AT_ONCE):
        some = places[begin : begin + TOKENS_AT_ONCE]
        logits = network.head.logits(network.outputs[some.start : some.stop]).cpu()
        likeliest += logits.argmax(1).tolist()  # ties go to the smaller id, as in generation
        for row, own in zip(logits, targets[begin : begin + len(some)], strict=True):
            probabilities = row.double().softmax(0)
            chances.append(probabilities[own])
            most.append(probabilities.max())
    return torch.stack(chances), torch.tensor(likeliest), torch.stack(most)
