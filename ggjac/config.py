"""What a model's metadata and tensor names say about it, and one row per architecture for what they cannot say.

Keys and defaults follow llama.cpp (src/llama-arch.cpp, src/llama-model.cpp); `{a}` below is `general.architecture`.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Larger than any model's sizes, and small enough that no product of them surprises.
MAX_SIZE = 2**31 - 1


class ConfigError(ValueError):
    """The file is a valid GGUF, but not a model that can be run; the message says what is missing or unsupported."""


@dataclass(frozen=True)
class Architecture:
    """What the files of a family do not say about themselves.

    Attributes:
        rope_pairs: which dims of a head rotate together: `"adjacent"` (2i and 2i+1; llama.cpp's NORM) or `"halves"`
            (i and i + rotary/2; NEOX).
        rotary_is_head_size: whether `rope.dimension_count` must equal the head size, as llama.cpp demands.
        block: block tensor -> its shape in the names of `ModelConfig.sizes`. A tensor outside this list is refused,
            because it would change the computation.
    """

    rope_pairs: str
    rotary_is_head_size: bool
    block: Mapping[str, tuple[str, ...]]


# Biases are optional everywhere; `attn_qkv` stands in for `attn_q`, `attn_k` and `attn_v` (its rows are q | k | v).
_ATTENTION = {
    "attn_q.weight": ("q", "d"),
    "attn_k.weight": ("k", "d"),
    "attn_v.weight": ("v", "d"),
    "attn_qkv.weight": ("qkv", "d"),
    "attn_output.weight": ("d", "heads"),
    "attn_q.bias": ("q",),
    "attn_k.bias": ("k",),
    "attn_v.bias": ("v",),
    "attn_qkv.bias": ("qkv",),
    "attn_output.bias": ("d",),
}
_GATED_FFN = {
    "ffn_gate.weight": ("f", "d"),
    "ffn_up.weight": ("f", "d"),
    "ffn_down.weight": ("d", "f"),
    "ffn_gate.bias": ("f",),
    "ffn_up.bias": ("f",),
    "ffn_down.bias": ("d",),
}
_PRE_NORMS = {"attn_norm.weight": ("d",), "ffn_norm.weight": ("d",)}

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(rope_pairs="adjacent", rotary_is_head_size=True, block=_PRE_NORMS | _ATTENTION | _GATED_FFN),
}

# Tensors outside the blocks; `output.weight` is absent where the head is tied to the embeddings. `rotary` counts pairs.
_GLOBAL = {
    "token_embd.weight": ("vocabulary", "d"),
    "output_norm.weight": ("d",),
    "output.weight": ("vocabulary", "d"),
    "rope_freqs.weight": ("rotary",),
}
_OPTIONAL = {"attn_qkv.weight", "output.weight", "rope_freqs.weight"}
_FUSED_QKV = {"attn_q.weight", "attn_k.weight", "attn_v.weight"}


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding of one model; see `ggjac.rope`.

    Attributes:
        dimensions: leading dims of each head that rotate.
        base: of the geometric frequencies.
        pairs: as in `Architecture.rope_pairs`.
        factor: of context extension, F; positions are scaled by 1/F (everywhere, or where YaRN interpolates).
        yarn: interpolate low frequencies only, and scale cos and sin by `1 + 0.1 ln F`.
        original_context: tokens the model was trained on before YaRN.
        attention_factor: multiplies cos and sin.
    """

    dimensions: int
    base: float
    pairs: str
    factor: float = 1.0
    yarn: bool = False
    original_context: int = 0
    attention_factor: float = 1.0


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and constants of a model, validated against its tensors.

    Attributes:
        architecture: `general.architecture`.
        block_count: blocks, L.
        d: embedding length.
        vocabulary: rows of the embedding matrix.
        context_length: most tokens the model was made for.
        head_count: query heads of each block.
        head_count_kv: key/value heads of each block; divides `head_count`.
        key_length: elements of a query or key head.
        value_length: elements of a value head.
        norm_epsilon: added to the mean square inside RMSNorm's root.
        rope: rotary position embedding.
    """

    architecture: str
    block_count: int
    d: int
    vocabulary: int
    context_length: int
    head_count: tuple[int, ...]
    head_count_kv: tuple[int, ...]
    key_length: int
    value_length: int
    norm_epsilon: float
    rope: Rope

    def slices(self, block: int) -> dict[str, tuple[str, int, int]]:
        """Return the parts of fused tensors: stem -> (fused stem, first row, past the last)."""
        q = self.head_count[block] * self.key_length
        k = q + self.head_count_kv[block] * self.key_length
        v = k + self.head_count_kv[block] * self.value_length
        return {"attn_q": ("attn_qkv", 0, q), "attn_k": ("attn_qkv", q, k), "attn_v": ("attn_qkv", k, v)}

    @staticmethod
    def from_metadata(metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> "ModelConfig":
        """Read and check a model's configuration; `shapes` holds every tensor's shape, out x in.

        Raises:
            ConfigError: an architecture, a key or a tensor that is missing, malformed or unsupported, by name.
        """
        kind, name = metadata.get("general.type", "model"), metadata.get("general.architecture")
        if kind != "model":
            raise ConfigError(f"general.type is {_shown(kind)}, not a language model; give the model's own file")
        if not isinstance(name, str) or name not in ARCHITECTURES:
            supported = ", ".join(ARCHITECTURES)
            raise ConfigError(f"architecture {_shown(name)} is not supported; supported: {supported}")
        row, keys = ARCHITECTURES[name], _Keys(metadata, name)
        if keys.number("expert_count", 0):
            raise ConfigError(f"{name}.expert_count: mixtures of experts are not supported; use a dense model")
        if not metadata.get(f"{name}.attention.causal", True):
            raise ConfigError(f"{name}.attention.causal is False: attention to later tokens is not supported")

        blocks = keys.integer("block_count")
        if blocks > len(shapes):
            raise ConfigError(f"{name}.block_count is {blocks}, but the file holds only {len(shapes)} tensors")
        d = keys.integer("embedding_length")
        heads = keys.per_block("attention.head_count", blocks)
        kv_heads = keys.per_block("attention.head_count_kv", blocks, default=heads)
        key_length = keys.integer("attention.key_length", d // heads[0])
        for h, g in zip(heads, kv_heads, strict=True):
            if h % g:
                raise ConfigError(f"{name}.attention: {h} heads cannot share {g} key/value heads evenly")
        rotary = keys.integer("rope.dimension_count", key_length)
        if rotary % 2 or rotary > key_length or (row.rotary_is_head_size and rotary != key_length):
            raise ConfigError(f"{name}.rope.dimension_count {rotary} does not fit heads of {key_length} elements")

        config = ModelConfig(
            architecture=name,
            block_count=blocks,
            d=d,
            vocabulary=shapes.get("token_embd.weight", (0,))[0],
            context_length=keys.integer("context_length"),
            head_count=heads,
            head_count_kv=kv_heads,
            key_length=key_length,
            value_length=keys.integer("attention.value_length", key_length),
            norm_epsilon=keys.real("attention.layer_norm_rms_epsilon"),
            rope=_rope(keys, row, rotary),
        )
        feed_forward = keys.per_block("feed_forward_length", blocks)
        _check_tensors(config, row, feed_forward, shapes)
        return config


def _rope(keys: "_Keys", row: Architecture, dimensions: int) -> Rope:
    """Read rotary settings; the keys llama.cpp does not read for these models are not read here either."""
    kind = keys.metadata.get(f"{keys.prefix}.rope.scaling.type", "linear")
    if kind not in ("none", "linear", "yarn"):
        raise ConfigError(
            f"{keys.prefix}.rope.scaling.type {_shown(kind)} is not supported; supported: none, linear, yarn"
        )
    factor = keys.real("rope.scaling.factor", keys.real("rope.scale_linear", 0.0)) or 1.0
    base, least = keys.real("rope.freq_base", 10000.0), 1 if kind == "yarn" else 0
    if base <= least:
        raise ConfigError(f"{keys.prefix}.rope.freq_base is {base}, but rotation needs a base above {least}")
    return Rope(
        dimensions=dimensions,
        base=base,
        pairs=row.rope_pairs,
        factor=1.0 if kind == "none" else factor,
        yarn=kind == "yarn",
        original_context=keys.integer("rope.scaling.original_context_length", keys.integer("context_length")),
        attention_factor=keys.real("rope.scaling.attn_factor", 1.0),
    )


def _check_tensors(
    config: ModelConfig, row: Architecture, feed_forward: Sequence[int], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Refuse missing tensors, wrong shapes, and tensors that this architecture does not use."""
    known = set()
    for prefix, table, sizes in _scopes(config, row, feed_forward):
        optional = _OPTIONAL | (_FUSED_QKV if f"{prefix}attn_qkv.weight" in shapes else set())
        for short, axes in table.items():
            name, shape = prefix + short, tuple(sizes[axis] for axis in axes)
            known.add(name)
            if name not in shapes:
                if not (short.endswith(".bias") or short in optional):
                    raise ConfigError(f"tensor {name} is missing; the file is incomplete, download or convert it again")
            elif tuple(shapes[name]) != shape:
                raise ConfigError(f"tensor {name} has shape {list(shapes[name])}, the metadata calls for {list(shape)}")
    for name in shapes:
        if name not in known:
            raise ConfigError(f"tensor {_shown(name)} is not part of a {config.architecture} model as supported here")


def _scopes(
    config: ModelConfig, row: Architecture, feed_forward: Sequence[int]
) -> Iterator[tuple[str, Mapping[str, tuple[str, ...]], dict[str, int]]]:
    """Yield name prefix, table of tensors and named sizes: once for the model, once for each block."""
    sizes = {"d": config.d, "vocabulary": config.vocabulary, "rotary": config.rope.dimensions // 2}
    yield "", _GLOBAL, sizes
    for i in range(config.block_count):
        h, g = config.head_count[i], config.head_count_kv[i]
        q, k, v = h * config.key_length, g * config.key_length, g * config.value_length
        block = {"q": q, "k": k, "v": v, "qkv": q + k + v, "heads": h * config.value_length, "f": feed_forward[i]}
        yield f"blk.{i}.", row.block, sizes | block


@dataclass(frozen=True)
class _Keys:
    """Checked access to the metadata under one architecture's prefix."""

    metadata: Mapping[str, Any]
    prefix: str

    def number(self, key: str, default: int | float | None = None) -> int | float:
        """Return a finite, non-negative number."""
        name = f"{self.prefix}.{key}"
        value = self.metadata.get(name, default)
        if value is None:
            raise ConfigError(f"metadata key {name} is missing; the file is incomplete or was converted wrongly")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise ConfigError(f"metadata key {name} is {_shown(value)}, not a number that makes sense")
        return value

    def real(self, key: str, default: float | None = None) -> float:
        """Return a finite, non-negative number as a float, however the file writes it."""
        return float(self.number(key, default))

    def integer(self, key: str, default: int | None = None) -> int:
        """Return a positive integer that a model can have."""
        value = self.number(key, default)
        if not isinstance(value, int) or not 1 <= value <= MAX_SIZE:
            raise ConfigError(f"metadata key {self.prefix}.{key} is {value}, not a whole number from 1 to {MAX_SIZE}")
        return value

    def per_block(self, key: str, blocks: int, default: tuple[int, ...] | None = None) -> tuple[int, ...]:
        """Return one positive integer per block; the file gives a scalar or an array."""
        name = f"{self.prefix}.{key}"
        value = self.metadata.get(name, default)
        if isinstance(value, Sequence) and not isinstance(value, str):
            if len(value) != blocks:
                raise ConfigError(f"metadata key {name} has {len(value)} entries for {blocks} blocks")
            return tuple(_Keys({name: entry}, self.prefix).integer(key) for entry in value)
        return (self.integer(key),) * blocks


def _shown(value: Any) -> str:
    """Quote something from a file for a message: short, and with control characters escaped."""
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
