"""Two prompts on one file: what changes in the map, the shares and the prediction where some tokens are others.

Each prompt is measured by itself into a `ggjac.analysis.compare.Portrait`. Tokens of both that are the same and in the
same order are *aligned*; the others stand alone. Of the singular subspaces, the left ones lie in the space of the
output, which both prompts share. The right ones lie in the embeddings of each prompt's own positions, and can be
compared only where positions are aligned: the angles are those between the spans of these parts of the vectors, and
`weight` says how much of the vectors that is.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ggjac.analysis.compare import (
    SAME,
    Portrait,
    by_block,
    check_alike,
    divergences,
    in_common,
    principal_angles,
    saved,
    spectra,
)
from ggjac.checks import whole
from ggjac.decode import divergence
from ggjac.results import NO_WORDS, Plotted, Points, Prompt, Table, Words

# A position of either prompt, or None where a token of the other one stands alone.
Pair = tuple[int | None, int | None]


@dataclass(frozen=True)
class PromptComparison(Plotted):
    """Two portraits of one file at two prompts, and how far they are apart.

    Attributes:
        a, b: the portraits.
        pairs: positions up to the output's of both prompts in order: aligned ones, and those that stand alone.
        left: `[k]`, float64, radians: principal angles between the spans of the left singular vectors, largest first.
        right: likewise of the parts of the right ones at the aligned positions; empty where these parts do not span
            `k` dimensions to the tolerance of the vectors, or no position is aligned.
        weight: of both prompts, the part of the right vectors' squared length that lies at the aligned positions.
        output_distance: `‖y_b - y_a‖ / ‖y_a‖`.
        kl: `KL(softmax(logits_a) ‖ softmax(logits_b))` of the next token after both outputs, in nats.
        aligned_kl: `[m]`, float64: the same at each of `m` aligned positions.
        top: number of likeliest next tokens that are shown of each prompt.
    """

    a: Portrait
    b: Portrait
    pairs: list[Pair]
    left: Float[Tensor, " k"]
    right: Float[Tensor, " _"]
    weight: tuple[float, float]
    output_distance: float
    kl: float
    aligned_kl: Float[Tensor, " m"]
    top: int

    @property
    def aligned(self) -> list[tuple[int, int]]:
        """The pairs in which neither position is missing."""
        return [(i, j) for i, j in self.pairs if i is not None and j is not None]

    def data(self, words: Words = NO_WORDS) -> dict[str, Any]:
        """Return both sides of everything; angles in degrees, the largest first."""
        degrees = [angles.rad2deg().tolist() for angles in (self.left, self.right)]
        return in_common(self.a, self.b, words) | {
            "angles": dict(zip(("left", "right"), degrees, strict=True)),
            "weight": dict(zip("ab", self.weight, strict=True)),
            "output_distance": self.output_distance,
            "kl": self.kl,
            "next": dict(zip("ab", self._next(words), strict=True)),
            "shares": [
                {
                    side: None if i is None else _here(p, i, words) | {"share": float(p.shares[i])}
                    for side, p, i in self._sides(pair)
                }
                for pair in self.pairs
            ],
            "positions": [
                {side: _here(p, i, words) for side, p, i in self._sides(pair)}
                | {
                    "kl": kl,
                    "top1": {side: words.token(p.logits[i].argmax()) for side, p, i in self._sides(pair)},
                    "same_top1": bool(self.a.logits[pair[0]].argmax() == self.b.logits[pair[1]].argmax()),
                }
                for pair, kl in zip(self.aligned, self.aligned_kl.tolist(), strict=True)
            ],
        }

    def _sides(self, pair: Pair) -> Iterator[tuple[str, Portrait, Any]]:
        yield from (("a", self.a, pair[0]), ("b", self.b, pair[1]))

    def _next(self, words: Words) -> Iterator[list[dict[str, Any]]]:
        """Yield the likeliest next tokens of each prompt, with their probability after it and after the other one."""
        chances = [p.logits[p.position].double().softmax(0) for p in (self.a, self.b)]
        for own, other in (chances, chances[::-1]):
            best = own.topk(min(self.top, len(own))).indices
            yield [words.token(id) | {"probability": float(own[id]), "other": float(other[id])} for id in best]

    def tensors(self) -> dict[str, Tensor]:
        """Return what is saved: angles in radians, `aligned` `[m, 2]`, `kl` `[m]`, and of each prompt `a_ids` etc."""
        found = {"left_angles": self.left, "right_angles": self.right, "kl": self.aligned_kl}
        found["aligned"] = torch.tensor(self.aligned, dtype=torch.int64).reshape(-1, 2)
        for side, p in (("a", self.a), ("b", self.b)):
            own = {"ids": torch.tensor(p.ids)} | saved(p)
            found |= {f"{side}_{name}": tensor for name, tensor in own.items()}
        return found

    def exhibits(self, trace: Prompt | None = None) -> list[Table]:
        """Return four tables for print: the spectra, the shares by token and by block, and the next token."""
        words, (a, b) = Words(trace), (self.a, self.b)
        best = [*self._next(words)]
        after: dict[str, list[Any]] = {}
        for side, tokens in zip("ab", best, strict=True):
            after |= words.column(f"after {side}", [token["id"] for token in tokens])
            after |= {f"probability after {side}": [token["probability"] for token in tokens]}
            after |= {f"after the other of {side}": [token["other"] for token in tokens]}
        asked = a.asked(words)
        return [
            self._spectra(),
            self._table(words),
            by_block(a, b, words),
            Table("Likeliest next tokens", after, (f"KL of b from a: {self.kl:.4g} nats; {asked}: {self._logits}",)),
        ]

    def _spectra(self) -> Table:
        k = len(self.a.svd.S)
        columns = {"vector": [*range(1, k + 1)], "sigma a": self.a.svd.S.tolist(), "sigma b": self.b.svd.S.tolist()}
        columns |= {"left angle": self.left.tolist(), "right angle": self.right.tolist() or [None] * k}
        parts = " and ".join(f"{weight:.0%} of {side}" for side, weight in zip("ab", self.weight, strict=True))
        note = f"of the right vectors, the parts at {len(self.aligned)} aligned positions are compared: {parts}"
        return Table("Two prompts", columns, ("angles: between spans, in radians, largest first", note))

    def _table(self, words: Words) -> Table:
        columns: dict[str, list[Any]] = {"part": [*["token"] * len(self.pairs), "offset"]}
        first, second = ([*places] for places in zip(*self.pairs, strict=True))
        sides = (("a", self.a, first), ("b", self.b, second))
        columns |= {f"position {side}": [*places, None] for side, _, places in sides}
        if words.trace:
            columns |= words.column("token", [*(self._id(pair) for pair in self.pairs), None])
        for side, p, places in sides:
            columns[f"share {side}"] = [*(None if i is None else float(p.shares[i]) for i in places), p.offset]
        asked = self.a.asked(words)
        return Table(f"Shares in {asked} after two prompts", columns, (f"{asked}: {self._logits}",))

    def _id(self, pair: Pair) -> int:
        """Return the token of a pair, which is that of both prompts where it is aligned."""
        return next(p.ids[i] for _, p, i in self._sides(pair) if i is not None)

    @property
    def _logits(self) -> str:
        return f"a {self.a.logit:.4f}, b {self.b.logit:.4f}"

    def _plot(self, words: Words) -> Points:
        return spectra(self.a, self.b, "Singular values of two prompts")


def _here(p: Portrait, i: int, words: Words) -> dict[str, Any]:
    """Return a position of a prompt as plain data, with its token."""
    return {"position": i} | words.token(p.ids[i])


def compare_prompts(a: Portrait, b: Portrait, *, top: int = 5) -> PromptComparison:
    """Set the portraits of two prompts on one file side by side; `top` is the number of next tokens shown of each.

    Raises:
        CompareError: they are not of the same freezing rule, target, rank or sizes.
        ValueError: `top` is out of range.
    """
    top = whole("top", top)
    check_alike(a, b, SAME)
    pairs = align(a.ids[: a.position + 1], b.ids[: b.position + 1])
    places = [(i, j) for i, j in pairs if i is not None and j is not None]
    parts = [p.svd.Vh[:, [place[n] for place in places]].cpu().double().flatten(1) for n, p in enumerate((a, b))]
    squared = [float(part.square().sum()) / len(part) for part in parts]
    known = all(_independent(part, p.tol) for part, p in zip(parts, (a, b), strict=True))
    return PromptComparison(
        a=a,
        b=b,
        pairs=pairs,
        left=principal_angles(a.svd.U, b.svd.U),
        right=principal_angles(*parts) if known else torch.zeros(0, dtype=torch.float64),
        weight=(squared[0], squared[1]),
        output_distance=float((b.output - a.output).norm() / a.output.norm()),
        kl=divergence(a.logits[a.position], b.logits[b.position]),
        aligned_kl=divergences(a, b, places),
        top=top,
    )


def align(a: Sequence[int], b: Sequence[int]) -> list[Pair]:
    """Pair the positions of tokens that are the same and in the same order; others stand alone, those of `a` first.

    A common beginning is always aligned, for a model computes the same there; then a common end; in between, blocks of
    equal tokens, the longest first (`difflib`).
    """
    start = next((i for i, (one, other) in enumerate(zip(a, b, strict=False)) if one != other), min(len(a), len(b)))
    room = min(len(a), len(b)) - start
    end = next((i for i in range(room) if a[-1 - i] != b[-1 - i]), room)
    stops = len(a) - end, len(b) - end
    pairs: list[Pair] = [(i, i) for i in range(start)]
    matcher = SequenceMatcher(None, a[start : stops[0]], b[start : stops[1]], autojunk=False)
    for kind, i, i_end, j, j_end in matcher.get_opcodes():
        ours, theirs = range(start + i, start + i_end), range(start + j, start + j_end)
        if kind == "equal":
            pairs += zip(ours, theirs, strict=True)
        else:
            pairs += [(i, None) for i in ours] + [(None, j) for j in theirs]
    return pairs + [(stops[0] + i, stops[1] + i) for i in range(end)]


def _independent(rows: Float[Tensor, "k m"], tol: float) -> bool:
    """Return whether rows, which are known to a tolerance, span as many dimensions as they are."""
    return len(rows) <= rows.shape[1] and bool(torch.linalg.svdvals(rows)[-1] > tol)
