"""One pass over the streamed blocks for the vectors of many maps: each weight is dequantized once for all of them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ggjac.blocks import BlockWeights, Frame, FrozenBlock, NormTape, block
from ggjac.decode import Head
from ggjac.jacobian.tapes import Tapes
from ggjac.linop import Identity, LinearOperator
from ggjac.runs.journal import Journal
from ggjac.weights import Weight


@dataclass(frozen=True, order=True)
class Tap:
    """A place in the network where a map may end: one vector at one position.

    Attributes:
        kind: `"layer"`: the stream after `index` blocks. `"attn"`, `"mlp"`: what that branch of the `index`-th block
            (counted from 1) adds to the stream, after any post-norm.
        index: number of blocks applied, the tap's own included.
    """

    kind: Literal["layer", "attn", "mlp"]
    index: int


class Span(NamedTuple):
    """A map from the stream after `start` blocks to a tap."""

    start: int
    tap: Tap


class FrozenNetwork(NamedTuple):
    """What a trace leaves of the network, as products need it.

    Attributes:
        weights: gives the tensors of a block.
        tapes: what is frozen in each block; asked for when a sweep gets there, so that they may live on a disk.
        frame: what the blocks share, the freezing rule among it.
        freeze_norm: freezes the final norm at any stream `[m, d]`.
        norm: the final norm, frozen at the prompt's own last stream.
        x: `[n, d]`, input of block 0: embeddings after any scaling.
        outputs: `[n, d]`, the forward pass's outputs after the final norm.
        ids: the `n` token ids.
        head: the LM head, which decodes outputs.
        embedding: `[v, d]`, the input embeddings, to which inputs are compared.
    """

    weights: Callable[[int], BlockWeights]
    tapes: Tapes
    frame: Frame
    freeze_norm: Callable[[Tensor], NormTape]
    norm: NormTape
    x: Float[Tensor, "n d"]
    outputs: Float[Tensor, "n d"]
    ids: list[int]
    head: Head
    embedding: Weight


class SharedSweep:
    """The maps of several paths, applied in one pass over the weights.

    Vectors join the stack where their path starts and leave it at their tap, each seen through the final norm frozen at
    the tap's own vector (as a logit lens sees it) unless `raw`. Positions after `position` have no influence (attention
    is causal): they are left out, and their part of a result is zero.

    Attributes:
        progress: if set, called as `progress(done, total)` after each block of a pass.
        journal: if set, products are remembered there, and those of an earlier attempt are not computed again.
        flop: floating-point operations so far, multiplications by matrices only.
    """

    def __init__(self, network: FrozenNetwork, spans: Sequence[Span], position: int, *, raw: bool = False):
        for start, tap in spans:
            if not 0 <= start < tap.index <= len(network.tapes):
                raise ValueError(
                    f"no map leads from block {start} to {tap.kind} {tap.index}; the model has {len(network.tapes)} "
                    "blocks, taps count them from 1"
                )
        self.network, self.spans, self.position, self.raw = network, list(spans), position, raw
        self.n, self.d = network.x.shape
        self.order = [i for i in range(len(network.tapes)) if any(start <= i < tap.index for start, tap in spans)]
        self.progress: Callable[[int, int], None] | None = None
        self.journal: Journal | None = None
        self.flop = 0

    def up(
        self, X: Sequence[Float[Tensor, "_ n d"]], t: Sequence[Float[Tensor, " _"]] | None = None
    ) -> list[Float[Tensor, "_ d"]]:
        """Return `A x + t b` of every path for its own stacked vectors: `[k, n, d]` to `[k, d]`, `k` as they like."""
        x, sizes = self.network.x, [len(part) for part in X]
        H = x.new_zeros(0, self.position + 1, self.d)
        owners: list[int] = []
        out: dict[int, Tensor] = {}

        def homogeneous() -> Tensor | None:
            return None if t is None else torch.cat([x.new_zeros(0), *(t[j].to(x) for j in owners)])

        def leave(tap: Tap, found: Tensor, *carried: Tensor) -> list[Tensor]:
            """Take the results of paths that end here from the last position of `found`; the rest stays on board."""
            nonlocal owners
            rows = _sections(owners, sizes)
            out.update({j: found[rows[j], -1].clone() for j in owners if self.spans[j].tap == tap})
            staying = [j for j in owners if self.spans[j].tap != tap]
            kept = (
                list(carried) if staying == owners else [_taken(part, [rows[j] for j in staying]) for part in carried]
            )
            owners = staying
            return kept

        product = self.journal and self.journal.product("up", [*X, *(t or [])])
        if product and product.result is not None:
            return product.result
        if product and product.state is not None:
            H, *rest = product.state
            below = self.order[product.done - 1] + 1  # the blocks that are behind
            owners = [j for j in self._by_start if self.spans[j].start < below < self.spans[j].tap.index]
            out = dict(zip([j for j in self._all if self.spans[j].tap.index <= below], rest, strict=True))
        for done, i, frozen in self._walk(self.order, product.done if product else 0):
            joining = [j for j, path in enumerate(self.spans) if path.start == i < path.tap.index]
            H = _joined(H, [X[j][:, : self.position + 1].to(x) for j in joining])
            owners = owners + joining
            self.flop += frozen.flop * len(H)
            added = frozen.attn.matmat(H, homogeneous())
            H, added = leave(Tap("attn", i + 1), added, frozen.kept.matmat(H), added)
            middle = added.add_(H)
            added = frozen.ffn.matmat(H if frozen.parallel else middle, homogeneous())
            middle, added = leave(Tap("mlp", i + 1), added, middle, added)
            H = added.add_(middle)
            (H,) = leave(Tap("layer", i + 1), H, H)
            if product:
                H, *rest = product.reached(done, partial(list, [H, *(out[j] for j in sorted(out))]))
                out = dict(zip(sorted(out), rest, strict=True))
        norms = [None if t is None else t[j].to(x) for j in range(len(self.spans))]
        result = [norm.matmat(out[j][:, None], norms[j])[:, 0] for j, norm in enumerate(self.norms)]
        return product.finish(result) if product else result

    def down(self, Y: Sequence[Float[Tensor, "_ d"]]) -> list[Float[Tensor, "_ n d"]]:
        """Return `Aᵀ y` of every path for its own stacked cotangents: `[k, d]` to `[k, n, d]`, `k` as they like."""
        x, sizes = self.network.x, [len(part) for part in Y]
        seen = [norm.rmatmat(Y[j].to(x)[:, None])[:, 0] for j, norm in enumerate(self.norms)]
        H = x.new_zeros(0, self.position + 1, self.d)
        owners: list[int] = []
        out: dict[int, Tensor] = {}

        def join(tap: Tap, carried: Tensor, positions: int) -> Tensor:
            """Add the cotangents of paths that end here, zero but at the last position."""
            nonlocal owners
            joining = [j for j, path in enumerate(self.spans) if path.tap == tap]
            owners = owners + joining
            return _joined(carried, [_at_last(seen[j], positions) for j in joining])

        product = self.journal and self.journal.product("down", Y)
        if product and product.result is not None:
            return product.result
        if product and product.state is not None:
            H, *rest = product.state
            above = self.order[-product.done]  # the lowest block that is behind
            owners = [j for j in self._by_tap if self.spans[j].start < above < self.spans[j].tap.index]
            out = dict(zip([j for j in self._all if self.spans[j].start >= above], rest, strict=True))
        for done, i, frozen in self._walk(self.order[::-1], product.done if product else 0):
            written = frozen.kept.out_shape[0]
            H = join(Tap("layer", i + 1), H[:, :written], written)
            G = join(Tap("mlp", i + 1), H, written)
            middle = frozen.ffn.rmatmat(G)
            middle[: len(H)] += H
            into = _joined(H, [H.new_zeros(len(G) - len(H), *H.shape[1:])]) if frozen.parallel else middle
            into = join(Tap("attn", i + 1), into, written)
            self.flop += frozen.flop * len(into)
            H = frozen.attn.rmatmat(into)
            H[: len(middle)] += frozen.kept.rmatmat(middle)
            rows = _sections(owners, sizes)
            for j in [j for j in owners if self.spans[j].start == i]:
                out[j] = _padded(H[rows[j]], self.n)
            staying = [j for j in owners if self.spans[j].start != i]
            if staying != owners:
                H = _taken(H, [rows[j] for j in staying])
            owners = staying
            if product:
                H, *rest = product.reached(done, partial(list, [H, *(out[j] for j in sorted(out))]))
                out = dict(zip(sorted(out), rest, strict=True))
        result = [out[j] for j in self._all]
        return product.finish(result) if product else result

    @property
    def _all(self) -> range:
        return range(len(self.spans))

    @property
    def _by_start(self) -> list[int]:
        """Paths in the order in which they join on the way up."""
        return sorted(self._all, key=lambda j: self.spans[j].start)

    @property
    def _by_tap(self) -> list[int]:
        """Paths in the order in which they join on the way down."""
        kinds = ("layer", "mlp", "attn")
        return sorted(self._all, key=lambda j: (-self.spans[j].tap.index, kinds.index(self.spans[j].tap.kind)))

    @cached_property
    def norms(self) -> list[LinearOperator]:
        """The final norm as each tap sees it, `[1, d]` to `[1, d]`; the identity if `raw`."""
        x, network, end = self.network.x, self.network, Tap("layer", len(self.network.tapes))
        if self.raw:
            return [Identity((1, self.d), dtype=x.dtype, device=x.device)] * len(self.spans)
        norms = {end: network.norm.at(slice(self.position, self.position + 1)).operator()}
        inner = sorted({path.tap for path in self.spans} - {end})
        for tap in [tap for tap in inner if tap.kind == "layer"]:
            norms[tap] = network.freeze_norm(network.tapes[tap.index].x[self.position][None]).operator()
        branches = [tap for tap in inner if tap.kind != "layer"]
        if branches:  # what a branch added is not on the tapes: one block each
            values = SharedSweep(network, [Span(tap.index - 1, tap) for tap in branches], self.position, raw=True)
            inputs = [network.tapes[tap.index - 1].x[None] for tap in branches]
            for tap, value in zip(branches, values.up(inputs, [x.new_ones(1)] * len(branches)), strict=True):
                norms[tap] = network.freeze_norm(value).operator()
        return [norms[path.tap] for path in self.spans]

    def _walk(self, order: Sequence[int], done: int) -> Iterator[tuple[int, int, FrozenBlock]]:
        """Yield the blocks after the first `done`: each is built, and read ahead, while the one before it computes."""
        ahead = self._block(order[done]) if done < len(order) else None
        for step, i in enumerate(order[done:], start=done + 1):
            frozen, ahead = ahead, self._block(order[step]) if step < len(order) else None
            assert frozen is not None
            if ahead:
                ahead.read_ahead()
            yield step, i, frozen
            if self.progress:
                self.progress(step, len(order))

    def _block(self, i: int) -> FrozenBlock:
        """Build a block's operators; where all paths in it end, it writes one position only."""
        ends = all(tap.index == i + 1 for start, tap in self.spans if start <= i < tap.index)
        positions = range(self.position if ends else 0, self.position + 1)
        return block(self.network.weights(i), self.network.frame.config, self.network.tapes[i], positions)


def _sections(owners: Sequence[int], sizes: Sequence[int]) -> dict[int, slice]:
    """Return which rows of the stack belong to each path on board."""
    ends = list(accumulate(sizes[j] for j in owners))
    return {j: slice(end - sizes[j], end) for j, end in zip(owners, ends, strict=True)}


def _taken(stack: Tensor, rows: Sequence[slice]) -> Tensor:
    """Return some sections of a stack; without a copy where they are its beginning."""
    count = sum(part.stop - part.start for part in rows)
    if not rows or rows[-1].stop == count:
        return stack[:count]
    return torch.cat([stack[part] for part in rows])


def _joined(stack: Tensor, more: Sequence[Tensor]) -> Tensor:
    """Append to a stack; without a copy where one part is all there is."""
    parts = [part for part in (stack, *more) if len(part)]
    return parts[0] if len(parts) == 1 else torch.cat(parts) if parts else stack


def _at_last(Y: Float[Tensor, "k d"], positions: int) -> Float[Tensor, "k m d"]:
    """Return cotangents of the last of some positions."""
    Z = Y.new_zeros(len(Y), positions, Y.shape[1])
    Z[:, -1] = Y
    return Z


def _padded(X: Float[Tensor, "k m d"], n: int) -> Float[Tensor, "k n d"]:
    """Return zeros at the positions that have no influence."""
    k, m, d = X.shape
    return X if m == n else torch.cat([X, X.new_zeros(k, n - m, d)], 1)
