"""Will it fit, and how long will it take? Answered from a file's header and a prompt's length, without any arithmetic.

A job (`ggjac.planner.work`) is a trace and some sweeps. For each layer the plan says what a sweep reads (`attn_v`,
`attn_output`, the live half of the feed-forward, `ffn_down`, and of a mixture the routed experts only), what is frozen,
and where the weights wait between sweeps. Peak memory is the sum of parts, each a formula below; time comes from rates
measured elsewhere (`ggjac.planner.bench`). Sizes are bytes, weights are elements, FLOP count a multiplication and an
addition as two.

Of a mixture of experts, the plan counts as many experts as tokens would use if they were spread evenly over all: an
upper bound of the mean, since real routers prefer some.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from ggjac.config import ModelConfig
from ggjac.gguf import GGUFFile, TensorInfo
from ggjac.planner import machine, work
from ggjac.planner.work import SWEEP, Job, Lookup, Over, PlanError, Sweeps
from ggjac.sizes import ITEM_BYTES, ON_THE_WAY, SLAB, TILE_ELEMENTS, MlpPath

# Anonymous memory of a process that has imported torch and opened a model, before it does anything: measured, Linux.
BASE_BYTES = {"cpu": 160 << 20, "cuda": 900 << 20}
# Buffers of the matrix library and of the allocator, of each thread; and what CUDA keeps on the device for itself.
THREAD_BYTES = 8 << 20
CONTEXT_BYTES = 600 << 20
# Of each weight while torch dequantizes it on a device, the result included: measured, of the type that needs most. The
# tile before it is there meanwhile.
DEQUANTIZING_BYTES = 14
# Commands whose dense rows all come at once where there is room for them.
DENSE = ("jacobian", "norms")


class NoFitError(PlanError):
    """The job needs more memory than its budget; the message says how much, and what to lower."""

    will_not_fit = True


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
        written: floats of products, for one vector, or of a trace for all positions.
    """

    nbytes: int = 0
    types: Mapping[str, int] = field(default_factory=dict)
    flop: int = 0
    calls: int = 0
    written: int = 0

    @property
    def weights(self) -> int:
        """Elements dequantized."""
        return sum(self.types.values())

    def columns(self, vectors: int = 1) -> int:
        """Return what a weight is multiplied by, on the average: positions times stacked vectors, fewer in experts."""
        return max(1, round(vectors * self.flop / (2 * max(1, self.weights))))

    def times(self, share: float | int) -> "Pass":
        """Return the same reading with so many times the arithmetic."""
        return replace(self, flop=round(share * self.flop), written=round(share * self.written))

    def __add__(self, other: "Pass") -> "Pass":
        types = Counter(self.types)
        types.update(other.types)
        flop, calls, written = self.flop + other.flop, self.calls + other.calls, self.written + other.written
        return Pass(self.nbytes + other.nbytes, dict(types), flop, calls, written)


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
        kept: what may wait between passes, each weight once.
        dense_bytes: the same in the plan's dtype.
        tape_bytes: what is frozen.
        place: where it waits: `"dense"` (ready to multiply, on the device), `"device"` (quantized, on the device),
            `"pinned"` (quantized, in RAM beside a device) or `"file"`.
        others: what other passes of the job read and compute.
    """

    index: int
    stored_bytes: int
    sweep: Pass
    trace: Pass
    kept: Pass
    dense_bytes: int
    tape_bytes: int
    place: str = "file"
    others: Mapping[Over, Pass] = field(default_factory=dict)

    def over(self, part: Over) -> Pass:
        """Return what a pass reads and computes here."""
        return self.sweep if part == SWEEP else self.others[part]


class _Block:
    """The tensors of one block by the short names under which `ggjac.blocks` asks for them."""

    def __init__(self, file: GGUFFile, config: ModelConfig, index: int):
        self.tensors, self.slices, self.index, self.prefix = file.tensors, config.slices, index, f"blk.{index}."
        self.infos = [info for name, info in file.tensors.items() if name.startswith(self.prefix)]

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
        slabs = math.ceil(columns / SLAB) if stem.startswith("ffn_down") else 1  # each adds a product of its own
        weight = Pass(
            matrices * out * info.row_bytes,
            {info.type.name: matrices * out * columns},
            2 * (uses or positions) * out * columns,
            matrices,
            (uses or positions) * out * slabs,
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
    if config.routed(block.index):
        routed, uses = routed_experts(config, positions), positions * config.expert_used_count
        yield "_exps", routed, uses, config.expert_feed_forward_length
        if block.find("ffn_up_shexp.weight"):
            yield "_shexp", 0, positions, config.expert_shared_feed_forward_length
    else:
        yield "", 0, positions, config.feed_forward_length


def _live(block: _Block, kind: str, mlp_path: MlpPath) -> str:
    """Return the stem of the projection that stays live; without a gate it is `ffn_up`."""
    return f"ffn_{mlp_path}{kind}" if block.find(f"ffn_gate{kind}.weight") else f"ffn_up{kind}"


def _pass(block: _Block, config: ModelConfig, mlp_path: MlpPath, over: Over, reached: int) -> Pass:
    """Return what a pass reads and computes in a block: for one vector, or of the forward pass for all positions."""
    spans = over.spans or ((0, config.block_count),)
    ends = [last for first, last in spans if first <= block.index < last]
    if not ends:
        return Pass()
    n = over.read or reached
    m = over.written or n
    if over.tensors == "all":
        return _trace_pass(block, config, mlp_path, n, m)
    if over.written is None and set(ends) == {block.index + 1}:
        m = 1
    output = block.linear("attn_output", m)
    parts = [block.linear("attn_v", n), _mix(config, n, m), output]
    if over.tensors == "heads":  # once more for what it adds and for its bias, and once for the head's shares
        parts.append(output.times(2))
    for kind, experts, uses, _ in _networks(block, config, m):
        parts += [block.linear(stem, m, experts, uses) for stem in (_live(block, kind, mlp_path), f"ffn_down{kind}")]
    work = _total(parts)
    # Of maps that advance together, not all are there; a vector of all is on the average in so many of the blocks.
    return work if over.apart else work.times(len(ends) / len(spans))


def _mix(config: ModelConfig, n: int, m: int) -> Pass:
    """Return the attention pattern at work: every query position takes from every key position."""
    return Pass(flop=2 * config.head_count * config.head_size * m * n)


_ONCE = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate_inp")


def _stems(block: _Block, kind: str) -> list[str]:
    """Return the projections of a feed-forward network."""
    stems = [f"ffn_gate{kind}", f"ffn_up{kind}", f"ffn_down{kind}"]
    return stems if block.find(f"ffn_gate{kind}.weight") else stems[1:]


def _trace_pass(block: _Block, config: ModelConfig, mlp_path: MlpPath, n: int, m: int) -> Pass:
    """Return what the last `m` of `n` positions read and compute: each tensor once, but what is frozen and live twice.

    Of the trace, all positions.
    """
    parts = [block.linear(stem, m) for stem in _ONCE]
    if config.attention_clamp:  # where values are clamped is recorded from themselves
        parts.append(block.linear("attn_v", m))
    parts += [_mix(config, n, m), _mix(config, n, m)]  # scores cost as much as their use
    parts.append(block.vector("exp_probs_b.bias"))
    clamped = config.row.activation == "silu_oai"
    for kind, experts, uses, _ in _networks(block, config, m):
        stems = _stems(block, kind)
        # A frozen factor that needs the live projection's own output is recorded first, and then applied.
        if len(stems) < 3 or mlp_path == "gate" or clamped:
            stems = [*stems, _live(block, kind, mlp_path)]
        parts += [block.linear(stem, m, experts, uses) for stem in stems]
    # Norms of heads by weights of their own are small tensors with two axes.
    vectors = (
        info
        for info in block.infos
        if info.name.endswith("_norm.weight") or (len(info.shape) == 1 and not info.name.endswith(".bias"))
    )
    parts += [Pass(info.nbytes, {info.type.name: info.elements}) for info in vectors]
    return _total(parts)


def _whole(block: _Block, config: ModelConfig, n: int) -> Pass:
    """Return all matrices that `n` positions use, each once."""
    parts = [block.linear(stem, 1) for stem in _ONCE]
    for kind, experts, uses, _ in _networks(block, config, n):
        parts += [block.linear(stem, 1, experts, uses) for stem in _stems(block, kind)]
    return _total(parts)


def _tape_bytes(block: _Block, config: ModelConfig, n: int, item: int) -> int:
    """Return the bytes of a block's tape: its stream `[n, d]`, norms, patterns `[h, n, n]`, factors `[n, f]`."""
    floats, other = n * config.d + config.head_count * n * n, 0
    if config.attention_clamp:
        floats += 2 * n * config.head_count_kv * config.head_size
    norms = config.row.norms
    for names in (norms.attention_in, norms.attention_out, norms.ffn_in, norms.ffn_out):
        name = next((name for name in names if config.row.norm == "bare" or block.find(f"{name}.weight")), None)
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

    What is alive at once, counted in the code of `linop`, `blocks` and `jacobian`, and found so by the allocator's own
    count; `d`, `q` and `kv` are the widths of the stream, of all query heads and of all value heads, `s` that of a slab
    of hidden units:

        up, attention        stream, normed stream, values, and mixed heads twice (or once, with the output)
        up, feed-forward     stream, middle, normed middle, the sum over slabs or experts, hidden units
                             before and after the gate, what experts gather, and give
        down, attention      stream, middle, heads twice, values (or heads once, what they give the stream, and that
                             normed, or centred before)
        down, feed-forward   stream, the sum over slabs or experts, hidden units twice (or once, with one slab's
                             output), and what experts gather

    Each time but the first of "down", one stream that the block before has left. Downwards, what a norm or a scale
    after a branch makes of the stream comes on top, or what parallel branches share. An expert's own part, hidden units
    among it, is of the positions that use it.
    """
    d, q, kv, row = config.d, config.head_count * config.head_size, config.head_count_kv * config.head_size, config.row
    scaled = row.norms.attention_out or row.norms.ffn_out or config.residual_scale != 1
    more = d if scaled or row.parallel else 0
    if up:
        return max(n * (3 * d + kv + q + max(q, d)), _ffn_floats(config, n, 4 * d, 0, lambda s: 2 * s, 2 * d))
    centred = d if more or row.norm != "rms" else 0
    attention = n * max(2 * d + 2 * q + kv, 4 * d + q + centred)
    return max(attention, _ffn_floats(config, n, 2 * d + more, d, lambda s: max(2 * s, s + d), d))


def alone_floats(config: ModelConfig, n: int, *, up: bool) -> int:
    """Return what `sweep_floats` does for maps of one block by itself, of whose positions only the last is written.

        up     stream, normed stream, values twice (or centred stream)
        down   values twice, or once and what they give the stream; or that, normed, and centred before

    There are `n` of them. Where it is written, what `sweep_floats` counts for one position, before or after.
    """
    d, kv, row = config.d, config.head_count_kv * config.head_size, config.row
    once, centred = sweep_floats(config, 1, up=up), d if row.norm != "rms" else 0
    if up:
        normed = d if row.norms.attention_in else 0
        return n * d + max(n * (normed + max(2 * kv, centred)), once)
    return max(n * max(2 * kv, kv + d, 2 * d + centred), once)


def _ffn_floats(
    config: ModelConfig, n: int, stream: int, summed: int, hidden: Callable[[int], int], gathered: int
) -> int:
    """Return the floats of a feed-forward branch: of the stream and of a slab at each position, and of experts.

    Of a mixture, the sum over experts comes on top, and what a shared one adds. Where the first blocks are none, what
    takes more counts.

    Routers are uneven, and nobody knows them before: the busiest expert is taken to see half of the positions, or twice
    as many as if they were spread evenly, and one more.
    """

    def network(width: int) -> int:
        return hidden(min(SLAB, width)) + (config.d if width > SLAB else 0)

    dense = 0 if config.routed(0) else n * (stream + network(config.feed_forward_length))
    if not config.routed(config.block_count - 1):
        return dense
    busy = min(n, max(n // 2, 2 * n * config.expert_used_count // config.expert_count) + 1)
    routed = busy * (gathered + network(config.expert_feed_forward_length))
    shared = config.expert_shared_feed_forward_length
    if shared:
        return max(dense, n * (stream + summed + config.d) + max(routed, n * network(shared)))
    return max(dense, n * (stream + summed) + routed)


def trace_floats(config: ModelConfig, n: int, m: int | None = None) -> int:
    """Return the floats that `m` of `n` positions (default all) take on their way through the forward pass.

    Beside tapes: streams, projections, and scores in float32.
    """
    m = n if m is None else m
    q, kv = config.head_count * config.head_size, config.head_count_kv * config.head_size
    hidden = config.hidden_units * (4 if config.row.activation == "xielu" else 3)
    return m * (4 * config.d + max(2 * (q + 2 * kv), hidden)) + 3 * config.head_count * m * n


def basis_floats(config: ModelConfig, n: int, width: int, sweeps: int) -> int:
    """Return the floats of both Krylov bases after so many sweeps.

    Every downward sweep adds a block of the input space, `[width, n, d]`, every upward one a block of the output space,
    `[width, d]`, beside the one to begin with. Orthogonalising a product takes less than the sweep that brought it.
    """
    down, up = math.ceil(sweeps / 2), sweeps // 2
    return width * config.d * (down * n + up + 1)


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

    @classmethod
    def of(cls, ram: int | None, vram: int | None, device: str) -> "Budget":
        """Return a budget: what is None is half of the memory that is free, and all of the named device's that is."""
        return cls(
            machine.default_budget() if ram is None else ram, machine.default_vram(device) if vram is None else vram
        )


@dataclass(frozen=True)
class Plan:
    """What a job needs, layer by layer and in all.

    Attributes:
        job: what is to be done.
        d: embedding length.
        mlp_path, device: as the commands take them; device is `"cpu"` or `"cuda"`.
        layers: one row per block.
        embedding: taking the prompt's embeddings.
        head: the logits of one position.
        nearest: comparing one vector with all input embeddings.
        ram, vram: bytes by part, at the peak; without what stays resident by choice. Empty `vram` on the CPU.
        budget: what may be used.
        file_bytes: of all shards.
        tapes_on_disk: tapes are kept in a folder, one at a time in memory.
    """

    job: Job
    d: int
    mlp_path: MlpPath
    device: str
    layers: tuple[LayerPlan, ...]
    embedding: Pass
    head: Pass
    nearest: Pass
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
        return self.over(SWEEP)

    def over(self, part: Over) -> Pass:
        """Return a pass over the blocks, FLOP for one stacked vector."""
        return _total(layer.over(part) for layer in self.layers)

    def lookup(self, step: Lookup) -> Pass:
        """Return a pass over the vocabulary, FLOP for all its vectors."""
        parts = (self.head, step.logits + step.head), (self.nearest, step.embedding)
        return _total(work.times(vectors) for work, vectors in parts if vectors)

    @property
    def columns(self) -> list[int]:
        """Columns of the products to come, on the average; see `Pass.columns`."""
        found = {self.trace.columns(), *(self.lookup(step).columns() for step in self.job.lookups)}
        return sorted(found | {self.over(step.over).columns(step.vectors) for step in self.job.sweeps})

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
            layer.dense_bytes if place == "dense" else layer.kept.nbytes
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
    many = "ask for fewer --layers" if plan.job.maps else "lower --rank, or use fewer tokens"
    lower = {
        "tapes": "use fewer tokens" if plan.tapes_on_disk else "keep tapes on disk with --trace FOLDER",
        "bases": many,
        "vectors": many if plan.job.width else "use fewer tokens",
        "trace": "use fewer tokens",
        "portraits": "use fewer tokens",
        "cache": "use fewer tokens, or fewer --max-tokens",
    }
    if plan.job.prompts > 1 or plan.job.reused == "all":  # several texts, none of whose tapes are kept
        lower["tapes"] = "use fewer tokens"
    advice = [lower[part] for part, _ in _largest(parts, len(parts)) if part in lower and parts[part] > needed / 8]
    enough = f"{option} {math.ceil(needed / 2**26) * 64}MiB"
    return "; ".join([*dict.fromkeys(advice), f"or give {enough}" if advice else f"give {enough}"])


def fitting(
    file: GGUFFile, config: ModelConfig, command: str, n: int, dtype: str, asked: Mapping[str, Any], **options: Any
) -> Plan:
    """Return the first plan that fits: dense rows in the largest chunks that do, tapes in memory or else in a folder.

    Args:
        file, config: as `make` takes them.
        command, n, dtype, asked: as `ggjac.planner.work.job` takes them, but `chunk_bytes`.
        options: of `make`; `tapes_on_disk` says that there is a folder for them.

    Returns:
        A plan; where none fits, the one that needs least.

    Raises:
        PlanError: as `make`.
    """
    whole, usual = work.all_rows(config, n, dtype), work.CHUNK_BYTES
    chunks = [whole] if command in DENSE and whole > usual else []
    folders = (False, True) if options.pop("tapes_on_disk", False) else (False,)
    tried: list[Plan] = []
    for chunk in [*chunks, *(max(1, usual >> by) for by in (0, 2, 4, 6))]:
        job = work.job(command, config, n, dtype, **asked, chunk_bytes=chunk)
        if tried and job.steps == tried[-1].job.steps:
            continue
        for folder in folders:
            tried.append(make(file, config, job, tapes_on_disk=folder, **options))
            if tried[-1].fits:
                return tried[-1]
    return min(tried, key=lambda plan: plan.ram_needed + plan.vram_needed)


def make(
    file: GGUFFile,
    config: ModelConfig,
    job: Job,
    *,
    mlp_path: MlpPath = "up",
    device: str = "cpu",
    threads: int = 1,
    budget: Budget | None = None,
    tapes_on_disk: bool = False,
) -> Plan:
    """Plan a job.

    Args:
        file: the open model; only its header is read.
        config: its sizes.
        job: what is to be done, from `ggjac.planner.work.job`.
        mlp_path: which factor of a gated feed-forward stays live.
        device: `"cpu"`, or `"cuda"` for any device with memory of its own.
        threads: on the CPU; each has buffers.
        budget: what may be used; default half of the free RAM.
        tapes_on_disk: keep tapes in a folder and one at a time in memory.
    """
    layers = tuple(_layer(file, config, i, job, mlp_path) for i in range(config.block_count))
    embeddings = [file.tensors[name] for name in ("token_embd.weight", "position_embd.weight") if name in file.tensors]
    taken = (Pass(job.n * info.row_bytes, {info.type.name: job.n * info.shape[-1]}) for info in embeddings)
    head = file.tensors.get("output.weight", file.tensors["token_embd.weight"])
    parts = _memory(file, config, job, layers, threads, device, tapes_on_disk)
    plan = Plan(
        job=job,
        d=config.d,
        mlp_path=mlp_path,
        device="cpu" if device == "cpu" else "cuda",
        layers=layers,
        embedding=_total(taken),
        head=_rows(head),
        nearest=_rows(file.tensors["token_embd.weight"]),
        ram=parts if device == "cpu" else {"process": BASE_BYTES["cuda"], "on the way": _on_the_way(file, pinned=True)},
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


def _layer(file: GGUFFile, config: ModelConfig, index: int, job: Job, mlp_path: MlpPath) -> LayerPlan:
    block, item = _Block(file, config, index), ITEM_BYTES[job.dtype]

    def over(part: Over) -> Pass:
        return _pass(block, config, mlp_path, part, job.reached)

    sweep = over(SWEEP)
    kept = sweep
    if job.reused == "all":
        kept = _whole(block, config, max(step.over.read or job.n for step in job.sweeps))
    return LayerPlan(
        index=index,
        stored_bytes=sum(info.nbytes for info in block.infos),
        sweep=sweep,
        trace=_trace_pass(block, config, mlp_path, job.n, job.n),
        kept=kept,
        dense_bytes=kept.weights * item,
        tape_bytes=_tape_bytes(block, config, job.n, item),
        others={step.over: over(step.over) for step in job.sweeps if step.over != SWEEP},
    )


def _rows(info: TensorInfo) -> Pass:
    """Return one pass over a whole matrix with one vector."""
    return Pass(info.nbytes, {info.type.name: info.elements}, 2 * info.elements, 1, info.rows)


def _memory(
    file: GGUFFile,
    config: ModelConfig,
    job: Job,
    layers: tuple[LayerPlan, ...],
    threads: int,
    device: str,
    tapes_on_disk: bool,
) -> dict[str, int]:
    """Return the bytes of each part where the arithmetic takes place, at the peak.

    Trace and steps come one after another: of their working memory the largest counts.
    """
    item = ITEM_BYTES[job.dtype]
    elements = min(TILE_ELEMENTS, max(info.elements for info in file.tensors.values()))
    tile = elements * (item if device == "cpu" else item + DEQUANTIZING_BYTES)
    tapes = [layer.tape_bytes for layer in layers] if job.tapes else [0]
    steps = [{"trace": trace_floats(config, job.n) * max(4, item)}]
    steps += [_sweeping(config, job, step) for step in job.sweeps]
    steps += [_looking(config, job, step) for step in job.lookups]
    largest = max(steps, key=lambda parts: sum(parts.values()))
    return {
        "process": BASE_BYTES["cpu"] + threads * THREAD_BYTES if device == "cpu" else CONTEXT_BYTES,
        "tapes": max(tapes) * 2 if tapes_on_disk else sum(tapes),
        "tile": tile,
        **({} if device == "cpu" else {"on the way": _on_the_way(file)}),
        **job.kept,
        **{part: size for part, size in largest.items() if size},
    }


def _on_the_way(file: GGUFFile, *, pinned: bool = False) -> int:
    """Return the bytes of tiles that are on their way to a device; torch rounds what it pins up to a power of two."""
    largest = max(math.ceil(min(TILE_ELEMENTS, i.elements) * i.nbytes / i.elements) for i in file.tensors.values())
    return ON_THE_WAY * (1 << (largest - 1).bit_length() if pinned else largest)


def _sweeping(config: ModelConfig, job: Job, step: Sweeps) -> dict[str, int]:
    """Return the working memory of a sweep: stacked vectors on their way or when they have arrived, and bases."""
    item = ITEM_BYTES[job.dtype]
    work = max(4, item)  # of bases, of softmax: float32 at least
    n = step.over.read or job.reached
    if step.over.tensors == "all":
        moving = trace_floats(config, n, step.over.written or n) * work
    else:
        rounded = bool(step.krylov) and item < work  # what a basis holds, in the dtype of the sweep
        there = (alone_floats if step.over.apart else sweep_floats)(config, n, up=step.up)
        moving = (there + (step.copies + rounded) * n * config.d) * item
    bases = sum(k.maps * basis_floats(config, k.positions, k.width, k.sweeps) for k in step.krylov) // step.over.turns
    arrived = round(step.after * job.n * config.d) * item
    return {"vectors": step.vectors * max(moving, arrived), "bases": bases * work, **step.held}


def _looking(config: ModelConfig, job: Job, step: Lookup) -> dict[str, int]:
    """Return the working memory of a pass over the vocabulary: scores of a tile and the vectors, or all logits."""
    vectors = max(step.head, step.embedding)
    scores = vectors * (4 * min(TILE_ELEMENTS // config.d, config.vocabulary) + 2 * config.d)
    return {"decoding": (scores + 3 * step.logits * config.vocabulary) * max(4, ITEM_BYTES[job.dtype])}


def _placed(plan: Plan) -> tuple[LayerPlan, ...]:
    """Return the layers with their places: from the output down, the best place that still has room.

    On a device as many quantized layers as fit come first, and what is left makes some of them dense: reading bytes
    through the bus costs more than dequantizing them there.
    """
    layers = list(plan.layers)
    ram = max(0, (plan.budget.ram or 0) - plan.ram_needed)
    vram = max(0, (plan.budget.vram or 0) - plan.vram_needed)
    if sum(step.count for step in plan.job.sweeps) < 2:  # nothing would be used again
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
        vram = put("device", vram, {layer.index: layer.kept.nbytes for layer in layers})
        put("pinned", ram, {layer.index: layer.kept.nbytes for layer in layers if layer.place == "file"})
        more = {e.index: e.dense_bytes - e.kept.nbytes for e in layers if e.place == "device"}
        put("dense", vram, more)
    return tuple(layers)


# ----------------------------------------------------------------------------------------------------------------------
# Time


class Rates(Protocol):
    """What a machine does per second; `ggjac.planner.bench` measures it."""

    @property
    def disk(self) -> float:
        """Bytes read from the model's disk."""

    @property
    def bus(self) -> float:
        """Bytes copied to the device; infinite where there is none."""

    @property
    def copy(self) -> float:
        """Bytes of memory read and written together."""

    @property
    def touch(self) -> float:
        """Bytes of memory that is used for the first time: the system clears it, page by page."""

    @property
    def call(self) -> float:
        """Seconds, not per second: what applying a matrix costs besides its bytes, weights and FLOP."""

    def dequantize(self, type: str) -> float:
        """Weights of a storage type."""

    def gemm(self, columns: int) -> float:
        """FLOP of a product of tiles with so many columns."""


@dataclass(frozen=True)
class Time:
    """Seconds of one part: each share alone, and the whole, in which reading and copying overlap with the rest."""

    what: str
    count: int
    disk: float
    bus: float
    dequantize: float
    gemm: float
    writes: float
    calls: float

    @property
    def each(self) -> float:
        """Seconds of one pass: the slowest of reading, copying, and what takes turns with each other; and calls."""
        return max(self.disk, self.bus, self.dequantize + self.gemm + self.writes) + self.calls

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
    """Return the times of the trace and of each step.

    What is not in the page cache comes from the disk. The first sweep begins where the trace ended, and later ones
    alternate their direction, so that each finds in the cache what the one before it left there.
    """
    room = max(0, free - plan.ram_peak)  # for the page cache, beside the job
    dense = _total(layer.kept for layer in plan.layers if layer.place == "dense")
    prompts = plan.job.prompts

    def reading(types: Mapping[str, int]) -> float:
        return sum((weights / rates.dequantize(kind) for kind, weights in types.items()), start=0.0)

    def writing(floats: int) -> float:
        """Return the seconds that products take to be written, and once more what is made of each elementwise."""
        return 2 * floats * ITEM_BYTES[plan.job.dtype] / rates.touch

    def whole(what: str, count: int, work: Pass, present: int) -> Time:
        """Return the time of passes that read all they compute with."""
        missing = max(0, work.nbytes - present)
        gemm = work.flop / rates.gemm(work.columns())
        disk, bus = missing / rates.disk, work.nbytes / rates.bus
        writes, calls = writing(work.written), work.calls * rates.call
        return Time(what, count, disk, bus, reading(work.types), gemm, writes, calls)

    def sweeps(step: Sweeps) -> Time:
        """Return the time of passes that find some weights where they wait."""
        streamed: Counter[str] = Counter()
        from_file = copied = 0
        for layer in plan.layers:
            here, waiting = layer.over(step.over), layer.kept
            streamed += Counter(here.types) - Counter(waiting.types if layer.place == "dense" else {})
            from_file += max(0, here.nbytes - (0 if layer.place == "file" else waiting.nbytes))
            copied += max(0, here.nbytes - (waiting.nbytes if layer.place in ("device", "dense") else 0))
        work = plan.over(step.over)
        gemm = step.vectors * work.flop / rates.gemm(work.columns(step.vectors))
        for k in step.krylov:
            share = k.maps * k.sweeps / step.count
            gemm += share * krylov_flop(plan.d * k.positions, k.width, k.sweeps) / rates.gemm(k.width)
        if plan.device == "cpu":  # weights that wait ready to multiply come from memory, not from the cache
            ready = work.weights - streamed.total()
            gemm += ready * ITEM_BYTES[plan.job.dtype] / rates.copy
        disk = max(0, from_file - room) / rates.disk
        bus = copied / rates.bus
        writes, calls = writing(step.vectors * work.written), work.calls * rates.call
        return Time(step.what, prompts * step.count, disk, bus, reading(streamed), gemm, writes, calls)

    parts = [whole("trace", prompts, plan.trace, cached)]
    made_ready = not dense.weights
    for step in plan.job.steps:
        if isinstance(step, Lookup):
            parts.append(whole(step.what, prompts * step.count, plan.lookup(step), room))
            continue
        if not made_ready:
            disk, made_ready = max(0, dense.nbytes - room) / rates.disk, True
            made = reading(dense.types) + dense.weights * ITEM_BYTES[plan.job.dtype] / rates.touch
            bus = dense.nbytes / rates.bus
            parts.append(Time("making layers ready", plan.job.readied, disk, bus, made, 0.0, 0.0, 0.0))
        parts.append(sweeps(step))
    return Times(tuple(parts))
