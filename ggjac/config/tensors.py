"""The tensors of a model: their shapes in named sizes, and the parts of fused ones."""

from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate

from ggjac.architectures import Architecture
from ggjac.config.keys import ConfigError, shown
from ggjac.config.model import Latent, ModelConfig
from ggjac.sizes import EXPERTS_OF_TOKENS, Part

# A matrix's constant factor, one for each expert of a stack, and that of inputs in low precision, which llama.cpp reads
# and does not use; as llama.cpp names them, and as some converters do.
_SCALES = ("scale", "input_scale", "weight.scale", "weight.input_scale")

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
_HEAD_SCALES = {f"output.{kind}": ("one",) for kind in _SCALES}
_POSITIONS = {"position_embd.weight": ("context", "d")}
_EMBEDDING_NORM = {"token_embd_norm.weight": ("d",), "token_embd_norm.bias": ("d",)}
_INPUTS = {
    "per_layer_token_embd.weight": ("vocabulary", "all inputs"),
    "per_layer_model_proj.weight": ("all inputs", "d"),
    "per_layer_proj_norm.weight": ("inputs",),
}
# Of several residual streams that are mixed by weights: outside the blocks, and in a block.
_FINAL_HYPER = {
    "output_hc_fn.weight": ("streams", "all streams"),
    "output_hc_base.weight": ("streams",),
    "output_hc_scale.weight": ("one",),
}
_HYPER = {
    f"hc_{branch}_{name}.weight": axes
    for branch in ("attn", "ffn")
    for name, axes in {
        "fn": ("weights of streams", "all streams"),
        "base": ("weights of streams",),
        "scale": ("uses of streams",),
    }.items()
}
# Of streams that are predicted: what opens them and closes them, and in a block.
_OPENED: dict[str, tuple[str, ...]] = {
    f"{name}.weight": ("other streams", "d", "d") for name in ("altup_proj", "altup_unembd_proj")
}
_PREDICTED = {
    "altup_router.weight": ("streams", "d"),
    "altup_router_norm.weight": ("d",),
    "altup_predict_coef.weight": ("mixtures", "streams"),
    "altup_correct_coef.weight": ("streams", "streams"),
    "altup_correct_scale.weight": ("d",),
}
# Of every kind of several streams: outside the blocks, and in a block.
_STREAMS: dict[str, tuple[dict[str, tuple[str, ...]], dict[str, tuple[str, ...]]]] = {
    "apart": (_FINAL_HYPER, _HYPER),
    "mixed": (_FINAL_HYPER, _HYPER),
    "over depth": (
        {"output_res_score.weight": ("d",)},
        {f"{branch}_res_score.weight": ("d",) for branch in ("attn", "ffn")},
    ),
    "held": ({"hrm.z_l_init": ("d",)}, {}),  # the one that is held before any stack has made one
    "predicted": (_OPENED, _PREDICTED),
    "input": ({}, {}),
}
_LAUREL = {"laurel_l.weight": ("laurel", "d"), "laurel_r.weight": ("d", "laurel"), "laurel_post_norm.weight": ("d",)}
_OWN_INPUTS = {"inp_gate.weight": ("inputs", "d"), "proj.weight": ("d", "inputs"), "post_norm.weight": ("d",)}
# In a block, by kind of mixer.
_ATTENTION: dict[str, tuple[str, ...]] = {
    "attn_q": ("q", "d"),
    "attn_k": ("keys", "d"),
    "attn_v": ("values", "d"),
    "attn_qkv": ("qkv", "d"),
    "attn_output": ("d", "read"),
}
_DELTA: dict[str, tuple[str, ...]] = {
    "attn_q": ("qk", "d"),
    "attn_k": ("qk", "d"),
    "attn_v": ("hv", "d"),
    "attn_qkv": ("2qk + hv", "d"),
    "attn_gate": ("hv", "d"),
    "ssm_in": ("2qk + 2hv", "d"),
    "ssm_alpha": ("states", "d"),
    "ssm_beta": ("states", "d"),
    "ssm_ba": ("2 states", "d"),
    "ssm_out": ("d", "hv"),
}
_STATE_SPACE: dict[str, tuple[str, ...]] = {"ssm_in": ("2hv + 2qk + states", "d"), "ssm_out": ("d", "hv")}
_FROM_VALUES: dict[str, tuple[str, ...]] = {"ssm_in": ("2hv", "d"), "ssm_out": ("d", "hv")}
_CONVOLUTION: dict[str, tuple[str, ...]] = {"shortconv.in_proj": ("3d", "d"), "shortconv.out_proj": ("d", "d")}
_MIXERS: dict[str, dict[str, tuple[str, ...]]] = {
    "attention": _ATTENTION,
    "latent": {"attn_output": ("d", "read")},
    "compressed": {},
    "shared attention": {"attn_q": ("q", "d"), "attn_output": ("d", "read")},
    "linear": {},
    "delta": _DELTA,
    "kimi delta": {"attn_output": ("d", "hv")},
    "state space": _STATE_SPACE,
    "channel state space": _FROM_VALUES,
    "rwkv6": {},
    "rwkv7": {},
    "state space of values": _FROM_VALUES,
    "lightning": {"attn_output": ("d", "hv")},
    "convolution": _CONVOLUTION,
}
# Of a state space whose steps, keys and queries are made from its values; these may have norms.
_MADE: dict[str, tuple[str, ...]] = {
    "ssm_conv1d.weight": ("hv", "taps"),
    "ssm_x.weight": ("rank + 2 state", "hv"),
    "ssm_dt.weight": ("states", "rank"),
    "ssm_dt.bias": ("states",),
}
_MADE_NORMS = {"ssm_dt_norm.weight": ("rank",), "ssm_b_norm.weight": ("state",), "ssm_c_norm.weight": ("state",)}
# Tensors of mixers by full name: small ones, and matrices that have neither a bias nor a constant factor.
_VECTORS: dict[str, dict[str, tuple[str, ...]]] = {
    "delta": {
        "ssm_conv1d.weight": ("2qk + hv", "taps"),
        "ssm_dt.bias": ("states",),
        "ssm_a": ("states",),
        "ssm_norm.weight": ("state value",),
    },
    "kimi delta": {
        "attn_q.weight": ("qk", "d"),
        "attn_k.weight": ("qk", "d"),
        "attn_v.weight": ("hv", "d"),
        "attn_qkv.weight": ("2qk + hv", "d"),
        "ssm_conv1d_q.weight": ("qk", "taps"),
        "ssm_conv1d_k.weight": ("qk", "taps"),
        "ssm_conv1d_v.weight": ("hv", "taps"),
        "ssm_beta.weight": ("states", "d"),
        "ssm_dt.bias": ("qk",),
        "ssm_a": ("states",),
        "ssm_norm.weight": ("state value",),
    },
    "state space": {
        "ssm_conv1d.weight": ("2qk + hv", "taps"),
        "ssm_conv1d.bias": ("2qk + hv",),
        "ssm_dt.bias": ("states",),
        "ssm_a": ("states", "one"),
        "ssm_d": ("states", "one"),
        "ssm_norm.weight": ("groups", "of a group"),
    },
    "channel state space": {
        **_MADE,
        "ssm_conv1d.bias": ("hv",),
        "ssm_a": ("hv", "state"),
        "ssm_d": ("hv",),
    },
    "rwkv6": {
        "time_mix_w1.weight": ("5 extra", "d"),
        "time_mix_w2.weight": ("5", "d", "extra"),
        "time_mix_lerp_x.weight": ("d",),
        "time_mix_lerp_fused.weight": ("5", "one", "one", "d"),
        "time_mix_decay.weight": ("d",),
        "time_mix_decay_w1.weight": ("decay", "d"),
        "time_mix_decay_w2.weight": ("d", "decay"),
        "time_mix_receptance.weight": ("d", "d"),
        "time_mix_receptance.bias": ("d",),
        "time_mix_key.weight": ("qk", "d"),
        "time_mix_key.bias": ("qk",),
        "time_mix_value.weight": ("qk", "d"),
        "time_mix_value.bias": ("qk",),
        "time_mix_gate.weight": ("d", "d"),
        "time_mix_output.weight": ("d", "d"),
    },
    "rwkv7": {
        **{f"time_mix_{name}.weight": ("d",) for name in ("w0", "a0", "k_k", "k_a", "r_k")},
        **{f"time_mix_{name}.weight": ("d", "d") for name in ("receptance", "key", "value", "output")},
        "time_mix_w1.weight": ("decay", "d"),
        "time_mix_w2.weight": ("d", "decay"),
        "time_mix_a1.weight": ("rate", "d"),
        "time_mix_a2.weight": ("d", "rate"),
        "time_mix_lerp_fused.weight": ("lerps", "one", "one", "d"),
    },
    "lightning": {
        "attn_qkv.weight": ("2qk + hv", "d"),
        "attn_gate.weight": ("hv", "d"),
        "attn_norm_2.weight": ("hv",),
    },
    "state space of values": {**_MADE, "ssm_a": ("states",), "ssm_d": ("states",)},
    "convolution": {"shortconv.conv.weight": ("d", "taps")},
    "linear": {"attn_output.weight": ("d", "d")},
}
# Of RWKV where it has them: the norm of each head with what is read before a position is written, and gates, and shares
# of the first block's values.
_HEAD_NORM: dict[str, tuple[str, ...]] = {"time_mix_ln.weight": ("d",), "time_mix_ln.bias": ("d",)}
_FIRST: dict[str, tuple[str, ...]] = {"time_mix_first.weight": ("states", "state")}
# How much of the position before each projection reads, in files from before llama.cpp's converter put them together.
_LERPS: dict[str, tuple[str, ...]] = {f"time_mix_lerp_{name}.weight": ("d",) for name in "wkvrg"}
_GATE: dict[str, tuple[str, ...]] = {"time_mix_g1.weight": ("gate", "d"), "time_mix_g2.weight": ("d", "gate")}
_SOURCED: dict[str, tuple[str, ...]] = {
    "time_mix_v0.weight": ("d",),
    "time_mix_v1.weight": ("first", "d"),
    "time_mix_v2.weight": ("d", "first"),
}
# Of attention to single tokens and compressed groups of them, for which it has some more.
_COMPRESSED: dict[str, tuple[str, ...]] = {
    "attn_q_a.weight": ("query latent", "d"),
    "attn_q_a_norm.weight": ("query latent",),
    "attn_q_b.weight": ("q", "query latent"),
    "attn_kv.weight": ("head", "d"),
    "attn_kv_a_norm.weight": ("head",),
    "attn_output_a.weight": ("ranks", "read by a group"),
    "attn_output_b.weight": ("d", "ranks"),
}
_MEMORY: dict[str, tuple[str, ...]] = {
    "attn_compressor_kv.weight": ("windows", "d"),
    "attn_compressor_gate.weight": ("windows", "d"),
    "attn_compressor_ape.weight": ("ratio", "windows"),
    "attn_compressor_norm.weight": ("head",),
}
# The projections to the decays (f) and to the gate (g) of Kimi's delta rule: of those in two steps, and all by
# `Architecture.low_rank_gates`.
_TWO_STEPS: dict[str, dict[str, tuple[str, ...]]] = {
    name: {f"ssm_{name}_a.weight": ("state", "d"), f"ssm_{name}_b.weight": ("qk", "state")} for name in "fg"
}
_KDA_GATES: dict[str, dict[str, tuple[str, ...]]] = {
    "": {"ssm_f_a.weight": ("qk", "d"), "ssm_g_a.weight": ("qk", "d")},
    "decays": {**_TWO_STEPS["f"], "ssm_g.weight": ("qk", "d")},
    "both": _TWO_STEPS["f"] | _TWO_STEPS["g"],
}
# Of what selects keys: not used, since prompts in which it would leave some out are not supported.
_INDEXER: dict[str, dict[str, tuple[str, ...]]] = {
    "latent": {
        "indexer.attn_q_b.weight": ("indexer queries", "query latent"),
        "indexer.attn_k.weight": ("indexer key", "d"),
        "indexer.proj.weight": ("indexer heads", "d"),
        "indexer.k_norm.weight": ("indexer key",),
        "indexer.k_norm.bias": ("indexer key",),
    },
    "attention": {
        "indexer.q_proj.weight": ("indexer queries", "d"),
        "indexer.k_proj.weight": ("indexer key", "d"),
        "indexer.q_norm.weight": ("indexer key",),
        "indexer.k_norm.weight": ("indexer key",),
    },
    "compressed": {
        "indexer.attn_q_b.weight": ("indexer queries", "query latent"),
        "indexer.proj.weight": ("indexer heads", "d"),
        "indexer_compressor_kv.weight": ("2 indexer key", "d"),
        "indexer_compressor_gate.weight": ("2 indexer key", "d"),
        "indexer_compressor_ape.weight": ("ratio", "2 indexer key"),
        "indexer_compressor_norm.weight": ("indexer key",),
    },
}
# Of what makes one key of a pool.
_POOLS: dict[str, tuple[str, ...]] = {
    "indexer_compressor_gate.weight": ("indexer key", "d"),
    "indexer_compressor_ape.weight": ("pool", "indexer key"),
}
# For the tokens of images: not used.
_VISION_EXPERTS: dict[str, tuple[str, ...]] = {
    "vis_attn_qkv.weight": ("qkv", "d"),
    "vis_attn_output.weight": ("d", "read"),
    "vis_gate.weight": ("f", "d"),
    "vis_up.weight": ("f", "d"),
    "vis_down.weight": ("d", "f"),
}
# Fused tensors and their parts: the file has either. Experts' gates are above their up projections.
FUSED = {
    "attn_qkv": ("attn_q", "attn_k", "attn_v"),
    "ssm_in": ("attn_q", "attn_k", "attn_v", "attn_gate"),
    "ssm_ba": ("ssm_beta", "ssm_alpha"),
    "time_mix_lerp_fused": tuple(f"time_mix_lerp_{name}" for name in "wkvrg"),
    "ffn_gate_up_exps": ("ffn_gate_exps", "ffn_up_exps"),
}
_FFN: dict[str, dict[str, tuple[str, ...]]] = {
    "shifted": {},
    "shifted gated": {},
    "gated": {"ffn_gate": ("f", "d"), "ffn_up": ("f", "d"), "ffn_down": ("d", "f")},
    "fused": {"ffn_up": ("2f", "d"), "ffn_down": ("d", "f")},
    "plain": {"ffn_up": ("f", "d"), "ffn_down": ("d", "f")},
}
_QK_NORMS: dict[str, dict[str, tuple[str, ...]]] = {
    "": {},
    "head": {"attn_q_norm": ("head",), "attn_k_norm": ("head",)},
    "heads": {"attn_q_norm": ("heads", "head"), "attn_k_norm": ("kv heads", "head")},
    "rotated": {"attn_q_norm": ("head",), "attn_k_norm": ("head",)},
    "bare": {},
    "gained": {"attn_q_norm": ("heads", "one")},
    "full": {"attn_q_norm": ("q",), "attn_k_norm": ("keys",)},
}
# Of RWKV's channel mixing, by full name.
_SHIFTED = {
    "channel_mix_lerp_k.weight": ("d",),
    "channel_mix_key.weight": ("f", "d"),
    "channel_mix_value.weight": ("d", "f"),
}
_SHIFTED_GATE = {"channel_mix_lerp_r.weight": ("d",), "channel_mix_receptance.weight": ("d", "d")}
_EXPERTS = {
    "ffn_gate_inp": ("experts", "d"),
    "ffn_gate_exps": ("experts", "fe", "de"),
    "ffn_up_exps": ("experts", "fe", "de"),
    "ffn_gate_up_exps": ("experts", "2fe", "de"),
    "ffn_down_exps": ("experts", "de", "fe"),
}
# Of a second mixture, by full name.
_ADJUGATES = {
    "ffn_gate_chexps.weight": ("adjugates", "fa", "d"),
    "ffn_up_chexps.weight": ("adjugates", "fa", "d"),
    "ffn_down_chexps.weight": ("adjugates", "d", "fa"),
}
# What leads to the latent width of experts and back, by the key of the file that has it; and a norm of their sum.
_LATENT_EXPERTS: dict[str, dict[str, tuple[str, ...]]] = {
    "moe_latent_size": {"ffn_latent_down": ("de", "d"), "ffn_latent_up": ("d", "de")},
    "expert_latent_length": {"ffn_routed_down": ("de", "d"), "ffn_routed_norm": ("de",), "ffn_routed_up": ("d", "de")},
}
_SHARED_EXPERT = {
    "ffn_gate_shexp": ("fs", "d"),
    "ffn_up_shexp": ("fs", "d"),
    "ffn_down_shexp": ("d", "fs"),
    "ffn_gate_inp_shexp": ("d",),
}
_FUSED_SHARED_EXPERT = {"ffn_up_shexp": ("2fs", "d"), "ffn_down_shexp": ("d", "fs")}
_OPTIONAL = {
    "attn_norm_2.weight",
    "attn_sinks.weight",
    "exp_probs_b",
    "ffn_gate_inp_shexp.weight",
    "ffn_routed_norm.weight",
    "output.weight",
    "rope_freqs.weight",
    "rope_factors_long.weight",
    "rope_factors_short.weight",
    "layer_output_scale.weight",
    "ffn.act.scales",
    *(name for table in (*_INDEXER.values(), _POOLS) for name in table),
    *_VISION_EXPERTS,
}
# Other biases and factors are optional.
_NEEDED = {"ssm_dt.bias", "ffn_gate_inp.scale"}
# By kind of mixer: tensors that may be missing, and those that have further axes of length 1 in some files.
_LOOSE = {"kimi delta": {"ssm_a", *(f"ssm_conv1d_{part}.weight" for part in "qkv")}}
_GATES = {"ffn_gate_exps", "ffn_gate_up_exps", "ffn_gate_shexp"}


def fused_parts(config: ModelConfig, layer: int) -> dict[str, Part]:
    """Return the parts of fused tensors of a block by the stems under which they are used.

    A part counts where the file has the fused tensor; otherwise the stem is a tensor of its own.
    """
    row, own = config.row, config.layers[layer]
    parts: dict[str, Part] = {}
    for mixer in own.mixers:
        parts |= _MIXER_PARTS[_layout(config, mixer)](config, layer)
    if row.ffn == "fused":
        f = own.hidden_units
        parts |= {"ffn_gate": Part("ffn_up", 0, f), "ffn_up": Part("ffn_up", f, 2 * f)}
    if row.shared_fused:
        f = config.expert_shared_feed_forward_length
        parts |= {"ffn_gate_shexp": Part("ffn_up_shexp", 0, f), "ffn_up_shexp": Part("ffn_up_shexp", f, 2 * f)}
    whole: dict[str, tuple[str, int]] = {}  # the same tensor under another name
    if row.ffn.startswith("shifted"):
        whole = {"ffn_up": ("channel_mix_key", own.hidden_units), "ffn_down": ("channel_mix_value", config.d)}
    if row.expert_latent == "expert_latent_length":
        whole = {"ffn_latent_down": ("ffn_routed_down", config.expert_latent)}
        whole |= {"ffn_latent_up": ("ffn_routed_up", config.d)}
    parts |= {stem: Part(named, 0, rows) for stem, (named, rows) in whole.items()}
    f = own.expert_units
    return parts | {"ffn_gate_exps": Part("ffn_gate_up_exps", 0, f), "ffn_up_exps": Part("ffn_gate_up_exps", f, 2 * f)}


def _layout(config: ModelConfig, mixer: str) -> str:
    """Return the kind of a mixer's tensors: a state space with heads has two kinds."""
    return "state space of values" if mixer == "state space" and config.recurrence.rank else mixer


def _attention_parts(config: ModelConfig, layer: int) -> dict[str, Part]:
    sizes = _attention_sizes(config, layer)
    if config.layers[layer].keys_as_values:
        return {"attn_v": Part("attn_k", 0, sizes["keys"])}
    return _sections("attn_qkv", attn_q=sizes["q"], attn_k=sizes["keys"], attn_v=sizes["values"])


def _latent_parts(config: ModelConfig, layer: int) -> dict[str, Part]:
    own, latent = config.layers[layer], config.layers[layer].latent
    rotary = {"attn_kv_rope": latent.rotary} if latent.rotary else {}
    parts = _sections("attn_kv_a_mqa", attn_kv_latent=latent.size, **rotary)
    if latent.split:
        return parts
    nope, value = own.key_size - latent.rotary, own.value_size
    return parts | _sections("attn_kv_b", attn_k_nope=nope, attn_v_b=value, period=nope + value)


def _delta_parts(config: ModelConfig, layer: int) -> dict[str, Part]:
    sizes = _recurrent_sizes(config)
    qk, hv = sizes["qk"], sizes["hv"]
    each, state = hv // sizes["groups"], sizes["state"]  # of one key head: its values, and its keys
    parts = _sections("attn_qkv", attn_q=qk, attn_k=qk, attn_v=hv)
    if config.layers[layer].by_key_head:  # of each: query, key, values and gate
        parts = _sections("ssm_in", attn_q=state, attn_k=state, attn_v=each, attn_gate=each, period=2 * (state + each))
    shared = sizes["states"] // sizes["groups"]
    parts |= _sections("ssm_ba", ssm_beta=shared, ssm_alpha=shared, period=2 * shared)
    return parts | _sections("ssm_conv1d", ssm_conv1d_q=qk, ssm_conv1d_k=qk, ssm_conv1d_v=hv)


def _kimi_delta_parts(config: ModelConfig, layer: int) -> dict[str, Part]:
    sizes = _recurrent_sizes(config)
    return _sections("attn_qkv", attn_q=sizes["qk"], attn_k=sizes["qk"], attn_v=sizes["hv"])


def _rwkv6_parts(config: ModelConfig, layer: int) -> dict[str, Part]:
    return _sections("time_mix_lerp_fused", **{f"time_mix_lerp_{name}": 1 for name in "wkvrg"})


def _lightning_parts(config: ModelConfig, layer: int) -> dict[str, Part]:
    size = config.recurrence.key_size  # of each head: query, key and value
    return _sections("attn_qkv", attn_q=size, attn_k=size, attn_v=size, period=3 * size)


def _state_space_parts(config: ModelConfig, layer: int) -> dict[str, Part]:
    sizes = _recurrent_sizes(config)
    hv, qk, heads = sizes["hv"], sizes["qk"], sizes["states"]
    parts = _sections("ssm_in", ssm_in_z=hv, ssm_in_x=hv, ssm_in_b=qk, ssm_in_c=qk, ssm_in_dt=heads)
    return parts | _sections("ssm_conv1d", ssm_conv1d_x=hv, ssm_conv1d_b=qk, ssm_conv1d_c=qk)


def _channel_parts(config: ModelConfig, layer: int) -> dict[str, Part]:
    hv = _recurrent_sizes(config)["hv"]
    return _sections("ssm_in", ssm_in_x=hv, ssm_in_z=hv) | _sections("ssm_conv1d", ssm_conv1d_x=hv)


def _state_space_of_values_parts(config: ModelConfig, layer: int) -> dict[str, Part]:
    own = config.recurrence
    parts = _sections("ssm_in", ssm_in_z=own.value_size, ssm_in_x=own.value_size, period=2 * own.value_size)
    return parts | _sections("ssm_conv1d", ssm_conv1d_x=own.convolved)


def _convolution_parts(config: ModelConfig, layer: int) -> dict[str, Part]:
    d = config.d
    stem = "shortconv.in_proj"
    return _sections(stem, **{f"{stem}_b": d, f"{stem}_c": d, f"{stem}_x": d})


_MIXER_PARTS: dict[str, Callable[[ModelConfig, int], dict[str, Part]]] = {
    "attention": _attention_parts,
    "latent": _latent_parts,
    "compressed": lambda config, layer: {},
    "shared attention": lambda config, layer: {},
    "linear": lambda config, layer: {},
    "delta": _delta_parts,
    "kimi delta": _kimi_delta_parts,
    "state space": _state_space_parts,
    "channel state space": _channel_parts,
    "rwkv6": _rwkv6_parts,
    "rwkv7": lambda config, layer: {},
    "lightning": _lightning_parts,
    "state space of values": _state_space_of_values_parts,
    "convolution": _convolution_parts,
}


def _sections(stem: str, period: int = 0, **rows: int) -> dict[str, Part]:
    """Return consecutive parts of a fused tensor from the numbers of their rows."""
    ends = list(accumulate(rows.values()))
    return {name: Part(stem, end - rows[name], end, period) for name, end in zip(rows, ends, strict=True)}


def check_tensors(config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse missing tensors, wrong shapes, and tensors that the architecture does not use.

    Raises:
        ConfigError: names the tensor.
    """
    known, needed = set(), set(_NEEDED)
    if config.row.head == "required":
        needed.add("output.weight")
    if config.row.selection_bias == "required":
        needed.add(_selection_bias(config.row))
    if config.row.sinks == "required":
        needed.add("attn_sinks.weight")
    if config.row.streams == "input":
        needed.add("layer_output_scale.weight")
    if config.row.head_norm == "required":
        needed.add("time_mix_ln.bias")
    mixers = {mixer for own in config.layers for mixer in own.mixers}
    loose = {name for mixer in mixers for name in _LOOSE.get(mixer, ())}
    if {"state space", "channel state space"} & mixers:  # llama.cpp's graph adds it without asking whether there is one
        needed.add("ssm_conv1d.bias")
    if "lightning" in mixers:
        needed.add("attn_norm_2.weight")
    if config.row.rope_factors == "required" and any(own.rope and own.rope.factored for own in config.layers):
        needed.add("rope_freqs.weight")
    for prefix, table, sizes in _scopes(config):
        fused = {stem: parts for stem, parts in FUSED.items() if all(f"{part}.weight" in table for part in parts)}
        optional = _OPTIONAL | {f"{stem}.weight" for stem in fused}
        if config.embedding != "token_embd.weight":
            optional.add("token_embd.weight")
        if config.row.state_norm_optional:
            optional.add("ssm_norm.weight")
        if config.row.head_norm == "optional":
            optional.add("time_mix_ln.weight")
        for stem, parts in fused.items():
            if f"{prefix}{stem}.weight" in shapes:
                optional |= {f"{part}.weight" for part in parts}
        for short, axes in table.items():
            name, shape = prefix + short, tuple(sizes[axis] for axis in axes)
            stem = short.rsplit(".", 1)[0].removesuffix(".weight")
            if short.endswith("scale") and short not in needed and not _scaled(shapes, prefix + stem):
                continue
            known.add(name)
            if name not in shapes:
                if short in needed or not (short.endswith((".bias", "scale")) or short in optional):
                    raise ConfigError(_missing(name, shapes))
            elif tuple(shapes[name]) != shape and not (short in loose and _same(shapes[name], shape)):
                raise ConfigError(f"tensor {name} has shape {list(shapes[name])}, the metadata calls for {list(shape)}")
    for name in shapes:
        if name not in known:
            raise ConfigError(f"tensor {shown(name)} is not part of a {config.architecture} model as supported here")


def _missing(name: str, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Return the message about a tensor that is missing."""
    single = name.replace("_exps.", ".0.")
    if single != name and single in shapes:
        return (
            f"tensor {name} is missing: the experts are single tensors ({single}), as before March 2024, which "
            "llama.cpp no longer reads either; take a newer conversion"
        )
    return f"tensor {name} is missing; the file is incomplete, download or convert it again"


def _same(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Return whether two shapes differ in axes of length 1 only."""
    return [size for size in a if size != 1] == [size for size in b if size != 1]


def _scaled(shapes: Mapping[str, tuple[int, ...]], stem: str) -> bool:
    """Return whether a matrix is in the file and may have a constant factor.

    llama.cpp multiplies the bias by it too in networks other than routed experts, and nowhere else: not supported.
    """
    biased = f"{stem}.bias" in shapes and ".ffn_" in stem and not stem.endswith("_exps")
    return f"{stem}.weight" in shapes and not biased


def _scopes(config: ModelConfig) -> Iterator[tuple[str, dict[str, tuple[str, ...]], dict[str, int]]]:
    """Yield name prefix, table of tensors and named sizes, for the tensors outside the blocks and for each block."""
    sizes = {
        "d": config.d,
        "vocabulary": config.vocabulary,
        "context": config.context_length,
        "pairs": max((layer.rope.dimensions // 2 for layer in config.layers if layer.rope), default=0),
        "experts": config.expert_count,
        "adjugates": config.expert_count // max(1, config.adjugates.group),
        "fa": config.adjugates.units,
        "de": config.expert_latent or config.d,
        "fs": config.expert_shared_feed_forward_length,
        "2fs": 2 * config.expert_shared_feed_forward_length,
        "one": 1,
        "inputs": config.inputs,
        "all inputs": config.inputs * config.block_count,
        **_stream_sizes(config),
    }
    outside = _GLOBAL | (_POSITIONS if config.row.positions else {}) | (_INPUTS if config.inputs else {})
    outside |= _HEAD_SCALES if config.row.head_scale else {}
    outside |= _STREAMS[config.row.streams][0] if config.streams.several and not config.row.stream_mean else {}
    outside |= _EMBEDDING_NORM if config.row.embedding_norm == "weighted" else {}
    if not config.row.norm_weights:
        outside = {name: axes for name, axes in outside.items() if not name.startswith("output_norm.")}
    outside = {name.replace("output_norm", config.row.output_norm): axes for name, axes in outside.items()}
    if config.row.head == "tied":
        outside = {name: axes for name, axes in outside.items() if not name.startswith("output.")}
    yield "", outside, sizes
    sizes |= _recurrent_sizes(config) | _indexer_sizes(config)
    for stored in sorted(set(config.order)):
        i = config.order.index(stored)
        own = config.layers[i]
        widths = {"f": own.hidden_units, "fe": own.expert_units}
        widths |= {f"2{name}": 2 * width for name, width in widths.items()} | {"used": own.experts_used}
        yield config.prefix(i), _block_table(config, i), sizes | widths | _attention_sizes(config, i)


def _attention_sizes(config: ModelConfig, layer: int) -> dict[str, int]:
    """Return the named sizes of a block's attention."""
    own = config.layers[layer]
    q = own.heads * own.key_size * (2 if config.row.gated_queries else 1)
    keys, values = own.kv_heads * own.key_size, own.kv_heads * own.value_size
    return {
        "heads": own.heads,
        "kv heads": own.kv_heads,
        "head": own.key_size,
        "gates": own.heads * own.gate,
        "q": q,
        "keys": keys,
        "values": values,
        "qkv": q + keys + values,
        "value": own.value_size,
        "nope": own.key_size - own.latent.rotary,
        "expanded": own.heads * (own.key_size - own.latent.rotary + own.value_size),
        "read": own.heads * own.value_size,
        "latent": own.latent.size,
        "rotary": own.latent.rotary,
        "latent + rotary": own.latent.size + own.latent.rotary,
        "query latent": own.latent.queries,
        "ratio": own.compressed.ratio,
        "windows": own.compressed.windows * own.key_size,
        "ranks": own.compressed.groups * own.compressed.rank,
        "read by a group": own.heads * own.value_size // max(1, own.compressed.groups),
    }


def _stream_sizes(config: ModelConfig) -> dict[str, int]:
    """Return the named sizes of several residual streams."""
    count, mixed = config.streams.count, config.streams.rounds > 0
    return {
        "streams": count,
        "all streams": count * config.d,
        "weights of streams": count * (2 + mixed * count),
        "uses of streams": 2 + mixed,
        "other streams": count - 1,
        "mixtures": count**2,
        "laurel": config.row.laurel,
    }


def _indexer_sizes(config: ModelConfig) -> dict[str, int]:
    """Return the named sizes of what selects keys."""
    indexer = config.indexer
    return {
        "indexer heads": indexer.heads,
        "indexer key": indexer.key_size,
        "2 indexer key": 2 * indexer.key_size,
        "indexer queries": indexer.heads * indexer.key_size,
        "pool": indexer.pool,
    }


def _recurrent_sizes(config: ModelConfig) -> dict[str, int]:
    """Return the named sizes of a model's recurrent mixers, or of its convolutions."""
    own = config.recurrence
    qk, hv = own.key_heads * own.key_size, own.heads * own.value_size
    return {
        "taps": own.taps,
        "states": own.heads,
        "2 states": 2 * own.heads,
        "groups": own.key_heads,
        "state": own.key_size,
        "state value": own.value_size,
        "qk": qk,
        "hv": hv,
        "of a group": hv // max(1, own.key_heads),
        "2qk + hv": 2 * qk + hv,
        "2qk + 2hv": 2 * (qk + hv),
        "2hv + 2qk + states": 2 * (hv + qk) + own.heads,
        "2hv": 2 * hv,
        "rank": own.rank,
        "rank + 2 state": own.rank + 2 * own.key_size,
        "3d": 3 * config.d,
        "5": 5,
        **(ranks := dict(own.ranks)),
        "5 extra": 5 * ranks.get("extra", 0),
        "lerps": 6 if ranks.get("gate") else 5,
    }


def _block_table(config: ModelConfig, layer: int) -> dict[str, tuple[str, ...]]:
    """Return the tensors of a block with their shapes.

    Every matrix and LayerNorm may have a bias; every matrix but the router may have a constant factor, if the family's
    graph applies it.
    """
    row, own = config.row, config.layers[layer]
    matrices: dict[str, tuple[str, ...]] = {}
    vectors: dict[str, tuple[str, ...]] = {}
    for mixer in own.mixers:
        matrices |= _MIXERS[_layout(config, mixer)]
    mixing = set(matrices)
    scaled = mixing if row.qkv_scales else {"attn_output"}
    scaled = scaled if row.output_scales else scaled - {"attn_output"}
    repeated = row.looped or row.streams == "held"
    if repeated or (row.recurrent in own.mixers and not row.recurrent_scales):  # llama.cpp: in the first pass only
        scaled = set()
    for mixer in own.mixers:
        vectors |= _VECTORS.get(_layout(config, mixer), {})
        if config.indexer.selected and (mixer != "compressed" or own.compressed.windows > 1):
            vectors |= _INDEXER.get(mixer, {})
        if config.indexer.pool and mixer == "latent":
            vectors |= _POOLS
        if mixer == "compressed":
            vectors |= _COMPRESSED | (_MEMORY if own.compressed.ratio else {})
        if mixer == "latent":
            vectors |= _latent_table(row, own.latent)
        if mixer in ("rwkv6", "rwkv7"):
            vectors |= _rwkv_table(config, layer)
        if row.normed_steps and mixer == row.recurrent:
            vectors |= _MADE_NORMS
        if mixer == "kimi delta":
            vectors |= _KDA_GATES[row.low_rank_gates]
        if mixer in ("attention", "shared attention"):
            vectors |= {f"{name}.weight": axes for name, axes in _QK_NORMS[row.qk_norm].items()}
    if "shared attention" in own.mixers:
        del vectors["attn_k_norm.weight"]
    if own.gate:
        vectors["attn_gate.weight"] = ("gates", "d")
    vectors |= _OWN_INPUTS if config.inputs else {}
    vectors |= _STREAMS[row.streams][1] if config.streams.several else {}
    vectors |= _LAUREL if row.laurel else {}
    vectors |= _VISION_EXPERTS if row.vision_experts else {}
    vectors |= {"ffn.act.scales": ("f",)} if row.hidden_divisors else {}
    if own.hidden_units:
        matrices |= _FFN[row.ffn]
        vectors |= _SHIFTED if row.ffn.startswith("shifted") else {}
        vectors |= _SHIFTED_GATE if row.ffn == "shifted gated" else {}
    if own.routed:
        vectors |= _ADJUGATES if config.adjugates.group else {}
        matrices |= _EXPERTS | (_LATENT_EXPERTS[row.expert_latent] if config.expert_latent else {})
        shared = _FUSED_SHARED_EXPERT if row.shared_fused else _SHARED_EXPERT
        matrices |= shared if config.expert_shared_feed_forward_length else {}
    if row.ffn == "plain":
        matrices = {name: axes for name, axes in matrices.items() if name not in _GATES}
    if own.keys_as_values:
        del matrices["attn_v"], matrices["attn_qkv"]
    places = norm_places(config, layer) if row.norm_weights else ()
    norms = {name: ("d",) for names in places for name in names}
    table = {f"{name}.weight": axes for name, axes in (matrices | norms).items()} | vectors
    table = {name.removesuffix(".weight" if name[:-7] in row.bare_names else ""): axes for name, axes in table.items()}
    table |= {f"{name}.bias": axes[:-1] for name, axes in matrices.items() if len(axes) > 1}
    for name, axes in matrices.items():
        applied = name in scaled or (name not in mixing and row.ffn_scales) or (row.down_scales and name == "ffn_down")
        if applied and len(axes) > 1 and name != "ffn_gate_inp":
            table |= {f"{name}.{kind}": axes[:-2] or ("one",) for kind in _SCALES}
    if row.norm == "layer" or row.norm_bias:
        table |= {f"{name}.bias": axes for name, axes in norms.items()}
    if row.inner_norms:
        table |= {"attn_sub_norm.weight": ("read",)} if own.mixers else {}
        table |= {"ffn_sub_norm.weight": ("f",)} if own.hidden_units else {}
    if row.sinks and own.heads:
        table["attn_sinks.weight"] = ("heads",)
    if own.token_experts:
        table[EXPERTS_OF_TOKENS] = ("vocabulary", "used")
    elif row.selection_bias and own.routed:
        table[_selection_bias(row)] = ("experts",)
    if row.token_experts and own.routed:  # for images
        table["exp_probs_b_vl.bias"] = ("experts",)
    if row.router_reads == "stream" and own.routed:
        table["ffn_gate_inp.scale"] = ("d",)
    if row.stream_scale or row.streams == "input":
        table["layer_output_scale.weight"] = ("one",)
    return table


def _selection_bias(row: Architecture) -> str:
    """Return the name of the bias that the choice of experts has."""
    return "exp_probs_b" if "exp_probs_b" in row.bare_names else "exp_probs_b.bias"


def _latent_table(row: Architecture, latent: Latent) -> dict[str, tuple[str, ...]]:
    """Return the tensors of latent attention but its output projection, by full name; they have no biases."""
    table: dict[str, tuple[str, ...]] = {"attn_kv_a_mqa": ("latent + rotary", "d"), "attn_kv_a_norm": ("latent",)}
    if latent.queries:
        table |= {
            "attn_q_a": ("query latent", "d"),
            "attn_q_a_norm": ("query latent",),
            "attn_q_b": ("q", "query latent"),
        }
    else:
        table["attn_q"] = ("q", "d")
    if latent.split:
        table |= {"attn_k_b": ("heads", "latent", "nope"), "attn_v_b": ("heads", "value", "latent")}
    else:
        table["attn_kv_b"] = ("expanded", "latent")
    if row.normed_rotary:
        table["attn_k_norm"] = ("rotary",)
    return {f"{name}.weight": axes for name, axes in table.items()}


def _rwkv_table(config: ModelConfig, layer: int) -> dict[str, tuple[str, ...]]:
    """Return the tensors that only some kinds or blocks of RWKV have."""
    row, ranks = config.row, dict(config.recurrence.ranks)
    table = dict(_HEAD_NORM) if row.head_norm else {}
    if row.recurrent == "rwkv6" and row.head_norm:
        table |= _FIRST | _LERPS
    if ranks.get("gate"):
        table |= _GATE
    return table | (_SOURCED if config.layers[layer].source is not None else {})


def norm_places(config: ModelConfig, layer: int) -> list[tuple[str, ...]]:
    """Return the names that a block's norm may have at each place, before and after its branches and their parts."""
    row, own = config.row, config.layers[layer]
    places = [row.norms.attention_in, row.norms.attention_out] if own.mixers else []
    if own.hidden_units or own.routed:
        places += [row.norms.ffn_in, row.norms.ffn_out]
    if own.hidden_units and own.routed:
        places += [row.norms.dense_out, row.norms.experts_in, row.norms.experts_out]
    return places
