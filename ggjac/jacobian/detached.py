"""The detached Jacobian of one prompt as a linear operator over streamed blocks.

For input embeddings `x` and the output `y` (one position after the final norm, before the LM head),

    y = J x + offset,    J = Scale(norm) @ block[L-1] @ ... @ block[0]    (Golden, arXiv 2505.24293, eq. 2 and 15)

with the blocks of `ggjac.blocks`, frozen at the prompt. `offset` is the contribution of the biases; it is exactly zero
for models without biases on the live path. The paper is *Large Language Models are Locally Linear Mappings*; version 3,
TMLR, October 2025: *Equivalent Linear Mappings of Large Language Models*.

A map may also start at a later block and end at a tap inside the network. `SharedSweep` carries the vectors of many
such maps through the blocks together, so that each weight is dequantized once for all of them.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from ggjac import ways
from ggjac.checks import canonical, excluded_positions
from ggjac.jacobian.sweep import FrozenNetwork, SharedSweep, Span, Tap, joined
from ggjac.linop import Homogeneous, LinearOperator, Select
from ggjac.results import Table
from ggjac.runs.journal import Records
from ggjac.sizes import CHUNK_BYTES, SLICE, MlpPath, chunk_floats
from ggjac.svd import SVD, check_options, roughly_first, svd_of_matrix, svd_together
from ggjac.ways import Task, takes_matrix


class Progress(Protocol):
    """A callback through which an analysis reports progress."""

    def __call__(self, what: str, done: int, total: int, rounds: int = 0) -> None:
        """Report progress.

        Args:
            what: a detail, such as the number of the sweep.
            done: steps done of this round.
            total: steps of a round.
            rounds: further rounds that are expected.
        """


# The largest reconstruction error that is healthy in each dtype.
HEALTHY = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2}


class DetachedJacobian(LinearOperator):
    """The linear map from all input embeddings `[n, d]` to one output vector `[d]`, exact at its prompt.

    Of a model with several residual streams, a map that starts inside reads all of them, `[n, s d]`, and one that ends
    at the stream reads what the head would collect of them there (`raw`: all of them, `[s d]`).

    Positions to `exclude` are folded into the offset: the map reads the others alone, its part at these is zero, and
    the offset has what they contribute at the prompt. So `y = J x + offset` stays exact.

    Products stream the blocks' live weights once, whatever the number of stacked vectors. Positions after `position`
    have no influence (attention is causal): their part of the map is zero.

    Attributes:
        ids: the `n` token ids.
        position: the output position, counted from 0.
        span: start and end of the map; by default from the embeddings to the output.
        exclude: input positions that are folded into the offset, ascending.
        mlp_path: the freezing rule of gated feed-forwards, `"up"` or `"gate"`.
        sweep: computes the products; its `journal` records them, if there is one.
        chunk_bytes: working memory that a chunk of dense rows may take.
    """

    def __init__(
        self,
        network: FrozenNetwork,
        position: int,
        span: Span | None = None,
        *,
        raw: bool = False,
        exclude: str | Sequence[int] | None = None,
        journal: Records | None = None,
        chunk_bytes: int = CHUNK_BYTES,
    ):
        self.dtype, self.device = network.x.dtype, network.x.device
        self.network, self.ids, self.position = network, list(network.ids), position
        self.end = Tap("layer", len(network.tapes))
        self.span = span or Span(0, self.end)
        self.mlp_path: MlpPath = network.frame.mlp_path
        self.exclude = excluded_positions(exclude, position + 1)
        self.sweep = SharedSweep(network, [self.span], position, raw=raw, journal=journal, exclude=self.exclude)
        n, d = network.x.shape
        self.in_shape = (n, network.config.width(self.span.start))
        self.out_shape = (self.sweep.width(self.span.tap) if raw else d,)
        self.chunk_bytes = chunk_bytes
        self._matrix: Tensor | None = None

    def __repr__(self) -> str:
        """Return shapes, position, freezing rule and, of a map inside the network, its span, on one line."""
        whole = self.span == Span(0, self.end)
        span = "" if whole else f", from depth {self.span.start} to {self.span.tap.kind} {self.span.tap.index}"
        without = f", without {canonical(self.exclude)}" if self.exclude else ""
        return f"{super().__repr__()}, position {self.position}, {self.mlp_path}{span}{without}"

    def _repr_html_(self) -> str:
        """Return what the map is as a table."""
        start, tap = self.span
        facts = {"from": f"depth {start}", "to": f"{tap.kind} {tap.index}", "output position": self.position}
        facts |= {"excluded": canonical(self.exclude)} if self.exclude else {}
        facts |= {"input": list(self.in_shape), "output": list(self.out_shape), "mlp path": self.mlp_path}
        return Table.of(
            "Detached Jacobian", facts | {"dtype": str(self.dtype).removeprefix("torch."), "device": self.device}
        )._repr_html_()

    @property
    def progress(self) -> Callable[[int, int], None] | None:
        """If set, called as `progress(done, total)` after each block of a product."""
        return self.sweep.progress

    @progress.setter
    def progress(self, report: Callable[[int, int], None] | None) -> None:
        for each in (self, self.whole):
            each.sweep.progress = report

    @property
    def flop(self) -> int:
        """Floating-point operations of products so far, also those with the map of all positions."""
        return sum(sweep.flop for sweep in {self.sweep, self.whole.sweep})

    @contextmanager
    def reporting(self, progress: Progress | None) -> Iterator[None]:
        """Call `progress("block", done, total)` after each block of the products inside."""
        before = self.progress
        if progress:
            self.progress = lambda done, total: progress("block", done, total)
        try:
            yield
        finally:
            self.progress = before

    def matmat(self, X: Float[Tensor, "k n i"], t: Homogeneous = None) -> Float[Tensor, "k o"]:
        """Return `J x + t offset` for stacked inputs: one upward sweep.

        Raises:
            ValueError: they have another shape.
        """
        self.check_shape(X, self.in_shape)
        return self.sweep.up([X.to(self.device, self.dtype)], None if t is None else [t])[0]

    def rmatmat(self, Y: Float[Tensor, "k o"]) -> Float[Tensor, "k n i"]:
        """Return `Jᵀ y` for stacked output cotangents: one downward sweep.

        Raises:
            ValueError: they have another shape.
        """
        self.check_shape(Y, self.out_shape)
        return self.sweep.down([Y.to(self.device, self.dtype)])[0]

    def agreed(self, found: Tensor) -> Tensor:
        """Return numbers as the first of the processes that share the model has found them."""
        return self.sweep.journal.agreed(found) if self.sweep.journal else found

    def rows(self, chunk: int | None = None) -> Iterator[tuple[int, int, Tensor]]:
        """Yield rows of the dense Jacobian; by default as many at a time as fit into `chunk_bytes`."""
        return super().rows(chunk or self.rows_at_once())

    def slices(self) -> Iterator[tuple[int, Tensor]]:
        """Yield `(start, rows)`: the rows of `rows()`, a few at a time, so that float64 copies take little memory."""
        for start, _, rows in self.rows():
            for i, part in enumerate(rows.split(SLICE)):
                yield start + i * SLICE, part
            del rows, part  # before the next ones are computed

    def excluding(self, exclude: str | Sequence[int] | None) -> "DetachedJacobian":
        """Return the map of the same output that leaves out these input positions and no others.

        Raises:
            ValueError: one is out of range, or none is left.
        """
        how: dict[str, Any] = {"raw": self.sweep.raw, "journal": self.sweep.journal, "chunk_bytes": self.chunk_bytes}
        return DetachedJacobian(self.network, self.position, self.span, exclude=exclude, **how)

    @property
    def whole(self) -> "DetachedJacobian":
        """The map of the same output that reads all positions; this one, if it excludes none."""
        return self._including_all if self.exclude else self

    @cached_property
    def _including_all(self) -> "DetachedJacobian":
        return self.excluding(None)

    def at_position(self, i: int) -> LinearOperator:
        """Return `J_i`, the part of the map that reads input position `i` alone: `[1, d]` to `[d]`."""
        n, d = self.in_shape
        return self @ Select(torch.tensor([i]), n, d, dtype=self.dtype, device=self.device).T

    def rows_at_once(self, maps: int = 1) -> int:
        """Return how many dense rows of each of several such maps fit into `chunk_bytes` while computed; at least 1."""
        return self._rows_within(self.chunk_bytes // maps)

    def _rows_within(self, nbytes: int) -> int:
        n, d = self.in_shape
        floats = chunk_floats(n, d, self.network.config.hidden_units)  # as of all processes that share the model
        return max(1, nbytes // (floats * self.dtype.itemsize))

    def matrix(self, task: Task) -> Float[Tensor, "d n d"] | None:
        """Return the dense matrix, if it is the cheaper way to a task or is there already; else None.

        It is kept for other tasks; of a map that excludes positions, `whole` keeps its own, and this is a copy.
        `ggjac.ways` decides. Neither that nor the rows of a sweep depend on a budget, which would change the last bits.
        """
        config, n, (start, tap), whole = self.network.config, self.in_shape[0], self.span, self.whole
        if whole._matrix is None and takes_matrix(config, task, n, self.dtype.itemsize, start, tap.index):
            whole._matrix = whole.to_dense(self._rows_within(CHUNK_BYTES))
        return None if whole._matrix is None else self.sweep.without(whole._matrix)

    def block(self, rank: int, size: int) -> int:
        """Return the vectors that an iteration stacks for triplets of maps from vectors of `size`; see `ggjac.ways`."""
        return ways.block(self.network.config, rank, self.in_shape[0], size).width

    def svd_of(self, part: Float[Tensor, "d i"], rank: int, *, tol: float) -> SVD:
        """Return the leading triplets of a part of the matrix, as `ggjac.svd.svd_of_matrix` does."""
        iterated = ways.decomposition(rank, len(part), part.shape[1], part.itemsize).iterated
        return svd_of_matrix(part, rank, tol=tol, sweeps=self.matrix_sweeps, iterated=iterated)

    @property
    def matrix_sweeps(self) -> int:
        """Number of sweeps in which all rows of the matrix are computed."""
        return math.ceil(self.out_shape[0] / self._rows_within(CHUNK_BYTES))

    def token_id(self, token: int | str | None) -> int | None:
        """Return the id of a token that is given as its id, or as its text, such as `" Paris"`; None as it is.

        Raises:
            PromptError: the text is not one token, or the id not in the vocabulary.
            ValueError: it is neither a text nor a whole number.
            TokenizerError: a text, and the file has no tokenizer, or llama-cpp-python is not installed.
        """
        return None if token is None else self.network.token(token)

    def hidden_ids(self, hide_special: bool) -> list[int]:
        """Return the ids that decoding is to leave out: those of control, unused and byte tokens, or none."""
        return self.network.special() if hide_special else []

    def svd(
        self,
        rank: int,
        *,
        tol: float = 1e-3,
        max_sweeps: int = 40,
        block: int | None = None,
        seed: int = 0,
        progress: Callable[[int, float], None] | None = None,
        search_dtype: torch.dtype | None = None,
    ) -> SVD:
        """Return the leading singular triplets of the `[d, n d]` matrix, left vectors signed to point along `J x`.

        Where all rows cost less than the sweeps (see `ggjac.ways`), they come from the matrix itself.

        Args:
            rank: number of triplets.
            tol: relative residual to reach in every triplet.
            max_sweeps: limit on the number of products with the map or its transpose.
            block: stacked vectors per sweep; default that of `ggjac.ways.block`. If given, triplets come from sweeps.
            seed: seed of the random start vectors.
            progress: called after each sweep with the sweep count and the worst relative residual known so far.
            search_dtype: a narrower dtype, in which the subspace is searched first: faster where the device multiplies
                faster in it, and as exact; see `ggjac.svd.roughly_first`. Default none.

        Raises:
            ValueError: an argument is out of range, or a product is not finite.
        """
        how: dict[str, Any] = {"tol": tol, "max_sweeps": max_sweeps, "block": block, "seed": seed}
        (found,) = self._decomposed([self], rank, search_dtype=search_dtype, progress=progress, **how)
        return found

    def both_views(self, rank: int, **options: Any) -> list[SVD]:
        """Return the triplets of `svd`, and after them, if positions are excluded, those of `whole`.

        The vectors of both go through the same sweeps, or both come from one matrix. Options and errors as of `svd`.
        """
        return self._decomposed([self, self.whole] if self.exclude else [self], rank, **options)

    def _decomposed(
        self,
        maps: Sequence["DetachedJacobian"],
        rank: int,
        *,
        tol: float,
        max_sweeps: int,
        seed: int,
        block: int | None = None,
        progress: Callable[[int, float], None] | None = None,
        search_dtype: torch.dtype | None = None,
    ) -> list[SVD]:
        """Return the triplets of maps that differ in the positions that they exclude; arguments as of `svd`."""
        check_options(self, rank, tol=tol, max_sweeps=max_sweeps, block=block, seed=seed)
        whole = self.whole
        matrix = whole.matrix(Task(rank, joint=len(maps))) if block is None else None
        if matrix is not None:
            found = [self.svd_of(J.sweep.without(matrix).flatten(1), rank, tol=tol) for J in maps]
            found = [replace(one, Vh=one.Vh.unflatten(1, self.in_shape)) for one in found]
            return [one.pointing_along(J.linear_output) for one, J in zip(found, maps, strict=True)]

        def up(stacks: list[Tensor]) -> list[Tensor]:
            images = whole.matmat(joined(*(J.sweep.without(X) for J, X in zip(maps, stacks, strict=True))))
            return list(images.split([len(X) for X in stacks]))

        def down(stacks: list[Tensor]) -> list[Tensor]:
            parts = whole.rmatmat(joined(*stacks)).split([len(Y) for Y in stacks])
            return [J.sweep.without(part) for J, part in zip(maps, parts, strict=True)]

        width = block or self.block(rank, math.prod(self.in_shape))
        solve = partial(svd_together, maps, rank, up=up, down=down, block=width, seed=seed)
        found = roughly_first(
            solve, whole.sweep.rounded, search_dtype, tol=tol, max_sweeps=max_sweeps, progress=progress
        )
        return [one.pointing_along(J.linear_output) for one, J in zip(found, maps, strict=True)]

    @cached_property
    def x(self) -> Float[Tensor, "n d"]:
        """The map's input at this prompt: the embeddings, or the residual stream after `span.start` blocks."""
        return self.network.tapes[self.span.start].x

    @cached_property
    def output(self) -> Float[Tensor, " d"]:
        """The map's output at this prompt, offset included, from the forward pass: inside, from one block's input."""
        tap, raw = self.span.tap, self.sweep.raw
        if tap == self.end and not raw:
            return self.network.outputs[self.position]
        x = self.network.tapes[tap.index - 1].x
        last = SharedSweep(self.network, [Span(tap.index - 1, tap)], self.position, raw=raw)
        return last.up([x[None]], [x.new_ones(1)])[0][0]

    @property
    def linear_output(self) -> Float[Tensor, " d"]:
        """`J x`, the output of the linear part alone; in float32 at least."""
        return self._pushed[:2].to(torch.promote_types(self.dtype, torch.float32)).sum(0)

    @property
    def offset(self) -> Float[Tensor, " d"]:
        """`y - J x`, from the biases and excluded positions pushed through the frozen blocks; zero without any."""
        return self._pushed[2]

    @property
    def reconstruction_error(self) -> float:
        """`‖J x + offset - y‖ / ‖y‖`. Small by construction: a health check of the arithmetic, not evidence.

        `J x` is the sum of two products, with the even and with the odd positions of `x`. A single product would repeat
        the forward pass bit by bit, and hide the rounding error of the dtype.
        """
        wide = [part.cpu().double() for part in (self.linear_output, self.offset, self.output)]
        return float((wide[0] + wide[1] - wide[2]).norm() / wide[2].norm())

    @property
    def reconstruction_limit(self) -> float:
        """The largest healthy reconstruction error in this dtype; in 16 bit it grows with depth beyond 32 blocks."""
        blocks = self.span.tap.index - self.span.start
        return HEALTHY[self.dtype] * (max(1.0, (blocks / 32) ** 0.5) if self.dtype.itemsize == 2 else 1.0)

    @property
    def cancellation(self) -> float:
        """How many times as long as at some depth the residual stream at this position was before: the digits lost.

        Large where blocks write a long vector into the stream, as some biases do, and later ones erase it.
        """
        tap, p = self.span.tap, self.position
        streams = [self.network.tapes[i].x[p] for i in range(self.span.start, min(tap.index, self.end.index - 1) + 1)]
        lengths = [float(x.cpu().double().norm()) for x in streams]
        if tap == self.end:  # on no tape, but its scale is: 1 / rms
            lengths.append(self.network.config.d**0.5 / float(self.network.norm.scale[p]))
        longest, factor = 0.0, 1.0
        for length in lengths:
            longest = max(longest, length)
            factor = max(factor, longest / length) if length else factor
        return factor

    @cached_property
    def _pushed(self) -> Float[Tensor, "3 d"]:
        """Both halves of `J x`, and `offset`: inputs `x` even, `x` odd and 0, at homogeneous coordinates 0, 0 and 1.

        The sweep leaves excluded positions out of the first two, and puts them into the last.
        """
        even = torch.zeros_like(self.x)
        even[::2] = self.x[::2]
        return self.matmat(
            torch.stack([even, self.x - even, torch.zeros_like(even)]), self.x.new_tensor([0.0, 0.0, 1.0])
        )
