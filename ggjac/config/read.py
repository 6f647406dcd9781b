"""Read and check a model's sizes and options: from its metadata, its tensors, and its row of `ARCHITECTURES`.

Keys and defaults follow llama.cpp (src/llama-arch.cpp, src/llama-model.cpp).
"""

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from typing import Any, NamedTuple

from ggjac.architectures import ARCHITECTURES, Architecture
from ggjac.config import others
from ggjac.config.keys import ConfigError, Keys, shown
from ggjac.config.mixers import MIXERS
from ggjac.config.model import (
    Adjugates,
    Alibi,
    Compressed,
    Indexer,
    Latent,
    Layer,
    ModelConfig,
    RecurrentSizes,
    Streams,
)
from ggjac.config.rotations import read_windows, rope_of, stretching
from ggjac.config.tensors import check_tensors

# Values of `expert_gating_func` (llama.cpp); 0 means the architecture's default.
_ROUTERS = {1: "softmax", 2: "sigmoid", 4: "sqrt_softplus"}
# Of a compressed memory, tokens in a group -> groups that a key is made of. Only groups of the former are selected.
_WINDOWS = {4: 2, 128: 1}
_SELECTED = 4
# Residual streams of the kinds whose number the file does not say.
_COUNTS = {"held": 2, "input": 2, "predicted": 4}
# Of blocks that are applied several times (llama.cpp's LLAMA_MAX_LAYERS).
MAX_BLOCKS = 512
# Of Sinkhorn's iteration; models have 20.
MAX_ROUNDS = 1000
# Tensors that have a projection of their own to the values.
_VALUES = ("attn_v", "attn_qkv")
_KEYS_AND_VALUES = ("attn_k", "attn_v", "attn_k_norm")


def read_config(metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> ModelConfig:
    """Read and check a model's configuration.

    Args:
        metadata: of the file, by full key.
        shapes: of every tensor, out x in.

    Raises:
        ConfigError: names the architecture, key or tensor that is missing, malformed or unsupported.
    """
    name = _architecture(metadata)
    keys = Keys(metadata, name)
    stored, blocks = _block_counts(keys, ARCHITECTURES[name], shapes)
    row = _decided(keys, ARCHITECTURES[name], blocks, shapes)
    if not metadata.get(f"{name}.attention.causal", True):
        raise ConfigError(
            f"{name}.attention.causal is False: attention to later tokens is not supported; take another model"
        )
    d, context = keys.integer("embedding_length"), keys.integer("context_length")
    embedding = "token_embd.weight"
    if row.embedding_optional and embedding not in shapes:
        embedding = "output.weight"
    experts = _experts(keys, row, stored, shapes)
    layers, order = _layers(keys, row, stored, blocks, experts, shapes), _order(keys, row, blocks)
    temperature = keys.real("attention.temperature_scale", 0.0) if row.temperature else 0.0

    config = ModelConfig(
        architecture=name,
        embedding=embedding,
        row=row,
        block_count=len(order),
        order=order,
        turn=_stack(keys, row, blocks),
        layers=layers * (len(order) // blocks),
        d=d,
        vocabulary=shapes.get(embedding, (0,))[0],
        context_length=context,
        original_context=keys.integer("rope.scaling.original_context_length", context),
        recurrence=_recurrence(keys, row, stored, context),
        norm_epsilon=_epsilon(keys, row),
        attention_clamp=keys.real("attention.clamp_kqv", 0.0) if row.clamp_key else 0.0,
        attention_softcap=_softcap(keys, row, "attn_logit_softcapping", row.attention_softcap),
        logit_softcap=_softcap(keys, row, "final_logit_softcapping", row.logit_softcap),
        temperature_scale=temperature,
        temperature_length=_temperature_length(keys, row, context) if temperature else context,
        embedding_scale=_embedding_scale(keys, row, d),
        residual_scale=_residual_scale(keys, row, blocks),
        skip_scale=keys.real("residual_scale") if row.normed_skip else 1.0,
        value_scale=(keys.real("attention.value_scale", 0.0) if row.value_scale else 0) or 1.0,
        logit_scale=_logit_scale(keys, row, d),
        expert_count=experts.total,
        expert_groups=experts.groups,
        expert_groups_used=experts.groups_used,
        expert_weights_scale=(keys.real("expert_weights_scale", 0.0) if row.expert_scale_key else 0) or 1.0,
        expert_shared_feed_forward_length=experts.shared_width,
        decay_bound=_decay_bound(keys, row),
        expert_latent=keys.count(row.expert_latent) if row.expert_latent else 0,
        adjugates=_adjugates(keys, row, experts, layers[0].key_size),
        indexer=_indexer(keys, row, stored),
        loop_norm=len(order) > blocks and not ("skip_loop_final_norm" in keys and keys.flag("skip_loop_final_norm")),
        streams=_streams(keys, row),
        situ=_situ(keys) if row.activation == "situ" else (0.0, 0.0),
        inputs=row.inputs_width or (keys.count("embedding_length_per_layer_input") if row.inputs else 0),
    )
    # Blocks that read another's keys may still have tensors for their own.
    idle = {f"blk.{i}.{stem}" for i, own in enumerate(layers) if own.source is not None for stem in _KEYS_AND_VALUES}
    idle |= {f"blk.{i}.{stem}" for i, own in enumerate(layers) if own.source is None for stem in _of_source(own)}
    left_out = idle | {f"blk.{i}" for i in range(stored) if i >= blocks or layers[i].idle}
    used = {
        row.export.name(name): shape
        for name, shape in shapes.items()
        if not (name.startswith(row.export.dropped) or {_up_to(name, 2), _up_to(name, 3)} & left_out)
    }
    check_tensors(config, used)
    return config


def _of_source(own: Layer) -> list[str]:
    """Return the tensors of a block that it uses only if it reads an earlier block's values."""
    return [stem for mixer in own.mixers for stem in MIXERS[mixer].sourced]


def _up_to(name: str, parts: int) -> str:
    """Return the first parts of a tensor's name: 2 of them name its block."""
    return ".".join(name.split(".", parts)[:parts])


def _architecture(metadata: Mapping[str, Any]) -> str:
    """Return `general.architecture`.

    Raises:
        ConfigError: the file is not a model, or its architecture has no row.
    """
    kind, name = metadata.get("general.type", "model"), metadata.get("general.architecture")
    if kind != "model":
        known = f" ({others.TYPES[kind]})" if isinstance(kind, str) and kind in others.TYPES else ""
        raise ConfigError(f"general.type is {shown(kind)}{known}, not a language model; give the model's own file")
    if name is None:
        raise ConfigError("the file does not say what it is: general.architecture is missing; take another file")
    if isinstance(name, str) and name in others.ARCHITECTURES:
        raise ConfigError(
            f"architecture {shown(name)} is not supported: it is {others.ARCHITECTURES[name]}, and ggjac needs a "
            "language model that predicts the next token"
        )
    if isinstance(name, str) and name in others.LEFT_OUT:
        raise ConfigError(f"architecture {shown(name)} is not supported: {others.LEFT_OUT[name]}; take another model")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        # Similar names first.
        alike = get_close_matches(name[:64], ARCHITECTURES) if isinstance(name, str) else []
        some = list(dict.fromkeys([*alike, *ARCHITECTURES]))[:8]
        raise ConfigError(
            f"architecture {shown(name)} is not supported; supported: {', '.join(some)} and "
            f"{len(ARCHITECTURES) - len(some)} more (`ggjac info --help` lists them)"
        )
    return name


def _block_counts(keys: Keys, row: Architecture, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
    """Return the number of blocks that the file states, and the number used, which leaves out predictors.

    Those are the last `nextn_predict_layers` blocks, which predict tokens after the next one. llama.cpp leaves them out
    in every family. Their tensors may be missing; but a block that has others only is one of the model's own.
    """
    stored = keys.integer("block_count")
    predictors = keys.count("nextn_predict_layers")
    key = f"{keys.prefix}.nextn_predict_layers"
    if predictors and not any(name.startswith("blk.0.") for name in shapes):
        raise ConfigError("the file has only the blocks that predict later tokens; give the model's own file")
    if row.streams == "held" and stored > MAX_BLOCKS:
        raise ConfigError(f"{keys.prefix}.block_count is {stored}, more than {MAX_BLOCKS}; take another model")
    if stored > len(shapes) and row.streams != "held":  # otherwise blocks share tensors
        raise ConfigError(f"{keys.prefix}.block_count is {stored}, but the file holds only {len(shapes)} tensors")
    if predictors >= stored:
        raise ConfigError(f"{key} is {predictors}, of {stored} blocks in all")
    ordinary = {_up_to(name, 2) for name in shapes} - {_up_to(name, 2) for name in shapes if ".nextn." in name}
    for i in range(stored - predictors, stored):
        if f"blk.{i}" in ordinary:
            raise ConfigError(
                f"{key} is {predictors}, but block {i}, one of the last, has no tensor of a predictor (nextn); the key "
                "is wrong: convert the model again"
            )
    return stored, stored - predictors


def _order(keys: Keys, row: Architecture, blocks: int) -> tuple[int, ...]:
    """Return the numbers of the file's blocks in the order in which they are applied."""
    if row.streams == "held":
        return _cycles(keys, blocks)
    loops = keys.integer("num_loops", 1) if row.looped else 1
    if loops * blocks > MAX_BLOCKS:
        raise ConfigError(
            f"{keys.prefix}.num_loops is {loops}: so many times {blocks} blocks exceed {MAX_BLOCKS}; take another model"
        )
    return (*range(blocks),) * loops


def _cycles(keys: Keys, blocks: int) -> tuple[int, ...]:
    """Return the order of two stacks of blocks: in each cycle the first several times, and then the second."""
    stack, high, low = (keys.integer(f"hrm.{key}") for key in ("layers_per_stack", "h_cycles", "l_cycles"))
    if stack * high * (low + 1) != blocks:
        raise ConfigError(
            f"{keys.prefix}.block_count is {blocks}, but {high} cycles of {low} passes and one over {stack} blocks "
            f"make {stack * high * (low + 1)}; convert the model again"
        )
    return ((*range(stack),) * low + (*range(stack, 2 * stack),)) * high


def _stack(keys: Keys, row: Architecture, blocks: int) -> int:
    """Return the number of blocks that a pass goes through."""
    return keys.integer("hrm.layers_per_stack") if row.streams == "held" else blocks


def _layers(
    keys: Keys,
    row: Architecture,
    stored: int,
    blocks: int,
    experts: "_Experts",
    shapes: Mapping[str, tuple[int, ...]],
) -> tuple[Layer, ...]:
    """Return the properties of each block that is used; the file states them for all that are stored."""
    d, least = keys.integer("embedding_length"), 0 if row.recurrent else 1
    heads = keys.counts("attention.head_count", stored, 0 if row.recurrent else None, least=least)
    kv_heads = keys.counts("attention.head_count_kv", stored, heads, least=least)
    # Only where every block is a mixture may the width of a dense feed-forward be missing.
    optional = experts.total and not experts.leading_dense
    units = keys.counts("feed_forward_length", stored, 0 if optional or row.recurrent else None, least=least)
    units = [count // (2 if row.units_doubled else 1) for count in units]
    windows = read_windows(keys, row, stored, blocks)
    clamps = _clamps(keys, row, stored)
    xielu = _xielu(keys, blocks) if row.activation == "xielu" else [None] * blocks
    layers: list[Layer] = []
    halved = keys.count("rescale_every_n_layers") if row.halving else 0
    ratios, looked_up = _ratios(keys, row, stored), keys.count("hash_layer_count") if row.token_experts else 0
    first_reader = row.shared_from or stored - (keys.count("attention.shared_kv_layers") if row.shared_keys else 0)
    for i, mixers in enumerate(_mixers(keys, row, stored, blocks, heads, kv_heads, units)):
        attends = row.mixer in mixers
        latent = _latent(keys, row, windows[i] is not None) if attends else Latent()
        source = None if i < first_reader else first_reader - (1 if windows[i] is None else 2)
        if row.first_values and i:
            source = 0
        h, g = (heads[i], heads[i] if latent.size else kv_heads[i]) if attends else (0, 0)
        if attends and (not h or not g or h % g):
            raise ConfigError(f"{keys.prefix}.attention: {h} heads cannot share {g} key/value heads evenly")
        key_size, value_size = _head_sizes(keys, row, d // h, windows[i] is not None, latent) if attends else (0, 0)
        routed = _routed(row, i, units[i], experts, shapes)
        layers.append(
            Layer(
                mixers=("shared attention",) if i >= first_reader else mixers,
                heads=h,
                kv_heads=g,
                key_size=key_size,
                value_size=value_size,
                hidden_units=_hidden_units(row, i, units[i], d, shapes) if routed else units[i],
                routed=routed,
                experts_used=experts.used[i] if routed else 0,
                expert_units=_expert_units(keys, row, i, shapes) if routed else 0,
                window=windows[i] if attends else None,
                rope=rope_of(keys, row, key_size, i, windows, compressed=ratios[i] > 0) if attends else None,
                alibi=Alibi(row.alibi, h, range(h)) if row.alibi and attends else None,
                xielu=xielu[i],
                source=source,
                sparsity=row.sparsity if i < row.sparse_blocks else 0.0,
                factor=0.5 if halved and (i + 1) % halved == 0 else 1.0,
                gate=_gate(row, i, h, value_size, shapes) if attends else 0,
                clamps=clamps[i],
                attention_scale=_attention_scale(keys, row, d // h if row.wide_scale_blocks == blocks else key_size)
                if attends
                else 1.0,
                latent=latent,
                compressed=_compressed(keys, row, ratios[i], h, g, (key_size, value_size)),
                token_experts=routed and i < looked_up,
                keys_as_values=row.keys_as_values
                and source is None
                and attends
                and not any(f"blk.{i}.{stem}.weight" in shapes for stem in _VALUES),
                by_key_head="delta" in mixers and f"blk.{i}.ssm_in.weight" in shapes,
            )
        )
    _check_sources(keys, row, layers)
    lacking = [i for i, own in enumerate(layers) if not {"attn", "mlp"} <= {*own.taps}]
    if row.streams and lacking:
        raise ConfigError(
            f"{keys.prefix}: block {lacking[0]} has no feed-forward or nothing that mixes tokens: not supported with "
            "several residual streams; convert the model again"
        )
    if row.streams == "held" and len(set(layers)) > 1:
        raise ConfigError(f"{keys.prefix}: blocks of different sizes are not supported where they run in cycles")
    return tuple(layers)


def _check_sources(keys: Keys, row: Architecture, layers: Sequence[Layer]) -> None:
    """Check that blocks without keys of their own read those of an earlier block that is like them.

    It is the last before them, or that before it in windowed blocks, of whichever kind it is.

    Raises:
        ConfigError: there is no such block, or it is not like them.
    """
    where = f"{keys.prefix}.attention.shared_kv_layers" if row.shared_keys else keys.prefix
    for i, layer in enumerate(layers):
        if layer.source is None:
            continue
        if layer.source < 0:
            raise ConfigError(f"{where}: there is no block before block {i} whose keys it can read")
        sizes = [(own.window, own.kv_heads, own.key_size, own.value_size) for own in (layer, layers[layer.source])]
        if len(set(sizes)) > 1:
            raise ConfigError(f"{where}: block {i} cannot read keys of block {layer.source}, which is of another kind")


def _mixers(
    keys: Keys,
    row: Architecture,
    stored: int,
    blocks: int,
    heads: Sequence[int],
    kv_heads: Sequence[int],
    units: Sequence[int],
) -> list[tuple[str, ...]]:
    """Return the kinds of each block's mixers."""
    if row.recurrent_blocks == "beside":
        return [(row.mixer, row.recurrent)] * blocks
    if row.recurrent_blocks == "interval":
        recurrent = _interval(keys, row, stored)
    elif row.recurrent_blocks == "no kv heads":
        recurrent = [not count for count in kv_heads]
    else:
        recurrent = [row.recurrent_blocks == "all"] * stored
    kinds = [row.recurrent if flag else row.mixer for flag in recurrent[:blocks]]
    if row.pruned:
        return [(kinds[i],) if heads[i] and units[i] else () for i in range(blocks)]
    return [() if row.one_branch and own else (kind,) for kind, own in zip(kinds, units[:blocks], strict=True)]


def _interval(keys: Keys, row: Architecture, stored: int) -> list[bool]:
    """Return whether each block is recurrent, as the file says, or all but the last of every few."""
    period = keys.integer("full_attention_interval", row.recurrent_period)
    flags = keys.flags("attention.recurrent_layers", stored)
    return [(i + 1) % period != 0 for i in range(stored)] if flags is None else flags


def _head_sizes(keys: Keys, row: Architecture, default: int, windowed: bool, latent: Latent) -> tuple[int, int]:
    """Return the elements of a key head and of a value head."""
    if latent.size:
        # With tensors of their own, the usual keys are sizes of what llama.cpp caches.
        suffix, least = ("_mla", None) if latent.split else ("", default)
        suffix += "_swa" if windowed and row.windowed_sizes else ""
        key_size, value_size = (keys.integer(f"attention.{part}_length{suffix}", least) for part in ("key", "value"))
        if latent.rotary >= key_size:
            raise ConfigError(
                f"{keys.prefix}.rope.dimension_count {latent.rotary} leaves no other elements of keys of {key_size}"
            )
        return key_size, value_size
    suffix = "_swa" if windowed and row.windowed_sizes == "heads" else ""
    key_size = keys.integer(f"attention.key_length{suffix}", default)
    return key_size, keys.integer(f"attention.value_length{suffix}", key_size)


def _gate(row: Architecture, layer: int, heads: int, value_size: int, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Return the numbers for each head of the gate on what the heads of a block read."""
    rows = shapes.get(f"blk.{layer}.attn_gate.weight", (0,))[0]
    if row.gated_heads == "elements" or (row.gated_heads == "either" and rows != heads):
        return value_size
    return int(row.gated_heads != "" if row.gated_heads != "optional" else rows > 0)


def _latent(keys: Keys, row: Architecture, windowed: bool) -> Latent:
    """Return the sizes of latent attention in a block."""
    if row.mixer == "compressed":  # its queries only
        return Latent(queries=keys.integer("attention.q_lora_rank"), rotary=keys.integer("rope.dimension_count"))
    if row.mixer != "latent":
        return Latent()
    stated = [keys.count(f"attention.{part}_length_mla") > 0 for part in ("key", "value")]
    if row.latent_split == "optional" and stated[0] != stated[1]:
        raise ConfigError(
            f"{keys.prefix}.attention: the file states one of key_length_mla and value_length_mla; it must state both "
            "or neither"
        )
    queries = 0
    if row.latent_queries:
        queries = (
            keys.integer("attention.q_lora_rank")
            if row.latent_queries == "required"
            else keys.count("attention.q_lora_rank")
        )
    suffix = "_swa" if windowed and row.windowed_sizes else ""
    return Latent(
        size=keys.integer(f"attention.kv_lora_rank{suffix}"),
        queries=queries,
        rotary=keys.counts("rope.dimension_count", 1, least=1 if row.rope_pairs else 0)[0],
        split=row.latent_split == "required" or (row.latent_split == "optional" and all(stated)),
    )


def _ratios(keys: Keys, row: Architecture, blocks: int) -> list[int]:
    """Return how many tokens each of the file's blocks compresses to one key; 0 where it does not.

    The array may have entries for further blocks, as that of the model's own configuration has.
    """
    if row.mixer != "compressed":
        return [0] * blocks
    name = f"{keys.prefix}.attention.compress_ratios"
    value = keys.metadata.get(name, ())
    listed = isinstance(value, Sequence) and not isinstance(value, str)
    found = value[:blocks] if listed else ()
    wrong = [ratio for ratio in found if ratio not in (0, *_WINDOWS)]
    if wrong or len(found) < blocks:
        known = " or ".join(map(str, (0, *_WINDOWS)))
        other = f"has {len(found)} entries" if listed else f"is {shown(value)}"
        has = f"contains {shown(wrong[0])}" if wrong else other
        raise ConfigError(f"{name} {has}; expected {known} for each of {blocks} blocks")
    return [int(ratio) for ratio in found]


def _compressed(
    keys: Keys, row: Architecture, ratio: int, heads: int, kv_heads: int, sizes: tuple[int, int]
) -> Compressed:
    """Return the sizes of attention to compressed groups of tokens in a block with such heads of such sizes."""
    if row.mixer != "compressed":
        return Compressed()
    groups = keys.integer("attention.output_group_count")
    if kv_heads != 1 or len(set(sizes)) > 1:
        raise ConfigError(
            f"{keys.prefix}.attention: {kv_heads} key/value heads of {sizes[0]} and {sizes[1]} elements; supported is "
            "one head of keys that are the values too"
        )
    if heads % groups:
        raise ConfigError(f"{keys.prefix}.attention: {heads} heads do not make {groups} groups")
    return Compressed(ratio, _WINDOWS.get(ratio, 1), groups, keys.integer("attention.output_lora_rank"))


def _streams(keys: Keys, row: Architecture) -> Streams:
    """Return the sizes of several residual streams.

    Raises:
        ConfigError: there are not several.
    """
    if not row.streams:
        return Streams()
    if row.streams == "over depth":
        key = "attn_res.block_size"
        return Streams(period=keys.integer(key) if keys.number(key) else 0)
    if row.streams in _COUNTS:
        return Streams(_COUNTS[row.streams])
    count = keys.integer("hyper_connection.count")
    if count < 2:
        raise ConfigError(
            f"{keys.prefix}.hyper_connection.count is {count}; at least 2 streams are supported; take another model"
        )
    epsilon = keys.real("hyper_connection.epsilon")
    if row.streams == "apart":
        return Streams(count, epsilon, keys.real("hyper_connection.magnitude"))
    rounds = keys.integer("hyper_connection.sinkhorn_iterations")
    if rounds > MAX_ROUNDS:
        raise ConfigError(
            f"{keys.prefix}.hyper_connection.sinkhorn_iterations is {rounds}; at most {MAX_ROUNDS} are supported; take "
            "another model"
        )
    return Streams(count, epsilon, rounds=rounds)


def _indexer(keys: Keys, row: Architecture, blocks: int) -> Indexer:
    """Return the sizes of what selects keys, one by one, by blocks, or of those of groups of tokens."""
    if not row.indexer or (row.indexer == "optional keys" and not keys.count("attention.indexer.top_k")):
        return Indexer()
    if row.indexer == "memory" and _SELECTED not in _ratios(keys, row, blocks):
        return Indexer()
    heads, key_size, selected = (
        keys.integer(f"attention.indexer.{key}") for key in ("head_count", "key_length", "top_k")
    )
    if row.indexer == "blocks":
        selected *= keys.integer("attention.indexer.block_size")
    if row.indexer == "memory":
        selected = (selected + 1) * _SELECTED - 1  # tokens that make no more groups
    if row.indexer != "pools":
        return Indexer(heads, key_size, selected)
    pool, name = keys.integer("attention.indexer.kpool"), "attention.indexer.kpool_select_tail"
    if selected % pool:
        raise ConfigError(
            f"{keys.prefix}.attention.indexer.top_k is {selected}: not a whole number of pools of {pool} keys; take "
            "another model"
        )
    if name in keys and not keys.flag(name):
        raise ConfigError(
            f"{keys.prefix}.{name} is False: attention without the last keys is not supported; take another model"
        )
    return Indexer(heads, key_size, selected + pool - 1, pool)


def _temperature_length(keys: Keys, row: Architecture, context: int) -> int:
    """Return the number of positions after which queries first grow."""
    if row.temperature == "length":
        return keys.integer("attention.temperature_length")
    return keys.integer("rope.scaling.original_context_length", context)


def _recurrence(keys: Keys, row: Architecture, blocks: int, context: int) -> RecurrentSizes:
    """Return the sizes of mixers other than attention."""
    if row.recurrent in ("", "linear"):
        return RecurrentSizes()
    if row.recurrent in _RWKV_RANKS:
        return _rwkv(keys, row, blocks)
    if row.recurrent == "lightning":
        heads = keys.for_all_blocks("attention.head_count", blocks)
        size = keys.integer("attention.key_length", max(1, keys.integer("embedding_length") // heads))
        return RecurrentSizes(1, heads, heads, size, size)
    taps = keys.integer("shortconv.l_cache" if row.recurrent == "convolution" else "ssm.conv_kernel")
    if taps > context:
        raise ConfigError(f"{keys.prefix}: a convolution over {taps} positions does not fit a context of {context}")
    if row.recurrent == "convolution":
        return RecurrentSizes(taps)
    if row.recurrent == "kimi delta":
        heads, size = keys.for_all_blocks("attention.head_count", blocks), keys.integer("kda.head_dim")
        return RecurrentSizes(taps, heads, heads, size, size)
    inner, key_size = keys.integer("ssm.inner_size"), keys.integer("ssm.state_size")
    if row.recurrent == "channel state space":
        normed = "ssm.dt_b_c_rms" in keys and keys.flag("ssm.dt_b_c_rms")
        return RecurrentSizes(taps, inner, 1, key_size, 1, keys.integer("ssm.time_step_rank"), normed)
    heads, rank = keys.integer("ssm.time_step_rank"), 0
    if row.made_from_values:
        key_heads, rank = 1, max(64, keys.integer("embedding_length") // 16)  # as llama.cpp has it
        if keys.count("ssm.group_count"):
            raise ConfigError(f"{keys.prefix}.ssm.group_count is {keys.count('ssm.group_count')}; supported: 0")
    else:
        key_heads = keys.integer("ssm.group_count")
    if inner % heads or heads % key_heads:
        raise ConfigError(
            f"{keys.prefix}.ssm: {heads} heads cannot share {inner} elements and {key_heads} key heads evenly"
        )
    return RecurrentSizes(taps, heads, key_heads, key_size, inner // heads, rank)


# Of each kind of RWKV, the sizes of vectors that others are made from -> their keys.
_RWKV_RANKS = {
    "rwkv6": {"extra": "time_mix_extra_dim", "decay": "time_decay_extra_dim"},
    "rwkv7": {
        "decay": "attention.decay_lora_rank",
        "rate": "attention.iclr_lora_rank",
        "first": "attention.value_residual_mix_lora_rank",
        "gate": "attention.gate_lora_rank",
    },
}


def _rwkv(keys: Keys, row: Architecture, blocks: int) -> RecurrentSizes:
    """Return the sizes of RWKV's mixers. Only gates may be missing."""
    d, size = keys.integer("embedding_length"), keys.integer("wkv.head_size")
    heads = d // size
    groups = keys.counts("attention.head_count_kv", blocks, 0, least=0)[0] or heads
    if d % size or heads % groups:
        raise ConfigError(f"{keys.prefix}.wkv: {d} elements do not make heads of {size}, {groups} of them for keys")
    shifts = 2 if row.ffn.startswith("shifted") else 1
    if keys.count("token_shift_count", 2) != shifts:
        raise ConfigError(
            f"{keys.prefix}.token_shift_count is {keys.count('token_shift_count', 2)}; supported: {shifts}"
        )
    ranks = tuple(
        (name, keys.count(key) if name == "gate" else keys.integer(key))
        for name, key in _RWKV_RANKS[row.recurrent].items()
    )
    return RecurrentSizes(2, heads, groups, size, size, shifted=d, ranks=ranks)


def _decay_bound(keys: Keys, row: Architecture) -> float:
    """Return the lower bound of the logarithm of decays, or 0 for none."""
    if not row.bounded_decay or (row.bounded_decay == "optional" and "kda.gate_lower_bound" not in keys):
        return 0.0
    if "kda.safe_gate" in keys and not keys.flag("kda.safe_gate"):
        raise ConfigError(f"{keys.prefix}.kda.safe_gate is False: decays without a bound are not supported")
    name = f"{keys.prefix}.kda.gate_lower_bound"
    (bound,) = keys.of_each_block(name, 1)
    if bound >= 0:
        raise ConfigError(f"metadata key {name} is {bound}; the logarithm of a decay is negative")
    return bound


def _epsilon(keys: Keys, row: Architecture) -> float:
    """Return the number added inside a norm's root."""
    if not row.epsilon_read:
        return 0.0
    name = f"attention.layer_norm_{'rms_' if row.norm == 'rms' else ''}epsilon"
    if row.epsilon_optional and name not in keys:
        name = "attention.layer_norm_epsilon"
    return keys.real(name)


class _Experts(NamedTuple):
    """Sizes of the mixtures; see `ModelConfig` and `Layer`. The defaults are those of a dense model."""

    total: int = 0
    used: Sequence[int] = ()
    groups: int = 1
    groups_used: int = 1
    shared_width: int = 0
    leading_dense: int = 0


def _experts(keys: Keys, row: Architecture, blocks: int, shapes: Mapping[str, tuple[int, ...]]) -> _Experts:
    """Return the sizes of the mixtures of experts."""
    total = keys.count("expert_count")
    if not total:
        return _Experts()
    used = keys.counts("expert_used_count", blocks, least=0 if row.uneven_experts else 1)
    if not row.uneven_experts:
        keys.for_all_blocks("expert_used_count", blocks)
    if max(used) > total:
        raise ConfigError(f"{keys.prefix}.expert_used_count is {max(used)}, but there are {total} experts")
    step = keys.count("interleave_moe_layer_step", 1)
    if step != 1 and not row.router_optional:
        raise ConfigError(
            f"{keys.prefix}.interleave_moe_layer_step {step}: dense blocks between mixtures are not supported"
        )
    leading = keys.count("leading_dense_block_count") if row.leading_dense else 0
    return _Experts(total, used, *_groups(keys, total, max(used)), _shared_units(keys, row, shapes), leading)


def _adjugates(keys: Keys, row: Architecture, experts: _Experts, head: int) -> Adjugates:
    """Return the sizes of a second mixture; `head` is the size of a head, and by default the number of hidden units.

    Raises:
        ConfigError: the experts do not make groups of equal size, or a token uses more of them than there are groups,
            or their choice is limited to some of other groups: llama.cpp aborts.
    """
    if not row.adjugates or not experts.total:
        return Adjugates()
    group = keys.integer("experts_per_group")
    if experts.total % group or max(experts.used) * group > experts.total or experts.groups > 1:
        raise ConfigError(
            f"{keys.prefix}.experts_per_group is {group}: not supported where a token uses {max(experts.used)} of "
            f"{experts.total} experts, in {experts.groups} groups to choose from; take another model"
        )
    return Adjugates(group, keys.count("expert_chunk_feed_forward_length") or head, keys.real("expert_group_scale"))


def _several_axes(keys: Keys) -> bool:
    """Return whether the file has sections of rotation for more than one axis; llama.cpp ignores those of one."""
    name = f"{keys.prefix}.rope.dimension_sections"
    sections = keys.metadata.get(name, (0, 0))
    listed = isinstance(sections, Sequence) and not isinstance(sections, str) and 1 <= len(sections) <= 4
    if not listed or any(isinstance(size, bool) or not isinstance(size, int) for size in sections):
        raise ConfigError(f"metadata key {name} is {shown(sections)}; expected 1 to 4 whole numbers")
    return len(sections) > 1 and min(sections[:2]) > 0


def _decided(keys: Keys, row: Architecture, blocks: int, shapes: Mapping[str, tuple[int, ...]]) -> Architecture:
    """Resolve the row's file-dependent options, using block 0 as representative."""
    variant = {(blocks, 0), (blocks, shapes.get("token_embd.weight", (0,))[0])}
    if variant.intersection(row.direct_queries):
        row = replace(row, latent_queries="")
    if variant.intersection(row.sigmoid_routers):
        row = replace(row, router="sigmoid")
    if row.parallel_key:
        row = replace(row, parallel=keys.flag("use_parallel_residual"))
    if row.parallel_unless_normed:
        own, shared = row.norms.ffn_in
        normed = f"blk.0.{own}.weight" in shapes
        row = replace(row, parallel=not normed, norms=replace(row.norms, ffn_in=(own if normed else shared,)))
    if row.unnormed_experts and keys.count("expert_count") == row.unnormed_experts:
        row = replace(row, qk_norm="")
    if row.rope_blocks not in (0, blocks):
        row = replace(row, rope_pairs="")
    if row.alibi_blocks not in (0, blocks):
        row = replace(row, alibi=0.0)
    if row.rope_sections == "optional":
        row = replace(row, rope_sections="")
        if _several_axes(keys):
            row = replace(row, rope_sections="consecutive", rope_pairs="halves")
    if row.alibi_key:
        row = replace(row, alibi=keys.real("attention.max_alibi_bias", row.alibi))
    if row.positions == "optional" and "position_embd.weight" not in shapes:
        row = replace(row, positions="")
    if row.qk_norm_optional and "blk.0.attn_q_norm.weight" not in shapes:
        row = replace(row, qk_norm="")
    if len(row.norms.ffn_out) > 1:
        found = [name for name in row.norms.ffn_out if f"blk.0.{name}.weight" in shapes]
        row = replace(row, norms=replace(row.norms, ffn_out=(*found, *row.norms.ffn_out)[:1]))
    if row.router_key:
        kind = keys.count("expert_gating_func")
        row = replace(row, router=_ROUTERS.get(kind, "") if kind else row.router)
        if not row.router:
            known = ", ".join(f"{i} {name}" for i, name in _ROUTERS.items())
            raise ConfigError(f"{keys.prefix}.expert_gating_func is {kind or 'missing'}; supported: {known}")
    if row.norm_by_epsilon and keys.real("attention.layer_norm_rms_epsilon", 0.0):
        row = replace(row, norm="rms")
    if row.renormalize_key:
        row = replace(row, renormalize="expert_weights_norm" in keys and keys.flag("expert_weights_norm"))
    return row


def _groups(keys: Keys, experts: int, used: int) -> tuple[int, int]:
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


def _clamps(keys: Keys, row: Architecture, blocks: int) -> list[tuple[float, float]]:
    """Return each block's limits of hidden units: in routed experts, and in other networks; 0 for none."""

    def limits(key: str, default: list[float]) -> list[float]:
        found = keys.of_each_block(f"{keys.prefix}.{key}", blocks) if key in keys else default
        if min(found) < 0:
            raise ConfigError(f"metadata key {keys.prefix}.{key} contains {min(found)}; limits are not negative")
        return found

    routed = others = none = [0.0] * blocks
    if row.hidden_clamps:
        routed = limits("swiglu_clamp_exp", none)
    if row.hidden_clamps in ("after", "before, shared too"):
        others = limits("swiglu_clamp_shexp", none if row.hidden_clamps == "after" else routed)
    return list(zip(routed, others, strict=True))


def _xielu(keys: Keys, blocks: int) -> list[tuple[float, float, float]]:
    """Return αn, αp and β of each block's xIELU; the file has both α as ggml's `ggml_xielu` takes them."""
    n, p, beta, eps = (keys.of_each_block(f"xielu.{name}", blocks) for name in ("alpha_n", "alpha_p", "beta", "eps"))
    if min(eps) < -1e-5:
        # Between eps and 0 the exponential is that of eps: a step of αn eps at 0, which is neglected where tiny.
        raise ConfigError(f"metadata key xielu.eps is {min(eps)}: steps larger than 1e-05 are not supported")
    return [(b + _softplus(a), _softplus(c), b) for a, c, b in zip(n, p, beta, strict=True)]


def _situ(keys: Keys) -> tuple[float, float]:
    """Return β and λ of SiTU."""
    beta = keys.real("activation.situ_beta")
    if not beta:
        raise ConfigError(f"metadata key {keys.prefix}.activation.situ_beta is 0, but gates are divided by it")
    return beta, keys.real("activation.situ_linear_beta")


def _softplus(x: float) -> float:
    """Return `log(1 + exp(x))`."""
    return x if x > 20 else math.log1p(math.exp(x))


def _softcap(keys: Keys, row: Architecture, key: str, default: float | None) -> float:
    """Return a cap; 0, whatever the file says, if the default is None."""
    if default is None or not row.softcap_keys:
        return default or 0.0
    return keys.real(key, default)


def _attention_scale(keys: Keys, row: Architecture, width: int) -> float:
    """Return the factor on scores: the file's, if the family reads it and it is not 0, or the family's."""
    stated = keys.real(row.attention_scale_key, 0.0) if row.attention_scale_key else 0
    return (stated or row.attention_scale or max(1, width) ** row.attention_power) * stretching(keys, row)[1]


def _embedding_scale(keys: Keys, row: Architecture, d: int) -> float:
    """Return the factor on embeddings; the root is rounded to float32, as in llama.cpp."""
    if row.embedding_scale == "sqrt":
        return struct.unpack("<f", struct.pack("<f", math.sqrt(d)))[0]
    return (_scale(keys, row, "embedding_scale", row.scale_defaults[0]) if row.embedding_scale == "key" else 0) or 1.0


def _residual_scale(keys: Keys, row: Architecture, blocks: int) -> float:
    """Return the factor on branches."""
    default = row.scale_defaults[1] / math.sqrt(blocks)
    return (_scale(keys, row, "residual_scale", default) if row.residual_scale else 0) or 1.0


def _logit_scale(keys: Keys, row: Architecture, d: int) -> float:
    """Return the factor on logits."""
    if not row.logit_scale:
        return 1.0
    default = row.logit_scale_default or row.scale_defaults[2] / d
    scale = _scale(keys, row, "logit_scale", default if default or row.logit_scale_optional else None)
    if scale == 0 and (row.logit_scale == "multiply" or row.logit_scale_optional):
        return 1.0
    if scale == 0:
        raise ConfigError(f"metadata key {keys.prefix}.logit_scale is 0, but logits are divided by it")
    return scale if row.logit_scale == "multiply" else 1 / scale


def _scale(keys: Keys, row: Architecture, key: str, default: float | None) -> float:
    """Return the file's scale, or the family's if its files are not asked."""
    return keys.real(key, default) if row.scale_keys or default is None else default


def _routed(
    row: Architecture, layer: int, units: int, experts: _Experts, shapes: Mapping[str, tuple[int, ...]]
) -> bool:
    """Return whether a block has a mixture."""
    if not experts.total or layer < experts.leading_dense or (row.one_branch and not units):
        return False
    return not row.router_optional or f"blk.{layer}.ffn_gate_inp.weight" in shapes


def _hidden_units(row: Architecture, layer: int, units: int, d: int, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Return the hidden units of the dense network in a block with a mixture; 0 without one."""
    present = row.dense_beside_experts != "optional" or f"blk.{layer}.ffn_up.weight" in shapes
    if not row.dense_beside_experts or not present:
        return 0
    return d if row.dense_beside_experts == "square" else units


def _expert_units(keys: Keys, row: Architecture, layer: int, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Return the hidden units of a routed expert of a block."""
    if row.expert_widths == "tensors":  # families use different keys
        down = shapes.get(f"blk.{layer}.ffn_down_exps.weight", ())
        return down[2] if len(down) == 3 else 0
    return keys.integer("expert_feed_forward_length")


def _shared_units(keys: Keys, row: Architecture, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Return the hidden units of the shared expert, 0 if absent."""
    if row.expert_widths == "tensors":  # Qwen 1.5's files have no key for it
        shared = next((shape for name, shape in shapes.items() if name.endswith(".ffn_up_shexp.weight")), ())
        return keys.count("expert_shared_feed_forward_length") or (shared[0] if len(shared) == 2 else 0)
    width, key = keys.integer("expert_feed_forward_length"), "expert_shared_count"
    # 0 may be stated anywhere.
    count = keys.count(key) if row.shared_optional or keys.number(key) == 0 else keys.integer(key)
    if not count:
        return 0
    stated = keys.count("expert_shared_feed_forward_length") if row.expert_widths.startswith("shared") else 0
    if row.expert_widths == "shared":
        return stated or width * count
    return (stated or width) * count
