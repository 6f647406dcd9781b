"""The longest columns and rows of a dense detached Jacobian, in tokens (Golden, arXiv 2505.24293, section 3.2).

A column `J_i[:, j]` is the effect of one component of the embedding at position `i` on the output, and decodes through
the LM head; a row `J_i[e, :]` is the weight of that embedding in one component of the output, and decodes to the
nearest input embeddings.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ggjac.checks import whole
from ggjac.decode import Ranked, nearest, top_logits
from ggjac.jacobian import DetachedJacobian, Progress
from ggjac.results import NO_WORDS, Result, Table, Words


@dataclass(frozen=True)
class Norms(Result):
    """Lengths of all columns and rows, and the longest of them at each position decoded.

    Attributes:
        columns: `[n, d]`, float64: `‖J_i[:, j]‖` of every input component `j`.
        rows: `[n, d]`, float64: `‖J_i[e, :]‖` of every output component `e`.
        longest_columns: `[n, count]`, the input components of the longest columns, longest first.
        longest_rows: `[n, count]`, the output components of the longest rows.
        column_tokens: tokens of highest logit for each longest column, `[n * count, column_words]`; columns are signed
            to point along the output, `⟨J x, column⟩ >= 0`.
        row_tokens: tokens of nearest embedding (cosine) for each longest row, `[n * count, row_words]`; rows are signed
            as their component of `J x` is, so that they read what makes it up.
        position: of the output; later positions have no influence.
        hide_special: whether decoding left out control, unused and byte tokens.
    """

    columns: Float[Tensor, "n d"]
    rows: Float[Tensor, "n d"]
    longest_columns: Int[Tensor, "n count"]
    longest_rows: Int[Tensor, "n count"]
    column_tokens: Ranked
    row_tokens: Ranked
    position: int
    hide_special: bool = False

    def data(self, words: Words = NO_WORDS) -> dict[str, Any]:
        """Return the longest columns and rows of every position up to the output's, the longest first."""

        def longest(i: int, norms: Tensor, components: Tensor, tokens: Ranked) -> list[dict[str, Any]]:
            count = components.shape[1]
            return [
                {"component": c, "norm": float(norms[i, c]), "tokens": words.ranked(*tokens.part(i * count + j))}
                for j, c in enumerate(components[i].tolist())
            ]

        return {
            "hide_special": self.hide_special,
            "positions": [
                words.here(i)
                | {
                    "columns": longest(i, self.columns, self.longest_columns, self.column_tokens),
                    "rows": longest(i, self.rows, self.longest_rows, self.row_tokens),
                }
                for i in range(self.position + 1)
            ],
        }

    def tensors(self) -> dict[str, Tensor]:
        """Return what is saved: the norms of all columns and rows, `[n, d]` each."""
        return {"columns": self.columns, "rows": self.rows}

    def _table(self, words: Words) -> Table:
        n, count = self.longest_columns.shape
        columns = words.at([i for i in range(n) for _ in range(count)])
        for name in ("column", "row"):
            longest, tokens = getattr(self, f"longest_{name}s"), getattr(self, f"{name}_tokens")
            columns[name] = longest.flatten().tolist()
            columns[f"{name} length"] = getattr(self, f"{name}s").gather(1, longest).flatten().tolist()
            columns |= words.column(f"{name} tokens", tokens.ids.tolist())
        return Table("The longest columns and rows of each position", columns)


def norms(
    jacobian: DetachedJacobian,
    count: int = 3,
    *,
    column_words: int = 8,
    row_words: int = 4,
    hide_special: bool = False,
    progress: Progress | None = None,
) -> Norms:
    """Measure all columns and rows in one pass over the dense rows, and decode the `count` longest at each position.

    Positions after the Jacobian's own have no influence: their lengths are 0 and their tokens meaningless. The matrix
    never exists whole; the longest columns take another upward sweep, or a few for many positions.

    Args:
        jacobian: from the embeddings.
        count: columns and rows decoded at each position.
        column_words, row_words: tokens of each.
        hide_special: leave control, unused and byte tokens out of the decoding.
        progress: called as `progress("block", done, total)` in each pass over the blocks.

    Raises:
        ValueError: `count`, `column_words` or `row_words` is out of range.
    """
    count = whole("count", count)
    words = whole("column_words", column_words), whole("row_words", row_words)
    with jacobian.reporting(progress):
        return _norms(jacobian, count, *words, hide_special)


def _norms(jacobian: DetachedJacobian, count: int, column_words: int, row_words: int, hide_special: bool) -> Norms:
    head, embedding = jacobian.network.head, jacobian.network.embedding
    n, d = jacobian.in_shape
    count = min(count, d)
    squares, rows = torch.zeros(n, d, dtype=torch.float64), torch.zeros(n, d, dtype=torch.float64)
    best = jacobian.x.new_zeros(n, 0, d)  # the longest rows so far
    lengths = torch.zeros(n, 0, dtype=torch.float64)
    components = torch.zeros(n, 0, dtype=torch.long)
    for start, part in jacobian.slices():
        wide = part.cpu().double()
        squares += wide.square().sum(0)
        found = wide.norm(dim=2).T
        rows[:, start : start + len(part)] = found
        numbers = torch.arange(start, start + len(part))
        lengths = torch.cat([lengths, found], 1)
        components = torch.cat([components, numbers.expand(n, -1)], 1)
        lengths, kept = lengths.topk(min(count, lengths.shape[1]), dim=1)
        components = components.gather(1, kept)
        best = torch.cat([best, part.transpose(0, 1)], 1).gather(1, kept[..., None].expand(-1, -1, d).to(best.device))
        del part, wide  # the rows are freed before the next ones are made
    columns = squares.sqrt()
    longest = columns.topk(count, dim=1).indices
    along = jacobian.linear_output
    left = _columns(jacobian, longest)
    left = left * _sign(left.to(along) @ along).to(left)[:, None]
    right = best * _sign(along)[components.to(along.device)].to(best)[..., None]
    hidden = jacobian.hidden_ids(hide_special)
    return Norms(
        columns=columns,
        rows=rows,
        longest_columns=longest,
        longest_rows=components,
        column_tokens=top_logits(head.matrix, left.to(head.matrix.dtype), column_words, hidden=hidden),
        row_tokens=nearest(embedding, right.flatten(0, 1).to(embedding.dtype), row_words, hidden=hidden),
        position=jacobian.position,
        hide_special=hide_special,
    )


def _columns(jacobian: DetachedJacobian, components: Int[Tensor, "n count"]) -> Float[Tensor, "m d"]:
    """Return the columns of some input components of every position, in chunks of `rows_at_once`."""
    n, d = jacobian.in_shape
    positions = torch.arange(n).repeat_interleave(components.shape[1])
    at_once = jacobian.rows_at_once()
    parts = []
    for i, j in zip(positions.split(at_once), components.flatten().split(at_once), strict=True):
        basis = torch.zeros(len(i), n, d, dtype=jacobian.dtype, device=jacobian.device)
        basis[torch.arange(len(i)), i, j] = 1
        parts.append(jacobian.matmat(basis))
    return torch.cat(parts)


def _sign(values: Tensor) -> Tensor:
    """Return -1 or 1, 1 for zero: a vector is turned around or left as it is."""
    return torch.where(values < 0, -1.0, 1.0)
