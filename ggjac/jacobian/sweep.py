"""One pass over the streamed blocks for the vectors of many maps: each weight is dequantized once for all of them.

The vectors of all maps travel in one stack. On the way up, a vector joins the stack at the block where its map starts,
and leaves it at the map's tap; on the way down it is the other way round.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from ggjac.blocks import BlockTape, BlockWeights, FinalNorm, Frame, FrozenBlock, affine, block
from ggjac.config import ModelConfig
from ggjac.decode import Embeddings, Head
from ggjac.jacobian.tapes import Tapes
from ggjac.linop import Identity, LinearOperator, indices_on
from ggjac.runs.journal import Product, Records
from ggjac.sizes import Kind
from ggjac.ways import share_rows

# The taps of a block in the order in which cotangents pass them.
DOWNWARDS: tuple[Kind, ...] = ("layer", "mlp", "attn")


@dataclass(frozen=True, order=True)
class Tap:
    """A place in the network where a map may end: one vector at one position.

    Attributes:
        kind: `"layer"`: the residual stream after `index` blocks. `"attn"`, `"mlp"`: what that branch of the
            `index`-th block (counted from 1) adds to the stream, after any post-norm.
        index: number of blocks applied, including the tap's own.
    """

    kind: Kind
    index: int


class Span(NamedTuple):
    """A map's start and end: from the residual stream after `start` blocks to a tap."""

    start: int
    tap: Tap


class FrozenNetwork(NamedTuple):
    """The network as frozen by a trace, with all that products need.

    Attributes:
        weights: returns the tensors of a block; given a dtype, with the matrices rounded to it.
        tapes: the frozen quantities of each block; read when a sweep arrives there, so that they may be on a disk.
        frame: settings shared by all blocks, such as the freezing rule.
        config: sizes of the whole model; those of `frame` are of this process's part, where several share it.
        freeze_norm: freezes the final norm at any stream `[m, d]`, by these tensors outside the blocks, if given.
        norm: the final norm, frozen at the prompt's own last stream.
        x: `[n, d]`, input of block 0: embeddings after any scaling.
        outputs: `[n, d]`, outputs of the forward pass, after the final norm.
        ids: the `n` token ids.
        head: the LM head, which decodes outputs.
        embedding: `[v, d]`, the input embeddings, to which inputs are compared.
        outside: the tensors that belong to no block.
        table: reads what blocks have of the tokens in a table of their own, or returns None; see
            `ggjac.blocks.block_inputs`.
        token: returns the id of a token, which is given as its id or its text.
        special: returns the ids of the vocabulary's tokens that are not text.
    """

    weights: Callable[..., BlockWeights]
    tapes: Tapes
    frame: Frame
    config: ModelConfig
    freeze_norm: Callable[..., FinalNorm]
    norm: FinalNorm
    x: Float[Tensor, "n d"]
    outputs: Float[Tensor, "n d"]
    ids: list[int]
    head: Head
    embedding: Embeddings
    outside: BlockWeights
    table: Callable[[], Tensor | None]
    token: Callable[[int | str], int]
    special: Callable[[], list[int]]

    def walk(
        self, positions: range, *, down: bool = False, blocks: Sequence[int] | None = None
    ) -> Iterator[tuple[int, BlockTape, FrozenBlock]]:
        """Yield all blocks or some, written at some positions, with their numbers and tapes, upwards or downwards."""

        def build(i: int) -> tuple[int, BlockTape, FrozenBlock]:
            tape, config = self.tapes[i], self.frame.config
            return i, tape, block(self.weights(i), config, tape, positions, config.bank(i))

        order = (range(len(self.tapes)) if blocks is None else blocks)[:: -1 if down else 1]
        return prefetched(map(build, order))


Built = TypeVar("Built", bound=tuple[Any, ...])


def prefetched(built: Iterator[Built]) -> Iterator[Built]:
    """Yield what is built of each block, a `FrozenBlock` last; the next one's weights are read while one computes."""
    ahead = next(built, None)
    while ahead is not None:
        now, ahead = ahead, next(built, None)
        if ahead is not None:
            ahead[-1].read_ahead()
        yield now


class SharedSweep:
    """The maps of several spans, applied in one pass over the weights.

    Each vector is read through the final norm, frozen at the tap's own vector (as in a logit lens), unless `raw`.
    Positions after `position` have no influence (attention is causal): they are left out, and their part of a result is
    zero.

    Where several blocks read the values of one, these are columns beside the stream: see `FrozenBlock`. A map that
    starts after the block that makes them has them as a constant, the values at the prompt.

    Positions to `exclude` are no input of the maps: where a span starts, they hold what they hold at the prompt, times
    the homogeneous coordinate. So a product without it does not depend on them, and the offset has their part.

    Attributes:
        exclude: positions up to the output's that are no input.
        progress: if set, called as `progress(done, total)` after each block of a pass.
        journal: if set, products are recorded there, and those recorded by an earlier attempt are not computed again.
        flop: floating-point operations so far, multiplications by matrices only.
        rounding: dtype in which the blocks' matrices are multiplied; None for that of the network. Everything else,
            such as the residual stream, stays in that.
    """

    def __init__(
        self,
        network: FrozenNetwork,
        spans: Sequence[Span],
        position: int,
        *,
        raw: bool = False,
        journal: Records | None = None,
        exclude: Sequence[int] = (),
    ):
        for start, tap in spans:
            if not 0 <= start < tap.index <= len(network.tapes):
                raise ValueError(
                    f"no map leads from block {start} to {tap.kind} {tap.index}; the model has {len(network.tapes)} "
                    "blocks, taps count them from 1"
                )
        self.network, self.spans, self.position, self.raw = network, list(spans), position, raw
        self.n, self.d = network.x.shape
        self.exclude = list(exclude)
        self._excluded = indices_on(network.x.device, torch.tensor(self.exclude, dtype=torch.long))
        self.order = [i for i in range(len(network.tapes)) if any(start <= i < tap.index for start, tap in spans)]
        self.progress: Callable[[int, int], None] | None = None
        self.journal = journal
        self._width = network.config.width
        self.flop = 0
        self.rounding: torch.dtype | None = None
        self._values: dict[int, Tensor] = {}

    @contextmanager
    def rounded(self, dtype: torch.dtype) -> Iterator[None]:
        """Inside, multiply with the matrices of the blocks rounded to a dtype, and vectors rounded to it as well."""
        self.rounding = dtype
        try:
            yield
        finally:
            self.rounding = None

    def up(
        self, X: Sequence[Float[Tensor, "_ n _"]], t: Sequence[Float[Tensor, " _"]] | None = None
    ) -> list[Float[Tensor, "_ _"]]:
        """Return `A x + t b` of every span for its own stacked vectors: `[k, n, d]` to `[k, d]`, any `k` for each.

        Widths are those of all residual streams where a span starts, and where it ends if `raw`.
        """
        return self._recorded("up", [*X, *(t or [])], partial(self._up, X, t))

    def down(self, Y: Sequence[Float[Tensor, "_ _"]]) -> list[Float[Tensor, "_ n _"]]:
        """Return `Aᵀ y` of every span for its own stacked cotangents: `[k, d]` to `[k, n, d]`, any `k` for each."""
        return self._recorded("down", Y, partial(self._down, Y))

    def of_matrices(self, compute: Callable[[int, Float[Tensor, "d n d"]], list[Tensor]]) -> list[list[Tensor]]:
        """Return what `compute` makes of the number and the matrix of every span, always equally many tensors.

        One pass has the matrices of all: they have one end, or else one start. From one end all rows go down,
        `[d, n, d]`, and are a span's matrix where it starts. From one start all columns go up, `[n d, n, d]`, and are
        read where a span ends. The journal has the pass as one product, whose states have all that was made so far.
        """
        rows = share_rows([(span.start, span.tap.index) for span in self.spans])
        made = self._recorded("matrices", [], partial(self._rows if rows else self._columns, compute))
        each = len(made) // len(self.spans)
        return [made[start : start + each] for start in range(0, len(made), each)]

    def _rows(self, compute: Callable[[int, Tensor], list[Tensor]], product: Product | None) -> list[Tensor]:
        x = self.network.x
        H = self.norms[0].rmatmat(torch.eye(self.d, dtype=x.dtype, device=x.device)[:, None])  # [d, 1, d]
        stack = _Stack(_at_last(H[:, 0], self.position + 1), [self.d] * len(self.spans))
        del H
        for i, frozen in self._steps(self.order[::-1], stack, product, self._ways_down):
            stack.H = frozen.rmatmat(stack.H[:, -frozen.ffn.out_shape[0] :], stack.banks)
            self.flop += frozen.flop * len(stack.H)
            for j in self._starting(i):
                stack.results[j] = compute(j, _padded(self.without(stack.H), self.n))
        return stack.finished()

    def _columns(self, compute: Callable[[int, Tensor], list[Tensor]], product: Product | None) -> list[Tensor]:
        x, m = self.network.x, self.position + 1
        H = self.without(torch.eye(m * self.d, dtype=x.dtype, device=x.device).unflatten(1, (m, self.d)))
        stack = _Stack(H, [len(H)] * len(self.spans))
        del H

        def read(kind: Kind, i: int, images: Tensor) -> None:
            for j in self._ending(kind, i):
                matrix = self.norms[j].matmat(images[:, -1:])[:, 0].T  # [d, m d]
                stack.results[j] = compute(j, _padded(matrix.unflatten(1, (m, self.d)), self.n))

        for i, frozen in self._steps(self.order, stack, product, self._ways_up):
            self.flop += frozen.flop * len(stack.H)
            stack.H, stack.added = frozen.matmat_attn(stack.H, None, stack.banks)
            read("attn", i, stack.added)
            stack.H, stack.added = frozen.matmat_ffn(stack.H, stack.added)
            read("mlp", i, stack.added)
            stack.H, stack.added = frozen.matmat_out(stack.H, stack.added), None
            read("layer", i, stack.H)
        return stack.finished()

    def _up(self, X: Sequence[Tensor], t: Sequence[Tensor] | None, product: Product | None) -> list[Tensor]:
        x, m = self.network.x, self.position + 1
        t = None if t is None else [part.to(x) for part in t]
        stack = _Stack(x.new_zeros(0, m, self._width(self.order[0])), [len(part) for part in X])
        for i, frozen in self._steps(self.order, stack, product, self._ways_up):
            stack.H = stack.join(
                stack.H,
                {j: self._holding(X[j][:, :m].to(x), i, None if t is None else t[j]) for j in self._starting(i)},
            )  # [k, n, d]
            self.flop += frozen.flop * len(stack)
            if frozen.reads_bank and frozen.bank is not None:
                self._fill_bank(stack, frozen.bank, stack.homogeneous(t))
            stack.H, stack.added = frozen.matmat_attn(stack.H, stack.homogeneous(t), stack.banks)
            stack.leave(self._ending("attn", i), stack.added, _last)
            stack.H, stack.added = frozen.matmat_ffn(stack.H, stack.added, stack.homogeneous(t))
            stack.leave(self._ending("mlp", i), stack.added, _last)
            stack.H, stack.added = frozen.matmat_out(stack.H, stack.added, stack.homogeneous(t)), None
            stack.leave(self._ending("layer", i), stack.H, _last)
        return [
            norm.matmat(result[:, None], None if t is None else t[j])[:, 0]
            for j, (norm, result) in enumerate(zip(self.norms, stack.finished(), strict=True))
        ]

    def _down(self, Y: Sequence[Tensor], product: Product | None) -> list[Tensor]:
        x = self.network.x
        read = [norm.rmatmat(part.to(x)[:, None])[:, 0] for norm, part in zip(self.norms, Y, strict=True)]

        def joining(kind: Kind, i: int, m: int) -> dict[int, Tensor]:
            return {j: _at_last(read[j], m) for j in self._ending(kind, i)}

        empty = x.new_zeros(0, self.position + 1, self._width(self.order[-1] + 1))
        stack = _Stack(empty, [len(part) for part in Y])
        for i, frozen in self._steps(self.order[::-1], stack, product, self._ways_down):
            m = frozen.ffn.out_shape[0]  # positions that the block writes
            stack.H, ffn = frozen.rmatmat_out(stack.join(stack.H[:, :m], joining("layer", i, m)))  # [k, m, d]
            middle, attn = frozen.rmatmat_ffn(stack.H, stack.join(ffn, joining("mlp", i, m)))
            attn = stack.join(attn, joining("attn", i, frozen.attn.out_shape[0]))
            stack.H = frozen.rmatmat_attn(middle, attn, stack.banks)  # [k, n, d]
            self.flop += frozen.flop * len(stack)
            stack.leave(self._starting(i), stack.H, lambda H: _padded(self.without(H), self.n))
        return stack.finished()

    def without(self, H: Float[Tensor, "k m i"]) -> Float[Tensor, "k m i"]:
        """Return vectors with zeros at the excluded positions."""
        return H.index_fill(1, self._excluded, 0.0) if self.exclude else H

    def _holding(self, X: Float[Tensor, "k m i"], i: int, t: Tensor | None) -> Float[Tensor, "k m i"]:
        """Return inputs of block `i` that hold the prompt's own at the excluded positions, times `t` or 0."""
        if not self.exclude or t is None:
            return self.without(X)
        held = self.network.tapes[i].x[self._excluded]
        return X.index_copy(1, self._excluded, t[:, None, None] * held)

    def _fill_bank(self, stack: "_Stack", bank: int, t: Tensor | None) -> None:
        """Give values of the prompt to vectors that joined after the block that makes them: a constant of their map."""
        held = stack.banks.get(bank)
        first = 0 if held is None else len(held)
        if first == len(stack):
            return
        values = self._constants(bank)[None]
        constant = values.new_zeros(len(stack) - first) if t is None else t[first:]
        more = constant[:, None, None] * values
        stack.banks[bank] = more if held is None else torch.cat([held, more])

    def _constants(self, bank: int) -> Float[Tensor, "n gv"]:
        """Return the values at the prompt that a block makes and later ones read."""
        if bank not in self._values:
            network, positions = self.network, range(self.position + 1)
            tape = network.tapes[bank]
            frozen = block(network.weights(bank), network.frame.config, tape, positions, bank)
            assert frozen.values is not None
            self._values[bank] = affine(frozen.values, tape.x[: self.position + 1])
        return self._values[bank]

    def _starting(self, i: int) -> list[int]:
        """Return the spans that start at the input of block `i`."""
        return [j for j, span in enumerate(self.spans) if span.start == i]

    def _ending(self, kind: Kind, i: int) -> list[int]:
        """Return the spans that end at a tap of block `i`."""
        return [j for j, span in enumerate(self.spans) if span.tap == Tap(kind, i + 1)]

    @property
    def _ways_up(self) -> list["_Way"]:
        """The way up of every span, in the order in which they join the stack."""
        ways = [_Way(j, start, tap.index - 1) for j, (start, tap) in enumerate(self.spans)]
        return sorted(ways, key=lambda way: way.joins)

    @property
    def _ways_down(self) -> list["_Way"]:
        """The way down of every span, in the order in which they join the stack."""
        ways = [_Way(j, tap.index - 1, start) for j, (start, tap) in enumerate(self.spans)]
        return sorted(ways, key=lambda way: (-way.joins, DOWNWARDS.index(self.spans[way.span].tap.kind)))

    def width(self, tap: Tap) -> int:
        """Return the elements of a tap's vector at one position: those of all residual streams, or of a branch."""
        return self._width(tap.index) if tap.kind == "layer" else self.d

    @cached_property
    def norms(self) -> list[LinearOperator]:
        """The final norm of each span, frozen at its tap's vector, to `[1, d]`; the identity if `raw`.

        Of several residual streams it reads what the head would collect of them.
        """
        x, network, end = self.network.x, self.network, Tap("layer", len(self.network.tapes))
        if self.raw:
            return [Identity((1, self.width(tap)), dtype=x.dtype, device=x.device) for _, tap in self.spans]
        norms = {end: network.norm.at(slice(self.position, self.position + 1)).operator()}
        inner = sorted({span.tap for span in self.spans} - {end})
        for tap in [tap for tap in inner if tap.kind == "layer"]:
            norms[tap] = network.freeze_norm(network.tapes[tap.index].x[self.position][None]).operator()
        branches = [tap for tap in inner if tap.kind != "layer"]
        if branches:  # the tapes do not hold what branches add: it takes one block for each
            values = SharedSweep(network, [Span(tap.index - 1, tap) for tap in branches], self.position, raw=True)
            inputs = [network.tapes[tap.index - 1].x[None] for tap in branches]
            for tap, value in zip(branches, values.up(inputs, [x.new_ones(1)] * len(branches)), strict=True):
                norms[tap] = network.freeze_norm(value).operator()
        return [norms[span.tap] for span in self.spans]

    def _recorded(
        self, kind: str, inputs: Sequence[Tensor], compute: Callable[[Product | None], list[Tensor]]
    ) -> list[Tensor]:
        """Return a product from the journal, or compute it from where an earlier attempt stopped, and record it.

        Raises:
            ChangedError: another program has changed the file, so that the product may be of two models.
        """
        if self.rounding:
            kind += f" in {str(self.rounding).removeprefix('torch.')}"
        product = self.journal.product(kind, inputs) if self.journal else None
        if product and product.result is not None:
            return product.result
        result = compute(product)
        self.network.embedding.matrix.store.check_unchanged()
        return product.finish(result) if product else result

    def _steps(
        self, order: Sequence[int], stack: "_Stack", product: Product | None, ways: Sequence["_Way"]
    ) -> Iterator[tuple[int, FrozenBlock]]:
        """Yield the blocks that are left to do; restore the stack before the first one, and record it after each."""
        if product and product.state is not None:
            done = set(order[: product.done])
            stack.members = [way.span for way in ways if way.joins in done and way.leaves not in done]
            config = self.network.frame.config
            banks = {bank for i in done if (bank := config.bank(i)) is not None}
            stack.unpack(product.state, [way.span for way in ways if way.leaves in done], banks)
        for step, i, frozen in self._walk(order, product.done if product else 0):
            yield i, frozen
            if product:
                stack.unpack(product.reached(step, stack.pack), stack.results, stack.banks)

    def _walk(self, order: Sequence[int], done: int) -> Iterator[tuple[int, int, FrozenBlock]]:
        """Yield the blocks after the first `done`, and report each that has computed."""
        left = enumerate(order[done:], start=done + 1)
        for step, i, frozen in prefetched((step, i, self._block(i)) for step, i in left):
            yield step, i, frozen
            if self.progress:
                self.progress(step, len(order))

    def _block(self, i: int) -> FrozenBlock:
        """Build a block's operators; where all spans that pass through it end in it, it writes one position only."""
        ends = all(tap.index == i + 1 for start, tap in self.spans if start <= i < tap.index)
        positions = range(self.position if ends else 0, self.position + 1)
        config = self.network.frame.config
        weights = self.network.weights(i, self.rounding)
        return block(weights, config, self.network.tapes[i], positions, config.bank(i))


class _Way(NamedTuple):
    """The way of a span's vectors through the blocks: the number of the span, and its first and last block."""

    span: int
    joins: int
    leaves: int


class _Stack:
    """The vectors of several spans on their way: consecutive rows for each span, in the order in which they joined.

    Of their matrices, all rows are those of every span.

    Attributes:
        H: `[k, m, d]`, the residual stream, or its cotangents.
        added: `[k, m, d]`, what a branch adds to it on the way up; None between blocks.
        members: the spans that are in the stack, in the order of their rows.
        results: of the spans that have left it, equally many tensors of each.
        banks: see `FrozenBlock`.
    """

    def __init__(self, first: Float[Tensor, "k m d"], sizes: Sequence[int]):
        self.H: Tensor = first
        self.added: Tensor | None = None
        self.members: list[int] = []
        self.results: dict[int, list[Tensor]] = {}
        self.banks: dict[int, Tensor] = {}
        self._sizes = sizes  # of every span

    def __len__(self) -> int:
        return sum(self._sizes[j] for j in self.members)

    def homogeneous(self, t: Sequence[Tensor] | None) -> Float[Tensor, " k"] | None:
        """Return the homogeneous coordinates of all rows, from those of every span."""
        return None if t is None else torch.cat([self.H.new_zeros(0), *(t[j] for j in self.members)])

    def join(self, stack: Tensor, more: Mapping[int, Tensor]) -> Tensor:
        """Append the vectors of spans that join the members, whose rows are `stack`; return the longer stack."""
        self.members += more
        return joined(stack, *more.values())

    def leave(self, leaving: Sequence[int], stack: Tensor, result: Callable[[Tensor], Tensor]) -> None:
        """Take spans out of the stack; their results are made from their rows of `stack`."""
        rows = self._rows()
        self.results |= {j: [result(stack[rows[j]])] for j in leaving}
        staying = [j for j in self.members if j not in leaving]
        if staying != self.members:
            kept = [rows[j] for j in staying]
            self.H = _taken(self.H, kept)
            self.added = None if self.added is None else _taken(self.added, kept)
            self.banks = {bank: _taken(held, kept) for bank, held in self.banks.items()}
        self.members = staying

    def pack(self) -> list[Tensor]:
        """Return everything that the next block needs: stream, banks by number, results in the order of spans."""
        parts = [self.banks[bank] for bank in sorted(self.banks)]
        return [self.H, *parts, *self.finished()]

    def finished(self) -> list[Tensor]:
        """Return the results of the spans that have left it, in the order of spans."""
        return [part for j in sorted(self.results) for part in self.results[j]]

    def unpack(self, packed: Sequence[Tensor], finished: Iterable[int], banks: Iterable[int]) -> None:
        """Restore what was packed; `finished` are the spans of the results, `banks` the numbers of the banks."""
        names, results = sorted(banks), sorted(finished)
        self.H, self.banks = packed[0], dict(zip(names, packed[1:], strict=False))
        made = packed[1 + len(names) :]
        each = len(made) // max(1, len(results))
        self.results = {j: list(made[at * each : (at + 1) * each]) for at, j in enumerate(results)}

    def _rows(self) -> dict[int, slice]:
        ends = list(accumulate(self._sizes[j] for j in self.members))
        return {j: slice(end - self._sizes[j], end) for j, end in zip(self.members, ends, strict=True)}


def _taken(stack: Tensor, rows: Sequence[slice]) -> Tensor:
    """Return some sections of a stack; without a copy if they are its first rows."""
    count = sum(part.stop - part.start for part in rows)
    if not rows or rows[-1].stop == count:
        return stack[:count]
    return torch.cat([stack[part] for part in rows])


def joined(stack: Tensor, *more: Tensor) -> Tensor:
    """Append to a stack; without a copy if only one part has any rows."""
    parts = [part for part in (stack, *more) if len(part)]
    return parts[0] if len(parts) == 1 else torch.cat(parts) if parts else stack


def _last(X: Float[Tensor, "k m d"]) -> Float[Tensor, "k d"]:
    """Return a copy of the last position, so that the stack can be freed."""
    return X[:, -1].clone()


def _at_last(Y: Float[Tensor, "k d"], positions: int) -> Float[Tensor, "k m d"]:
    """Return cotangents at the last of some positions, and zeros at the others."""
    Z = Y.new_zeros(len(Y), positions, Y.shape[1])
    Z[:, -1] = Y
    return Z


def _padded(X: Float[Tensor, "k m d"], n: int) -> Float[Tensor, "k n d"]:
    """Append zeros for the positions that have no influence."""
    k, m, d = X.shape
    return X if m == n else torch.cat([X, X.new_zeros(k, n - m, d)], 1)
