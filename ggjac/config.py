"""Read and check a model's sizes and options: from its metadata, its tensors, and its row of `ARCHITECTURES`.

Keys and defaults follow llama.cpp (src/llama-arch.cpp, src/llama-model.cpp).
"""

import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any, NamedTuple

from ggjac.architectures import ARCHITECTURES, Architecture

# Larger than any model's sizes, and small enough that no product of them surprises.
MAX_SIZE = 2**31 - 1


class ConfigError(ValueError):
    """The file is valid GGUF, but not a model that can be run; the message names what is missing or unsupported."""


# Tensor -> its shape in named sizes (`_scopes`). Outside the blocks; `output` is absent if the head is tied.
_GLOBAL = {
    "token_embd.weight": ("vocabulary", "d"),
    "output_norm.weight": ("d",),
    "output_norm.bias": ("d",),
    "output.weight": ("vocabulary", "d"),
    "output.bias": ("vocabulary",),
    "rope_freqs.weight": ("pairs",),
    "rope_factors_long.weight": ("pairs",),
    "rope_factors_short.weight": ("pairs",),
}
_POSITIONS = {"position_embd.weight": ("context", "d")}
# In a block; `attn_qkv` may replace the first three (its rows are q | k | v).
_ATTENTION = {
    "attn_q": ("q", "d"),
    "attn_k": ("kv", "d"),
    "attn_v": ("kv", "d"),
    "attn_qkv": ("qkv", "d"),
    "attn_output": ("d", "q"),
}
_FFN = {
    "gated": {"ffn_gate": ("f", "d"), "ffn_up": ("f", "d"), "ffn_down": ("d", "f")},
    "fused": {"ffn_up": ("2f", "d"), "ffn_down": ("d", "f")},
    "plain": {"ffn_up": ("f", "d"), "ffn_down": ("d", "f")},
}
_QK_NORMS: dict[str, dict[str, tuple[str, ...]]] = {
    "": {},
    "head": {"attn_q_norm": ("head",), "attn_k_norm": ("head",)},
    "heads": {"attn_q_norm": ("heads", "head"), "attn_k_norm": ("kv heads", "head")},
    "rotated": {"attn_q_norm": ("head",), "attn_k_norm": ("head",)},
    "full": {"attn_q_norm": ("q",), "attn_k_norm": ("kv",)},
}
_EXPERTS = {
    "ffn_gate_inp": ("experts", "d"),
    "ffn_gate_exps": ("experts", "fe", "d"),
    "ffn_up_exps": ("experts", "fe", "d"),
    "ffn_down_exps": ("experts", "d", "fe"),
}
_SHARED_EXPERT = {
    "ffn_gate_shexp": ("fs", "d"),
    "ffn_up_shexp": ("fs", "d"),
    "ffn_down_shexp": ("d", "fs"),
    "ffn_gate_inp_shexp": ("d",),
}
# Values of `expert_gating_func` (llama.cpp); 0 means the architecture's default.
_ROUTERS = {1: "softmax", 2: "sigmoid"}
_OPTIONAL = {
    "attn_qkv.weight",
    "attn_norm_2.weight",
    "ffn_gate_inp_shexp.weight",
    "output.weight",
    "rope_freqs.weight",
    "rope_factors_long.weight",
    "rope_factors_short.weight",
}
_FUSED_QKV = {"attn_q.weight", "attn_k.weight", "attn_v.weight"}


@dataclass(frozen=True)
class Rope:
    """One rotary position embedding; see `ggjac.rope`.

    Attributes:
        dimensions: number of leading dims of each head that rotate.
        base: of the geometric series of frequencies.
        pairs: as in `Architecture.rope_pairs`.
        factor: of context extension, F; positions are scaled by 1/F (everywhere, or where YaRN interpolates).
        yarn: interpolate only low frequencies.
        beta_fast, beta_slow: numbers of turns within the original context between which YaRN blends.
        original_context: context length in tokens before its extension.
        magnitude: multiplies cos and sin.
        still: pairs that do not rotate.
        rounded: round angles as llama.cpp does; for parity.
    """

    dimensions: int
    base: float
    pairs: str
    factor: float = 1.0
    yarn: bool = False
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    original_context: int = 0
    magnitude: float = 1.0
    still: tuple[int, ...] = ()
    rounded: bool = False


@dataclass(frozen=True)
class Layer:
    """The properties that may differ from block to block.

    Attributes:
        window: number of tokens to which a position attends, itself included; None for all up to it.
        rope: rotation of queries and keys; None for none.
        xielu: αn, αp and β of the activation xIELU (arXiv 2411.13010), `β z + αp z²` for positive z and
            `β z + αn (exp(z) - 1 - z)` otherwise; None for other activations.
    """

    window: int | None
    rope: Rope | None
    xielu: tuple[float, float, float] | None = None


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and constants of a model, validated against its tensors.

    Attributes:
        architecture: `general.architecture`.
        row: its entry in `ARCHITECTURES`, with file-dependent options resolved.
        block_count: number of blocks, L, without those that predict later tokens.
        layers: properties of each block.
        d: embedding length.
        vocabulary: rows of the embedding matrix.
        context_length: largest number of tokens that the model supports.
        original_context: number of tokens beyond which long rope factors apply.
        head_count: number of query heads.
        head_count_kv: number of key/value heads; divides `head_count`.
        head_size: elements of a query, key or value head.
        feed_forward_length: hidden units of a dense feed-forward; 0 if not stated, where every block is a mixture.
        norm_epsilon: added to the mean square or the variance inside a norm's root.
        attention_scale: multiplies scores.
        attention_clamp: largest magnitude of queries, keys and values; 0 for no limit.
        attention_softcap, logit_softcap: `c tanh(z / c)` on scores, on logits; 0 for none.
        temperature_scale: growth of queries with position beyond the original context; 0 for none.
        embedding_scale, residual_scale, logit_scale: multiply embeddings, branches and logits.
        expert_count, expert_used_count: number of experts, and of those used per token; 0 for a dense model.
        expert_groups, expert_groups_used: number of groups of experts, and of those that a token's experts come from;
            1 and 1 without groups.
        expert_weights_scale: multiplies the weights of routed experts.
        expert_feed_forward_length, expert_shared_feed_forward_length: hidden units of a routed and the shared expert.
        leading_dense: number of dense blocks before the first mixture.
    """

    architecture: str
    row: Architecture
    block_count: int
    layers: tuple[Layer, ...]
    d: int
    vocabulary: int
    context_length: int
    original_context: int
    head_count: int
    head_count_kv: int
    head_size: int
    feed_forward_length: int
    norm_epsilon: float
    attention_scale: float
    attention_clamp: float
    attention_softcap: float
    logit_softcap: float
    temperature_scale: float
    embedding_scale: float
    residual_scale: float
    logit_scale: float
    expert_count: int
    expert_used_count: int
    expert_groups: int
    expert_groups_used: int
    expert_weights_scale: float
    expert_feed_forward_length: int
    expert_shared_feed_forward_length: int
    leading_dense: int

    def routed(self, layer: int) -> bool:
        """Return whether the feed-forward of a block is a mixture of experts."""
        return self.expert_count > 0 and layer >= self.leading_dense

    @property
    def hidden_units(self) -> int:
        """Hidden units of the widest feed-forward network, or expert of a mixture."""
        routed = max(self.expert_feed_forward_length, self.expert_shared_feed_forward_length)
        # Files may state the width of a dense network without having one.
        return routed if self.routed(0) else max(routed, self.feed_forward_length)

    @property
    def slices(self) -> dict[str, tuple[str, int, int]]:
        """The parts of fused tensors: stem -> (fused stem, first row, row after the last)."""
        q, kv = self.head_count * self.head_size, self.head_count_kv * self.head_size
        k, v = q + kv, q + 2 * kv
        parts = {"attn_q": ("attn_qkv", 0, q), "attn_k": ("attn_qkv", q, k), "attn_v": ("attn_qkv", k, v)}
        if self.row.ffn == "fused":
            f = self.feed_forward_length
            parts |= {"ffn_gate": ("ffn_up", 0, f), "ffn_up": ("ffn_up", f, 2 * f)}
        return parts

    @staticmethod
    def from_metadata(metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> "ModelConfig":
        """Read and check a model's configuration.

        Args:
            metadata: of the file, by full key.
            shapes: of every tensor, out x in.

        Raises:
            ConfigError: names the architecture, key or tensor that is missing, malformed or unsupported.
        """
        name = _architecture(metadata)
        keys = _Keys(metadata, name)
        row = _decided(keys, ARCHITECTURES[name], shapes)
        if not metadata.get(f"{name}.attention.causal", True):
            raise ConfigError(f"{name}.attention.causal is False: attention to later tokens is not supported")
        stored, blocks = _block_counts(keys, row, len(shapes))
        d, context = keys.integer("embedding_length"), keys.integer("context_length")
        heads, kv_heads, head_size = _heads(keys, stored, d)
        experts = _experts(keys, row, stored, shapes)
        # Only where every block is a mixture may the width of a dense feed-forward be missing.
        feed_forward = keys.for_all_blocks(
            "feed_forward_length", stored, 0 if experts.total and not experts.leading_dense else None
        )
        ropes, windows = _ropes(keys, row, head_size), _windows(keys, row, stored)
        xielu = _xielu(keys, blocks) if row.activation == "xielu" else [None] * blocks
        wide = row.wide_scale_blocks == blocks

        config = ModelConfig(
            architecture=name,
            row=row,
            block_count=blocks,
            layers=tuple(Layer(windows[i], _rope_of(row, ropes, i, windows), xielu[i]) for i in range(blocks)),
            d=d,
            vocabulary=shapes.get("token_embd.weight", (0,))[0],
            context_length=context,
            original_context=keys.integer("rope.scaling.original_context_length", context),
            head_count=heads,
            head_count_kv=kv_heads,
            head_size=head_size,
            feed_forward_length=feed_forward,
            norm_epsilon=keys.real(f"attention.layer_norm_{'rms_' if row.norm == 'rms' else ''}epsilon"),
            attention_scale=_attention_scale(keys, row, max(1, d // heads) if wide else head_size),
            attention_clamp=keys.real("attention.clamp_kqv", 0.0) if row.clamp_key else 0.0,
            attention_softcap=_softcap(keys, "attn_logit_softcapping", row.attention_softcap),
            logit_softcap=_softcap(keys, "final_logit_softcapping", row.logit_softcap),
            temperature_scale=keys.real("attention.temperature_scale", 0.0) if row.temperature else 0.0,
            embedding_scale=_embedding_scale(keys, row, d),
            residual_scale=_residual_scale(keys, row, blocks),
            logit_scale=_logit_scale(keys, row, d),
            expert_count=experts.total,
            expert_used_count=experts.used,
            expert_groups=experts.groups,
            expert_groups_used=experts.groups_used,
            expert_weights_scale=(keys.real("expert_weights_scale", 0.0) if row.expert_scale_key else 0) or 1.0,
            expert_feed_forward_length=experts.width,
            expert_shared_feed_forward_length=experts.shared_width,
            leading_dense=experts.leading_dense,
        )
        left_out = tuple(f"blk.{i}." for i in range(blocks, stored))
        _check_tensors(config, {name: shape for name, shape in shapes.items() if not name.startswith(left_out)})
        return config


def _architecture(metadata: Mapping[str, Any]) -> str:
    """Return `general.architecture`.

    Raises:
        ConfigError: the file is not a model, or its architecture has no row.
    """
    kind, name = metadata.get("general.type", "model"), metadata.get("general.architecture")
    if kind != "model":
        raise ConfigError(f"general.type is {_shown(kind)}, not a language model; give the model's own file")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        # Similar names first.
        alike = get_close_matches(name[:64], ARCHITECTURES) if isinstance(name, str) else []
        some = list(dict.fromkeys([*alike, *ARCHITECTURES]))[:8]
        raise ConfigError(
            f"architecture {_shown(name)} is not supported; supported: {', '.join(some)} and "
            f"{len(ARCHITECTURES) - len(some)} more (docs/architectures.md)"
        )
    return name


def _block_counts(keys: "_Keys", row: Architecture, tensors: int) -> tuple[int, int]:
    """Return the number of blocks in the file and the number used, which leaves out predictors of later tokens."""
    stored = keys.integer("block_count")
    if stored > tensors:
        raise ConfigError(f"{keys.prefix}.block_count is {stored}, but the file holds only {tensors} tensors")
    predictors = keys.count("nextn_predict_layers") if row.predictors else 0
    if predictors >= stored:
        raise ConfigError(f"{keys.prefix}.nextn_predict_layers is {predictors}, of {stored} blocks in all")
    return stored, stored - predictors


def _heads(keys: "_Keys", blocks: int, d: int) -> tuple[int, int, int]:
    """Return the number of query heads, of key/value heads, and the elements of a head."""
    heads = keys.for_all_blocks("attention.head_count", blocks)
    kv_heads = keys.for_all_blocks("attention.head_count_kv", blocks, default=heads)
    if heads % kv_heads:
        raise ConfigError(f"{keys.prefix}.attention: {heads} heads cannot share {kv_heads} key/value heads evenly")
    head_size = keys.integer("attention.key_length", d // heads)
    value_length = keys.integer("attention.value_length", head_size)
    if value_length != head_size:
        raise ConfigError(
            f"{keys.prefix}.attention: values of {value_length} elements with keys of {head_size} are not supported"
        )
    return heads, kv_heads, head_size


class _Experts(NamedTuple):
    """Sizes of the mixtures; see the fields of `ModelConfig`. The defaults are those of a dense model."""

    total: int = 0
    used: int = 0
    groups: int = 1
    groups_used: int = 1
    width: int = 0
    shared_width: int = 0
    leading_dense: int = 0


def _experts(keys: "_Keys", row: Architecture, blocks: int, shapes: Mapping[str, tuple[int, ...]]) -> _Experts:
    """Return the sizes of the mixtures of experts."""
    total = keys.count("expert_count")
    if not total:
        return _Experts()
    used = keys.for_all_blocks("expert_used_count", blocks)
    if used > total:
        raise ConfigError(f"{keys.prefix}.expert_used_count is {used}, but there are {total} experts")
    step = keys.integer("interleave_moe_layer_step", 1)
    if step > 1:
        raise ConfigError(
            f"{keys.prefix}.interleave_moe_layer_step {step}: dense blocks between mixtures are not supported"
        )
    leading = keys.count("leading_dense_block_count") if row.leading_dense else 0
    return _Experts(total, used, *_groups(keys, total, used), *_expert_widths(keys, row, shapes, leading), leading)


def _decided(keys: "_Keys", row: Architecture, shapes: Mapping[str, tuple[int, ...]]) -> Architecture:
    """Resolve the row's file-dependent options, using block 0 as representative."""
    if row.parallel_key:
        row = replace(row, parallel=keys.flag("use_parallel_residual"))
    if row.parallel_unless_normed:
        own, shared = row.norms.ffn_in
        normed = f"blk.0.{own}.weight" in shapes
        row = replace(row, parallel=not normed, norms=replace(row.norms, ffn_in=(own if normed else shared,)))
    if row.qk_norm_optional and "blk.0.attn_q_norm.weight" not in shapes:
        row = replace(row, qk_norm="")
    if row.router_key:
        kind = keys.count("expert_gating_func")
        row = replace(row, router=_ROUTERS.get(kind, "") if kind else row.router)
        if not row.router:
            known = ", ".join(f"{i} {name}" for i, name in _ROUTERS.items())
            raise ConfigError(f"{keys.prefix}.expert_gating_func is {kind or 'missing'}; supported: {known}")
    if row.renormalize_key:
        row = replace(row, renormalize="expert_weights_norm" in keys and keys.flag("expert_weights_norm"))
    return row


def _groups(keys: "_Keys", experts: int, used: int) -> tuple[int, int]:
    """Return the number of groups of experts, and of those a token chooses from; llama.cpp reads them in any family."""
    groups = keys.count("expert_group_count")
    if groups <= 1:
        return 1, 1
    chosen = keys.integer("expert_group_used_count")
    # A group is ranked by its best two experts.
    if experts % groups or experts < 2 * groups or chosen > groups or used > chosen * (experts // groups):
        raise ConfigError(
            f"{keys.prefix}.expert_group_count is {groups}, expert_group_used_count {chosen}: {used} of {experts} "
            "experts cannot be chosen"
        )
    return groups, chosen


def _ropes(keys: "_Keys", row: Architecture, key_length: int) -> tuple[Rope | None, Rope | None]:
    """Return the rotation of full layers and of windowed ones; only keys that llama.cpp reads are read."""
    dimensions = keys.integer("rope.dimension_count", key_length)
    if dimensions % 2 or dimensions > key_length or (dimensions < key_length and not row.partial_rotary):
        raise ConfigError(
            f"{keys.prefix}.rope.dimension_count {dimensions} does not fit heads of {key_length} elements"
        )
    kind = keys.metadata.get(f"{keys.prefix}.rope.scaling.type", "linear")
    if kind not in ("none", "linear", "yarn", "longrope"):
        known = "none, linear, yarn, longrope"
        raise ConfigError(f"{keys.prefix}.rope.scaling.type {_shown(kind)} is not supported; supported: {known}")
    sections = _rope_sections(keys, row, dimensions)
    _refuse_unsupported_ropes(keys, row, dimensions, key_length)
    # Granite files without position embeddings have this flag.
    untrained = row.rope_optional and keys.metadata.get(f"{keys.prefix}.rope.scaling.finetuned") is False
    if not row.rope_pairs or untrained:
        return None, None

    factor = keys.real("rope.scaling.factor", keys.real("rope.scale_linear", 0.0)) or 1.0
    if kind == "yarn" and factor < 1:
        raise ConfigError(f"{keys.prefix}.rope.scaling.factor is {factor}; YaRN needs at least 1")
    magnitude = attention_factor = keys.real("rope.scaling.attn_factor", 1.0)
    if kind == "yarn":
        # llama.cpp scales cos and sin by g(1) / g(multiplier), g(m) = 1 + 0.1 m ln F (DeepSeek's mscale).
        multiplier = keys.real("rope.scaling.yarn_log_multiplier", 0.0) if row.yarn_keys else 0
        magnitude *= (1 + 0.1 * math.log(factor)) / (1 + 0.1 * multiplier * math.log(factor))
    base, least = keys.real("rope.freq_base", 10000.0), 1 if kind == "yarn" else 0
    if base <= least:
        raise ConfigError(f"{keys.prefix}.rope.freq_base is {base}, but rotation needs a base above {least}")
    full = Rope(
        dimensions=dimensions,
        base=base,
        pairs=row.rope_pairs,
        factor=1.0 if kind == "none" else factor,
        yarn=kind == "yarn",
        beta_fast=(keys.real("rope.scaling.yarn_beta_fast", 0.0) if row.yarn_keys else 0) or 32.0,
        beta_slow=(keys.real("rope.scaling.yarn_beta_slow", 0.0) if row.yarn_keys else 0) or 1.0,
        original_context=keys.integer("rope.scaling.original_context_length", keys.integer("context_length")),
        magnitude=magnitude,
        still=_still(sections, dimensions // 2) if sections else (),
    )
    unscaled = Rope(dimensions, full.base, row.rope_pairs)
    windowed = {
        "same": full,
        # llama.cpp applies the file's factor here for any type of scaling; only full layers respect "none".
        "based": replace(full, base=keys.real("rope.freq_base_swa", full.base), factor=factor),
        "plain": unscaled,
        "own": replace(unscaled, base=keys.real("rope.freq_base_swa", 10000.0), magnitude=attention_factor),
    }
    return full, windowed[row.window_rope]


def _rope_sections(keys: "_Keys", row: Architecture, dimensions: int) -> Sequence[int]:
    """Return the numbers of pairs that rotate by an image's axes; empty if the file has no sections."""
    sections = keys.metadata.get(f"{keys.prefix}.rope.dimension_sections", [])
    if sections:
        # Text has the same position on the first three axes and 0 on the fourth: the three must cover all pairs.
        whole = isinstance(sections, Sequence) and all(isinstance(entry, int) for entry in sections[:3])
        whole = whole and len(sections) >= 3
        if not row.rope_sections or not whole or sum(sections[:3]) < dimensions // 2:
            shown = _shown(list(sections) if isinstance(sections, Sequence) else sections)
            raise ConfigError(f"{keys.prefix}.rope.dimension_sections {shown} is not supported")
    return sections


def _refuse_unsupported_ropes(keys: "_Keys", row: Architecture, dimensions: int, key_length: int) -> None:
    """Refuse scaled bases, windowed layers of other sizes, and the keys of Ollama's own converter."""
    if alpha := keys.real("rope.scaling.alpha", 0.0):
        # Hunyuan scales its base by it; llama.cpp's converter writes the scaled base instead, for text models.
        raise ConfigError(f"{keys.prefix}.rope.scaling.alpha {alpha} is not supported")
    for key, same in (
        ("rope.dimension_count_swa", dimensions),
        ("attention.key_length_swa", key_length),
        ("attention.value_length_swa", key_length),
    ):
        if row.windowed and keys.integer(key, same) != same:
            raise ConfigError(
                f"{keys.prefix}.{key} {keys.integer(key)} differs from other layers' {same}: not supported"
            )
    if "rope.freq_base" not in keys and "rope.global.freq_base" in keys:
        raise ConfigError(
            f"metadata key {keys.prefix}.rope.global.freq_base is specific to Ollama, and rope.freq_base, which "
            "llama.cpp reads, is missing; get a file converted by llama.cpp"
        )


def _still(sections: Sequence[int], pairs: int) -> tuple[int, ...]:
    """Return the pairs that belong to an image's fourth axis, whose position is 0 in text.

    Pair `i` belongs to axis `i % 3` until that axis has all its sections (ggml's `ggml_mrope_cache_init`).
    """
    return tuple(i for i in range(pairs) if i >= 3 * sections[i % 3])


def _rope_of(
    row: Architecture, ropes: tuple[Rope | None, Rope | None], layer: int, windows: Sequence[int | None]
) -> Rope | None:
    """Return the rotation of one layer; `windows` are those of all layers."""
    full, windowed = ropes
    if row.rope_layers == "windowed" and windows[layer] is None and any(windows):
        return None
    if row.rope_layers == "three of four" and layer % 4 == 3:
        return None
    return full if windows[layer] is None else windowed


def _windows(keys: "_Keys", row: Architecture, blocks: int) -> list[int | None]:
    """Return each layer's sliding window in tokens, or None if it attends to all tokens."""
    key = "attention.sliding_window"
    if row.window_blocks not in (0, blocks):
        return [None] * blocks
    if row.windowed == "required":
        size = keys.integer(key, row.window or None)
    else:
        size = keys.count(key) if row.windowed else 0
    if not size:
        return [None] * blocks
    name = f"{keys.prefix}.attention.sliding_window_pattern"
    pattern = keys.metadata.get(name, row.window_period)
    if isinstance(pattern, Sequence) and not isinstance(pattern, str):
        if len(pattern) != blocks or not all(isinstance(entry, bool) for entry in pattern):
            raise ConfigError(f"metadata key {name} must have one true or false for each of {blocks} blocks")
        windows = [size if local else None for local in pattern]
    else:
        period = keys.count("attention.sliding_window_pattern", row.window_period)
        windows = [None if period and i % period == period - 1 else size for i in range(blocks)]
    if not any(windows):
        raise ConfigError(f"{name} gives no layer the window of {size} tokens; llama.cpp does not run such a file")
    return windows


def _xielu(keys: "_Keys", blocks: int) -> list[tuple[float, float, float]]:
    """Return αn, αp and β of each block's xIELU; the file has both α as ggml's `ggml_xielu` takes them."""
    n, p, beta, eps = (keys.of_each_block(f"xielu.{name}", blocks) for name in ("alpha_n", "alpha_p", "beta", "eps"))
    if min(eps) < -1e-5:
        # Between eps and 0 the exponential is that of eps: a step of αn eps at 0, which is neglected where tiny.
        raise ConfigError(f"metadata key xielu.eps is {min(eps)}: steps larger than 1e-05 are not supported")
    return [(b + _softplus(a), _softplus(c), b) for a, c, b in zip(n, p, beta, strict=True)]


def _softplus(x: float) -> float:
    """Return `log(1 + exp(x))`."""
    return x if x > 20 else math.log1p(math.exp(x))


def _softcap(keys: "_Keys", key: str, default: float | None) -> float:
    """Return a cap; 0, whatever the file says, if the default is None."""
    return 0.0 if default is None else keys.real(key, default)


def _attention_scale(keys: "_Keys", row: Architecture, width: int) -> float:
    """Return the factor on scores: the file's, if the family reads it and it is not 0, else 1/√width."""
    return (keys.real("attention.scale", 0.0) if row.attention_scale_key else 0) or width**-0.5


def _embedding_scale(keys: "_Keys", row: Architecture, d: int) -> float:
    """Return the factor on embeddings; the root is rounded to float32, as in llama.cpp."""
    if row.embedding_scale == "sqrt":
        return struct.unpack("<f", struct.pack("<f", math.sqrt(d)))[0]
    return (keys.real("embedding_scale", row.scale_defaults[0]) if row.embedding_scale == "key" else 0) or 1.0


def _residual_scale(keys: "_Keys", row: Architecture, blocks: int) -> float:
    """Return the factor on branches."""
    return (keys.real("residual_scale", row.scale_defaults[1] / math.sqrt(blocks)) if row.residual_scale else 0) or 1.0


def _logit_scale(keys: "_Keys", row: Architecture, d: int) -> float:
    """Return the factor on logits."""
    if not row.logit_scale:
        return 1.0
    scale = keys.real("logit_scale", row.scale_defaults[2] / d or None)
    if row.logit_scale == "multiply":
        return scale or 1.0
    if scale == 0:
        raise ConfigError(f"metadata key {keys.prefix}.logit_scale is 0, but logits are divided by it")
    return 1 / scale


def _expert_widths(
    keys: "_Keys", row: Architecture, shapes: Mapping[str, tuple[int, ...]], first: int
) -> tuple[int, int]:
    """Return the hidden units of a routed expert and of the shared one, 0 if absent; `first` is the first mixture."""
    if row.expert_widths == "tensors":
        # Families use different keys, and Qwen 1.5's files have none for the shared expert.
        routed, shared = (shapes.get(f"blk.{first}.ffn_up_{kind}.weight", ()) for kind in ("exps", "shexp"))
        stated = keys.count("expert_shared_feed_forward_length")
        return routed[1] if len(routed) == 3 else 0, stated or (shared[0] if len(shared) == 2 else 0)
    width = keys.integer("expert_feed_forward_length")
    each = keys.count("expert_shared_feed_forward_length") if row.expert_widths == "shared count" else 0
    return width, (each or width) * keys.integer("expert_shared_count")


def _check_tensors(config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse missing tensors, wrong shapes, and tensors that the architecture does not use."""
    known, needed = set(), "exp_probs_b.bias" if config.row.selection_bias == "required" else ""
    for prefix, table, sizes in _scopes(config):
        optional = _OPTIONAL | (_FUSED_QKV if f"{prefix}attn_qkv.weight" in shapes else set())
        for short, axes in table.items():
            name, shape = prefix + short, tuple(sizes[axis] for axis in axes)
            known.add(name)
            if name not in shapes:
                if short == needed or not (short.endswith(".bias") or short in optional):
                    raise ConfigError(f"tensor {name} is missing; the file is incomplete, download or convert it again")
            elif tuple(shapes[name]) != shape:
                raise ConfigError(f"tensor {name} has shape {list(shapes[name])}, the metadata calls for {list(shape)}")
    for name in shapes:
        if name not in known:
            raise ConfigError(f"tensor {_shown(name)} is not part of a {config.architecture} model as supported here")


def _scopes(config: ModelConfig) -> Iterator[tuple[str, dict[str, tuple[str, ...]], dict[str, int]]]:
    """Yield name prefix, table of tensors and named sizes, for the tensors outside the blocks and for each block."""
    full = next((layer.rope for layer in config.layers if layer.rope), None)
    q, kv, f = config.head_count * config.head_size, config.head_count_kv * config.head_size, config.feed_forward_length
    sizes = {
        "d": config.d,
        "vocabulary": config.vocabulary,
        "context": config.context_length,
        "pairs": full.dimensions // 2 if full else 0,
        "heads": config.head_count,
        "kv heads": config.head_count_kv,
        "head": config.head_size,
        "q": q,
        "kv": kv,
        "qkv": q + 2 * kv,
        "f": f,
        "2f": 2 * f,
        "experts": config.expert_count,
        "fe": config.expert_feed_forward_length,
        "fs": config.expert_shared_feed_forward_length,
    }
    outside = _GLOBAL | (_POSITIONS if config.row.positions else {})
    if config.row.norm == "bare":
        outside = {name: axes for name, axes in outside.items() if not name.startswith("output_norm.")}
    yield "", outside, sizes
    for i in range(config.block_count):
        yield f"blk.{i}.", _block_table(config, i), sizes


def _block_table(config: ModelConfig, layer: int) -> dict[str, tuple[str, ...]]:
    """Return the tensors of a block with their shapes; every matrix and LayerNorm may have a bias."""
    row, routed = config.row, config.routed(layer)
    matrices = _ATTENTION | (_EXPERTS if routed else _FFN[row.ffn])
    if routed and config.expert_shared_feed_forward_length:
        matrices |= _SHARED_EXPERT
    places = (row.norms.attention_in, row.norms.attention_out, row.norms.ffn_in, row.norms.ffn_out)
    norms: dict[str, tuple[str, ...]] = {name: ("d",) for names in places for name in names if row.norm != "bare"}
    table = {f"{name}.weight": axes for name, axes in (matrices | norms | _QK_NORMS[row.qk_norm]).items()}
    table |= {f"{name}.bias": axes[:-1] for name, axes in matrices.items() if len(axes) > 1}
    if row.norm == "layer" or row.norm_bias:
        table |= {f"{name}.bias": axes for name, axes in norms.items()}
    if row.sinks:
        table["attn_sinks.weight"] = ("heads",)
    if row.selection_bias and routed:
        table["exp_probs_b.bias"] = ("experts",)
    return table


@dataclass(frozen=True)
class _Keys:
    """Checked access to the metadata under an architecture's prefix."""

    metadata: Mapping[str, Any]
    prefix: str

    def __contains__(self, key: str) -> bool:
        """Return whether the file has a key."""
        return f"{self.prefix}.{key}" in self.metadata

    def number(self, key: str, default: int | float | None = None) -> int | float:
        """Return a finite, non-negative number."""
        name = f"{self.prefix}.{key}"
        value = self.metadata.get(name, default)
        if value is None:
            raise ConfigError(f"metadata key {name} is missing; the file is incomplete or was converted wrongly")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise ConfigError(f"metadata key {name} is {_shown(value)}; expected a finite, non-negative number")
        return value

    def real(self, key: str, default: float | None = None) -> float:
        """Return a finite, non-negative number as a float, whatever type the file stores."""
        return float(self.number(key, default))

    def integer(self, key: str, default: int | None = None) -> int:
        """Return an integer from 1 to `MAX_SIZE`."""
        value = self.number(key, default)
        if not isinstance(value, int) or not 1 <= value <= MAX_SIZE:
            raise ConfigError(
                f"metadata key {self.prefix}.{key} is {value}; expected a whole number from 1 to {MAX_SIZE}"
            )
        return value

    def count(self, key: str, default: int = 0) -> int:
        """Return an integer from 0 to `MAX_SIZE`, or the default if the key is absent."""
        return self.integer(key, default) if self.number(key, default) else 0

    def of_each_block(self, name: str, blocks: int) -> list[float]:
        """Return a finite number of either sign for each block, from a scalar or an array; `name` is the full key."""
        value = self.metadata.get(name)
        if value is None:
            raise ConfigError(f"metadata key {name} is missing; the file is incomplete or was converted wrongly")
        entries = value if isinstance(value, Sequence) and not isinstance(value, str) else [value] * blocks
        if len(entries) != blocks:
            raise ConfigError(f"metadata key {name} has {len(entries)} entries for {blocks} blocks")
        for entry in entries:
            if isinstance(entry, bool) or not isinstance(entry, int | float) or not abs(entry) < math.inf:
                raise ConfigError(f"metadata key {name} contains {_shown(entry)}; expected finite numbers")
        return [float(entry) for entry in entries]

    def flag(self, key: str) -> bool:
        """Return true or false; the key is required."""
        name = f"{self.prefix}.{key}"
        value = self.metadata.get(name)
        if not isinstance(value, bool):
            shown = "missing" if value is None else _shown(value)
            raise ConfigError(f"metadata key {name} is {shown}; expected true or false; convert the file again")
        return value

    def for_all_blocks(self, key: str, blocks: int, default: int | None = None) -> int:
        """Return a positive integer that is the same for every block, from a scalar or an array."""
        name = f"{self.prefix}.{key}"
        value = self.metadata.get(name)
        if value is None and default is not None:
            return default
        if not isinstance(value, Sequence) or isinstance(value, str):
            return self.integer(key)
        if len(value) != blocks:
            raise ConfigError(f"metadata key {name} has {len(value)} entries for {blocks} blocks")
        sizes = {_Keys({name: entry}, self.prefix).integer(key) for entry in value}
        if len(sizes) > 1:
            raise ConfigError(
                f"metadata key {name} differs between blocks ({min(sizes)} to {max(sizes)}): not supported"
            )
        return sizes.pop()


def _shown(value: Any) -> str:
    """Return a value from a file for a message: shortened, and with control characters escaped."""
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
