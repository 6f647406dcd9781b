"""The work of each command as data: sweeps, vectors per sweep, and buffers.

`ggjac.planner` turns these into bytes, FLOP and seconds. Everything here follows from a model's sizes and a command's
options; no file is opened and nothing is computed.

To plan a new command, add a row to `JOBS`: the command's name, and a function that makes its `Work` from a `_Builder`
(the model's sizes, the prompt's length and the command's options). As an example, a command that decomposes the
Jacobian, decodes the singular vectors, and then carries one vector back from the middle of the network to its input:

    def example(builder):
        rank, (width, sweeps) = builder.request.rank, builder.block(builder.n)
        bases = KrylovBases(maps=1, size=builder.n * builder.d, width=width, sweeps=sweeps)
        half = Region(spans=((0, builder.config.block_count // 2),))
        return builder.work(
            Sweeps("svd", sweeps, width, bases=(bases,)),
            Lookup("decoding", head=rank, embedding=rank * builder.n),
            Sweeps("first half", 1, 1, up=False, region=half),
            buffers={"norms": 8 * rank * builder.d},
            fewer_vectors="lower --rank, or use fewer tokens",
        )

Read it as follows; the classes below describe every field.

- Steps stand in the order in which the command takes them. The trace comes first and is not a step.
- `Sweeps(what, count, vectors)` is `count` sweeps over the blocks, each with `vectors` stacked vectors; `what` is their
  label in the plan. Vectors that the command stacks together are one step; `builder.in_chunks` splits a stack that is
  too large for one sweep, as the command itself must.
- `bases`: the sweeps build Krylov bases, so the plan adds their memory and their orthogonalisation.
- `region`: the blocks, tensors and positions that the sweeps visit; by default all that a Jacobian uses. Here it is one
  map, from block 0 to before the middle one.
- `up=False`: vectors only travel from the output to the input (`rmatmat`), which may take less memory.
- `Lookup`: a pass over the vocabulary, here to decode `rank` vectors with the head, and one at each of the `n`
  positions of `rank` others to the nearest input embeddings.
- `buffers`: bytes that stay allocated from step to step, by the name that the table of memory shows. Each name has an
  entry in `ggjac.planner.memory.PARTS`.
- `fewer_vectors`: advice for the user if memory is short, naming options of this command.

`tests/test_work.py` counts what a command really does and compares it with its row: list the command's options there.
"""

import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

from ggjac.checks import (
    Place,
    computed,
    depths,
    excluded_positions,
    has_experts,
    has_parts,
    input_positions,
    key_positions,
    output_positions,
    place,
)
from ggjac.config import Layer, ModelConfig
from ggjac.config.mixers import MIXERS
from ggjac.planner.forward import runs_at_once
from ggjac.sizes import (
    ABLATIONS,
    CHUNK_BYTES,
    DRAWS,
    EDGE_FLOATS,
    EXACT_ROWS,
    FINAL_SWEEPS,
    ITEM_BYTES,
    KEYS,
    KINDS,
    MAPS,
    PROBES,
    RANDOM_SUBSPACES,
    ROUGH_FROM,
    ROUGH_SWEEPS,
    SLAB,
    SLICE,
    SPARE,
    TOKENS_AT_ONCE,
    WAITING_BYTES,
    Kind,
    chunk_floats,
    default_layer,
)
from ggjac.ways import (
    PRODUCTS,
    Block,
    Task,
    block,
    decomposition,
    edge_passes,
    edge_readers,
    mixed_width,
    share_rows,
    take_matrices,
    takes_matrix,
)

# In bfloat16, whose rounding error keeps residuals above 1e-3: sweeps until they no longer fall.
FLOOR_SWEEPS = {"bfloat16": 11}


class PlanError(ValueError):
    """A plan cannot be made: an impossible prompt length, rank or dtype."""


class Region(NamedTuple):
    """The part of the network that a sweep visits; by default that of a sweep of the Jacobian.

    Attributes:
        tensors: `"live"`: those that products use; `"heads"`: the same, with the output projection twice more; `"all"`:
            those of the forward pass; `"continued"`: the same, for positions that follow others, whose keys, values and
            states are kept; `"scores"`: those of which queries and keys are made; `"reads"`: of values and outputs. For
            edges, `"written"` and `"edges"`: as `"live"`, up and down, and `"outputs"`: output projections alone.
        read: positions read; None: those up to the output's.
        written: positions written; None: the positions read, but only one in a block where all maps end.
        spans: for each map in the stack, its first block and the one after its last; empty: one map over all blocks.
            All maps have equally many vectors.
        sequential: sweep the maps one after another instead of together, each with the step's full stack of vectors.
        rows: cotangents that output projections alone are given; their memory is a buffer, as that of all edges is.
    """

    tensors: Literal["live", "heads", "all", "continued", "scores", "reads", "written", "edges", "outputs"] = "live"
    read: int | None = None
    written: int | None = None
    spans: tuple[tuple[int, int], ...] = ()
    sequential: bool = False
    rows: int = 1

    @property
    def rounds(self) -> int:
        """Sweeps that one pass over all maps takes."""
        return len(self.spans) if self.sequential else 1

    def ends(self, block: int, blocks: int) -> list[int]:
        """Return where the maps that pass through a block end, one of `blocks` blocks."""
        return [last for first, last in self.spans or ((0, blocks),) if first <= block < last]

    def ends_in(self, block: int, blocks: int) -> bool:
        """Return whether all maps that pass through a block end in it, so that it writes only the last position."""
        return self.written is None and set(self.ends(block, blocks)) == {block + 1}

    def inputs(self, config: ModelConfig) -> list[int]:
        """Return the elements that each map reads at a position: those of all residual streams where it starts."""
        return [config.width(first) for first, _ in self.spans] or [config.d]


JACOBIAN = Region()


class KrylovBases(NamedTuple):
    """Krylov bases of `maps` decompositions; each grows by `width` vectors per sweep, on one of its sides.

    Attributes:
        maps: maps decomposed, each with bases of its own.
        size: elements of a vector on the input side, of all positions and residual streams; one on the output side is
            as wide as one stream.
        width: vectors added to each map's bases in every sweep.
        sweeps: sweeps of the whole decomposition, down and up in turn.
    """

    maps: int
    size: int
    width: int
    sweeps: int


@dataclass(frozen=True)
class Sweeps:
    """`count` sweeps over the blocks, each with `vectors` stacked vectors; `what` labels them.

    Attributes:
        up: some of them go up the layers (`matmat`), which may take more memory than going down.
        region: the part of the network they visit.
        result_floats: floats of working memory for each float of the complete result, for example for copies in
            float64.
        stream_copies: copies of each vector's residual stream, made where maps join or leave the stack, or kept by the
            caller.
        bases: Krylov bases that the sweeps build.
        buffers: bytes of other memory in use during the sweeps, by part.
        rough: whether matrices, and the vectors that meet them, are rounded to bfloat16.
        forward_mode: whether derivatives are carried along by torch's forward mode.
    """

    what: str
    count: int
    vectors: int
    up: bool = True
    region: Region = JACOBIAN
    result_floats: float = 0.0
    stream_copies: int = 0
    bases: tuple[KrylovBases, ...] = ()
    buffers: Mapping[str, int] = field(default_factory=dict)
    rough: bool = False
    forward_mode: bool = False


@dataclass(frozen=True)
class Lookup:
    """`count` passes over the vocabulary; `what` labels them.

    Attributes:
        logits: vectors whose logits are all kept.
        head: vectors decoded by the head: only the top tokens are kept.
        embedding: vectors decoded to the nearest input embeddings.
    """

    what: str
    count: int = 1
    logits: int = 0
    head: int = 0
    embedding: int = 0


@dataclass(frozen=True)
class Decomposition:
    """`count` singular value decompositions of dense matrices, one after another; `what` labels them.

    Attributes:
        rank: triplets of each.
        rows, columns: of each matrix, at least as many columns as rows.
        item: bytes of an element.
        buffers: bytes of other memory in use meanwhile, by part.
    """

    what: str
    count: int
    rank: int
    rows: int
    columns: int
    item: int
    buffers: Mapping[str, int] = field(default_factory=dict)

    @property
    def floats(self) -> int:
        """Floats of one: its factors, and LAPACK's own work; of a wide matrix, also of its QR (docs/benchmarks.md).

        An iteration takes less, and LAPACK what it leaves.
        """
        return 8 * self.rows**2 + self.columns * self.rows if self.columns > self.rows else 7 * self.rows**2

    @property
    def flop(self) -> float:
        """FLOP of each, as many as of products that take as long."""
        return decomposition(self.rank, self.rows, self.columns, self.item).seconds * PRODUCTS


Step = Sweeps | Lookup | Decomposition


@dataclass(frozen=True)
class Work:
    """The work of a command after the trace, and the buffers it keeps.

    Attributes:
        command: its name.
        n: tokens of the trace.
        input_positions: positions that the output depends on: those up to its own.
        dtype: of all computation.
        steps: in order.
        tapes: whether the trace records tapes, the frozen part of every block.
        tapes_to_disk: whether the tapes may be kept in a folder instead of memory.
        fewer_vectors: advice on the options that make stacks of vectors smaller.
        fewer_decoded: the same for decoding vectors; empty for the same advice.
        chunk_bytes: working memory of a chunk of dense rows, in bytes.
        reused: which tensors later passes use again: `"live"` ones, or those of the forward pass, `"all"`.
        buffers: bytes of memory in use from step to step, by part.
        prompts: times that all of it is done.
        at_once: prompts that are done side by side, so that weights are read once for all of them.
        preparations: times at most that layers kept dense are dequantized: once for all prompts, but in a mixture each
            prompt may use other experts.
    """

    command: str
    n: int
    input_positions: int
    dtype: str
    steps: tuple[Step, ...] = ()
    tapes: bool = True
    tapes_to_disk: bool = True
    fewer_vectors: str = "use fewer tokens"
    fewer_decoded: str = ""
    chunk_bytes: int = CHUNK_BYTES
    reused: Literal["live", "all"] = "live"
    buffers: Mapping[str, int] = field(default_factory=dict)
    prompts: int = 1
    at_once: int = 1
    preparations: int = 1

    @property
    def rounds(self) -> int:
        """Times that weights are read for prompts side by side."""
        return math.ceil(self.prompts / self.at_once)

    @property
    def sweeps(self) -> tuple[Sweeps, ...]:
        """The steps over the blocks."""
        return tuple(step for step in self.steps if isinstance(step, Sweeps))

    @property
    def lookups(self) -> tuple[Lookup, ...]:
        """The steps over the vocabulary."""
        return tuple(step for step in self.steps if isinstance(step, Lookup))

    @property
    def decompositions(self) -> tuple[Decomposition, ...]:
        """The steps of LAPACK."""
        return tuple(step for step in self.steps if isinstance(step, Decomposition))

    @property
    def forward_mode(self) -> bool:
        """Whether a step uses torch's forward mode."""
        return any(step.forward_mode for step in self.sweeps)

    @property
    def vectors(self) -> int:
        """Largest number of stacked vectors in a sweep."""
        return max((step.vectors for step in self.sweeps), default=0)

    @property
    def width(self) -> int:
        """Largest number of vectors that a sweep adds to Krylov bases; 0 if nothing is decomposed."""
        return max((sum(b.maps * b.width for b in step.bases) // step.region.rounds for step in self.sweeps), default=0)


@dataclass(frozen=True)
class Request:
    """The options of a command that decide its work; the defaults are the commands' own, but for those in `DEFAULTS`.

    Attributes:
        rank: number of singular triplets; of `reach`, of vectors to step along, and of random directions.
        position: of the output, negative from the end.
        positions: several outputs instead, as numbers or as a text such as `0,10-20,-1` or `all` (`attribute`).
        everywhere: logits of all positions, too (`predict`).
        sweeps: of a decomposition, which are not known before it runs; None: the expected number.
        chunk_bytes: working memory of a chunk of dense rows; None: the default.
        layers, maps, kinds, transport: of maps inside the network, as the options of `layers` define them; `layers` is
            None for all of them, but in `analyze` for none.
        search_dtype: of decompositions: one of `SEARCHES`, of which `"auto"` has no rough search, but room for one.
        contrast, per_token: parts of `analyze` and `svd`.
        input_position: input positions whose own maps `per_token` is about, named as `positions` are; None for all.
        calibrate: tokens of each prompt whose vectors are compared with (`svd`, `analyze`).
        exclude: input positions that are folded into the offset, likewise; None for none.
        by: of `attribute`.
        mean: over the maps of prompts (`jacobian`).
        count: columns and rows at each position (`norms`).
        text: tokens of the text that is steered, where `n` are the concept's (`steer`); None: also `n`.
        other: tokens of the other prompt (`compare`); None: also `n`, of the other file.
        reads: blocks of heads that are split by what they read (`attribute`).
        head, keys, parts: of `attend`, as `layer`: a head (None: the one with the largest share), keys named as
            `positions` are, and what their scores are split by.
        max_tokens: tokens to generate (`steer`, where None are 12; `attribute`, where None are none).
        answer: of `attribute`, the token ids of a given answer, which follow the `n` of the prompt.
        along, at, layer: of `attribute`, a direction and its place, as `ggjac.checks.place` takes them.
        method, layer, control: of `steer`; `other_map` if the control is the map of another prompt.
        strengths: number of strengths (`steer`).
        random: random directions for each of them, where `method` is `"add"` or `"remove"`.
        singular: `"left"` or `"right"`, the side of the singular vector, number `rank`, that is added or removed.
        prompts: number of prompts, the longest of `n` tokens (`ranks`).
        at_once: how many of them are side by side; None: as many as `ggjac.planner.fitting` finds useful.
        ablate: what takes the place of tokens that are left out (`attribute`, `reach`); None or `"none"`: none are.
        steps: on every path of edits (`reach`), of which there are `swaps`, one `toward` another prompt, one along a
            `direction` of the stream after `layer` blocks with `rank` random ones beside it, and two for each of `rank`
            vectors.
        saved: checkpoints are written as well as the result; `analyze` always keeps them.
    """

    rank: int = 8
    position: int = -1
    positions: str | Sequence[int] | None = None
    everywhere: bool = False
    sweeps: int | None = None
    chunk_bytes: int | None = None
    layers: str | Sequence[int] | None = None
    maps: Sequence[str] = MAPS
    kinds: Sequence[str] = KINDS
    transport: bool = False
    search_dtype: str = "auto"
    contrast: bool = False
    per_token: bool = False
    input_position: str | Sequence[int] | None = None
    exclude: str | Sequence[int] | None = None
    calibrate: Sequence[int] = ()
    by: Literal["token", "layer", "head", "expert", "edge"] = "token"
    mean: bool = False
    count: int = 3
    reads: Sequence[int] = ()
    head: int | None = None
    keys: str | Sequence[int] | None = None
    parts: Literal["block", "token"] = "block"
    text: int | None = None
    other: int | None = None
    method: str = "equation16"
    along: str | None = None
    at: Place | None = None
    layer: int | None = None
    strengths: int = 1
    random: int = 16
    singular: str = ""
    max_tokens: int | None = None
    answer: Sequence[int] | None = None
    control: bool = True
    other_map: bool = False
    prompts: int = 1
    at_once: int | None = None
    ablate: str | None = None
    steps: int = 7
    swaps: int = 0
    toward: bool = False
    direction: bool = False
    saved: bool = False


DEFAULTS: Mapping[str, Mapping[str, Any]] = {"reach": {"rank": 3, "ablate": "mean"}}


def command_work(command: str, config: ModelConfig, n: int, dtype: str, **options: Any) -> Work:
    """Return the work of a command, one of `JOBS`, on a prompt of `n` tokens; `options` are fields of `Request`.

    Raises:
        PlanError: the command has no row, or the dtype, the prompt's length or an option is out of range.
    """
    if command not in JOBS:
        raise PlanError(f"{command!r} is not planned; planned: {', '.join(JOBS)}")
    if dtype not in ITEM_BYTES:
        raise PlanError(f"dtype {dtype!r} is unknown; known: {', '.join(ITEM_BYTES)}")
    request = Request(**{**DEFAULTS.get(command, {}), **options})
    if not 1 <= n <= config.longest:
        raise PlanError(f"a prompt of {n} tokens cannot run; this model takes from 1 to {config.longest}")
    if not -n <= request.position < n:
        raise PlanError(f"position={request.position} is out of range; the prompt has positions 0 to {n - 1}")
    if not 1 <= request.rank <= config.d:
        raise PlanError(f"rank={request.rank} is out of range; this model's Jacobian has {config.d} singular values")
    builder = _Builder(config, n, dtype, request)
    if request.input_position is not None and not request.per_token:
        which = f"input_position={request.input_position} is about maps that are not asked for"
        raise PlanError(f"{which}; ask for each position's own map")
    try:
        _ = builder.outputs, builder.own_maps, builder.depths
    except ValueError as error:
        raise PlanError(str(error)) from error
    work = JOBS[command](builder)
    if request.exclude is not None:  # vectors going up are copied, to hold the prompt's own at these positions
        work = replace(work, steps=tuple(map(_holding, work.steps)))
    if request.saved or command == "analyze":
        waiting = min(WAITING_BYTES, builder.product_bytes(work.sweeps))
        work = replace(work, buffers={**work.buffers, "checkpoint": waiting})
    work = replace(work, prompts=request.prompts, at_once=request.at_once or 1)
    return replace(
        work,
        command=command,
        chunk_bytes=builder.chunk_bytes,
        tapes_to_disk=work.tapes_to_disk and request.prompts == 1,
        preparations=work.rounds if config.expert_count else 1,
    )


def _holding(step: Step) -> Step:
    """Return a step whose vectors going up are copied first."""
    return replace(step, stream_copies=step.stream_copies + 1) if isinstance(step, Sweeps) and step.up else step


def all_rows(config: ModelConfig, n: int, dtype: str) -> int:
    """Return the `chunk_bytes` at which one sweep computes all rows of the dense Jacobian."""
    return config.d * chunk_floats(n, config.d, config.hidden_units) * ITEM_BYTES[dtype]


FEWER_TRIPLETS = "lower --rank, or use fewer tokens"
FEWER_LAYERS = "ask for fewer --layers"

RECONSTRUCTION = Sweeps("reconstruction", 1, 3, stream_copies=1)
ATTRIBUTION = Sweeps("attribution", 1, 1, up=False)


class _MapBatch(NamedTuple):
    """Maps inside the network that are decomposed by the same sweeps, or one block's maps after another's.

    Attributes:
        name: one of `ggjac.sizes.MAPS`.
        maps: maps swept together.
        region: the part of the network they visit.
        branches: of the maps swept together, those of a branch: its output at the prompt must be computed.
        branch_region: the part of the network that these visit for it.
    """

    name: str
    maps: int
    region: Region
    branches: int
    branch_region: Region


@dataclass(frozen=True)
class _Builder:
    """A command's options on one model and prompt, and the steps that several commands share."""

    config: ModelConfig
    n: int
    dtype: str
    request: Request

    @property
    def d(self) -> int:
        """Embedding length."""
        return self.config.d

    @property
    def item(self) -> int:
        """Bytes of a float."""
        return ITEM_BYTES[self.dtype]

    @property
    def input_positions(self) -> int:
        """Positions that the output depends on, the last one of several."""
        return self.outputs[-1] + 1

    @property
    def outputs(self) -> list[int]:
        """Output positions, ascending."""
        request = self.request
        return output_positions([request.position] if request.positions is None else request.positions, self.n)

    @property
    def own_maps(self) -> int:
        """Number of input positions whose own maps are decomposed."""
        excluded = excluded_positions(self.request.exclude, self.input_positions)
        return len(input_positions(self.request.input_position, self.input_positions, excluded))

    @property
    def chunk_bytes(self) -> int:
        """Working memory of a chunk of dense rows, in bytes."""
        return CHUNK_BYTES if self.request.chunk_bytes is None else self.request.chunk_bytes

    def work(self, *steps: Step, **fields: Any) -> Work:
        """Return the work of some steps; `fields` are other fields of `Work`."""
        return Work("", self.n, self.input_positions, self.dtype, steps, **fields)

    def product_bytes(self, steps: tuple[Sweeps, ...]) -> int:
        """Return the bytes of the results of all sweeps; those of decompositions alternate, down first."""
        floats = 0
        for step in steps:
            down = 0 if step.up else step.count
            if step.bases:
                sweeps = step.bases[0].sweeps
                down = step.count // sweeps * math.ceil(sweeps / 2)
            # Down gives [vectors, n, inputs], up gives [vectors, d].
            inputs, vectors = step.region.inputs(self.config), step.region.rounds * step.vectors
            floats += vectors * (down * self.n * sum(inputs) // len(inputs) + (step.count - down) * self.d)
        return floats * self.item

    def rows_at_once(self, maps: int = 1) -> int:
        """Return the dense rows, of each of several maps, in one chunk: `DetachedJacobian.rows_at_once`."""
        return max(1, self.chunk_bytes // (chunk_floats(self.n, self.d, self.config.hidden_units) * self.item * maps))

    def in_chunks(
        self, what: str, total: int, *, sweeps: int = 1, limit: int | None = None, **fields: Any
    ) -> tuple[Sweeps, ...]:
        """Return sweeps for `total` vectors: full chunks of at most `limit` vectors, and the rest.

        `limit` is by default that of dense rows; each chunk takes `sweeps` sweeps. `fields` are other fields of
        `Sweeps`; `bases` are those of all vectors and so counted once.
        """
        chunk = min(total, limit or self.rows_at_once())
        full = Sweeps(what, sweeps * (total // chunk), chunk, **fields)
        if not total % chunk:
            return (full,)
        counted = tuple(bases._replace(maps=0) for bases in full.bases)
        return full, replace(full, count=sweeps, vectors=total % chunk, bases=counted)

    def dense(self, what: str) -> tuple[Sweeps, ...]:
        """Return the sweeps for all dense rows; `SLICE` of them at a time are copied to float64."""
        rows = min(self.d, self.rows_at_once())
        copied = min(SLICE, rows) / rows * 2 * 8 / self.item
        return self.in_chunks(what, self.d, up=False, result_floats=1 + copied)

    def decomposed(self, rank: int, *tasks: tuple[str, int, int]) -> tuple[Step, ...]:
        """Return the sweeps for a matrix that is kept, and triplets of parts of it: labels, numbers, positions.

        Its chunks of rows do not depend on the budget, as in `DetachedJacobian.matrix`.
        """
        limit = max(1, CHUNK_BYTES // (chunk_floats(self.n, self.d, self.config.hidden_units) * self.item))
        rows = self.in_chunks("all rows", self.d, limit=limit, up=False, result_floats=1.0)
        return *rows, *(Decomposition(what, count, rank, self.d, n * self.d, self.item) for what, count, n in tasks)

    def searched(self, what: str, rank: int, found: Block, *maps: tuple[int, int], **fields: Any) -> Iterator[Sweeps]:
        """Yield the sweeps of decompositions that advance together, a rough search first if one is asked for.

        Args:
            what: label.
            rank: triplets of each map.
            found: vectors of each map, and sweeps.
            maps: how many of them have how many elements on their input side.
            fields: of `in_chunks`, or other ones of `Sweeps`.
        """
        rough, searches = self.request.search_dtype == "bfloat16" and self.item >= 4, [(what, *found, False)]
        if rough:
            few = min(found.width, rank + SPARE)
            searches = [(f"{what}, rough", found.width, ROUGH_SWEEPS, True), (what, few, FINAL_SWEEPS, False)]
        large = self.dtype == "float32" and self.d >= ROUGH_FROM and self.request.search_dtype == "auto"
        for label, width, sweeps, rounded in searches:
            bases = tuple(KrylovBases(count, size, width, sweeps) for count, size in maps)
            vectors = width * sum(count for count, _ in maps)
            for step in self.in_chunks(label, vectors, sweeps=sweeps, bases=bases, rough=rounded, **fields):
                floats = step.vectors * self.input_positions * max(self.d, SLAB)
                yield replace(step, buffers={"rounded vectors": 2 * floats} if rounded or large else {})

    def block(self, positions: int, rank: int | None = None) -> Block:
        """Return the stacked vectors and sweeps of a decomposition of one map with `positions` on its input side."""
        found = block(self.config, rank or self.request.rank, self.n, positions * self.d)
        return found._replace(sweeps=self.request.sweeps or FLOOR_SWEEPS.get(self.dtype, found.sweeps))

    def takes_matrix(self, task: Task) -> bool:
        """Return whether triplets come from the dense matrix, which is kept: as `DetachedJacobian.matrix` decides."""
        return takes_matrix(self.config, task, self.n, self.item)

    @property
    def tokens_by_matrix(self) -> bool:
        """Whether the triplets of each position's own map do, which are computed before those of the joint map."""
        tokens = Task(self.request.rank, joint=0, tokens=self.own_maps)
        return self.request.per_token and self.takes_matrix(tokens)

    @property
    def by_matrix(self) -> bool:
        """Whether the triplets of the joint map do."""
        return self.tokens_by_matrix or self.takes_matrix(Task(self.request.rank, joint=self.views))

    @property
    def views(self) -> int:
        """Number of joint maps: where positions are excluded, with that of all positions two."""
        return 1 + bool(excluded_positions(self.request.exclude, self.input_positions))

    @property
    def matrix(self) -> dict[str, int]:
        """The bytes of the matrix that is kept, by the name of their part."""
        return {"matrix": self.n * self.d**2 * self.item} if self.by_matrix else {}

    def triplets(self) -> tuple[Step, ...]:
        """Return the decomposition and decoding of each position's map, if that was requested, and of the joint map."""
        tokens: tuple[Step, ...] = self.per_token() if self.request.per_token else ()
        return *tokens, *self.spectrum()

    def spectrum(self) -> tuple[Step, ...]:
        """Return the decomposition of the joint maps, or of the matrix, and the decoding of their vectors."""
        rank, views = self.request.rank, self.views
        joint = ("svd by matrix", views, self.n)
        if self.tokens_by_matrix:
            found = self.decomposed(rank, joint)[-1:]
        elif self.by_matrix:
            found = self.decomposed(rank, joint)
        else:
            found = tuple(self.searched("svd", rank, self.block(self.n), (views, self.n * self.d), limit=sys.maxsize))
        if views > 1:  # a part of the matrix is copied, and the whole map has signs of its own
            copied = {"vectors": self.n * self.d**2 * self.item}
            found = tuple(replace(s, buffers=copied) if isinstance(s, Decomposition) else s for s in found)
            found = Sweeps("svd: signs of the whole map", 1, 3, stream_copies=1), *found
        return *found, Lookup("decoding", head=views * rank, embedding=views * rank * self.n)

    def calibration(self) -> Iterator[Step]:
        """Yield the forward passes of other prompts, the decomposition of their joint maps, and the decoding.

        Each counts as long as the longest.
        """
        request = self.request
        if not request.calibrate:
            return
        count, n = len(request.calibrate), max(request.calibrate)
        alone = replace(request, position=-1, per_token=False, calibrate=(), exclude=None)
        own = replace(self, n=n, request=alone)
        yield Sweeps("calibration: forward passes", count, 1, region=Region("all", n))
        for step in own.spectrum()[:-1]:
            many = replace(step, what=f"calibration: {step.what}", count=step.count * count)
            yield replace(many, region=Region(read=n)) if isinstance(many, Sweeps) else many
        yield Sweeps("calibration: signs", count, 3, region=Region(read=n), stream_copies=1)
        yield Lookup("calibration: decoding", head=(count + RANDOM_SUBSPACES) * request.rank)

    def ordinary(self) -> tuple[Sweeps, ...]:
        """Return a product with the ordinary Jacobian: forward mode carries the values along with one tangent.

        The last block is computed once more for its values, since no tape holds its output.
        """
        end = self.config.block_count
        last = Region("all", spans=((end - 1, end),))
        pushed = Sweeps("ordinary", 1, 2, region=Region("all"), forward_mode=True)
        return pushed, Sweeps("ordinary: last block", 1, 1, region=last)

    def per_token(self) -> tuple[Step, ...]:
        """Return the decomposition of each position's own map; vectors going up are first put at their position."""
        maps, rank = self.own_maps, self.request.rank
        found: tuple[Step, ...] = (
            *self.searched("svd per token", rank, self.block(1), (maps, self.d), stream_copies=1),
            *self.in_chunks("svd per token: signs", maps, stream_copies=1),
        )
        if self.tokens_by_matrix:
            found = self.decomposed(rank, ("svd per token by matrix", maps, 1))
        return *found, Lookup("decoding per token", head=maps * rank, embedding=maps * rank)

    def stable_rank(self) -> tuple[Sweeps, ...]:
        """Return the Frobenius norm of the joint map: from all rows or from probes, all copied to float64 at once."""
        result_floats = 1 + 2 * 8 / self.item
        if self.by_matrix:
            return ()
        if self.d <= EXACT_ROWS:
            return tuple(replace(step, result_floats=result_floats) for step in self.dense("stable rank"))
        return (Sweeps("stable rank", 1, PROBES, up=False, result_floats=result_floats),)

    @property
    def depths(self) -> list[int]:
        """Depths at which maps inside the network begin or end, in blocks applied."""
        return depths("all" if self.request.layers is None else self.request.layers, self.config.block_count)

    @property
    def ends(self) -> list[int]:
        """Depths at which some map ends: all but that before the first block."""
        return [i for i in self.depths if i > 0]

    @property
    def batches(self) -> list[_MapBatch]:
        """The maps inside the network in the batches in which `analysis.layers` sweeps them."""
        end, layers = self.config.block_count, self.config.layers
        taps = [(kind, i) for i in self.ends for kind in layers[i - 1].taps if kind in self.request.kinds]
        branches = tuple((i - 1, i) for kind, i in taps if kind != "layer")
        inner = tuple((i, end) for i in self.depths if i < end)
        cumulative = Region(spans=tuple((0, i) for _, i in taps))
        batches = [
            _MapBatch("cumulative", len(taps), cumulative, len(branches), Region(spans=branches)),
            *self._blockwise(taps),
            _MapBatch("to_end", len(inner), Region(spans=inner), 0, JACOBIAN),
        ]
        return [batch for batch in batches if batch.name in self.request.maps and batch.maps]

    def _blockwise(self, taps: Sequence[tuple[Kind, int]]) -> Iterator[_MapBatch]:
        """Yield the maps of single blocks; blocks of as many maps are counted together."""
        alike: dict[tuple[int, int], list[int]] = {}
        for i in self.ends:
            kinds = [kind for kind, index in taps if index == i]
            alike.setdefault((len(kinds), sum(kind != "layer" for kind in kinds)), []).append(i)
        for (maps, branches), ends in alike.items():
            single = Region(spans=tuple((i - 1, i) for i in ends), sequential=True)
            yield _MapBatch("blockwise", maps, single, branches, single)

    def layers(self) -> tuple[Step, ...]:
        """Return the decomposition of maps inside the network, as of the whole Jacobian, and the logit lens."""
        request, rank, end = self.request, self.request.rank, self.config.block_count
        steps: list[Step] = [step for batch in self.batches for step in self._decomposition(batch)]
        total = sum(batch.maps * batch.region.rounds for batch in self.batches)
        if total:
            steps.append(Lookup("layers: decoding", head=total * rank))
        if request.transport and "cumulative" in request.maps and "layer" in request.kinds:
            steps += self._transport()
        return *steps, Lookup("readout", logits=end + 1)

    def _transport(self) -> Iterator[Step]:
        """Yield the sweeps that carry left singular vectors to their depth and on to the output, and the decoding."""
        rank, end = self.request.rank, self.config.block_count
        inner = [i for i in self.ends if i < end]
        for spans in (tuple((0, i) for i in inner), tuple((i, end) for i in inner)):
            if spans:
                region = Region(spans=spans)
                yield Sweeps("layers: transport", 1, len(spans) * rank, region=region, stream_copies=2)
        if self.ends:
            yield Lookup("layers: arriving", head=len(self.ends) * rank)

    def _decomposition(self, batch: _MapBatch) -> Iterator[Step]:
        """Yield the sweeps of a batch: for outputs of branches, triplets, their signs and stable ranks."""
        name, maps, region, rank = batch.name, batch.maps, batch.region, self.request.rank
        copies = 0 if region.sequential else 2
        if batch.branches:
            where = batch.branch_region
            yield Sweeps(f"layers: {name}, branches", 1, batch.branches, region=where, stream_copies=copies)
        if take_matrices(self.config, self.request.rank, self.n, self.item, region.spans):
            yield from self._matrices(name, region.spans)
            return
        alike, each = Counter(region.inputs(self.config)), maps * region.rounds // len(region.spans)
        for step in self.searched(f"layers: {name}, svd", rank, self.block(self.n), (maps, 0), limit=sys.maxsize):
            own = step.bases[0]
            bases = tuple(own._replace(maps=count * each, size=self.n * wide) for wide, count in alike.items())
            yield replace(step, region=region, stream_copies=copies, bases=bases)
        yield Sweeps(f"layers: {name}, signs", 1, maps, region=region, stream_copies=copies)
        # The results of all maps arrive together, and are copied to float64 one after another.
        result_floats = 1 + 2 * 8 / self.item / maps
        exact = self.d <= EXACT_ROWS
        rows = self.d if exact else PROBES
        limit = self.rows_at_once(maps) if exact else rows
        for step in self.in_chunks(f"layers: {name}, stable rank", rows, limit=limit, up=False, region=region):
            yield replace(step, vectors=maps * step.vectors, result_floats=result_floats, stream_copies=copies)

    def _matrices(self, name: str, spans: Sequence[tuple[int, int]]) -> Iterator[Step]:
        """Yield the pass that makes the matrices of maps, all columns or all rows; each is decomposed by itself."""
        first, last = min(start for start, _ in spans), max(stop for _, stop in spans)
        up, inputs = not share_rows(spans), Region(spans=tuple(spans)).inputs(self.config)
        wide = self.config.width(last) if up else max(inputs)  # of a vector where a matrix is read
        vectors, region = self.input_positions * self.d if up else self.d, Region(spans=((first, last),))
        yield Sweeps(f"layers: {name}, matrices", 1, vectors, up=up, region=region)
        # Rows are the matrix; beside columns there is one, and what a branch adds. A checkpoint has a block's inputs.
        floats = vectors * self.input_positions * ((1 + self.request.saved) * wide + up * self.d)
        buffers = {"vectors": (floats + up * self.n * self.d**2) * self.item}
        for size, count in Counter(inputs).items():
            sizes = self.request.rank, self.d, self.n * size, self.item
            yield Decomposition(f"layers: {name}, svd by matrix", count, *sizes, buffers)


def _analyze(builder: _Builder) -> Work:
    request = builder.request
    more: tuple[Step, ...] = ()
    if request.contrast:
        more += *builder.ordinary(), Lookup("contrast", logits=3)
    if request.layers is not None:
        more += builder.layers()
    first: list[Step] = [Lookup("logits", logits=1), RECONSTRUCTION]
    branches = Sweeps("branches", 1, 1, region=Region("heads", written=1))
    last: list[Step] = [*builder.stable_rank(), ATTRIBUTION, branches, *more]
    layered = request.layers is not None and builder.batches
    return _calibrated(builder, *first, *builder.triplets(), *last, advice=FEWER_LAYERS if layered else FEWER_TRIPLETS)


def _svd(builder: _Builder) -> Work:
    return _calibrated(builder, *builder.triplets(), RECONSTRUCTION, advice=FEWER_TRIPLETS)


def _calibrated(builder: _Builder, *steps: Step, advice: str) -> Work:
    """Return steps after those of the prompts to calibrate with, the longest of which may be longer than the prompt."""
    longest = max((builder.n, *builder.request.calibrate))
    matrices = [builder.matrix, replace(builder, n=longest).matrix]
    largest = max(matrices, key=lambda part: sum(part.values()))
    work = builder.work(*builder.calibration(), *steps, buffers=largest, fewer_vectors=advice)
    return replace(work, n=longest)


def _layers(builder: _Builder) -> Work:
    advice = {"fewer_vectors": FEWER_LAYERS} if builder.batches else {}
    return builder.work(RECONSTRUCTION, *builder.layers(), **advice)


def _attribute(builder: _Builder) -> Work:
    """By token: along all live paths. By layer or head: at the output's position, where no vector has to travel.

    Where the head reads each branch in a way of its own, all these vectors are kept, and those of the ends of blocks
    that add inputs of their own there.
    """
    request = builder.request
    if request.along is not None:
        return builder.work(RECONSTRUCTION, *_projection(builder, request.along))
    if request.by == "expert":
        _check_experts(builder)
    if request.max_tokens is not None or request.answer is not None:
        return _answer(builder)
    steps = [*_logits(len(builder.outputs)), *_shares(builder), *_edits(builder, request.ablate)]
    for made in request.reads:
        region = Region("reads", builder.input_positions, 1, spans=((made, made + 1),))
        steps.append(Sweeps("what heads read", 1, 1, region=region))
    return builder.work(RECONSTRUCTION, *steps)


def _answer(builder: _Builder) -> Work:
    """The shares of every token of an answer, which is generated first if it is not given.

    Raises:
        PlanError: it has no tokens, or too many.
    """
    request, before, more = builder.request, list[Step](), dict[str, Any]()
    text, answer = builder.n, len(request.answer or ()) if request.max_tokens is None else request.max_tokens
    if not answer:
        raise PlanError("the answer has no tokens; give a text or token ids")
    if text + answer > builder.config.longest:
        raise PlanError(
            f"prompt and answer have {text + answer} tokens, this model takes at most {builder.config.longest}; "
            "shorten one of them"
        )
    if request.max_tokens is not None:
        before = [*_generation(builder, text, answer), Lookup("next tokens", count=answer, logits=1)]
        more = {"reused": "all", "fewer_vectors": "lower --max-tokens, or use fewer tokens"}
    places = range(text - 1, text + answer - 1)
    whole = replace(builder, n=text + answer, request=replace(request, positions=places))
    return whole.work(*before, RECONSTRUCTION, *_logits(answer, TOKENS_AT_ONCE), *_shares(whole), **more)


def _logits(outputs: int, at_once: int | None = None) -> list[Lookup]:
    """Return the passes over the vocabulary that give the logits of some outputs, by default of all at once."""
    most = min(at_once or outputs, outputs)
    return [Lookup("logits", logits=min(most, outputs - i)) for i in range(0, outputs, most)]


def _shares(builder: _Builder) -> Iterator[Sweeps]:
    """Yield the sweeps that split logits by what is asked."""
    by = builder.request.by
    if by == "edge":
        yield from _edges(builder)
    elif by != "token":
        yield _branches(builder, "attribution", by)
    elif builder.request.positions is not None:
        yield from _several(builder)
    else:
        yield ATTRIBUTION


def _check_experts(builder: _Builder, at: str = "output", depth: int | None = None) -> None:
    """Check that what is split over experts has any.

    Raises:
        PlanError: it has none.
    """
    try:
        has_experts([layer.routed for layer in builder.config.layers[:depth]], at)
    except ValueError as error:
        raise PlanError(str(error)) from error


def _edits(builder: _Builder, by: str | None, others: int = 0) -> Iterator[Step]:
    """Yield the forward passes of edited prompts: those with a token left out, and others; see `ggjac.edits`."""
    n, chunk = builder.input_positions, builder.chunk_bytes
    if by == "mean":
        yield Lookup("mean embedding", embedding=1)
    edits = others + n * (DRAWS if by == "replace" else by in ABLATIONS)
    limit = runs_at_once(builder.config, n, builder.dtype, chunk)
    kept = {"edits": (edits + n) * builder.d * builder.item}  # outputs, and what takes the place of embeddings
    if edits:
        yield from builder.in_chunks("edits", edits, limit=limit, region=Region("all", n), buffers=kept)


def _reach(builder: _Builder) -> Work:
    """Edits along paths, and one vector of each in either map; and of each token left out, in one downwards."""
    request, n, end = builder.request, builder.input_positions, builder.config.block_count
    limit = runs_at_once(builder.config, n, builder.dtype, builder.chunk_bytes)
    # Paths, by the depth of what they change.
    straight = Counter({0: request.swaps + request.toward + 2 * request.rank})
    if request.direction:
        straight[request.layer or 0] += 1 + request.rank
    steps: list[Step] = [Lookup("logits", logits=1), *builder.spectrum()[:-1]]
    steps += _edits(builder, request.ablate, request.steps * straight.total())
    floats = sum(paths * builder.config.width(depth) for depth, paths in straight.items())
    moved = {"edits": 2 * floats * builder.n * builder.item}
    for depth, paths in sorted(straight.items()):
        spans = ((depth, end),) if depth else ()
        region, everything = Region(spans=spans), Region("all", n, spans=spans)
        steps += builder.in_chunks("images", paths, limit=limit, stream_copies=1, region=region, buffers=moved)
        for step in builder.in_chunks("ordinary", paths, limit=limit, region=everything, buffers=moved):
            steps.append(replace(step, vectors=1 + step.vectors, forward_mode=True))
        steps.append(Sweeps("ordinary: last block", 1, 1, region=Region("all", n, spans=((end - 1, end),))))
    if request.ablate in ABLATIONS:
        steps += ATTRIBUTION, Sweeps("gradient", 2, 2, up=False, region=Region("all", n))
    matrix = builder.matrix
    return builder.work(*steps, RECONSTRUCTION, buffers=matrix, tapes_to_disk=False, fewer_vectors=FEWER_TRIPLETS)


def _branches(
    builder: _Builder, what: str = "attribution", by: str = "layer", spans: tuple[tuple[int, int], ...] = ()
) -> Sweeps:
    """Return the pass that splits what is read at the outputs, of all blocks or before some, by layer or head."""
    outputs, config = builder.outputs, builder.config
    written = outputs[-1] + 1 - outputs[0]
    kept = config.reads * config.d if config.reads > 1 else 0
    kept += sum(map(config.width, range(1, config.block_count + 1))) if kept and config.inputs else 0
    kept = math.ceil(kept * written / (builder.input_positions * config.d))
    region = Region("heads" if by == "head" else "live", builder.input_positions, written, spans)
    return Sweeps(what, 1, 1, region=region, stream_copies=kept)


def _edges(builder: _Builder) -> Iterator[Sweeps]:
    """Yield the pass in which all that is written is kept, and those in which cotangents of readers go down.

    These are once more copied where readers join, and where they are what heads read; some at a time are widened to be
    multiplied. Edges of the heads of a block are there by position.
    """
    config, n, item, d = builder.config, builder.input_positions, builder.item, builder.d
    kept, widest = d, 0
    for own in config.layers:
        mixed = [mixed_width(config, own, mixer) for mixer in own.mixers]
        kept += sum(mixed) + d * (bool(own.routed or own.hidden_units) + (config.row.laurel and bool(mixed)))
        widest = max([widest, *mixed])
    kept += sum(map(config.width, range(1, config.block_count + 1))) if config.inputs else 0
    nodes = 2 + sum(edge_readers(config, i) + 1 for i in range(config.block_count))
    buffers = {"edges": kept * n * item + 2 * nodes**2 * 8}
    most = max(edge_readers(config, i) for i in range(config.block_count))
    yield Sweeps("attribution: written", 1, 1, region=Region("written", n, n), buffers=buffers)
    for top, bottom, rows in edge_passes(config, n, item, builder.chunk_bytes):
        wide = config.width(top)
        joining = n * (2 * rows * wide + most * (2 * wide + widest)) * item
        widened = 2 * min(EDGE_FLOATS, rows * n * max(widest, d)) + 2 * rows * n * most
        multiplied = n * rows * (wide + widest) * item + widened * 8
        size = {"edges": buffers["edges"] + max(joining, multiplied)}
        span = Region("edges", n, n, ((bottom, top),))
        yield Sweeps("attribution: edges", 1, 1, up=False, region=span, buffers=size)
        if bottom:
            below = Region("outputs", n, n, ((0, bottom),), rows=rows - 1)
            yield Sweeps("attribution: edges below", 1, 1, up=False, region=below, buffers=size)


# Passes over the head in which the leading Fisher directions are found, as far as they can be known before.
FISHER_PASSES = 16


def _projection(builder: _Builder, direction: str) -> Iterator[Step]:
    """Yield the steps of a projection: its direction, what is projected, and the shares.

    Raises:
        PlanError: there is no such place.
    """
    request, blocks = builder.request, builder.config.block_count
    if request.positions is not None:
        raise PlanError("a direction is split at one position; name one")
    try:
        at, depth = place(direction, request.at, request.layer, blocks)
        has_parts(at, request.by)
    except ValueError as error:
        raise PlanError(str(error)) from error
    if request.by == "expert":
        _check_experts(builder, at, depth)
    index, spans = computed(direction), ((0, depth),)
    if index is not None:
        yield Lookup("direction", count=FISHER_PASSES if index else 2, logits=1)
    if at == "output":
        yield ATTRIBUTION if request.by == "token" else _branches(builder, by=request.by)
        return
    yield Sweeps("what is projected", 1, 1, region=Region(spans=((depth - 1, depth),)))
    if request.by == "token":
        yield replace(ATTRIBUTION, region=Region(spans=spans))
        yield Sweeps("offset", 1, 3, region=Region(spans=spans), stream_copies=1)
    else:
        yield _branches(builder, by=request.by, spans=spans)


def _several(builder: _Builder) -> Iterator[Sweeps]:
    """Yield the sweeps of outputs, some at a time, each with the positions up to the last of them; and the biases."""
    outputs, at_once = builder.outputs, min(TOKENS_AT_ONCE, builder.rows_at_once())
    stop = builder.input_positions
    yield Sweeps("attribution: biases", 1, 1, region=Region(read=stop, written=stop))
    for start in range(0, len(outputs), at_once):
        part = outputs[start : start + at_once]
        stop = part[-1] + 1
        yield Sweeps("attribution", 1, len(part), up=False, region=Region(read=stop, written=stop))


def _attend(builder: _Builder) -> Work:
    """The direct logit attribution where it chooses the head; parts of the stream below the block; queries and keys.

    What is not known, the block of that head and the positions of its keys, is assumed to be the most.
    """
    request, config, n = builder.request, builder.config, builder.input_positions
    layer = config.block_count - 1 if request.layer is None else request.layer
    if not 0 <= layer < config.block_count:
        raise PlanError(f"layer={layer} is out of range; this model has blocks 0 to {config.block_count - 1}")
    steps: list[Step] = [RECONSTRUCTION]
    if request.layer is None or request.head is None:
        heads = Sweeps("attribution", 1, 1, region=Region("heads", n, 1))
        steps += [Lookup("logits", logits=1), heads]
    own, below = config.layers[layer], ((0, layer),)
    try:
        places = 2 + (KEYS if request.keys is None else len(key_positions(request.keys, n - 1)))
    except ValueError as error:
        raise PlanError(str(error)) from error
    tokens = request.parts == "token"
    count = n + 1 if tokens else 2 * layer + 2
    softmax = any(MIXERS[mixer].softmax for mixer in own.mixers)
    kept = softmax * count * places * config.width(layer) * builder.item
    if layer and softmax:
        region = Region("live", n, n, spans=below)
        limit = min(TOKENS_AT_ONCE, builder.rows_at_once())
        parts = builder.in_chunks("parts of the stream", n + 1 if tokens else 1, limit=limit, region=region)
        # By block, what goes past a branch, and that with what the branch adds; by token, what is kept of each sweep.
        steps += [replace(step, buffers={"parts": (1 if tokens else 3) * kept}) for step in parts]
    for made in sorted({layer, layer if own.source is None else own.source}):
        region = Region("scores", n, n, spans=((made, made + 1),))
        steps.append(Sweeps("queries and keys", 1, 1, region=region, buffers={"parts": 3 * kept}))
    return builder.work(*steps, fewer_vectors="ask for fewer keys, or use fewer tokens")


def _norms(builder: _Builder) -> Work:
    vectors = builder.n * min(builder.request.count, builder.d)
    return builder.work(
        RECONSTRUCTION,
        *builder.dense("rows"),
        *builder.in_chunks("columns", vectors, stream_copies=1),
        Lookup("decoding", head=vectors, embedding=vectors),
        fewer_decoded="lower --count, or use fewer tokens",
    )


def _ranks(builder: _Builder) -> Work:
    """The joint map and those of all positions together, in chunks of vectors; see `analysis.ranks`."""
    n, positions, item, block = builder.n, builder.input_positions, builder.item, builder.block(builder.n, 1)
    limit = min(TOKENS_AT_ONCE * block.width, builder.rows_at_once())
    largest = builder.searched(
        "svd", 1, block, (1, n * builder.d), (positions, builder.d), limit=limit, stream_copies=1
    )
    if builder.takes_matrix(Task(1, tokens=positions)):
        matrix = {"matrix": n * builder.d**2 * item}
        found = builder.decomposed(1, ("svd by matrix", 1, n), ("svd per token by matrix", positions, 1))
        return builder.work(*found, Lookup("logits", logits=1), RECONSTRUCTION, buffers=matrix)
    if builder.d <= EXACT_ROWS:
        norms = builder.in_chunks("stable ranks", builder.d, limit=limit, up=False, result_floats=1 + 2 * 8 / item)
    else:
        copied = {"norms": PROBES * n * builder.d * (item + 2 * 8)}  # the joint map's probes, copied to float64
        norms = builder.in_chunks("stable ranks", (1 + positions) * PROBES, limit=limit, up=False, buffers=copied)
    return builder.work(*largest, *norms, Lookup("logits", logits=1), RECONSTRUCTION)


def _compare(builder: _Builder) -> Work:
    """One of the two files or prompts, while the results of the other are kept."""
    n, d, rank, other = builder.n, builder.d, builder.request.rank, builder.request.other or builder.n
    kept = (n + other) * builder.config.vocabulary * builder.item + rank * (other + 1) * d * max(4, builder.item)
    joint = [step for step in builder.triplets() if not isinstance(step, Lookup)]
    steps: list[Step] = [Lookup("logits", logits=n), *joint, RECONSTRUCTION, ATTRIBUTION]
    steps.append(_branches(builder, "branches"))
    buffers = {"portraits": kept} | builder.matrix
    return builder.work(*steps, buffers=buffers, tapes_to_disk=False, fewer_vectors=FEWER_TRIPLETS)


def _steer(builder: _Builder) -> Work:
    """The concept's map on a text and on every generated token, and the generation itself; see `analysis.steer`."""
    request, config = builder.request, builder.config
    if request.method in ("add", "remove"):
        return _intervene(builder)
    text, count = request.text or builder.n, 12 if request.max_tokens is None else request.max_tokens
    capacity, steered = text + count, request.strengths * (1 + request.control)
    layer = default_layer(config.block_count) if request.layer is None else request.layer
    if not 1 <= layer <= config.block_count:
        raise PlanError(f"layer={layer} is out of range; this model has layers 1 to {config.block_count}")
    if capacity > config.longest:
        raise PlanError(f"a text of {capacity} tokens cannot run; this model takes at most {config.longest}")
    concept = Region(spans=((0, layer),))
    steps: list[Step] = []
    for _ in range(1 + request.other_map):
        steps += builder.in_chunks("images of the text", text, region=concept, stream_copies=1)
        if request.method == "equation16":
            steps.append(Sweeps("offset", 1, 3, region=concept))
    if request.other_map:
        steps.append(Sweeps("the control's own pass", 1, 1, region=Region("all", builder.n)))
    steps += (texts := _generation(builder, text, count, 1 + steered))
    if steered and count > 1:
        images = Sweeps("images of tokens", steered * (count - 1), 1, region=concept, stream_copies=1)
        steps.append(replace(images, buffers=texts[0].buffers))
    steps.append(Lookup("logits", count=1 + (1 + steered) * count, logits=1))
    return builder.work(*steps, reused="all", tapes_to_disk=False)


def _intervene(builder: _Builder) -> Work:
    """The stream changed along a direction, continued, and along random ones; see `analysis.intervene`."""
    request, n, end = builder.request, builder.n, builder.config.block_count
    count, strengths = 12 if request.max_tokens is None else request.max_tokens, request.strengths
    right = request.singular == "right"
    layer = (0 if right else default_layer(end)) if request.layer is None else request.layer
    if not (request.singular == "left") <= layer <= end - right:
        raise PlanError(f"layer={layer} is out of range; this model has {end} blocks")
    if n + count > builder.config.longest:
        longest = builder.config.longest
        raise PlanError(f"a text of {n + count} tokens cannot run; this model takes at most {longest}")
    random = request.random if request.control else 0
    steps: list[Step] = []
    if request.singular:
        region = Region(spans=((layer, end) if right else (0, layer),))
        found, size = builder.block(n), n * builder.config.width(region.spans[0][0])
        steps += (
            replace(step, region=region)
            for step in builder.searched("svd", request.rank, found, (1, size), limit=sys.maxsize)
        )
        steps.append(Sweeps("svd: signs", 1, 3, region=region))
    steps += _generation(builder, n, count, 1 + strengths)
    if layer < end:
        to_end = Region(spans=((layer, end),))
        steps.append(Sweeps("prediction", 1, strengths, region=to_end, stream_copies=1))
    for _ in range(strengths):
        steps += _edits(builder, None, random)
    predicted = [Lookup("predicted logits", logits=strengths)]
    predicted += [Lookup("logits of random directions", count=strengths, logits=random)] * bool(random)
    steps += [Lookup("logits", count=(1 + strengths) * count, logits=1), *predicted]
    return builder.work(*steps, reused="all", tapes_to_disk=False)


def _generation(builder: _Builder, text: int, count: int, texts: int = 1) -> list[Sweeps]:
    """Return the passes of `texts` texts of `text` tokens, each continued by `count`: the last is not fed back."""
    config, capacity = builder.config, text + count
    # What every block keeps of the past; that of the block being extended exists twice.
    each = [sum(_past_bytes(config, own, kind, capacity, builder.item) for kind in own.mixers) for own in config.layers]
    if config.row.ffn.startswith("shifted"):  # and the last row that the feed-forward read
        each = [size + config.d * builder.item for size in each]
    if config.recurrence.shifted:  # and the values of the tokens just added, which later blocks read
        for i in config.writers:
            each[i] += text * config.recurrence.heads * config.recurrence.value_size * builder.item
    buffers = {"cache": sum(each) + max(each)}
    found = [Sweeps("texts", texts, 1, region=Region("continued", text), buffers=buffers)]
    if count > 1:
        token = Region("continued", capacity, 1)
        found.append(Sweeps("tokens", texts * (count - 1), 1, region=token, buffers=buffers))
    return found


def _past_bytes(config: ModelConfig, own: Layer, mixer: str, positions: int, item: int) -> int:
    """Return the bytes of what a mixer keeps of some positions: their keys and values, or a state and a few rows."""
    kind, sizes = MIXERS[mixer], config.recurrence
    if kind.recurrent:
        state = sizes.heads * sizes.key_size * sizes.value_size
        return state * max(4, item) + (sizes.taps - 1) * sizes.convolved * item
    if kind.convolution:
        return (sizes.taps - 1) * config.d * item
    if kind.grouped:  # keys are the values; and what groups' keys and their shares are made from
        rows = 2 * own.compressed.windows if own.compressed.ratio else 0
        return (1 + rows) * own.key_size * positions * item
    return own.kv_heads * (own.key_size + own.value_size) * positions * item


def _jacobian(builder: _Builder) -> Work:
    """All rows; for a mean over prompts, a map of one, its copy, that of its decomposition, and the sum."""
    sums = {"sums": (3 * 8 + max(4, builder.item)) * builder.d**2} if builder.request.mean else {}
    return builder.work(*builder.dense("rows"), RECONSTRUCTION, buffers=sums)


def _predict(builder: _Builder) -> Work:
    everywhere = (Lookup("all logits", logits=builder.n),) if builder.request.everywhere else ()
    return builder.work(Lookup("logits", logits=1), *everywhere, tapes=False, tapes_to_disk=False)


def _verify(builder: _Builder) -> Work:
    """A trace without tapes, and the same blocks once more, each given llama.cpp's input.

    Only a quantized file as it is does without the latter. Memory of llama.cpp's own process is not counted.
    """
    n, config = builder.n, builder.config
    tensors = n * builder.d * (3 * config.block_count + 1)  # each block's two branches and stream; the output
    reference = {"llama.cpp's tensors": 4 * (tensors + n * config.vocabulary)}
    alone = Sweeps("blocks, given llama.cpp's input", 1, 1, region=Region("all", n))
    return builder.work(alone, Lookup("all logits", count=2, logits=n), tapes=False, buffers=reference, reused="all")


# The commands that can be planned, the main one first.
JOBS: dict[str, Callable[[_Builder], Work]] = {
    "analyze": _analyze,
    "svd": _svd,
    "layers": _layers,
    "jacobian": _jacobian,
    "norms": _norms,
    "attribute": _attribute,
    "attend": _attend,
    "contrast": lambda builder: builder.work(RECONSTRUCTION, *builder.ordinary(), Lookup("logits", logits=3)),
    "ranks": _ranks,
    "reach": _reach,
    "compare": _compare,
    "steer": _steer,
    "predict": _predict,
    "verify": _verify,
}
