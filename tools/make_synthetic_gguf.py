"""Write a GGUF file with the shape of a known model and random weights, at the speed of the disk.

    python tools/make_synthetic_gguf.py --preset llama-3.3-70b --quant Q4_K_M -o 70b.gguf     # 42.5 GB
    python tools/make_synthetic_gguf.py --preset llama-3.3-70b --layers 4 --vocabulary 4096 -o small.gguf
    python tools/make_synthetic_gguf.py --preset llama-3.3-70b --tokenizer SmolLM2.gguf -o texts.gguf

For measuring speed and memory on shapes whose files are too large to fetch; `tiny-mixture`, of no known model, is the
tutorial's mixture of experts. Sizes are those of the published
configurations; blocks that predict later tokens are left out. The vocabulary has no strings (tokenizer
model "none"): give prompts as token ids, or take the tokens of another file with --tokenizer.

How it is made. Of each kind of matrix (reads the residual stream, writes to it, embeds) one pool of rows is drawn and
quantized by llama.cpp's own quantizer. A tensor is then put together from pieces of 256 weights of its pool: a matrix
that reads takes whole rows in an order of its own, a matrix that writes keeps its rows (one per residual coordinate)
and takes column pieces in an order of its own, embeddings mix pieces of different rows. Two layers thus differ, no
weight is quantized twice, and memory holds the pools only.

What is realistic:

- metadata, tensor names, order, shapes and types: those of a converted file, with the types llama.cpp's mix chooses;
- the statistics of the quantized blocks, which come from the quantizer;
- activations: finite and of order one at any depth (branches are scaled by 1/sqrt(2 layers)), attention neither
  uniform nor a single position, gates beyond the linear part of silu;
- the shape of the detached Jacobian's spectrum: some large singular values that fall steadily, then a slow tail. Each
  live matrix is noise plus `SPIKES` directions that it amplifies by factors falling like j^-`DECAY`; all layers
  read along the same directions and write along the same others, so that their contributions add up.

What is not:

- nothing was trained: predictions mean nothing, and no singular vector does;
- weights are Gaussian plus low rank, without outlier channels or massive activations; rows repeat within a wide
  tensor, and as all layers draw from one pool, the Jacobian minus the identity has a rank of a few thousand at most;
- the large directions do not feed one another from layer to layer, as those of a trained model may: a Jacobian grows
  with depth by addition. A router spreads the tokens evenly over its experts;
- with a tied head the logits are several times too large (some 14 for 2048 dimensions, in place of 2).

The same options, seed and versions of numpy and llama.cpp give the same bytes.
"""

import ctypes
import importlib.util
import math
import shutil
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import click
import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

PIECE = 256  # weights that stay together: the super-block of the K-quants
LIVE_WEIGHTS, FROZEN_WEIGHTS, POOL_BYTES = 1 << 24, 1 << 22, 1 << 25  # of one pool, at most
TILE_BYTES = 1 << 20  # written at once: with 4 MiB the kernel took several times longer
ROOM = 64 << 20  # bytes to leave free on the disk

# The amplified directions: how many, by how much the first (times d^(1/4), see `amplification`), and how they fall.
SPIKES, FIRST, DECAY = 64, 4.0, 0.7
EMBEDDING = 0.3  # of the stream's growth: a branch late in the model adds less than one at its start
SCORES = 1.4  # of q and k: scores then have a spread of two; and of gates

FILE_TYPES = {
    "F32": gguf.LlamaFileType.ALL_F32,
    "F16": gguf.LlamaFileType.MOSTLY_F16,
    "BF16": gguf.LlamaFileType.MOSTLY_BF16,
    "Q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "Q4_K_M": gguf.LlamaFileType.MOSTLY_Q4_K_M,
}


class SyntheticError(ValueError):
    """The file cannot be written."""


class Delta(NamedTuple):
    """Sizes of the delta nets of a model: taps of the convolution, heads of keys and of values, elements of a head."""

    taps: int
    key_heads: int
    heads: int
    size: int


class Latent(NamedTuple):
    """Sizes of latent attention: of the queries' and the shared latent vector, and parts of a key and value head."""

    query: int
    width: int
    nope: int
    rope: int
    value: int


@dataclass(frozen=True)
class Shape:
    """Sizes of a model, in elements; widths of matrices are multiples of `PIECE`.

    Attributes (those that do not speak for themselves):
        rope_factor: of Llama 3's frequency scaling; 0: no rope_freqs.weight.
        rope: elements of a head that rotate; 0: all.
        tied: no output.weight.
        delta: of blocks with a delta net in place of attention: all but every `period`-th.
        gated: each head's query has a gate.
        latent: of attention in all blocks.
        dense_lead: blocks with a dense network before those with a mixture.
        more: keys that a family's files have beside these.
    """

    layers: int
    d: int
    heads: int
    kv_heads: int
    feed_forward: int
    vocabulary: int
    architecture: str = "llama"
    head: int = 128
    rope_base: float = 5e5
    rope_factor: float = 0.0
    rope: int = 0
    epsilon: float = 1e-5
    context: int = 131072
    tied: bool = False
    qk_norm: bool = False
    experts: int = 0
    experts_used: int = 0
    expert_feed_forward: int = 0
    shared_feed_forward: int = 0
    delta: Delta | None = None
    period: int = 4
    gated: bool = False
    latent: Latent | None = None
    dense_lead: int = 0
    more: tuple[tuple[str, bool | int | float | str | tuple[int, ...]], ...] = ()


QWEN3 = Shape(
    64, 5120, 64, 8, 25600, 151936, architecture="qwen3", rope_base=1e6, epsilon=1e-6, context=40960, qk_norm=True
)
QWEN35 = Shape(
    64,
    5120,
    24,
    4,
    17408,
    248320,
    architecture="qwen35",
    head=256,
    rope_base=1e7,
    rope=64,
    epsilon=1e-6,
    context=262144,
    qk_norm=True,
    gated=True,
    delta=Delta(4, 16, 48, 128),
    more=(("rope.dimension_sections", (11, 11, 10, 0)),),
)
DEEPSEEK_V3 = Shape(
    61,
    7168,
    128,
    1,
    18432,
    129280,
    architecture="deepseek2",
    rope_base=1e4,
    epsilon=1e-6,
    context=163840,
    experts=256,
    experts_used=8,
    expert_feed_forward=2048,
    shared_feed_forward=2048,
    latent=Latent(1536, 512, 128, 64, 128),
    dense_lead=3,
    more=(
        ("expert_shared_count", 1),
        ("expert_weights_scale", 2.5),
        ("expert_weights_norm", True),
        ("expert_gating_func", 2),
        ("expert_group_count", 8),
        ("expert_group_used_count", 4),
        ("rope.scaling.type", "yarn"),
        ("rope.scaling.factor", 40.0),
        ("rope.scaling.original_context_length", 4096),
        ("rope.scaling.yarn_log_multiplier", 0.1),
    ),
)
NO_GROUPS = {"expert_group_count": 1, "expert_group_used_count": 1}
KIMI = {"expert_weights_scale": 2.827, "rope.scaling.factor": 32.0}
PRESETS = {
    "llama-3.3-70b": Shape(80, 8192, 64, 8, 28672, 128256, rope_factor=8.0),
    "llama-3.1-8b": Shape(32, 4096, 32, 8, 14336, 128256, rope_factor=8.0),
    "llama-3.2-1b": Shape(16, 2048, 32, 8, 8192, 128256, head=64, rope_factor=32.0, tied=True),
    "qwen3-32b": QWEN3,
    "qwen3-30b-a3b": replace(
        QWEN3,
        architecture="qwen3moe",
        layers=48,
        d=2048,
        heads=32,
        kv_heads=4,
        feed_forward=6144,
        experts=128,
        experts_used=8,
        expert_feed_forward=768,
    ),
    "qwen3.5-27b": QWEN35,
    "qwen3.5-35b-a3b": replace(
        QWEN35,
        architecture="qwen35moe",
        layers=40,
        d=2048,
        heads=16,
        kv_heads=2,
        feed_forward=0,
        delta=Delta(4, 16, 32, 128),
        experts=256,
        experts_used=8,
        expert_feed_forward=512,
        shared_feed_forward=512,
    ),
    "deepseek-v3": DEEPSEEK_V3,
    "kimi-k2": replace(
        DEEPSEEK_V3,
        heads=64,
        vocabulary=163840,
        context=131072,
        rope_base=5e4,
        experts=384,
        dense_lead=1,
        more=tuple((dict(DEEPSEEK_V3.more) | NO_GROUPS | KIMI).items()),
    ),
    "bench-1024": Shape(8, 1024, 8, 8, 4096, 32000, context=4096),
    "tiny-mixture": replace(
        DEEPSEEK_V3,
        layers=3,
        d=256,
        heads=4,
        feed_forward=512,
        vocabulary=512,
        experts=12,
        experts_used=3,
        expert_feed_forward=256,
        shared_feed_forward=256,
        latent=Latent(256, 256, 32, 32, 64),
        dense_lead=1,
        more=tuple((dict(DEEPSEEK_V3.more) | NO_GROUPS).items()),
    ),
}


class Source(NamedTuple):
    """What a pool of rows is drawn from, and how tensors are put together from it."""

    kind: str  # "read": whole rows; "write": whole columns of pieces; "mixed": every piece from another row
    width: int  # elements of a row (of the tensor that is written; for "write" a pool has a width of its own)
    scale: float  # of a weight
    spiked: bool = False


class Tensor(NamedTuple):
    """A tensor to write: from a pool, or with its values given by a function of its own generator."""

    name: str
    shape: tuple[int, ...]  # [experts,] out, in
    type: Type
    source: Source | Callable[[np.random.Generator], np.ndarray]

    @property
    def rows(self) -> int:
        """All rows, those of all experts together."""
        return math.prod(self.shape[:-1])

    @property
    def row_bytes(self) -> int:
        """Bytes of a stored row."""
        size, nbytes = gguf.GGML_QUANT_SIZES[self.type]
        return self.shape[-1] // size * nbytes

    @property
    def nbytes(self) -> int:
        """Stored bytes, without padding."""
        return self.rows * self.row_bytes


# --- what is in the file ------------------------------------------------------------------------------------------


def more_bits(layer: int, layers: int) -> bool:
    """Tell whether llama.cpp's medium mixes spend more bits on a layer (`use_more_bits` in llama-quant.cpp)."""
    first = layers // 8
    return layer < first or layer >= 7 * layers // 8 or (layer - first) % 3 == 2


def stored_type(quant: str, name: str, shape: Shape, width: int) -> Type:
    """Return the type in which llama.cpp stores a matrix of some width (`llama_tensor_get_type` in llama-quant.cpp)."""
    if quant != "Q4_K_M":
        return Type[quant]
    if name == "output.weight" or (shape.tied and name == "token_embd.weight"):
        return Type.Q6_K
    _, _, rest = name.partition("blk.")
    layer, _, tensor = rest.partition(".")
    # `attn_qkv` counts as values here, and each block has either. (Alone it would have been Q5_K.)
    if tensor.startswith(("attn_v.", "attn_qkv.", "ffn_down")) and more_bits(int(layer), shape.layers):
        return Type.Q6_K
    # What llama.cpp takes for a 70B: one value head serves eight, so more bits for it are cheap.
    if tensor.startswith("attn_v.") and shape.architecture == "llama" and shape.layers == 80:
        return Type.Q5_K if shape.kv_heads < shape.heads else Type.Q4_K
    return Type.Q5_0 if width % PIECE else Type.Q4_K


def around_one(width: int) -> Callable[[np.random.Generator], np.ndarray]:
    """Return a function that draws the weights of a norm."""
    return lambda random: 1.0 + 0.1 * random.standard_normal(width, np.float32)


def normal(*size: int, scale: float = 1.0) -> Callable[[np.random.Generator], np.ndarray]:
    """Return a function that draws from a normal distribution."""
    return lambda random: np.float32(scale) * random.standard_normal(size, np.float32)


def router(experts: int, d: int) -> Callable[[np.random.Generator], np.ndarray]:
    """Return a function that draws a router."""
    return lambda random: random.standard_normal((experts, d), np.float32) * (1.5 / math.sqrt(d))


def llama3_factors(shape: Shape, *, original: float = 8192.0) -> np.ndarray:
    """Return Llama 3's frequency divisors [head / 2] (low_freq_factor 1, high_freq_factor 4)."""
    wavelength = 2 * math.pi * shape.rope_base ** (np.arange(0, shape.head, 2) / shape.head)
    smooth = np.clip((original / wavelength - 1.0) / (4.0 - 1.0), 0.0, 1.0)
    return (1.0 / ((1.0 - smooth) / shape.rope_factor + smooth)).astype(np.float32)


def tensors(shape: Shape, quant: str) -> Iterator[Tensor]:
    """List the tensors of a file in the order of a converted one."""
    d, q, kv = shape.d, shape.heads * shape.head, shape.kv_heads * shape.head

    def matrix(name: str, out: tuple[int, ...], source: Source) -> Tensor:
        name += ".weight"
        return Tensor(name, (*out, source.width), stored_type(quant, name, shape, source.width), source)

    def vector(name: str, values: Callable[[np.random.Generator], np.ndarray], *size: int) -> Tensor:
        return Tensor(f"{name}.weight", size, Type.F32, values)

    reads, scores = Source("read", d, 1.0 / math.sqrt(d), spiked=True), Source("read", d, SCORES / math.sqrt(d))

    def writes(width: int, gain: float = 1.0) -> Source:
        return Source("write", width, gain / math.sqrt(2 * shape.layers * width), spiked=True)

    if not shape.tied:
        yield matrix("output", (shape.vocabulary,), Source("mixed", d, 2.0 / math.sqrt(d)))
    yield matrix("token_embd", (shape.vocabulary,), Source("mixed", d, EMBEDDING))
    if shape.rope_factor:
        yield vector("rope_freqs", lambda _: llama3_factors(shape), shape.head // 2)
    for i in range(shape.layers):
        b = f"blk.{i}"
        yield vector(f"{b}.attn_norm", around_one(d), d)
        is_delta = shape.delta is not None and (i + 1) % shape.period != 0
        if shape.delta and is_delta:
            yield from delta(shape.delta, b, matrix, reads, scores, writes)
        if shape.experts and i >= shape.dense_lead:
            f, e = shape.expert_feed_forward, shape.experts
            if shape.latent:
                yield Tensor(f"{b}.exp_probs_b.bias", (e,), Type.F32, normal(e, scale=0.01))
            # The experts' outputs are averaged; the gain makes up for the length that an average loses.
            yield matrix(f"{b}.ffn_down_exps", (e, d), writes(f, math.sqrt(shape.experts_used)))
            yield matrix(f"{b}.ffn_gate_exps", (e, f), scores)
            yield matrix(f"{b}.ffn_up_exps", (e, f), reads)
            yield vector(f"{b}.ffn_gate_inp", router(e, d), e, d)
            if shared := shape.shared_feed_forward:
                yield matrix(f"{b}.ffn_down_shexp", (d,), writes(shared))
                yield matrix(f"{b}.ffn_gate_shexp", (shared,), scores)
                yield matrix(f"{b}.ffn_up_shexp", (shared,), reads)
                if not shape.latent:
                    yield vector(f"{b}.ffn_gate_inp_shexp", lambda random: router(1, d)(random)[0], d)
        else:
            yield matrix(f"{b}.ffn_down", (d,), writes(shape.feed_forward))
            yield matrix(f"{b}.ffn_gate", (shape.feed_forward,), scores)
            yield matrix(f"{b}.ffn_up", (shape.feed_forward,), reads)
        yield vector(f"{b}.{'post_attention_norm' if shape.delta else 'ffn_norm'}", around_one(d), d)
        if shape.latent:
            yield from latent(shape, shape.latent, b, matrix, reads, scores, writes)
        elif not is_delta:
            yield matrix(f"{b}.attn_k", (kv,), scores)
            if shape.qk_norm:
                for name in ("attn_k_norm", "attn_q_norm"):
                    yield vector(f"{b}.{name}", lambda random: SCORES * around_one(shape.head)(random), shape.head)
            yield matrix(f"{b}.attn_output", (d,), writes(q))
            yield matrix(f"{b}.attn_q", (2 * q if shape.gated else q,), scores)
            yield matrix(f"{b}.attn_v", (kv,), reads)
    yield vector("output_norm", around_one(d), d)


class Make(Protocol):
    """Makes a matrix."""

    def __call__(self, name: str, out: tuple[int, ...], source: Source) -> Tensor:
        """Return a matrix from its name without suffix, its shape without columns and the source of its rows."""


def delta(
    sizes: Delta, b: str, matrix: Make, reads: Source, scores: Source, writes: Callable[[int], Source]
) -> Iterator[Tensor]:
    """List the tensors of a gated delta net: decays between 0.98 and nearly 0, write strengths anywhere."""
    taps, key_heads, heads, size = sizes
    channels, values = (2 * key_heads + heads) * size, heads * size
    yield Tensor(f"{b}.ssm_a", (heads,), Type.F32, lambda _: -np.geomspace(0.02, 6.0, heads, dtype=np.float32))
    kernel = (channels, taps)
    yield Tensor(f"{b}.ssm_conv1d.weight", kernel, Type.F32, normal(*kernel, scale=1.2 / math.sqrt(taps)))
    yield Tensor(f"{b}.ssm_dt.bias", (heads,), Type.F32, normal(heads))
    yield matrix(f"{b}.ssm_alpha", (heads,), scores)
    yield matrix(f"{b}.ssm_beta", (heads,), scores)
    yield matrix(f"{b}.attn_qkv", (channels,), reads)
    yield matrix(f"{b}.attn_gate", (values,), scores)
    yield Tensor(f"{b}.ssm_norm.weight", (size,), Type.F32, around_one(size))
    yield matrix(f"{b}.ssm_out", (reads.width,), writes(values))


def latent(
    shape: Shape,
    sizes: Latent,
    b: str,
    matrix: Make,
    reads: Source,
    scores: Source,
    writes: Callable[[int], Source],
) -> Iterator[Tensor]:
    """List the tensors of latent attention; the keys' expansion is stored transposed, as llama.cpp multiplies by it."""
    heads, wide = shape.heads, sizes.nope + sizes.rope

    def expands(width: int, gain: float = 1.0) -> Source:
        return Source("read", width, gain / math.sqrt(width))

    yield matrix(f"{b}.attn_kv_a_mqa", (sizes.width + sizes.rope,), reads)
    yield Tensor(f"{b}.attn_kv_a_norm.weight", (sizes.width,), Type.F32, around_one(sizes.width))
    yield matrix(
        f"{b}.attn_k_b", (heads, sizes.width), expands(sizes.nope, SCORES * math.sqrt(sizes.nope / sizes.width))
    )
    yield matrix(f"{b}.attn_v_b", (heads, sizes.value), expands(sizes.width))
    yield matrix(f"{b}.attn_output", (shape.d,), writes(heads * sizes.value))
    yield matrix(f"{b}.attn_q_a", (sizes.query,), scores)
    yield Tensor(f"{b}.attn_q_a_norm.weight", (sizes.query,), Type.F32, around_one(sizes.query))
    yield matrix(f"{b}.attn_q_b", (heads * wide,), expands(sizes.query, SCORES))


# --- pools --------------------------------------------------------------------------------------------------------


@cache
def quantizer() -> Callable[..., int]:
    """Return ggml's `ggml_quantize_chunk`, of the installed llama-cpp-python."""
    # Found, not imported: llama_cpp would load all of llama.cpp.
    spec = importlib.util.find_spec("llama_cpp")
    for folder in (spec and spec.submodule_search_locations) or ():
        for path in sorted(Path(folder, "lib").glob("*ggml-base.*")):
            function = ctypes.CDLL(str(path)).ggml_quantize_chunk
            function.restype = ctypes.c_size_t
            function.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]
            return function
    raise SyntheticError("K-quants need the quantizer of llama-cpp-python, which is not installed; install it")


def encode(values: np.ndarray, type: Type) -> np.ndarray:
    """Return float32 values [rows, elements] as stored bytes, uint8 [rows, row bytes]."""
    if type.name == "F32":
        return values.view(np.uint8)
    if type.name == "F16":
        return values.astype(np.float16).view(np.uint8)
    if type.name in ("BF16", "Q8_0"):
        return gguf.quants.quantize(values, type)
    rows, columns = values.shape
    size, nbytes = gguf.GGML_QUANT_SIZES[type]
    out = np.empty((rows, columns // size * nbytes), np.uint8)
    written = quantizer()(int(type), values.ctypes.data, out.ctypes.data, 0, rows, columns, None)
    assert written == out.nbytes, f"{type.name}: the quantizer wrote {written} of {out.nbytes} bytes"
    return out


def generator(seed: int, name: str) -> np.random.Generator:
    """Return the generator of one tensor or pool."""
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


def amplification(d: int) -> np.ndarray:
    """Return by how much more than noise the amplified directions are read, and written, float32 [SPIKES].

    Reading and writing once, a branch multiplies direction j by the square of this and by a coefficient of noise, of
    order 1/sqrt(2 layers d). Hence the fourth root: the sum over all branches has no factor of d or layers left.
    """
    return (FIRST * d**0.25 * np.arange(1, min(SPIKES, d) + 1) ** -DECAY).astype(np.float32)


@dataclass
class Pools:
    """The quantized rows that tensors are made of, made at first use: pieces [rows, pieces of a row]."""

    shape: Shape
    seed: int
    made: dict[tuple[Source, Type], np.ndarray] = field(default_factory=dict)

    def __call__(self, source: Source, type: Type) -> np.ndarray:
        """Return a pool, as opaque items of one piece each."""
        if (source, type) not in self.made:
            size, nbytes = gguf.GGML_QUANT_SIZES[type]
            # Repeated rows lower the rank of what is live only, so the rest makes do with fewer.
            weights = LIVE_WEIGHTS if source.spiked else FROZEN_WEIGHTS
            values = self.draw(source, min(weights, POOL_BYTES // nbytes * size))
            # Slices over threads: the quantizer works row by row and releases the interpreter's lock.
            step = max(1, (1 << 20) // values.shape[1])
            with ThreadPoolExecutor() as threads:
                parts = threads.map(
                    lambda start: encode(values[start : start + step], type), range(0, len(values), step)
                )
                data = np.concatenate(list(parts))
            self.made[source, type] = data.view(f"V{min(PIECE, source.width) // size * nbytes}")
        return self.made[source, type]

    def draw(self, source: Source, weights: int) -> np.ndarray:
        """Return float32 [rows, width] of about `weights` numbers: full rows, or for "write" d rows as wide as fits."""
        d = self.shape.d
        writes = source.kind == "write"
        if writes:
            # Few pieces have few orders, and thousands of narrow experts need different ones.
            wanted = max(source.width, PIECE * (32 if self.shape.experts else 8))
            rows, width = d, min(wanted, max(PIECE, weights // d // PIECE * PIECE))
        else:
            rows, width = min(4 * d, max(1, weights // source.width)), source.width
        random = generator(self.seed, repr(source))
        values = random.standard_normal((rows, width), np.float32)
        if source.spiked:
            gains = amplification(d)
            # One set of directions for all that reads, one for all that writes.
            directions = generator(self.seed, source.kind).standard_normal((d, len(gains)), np.float32)
            directions *= gains / np.float32(math.sqrt(d))  # almost orthonormal, times the gains
            other = random.standard_normal((width if writes else rows, len(gains)), np.float32)
            left, right = (directions, other) if writes else (other, directions)
            for start in range(0, rows, 256):
                values[start : start + 256] += left[start : start + 256] @ right.T
            values /= math.sqrt(1.0 + float(gains @ gains) / d)
        # What all pieces have in common would add up over the layers: the pools' orders differ, their mean does not.
        values -= values.mean(axis=1, keepdims=True) if writes else values.mean(axis=0)
        values *= source.scale
        return values


def order(random: np.random.Generator, length: int, of: int) -> np.ndarray:
    """Return `length` numbers below `of`, each as often as any other."""
    return np.concatenate([random.permutation(of) for _ in range(-(-length // of))])[:length]


def tiles(tensor: Tensor, pools: Pools, buffers: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """Yield the bytes of a tensor in order, uint8, in one buffer after the other."""
    random = generator(pools.seed, tensor.name)
    if not isinstance(tensor.source, Source):
        yield tensor.source(random).reshape(-1).view(np.uint8)
        return
    pool = pools(tensor.source, tensor.type)
    height, pieces = len(pool), max(1, tensor.shape[-1] // PIECE)
    step = max(1, TILE_BYTES // tensor.row_bytes)  # rows

    def take(source: np.ndarray, chosen: np.ndarray, rows: int, axis: int | None) -> np.ndarray:
        data = next(buffers)[: rows * tensor.row_bytes]
        # All indices are good; "raise" would go through a copy to find out first.
        np.take(source, chosen, axis=axis, out=data.view(pool.dtype).reshape(rows, pieces), mode="clip")
        return data

    if tensor.source.kind == "write":
        for _expert in range(tensor.rows // height):
            columns = order(random, pieces, pool.shape[1])
            for a in range(0, height, step):
                yield take(pool[a : a + step], columns, min(step, height - a), 1)
        return
    rows = order(random, tensor.rows, height)  # not used for "mixed"
    for a in range(0, tensor.rows, step):
        count = min(step, tensor.rows - a)
        if tensor.source.kind == "read":
            yield take(pool, rows[a : a + count], count, 0)
        else:
            chosen = random.integers(0, height, (count, pieces)) * pieces + np.arange(pieces)
            yield take(pool, chosen, count, None)


# --- the file -----------------------------------------------------------------------------------------------------


class Tokenizer(NamedTuple):
    """The tokenizer of another file, chat template included: its keys in order, and the number of its tokens."""

    fields: tuple[gguf.ReaderField, ...]
    tokens: int


def read_tokenizer(path: Path) -> Tokenizer:
    """Read the tokenizer of a GGUF file.

    Raises:
        SyntheticError: the file is not GGUF, or lists no tokens.
    """
    try:
        fields = {name: field for name, field in gguf.GGUFReader(path).fields.items() if name.startswith("tokenizer.")}
    except ValueError as error:
        raise SyntheticError(f"{path}: {error}; give a GGUF file with a tokenizer") from error
    if (tokens := fields.get("tokenizer.ggml.tokens")) is None:
        raise SyntheticError(f"{path} lists no tokens; give a GGUF file with a tokenizer")
    return Tokenizer(tuple(fields.values()), len(tokens.data))


def header(
    path: Path, name: str, shape: Shape, quant: str, listed: list[Tensor], tokenizer: Tokenizer | None = None
) -> None:
    """Write everything before the first tensor's bytes, padding included."""
    writer = gguf.GGUFWriter(path, shape.architecture)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(f"synthetic {name} (random weights)")
    writer.add_file_type(FILE_TYPES[quant])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(shape.layers)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.d)
    writer.add_feed_forward_length(shape.feed_forward)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.latent.width + shape.latent.rope if shape.latent else shape.head)
    writer.add_value_length(shape.latent.width if shape.latent else shape.head)
    writer.add_layer_norm_rms_eps(shape.epsilon)
    writer.add_rope_dimension_count(shape.latent.rope if shape.latent else shape.rope or shape.head)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_vocab_size(shape.vocabulary)
    if shape.experts:
        writer.add_expert_count(shape.experts)
        writer.add_expert_used_count(shape.experts_used)
        writer.add_expert_feed_forward_length(shape.expert_feed_forward)
    kinds: dict[type, Callable[[str, Any], None]] = {bool: writer.add_bool, int: writer.add_uint32}
    kinds |= {float: writer.add_float32, str: writer.add_string, tuple: writer.add_array}
    for key, value in own_keys(shape).items():
        kinds[type(value)](f"{shape.architecture}.{key}", value)
    if tokenizer is None:
        writer.add_tokenizer_model("none")
    else:
        for found in tokenizer.fields:
            kind, *of = found.types
            writer.add_key_value(found.name, found.contents(), kind, *of)
    for tensor in listed:
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, raw_dtype=tensor.type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()


def own_keys(shape: Shape) -> dict[str, Any]:
    """Return the keys of what only some families have: shared experts, delta nets, latent attention."""
    keys: dict[str, Any] = dict(shape.more)
    if shape.dense_lead:
        keys["leading_dense_block_count"] = shape.dense_lead
    if shape.shared_feed_forward and not shape.latent:
        keys["expert_shared_feed_forward_length"] = shape.shared_feed_forward
    if delta := shape.delta:
        keys |= {"ssm.conv_kernel": delta.taps, "ssm.state_size": delta.size, "ssm.group_count": delta.key_heads}
        keys |= {"ssm.time_step_rank": delta.heads, "ssm.inner_size": delta.heads * delta.size}
        keys["full_attention_interval"] = shape.period
    if latent := shape.latent:
        keys |= {"attention.q_lora_rank": latent.query, "attention.kv_lora_rank": latent.width}
        keys |= {"attention.key_length_mla": latent.nope + latent.rope, "attention.value_length_mla": latent.value}
    return keys


def padding(nbytes: int) -> int:
    """Return the bytes from here to the next multiple of the alignment."""
    return -nbytes % gguf.GGUF_DEFAULT_ALIGNMENT


def check(shape: Shape) -> None:
    """Refuse a shape that the tool's pieces do not fit.

    Raises:
        SyntheticError: naming the size.
    """
    head = shape.latent.value if shape.latent else shape.head
    widths = {"d": shape.d, "heads * head": shape.heads * head, "feed_forward": shape.feed_forward}
    if shape.delta:
        widths |= {"delta.heads * delta.size": shape.delta.heads * shape.delta.size}
    if shape.experts:
        widths |= {"expert_feed_forward": shape.expert_feed_forward, "shared_feed_forward": shape.shared_feed_forward}
    for name, width in widths.items():
        if width % PIECE:
            raise SyntheticError(f"{name} is {width}; give a multiple of {PIECE}")
    for name, count in {"layers": shape.layers, "vocabulary": shape.vocabulary}.items():
        if count < 1:
            raise SyntheticError(f"{name} is {count}; give at least 1")
    # llama.cpp would store attn_k and attn_v of such a model in Q8_0; no preset needs the rule.
    assert shape.experts != 8


def write(
    path: Path,
    shape: Shape,
    quant: str,
    *,
    name: str = "shape",
    seed: int = 0,
    tokenizer: Tokenizer | None = None,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> int:
    """Write a synthetic file and return its bytes; memory: the pools, at most about 0.3 GB.

    Args:
        path: the file; it appears under this name when it is complete.
        shape: sizes of the model.
        quant: a key of `FILE_TYPES`.
        name: of the model, for `general.name`.
        seed: of all weights.
        tokenizer: to write with it, as many tokens as the vocabulary has; None: the model "none".
        progress: called with the tensor's name, the bytes written and the bytes of the whole file.

    Raises:
        SyntheticError: an impossible shape, no quantizer, or no room on the disk; nothing is left behind.
    """
    check(shape)
    listed = list(tensors(shape, quant))
    total = sum(tensor.nbytes + padding(tensor.nbytes) for tensor in listed)
    free = shutil.disk_usage(path.parent).free
    if total + ROOM > free:
        raise SyntheticError(
            f"{path} needs {total / 1e9:.2f} GB, {path.parent} has {free / 1e9:.2f} GB free; "
            "make room, or ask for fewer --layers or a smaller --vocabulary"
        )
    pools = Pools(shape, seed)
    partial = path.with_name(f".{path.name}.partial")
    try:
        header(partial, name, shape, quant, listed, tokenizer)
        start = partial.stat().st_size
        with partial.open("ab", buffering=0) as file, ThreadPoolExecutor(1) as thread:
            file.write(bytes(padding(start)))
            done, total = file.tell(), total + start + padding(start)
            # The next tile is put together while this one is written: in the other of two buffers, as fresh memory for
            # each would cost as much as the copy into it.
            buffers = cycle([np.empty(TILE_BYTES, np.uint8) for _ in range(2)])
            parts = ((tensor, tile) for tensor in listed for tile in padded(tensor, pools, buffers))
            coming = thread.submit(next, parts, None)
            while (part := coming.result()) is not None:
                coming = thread.submit(next, parts, None)
                tensor, tile = part
                view = memoryview(tile.data).cast("B")
                while view:
                    view = view[file.write(view) :]
                done += tile.nbytes
                progress(tensor.name, done, total)
        assert done == total, f"wrote {done} of {total} bytes"
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return done


def padded(tensor: Tensor, pools: Pools, buffers: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """Yield the tiles of a tensor, and what aligns the next one."""
    yield from tiles(tensor, pools, buffers)
    if missing := padding(tensor.nbytes):
        yield np.zeros(missing, np.uint8)


class Progress:
    """Lines on stderr, one every few seconds: where we are, and how fast."""

    def __init__(self, seconds: float = 5.0) -> None:
        self.seconds = seconds
        self.start = self.last = time.monotonic()

    def __call__(self, name: str, done: int, total: int) -> None:
        """Print a line if the last one is old."""
        now = time.monotonic()
        if now - self.last >= self.seconds:
            self.last = now
            click.echo(f"{name}: {done / 1e9:.1f} of {total / 1e9:.1f} GB, {self.speed(done):.2f} GB/s", err=True)

    def speed(self, done: int) -> float:
        """Return GB/s since the start, the making of the pools included."""
        return done / (time.monotonic() - self.start) / 1e9


@click.command(help=__doc__.replace("\n    python", "\n\b\n    python"))
@click.option("--preset", type=click.Choice(list(PRESETS)), required=True, help="The model whose shape to write.")
@click.option("--quant", type=click.Choice(list(FILE_TYPES)), default="Q4_K_M", show_default=True)
@click.option("--layers", type=click.IntRange(1), help="Blocks, instead of the preset's.")
@click.option("--vocabulary", type=click.IntRange(1), help="Tokens, instead of the preset's.")
@click.option(
    "--tokenizer",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="GGUF file whose tokenizer to write; its number of tokens is then the vocabulary's.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False), required=True, help="The file.")
def main(
    preset: str,
    quant: str,
    layers: int | None,
    vocabulary: int | None,
    tokenizer: Path | None,
    seed: int,
    output: Path,
) -> None:
    if vocabulary and tokenizer:
        raise click.UsageError("--vocabulary is the number of tokens of the file of --tokenizer; leave one of them out")
    progress = Progress()
    try:
        taken = None if tokenizer is None else read_tokenizer(tokenizer)
        shape = PRESETS[preset]
        size = vocabulary or (taken.tokens if taken else shape.vocabulary)
        shape = replace(shape, layers=layers or shape.layers, vocabulary=size)
        nbytes = write(output, shape, quant, name=preset, seed=seed, tokenizer=taken, progress=progress)
    except (SyntheticError, OSError) as error:
        sys.exit(f"make_synthetic_gguf: {error}")
    click.echo(f"{output}: {nbytes / 1e9:.2f} GB, {progress.speed(nbytes):.2f} GB/s", err=True)


if __name__ == "__main__":
    main()
