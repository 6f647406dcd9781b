"""What each command does, counted: passes over the weights, where, with how many vectors, and what is kept meanwhile.

From a model's sizes and a command's options alone. What a pass reads, computes and takes is for `ggjac.planner` to say.
A command that is to be planned is a row of `JOBS`.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

from ggjac.config import ModelConfig
from ggjac.sizes import (
    CHUNK_BYTES,
    EXACT_ROWS,
    ITEM_BYTES,
    KINDS,
    MAPS,
    PROBES,
    SHUFFLES,
    SLICE,
    TOKENS_AT_ONCE,
    WAITING_BYTES,
    block_width,
    chunk_floats,
    default_layer,
)

# Sweeps until eight residuals are below 1e-3, up and down counted singly: 6 to 10 on spectra like those of models.
EXPECTED_SWEEPS = 8
# In bfloat16, whose rounding rests above 1e-3: until the residuals no longer fall.
FLOOR_SWEEPS = {"bfloat16": 11}


class PlanError(ValueError):
    """A plan cannot be made: an impossible prompt length, rank or dtype."""


class Over(NamedTuple):
    """Which part of the network a pass goes over; by default the sweep of a Jacobian.

    Attributes:
        tensors: `"live"`: those that products use; `"heads"`: the same, the output projection twice; `"all"`: those of
            the forward pass.
        read: positions that are read; None: up to the output's.
        written: positions that are written; None: those that are read, but one in a block where all maps end.
        spans: of each map that advances, the blocks from the first to before the last; none: one map over all blocks.
            All maps have as many vectors.
        apart: not all maps advance together, but one after another, each with all the vectors.
    """

    tensors: Literal["live", "heads", "all"] = "live"
    read: int | None = None
    written: int | None = None
    spans: tuple[tuple[int, int], ...] = ()
    apart: bool = False

    @property
    def turns(self) -> int:
        """How many sweeps, one after another, make up a pass."""
        return len(self.spans) if self.apart else 1


SWEEP = Over()


class Krylov(NamedTuple):
    """The bases of a decomposition: of so many `maps`, each from `positions`, `width` vectors more in every sweep."""

    maps: int
    positions: int
    width: int
    sweeps: int


@dataclass(frozen=True)
class Sweeps:
    """So many passes over blocks with so many stacked vectors; `what` says what for.

    Attributes:
        up: some of them go up the layers, which takes more memory.
        over: which part of the network.
        after: floats that are made of each float of a result when it is there.
        copies: of the stream, which are made where maps join or leave the stack, or which the caller holds.
        krylov: decompositions that the passes are for.
        held: bytes of what else is kept meanwhile, by name.
    """

    what: str
    count: int
    vectors: int
    up: bool = True
    over: Over = SWEEP
    after: float = 0.0
    copies: int = 0
    krylov: tuple[Krylov, ...] = ()
    held: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Lookup:
    """So many passes over the vocabulary: vectors whose `logits` are all wanted, and vectors to decode.

    By the `head`, or to the nearest of the input embeddings.
    """

    what: str
    count: int = 1
    logits: int = 0
    head: int = 0
    embedding: int = 0


@dataclass(frozen=True)
class Job:
    """What a command does after the trace, and what must be kept meanwhile.

    Attributes:
        name: the command.
        n: tokens of the trace; the output is at the last of `reached`.
        dtype: of all arithmetic.
        steps: in order.
        tapes: whether what the Jacobian freezes is kept.
        maps: maps inside the network that advance together, at most.
        chunk_bytes: working memory of a chunk of dense rows.
        reused: which tensors later passes want again.
        kept: bytes of what is kept from step to step, by name.
        prompts: how often all of it is done, one prompt after another.
        readied: how often layers that are kept are made ready, at most: once for all prompts, but each may want other
            experts.
    """

    name: str
    n: int
    reached: int
    dtype: str
    steps: tuple[Sweeps | Lookup, ...] = ()
    tapes: bool = True
    maps: int = 0
    chunk_bytes: int = CHUNK_BYTES
    reused: Literal["live", "all"] = "live"
    kept: Mapping[str, int] = field(default_factory=dict)
    prompts: int = 1
    readied: int = 1

    @property
    def sweeps(self) -> tuple[Sweeps, ...]:
        """The passes over blocks."""
        return tuple(step for step in self.steps if isinstance(step, Sweeps))

    @property
    def lookups(self) -> tuple[Lookup, ...]:
        """The passes over the vocabulary."""
        return tuple(step for step in self.steps if isinstance(step, Lookup))

    @property
    def vectors(self) -> int:
        """Most stacked vectors of any sweep."""
        return max((step.vectors for step in self.sweeps), default=0)

    @property
    def width(self) -> int:
        """Most vectors by which Krylov bases grow in a sweep; 0 where nothing is decomposed."""
        return max((sum(k.maps * k.width for k in step.krylov) // step.over.turns for step in self.sweeps), default=0)


@dataclass(frozen=True)
class Asked:
    """What a command was asked for, as far as it decides the work; the defaults are the commands' own.

    Attributes:
        rank: triplets.
        position: of the output, negative from the end; `everywhere`: all of them (`attribute`, `predict`).
        sweeps: of a decomposition: nobody knows them before; None for as many as usual.
        chunk_bytes: of dense rows; None for the usual.
        layers, maps, kinds, transport: of maps inside the network, as the options of `layers` say; None for all layers,
            in `analyze` for none.
        contrast, per_token, shuffles: parts of `analyze` and `svd`; how many shuffled vectors are decoded.
        by: of `attribute`: `"token"`, `"layer"` or `"head"`.
        count: of `norms`: columns and rows at each position.
        text: of `steer`: tokens of the text that is pushed, where a plan's `n` are the concept's; None: as many.
        method, layer, strengths, max_tokens, control: of `steer`; `strengths` is how many.
        prompts: of `ranks`: how many, the longest of `n` tokens.
        saved: with checkpoints, beside a result; `analyze` always has them.
    """

    rank: int = 8
    position: int = -1
    everywhere: bool = False
    sweeps: int | None = None
    chunk_bytes: int | None = None
    layers: Sequence[int] | None = None
    maps: Sequence[str] = MAPS
    kinds: Sequence[str] = KINDS
    transport: bool = False
    contrast: bool = False
    per_token: bool = False
    shuffles: int = SHUFFLES
    by: Literal["token", "layer", "head"] = "token"
    count: int = 3
    text: int | None = None
    method: str = "equation16"
    layer: int | None = None
    strengths: int = 1
    max_tokens: int = 12
    control: bool = True
    prompts: int = 1
    saved: bool = False


def job(name: str, config: ModelConfig, n: int, dtype: str, **options: Any) -> Job:
    """Return what a command does, one of `JOBS`, on a prompt of `n` tokens; options as `Asked` has them.

    Raises:
        PlanError: the command is not planned here, or something is out of range.
    """
    if name not in JOBS:
        raise PlanError(f"{name!r} is not planned; planned: {', '.join(JOBS)}")
    if dtype not in ITEM_BYTES:
        raise PlanError(f"dtype {dtype!r} is unknown; known: {', '.join(ITEM_BYTES)}")
    asked = Asked(**options)
    if not 1 <= n <= config.context_length:
        raise PlanError(f"a prompt of {n} tokens cannot run; this model takes from 1 to {config.context_length}")
    if not -n <= asked.position < n:
        raise PlanError(f"--position {asked.position} is out of range; the prompt has positions 0 to {n - 1}")
    if not 1 <= asked.rank <= config.d:
        raise PlanError(f"--rank {asked.rank} is out of range; this model's Jacobian has {config.d} singular values")
    order = _Order(config, n, dtype, asked)
    if not set(order.depths) <= set(range(config.block_count + 1)):
        raise PlanError(f"layers {order.depths}: out of range; this model has depths 0 to {config.block_count}")
    made = JOBS[name](order)
    if asked.saved or name == "analyze":
        made = replace(made, kept={**made.kept, "checkpoint": min(WAITING_BYTES, order.products(made.sweeps))})
    readied = asked.prompts if config.expert_count else 1
    return replace(made, name=name, chunk_bytes=order.chunk_bytes, prompts=asked.prompts, readied=readied)


def all_rows(config: ModelConfig, n: int, dtype: str) -> int:
    """Return the `chunk_bytes` with which all rows of the dense Jacobian come in one sweep."""
    return config.d * chunk_floats(n, config.d, config.hidden_units) * ITEM_BYTES[dtype]


REBUILD = Sweeps("reconstruction", 1, 3)
ATTRIBUTION = Sweeps("attribution", 1, 1, up=False)


class _Group(NamedTuple):
    """Maps inside the network that are decomposed in the same sweeps, or so many at a time.

    Attributes:
        name: which.
        maps: at a time.
        over: what they go over.
        branches: at a time, those whose value must be known, and what a pass for it goes over.
    """

    name: str
    maps: int
    over: Over
    branches: tuple[int, Over]


@dataclass(frozen=True)
class _Order:
    """A command's options on one model and prompt, and the steps that several commands have in common."""

    config: ModelConfig
    n: int
    dtype: str
    asked: Asked

    @property
    def d(self) -> int:
        """Embedding length."""
        return self.config.d

    @property
    def item(self) -> int:
        """Bytes of a float."""
        return ITEM_BYTES[self.dtype]

    @property
    def reached(self) -> int:
        """Positions up to the output's."""
        return self.asked.position % self.n + 1

    @property
    def chunk_bytes(self) -> int:
        """Working memory of a chunk of dense rows."""
        return CHUNK_BYTES if self.asked.chunk_bytes is None else self.asked.chunk_bytes

    @property
    def sweeps(self) -> int:
        """Of a decomposition."""
        return self.asked.sweeps or FLOOR_SWEEPS.get(self.dtype, EXPECTED_SWEEPS)

    def of(self, *steps: Sweeps | Lookup, **more: Any) -> Job:
        """Return a job of some steps."""
        return Job("", self.n, self.reached, self.dtype, steps, **more)

    def products(self, sweeps: tuple[Sweeps, ...]) -> int:
        """Return the bytes of what all sweeps give; those of decompositions go down and up in turn."""
        floats = 0
        for step in sweeps:
            down = 0 if step.up else step.count
            if step.krylov:
                turns = step.krylov[0].sweeps
                down = step.count // turns * math.ceil(turns / 2)
            floats += step.over.turns * step.vectors * self.d * (down * self.n + step.count - down)
        return floats * self.item

    def at_once(self, maps: int = 1) -> int:
        """Return how many dense rows, of each of several maps, go together: `DetachedJacobian.rows_at_once`."""
        return max(1, self.chunk_bytes // (chunk_floats(self.n, self.d, self.config.hidden_units) * self.item * maps))

    def portions(
        self, what: str, total: int, *, sweeps: int = 1, limit: int | None = None, **more: Any
    ) -> tuple[Sweeps, ...]:
        """Return the sweeps of vectors up to a limit, by default as many as dense rows, and of the rest.

        Bases are those of all vectors, and counted once.
        """
        some = min(total, limit or self.at_once())
        whole = Sweeps(what, sweeps * (total // some), some, **more)
        if not total % some:
            return (whole,)
        without = tuple(k._replace(maps=0) for k in whole.krylov)
        return whole, replace(whole, count=sweeps, vectors=total % some, krylov=without)

    def dense(self, what: str) -> tuple[Sweeps, ...]:
        """Return the sweeps of all dense rows; float64 copies are made of `SLICE` of them at a time."""
        rows = min(self.d, self.at_once())
        return self.portions(what, self.d, up=False, after=1 + min(SLICE, rows) / rows * 2 * 8 / self.item)

    def width(self, positions: int, rank: int | None = None) -> int:
        """Return the stacked vectors of a decomposition of one map from so many positions."""
        return min(block_width(rank or self.asked.rank, positions * self.d), self.d)

    def spectrum(self) -> tuple[Sweeps | Lookup, ...]:
        """Return the decomposition of the joint map, and what its vectors say, also beside chance."""
        rank, width, sweeps = self.asked.rank, self.width(self.n), self.sweeps
        joint = Sweeps("svd", sweeps, width, krylov=(Krylov(1, self.n, width, sweeps),))
        return joint, Lookup("decoding", head=rank, embedding=rank * self.n)

    def ordinary(self) -> tuple[Sweeps, ...]:
        """Return a product with the ordinary Jacobian: forward mode carries the values beside the one tangent.

        No tape holds the last block's output.
        """
        end = self.config.block_count
        last = Over("all", spans=((end - 1, end),))
        return Sweeps("ordinary", 1, 2, over=Over("all")), Sweeps("ordinary: last block", 1, 1, over=last)

    def coherence(self) -> tuple[Lookup, ...]:
        """Return the decoding of shuffled vectors, beside chance."""
        count = self.asked.rank + self.asked.shuffles
        return (Lookup("coherence", head=count, embedding=count),) if self.asked.shuffles else ()

    def per_token(self) -> tuple[Sweeps | Lookup, ...]:
        """Return the decomposition of each position's own map; what goes up is put in its place before."""
        maps, rank, sweeps = self.reached, self.asked.rank, self.sweeps
        width = self.width(1)
        bases = (Krylov(maps, 1, width, sweeps),)
        return (
            *self.portions("svd per token", maps * width, sweeps=sweeps, copies=1, krylov=bases),
            *self.portions("svd per token: signs", maps, copies=1),
            Lookup("decoding per token", head=maps * rank, embedding=maps * rank),
        )

    def stable_rank(self) -> tuple[Sweeps, ...]:
        """Return the Frobenius norm of the joint map: its rows, whole float64 copies of which are made, or probes."""
        after = 1 + 2 * 8 / self.item
        if self.d <= EXACT_ROWS:
            return tuple(replace(step, after=after) for step in self.dense("stable rank"))
        return (Sweeps("stable rank", 1, PROBES, up=False, after=after),)

    @property
    def depths(self) -> list[int]:
        """Where maps inside the network begin or end, in blocks applied."""
        return sorted(set(range(self.config.block_count + 1) if self.asked.layers is None else self.asked.layers))

    @property
    def ends(self) -> list[int]:
        """Where some end: none does before the first block."""
        return [i for i in self.depths if i > 0]

    @property
    def groups(self) -> list[_Group]:
        """The maps inside the network, as `analysis.layers` lets them advance."""
        asked, ends, end, kinds = self.asked, self.ends, self.config.block_count, len(self.asked.kinds)
        branches = sum(kind != "layer" for kind in asked.kinds)
        blocks = tuple((i - 1, i) for i in ends)
        inner = tuple((i, end) for i in self.depths if i < end)
        every = Over(spans=tuple((0, i) for i in ends for _ in range(kinds)))
        alone = Over(spans=blocks, apart=True)
        groups = [
            _Group("cumulative", kinds * len(ends), every, (branches * len(ends), Over(spans=blocks))),
            _Group("blockwise", kinds * bool(ends), alone, (branches, alone)),
            _Group("to_end", len(inner), Over(spans=inner), (0, SWEEP)),
        ]
        return [group for group in groups if group.name in asked.maps and group.maps]

    @property
    def together(self) -> int:
        """Most maps inside the network that advance together."""
        return max((group.maps for group in self.groups), default=0)

    def layers(self) -> tuple[Sweeps | Lookup, ...]:
        """Return the decomposition of maps inside the network, each as the whole Jacobian's; and the readout."""
        asked, rank, end = self.asked, self.asked.rank, self.config.block_count
        steps: list[Sweeps | Lookup] = [step for group in self.groups for step in self._decomposed(group)]
        every = sum(group.maps * group.over.turns for group in self.groups)
        if every:
            steps.append(Lookup("layers: decoding", head=every * rank))
        if asked.transport and "cumulative" in asked.maps and "layer" in asked.kinds:
            steps += self._transport()
        return *steps, Lookup("readout", logits=end + 1)

    def _transport(self) -> Iterator[Sweeps | Lookup]:
        """Yield the sweeps that carry left vectors on: up to their taps, from there to the output; and what arrives."""
        rank, end = self.asked.rank, self.config.block_count
        inner = [i for i in self.ends if i < end]
        for spans in (tuple((0, i) for i in inner), tuple((i, end) for i in inner)):
            if spans:
                yield Sweeps("layers: transport", 1, len(spans) * rank, over=Over(spans=spans), copies=2)
        if self.ends:
            yield Lookup("layers: arriving", head=len(self.ends) * rank)

    def _decomposed(self, group: _Group) -> Iterator[Sweeps]:
        """Yield the sweeps of a group: for the values of branches, triplets, their signs and stable ranks."""
        name, maps, over, sweeps, width = group.name, group.maps, group.over, self.sweeps, self.width(self.n)
        values, where = group.branches
        copies = 0 if over.apart else 2
        if values:
            yield Sweeps(f"layers: {name}, branches", 1, values, over=where, copies=copies)
        bases = (Krylov(over.turns * maps, self.n, width, sweeps),)
        yield Sweeps(f"layers: {name}, svd", sweeps, maps * width, over=over, copies=copies, krylov=bases)
        yield Sweeps(f"layers: {name}, signs", 1, maps, over=over, copies=copies)
        # The results of all maps arrive together, and are made wide one after another.
        after = 1 + 2 * 8 / self.item / maps
        exact = self.d <= EXACT_ROWS
        rows = self.d if exact else PROBES
        for step in self.portions(
            f"layers: {name}, stable rank", rows, limit=self.at_once(maps) if exact else rows, up=False, over=over
        ):
            yield replace(step, vectors=maps * step.vectors, after=after, copies=copies)


def _analyze(order: _Order) -> Job:
    asked = order.asked
    more: tuple[Sweeps | Lookup, ...] = (*order.ordinary(), Lookup("contrast", logits=3)) if asked.contrast else ()
    more += order.per_token() if asked.per_token else ()
    more += order.layers() if asked.layers is not None else ()
    branches = Sweeps("branches", 1, 1, over=Over("heads", written=1))
    steps = REBUILD, *order.spectrum(), *order.coherence(), *order.stable_rank(), ATTRIBUTION, branches, *more
    return order.of(Lookup("logits", logits=1), *steps, maps=0 if asked.layers is None else order.together)


def _svd(order: _Order) -> Job:
    per_token = order.per_token() if order.asked.per_token else ()
    return order.of(*order.spectrum(), REBUILD, *order.coherence(), *per_token)


def _layers(order: _Order) -> Job:
    return order.of(REBUILD, *order.layers(), maps=order.together)


def _attribute(order: _Order) -> Job:
    """By token along all live paths; by layer or head where the output is, which needs no vector to travel."""
    n, by, everywhere = order.n, order.asked.by, order.asked.everywhere
    if by != "token":
        over = Over("heads" if by == "head" else "live", n if everywhere else None, n if everywhere else 1)
        shares: tuple[Sweeps, ...] = (Sweeps("attribution", 1, 1, over=over),)
    elif everywhere:
        shares = order.portions("attribution", n + 1, over=Over(read=n, written=n))
    else:
        shares = (ATTRIBUTION,)
    return order.of(REBUILD, Lookup("logits", logits=n if everywhere else 1), *shares)


def _norms(order: _Order) -> Job:
    vectors = order.n * min(order.asked.count, order.d)
    decoding = Lookup("decoding", head=vectors, embedding=vectors)
    return order.of(REBUILD, *order.dense("rows"), *order.portions("columns", vectors, copies=1), decoding)


def _ranks(order: _Order) -> Job:
    """The joint map and those of all positions together, so many vectors at a time; see `analysis.prompts`."""
    n, reached, sweeps, item = order.n, order.reached, order.sweeps, order.item
    width = order.width(n, rank=1)
    limit = min(TOKENS_AT_ONCE * width, order.at_once())
    bases = Krylov(1, n, width, sweeps), Krylov(reached, 1, width, sweeps)
    wide = {"norms": PROBES * n * order.d * (item + 2 * 8)}  # of the joint map
    norms = order.portions("stable ranks", (1 + reached) * PROBES, limit=limit, up=False, held=wide)
    if order.d <= EXACT_ROWS:
        norms = order.portions("stable ranks", order.d, limit=limit, up=False, after=1 + 2 * 8 / item)
    largest = order.portions("svd", (1 + reached) * width, sweeps=sweeps, limit=limit, copies=1, krylov=bases)
    return order.of(*largest, *norms, Lookup("logits", logits=1), REBUILD)


def _compare(order: _Order) -> Job:
    """One of the two files, in the presence of what was kept of the other."""
    n, d, rank, logits = order.n, order.d, order.asked.rank, order.n * order.config.vocabulary
    kept = 2 * logits * order.item + rank * (n + 1) * d * max(4, order.item)
    joint, _ = order.spectrum()
    steps = Lookup("logits", logits=n), joint, REBUILD, ATTRIBUTION
    return order.of(*steps, kept={"portraits": kept})


def _steer(order: _Order) -> Job:
    """The concept's map on a text and on every token that comes, and the texts themselves; see `analysis.steering`."""
    asked, config = order.asked, order.config
    text, later = asked.text or order.n, asked.max_tokens - 1
    capacity, pushed = text + asked.max_tokens, asked.strengths * (1 + asked.control)
    layer = asked.layer or default_layer(config.block_count)
    if layer > config.block_count:
        raise PlanError(f"--layer {layer} is out of range; this model has layers 1 to {config.block_count}")
    if capacity > config.context_length:
        raise PlanError(f"a text of {capacity} tokens cannot run; the model's context is {config.context_length}")
    concept = Over(spans=((0, layer),))
    # Keys and values of every block, and of the one that is being extended twice.
    cache = (config.block_count + 1) * 2 * config.head_count_kv * config.head_size * capacity * order.item
    held = {"cache": cache}
    steps: list[Sweeps | Lookup] = [*order.portions("images of the text", text, over=concept, copies=1)]
    if asked.method == "equation16":
        steps.append(Sweeps("offset", 1, 3, over=concept))
    steps.append(Sweeps("texts", 1 + pushed, 1, over=Over("all", text), held=held))
    if later:
        steps.append(Sweeps("tokens", (1 + pushed) * later, 1, over=Over("all", capacity, 1), held=held))
        if pushed:
            steps.append(Sweeps("images of tokens", pushed * later, 1, over=concept, copies=1, held=held))
    steps.append(Lookup("logits", count=1 + (1 + pushed) * asked.max_tokens, logits=1))
    return order.of(*steps, reused="all")


def _predict(order: _Order) -> Job:
    every = (Lookup("all logits", logits=order.n),) if order.asked.everywhere else ()
    return order.of(Lookup("logits", logits=1), *every, tapes=False)


def _verify(order: _Order) -> Job:
    """A trace without tapes, beside what llama.cpp computed; the memory of its own process is not counted."""
    n, config = order.n, order.config
    tensors = n * order.d * (3 * config.block_count + 1)  # of each block the two branches and the stream; the output
    reference = {"llama.cpp's tensors": 4 * (tensors + n * config.vocabulary)}
    return order.of(Lookup("all logits", logits=n), tapes=False, kept=reference)


# Commands that can be planned, the main one first.
JOBS: dict[str, Callable[[_Order], Job]] = {
    "analyze": _analyze,
    "svd": _svd,
    "layers": _layers,
    "jacobian": lambda order: order.of(*order.dense("rows"), REBUILD),
    "norms": _norms,
    "attribute": _attribute,
    "contrast": lambda order: order.of(REBUILD, *order.ordinary(), Lookup("logits", logits=3)),
    "ranks": _ranks,
    "compare": _compare,
    "steer": _steer,
    "predict": _predict,
    "verify": _verify,
}
