"""Peak memory of a command's work, by part: what each part takes, and what makes it smaller.

The peak is a sum of parts (`PARTS`), each a formula below, in bytes. Formulas of working memory count floats.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from ggjac.config import Layer, ModelConfig
from ggjac.config.mixers import MIXERS
from ggjac.planner.forward import bank, trace_floats
from ggjac.planner.passes import LayerPlan
from ggjac.planner.work import JACOBIAN, Lookup, Region, Sweeps, Work
from ggjac.sizes import ITEM_BYTES, ON_THE_WAY, SLAB, Pieces, forms, scan_chunk

if TYPE_CHECKING:  # NumPy would be imported for types alone
    from ggjac.gguf import GGUFFile

# Anonymous memory of a process that has imported torch and opened a model and done nothing else: measured on Linux.
BASE_BYTES = {"cpu": 160 << 20, "cuda": 900 << 20}
# What more of torch its forward mode loads at its first use: `torch._dynamo`, and with it SymPy.
FORWARD_MODE_BYTES = 72 << 20
# Buffers of the matrix library and of the allocator, for each thread.
THREAD_BYTES = 8 << 20
# Device memory that CUDA keeps for itself.
CONTEXT_BYTES = 600 << 20
# Bytes for each weight while torch dequantizes it on a device, the result included, while the previous tile is still
# there: measured with the type that takes most.
DEQUANTIZING_BYTES = 14


def peak(
    file: "GGUFFile",
    config: ModelConfig,
    work: Work,
    layers: Sequence[LayerPlan],
    *,
    threads: int,
    device: str,
    tapes_on_disk: bool,
    pieces: Pieces,
) -> tuple[dict[str, int], dict[str, int]]:
    """Return the bytes of each part of RAM and of device memory at the peak, without weights kept between sweeps.

    The parts of the arithmetic are in RAM on the CPU, where the second result is empty, and else on the device; but
    LAPACK always works in RAM, on a copy of a device's matrix. The trace and the steps come one after another, so only
    the one with the largest working memory counts. Prompts side by side have all but weights for each.
    """
    item, at_once = ITEM_BYTES[work.dtype], work.at_once
    on_cpu = device == "cpu"
    elements = min(pieces.tile, max(info.elements for info in file.tensors.values()))
    tapes = [layer.tape_bytes for layer in layers] if work.tapes else [0]
    steps = [{"trace": trace_floats(config, work.n) * max(4, item)}]
    steps += [_sweep_parts(config, work, step, pieces.slab) for step in work.sweeps]
    steps += [_lookup_parts(config, work, step, pieces.tile) for step in work.lookups]
    lapack = [(step.floats + (not on_cpu) * step.rows * step.columns) * max(4, item) for step in work.decompositions]
    for step, size in zip(work.decompositions, lapack, strict=True):
        steps.append({**({"LAPACK": size} if on_cpu else {}), **step.buffers})
    largest = max(steps, key=lambda parts: sum(parts.values()))
    loaded = BASE_BYTES["cpu" if on_cpu else "cuda"] + FORWARD_MODE_BYTES * work.forward_mode
    parts = {
        "process": loaded + threads * THREAD_BYTES if on_cpu else CONTEXT_BYTES,
        "tapes": at_once * (max(tapes) * 2 if tapes_on_disk else sum(tapes)),
        "tile": elements * (item if on_cpu else item + DEQUANTIZING_BYTES),
        **({} if on_cpu else {"on the way": _on_the_way(file, pieces.tile)}),
        **{part: at_once * size for part, size in work.buffers.items()},
        **{part: at_once * size for part, size in largest.items() if size},
    }
    if on_cpu:
        return parts, {}
    ram = {"process": loaded, "on the way": _on_the_way(file, pieces.tile, pinned=True)}
    return ram | ({"LAPACK": at_once * max(lapack)} if lapack else {}), parts


def _on_the_way(file: "GGUFFile", tile: int, *, pinned: bool = False) -> int:
    """Return the bytes of tiles on their way to a device; torch rounds a pinned buffer up to a power of two."""
    largest = max(math.ceil(min(tile, i.elements) * i.nbytes / i.elements) for i in file.tensors.values())
    return ON_THE_WAY * (1 << (largest - 1).bit_length() if pinned else largest)


def _sweep_parts(config: ModelConfig, work: Work, step: Sweeps, slab: int) -> dict[str, int]:
    """Return the working memory of a sweep: its vectors, under way or as a complete result, and Krylov bases."""
    item = ITEM_BYTES[work.dtype]
    wide = max(4, item)  # bases and softmax are at least in float32
    region = step.region
    n, inputs = region.read or work.input_positions, region.inputs(config)
    # Of maps that are swept together, the mean.
    read = max(inputs) if region.sequential else sum(inputs) / len(inputs)
    if region.tensors in ("all", "continued", "scores"):
        moving = trace_floats(config, n, region.written or n) * wide
    else:
        # A basis in float32 gives the sweep a copy of its vectors rounded to the dtype.
        rounded = bool(step.bases) and item < wide
        # A decomposition goes both ways.
        floats = max(
            sweep_floats(config, n, step.vectors, up=up, slab=slab, region=region)
            for up in ({False, step.up} if step.bases else {step.up})
        )
        moving = (floats + round((step.stream_copies + rounded) * n * read)) * item
    basis = [basis_floats(config, b.size, b.width, b.sweeps) for b in step.bases]
    if region.sequential:  # one after another, of which the largest counts
        basis = [max(basis, default=0)] * len(basis)
    bases = sum(b.maps * each for b, each in zip(step.bases, basis, strict=True)) // region.rounds
    result = round(step.result_floats * work.n * read) * item
    return {"vectors": step.vectors * max(moving, result), "bases": bases * wide, **step.buffers}


def _lookup_parts(config: ModelConfig, work: Work, step: Lookup, tile: int) -> dict[str, int]:
    """Return the working memory of a pass over the vocabulary: scores of a tile and the vectors, or all logits."""
    vectors = max(step.head, step.embedding)
    rows = min(tile // config.d, config.vocabulary)
    scores = vectors * (4 * rows + 2 * config.d)
    if config.row.embedding_norm:  # a copy of a tile, and its norm: squares, two factors of it, and a product
        scores += 5 * rows * config.d
    return {"decoding": (scores + 3 * step.logits * config.vocabulary) * max(4, ITEM_BYTES[work.dtype])}


# ----------------------------------------------------------------------------------------------------------------------
# Floats of working memory


def sweep_floats(
    config: ModelConfig, n: int, vectors: int = 1, *, up: bool, slab: int = SLAB, region: Region = JACOBIAN
) -> int:
    """Return the floats that one of so many stacked vectors takes at most on its way through a region of `n` positions.

    They are the tensors alive at once in the code of `linop`, `blocks` and `jacobian`; torch's allocator counts the
    same. Blocks in which all maps end write only the last position: see `_floats_at_end`. In the others, with `d`, `q`
    and `kv` for the widths of the stream, of all query heads and of all value heads, and `s` for that of a slab of
    hidden units:

        up, attention        stream, normed stream, values, and mixed heads twice (or once, with the output); or values
                             twice
        up, feed-forward     stream, middle, normed middle, the sum over slabs or experts, hidden units
                             before and after the gate, inputs gathered for an expert, and its output
        down, attention      stream, middle, heads twice, values (or heads once, their gradient on the stream,
                             and the same normed, or before that centred); or heads, the values once and again for
                             each factor or convolution, and their gradient on the stream
        down, feed-forward   stream, the sum over slabs or experts, hidden units twice (or once, with one slab's
                             output), and inputs gathered for an expert

    All but the first "down" line include one stream that the previous block has left. Going down, a norm or a scale
    after a branch adds a copy of the stream, and so do parallel branches, which share one. An expert's own part, its
    hidden units included, covers only the positions that use it.

    Several residual streams count as often as one would, and what a branch has read or adds comes on top.

    Other mixers: a convolution's values are its heads. A recurrence has as many values as heads; in chunks, it copies
    only those of a chunk, and has two states instead. One in each channel goes from position to position; on its way up
    it has three states, and on its way down one. What reads the position before has a copy of the stream more, and on
    its way down two. What goes through a second mixture is a copy more on its way down.
    """
    visited = [i for i in range(config.block_count) if region.ends(i, config.block_count)]
    at_end = [config.layers[i] for i in visited if region.ends_in(i, config.block_count)]
    whole = [config.layers[i] for i in visited if not region.ends_in(i, config.block_count)]
    passing = _floats(config, whole, n, vectors, up=up, slab=slab)
    ending = _floats_at_end(config, at_end, n, vectors, up=up, slab=slab)
    return (n * bank(config) if whole else 0) + max(passing, ending)


def _floats(config: ModelConfig, layers: Sequence[Layer], n: int, vectors: int, *, up: bool, slab: int) -> int:
    """Return the floats of `sweep_floats` in blocks that write all positions; 0 if there are none."""
    if not layers:
        return 0
    d, row = config.d, config.row
    factors = (config.attention_factor, config.residual_scale, row.joint_scale)
    scaled = row.norms.attention_out or row.norms.ffn_out or factors != (1, 1, 1)
    more = d if scaled or row.parallel or row.normed_skip or row.experts_skip else 0
    shift = d if row.ffn.startswith("shifted") else 0
    wide = _streams(config) - d  # of several residual streams
    around = d if wide else 0  # what a branch has read or adds, beside them
    # All streams again, beside a stream that attention leaves; and going up, what is beside attention and its sum.
    again = n * (wide + 2 * d) if row.streams == "predicted" else 0
    paths = _paths(config, layers, n)
    if up:
        attention = max(_attention_up(d, n, path) for path in paths) + n * 2 * wide + again + (n * d if again else 0)
        stream = 4 * d + 3 * wide + around + shift
        return max(attention, _ffn_floats(config, layers, n, vectors, slab, stream, 0, lambda s: 2 * s, 2 * d))
    centred = d if more or row.norm != "rms" else 0
    attention = max(_attention_down(d, n, path, centred) for path in paths) + _beside(config, layers, n)
    attention += n * 3 * (wide + around) + again
    stream = 2 * d + more + 2 * (wide + around + shift) + (d if config.adjugates.group else 0)
    return max(attention, _ffn_floats(config, layers, n, vectors, slab, stream, d, lambda s: max(2 * s, s + d), d))


class _Path(NamedTuple):
    """The path of the values through a mixer.

    Attributes:
        heads: width of what the output projection reads.
        values: width of the values.
        factors: factors on the values, and convolutions of them.
        mixed: whether positions are mixed by a pattern or a scan.
        chunk: positions in a chunk of a scan, as many as a state has rows for each head; 0 without scan.
        stepwise: whether the scan goes from position to position; `chunk` then has the rows of a state only.
        parts: of what is mixed, each of which has a gradient on the stream.
    """

    heads: int
    values: int
    factors: int = 0
    mixed: bool = True
    chunk: int = 0
    stepwise: bool = False
    parts: int = 1


def _paths(config: ModelConfig, layers: Sequence[Layer], n: int) -> set[_Path]:
    """Return the paths of values of every kind of mixer in some blocks."""
    found = {_Path(0, 0)}
    for own in layers:
        for mixer in own.mixers:
            if MIXERS[mixer].recurrent:
                sizes = config.recurrence
                wide = sizes.heads * sizes.value_size
                if MIXERS[mixer].channels:
                    found.add(_Path(wide, wide, 2, chunk=sizes.key_size, stepwise=True))
                else:
                    factors = 3 if sizes.shifted else 2
                    found.add(_Path(wide, wide, factors, chunk=scan_chunk(n, sizes.key_size) or 0))
            elif MIXERS[mixer].convolution or not MIXERS[mixer].mixes:
                found.add(_Path(config.d, config.d, 2, mixed=False))
            elif MIXERS[mixer].grouped:  # normed and turned; what keys of groups are made from is wider
                remembers = own.remembered(n) > 0
                made = own.compressed.windows if remembers else 1
                found.add(_Path(own.heads * own.value_size, made * own.value_size, 2, parts=1 + remembers))
            else:
                factors = int(bool(config.attention_clamp) or config.row.value_norm)
                found.add(_Path(own.heads * own.value_size, own.kv_heads * own.value_size, factors))
    return found


def _attention_up(d: int, n: int, path: _Path) -> int:
    q, kv = path.heads, path.values * path.mixed
    if path.chunk:
        return n * (3 * d + q + kv) + 4 * path.chunk * q
    return n * (3 * d + max(2 * kv, kv + q + max(q, d)))


def _attention_down(d: int, n: int, path: _Path, centred: int) -> int:
    q, kv, again = path.heads, path.values, path.factors + path.mixed
    mixing = 2 * q + kv if path.mixed else 0
    state = path.chunk * q if path.stepwise else 0
    return n * ((1 + path.parts) * d + max(mixing, 2 * d + q + centred, q + again * kv + d)) + state


def _floats_at_end(config: ModelConfig, layers: Sequence[Layer], n: int, vectors: int, *, up: bool, slab: int) -> int:
    """Return the floats like `_floats`, in blocks that write only the last position.

        up     stream, normed stream, values twice (or centred stream)
        down   values twice; or once, again for each factor or convolution, and their gradient on the stream; or that,
               normed, and before that centred; or the gradient of several streams twice

    These have `n` positions. The last position alone takes, before or after them, what `_floats` counts for one.
    """
    if not layers:
        return 0
    d, row, paths = config.d, config.row, _paths(config, layers, n)
    kv = max(path.values for path in paths)
    once, centred = _floats(config, layers, 1, vectors, up=up, slab=slab), d if row.norm != "rms" else 0
    if up:
        normed = d if row.norms.attention_in else 0
        read = d if config.streams.several else centred  # what was collected of several streams
        turned = config.widest if config.row.streams == "held" else 0  # where a pass begins, streams before and after
        return n * (_streams(config) + turned) + max(n * (normed + max(2 * kv, read)), once)
    again = max((1 + path.factors) * path.values + (path.parts - 1) * d for path in paths)
    streams = 2 * _streams(config) if config.streams.several else 0  # their gradients by branch and by what they keep
    return max(n * max(2 * kv, again + d, 2 * d + centred, streams) + _beside(config, layers, n), once)


def _streams(config: ModelConfig) -> int:
    """Return the elements of all residual streams where a sweep has most: before the last block, which writes one."""
    return config.width(max(1, config.block_count - 1))


def _beside(config: ModelConfig, layers: Sequence[Layer], n: int) -> int:
    """Return the floats of the gradient of one mixer while that of another beside it is computed."""
    return n * config.d if any(len(own.mixers) > 1 for own in layers) else 0


def _ffn_floats(
    config: ModelConfig,
    layers: Sequence[Layer],
    n: int,
    vectors: int,
    slab: int,
    stream: int,
    summed: int,
    hidden: Callable[[int], int],
    gathered: int,
) -> int:
    """Return the floats of a feed-forward branch.

    Routers are uneven in a way that no plan can foresee: the busiest expert is assumed to see half of the positions, or
    twice its even share, and one more. With leading dense blocks, the larger of the two kinds counts.

    Args:
        config, layers: the model's sizes, and the blocks that count.
        n, vectors, slab: the positions, the stacked vectors, and hidden units at a time.
        stream: floats of copies of the stream at each position.
        summed: floats of the sum over experts at each position.
        hidden: of a slab's width, the floats of its hidden units at each position.
        gathered: floats of inputs and outputs at each position of a routed expert.
    """

    def network(width: int) -> int:
        if forms(vectors, config.d, config.d, width, min(slab, width)):
            return config.d  # the result of the matrix of each position, without hidden units
        return hidden(min(slab, width)) + (config.d if width > slab else 0)

    dense = max(n * (stream + network(own.hidden_units)) if own.hidden_units else 0 for own in layers)
    if not any(own.routed for own in layers):
        return dense
    routed = 0
    for experts in {experts for own in layers for experts in config.mixtures(own)}:
        busy = min(n * experts.times, max(n // 2, 2 * n * experts.used // experts.total) + 1)
        routed = max(routed, busy * (gathered + network(experts.units)))
    # A dense network beside a mixture is added to it as a shared expert is.
    beside = max(own.hidden_units if own.routed else 0 for own in layers)
    shared = max(config.expert_shared_feed_forward_length, beside)
    if shared:
        return max(dense, n * (stream + summed + config.d) + max(routed, n * network(shared)))
    return max(dense, n * (stream + summed) + routed)


def basis_floats(config: ModelConfig, size: int, width: int, sweeps: int) -> int:
    """Return the floats of both Krylov bases after all sweeps.

    Every sweep down adds a block `[width, size]` to the basis of the input space; every sweep up adds a block
    `[width, d]` to that of the output space, which starts with one. Orthogonalising a product takes less memory than
    the sweep that computed it.
    """
    down, up = math.ceil(sweeps / 2), sweeps // 2
    return width * (down * size + (up + 1) * config.d)


# ----------------------------------------------------------------------------------------------------------------------
# Advice

FEWER_TOKENS = "use fewer tokens"


def _tapes(work: Work, tapes_on_disk: bool) -> str:
    possible = work.tapes_to_disk and not tapes_on_disk
    return "keep tapes on disk with --trace FOLDER" if possible else FEWER_TOKENS


def _vectors(work: Work, tapes_on_disk: bool) -> str:
    return work.fewer_vectors


def _decoding(work: Work, tapes_on_disk: bool) -> str:
    return work.fewer_decoded or work.fewer_vectors


# Every part that a plan may show -> advice on how to make it smaller, given the work and whether its tapes are on disk;
# None if no option does.
PARTS: dict[str, str | Callable[[Work, bool], str] | None] = {
    "process": None,  # Python, torch and the buffers of threads
    "tile": None,  # a matrix is dequantized in tiles, large ones where there is room
    "on the way": None,  # a fixed number of tiles on their way to the device
    "tapes": _tapes,  # grow with the prompt, attention patterns with its square
    "trace": FEWER_TOKENS,  # streams and attention scores of all positions
    "vectors": _vectors,  # the stack of a sweep: one stream per vector, or per vector and map
    "matrix": FEWER_TOKENS,  # of all positions
    "LAPACK": FEWER_TOKENS,  # factors of the matrix, and of its triangular factor
    "rounded vectors": _vectors,  # copies of vectors in bfloat16, for products with rounded matrices
    "bases": _vectors,  # grow by one block of vectors in every sweep
    "decoding": _decoding,  # scores of all vectors of a pass over the vocabulary
    "checkpoint": _vectors,  # products of sweeps waiting to be written, up to a fixed limit
    "edits": FEWER_TOKENS,  # outputs of edited prompts, and what is added to embeddings
    "parts": "ask for fewer keys",  # of the stream at the positions of a query and its keys
    "norms": FEWER_TOKENS,  # float64 copies of a fixed number of probes, one stream each
    "sums": None,  # of the maps of many prompts, in float64
    "edges": FEWER_TOKENS,  # what all components write, and the cotangents of all that read
    "portraits": FEWER_TOKENS,  # the results of another model: above all, logits of every position
    "cache": "use fewer tokens, or fewer --max-tokens",  # keys and values of the prompt and of generated tokens
    "llama.cpp's tensors": FEWER_TOKENS,  # three streams for each block, and logits of every position
}


def advice(work: Work, parts: Mapping[str, int], option: str, *, tapes_on_disk: bool) -> str:
    """Return how to make the large parts smaller, the largest first, and the least value of `option` that suffices."""
    needed = sum(parts.values())
    found: list[str] = []
    for part in by_size(parts):
        lower = PARTS[part]
        if lower is not None and parts[part] > needed / 8:
            found.append(lower if isinstance(lower, str) else lower(work, tapes_on_disk))
    enough = f"give {option} {math.ceil(needed / 2**26) * 64}MiB"
    return "; ".join([*dict.fromkeys(found), f"or {enough}" if found else enough])


def by_size(parts: Mapping[str, int]) -> list[str]:
    """Return the names of parts, the largest first."""
    return sorted(parts, key=lambda part: -parts[part])
