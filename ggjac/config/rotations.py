"""Rotations and windows of a model's layers, from its metadata and its family's row."""

import math
from collections.abc import Sequence
from dataclasses import replace

from ggjac.architectures import Architecture
from ggjac.config.keys import ConfigError, Keys, shown
from ggjac.config.model import Rope

# Published models have 1000.
_LARGEST_ALPHA = 1e6
# Elements of a head whose pairs are listed, before the tensors are looked at.
_WIDEST = 1 << 16
_COMPRESSED_BASE = "attention.compress_rope_freq_base"


def rope_of(
    keys: Keys, row: Architecture, key_length: int, layer: int, windows: Sequence[int | None], *, compressed: bool
) -> Rope | None:
    """Return the rotation of one layer, whose keys have `key_length` elements; `windows` are those of all layers.

    Layers with a compressed memory have a base of their own, and scaling but no magnitude.
    """
    windowed = windows[layer] is not None
    full, local = _ropes(keys, row, key_length, windowed=windowed)
    if compressed and full:
        base = keys.real(_COMPRESSED_BASE)
        _check_base(keys, _COMPRESSED_BASE, base, full.yarn)
        return replace(full, base=base, magnitude=1.0)
    if row.rope_layers == "windowed" and not windowed and any(windows):
        return None
    dense = keys.count("leading_dense_block_count")
    if row.rope_layers == "windowed or dense" and not windowed and layer >= dense:
        return None
    if row.rope_layers == "not first of four" and layer % 4 == 0 and any(windows) and len(windows) != 4:
        return None
    if row.rope_layers == "three of four" and layer % 4 == 3:
        return None
    listed = keys.flags("attention.rope_pattern", len(windows)) if row.rope_layers == "listed" else None
    if listed and not listed[layer]:
        return None
    return local if windowed else full


def _ropes(keys: Keys, row: Architecture, key_length: int, *, windowed: bool) -> tuple[Rope | None, Rope | None]:
    """Return the rotation of full layers and of windowed ones; only keys that llama.cpp reads are read.

    Where their sizes differ, those of the layer asked for count.
    """
    suffix = "_swa" if windowed and row.windowed_sizes else ""
    dimensions = key_length
    if row.rope_keys == "all":
        own = keys.integer if row.rope_pairs else keys.count
        dimensions = own("rope.dimension_count", key_length)
        if suffix and row.mixer != "latent":  # there queries and keys of all layers rotate as many elements
            dimensions = keys.integer("rope.dimension_count_swa", dimensions)
    if row.halved_rotary and not windowed:
        dimensions //= 2
    if dimensions % 2 or dimensions > key_length or (dimensions < key_length and not row.partial_rotary):
        raise ConfigError(
            f"{keys.prefix}.rope.dimension_count{suffix} {dimensions} does not fit heads of {key_length} elements"
        )
    kind, factor = _scaling(keys)
    sections = _rope_sections(keys, row, dimensions)
    _refuse_unsupported_ropes(keys, row, dimensions, key_length)
    # Granite files without position embeddings have this flag.
    untrained = row.rope_optional and keys.metadata.get(f"{keys.prefix}.rope.scaling.finetuned") is False
    if not row.rope_pairs or untrained:
        return None, None

    base, windowed_base = (keys.real(f"rope.freq_base{of}", 10000.0) for of in ("", "_swa"))
    for of, found in (("", base), ("_swa", windowed_base)):
        _check_base(keys, f"rope.freq_base{of}", found, kind == "yarn")
    if alpha := keys.real("rope.scaling.alpha", 0.0):
        base *= alpha ** (key_length / (key_length - 2))
    full = Rope(
        dimensions=dimensions,
        base=base,
        pairs=row.rope_pairs,
        factor=1.0 if kind == "none" else factor,
        yarn=kind == "yarn",
        beta_fast=(keys.real("rope.scaling.yarn_beta_fast", 0.0) if row.yarn_keys else 0) or row.beta_fast,
        beta_slow=(keys.real("rope.scaling.yarn_beta_slow", 0.0) if row.yarn_keys else 0) or 1.0,
        original_context=keys.integer("rope.scaling.original_context_length", keys.integer("context_length")),
        magnitude=stretching(keys, row)[0],
        still=_still(sections, dimensions // 2, interleaved=row.rope_sections == "interleaved") if sections else (),
        factored=row.rope_factors != "",
    )
    unscaled, magnitude = Rope(dimensions, base, row.rope_pairs), keys.real("rope.scaling.attn_factor", 1.0)
    if row.rope_keys != "all":
        full = replace(
            full, base=full.base if row.rope_keys == "base" else 10000.0, factor=1.0, yarn=False, magnitude=1.0
        )
    local = {
        "same": full,
        # llama.cpp applies the file's factor here for any type of scaling; only full layers respect "none".
        "based": replace(full, base=keys.real("rope.freq_base_swa", full.base), factor=factor),
        "plain": unscaled,
        "own": replace(unscaled, base=windowed_base, magnitude=magnitude),
        "unscaled": replace(unscaled, base=keys.real("rope.freq_base_swa", base), magnitude=magnitude),
        "bare": replace(unscaled, base=keys.real("rope.freq_base_swa", base)),
    }
    return full, replace(local[row.window_rope], factored=row.rope_factors == "all")


def _check_base(keys: Keys, key: str, found: float, yarn: bool) -> None:
    """Refuse a base that gives no frequencies."""
    least = 1 if yarn else 0
    if found <= least:
        raise ConfigError(f"{keys.prefix}.{key} is {found}, but rotation needs a base above {least}")


def _scaling(keys: Keys) -> tuple[str, float]:
    """Return the type and the factor of context extension."""
    kind = keys.metadata.get(f"{keys.prefix}.rope.scaling.type", "linear")
    if kind not in ("none", "linear", "yarn", "longrope"):
        known = "none, linear, yarn, longrope"
        raise ConfigError(f"{keys.prefix}.rope.scaling.type {shown(kind)} is not supported; supported: {known}")
    factor = keys.real("rope.scaling.factor", keys.real("rope.scale_linear", 0.0)) or 1.0
    if kind == "yarn" and factor < 1:
        raise ConfigError(f"{keys.prefix}.rope.scaling.factor is {factor}; YaRN needs at least 1")
    if factor < 1e-6:
        raise ConfigError(f"{keys.prefix}.rope.scaling.factor is {factor}; expected at least 1e-06")
    return kind, factor


def stretching(keys: Keys, row: Architecture) -> tuple[float, float]:
    """Return the factor on cos and sin, and the factor on scores, where the context is extended.

    With `g(m) = 1 + 0.1 m ln F`, llama.cpp scales cos and sin by `g(1) / g(multiplier)`. DeepSeek has two multipliers:
    cos and sin are scaled by `g(mscale) / g(all)`, and scores by `g(all)²`. In the graphs of latent attention scores
    are also scaled by the square of the factor on cos and sin, and where that does not contain `g(1)`, since the
    extension is not YaRN's, of `g(1)`.
    """
    kind, factor = _scaling(keys)
    magnitude = keys.real("rope.scaling.attn_factor", 1.0)
    multiplier = keys.real("rope.scaling.yarn_log_multiplier", 0.0) if row.yarn_keys == "all" or row.mscale else 0

    def g(m: float) -> float:
        return 1 + 0.1 * m * math.log(1 if kind == "none" else factor)

    if not row.mscale:
        return magnitude * (g(1) / g(multiplier) if kind == "yarn" else 1), 1.0
    every = 0 if row.mscale == "alone" else multiplier / 0.1  # the file has a tenth of it
    mscale = every if row.mscale == "equal" and every else 1
    magnitude *= g(mscale) / g(every) if kind == "yarn" else 1
    return magnitude, (magnitude * (1 if kind == "yarn" else g(1)) * g(every)) ** 2


def _rope_sections(keys: Keys, row: Architecture, dimensions: int) -> Sequence[int]:
    """Return the numbers of pairs that rotate by an image's axes; empty if the file has no sections."""
    sections = keys.metadata.get(f"{keys.prefix}.rope.dimension_sections", [])
    if sections:
        # Interleaved, the first three of the four axes must cover all pairs.
        axes = 3 if row.rope_sections == "interleaved" else 4
        whole = isinstance(sections, Sequence) and len(sections) >= axes
        whole = whole and all(isinstance(entry, int) and entry >= 0 for entry in sections[:axes])
        fits = whole and dimensions <= _WIDEST and sum(sections[:axes]) >= dimensions // 2
        if not row.rope_sections or not fits:
            given = shown(list(sections) if isinstance(sections, Sequence) else sections)
            raise ConfigError(f"{keys.prefix}.rope.dimension_sections {given} is not supported")
    return sections


def _refuse_unsupported_ropes(keys: Keys, row: Architecture, dimensions: int, key_length: int) -> None:
    """Refuse scaled bases, windowed layers of other sizes, and the keys of Ollama's own converter."""
    if row.yarn_keys == "betas" and (extent := keys.real("rope.scaling.yarn_ext_factor", 1.0)) != 1:
        raise ConfigError(f"{keys.prefix}.rope.scaling.yarn_ext_factor {extent} is not supported, only 1")
    alpha = keys.real("rope.scaling.alpha", 0.0)
    if alpha and (not row.rope_alpha or key_length <= 2 or alpha > _LARGEST_ALPHA):
        raise ConfigError(f"{keys.prefix}.rope.scaling.alpha {alpha} is not supported")
    own = {"": (), "rotations": ("rope",), "heads": ("rope", "attention")}[row.windowed_sizes]
    own = own[1:] if row.mixer == "latent" else own
    for key, same in (
        ("rope.dimension_count_swa", dimensions),
        ("attention.key_length_swa", key_length),
        ("attention.value_length_swa", keys.integer("attention.value_length", key_length)),
    ):
        if row.windowed and not key.startswith(own) and keys.integer(key, same) != same:
            raise ConfigError(
                f"{keys.prefix}.{key} {keys.integer(key)} differs from other layers' {same}: not supported"
            )
    if "rope.freq_base" not in keys and "rope.global.freq_base" in keys:
        raise ConfigError(
            f"metadata key {keys.prefix}.rope.global.freq_base is specific to Ollama, and rope.freq_base, which "
            "llama.cpp reads, is missing; get a file converted by llama.cpp"
        )


def _still(sections: Sequence[int], pairs: int, *, interleaved: bool) -> tuple[int, ...]:
    """Return the pairs that belong to an image's fourth axis: in text its position is 0, that on others the token's.

    Interleaved, pair `i` belongs to axis `i % 3` until that axis has all its sections (ggml's `ggml_mrope_cache_init`).
    """
    if interleaved:
        return tuple(i for i in range(pairs) if i >= 3 * sections[i % 3])
    return tuple(range(sum(sections[:3]), pairs))


def read_windows(keys: Keys, row: Architecture, blocks: int, used: int) -> list[int | None]:
    """Return the sliding window of each of the file's blocks in tokens, or None if it attends to all tokens.

    The first `used` of them are the model's own; variants of a family differ in their number.
    """
    key = "attention.sliding_window"
    if row.window_blocks not in (0, used):
        return [None] * blocks
    if row.windowed == "all":
        return [keys.integer(key)] * blocks
    if row.windowed == "required":
        size = keys.integer(key, row.window or None)
    else:
        size = keys.count(key) if row.windowed else 0
    if not size:
        return [None] * blocks
    size = row.window if row.window_fixed else size
    name = f"{keys.prefix}.attention.sliding_window_pattern"
    if row.windowed == "required" and not row.window_period and name not in keys.metadata:
        raise ConfigError(f"metadata key {name} is missing; the file is incomplete or was converted wrongly")
    pattern = keys.metadata.get(name, row.window_period)
    if isinstance(pattern, Sequence) and not isinstance(pattern, str):
        windows = [
            size if local else None for local in keys.flags("attention.sliding_window_pattern", blocks, used) or ()
        ]
    else:
        period = keys.count("attention.sliding_window_pattern", row.window_period)
        full = 0 if row.full_first else period - 1
        windows = [None if period and i % period == full else size for i in range(blocks)]
    if not any(windows):
        raise ConfigError(f"{name} gives no layer the window of {size} tokens; llama.cpp does not run such a file")
    return windows
