"""Prompts with changed embeddings, and what the model itself makes of them: what the predictions of a map are held to.

An edit gives the input of block 0, `[n, d]`, up to the output's position; the text keeps its length, and every token
its position. A token that is left out is not deleted: its embedding becomes another one. What blocks read by the ids of
tokens beside the stream (rows of a table of their own, experts that a table chooses) follows a token that another one
replaces as a whole; where embeddings are moved by part of the way, or to what no token has, it stays that of the
prompt. What they read of the embeddings themselves always follows.
"""

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from itertools import islice
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ggjac.model import Model
from ggjac.planner import runs_at_once
from ggjac.sizes import MlpPath


class Edit(NamedTuple):
    """A changed prompt.

    Attributes:
        ids: of its tokens, for what blocks read by them beside the stream.
        x: returns the input of block 0, `[n, d]`: many at once would outweigh the model.
        change: of the residual stream after some blocks, as `Model.trace` takes it; None leaves it as it is.
    """

    ids: list[int]
    x: Callable[[], Tensor]
    change: Callable[[int, Tensor], Tensor] | None = None


class Editor:
    """Edits of one prompt, up to one output position, after which nothing has an influence.

    Args:
        model: of the prompt.
        ids: of its tokens.
        position: of the output, from 0.
        context: tokens for which there is room, which decides between short and long rope factors; default as of the
            whole prompt.

    Attributes:
        ids: those up to the output's.
        x: `[n, d]`, their input of block 0.
    """

    def __init__(self, model: Model, ids: Sequence[int], position: int, context: int | None = None):
        self.model, self.ids = model, list(ids[: position + 1])
        self.context = context or model.context or len(ids)
        self.x = model.embed(self.ids)

    @cached_property
    def mean(self) -> Float[Tensor, " d"]:
        """The mean embedding of the vocabulary, without rows of zeros, which are no token's; summed in float64."""
        total, tokens = torch.zeros(self.x.shape[1], dtype=torch.float64), 0
        for _, _, rows in self.model.embeddings.tiles():
            for some in rows.split(128):  # a whole tile in float64 would be twice its size
                total += some.cpu().double().sum(0)
            tokens += int(rows.any(1).sum())
        return (total / max(1, tokens) * self.model.config.embedding_scale).to(self.x)

    def row(self, i: int, by: Literal["mean", "zero"]) -> Float[Tensor, " d"]:
        """Return what takes the place of the embedding at a position, `[d]`: the vocabulary's mean, or zero.

        A learned position stays with the mean, but zero is the whole input of block 0 there. A model that divides by
        its length, as Gemma 3n does, then has no finite output.
        """
        return torch.zeros_like(self.x[i]) if by == "zero" else self.model.placed(self.mean[None], i)[0]

    def token_row(self, i: int, id: int) -> Float[Tensor, " d"]:
        """Return the input of block 0 that a token has at a position, `[d]`."""
        return self.model.embed([id], i)[0]

    def without(self, i: int, by: Literal["mean", "zero"]) -> Edit:
        """Leave out the token at a position; see `row`."""
        return Edit(self.ids, lambda: self._moved(i, self.row(i, by), 1.0))

    def swapped(self, i: int, id: int, t: float = 1.0) -> Edit:
        """Move the embedding at a position by a part `t` of the way to that of another token."""
        ids = [*self.ids[:i], id, *self.ids[i + 1 :]] if t == 1 else self.ids
        return Edit(ids, lambda: self._moved(i, self.token_row(i, id), t))

    def toward(self, ids: Sequence[int], t: float) -> Edit:
        """Move all embeddings by a part `t` of the way to those of another prompt, as long as this one."""
        other = list(ids[: len(self.ids)])
        return Edit(other if t == 1 else self.ids, lambda: torch.lerp(self.x, self.model.embed(other), t))

    def stepped(self, direction: Float[Tensor, "n d"], t: float) -> Edit:
        """Add a direction to all embeddings, `t` times."""
        return Edit(self.ids, lambda: self.x + t * direction)

    def pushed(self, layer: int, direction: Float[Tensor, "n d"], t: float) -> Edit:
        """Add a direction to the residual stream after `layer` blocks, `t` times; after none, to the embeddings."""
        if layer == 0:
            return self.stepped(direction, t)
        return Edit(self.ids, lambda: self.x, lambda at, h: h + t * direction if at == layer else h)

    def _moved(self, i: int, row: Float[Tensor, " d"], t: float) -> Float[Tensor, "n d"]:
        x = self.x.clone()
        x[i] = torch.lerp(x[i], row, t)
        return x

    def outputs(
        self,
        edits: Sequence[Edit],
        *,
        mlp_path: MlpPath = "up",
        progress: Callable[[int, int], None] | None = None,
    ) -> Float[Tensor, "k d"]:
        """Return the model's own outputs at the position, `[k, d]`, after the final norm.

        As many edits as `chunk_bytes` of the model has room for run side by side: the weights are read once for all of
        them.

        Args:
            edits: of this prompt.
            mlp_path: as `Model.trace` takes it; it changes values by rounding only.
            progress: called as `progress(done, total)` after each block of each batch.

        Raises:
            NumericsError: an edit took the stream out of the range of the dtype.
        """
        model, (n, d), blocks = self.model, self.x.shape, self.model.config.block_count
        at_once = runs_at_once(model.config, n, str(model.dtype).removeprefix("torch."), model.chunk_bytes)
        starts = range(0, len(edits), at_once)

        def last(edit: Edit, report: Callable[[int, int], None] | None) -> Float[Tensor, " d"]:
            how: dict[str, Any] = {"mlp_path": mlp_path, "n_ctx": self.context, "tapes": False, "progress": report}
            outputs = model.trace(edit.ids, x=edit.x(), change=edit.change, **how).outputs
            return outputs[-1].clone()  # so that the other positions are freed

        found = self.x.new_zeros(len(edits), d)
        for batch, start in enumerate(starts):

            def report(done: int, total: int, before: int = batch * blocks) -> None:
                if progress:
                    progress(before + done, blocks * len(starts))

            # They advance together: the first speaks for all.
            some = [partial(last, edit, None if i else report) for i, edit in enumerate(edits[start : start + at_once])]
            found[start : start + len(some)] = torch.stack(model.in_step(some))
        return found


def drawn_tokens(model: Model, count: int, seed: int) -> list[int]:
    """Return the ids of different tokens, drawn evenly from those of the vocabulary that are ordinary text.

    Fewer where there are not as many.
    """
    drawn = torch.randperm(model.config.vocabulary, generator=torch.Generator().manual_seed(seed))
    kind = model.tokenizer.kind
    return list(islice((id for id in map(int, drawn) if kind(id) == "normal"), count))
