"""What a pass over one block reads and computes, and what the block's tape freezes, from a file's header alone.

A sweep reads `attn_v`, `attn_output`, the live half of the feed-forward network and `ffn_down`; of a mixture only the
routed experts. The trace reads all tensors. Sizes are bytes, weights are elements, and FLOP count a multiplication and
an addition as two.

For a mixture, the plan counts as many experts as tokens would use if they were spread evenly over all of them: an upper
bound of the mean, since real routers prefer some.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ggjac.config import ModelConfig
from ggjac.planner.work import JACOBIAN, Region, Work
from ggjac.sizes import ITEM_BYTES, SLAB, MlpPath

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
        """Return the mean columns that a weight multiplies: positions times stacked vectors, fewer in experts."""
        return max(1, round(vectors * self.flop / (2 * max(1, self.weights))))

    def scaled(self, factor: float | int) -> "Pass":
        """Return a pass that reads the same and computes `factor` times as much."""
        return replace(self, flop=round(factor * self.flop), written=round(factor * self.written))

    def __add__(self, other: "Pass") -> "Pass":
        types = Counter(self.types)
        types.update(other.types)
        return Pass(
            self.nbytes + other.nbytes,
            dict(types),
            self.flop + other.flop,
            self.calls + other.calls,
            self.written + other.written,
        )


def total(passes: Iterable[Pass]) -> Pass:
    """Return the sum of some passes."""
    return sum(passes, start=Pass())


@dataclass(frozen=True)
class LayerPlan:
    """One block.

    Attributes:
        index: of the block.
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


def layer_plan(file: "GGUFFile", config: ModelConfig, index: int, work: Work, mlp_path: MlpPath) -> LayerPlan:
    """Return the plan of one block for a command's work."""
    block, item = _Block(file, config, index), ITEM_BYTES[work.dtype]

    def sweep_of(region: Region) -> Pass:
        return _sweep(block, config, mlp_path, region, work.input_positions)

    kept = sweep = sweep_of(JACOBIAN)
    if work.reused == "all":
        kept = _each_once(block, config, max(step.region.read or work.n for step in work.sweeps))
    return LayerPlan(
        index=index,
        stored_bytes=sum(info.nbytes for info in block.infos),
        sweep=sweep,
        trace=_trace(block, config, mlp_path, work.n, work.n),
        kept=kept,
        dense_bytes=kept.weights * item,
        tape_bytes=_tape_bytes(block, config, work.n, item),
        others={step.region: sweep_of(step.region) for step in work.sweeps if step.region != JACOBIAN},
    )


def embedding(file: "GGUFFile", n: int) -> Pass:
    """Return the reading of the embeddings of `n` tokens, and of their positions where these are learned."""
    names = ("token_embd.weight", "position_embd.weight")
    infos = [file.tensors[name] for name in names if name in file.tensors]
    return total(Pass(n * info.row_bytes, {info.type.name: n * info.shape[-1]}) for info in infos)


def matrix(info: "TensorInfo") -> Pass:
    """Return the application of a whole matrix to one vector."""
    return Pass(info.nbytes, {info.type.name: info.elements}, 2 * info.elements, 1, info.rows)


def routed_experts(config: ModelConfig, positions: int) -> int:
    """Return how many experts of a layer some positions use together, if they are spread evenly; rounded up."""
    if not config.expert_count:
        return 0
    miss = 1 - config.expert_used_count / config.expert_count
    return math.ceil(config.expert_count * (1 - miss**positions) - 1e-9)


class _Block:
    """The tensors of one block by the short names that `ggjac.blocks` uses."""

    def __init__(self, file: "GGUFFile", config: ModelConfig, index: int):
        self.tensors, self.slices, self.index, self.prefix = file.tensors, config.slices, index, f"blk.{index}."
        self.infos = [info for name, info in file.tensors.items() if name.startswith(self.prefix)]

    def find(self, name: str) -> "tuple[TensorInfo, int] | None":
        """Return the tensor that contains `name`, alone or fused with others, and the number of its rows (elements)."""
        stem, suffix = name.rsplit(".", 1)
        fused, start, stop = self.slices.get(stem, ("", 0, 0))
        info = self.tensors.get(f"{self.prefix}{fused}.{suffix}") if fused else None
        if info is not None:
            return info, stop - start
        info = self.tensors.get(self.prefix + name)
        return None if info is None else (info, info.shape[-2] if len(info.shape) > 1 else info.shape[-1])

    def linear(self, stem: str, positions: int, experts: int = 0, uses: int = 0) -> Pass:
        """Return one application of a projection and its bias at some positions; an empty pass if the file has none.

        In a stack of experts, `experts` of them are read, and `uses` positions of all of them together multiplied.
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
        """Return the reading of a vector, or of `experts` rows of a stack of them."""
        found = self.find(name)
        if found is None:
            return Pass()
        info, elements = found
        if experts:
            return Pass(experts * info.row_bytes, {info.type.name: experts * info.shape[-1]})
        return Pass(elements * info.row_bytes // info.shape[-1], {info.type.name: elements})


def _networks(block: _Block, config: ModelConfig, positions: int) -> Iterator[tuple[str, int, int, int]]:
    """Yield kind, experts read, uses and hidden units of each feed-forward network in a block."""
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


def _sweep(block: _Block, config: ModelConfig, mlp_path: MlpPath, region: Region, input_positions: int) -> Pass:
    """Return what a sweep over a region reads and computes in a block.

    FLOP are for one stacked vector, but with the tensors of the forward pass for all positions.
    """
    spans = region.spans or ((0, config.block_count),)
    ends = [last for first, last in spans if first <= block.index < last]
    if not ends:
        return Pass()
    n = region.read or input_positions
    m = region.written or n
    if region.tensors == "all":
        return _trace(block, config, mlp_path, n, m)
    if region.written is None and set(ends) == {block.index + 1}:
        m = 1
    output = block.linear("attn_output", m)
    parts = [block.linear("attn_v", n), _mix(config, n, m), output]
    if region.tensors == "heads":  # once more for what it adds and for its bias, and once for the head's shares
        parts.append(output.scaled(2))
    for kind, experts, uses, _ in _networks(block, config, m):
        parts += [block.linear(stem, m, experts, uses) for stem in (_live(block, kind, mlp_path), f"ffn_down{kind}")]
    # Each vector visits only the blocks of its own map's span: scale by the mean.
    return total(parts) if region.sequential else total(parts).scaled(len(ends) / len(spans))


def _mix(config: ModelConfig, n: int, m: int) -> Pass:
    """Return the application of the attention pattern: `m` query positions each mix the values of `n` positions."""
    return Pass(flop=2 * config.head_count * config.head_size * m * n)


_ONCE = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate_inp")


def _stems(block: _Block, kind: str) -> list[str]:
    """Return the projections of a feed-forward network."""
    stems = [f"ffn_gate{kind}", f"ffn_up{kind}", f"ffn_down{kind}"]
    return stems if block.find(f"ffn_gate{kind}.weight") else stems[1:]


def _trace(block: _Block, config: ModelConfig, mlp_path: MlpPath, n: int, m: int) -> Pass:
    """Return what the last `m` of `n` positions read and compute in the forward pass.

    Each tensor counts once, but one that is both recorded for a frozen factor and applied as a live one counts twice.
    """
    parts = [block.linear(stem, m) for stem in _ONCE]
    if config.attention_clamp:  # the values themselves show where they are clamped: computed first, then applied
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
    # Head norms with separate weights for each head are small tensors with two axes.
    vectors = (
        info
        for info in block.infos
        if info.name.endswith("_norm.weight") or (len(info.shape) == 1 and not info.name.endswith(".bias"))
    )
    parts += [Pass(info.nbytes, {info.type.name: info.elements}) for info in vectors]
    return total(parts)


def _each_once(block: _Block, config: ModelConfig, n: int) -> Pass:
    """Return all matrices that `n` positions use, each once."""
    parts = [block.linear(stem, 1) for stem in _ONCE]
    for kind, experts, uses, _ in _networks(block, config, n):
        parts += [block.linear(stem, 1, experts, uses) for stem in _stems(block, kind)]
    return total(parts)


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
            other += n * max(4, item)  # one over the root mean square, at least in float32
    clamped = config.row.activation == "silu_oai"
    for kind, experts, uses, width in _networks(block, config, n):
        floats += uses * width * (1 + clamped)
        if experts:
            floats, other = floats + uses, other + uses * 8  # the router's weights, and positions in int64
        elif kind and block.find(f"ffn_gate_inp{kind}.weight"):
            floats += n
    return floats * item + other
