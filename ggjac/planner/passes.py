"""What a pass over one block reads and computes, and what the block's tape freezes, from a file's header alone.

A sweep reads `attn_v`, `attn_output`, the live half of the feed-forward network and `ffn_down`; of a mixture only the
routed experts. The trace reads all tensors. Sizes are bytes, weights are elements, and FLOP count a multiplication and
an addition as two.

For a mixture, the plan counts as many experts as tokens would use if they were spread evenly over all of them: an upper
bound of the mean, since real routers prefer some.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ggjac.config import Mixture, ModelConfig, fused_parts, norm_places
from ggjac.config.mixers import MIXERS
from ggjac.division import Cut, Division
from ggjac.planner.work import JACOBIAN, Region, Work
from ggjac.sizes import ITEM_BYTES, SLAB, MlpPath, scan_chunk
from ggjac.ways import edge_rows

if TYPE_CHECKING:  # NumPy would be imported for types alone
    from ggjac.gguf import GGUFFile, TensorInfo


@dataclass(frozen=True)
class Pass:
    """One pass over some tensors.

    Attributes:
        nbytes: stored bytes read.
        types: weights dequantized, by storage type.
        flop: for one vector, or of a trace for all positions.
        calls: matrices applied.
        written: floats of products, for one vector, or of a trace for all positions.
        sums: times that ranks which share the model add up what each has of a branch.
        summed: floats that they add up, for one vector going down, or of a trace for all positions.
    """

    nbytes: int = 0
    types: Mapping[str, int] = field(default_factory=dict)
    flop: int = 0
    calls: int = 0
    written: int = 0
    sums: int = 0
    summed: int = 0

    @property
    def weights(self) -> int:
        """Elements dequantized."""
        return sum(self.types.values())

    def columns(self, vectors: int = 1) -> int:
        """Return the mean columns that a weight multiplies: positions times stacked vectors, fewer in experts."""
        return max(1, round(vectors * self.flop / (2 * max(1, self.weights))))

    def scaled(self, factor: float | int) -> "Pass":
        """Return a pass that reads the same and computes `factor` times as much."""
        more = {name: round(factor * getattr(self, name)) for name in ("flop", "written", "summed")}
        return replace(self, **more)

    def __add__(self, other: "Pass") -> "Pass":
        types = Counter(self.types)
        types.update(other.types)
        return Pass(
            self.nbytes + other.nbytes,
            dict(types),
            self.flop + other.flop,
            self.calls + other.calls,
            self.written + other.written,
            self.sums + other.sums,
            self.summed + other.summed,
        )


def total(passes: Iterable[Pass]) -> Pass:
    """Return the sum of some passes."""
    return sum(passes, start=Pass())


@dataclass(frozen=True)
class LayerPlan:
    """One block.

    Attributes:
        index: of the block.
        stored: number of the block in the file; blocks that are applied several times share it.
        stored_bytes: of all its tensors, all experts included.
        sweep: what a sweep of the Jacobian reads and computes, FLOP for one stacked vector.
        trace: what the trace reads and computes.
        kept: weights that may stay in memory between sweeps, each counted once.
        dense_bytes: the same weights in the plan's dtype.
        tape_bytes: of the block's tape.
        place: where its weights stay between sweeps: `"dense"` (dequantized, where the arithmetic takes place),
            `"device"` (quantized, on the device), `"pinned"` (quantized, in the RAM of a machine with a device) or
            `"file"`.
        others: what the sweeps over other regions read and compute.
    """

    index: int
    stored: int
    stored_bytes: int
    sweep: Pass
    trace: Pass
    kept: Pass
    dense_bytes: int
    tape_bytes: int
    place: str = "file"
    others: Mapping[Region, Pass] = field(default_factory=dict)

    def sweep_of(self, region: Region) -> Pass:
        """Return what a sweep over a region reads and computes in this block, FLOP for one stacked vector."""
        return self.sweep if region == JACOBIAN else self.others[region]


def layer_plan(
    file: "GGUFFile",
    config: ModelConfig,
    index: int,
    work: Work,
    mlp_path: MlpPath,
    division: Division | None = None,
) -> LayerPlan:
    """Return the plan of one block for a command's work; with a division, what one rank does of it."""
    config = config if division is None else division.config
    block, item = _Block(file, config, index, division, work.at_once), ITEM_BYTES[work.dtype]

    def sweep_of(region: Region) -> Pass:
        return _sweep(block, config, mlp_path, region, work.input_positions)

    kept = sweep = sweep_of(JACOBIAN)
    if work.reused == "all":
        kept = _each_once(block, config, max(step.region.read or work.n for step in work.sweeps))
    return LayerPlan(
        index=index,
        stored=config.order[index],
        stored_bytes=sum(info.nbytes for info in block.infos),
        sweep=sweep,
        trace=_trace(block, config, mlp_path, work.n, work.n),
        kept=kept,
        dense_bytes=kept.weights * item,
        tape_bytes=_tape_bytes(block, config, mlp_path, work.n, item),
        others={step.region: sweep_of(step.region) for step in work.sweeps if step.region != JACOBIAN},
    )


def embedding(file: "GGUFFile", config: ModelConfig, n: int) -> Pass:
    """Return the reading of the embeddings of `n` tokens, of learned positions, and of the blocks' own inputs."""
    names = (config.embedding, "position_embd.weight", "per_layer_token_embd.weight")
    infos = [file.tensors[name] for name in names if name in file.tensors]
    rows = total(Pass(n * info.row_bytes, {info.type.name: n * info.shape[-1]}) for info in infos)
    return rows + total(matrix(info).scaled(n) for info in _projections(file))


def _projections(file: "GGUFFile") -> "list[TensorInfo]":
    """Return the matrix from embeddings to the inputs of all blocks, if the file has one."""
    name = "per_layer_model_proj.weight"
    return [file.tensors[name]] if name in file.tensors else []


def matrix(info: "TensorInfo") -> Pass:
    """Return the application of a whole matrix to one vector."""
    return Pass(info.nbytes, {info.type.name: info.elements}, 2 * info.elements, 1, info.rows)


def routed_experts(experts: Mixture, positions: int, held: int | None = None) -> int:
    """Return how many experts of a mixture some positions use together, if they are spread evenly; rounded up.

    Of those that one rank holds, if it does not hold all.
    """
    miss = 1 - experts.used / experts.total
    return math.ceil((experts.total if held is None else held) * (1 - miss**positions) - 1e-9)


class _Block:
    """The tensors of one block by the short names that `ggjac.blocks` uses; with a division, one rank's part of them.

    Attributes:
        cuts: the rank's parts of tensors, by stem.
        held: returns how many of some routed experts it has.
        shifts: whether its feed-forward reads the position before, too.
        adds: whether it adds up sums with other ranks.
        at_once: prompts side by side, which use more experts together than each.
        first: whether it is the first, which has what all need once.
    """

    def __init__(
        self, file: "GGUFFile", config: ModelConfig, index: int, division: Division | None = None, at_once: int = 1
    ):
        self.tensors, self.slices = file.tensors, fused_parts(config, index)
        self.index, self.prefix, self.layer = index, config.prefix(index), config.layers[index]
        self.infos = [info for name, info in file.tensors.items() if name.startswith(self.prefix)]
        self.cuts: Mapping[str, Cut] = division.cuts[index] if division else {}
        self.held: Callable[[int], int] = division.experts if division else lambda total: total
        self.shifts = config.row.ffn.startswith("shifted")
        self.adds, self.first = division is not None, division is None or division.rank == 0
        self.at_once = at_once

    def find(self, name: str) -> "tuple[TensorInfo, int] | None":
        """Return the tensor that contains `name`, alone or fused with others, and the number of its rows (elements).

        Of a stack of experts they are those of each; the matrices of heads count as one.
        """
        stem, _, suffix = name.rpartition(".")
        part = self.slices.get(stem)
        info = self.tensors.get(f"{self.prefix}{part.stem}.{suffix}") if part else None
        if info is None:
            part, info = None, self.tensors.get(self.prefix + name)
        if info is None:
            return None
        of_each = info.shape[-2:-1] if "exps." in info.name else (info.rows,)
        rows = of_each[0] if len(info.shape) > 1 else info.shape[-1]
        return info, part.rows(rows) if part else rows

    def linear(self, stem: str, positions: int, experts: int = 0, uses: int = 0) -> Pass:
        """Return one application of a projection and its bias at some positions; an empty pass if the file has none.

        In a stack of experts, `experts` of them are read, and `uses` positions of all of them together multiplied.
        """
        found = self.find(f"{stem}.weight")
        if found is None:
            return Pass()
        info, out = found
        columns, matrices, cut = info.shape[-1], experts or 1, self.cuts.get(stem)
        if cut and cut.axis == "columns":
            columns = cut.size
        elif cut:
            out = cut.size if cut.axis == "rows" else out * cut.size // info.shape[0]
        slabs = math.ceil(columns / SLAB) if stem.startswith("ffn_down") else 1  # each adds a product of its own
        weight = Pass(
            matrices * out * info.row_bytes * columns // info.shape[-1],
            {info.type.name: matrices * out * columns},
            2 * (uses or positions) * out * columns,
            matrices,
            (uses or positions) * out * slabs,
        )
        if cut and cut.axis == "columns" and not self.first:
            return weight
        return weight + self.vector(f"{stem}.bias", matrices if experts else 0)

    def units(self, kind: str, whole: int) -> int:
        """Return the hidden units of a network of a kind, of `whole` in all."""
        cut = self.cuts.get(f"ffn_down{kind}")
        return cut.size if cut else whole

    def vector(self, name: str, experts: int = 0) -> Pass:
        """Return the reading of a vector or of a convolution's taps, or of `experts` rows of a stack of vectors.

        Of several vectors in one, each is read with the others.
        """
        found = self.find(name)
        if found is None:
            return Pass()
        info, rows = found
        if experts:
            return Pass(experts * info.row_bytes, {info.type.name: experts * info.shape[-1]})
        if len(info.shape) == 1:
            return Pass(info.nbytes, {info.type.name: info.elements})
        return Pass(rows * info.row_bytes, {info.type.name: rows * info.shape[-1]})


def _networks(block: _Block, config: ModelConfig, positions: int) -> Iterator[tuple[str, int, int, int]]:
    """Yield kind, experts read, uses and hidden units of each feed-forward network in a block."""
    for experts in config.mixtures(block.layer):
        held = block.held(experts.total)
        if routed := routed_experts(experts, block.at_once * positions, held):
            yield experts.kind, routed, math.ceil(positions * experts.used * held / experts.total), experts.units
    if block.layer.routed and block.find("ffn_up_shexp.weight"):
        yield "_shexp", 0, positions, block.units("_shexp", config.expert_shared_feed_forward_length)
    if block.layer.hidden_units:
        yield "", 0, positions, block.units("", block.layer.hidden_units)


def _sums(block: _Block, config: ModelConfig, n: int, m: int) -> Pass:
    """Return what a rank adds up with the others, going down: of `m` written positions that read `n`.

    Going up, a mixer's sum has `m` positions.
    """
    widths = [n * config.d for mixer in block.layer.mixers if MIXERS[mixer].output in block.cuts]
    dense, shared = ("ffn_down" + kind in block.cuts for kind in ("", "_shexp"))
    # A dense network and experts that read the same are added up at once.
    together = block.layer.routed and block.adds and not config.row.norms.experts_in
    widths += [m * config.d] * (dense and not together)
    if block.layer.routed and block.adds:  # with the shared expert, unless they read a latent
        latent = block.find("ffn_latent_down.weight") is not None
        widths += [m * config.expert_latent, *[m * config.d] * shared] if latent else [m * config.d]
        widths += [m * config.d] * (len(config.mixtures(block.layer)) - 1)
    return Pass(sums=len(widths), summed=sum(widths))


def _live(block: _Block, kind: str, mlp_path: MlpPath) -> str:
    """Return the stem of the projection that stays live; without a gate it is `ffn_up`."""
    return f"ffn_{mlp_path}{kind}" if block.find(f"ffn_gate{kind}.weight") else f"ffn_up{kind}"


def _clamped(config: ModelConfig, block: _Block, kind: str) -> bool:
    """Return whether hidden units of a network have limits."""
    return config.row.activation == "silu_oai" or block.layer.clamp(kind) > 0


def _sweep(block: _Block, config: ModelConfig, mlp_path: MlpPath, region: Region, input_positions: int) -> Pass:
    """Return what a sweep over a region reads and computes in a block.

    FLOP are for one stacked vector, but with the tensors of the forward pass for all positions.
    """
    aboard = len(region.ends(block.index, config.block_count))
    if not aboard:
        return Pass()
    n = region.read or input_positions
    m = region.written or n
    if region.tensors in ("all", "continued"):
        return _trace(block, config, mlp_path, n, m, continued=region.tensors == "continued")
    if region.tensors == "outputs":
        kinds = [MIXERS[mixer] for mixer in block.layer.mixers]
        outputs = total(block.linear(stem, n) for kind in kinds for stem in (kind.output, kind.grouped))
        return outputs.scaled(region.rows) + _opening(block, config, n).scaled(region.rows)
    if region.tensors == "scores":
        return _scores(block, config, n)
    if region.ends_in(block.index, config.block_count):
        m = 1
    parts, p = [], min(n, m + block.shifts)  # positions that the feed-forward reads
    for mixer in block.layer.mixers:
        stems = MIXERS[mixer]
        output = block.linear(stems.output, p) + block.linear(stems.grouped, p)
        taps = block.vector(f"{stems.convolution}.weight") + block.vector(f"{stems.convolution}.bias")
        values = block.linear(stems.values, n) + block.linear(stems.expansion, n)
        parts += [values, taps, output]
        if block.layer.remembered(n):
            parts.append(block.linear(stems.memory, n))
        parts.append(_mix(config, block, mixer, n, p))
        if region.tensors != "live":
            parts += [*_apart(region, config, block, output, values + parts[-1], mixer), taps]
            if block.index in config.writers:  # once more for later blocks
                parts.append(block.linear(stems.values, n))
    if region.tensors == "reads":
        return total(parts)
    for kind, experts, uses, _ in _networks(block, config, m):
        parts += [block.linear(stem, m, experts, uses) for stem in (_live(block, kind, mlp_path), f"ffn_down{kind}")]
    parts += [block.linear(stem, p) for stem in _LAUREL]
    parts += [block.linear(stem, m) for stem in (*_LATENT_EXPERTS, *_INPUTS)]
    small = ["channel_mix_lerp_k", "altup_correct_scale", *["layer_output_scale"] * config.row.stream_scale]
    parts += [block.vector(f"{name}.weight") for name in small]
    parts.append(_opening(block, config, n))
    parts.append(_sums(block, config, n, m))
    # Each vector visits only the blocks of its own map's span: scale by the mean.
    return total(parts) if region.sequential else total(parts).scaled(aboard / max(1, len(region.spans)))


def _apart(
    region: Region, config: ModelConfig, block: _Block, output: Pass, values: Pass, mixer: str
) -> Iterator[Pass]:
    """Yield what a mixer takes more where its heads are looked at one by one, than its output and its values once.

    Its bias is computed beside what it adds; down, the inputs of the heads are read for their shares. For edges, the
    output projection has the cotangents of all readers above, and the values those of each head.
    """
    if region.tensors == "heads":
        yield output.scaled(2)
    elif region.tensors == "written":
        yield Pass(flop=output.flop)
    else:
        rows = edge_rows(config, block.index, region.spans[0][1])
        yield Pass(flop=(rows - 1) * output.flop + (max(1, _heads(config, block, mixer)[0]) - 1) * values.flop)


def _scores(block: _Block, config: ModelConfig, n: int) -> Pass:
    """Return what it takes to split scores: queries and keys, or a recurrence.

    Queries and keys are recorded for the softmax, once more where scores are split, and then applied to parts.
    """
    parts = []
    for mixer in block.layer.mixers:
        own = MIXERS[mixer]
        if own.recurrent and not own.channels:
            taps = [block.vector(f"{own.convolution}.{part}") for part in ("weight", "bias")]
            parts += [block.linear(stem, n) for stem in (*own.frozen, own.values)]
            parts += [*taps, _pattern(config, block, mixer, n, n)]
        for stem in (*own.queries, *own.keys):
            parts += [block.linear(stem, n), block.vector(f"{stem}_norm.weight")] * 3
        if own.softmax:
            parts.append(_pattern(config, block, mixer, n, 1))
    return total(parts)


def _heads(config: ModelConfig, block: _Block, mixer: str) -> tuple[int, int, int]:
    """Return a mixer's heads, and the elements of a value and of a key; a convolution has no heads."""
    if MIXERS[mixer].recurrent:
        own = config.recurrence
        return own.heads, own.value_size, own.key_size
    return (0, 0, 0) if MIXERS[mixer].convolution else (block.layer.heads, block.layer.value_size, block.layer.key_size)


def _mix(config: ModelConfig, block: _Block, mixer: str, n: int, m: int) -> Pass:
    """Return the application of a pattern, by which `m` positions each mix the values of `n`, or that of its scan."""
    heads, value, key = _heads(config, block, mixer)
    if MIXERS[mixer].channels:
        return Pass(flop=2 * heads * key * (2 * n + m), written=2 * heads * key * n)
    chunk = scan_chunk(n, key) if MIXERS[mixer].recurrent else None
    if chunk is None:
        return Pass(flop=2 * heads * value * m * (n + block.layer.remembered(n)))
    entries = 0
    for start in range(0, n, chunk):
        length = min(chunk, n - start)
        written = max(0, min(m - (n - start - length), length))
        entries += written * (length + (key if start else 0))
        entries += 0 if start + length == n else key * (length + (key if start else 0))
    return Pass(flop=2 * heads * value * entries)


def _opening(block: _Block, config: ModelConfig, n: int) -> Pass:
    """Return the making of further streams from the embeddings, before the first block; an empty pass elsewhere."""
    info = block.tensors.get("altup_proj.weight")
    if info is None or not config.opens(block.index):
        return Pass()
    return Pass(info.nbytes, {info.type.name: info.elements}, 2 * n * info.elements, info.shape[0], n * info.rows)


def _pattern(config: ModelConfig, block: _Block, mixer: str, n: int, m: int) -> Pass:
    """Return the computation of a pattern in the forward pass: scores, or a recurrence on the identity.

    At each position the state is read for what is removed, written, and read by the query. Apart from these products, a
    position writes the state three times: decayed, what is added to it, and the sum.
    """
    heads, _, key = _heads(config, block, mixer)
    if MIXERS[mixer].channels:  # there is none
        return Pass()
    if not MIXERS[mixer].recurrent:
        return Pass(flop=2 * heads * key * m * (n + block.layer.remembered(n)))
    chunk = scan_chunk(n, key)
    if chunk is None:
        return _recurrence(heads * key * n, n)
    return _recurrence(heads * key * (chunk + key), math.ceil(n / chunk) * chunk)


def _recurrence(state: int, positions: int) -> Pass:
    """Return a recurrence over some positions, with a state of so many floats."""
    return Pass(flop=6 * state * positions, written=3 * state * positions)


# Around the routed experts: live.
_LATENT_EXPERTS = ("ffn_latent_down", "ffn_latent_up")
# Of a block's own inputs.
_INPUTS = ("inp_gate", "proj")
# Beside attention.
_LAUREL = ("laurel_l", "laurel_r")
# Of the weights of several residual streams: frozen.
_STREAMS = ("hc_attn_fn", "hc_ffn_fn", "altup_router", "altup_predict_coef", "altup_correct_coef")
_LIVE_VECTORS = ("layer_output_scale", "channel_mix_lerp_k", "altup_correct_scale")
_ONCE = (
    *_LAUREL,
    *_LATENT_EXPERTS,
    *_INPUTS,
    *_STREAMS,
    "ffn_gate_inp",
    "channel_mix_receptance",
)
# The first is applied before experts are recorded, too; the second is used by both branches.
_TWICE = ("ffn_latent_down", "altup_router")


def _mixer_stems(block: _Block) -> list[str]:
    """Return all projections of a block's mixers."""
    own, stems = [MIXERS[mixer] for mixer in block.layer.mixers], []
    for mixer in own:
        stems += [*mixer.frozen, mixer.values, mixer.expansion, mixer.memory, mixer.grouped, mixer.output]
        if block.layer.source is not None:
            found = {stem: block.find(f"{stem}.weight") for stem in mixer.sourced}
            stems += [stem for stem, part in found.items() if part and len(part[0].shape) > 1]
    return [stem for stem in stems if stem]


def _stems(block: _Block, kind: str) -> list[str]:
    """Return the projections of a feed-forward network."""
    stems = [f"ffn_gate{kind}", f"ffn_up{kind}", f"ffn_down{kind}"]
    return stems if block.find(f"ffn_gate{kind}.weight") else stems[1:]


def _trace(block: _Block, config: ModelConfig, mlp_path: MlpPath, n: int, m: int, *, continued: bool = False) -> Pass:
    """Return what the last `m` of `n` positions read and compute in the forward pass.

    A recurrence that is continued has a state in place of a pattern.

    Each tensor counts once, but one that is both recorded for a frozen factor and applied as a live one counts twice.
    """
    parts = [block.linear(stem, m) for stem in (*_mixer_stems(block), *_ONCE, *_TWICE)]
    parts += [_opening(block, config, m)] * 2  # recorded, and then applied
    for mixer in block.layer.mixers:
        if continued and MIXERS[mixer].recurrent:
            heads, value, key = _heads(config, block, mixer)
            parts.append(_recurrence(heads * value * key, m))
        else:
            parts += [_pattern(config, block, mixer, n, m), _mix(config, block, mixer, n, m)]
    parts += [block.vector(name) for name in ("exp_probs_b.bias", "exp_probs_b")]
    for kind, experts, uses, _ in _networks(block, config, m):
        stems = _stems(block, kind)
        # A frozen factor that needs the live projection's own output is recorded first, and then applied.
        again = int(len(stems) < 3 or mlp_path == "gate" or config.situ[1] > 0 or _clamped(config, block, kind))
        again += block.find(f"ffn_sub_norm{kind}.weight") is not None
        stems = [*stems, *[_live(block, kind, mlp_path)] * again]
        if experts and block.find("ffn_routed_norm.weight"):  # their sum is recorded
            stems += [_live(block, kind, mlp_path), f"ffn_down{kind}"]
        parts += [block.linear(stem, m, experts, uses) for stem in stems]
    parts += [Pass(info.nbytes, {info.type.name: info.elements}) for info in _small(block, n)]
    if block.adds and block.find("ffn_routed_norm.weight"):
        parts.append(Pass(sums=1, summed=m * config.expert_latent))
    return total([*parts, _sums(block, config, m, m)])


# Of RWKV and of a compressed memory, with more than one axis.
_CONSTANTS = ("time_mix_lerp_fused", "time_mix_first", "attn_compressor_ape")


def _small(block: _Block, n: int) -> Iterator["TensorInfo"]:
    """Yield a block's tensors for `n` positions that are not matrices, nor biases or constant factors of matrices.

    Some have two axes or more: norms with weights for each head, taps of convolutions, constants of recurrences.
    """
    taps = {MIXERS[mixer].convolution.rsplit("_", 1)[0] for mixer in block.layer.mixers}
    unread = set() if block.layer.remembered(n) else {"attn_compressor_ape", "attn_compressor_norm"}
    if block.layer.source is None:
        unread |= {stem for mixer in block.layer.mixers for stem in MIXERS[mixer].sourced}
    for info in block.infos:
        stem, _, suffix = info.name.removeprefix(block.prefix).rpartition(".")
        if stem.startswith("indexer") or stem in unread:
            continue
        shared = any(stem.startswith(name) for name in taps if name)
        if suffix == "weight":
            small = len(info.shape) == 1 or stem.endswith("_norm") or shared or stem in _CONSTANTS
        else:  # constants of a recurrence have no suffix
            alone = stem == "ssm_dt" and not block.find("ssm_dt.weight")
            normed = stem.endswith(("_norm", "_norm_2", "time_mix_ln"))
            small = not stem or (suffix == "bias" and (alone or shared or normed))
        if small:  # several vectors in one are read for each
            parts = sum(part.stem == stem for part in block.slices.values())
            yield from [info] * (parts if parts and len(info.shape) == 1 else 1)


def _each_once(block: _Block, config: ModelConfig, n: int) -> Pass:
    """Return all matrices that `n` positions use, each once."""
    parts = [block.linear(stem, 1) for stem in (*_mixer_stems(block), *_ONCE)]
    for kind, experts, uses, _ in _networks(block, config, n):
        parts += [block.linear(stem, 1, experts, uses) for stem in _stems(block, kind)]
    return total(parts)


def _tape_bytes(block: _Block, config: ModelConfig, mlp_path: MlpPath, n: int, item: int) -> int:
    """Return the bytes of a block's tape: its stream `[n, d]`, norms, patterns `[h, n, n]`, factors `[n, f]`."""
    entry = int(config.normed_entry(block.index))
    floats, other = n * config.width(block.index) + entry * config.d, entry * n * max(4, item)
    if config.turns(block.index):  # weights of both streams, and where there are none yet, the held one
        floats += 2 * n * (2 if block.index else 1) + 2 * config.d * (block.index == 0)
    for mixer in block.layer.mixers:
        floats += _mixer_floats(config, block, mixer, n)
        if MIXERS[mixer].channels:
            other += _channel_floats(config, n) * max(4, item)
        if MIXERS[mixer].expansion:  # the norm of the latent
            floats += block.layer.latent.size
            other += n * max(4, item)
        if MIXERS[mixer].grouped:  # the norms of values and of groups' keys, and both rotations
            for positions in filter(None, (n, block.layer.remembered(n))):
                floats += block.layer.value_size + positions * block.layer.latent.rotary
                other += positions * max(4, item)
    floats += n * config.d * bool(block.find("channel_mix_receptance.weight"))
    floats += n * _stream_floats(config, block.index)
    places = norm_places(config, block.index) + ([("post_norm",)] if config.inputs else [])
    places += [("laurel_post_norm",)] if config.row.laurel else []
    floats += n * config.inputs
    for names in places:
        found = (name for name in names if block.find(f"{name}.weight") or block.find(name))
        name = names[0] if names and not config.row.norm_weights else next(found, None)
        if name is not None:
            floats += config.d * (2 if block.find(f"{name}.bias") else 1)
            other += n * max(4, item)  # one over the root mean square, at least in float32
    for kind, experts, uses, width in _networks(block, config, n):
        constant = _clamped(config, block, kind) or (block.layer.sparsity and mlp_path == "gate")
        floats += uses * width * (2 if constant else 1)
        if experts:
            floats, other = floats + uses, other + uses * 8  # the router's weights, and positions in int64
            if block.find("ffn_routed_norm.weight"):
                floats, other = floats + config.expert_latent, other + n * max(4, item)
        elif kind and block.find(f"ffn_gate_inp{kind}.weight"):
            floats += n
    return floats * item + other


def _stream_floats(config: ModelConfig, index: int) -> int:
    """Return the floats at each position of the weights by which both branches read and write several streams."""
    own = config.streams
    if not own.several:
        return 0
    if config.row.streams == "held":
        return 4 * own.count
    if config.row.streams == "predicted":  # of reading, writing, keeping; and before the first block, factors
        opened = (own.count - 1) * config.opens(index)
        return own.count + 2 * (1 + own.count) + own.count + 2 * own.count * (1 + own.count) + opened
    first, after, floats = own.after(index), own.after(index + 1), 0
    for branch, before in enumerate((first, after)):  # attention may add to the number of streams
        kept = own.rounds or after > before or (branch == 1 and config.row.streams == "input")
        floats += before + after + (after * before if kept else 0)
    return floats


def _mixer_floats(config: ModelConfig, block: _Block, mixer: str, n: int) -> int:
    """Return the floats of a mixer's tape: its pattern `[h, n, n]` or its scan, and its factors."""
    heads, value, key = _heads(config, block, mixer)
    row, own = config.row, block.layer
    read = row.gated_queries or own.gate or row.inner_norms  # factors of what is mixed
    if not MIXERS[mixer].recurrent:
        if MIXERS[mixer].convolution:
            return 2 * n * config.d
        written = 2 if config.attention_clamp else int(config.row.value_norm)
        written *= bool(MIXERS[mixer].values)
        factors = n * (written * own.kv_heads * value + bool(read) * heads * value)
        shares = own.compressed.ratio * own.compressed.windows * value
        return heads * n * n + own.remembered(n) * (heads * n + shares) + factors
    chunk = scan_chunk(n, key)
    factors = (_shifted_factors(block) if config.recurrence.shifted else 2) * n * heads * value
    if MIXERS[mixer].channels:
        return factors
    if chunk is None:
        return heads * n * n + factors
    return heads * math.ceil(n / chunk) * (chunk + key) ** 2 + factors


def _shifted_factors(block: _Block) -> int:
    """Return how many floats the tape of RWKV's mixer has for each value, beside its pattern: shares and factors."""
    gate = any(block.find(f"time_mix_{stem}.weight") for stem in ("gate", "g2"))
    normed = 2 * bool(block.find("time_mix_ln.weight") and block.find("time_mix_ln.bias"))
    return 1 + gate + normed + bool(block.find("time_mix_r_k.weight")) + 2 * (block.layer.source is not None)


def _channel_floats(config: ModelConfig, n: int) -> int:
    """Return the floats of the tape of a recurrence in each channel, of 4 bytes at least each."""
    own = config.recurrence
    return n * (own.heads + 2 * own.key_size) + own.heads * (own.key_size + 1)
