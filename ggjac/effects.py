"""Measured effects of the tokens of a prompt on a logit, beside scores that are meant to predict them."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import isnan
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ggjac.correlation import spearman
from ggjac.results import NO_WORDS, Plotted, Points, Table, Words
from ggjac.shares import split_name
from ggjac.units import PLACES, SCORES


class Agreed(NamedTuple):
    """Correlation of ranks, from -1 to 1; NaN where one side is constant.

    Attributes:
        signed: of scores with effects.
        sizes: of their absolute values.
    """

    signed: float
    sizes: float


@dataclass(frozen=True)
class Effects(Plotted):
    """What leaving each token out does to a logit, as the model itself computes it, beside scores of the same tokens.

    Attributes:
        by: what takes the token's place; see `ggjac.units.PLACES`.
        target: token id of the logit.
        versus: token id whose logit is subtracted, or None.
        position: of the output.
        logit: before any soft cap.
        effects: `[m]`, float64, of the positions up to the output's: the logit, minus that without the token.
        draws: number of tokens that took each one's place, by `"replace"`.
        seed: of these.
        mlp_path: the freezing rule of the shares and of the detached map, where these are among the scores.
        scores: `[m]` each, float64, by name: such as the shares of the tokens; see `ggjac.units.SCORES`.
    """

    by: str
    target: int
    versus: int | None
    position: int
    logit: float
    effects: Float[Tensor, " m"]
    draws: int
    seed: int
    mlp_path: str
    scores: Mapping[str, Float[Tensor, " m"]] = field(default_factory=dict)

    def beside(self, scores: Mapping[str, Float[Tensor, " n"]]) -> "Effects":
        """Return the effects beside further scores, `[n]` of which those after the output's position do not count."""
        return replace(self, scores={**self.scores, **{k: v[: len(self.effects)] for k, v in scores.items()}})

    def agreement(self, first: int = 0) -> dict[str, Agreed]:
        """Return how the ranks of each score correlate with those of the effects, from position `first` on."""
        own = self.effects[first:]
        return {
            name: Agreed(spearman(s[first:], own), spearman(s[first:].abs(), own.abs()))
            for name, s in self.scores.items()
        }

    def data(self, words: Words = NO_WORDS) -> dict[str, Any]:
        """Return each position's effect and scores, and the agreement of each score with the effects."""
        columns = {"effect": self.effects} | dict(self.scores)
        drawn = {"draws": self.draws, "seed": self.seed} if self.by == "replace" else {}
        return {
            "by": self.by,
            **drawn,
            "mlp_path": self.mlp_path,
            "tokens": [
                words.here(i) | {name: float(column[i]) for name, column in columns.items()}
                for i in range(len(self.effects))
            ],
            "agreement": {
                name: {part: None if isnan(value) else value for part, value in found._asdict().items()}
                for name, found in self.agreement().items()
            },
        }

    def tensors(self) -> dict[str, Tensor]:
        """Return what is saved: `effects` `[m]` and each score `[m]` by its name."""
        return {"effects": self.effects} | {f"effects_{name}": score for name, score in self.scores.items()}

    def notes(self) -> list[str]:
        """Return a line on what an effect is, one on the rule of shares, and one for each score on how it agrees."""
        found = [f"effect: the logit, minus that without the token; {PLACES[self.by]}"]
        found += [f"share: mlp-path {self.mlp_path}; it is not importance"] if "share" in self.scores else []
        return found + [
            f"{SCORES.get(name, name)}: rank correlation with the effects {agreed(own.signed)}, of absolute values "
            f"{agreed(own.sizes)}"
            for name, own in self.agreement().items()
        ]

    def _table(self, words: Words) -> Table:
        columns = {"effect": self.effects.tolist()}
        columns |= {SCORES.get(name, name): score.tolist() for name, score in self.scores.items()}
        return Table(
            f"Effect of leaving each token out on {split_name(words, self.target, self.versus)}",
            words.at(range(len(self.effects))) | columns,
            tuple(self.notes()),
            {
                "by": self.by,
                "mlp path": self.mlp_path,
                **words.one("target", self.target),
                **words.one("versus", self.versus),
            },
        )

    def _plot(self, words: Words) -> Points:
        effects, scores = self.effects.tolist(), self.scores
        series = {SCORES.get(name, name): (score.tolist(), effects, ()) for name, score in scores.items()}
        title = f"Effect of leaving each token out on {split_name(words, self.target, self.versus)}"
        return Points(title, "score", "effect", series, scatter=True)


def agreed(value: float | None) -> str:
    """Return a correlation for a sentence."""
    return "is not defined" if value is None or isnan(value) else f"{value:+.2f}"


def mean_of_draws(effects: Float[Tensor, "md"], positions: list[int], m: int) -> Float[Tensor, " m"]:
    """Return the mean effect at each of `m` positions, of several edits of each."""
    places = torch.tensor(positions)
    total = torch.zeros(m, dtype=effects.dtype).index_add_(0, places, effects)
    return total / torch.bincount(places, minlength=m)
