"""Will it fit, and how long will it take? Answered from a file's header and a prompt's length, without any arithmetic.

A job is a trace and some sweeps. For each layer the plan says what a sweep reads (`attn_v`, `attn_output`, the live
half of the feed-forward, `ffn_down`, and of a mixture the routed experts only), what is frozen, and where the weights
wait between sweeps. Peak memory is the sum of parts, each a formula below; time comes from rates measured elsewhere
(`ggjac.bench`). Sizes are bytes, weights are elements, FLOP count a multiplication and an addition as two.

Of a mixture of experts, the plan counts as many experts as tokens would use if they were spread evenly over all: an
upper bound of the mean, since real routers prefer some.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

from ggjac import machine
from ggjac.config import ModelConfig
from ggjac.gguf import GGUFFile, TensorInfo
from ggjac.sizes import CHUNK_BYTES, EXACT_ROWS, PROBES, SLAB, SLICE, TILE_ELEMENTS, block_width, chunk_floats

MlpPath = Literal["up", "gate"]

ITEM_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}

# Anonymous memory of a process that has imported torch and opened a model, before it does anything: measured, Linux.
BASE_BYTES = {"cpu": 152 << 20, "cuda": 900 << 20}
# Buffers of the matrix library and of the allocator, of each thread; and what CUDA keeps on the device for itself.
THREAD_BYTES = 8 << 20
CONTEXT_BYTES = 600 << 20
# Commands that can be planned, the main one first.
JOBS = ("analyze", "svd", "layers", "jacobian", "attribute", "predict")
# Sweeps until eight residuals are below 1e-3, up and down counted singly: 6 to 10 on spectra like those of models.
EXPECTED_SWEEPS = 8


class PlanError(ValueError):
    """A plan cannot be made: an impossible prompt length, rank or dtype."""


class NoFitError(PlanError):
    """The job needs more memory than its budget; the message says how much, and what to lower."""

    will_not_fit = True


# ----------------------------------------------------------------------------------------------------------------------
# What is to be done


@dataclass(frozen=True)
class Sweeps:
    """So many passes over the live weights with so many stacked vectors; `what` says what for.

    `up`: some of them go up the layers, which takes more memory. `after`: floats that are made of each float of a
    result when it is there. `copies`: of the stream, which are made where maps join or leave the stack.
    """

    what: str
    count: int
    vectors: int
    up: bool = True
    after: float = 0.0
    copies: int = 0


@dataclass(frozen=True)
class Job:
    """Sweeps to be made, and what must be kept meanwhile.

    Attributes:
        name: the command.
        sweeps: in order.
        width: vectors of the Krylov basis that join in each sweep of the decomposition; 0 where there is none.
        rank: triplets to decode.
        tapes: whether what the Jacobian freezes is kept.
        maps: maps inside the network that advance together.
        chunk_bytes: working memory of a chunk of dense rows.
    """

    name: str
    sweeps: tuple[Sweeps, ...] = ()
    width: int = 0
    rank: int = 0
    tapes: bool = True
    maps: int = 0
    chunk_bytes: int = CHUNK_BYTES

    @property
    def vectors(self) -> int:
        """Most stacked vectors of any sweep."""
        return max((part.vectors for part in self.sweeps), default=0)

    @property
    def krylov_sweeps(self) -> int:
        """Sweeps of a decomposition."""
        return max((part.count for part in self.sweeps if part.what.endswith("svd")), default=0)


def job(
    name: str,
    config: ModelConfig,
    n: int,
    dtype: str,
    *,
    rank: int = 8,
    sweeps: int = EXPECTED_SWEEPS,
    maps: int | None = None,
    chunk_bytes: int | None = None,
) -> Job:
    """Return what a command does, one of `JOBS`.

    `maps` is how many maps inside the network advance together: of `layers` by default the three at each block, of
    other commands none.

    Raises:
        PlanError: the command is not planned here, or the rank is out of range.
    """
    if name not in JOBS:
        raise PlanError(f"{name!r} is not planned; planned: {', '.join(JOBS)}")
    _check_length(config, n)
    if not 1 <= rank <= config.d:
        raise PlanError(f"--rank {rank} is out of range; this model's Jacobian has {config.d} singular values")
    width = min(block_width(rank, n * config.d), config.d)
    chunk_bytes = CHUNK_BYTES if chunk_bytes is None else chunk_bytes
    rebuild = Sweeps("reconstruction", 1, 3)
    krylov = Sweeps("svd", sweeps, width)
    probe = Sweeps("stable rank", 1, PROBES, up=False, after=1 + 2 * 8 / ITEM_BYTES[dtype])
    if config.d <= EXACT_ROWS:
        probe = _dense("stable rank", config, n, dtype, CHUNK_BYTES)
    planned = {
        "predict": Job(name, tapes=False),
        "attribute": Job(name, (rebuild, Sweeps("attribution", 1, 1, up=False))),
        "jacobian": Job(name, (_dense("rows", config, n, dtype, chunk_bytes), rebuild), chunk_bytes=chunk_bytes),
        "svd": Job(name, (krylov, rebuild), width, rank),
        "layers": Job(name, (rebuild,)),
        "analyze": Job(name, (rebuild, krylov, probe, Sweeps("attribution", 1, 1, up=False)), width, rank),
    }[name]
    if maps is None:
        maps = 3 * config.block_count if name == "layers" else 0
    return _with_maps(planned, config, n, dtype, maps, width, rank, sweeps) if maps else planned


def _with_maps(job: Job, config: ModelConfig, n: int, dtype: str, maps: int, width: int, rank: int, sweeps: int) -> Job:
    """Return a job with the decomposition of maps inside the network, each as the whole Jacobian's.

    Cumulative, blockwise and maps to the end make up 7/3 of those that advance together. Their left vectors are
    decoded, each at one position.
    """
    item, rows, count = ITEM_BYTES[dtype], PROBES, 1
    if config.d <= EXACT_ROWS:
        rows = min(config.d, max(1, CHUNK_BYTES // (chunk_floats(n, config.d, config.hidden_units) * item * maps)))
        count = math.ceil(config.d / rows)
    # The results of all maps arrive together, and are made wide one after another.
    norms = Sweeps("layers: stable rank", count, maps * rows, up=False, after=1 + 2 * 8 / item / maps, copies=2)
    krylov = Sweeps("layers: svd", sweeps, maps * width, copies=2)
    more = (krylov, Sweeps("layers: signs", 1, maps, copies=2), norms)
    decoded = math.ceil(maps * 7 / 3 * rank / n)
    return replace(
        job, sweeps=job.sweeps + more, width=max(job.width, maps * width), rank=max(job.rank, decoded), maps=maps
    )


def _check_length(config: ModelConfig, n: int) -> None:
    if not 1 <= n <= config.context_length:
        raise PlanError(f"a prompt of {n} tokens cannot run; this model takes from 1 to {config.context_length}")


def _dense(what: str, config: ModelConfig, n: int, dtype: str, chunk_bytes: int) -> Sweeps:
    """Return the sweeps of a dense Jacobian, whose rows come in chunks."""
    item = ITEM_BYTES[dtype]
    chunk = min(config.d, max(1, chunk_bytes // (chunk_floats(n, config.d, config.hidden_units) * item)))
    # Rows are summed up in float64, the copy and its squares or products, `SLICE` of them at a time.
    return Sweeps(
        what, math.ceil(config.d / chunk), chunk, up=False, after=1 + min(SLICE, chunk) / chunk * 2 * 8 / item
    )


def all_rows(config: ModelConfig, n: int, dtype: str) -> int:
    """Return the `chunk_bytes` with which all rows of the dense Jacobian come in one sweep."""
    return config.d * chunk_floats(n, config.d, config.hidden_units) * ITEM_BYTES[dtype]


# ----------------------------------------------------------------------------------------------------------------------
# What a pass over one layer reads and computes


@dataclass(frozen=True)
class Pass:
    """One pass over some tensors.

    Attributes:
        nbytes: stored bytes read.
        types: weights dequantized, by storage type.
        flop: for one vector, or of a trace for all positions.
        calls: matrices applied.
    """

    nbytes: int = 0
    types: Mapping[str, int] = field(default_factory=dict)
    flop: int = 0
    calls: int = 0

    @property
    def weights(self) -> int:
        """Elements dequantized."""
        return sum(self.types.values())

    def columns(self, vectors: int = 1) -> int:
        """Return what a weight is multiplied by, on the average: positions times stacked vectors, fewer in experts."""
        return max(1, round(vectors * self.flop / (2 * max(1, self.weights))))

    def __add__(self, other: "Pass") -> "Pass":
        types = Counter(self.types)
        types.update(other.types)
        return Pass(self.nbytes + other.nbytes, dict(types), self.flop + other.flop, self.calls + other.calls)


def _total(passes: Iterable[Pass]) -> Pass:
    return sum(passes, start=Pass())


@dataclass(frozen=True)
class LayerPlan:
    """One block.

    Attributes:
        index: of the block.
        stored_bytes: of all its tensors, all experts included.
        sweep: what a sweep reads and computes, FLOP for one stacked vector.
        trace: what the trace reads and computes.
        dense_bytes: the live weights in the plan's dtype.
        tape_bytes: what is frozen.
        place: where the live weights are between sweeps: `"dense"` (ready to multiply, on the device), `"device"`
            (quantized, on the device), `"pinned"` (quantized, in RAM beside a device) or `"file"`.
    """

    index: int
    stored_bytes: int
    sweep: Pass
    trace: Pass
    dense_bytes: int
    tape_bytes: int
    place: str = "file"


class _Block:
    """The tensors of one block by the short names under which `ggjac.blocks` asks for them."""

    def __init__(self, file: GGUFFile, config: ModelConfig, index: int):
        self.tensors, self.slices, self.prefix = file.tensors, config.slices, f"blk.{index}."

    def find(self, name: str) -> tuple[TensorInfo, int] | None:
        """Return the tensor that holds `name`, alone or fused, and how many of its rows (elements) are meant."""
        stem, suffix = name.rsplit(".", 1)
        fused, start, stop = self.slices.get(stem, ("", 0, 0))
        info = self.tensors.get(f"{self.prefix}{fused}.{suffix}") if fused else None
        if info is not None:
            return info, stop - start
        info = self.tensors.get(self.prefix + name)
        return None if info is None else (info, info.shape[-2] if len(info.shape) > 1 else info.shape[-1])

    def linear(self, stem: str, positions: int, experts: int = 0, uses: int = 0) -> Pass:
        """Return one application of a projection and its bias at some positions; 0 bytes where the file has none.

        Of a stack, so many `experts` are read, and `uses` positions of all of them together are multiplied.
        """
        found = self.find(f"{stem}.weight")
        if found is None:
            return Pass()
        info, out = found
        columns, matrices = info.shape[-1], experts or 1
        weight = Pass(
            matrices * out * info.row_bytes,
            {info.type.name: matrices * out * columns},
            2 * (uses or positions) * out * columns,
            matrices,
        )
        return weight + self.vector(f"{stem}.bias", matrices if experts else 0)

    def vector(self, name: str, experts: int = 0) -> Pass:
        """Return the reading of a vector, or of some rows of a stack of them."""
        found = self.find(name)
        if found is None:
            return Pass()
        info, elements = found
        if experts:
            return Pass(experts * info.row_bytes, {info.type.name: experts * info.shape[-1]})
        return Pass(elements * info.row_bytes // info.shape[-1], {info.type.name: elements})


def routed_experts(config: ModelConfig, positions: int) -> int:
    """Return how many experts of a layer some positions use together, if they are spread evenly; rounded up."""
    if not config.expert_count:
        return 0
    miss = 1 - config.expert_used_count / config.expert_count
    return math.ceil(config.expert_count * (1 - miss**positions) - 1e-9)


def _networks(block: _Block, config: ModelConfig, positions: int) -> Iterator[tuple[str, int, int, int]]:
    """Yield kind, experts read, uses and hidden units of each sort of feed-forward network in a block."""
    if config.expert_count:
        routed, uses = routed_experts(config, positions), positions * config.expert_used_count
        yield "_exps", routed, uses, config.expert_feed_forward_length
        if block.find("ffn_up_shexp.weight"):
            yield "_shexp", 0, positions, config.expert_shared_feed_forward_length
    else:
        yield "", 0, positions, config.feed_forward_length


def _live(block: _Block, kind: str, mlp_path: MlpPath) -> str:
    """Return the stem of the projection that stays live; without a gate it is `ffn_up`."""
    return f"ffn_{mlp_path}{kind}" if block.find(f"ffn_gate{kind}.weight") else f"ffn_up{kind}"


def _sweep_pass(block: _Block, config: ModelConfig, mlp_path: MlpPath, n: int, m: int) -> Pass:
    """Return what a product reads and computes per vector, from `n` positions to `m` of them."""
    parts = [block.linear("attn_v", n), _mix(config, n, m), block.linear("attn_output", m)]
    for kind, experts, uses, _ in _networks(block, config, m):
        parts += [block.linear(stem, m, experts, uses) for stem in (_live(block, kind, mlp_path), f"ffn_down{kind}")]
    return _total(parts)


def _mix(config: ModelConfig, n: int, m: int) -> Pass:
    """Return the attention pattern at work: every query position takes from every key position."""
    return Pass(flop=2 * config.head_count * config.head_size * m * n)


def _trace_pass(block: _Block, config: ModelConfig, mlp_path: MlpPath, n: int, infos: list[TensorInfo]) -> Pass:
    """Return what the trace reads and computes: each tensor once, but the projection that is frozen and live twice."""
    parts = [block.linear(stem, n) for stem in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate_inp")]
    parts += [_mix(config, n, n), _mix(config, n, n)]  # scores cost as much as their use
    clamped = config.row.activation == "silu_oai"
    for kind, experts, uses, _ in _networks(block, config, n):
        gated = block.find(f"ffn_gate{kind}.weight") is not None
        stems = (
            [f"ffn_gate{kind}", f"ffn_up{kind}", f"ffn_down{kind}"] if gated else [f"ffn_up{kind}", f"ffn_down{kind}"]
        )
        # A frozen factor that needs the live projection's own output is recorded first, and then applied.
        if not gated or mlp_path == "gate" or clamped:
            stems.append(_live(block, kind, mlp_path))
        parts += [block.linear(stem, n, experts, uses) for stem in stems]
    vectors = (info for info in infos if len(info.shape) == 1 and not info.name.endswith(".bias"))
    parts += [Pass(info.nbytes, {info.type.name: info.elements}) for info in vectors]
    return _total(parts)


def _tape_bytes(block: _Block, config: ModelConfig, n: int, item: int) -> int:
    """Return the bytes of a block's tape: its stream `[n, d]`, norms, patterns `[h, n, n]`, factors `[n, f]`."""
    floats, other = n * config.d + config.head_count * n * n, 0
    norms = config.row.norms
    for names in (norms.attention_in, norms.attention_out, norms.ffn_in, norms.ffn_out):
        name = next((name for name in names if block.find(f"{name}.weight")), None)
        if name is not None:
            floats += config.d * (2 if block.find(f"{name}.bias") else 1)
            other += n * max(4, item)  # one over the root mean square, float32 at least
    clamped = config.row.activation == "silu_oai"
    for kind, experts, uses, width in _networks(block, config, n):
        floats += uses * width * (1 + clamped)
        if experts:
            floats, other = floats + uses, other + uses * 8
        elif kind and block.find(f"ffn_gate_inp{kind}.weight"):
            floats += n
    return floats * item + other


# ----------------------------------------------------------------------------------------------------------------------
# Memory


def sweep_floats(config: ModelConfig, n: int, *, up: bool) -> int:
    """Return the floats that one stacked vector takes on its way through a block of `n` positions, at most.

    What is alive at once, counted in the code of `linop`, `blocks` and `jacobian`; `d`, `q` and `kv` are the widths of
    the stream, of all query heads and of all value heads, `s` that of a slab of hidden units:

        up, attention        stream, normed stream, values twice, and mixed heads twice (or both once, with the output)
        up, feed-forward     stream, middle, normed middle, the sum over slabs or experts, hidden units
                             before and after the gate, one slab's output, and what experts gather
        down, attention      stream, middle, heads twice, values twice (or what they give the stream)
        down, feed-forward   stream, the sum over slabs, hidden units twice (or once, with one slab's output)

    Downwards, what a norm or a scale after a branch makes of the stream comes on top, or what parallel branches and
    experts share. A routed expert sees some positions only.
    """
    d, q, kv, row = config.d, config.head_count * config.head_size, config.head_count_kv * config.head_size, config.row
    s = _slab(config)
    total = d if config.hidden_units > SLAB or config.expert_count else 0
    if up:
        gathered = d if config.expert_count else 0
        return n * max(2 * d + kv + max(kv + 2 * q, q + 2 * d), 3 * d + gathered + total + 2 * s + d)
    scaled = row.norms.attention_out or row.norms.ffn_out or config.residual_scale != 1
    more = d if scaled or row.parallel or config.expert_count else 0
    return n * (more + max(2 * d + 2 * q + max(2 * kv, d), d + total + max(2 * s, s + d)))


def _slab(config: ModelConfig) -> int:
    """Return the hidden units that exist at a time, averaged over positions."""
    if not config.expert_count:
        return min(SLAB, config.feed_forward_length)
    routed = config.expert_feed_forward_length * config.expert_used_count // config.expert_count
    return min(SLAB, max(routed, config.expert_shared_feed_forward_length))


def trace_floats(config: ModelConfig, n: int) -> int:
    """Return the floats that the trace takes beside tapes: streams, projections, and scores in float32."""
    q, kv = config.head_count * config.head_size, config.head_count_kv * config.head_size
    hidden = config.hidden_units
    return n * (4 * config.d + max(2 * (q + 2 * kv), 3 * hidden)) + 3 * config.head_count * n * n


def basis_floats(config: ModelConfig, n: int, width: int, sweeps: int) -> int:
    """Return the floats of both Krylov bases after so many sweeps, and of the last product.

    Every downward sweep adds a block of the input space, `[width, n, d]`, every upward one a block of the output space,
    `[width, d]`. The newest block's product is held until the next one comes.
    """
    down, up = math.ceil(sweeps / 2), sweeps // 2
    return width * config.d * ((down + 1) * n + up + 1)


def krylov_flop(size: int, width: int, sweeps: int) -> int:
    """Return the FLOP that a sweep of the decomposition costs beside its product, on the average.

    Every other product is in the large space of `size`: it is twice projected on a basis of half its final length, and
    factored by QR.
    """
    basis = width * math.ceil(sweeps / 2) // 2
    return (8 * width * basis + 8 * width * width) * size // 2


@dataclass(frozen=True)
class Budget:
    """Memory that may be used, in bytes; None where nobody said and the machine does not tell."""

    ram: int | None = None
    vram: int | None = None


@dataclass(frozen=True)
class Plan:
    """What a job needs, layer by layer and in all.

    Attributes:
        job: what is to be done.
        n: tokens; the Jacobian reads the first `positions` of them.
        d: embedding length.
        dtype, mlp_path, device: as the commands take them; device is `"cpu"` or `"cuda"`.
        layers: one row per block.
        embedding: taking the prompt's embeddings.
        head: the logits of one position.
        decode: finding the tokens of singular vectors.
        ram, vram: bytes by part, at the peak; without what stays resident by choice. Empty `vram` on the CPU.
        budget: what may be used.
        file_bytes: of all shards.
        tapes_on_disk: tapes are kept in a folder, one at a time in memory.
    """

    job: Job
    n: int
    positions: int
    d: int
    dtype: str
    mlp_path: MlpPath
    device: str
    layers: tuple[LayerPlan, ...]
    embedding: Pass
    head: Pass
    decode: Pass
    ram: Mapping[str, int]
    vram: Mapping[str, int]
    budget: Budget
    file_bytes: int
    tapes_on_disk: bool = False

    @property
    def trace(self) -> Pass:
        """The forward pass, FLOP for all positions."""
        return _total([self.embedding, *(layer.trace for layer in self.layers)])

    @property
    def sweep(self) -> Pass:
        """One sweep, FLOP for one stacked vector."""
        return _total(layer.sweep for layer in self.layers)

    @property
    def columns(self) -> list[int]:
        """Columns of the products to come, on the average; see `Pass.columns`."""
        sweeps = {self.sweep.columns(part.vectors) for part in self.job.sweeps}
        return sorted({self.trace.columns(), *sweeps, *([self.decode.columns()] if self.job.rank else [])})

    @property
    def tape_bytes(self) -> int:
        """Bytes of all tapes."""
        return sum(layer.tape_bytes for layer in self.layers)

    @property
    def ram_needed(self) -> int:
        """Peak of this process's anonymous memory, in bytes, with nothing kept resident by choice."""
        return sum(self.ram.values())

    @property
    def vram_needed(self) -> int:
        """Peak of device memory, in bytes, likewise."""
        return sum(self.vram.values())

    def resident(self, place: str) -> int:
        """Return the bytes of layers that wait in one place between sweeps."""
        return sum(
            layer.dense_bytes if place == "dense" else layer.sweep.nbytes
            for layer in self.layers
            if layer.place == place
        )

    @property
    def places(self) -> list[str]:
        """Where each block's live weights wait between sweeps, as `WeightStore.place` takes it."""
        return [layer.place for layer in self.layers]

    @property
    def room(self) -> dict[str, int]:
        """Bytes that each place was given, as `WeightStore.place` takes it."""
        return {place: self.resident(place) for place in ("dense", "device", "pinned")}

    @property
    def ram_peak(self) -> int:
        """Peak of anonymous memory, in bytes, resident layers included."""
        return self.ram_needed + self.resident("pinned") + (self.resident("dense") if self.device == "cpu" else 0)

    @property
    def vram_peak(self) -> int:
        """Peak of device memory, in bytes, resident layers included."""
        on_device = 0 if self.device == "cpu" else self.resident("dense") + self.resident("device")
        return self.vram_needed + on_device

    @property
    def misfit(self) -> str | None:
        """Say in one line what does not fit and what to lower, or None if all does."""
        for kind, option, parts, budget in (
            ("memory", "--ram-budget", self.ram, self.budget.ram),
            ("device memory", "--vram-budget", self.vram, self.budget.vram),
        ):
            needed = sum(parts.values())
            if budget is not None and needed > budget:
                return (
                    f"{self.job.name} needs {machine.format_size(needed)} of {kind} "
                    f"({', '.join(f'{part} {machine.format_size(size)}' for part, size in _largest(parts))}), "
                    f"but {option} allows {machine.format_size(budget)}; {_advice(self, parts, option, needed)}"
                )
        return None

    @property
    def fits(self) -> bool:
        """Whether the budgets suffice."""
        return self.misfit is None

    def seconds(self, rates: "Rates", *, cached: int | None = None, free: int | None = None) -> "Times":
        """Return the time of each part of the job at measured rates.

        Args:
            rates: of this machine.
            cached: bytes of the file in the page cache now; default none.
            free: bytes that the job and the page cache may take; default what is free now.
        """
        return _times(self, rates, cached or 0, machine.free_memory() if free is None else free)


def _largest(parts: Mapping[str, int], count: int = 3) -> list[tuple[str, int]]:
    """Return the parts that weigh most."""
    return sorted(parts.items(), key=lambda part: -part[1])[:count]


def _advice(plan: Plan, parts: Mapping[str, int], option: str, needed: int) -> str:
    """Say what to lower, the part that weighs most first."""
    lower = {
        "tapes": "use fewer tokens" if plan.tapes_on_disk else "keep tapes on disk with --trace FOLDER",
        "bases": "ask for fewer --layers" if plan.job.maps else "lower --rank, or use fewer tokens",
        "vectors": "ask for fewer --layers"
        if plan.job.maps
        else "lower --rank, or use fewer tokens"
        if plan.job.width
        else "use fewer tokens",
        "trace": "use fewer tokens",
    }
    advice = [lower[part] for part, _ in _largest(parts, len(parts)) if part in lower and parts[part] > needed / 8]
    enough = f"{option} {math.ceil(needed / 2**26) * 64}MiB"
    return "; ".join([*dict.fromkeys(advice), f"or give {enough}" if advice else f"give {enough}"])


def make(
    file: GGUFFile,
    config: ModelConfig,
    n: int,
    job: Job,
    *,
    dtype: str = "float32",
    mlp_path: MlpPath = "up",
    device: str = "cpu",
    position: int = -1,
    threads: int = 1,
    budget: Budget | None = None,
    tapes_on_disk: bool = False,
) -> Plan:
    """Plan a job for a prompt of `n` tokens.

    Args:
        file: the open model; only its header is read.
        config: its sizes.
        n: tokens of the prompt.
        job: what is to be done, from `job`.
        dtype: of all arithmetic, by name.
        mlp_path: which factor of a gated feed-forward stays live.
        device: `"cpu"`, or `"cuda"` for any device with memory of its own.
        position: the output position; negative counts from the end.
        threads: on the CPU; each has buffers.
        budget: what may be used; default half of the free RAM.
        tapes_on_disk: keep tapes in a folder and one at a time in memory.

    Raises:
        PlanError: a number of tokens, a position or a dtype that cannot be.
    """
    if dtype not in ITEM_BYTES:
        raise PlanError(f"dtype {dtype!r} is unknown; known: {', '.join(ITEM_BYTES)}")
    _check_length(config, n)
    if not -n <= position < n:
        raise PlanError(f"--position {position} is out of range; the prompt has positions 0 to {n - 1}")
    item, reached = ITEM_BYTES[dtype], position % n + 1
    layers = tuple(_layer(file, config, i, n, reached, item, mlp_path) for i in range(config.block_count))

    embeddings = [(info, n) for name in ("token_embd", "position_embd") if (info := file.tensors.get(f"{name}.weight"))]
    head = file.tensors.get("output.weight", file.tensors["token_embd.weight"])
    embedding = _total(
        Pass(rows * info.row_bytes, {info.type.name: rows * info.shape[-1]}) for info, rows in embeddings
    )
    decode = _rows(head, job.rank) + _rows(file.tensors["token_embd.weight"], job.rank * n) if job.rank else Pass()

    parts = _memory(file, config, n, reached, job, item, layers, threads, device, tapes_on_disk)
    tile = min(TILE_ELEMENTS, max(info.elements for info in file.tensors.values()))
    plan = Plan(
        job=job,
        n=n,
        positions=reached,
        d=config.d,
        dtype=dtype,
        mlp_path=mlp_path,
        device="cpu" if device == "cpu" else "cuda",
        layers=layers,
        embedding=embedding,
        head=_rows(head, 1),
        decode=decode,
        ram=parts if device == "cpu" else {"process": BASE_BYTES["cuda"], "tile": 2 * tile},
        vram={} if device == "cpu" else parts,
        budget=budget or Budget(ram=machine.default_budget()),
        file_bytes=file.nbytes,
        tapes_on_disk=tapes_on_disk,
    )
    return replace(plan, layers=_placed(plan))


def check(plan: Plan) -> None:
    """Refuse a job that its budget cannot hold.

    Raises:
        NoFitError: one line: what is needed, what is allowed, what to lower.
    """
    if plan.misfit:
        raise NoFitError(plan.misfit)


def _layer(
    file: GGUFFile, config: ModelConfig, index: int, n: int, reached: int, item: int, mlp_path: MlpPath
) -> LayerPlan:
    block = _Block(file, config, index)
    infos = [info for name, info in file.tensors.items() if name.startswith(block.prefix)]
    last = index == config.block_count - 1
    sweep = _sweep_pass(block, config, mlp_path, reached, 1 if last else reached)
    return LayerPlan(
        index=index,
        stored_bytes=sum(info.nbytes for info in infos),
        sweep=sweep,
        trace=_trace_pass(block, config, mlp_path, n, infos),
        dense_bytes=sweep.weights * item,
        tape_bytes=_tape_bytes(block, config, n, item),
    )


def _rows(info: TensorInfo, vectors: int) -> Pass:
    """Return one pass over a whole matrix with some vectors."""
    return Pass(info.nbytes, {info.type.name: info.elements}, 2 * vectors * info.elements, 1)


def _memory(
    file: GGUFFile,
    config: ModelConfig,
    n: int,
    reached: int,
    job: Job,
    item: int,
    layers: tuple[LayerPlan, ...],
    threads: int,
    device: str,
    tapes_on_disk: bool,
) -> dict[str, int]:
    """Return the bytes of each part where the arithmetic takes place, at the peak.

    Trace, sweeps and decoding come one after another: of their working memory the largest counts.
    """
    work = max(4, item)  # of bases: float32 at least
    widest = max(info.elements for info in file.tensors.values())
    tile = min(TILE_ELEMENTS, widest) * item
    if device != "cpu":
        tile *= 6  # torch's dequantizers keep several temporaries
    tapes = [layer.tape_bytes for layer in layers] if job.tapes else [0]
    kept = max(tapes) * 2 if tapes_on_disk else sum(tapes)
    vectors = max((_stacked(config, n, reached, part) for part in job.sweeps), default=0) * item
    bases = basis_floats(config, n, job.width, job.krylov_sweeps) * work if job.width else 0
    tracing = trace_floats(config, n) * work
    decoding = max(1, job.rank * n) * (4 * min(TILE_ELEMENTS // config.d, config.vocabulary) + 2 * config.d) * work
    logits = 3 * config.vocabulary * work
    working = {"vectors": vectors + bases, "trace": tracing, "decoding": decoding + logits}
    largest = max(working, key=lambda part: working[part])
    parts = {
        "process": BASE_BYTES["cpu"] + threads * THREAD_BYTES if device == "cpu" else CONTEXT_BYTES,
        "tapes": kept,
        "tile": tile,
    }
    if largest == "vectors":
        return parts | {"vectors": vectors} | ({"bases": bases} if bases else {})
    return parts | {largest: working[largest]}


def _stacked(config: ModelConfig, n: int, reached: int, part: Sweeps) -> int:
    """Return the floats of all stacked vectors of a sweep, on their way or when they have arrived."""
    moving = sweep_floats(config, reached, up=part.up) + part.copies * reached * config.d
    return part.vectors * max(moving, round(part.after * n * config.d))


def _placed(plan: Plan) -> tuple[LayerPlan, ...]:
    """Return the layers with their places: from the output down, the best place that still has room.

    On a device as many quantized layers as fit come first, and what is left makes some of them dense: reading bytes
    through the bus costs more than dequantizing them there.
    """
    layers = list(plan.layers)
    ram = max(0, (plan.budget.ram or 0) - plan.ram_needed)
    vram = max(0, (plan.budget.vram or 0) - plan.vram_needed)
    if sum(part.count for part in plan.job.sweeps) < 2:  # nothing would be used again
        return plan.layers

    def put(place: str, room: int, size: dict[int, int]) -> int:
        for i in reversed(range(len(layers))):
            if i in size:
                if size[i] > room:
                    break
                room -= size[i]
                layers[i] = replace(layers[i], place=place)
        return room

    if plan.device == "cpu":
        put("dense", ram, {layer.index: layer.dense_bytes for layer in layers})
    else:
        vram = put("device", vram, {layer.index: layer.sweep.nbytes for layer in layers})
        put("pinned", ram, {layer.index: layer.sweep.nbytes for layer in layers if layer.place == "file"})
        more = {e.index: e.dense_bytes - e.sweep.nbytes for e in layers if e.place == "device"}
        put("dense", vram, more)
    return tuple(layers)


# ----------------------------------------------------------------------------------------------------------------------
# Time


class Rates(Protocol):
    """What a machine does per second; `ggjac.bench` measures it."""

    @property
    def disk(self) -> float:
        """Bytes read from the model's disk."""

    @property
    def call(self) -> float:
        """Seconds, not per second: what applying a matrix costs besides its bytes, weights and FLOP."""

    def dequantize(self, type: str) -> float:
        """Weights of a storage type."""

    def gemm(self, columns: int) -> float:
        """FLOP of a product of tiles with so many columns."""


@dataclass(frozen=True)
class Time:
    """Seconds of one part: each share alone, and the whole, in which reading overlaps with the rest."""

    what: str
    count: int
    disk: float
    dequantize: float
    gemm: float
    calls: float

    @property
    def each(self) -> float:
        """Seconds of one pass: the slower of reading and of dequantizing and multiplying in turn, and the calls."""
        return max(self.disk, self.dequantize + self.gemm) + self.calls

    @property
    def total(self) -> float:
        """Seconds of all passes."""
        return self.count * self.each


@dataclass(frozen=True)
class Times:
    """The parts of a job in order; `total` is their sum in seconds."""

    parts: tuple[Time, ...]

    @property
    def total(self) -> float:
        """Seconds of the whole job."""
        return sum(part.total for part in self.parts)


def _times(plan: Plan, rates: Rates, cached: int, free: int) -> Times:
    """Return the times of trace, sweeps and decoding.

    What is not in the page cache comes from the disk. The first sweep begins where the trace ended, and later ones
    alternate their direction, so that each finds in the cache what the one before it left there.
    """
    room = max(0, free - plan.ram_peak)  # for the page cache, beside the job
    dense = _total(layer.sweep for layer in plan.layers if layer.place == "dense")
    streamed = _total(layer.sweep for layer in plan.layers if layer.place != "dense")
    from_file = sum(layer.sweep.nbytes for layer in plan.layers if layer.place == "file")

    def reading(work: Pass) -> float:
        return sum((weights / rates.dequantize(kind) for kind, weights in work.types.items()), start=0.0)

    def whole(what: str, work: Pass, present: int) -> Time:
        """Return the time of one pass that reads all it computes with."""
        missing = max(0, work.nbytes - present)
        gemm = work.flop / rates.gemm(work.columns())
        return Time(what, 1, missing / rates.disk, reading(work), gemm, work.calls * rates.call)

    parts = [whole("trace", plan.trace, cached), whole("logits", plan.head, max(cached, room))]
    if dense.weights:
        ready = Time("making layers ready", 1, max(0, dense.nbytes - room) / rates.disk, reading(dense), 0.0, 0.0)
        parts.append(ready)
    missing = max(0, from_file - room) / rates.disk
    for sweeps in plan.job.sweeps:
        gemm = sweeps.vectors * plan.sweep.flop / rates.gemm(plan.sweep.columns(sweeps.vectors))
        if sweeps.what == "svd":
            gemm += krylov_flop(plan.d * plan.n, plan.job.width, sweeps.count) / rates.gemm(plan.job.width)
        calls = plan.sweep.calls * rates.call
        parts.append(Time(sweeps.what, sweeps.count, missing, reading(streamed), gemm, calls))
    if plan.job.rank:
        parts.append(whole("decoding", plan.decode, room))
    return Times(tuple(parts))
