"""What the tiny files of each architecture contain: data for the writer in `tiny.py`, and nothing else.

`FAMILIES` states how the converter lays out one `general.architecture`, as differences from a dense `llama` file.
`FAMILY_CASES` are the variations to test: `of(architecture, differences)`. Windows are 4 tokens wide, so that prompts
of 6 tokens already leave them; scales and soft caps are such that they act. A new variation is one line.
"""

from typing import Any

SANDWICH = ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm")
QKV = ("attn_q", "attn_k", "attn_v")
LAYER_NORM = {"norm": "ln_bias", "ffn": "plain"}
# The embeddings are scaled by 8 = sqrt(64) afterwards; the head is tied to them.
GEMMA = {"tied": True, "embed_std": 0.125, "eps": 1e-6, "head_dim": 32}
GRANITE = {
    "extra": {"attention.scale": 0.4, "embedding_scale": 6.0, "residual_scale": 0.5, "logit_scale": 4.0},
    "embed_std": 0.2,
    "tied": True,
}
EXPERTS = {"experts": 6, "experts_used": 2, "expert_ff": 96}
# Full layers have larger heads, fewer of them for keys, and no matrix of values; scores are not divided by a root.
GEMMA4 = GEMMA | {
    "norms": SANDWICH,
    "layers": 4,
    "mixers": ("window", "window", "attention"),
    "kv_by_layer": True,
    "kv_heads": 1,
    "values": False,
    "still_pairs": 12,
    "sizes": {"window": {"head_dim": 16, "kv_heads": 2, "values": True}},
    "window": 4,
    "rope_base": 100.0,
    "qk_norm": "head",
    "qk_gain": 0.6,
    "output_scale": True,
    "zeros": ("embedding_length_per_layer_input", "attention.shared_kv_layers"),
    "extra": {
        "final_logit_softcapping": 1.2,
        "rope.freq_base_swa": 50.0,
    },
}
SIZES_OF_HEADS = ("attention.key_length", "attention.value_length", "rope.dimension_count")
ATTENTION_KEYS = (
    *("attention.head_count_kv", "attention.key_length", "attention.value_length"),
    *("rope.dimension_count", "rope.freq_base"),
)
YARN = {"type": "yarn", "factor": 4.0, "original_context_length": 32}
# With a base of 100 the ramp of YaRN lies within the pairs.
YARN_ROW = {"scaling": YARN, "rope_base": 100.0}

# No two sizes are equal, neither of a head's parts nor of what they are made from.
SIZES = {"nope": 12, "latent": 20, "value": 10, "query": 24}
UNSPLIT = SIZES | {"unsplit": True}
NARROW = {"heads": 2, "nope": 10, "latent": 16, "value": 14}
LATENT = {"mixers": ("latent",), "n_rot": 8, "sizes": SIZES}
# Two of four groups, three of their six experts.
GROUPS = {"experts": 12, "experts_used": 3} | {
    "extra": {
        "expert_group_count": 4,
        "expert_group_used_count": 2,
        "expert_gating_func": 2,
        "expert_weights_norm": True,
        "expert_weights_scale": 2.5,
    }
}
DEEPSEEK = LATENT | GROUPS
DEEPSEEK |= {"kv_heads": 1, "layers": 3, "dense_lead": 1, "expert_ff": 48, "shared_count": 2, "selection_bias": 0.3}

# As stored: of both α the softplus is taken, and β is added to the first.
XIELU = {"xielu.alpha_n": 1.6, "xielu.alpha_p": 0.4, "xielu.beta": 0.5, "xielu.eps": -1e-6}

# More value heads than key heads.
DELTA = {
    "ssm.conv_kernel": 4,
    "ssm.state_size": 16,
    "ssm.group_count": 2,
    "ssm.time_step_rank": 4,
    "ssm.inner_size": 64,
}
QWEN35 = {"norms": ("attn_norm", "post_attention_norm"), "qk_norm": "head", "head_dim": 32, "n_rot": 16, "sizes": DELTA}


def delta_blocks(kinds: str, **more: Any) -> dict[str, Any]:
    """Return blocks with a delta net (d; grouped: g; in an old layout: o) or full attention (f), stated one by one."""
    names = {"d": "delta", "g": "grouped delta", "o": "old delta", "f": "gated attention"}
    mixers = tuple(names[kind] for kind in kinds)
    listed = {"attention.recurrent_layers": [kind != "f" for kind in kinds]}
    return more | {"layers": len(kinds), "mixers": mixers, "extra": listed | more.get("extra", {})}


LFM2 = {"qk_norm": "head", "final_norm": "token_embd_norm", "sizes": {"shortconv.l_cache": 3}, "tied": True}


def convolution_blocks(kinds: str, **more: Any) -> dict[str, Any]:
    """Return blocks with a short convolution (c), which have no kv heads, or attention (a)."""
    mixers = tuple({"c": "convolution", "a": "attention"}[kind] for kind in kinds)
    return more | {"layers": len(kinds), "mixers": mixers, "kv_by_layer": True}


# The file has no length of values, nor need it be the model's width by heads.
KIMI = EXPERTS | {"kv_heads": 1, "n_rot": 8, "dense_lead": 1, "expert_ff": 48, "shared_count": 2, "selection_bias": 0.3}
KIMI |= {"omit": ("attention.value_length",), "extra": {"expert_gating_func": 2, "expert_weights_scale": 2.5}}
KIMI |= {"sizes": SIZES | {"query": 0, "ssm.conv_kernel": 4, "kda.head_dim": 16}}

K3 = {"flat": True, "query": 24, "head_gate": "elements", "kda.gate_lower_bound": -5.0, "attn_res.block_size": 2}
K3 |= {"activation.situ_beta": 1.5, "activation.situ_linear_beta": 0.75}


def kda_blocks(kinds: str, **more: Any) -> dict[str, Any]:
    """Return blocks with Kimi Delta Attention, which have no kv heads, or latent attention (l).

    The former as in Kimi Linear (k), in Kimi K3 (g), or with a bound (b).
    """
    mixers = tuple({"k": "kda", "g": "k3 kda", "b": "bounded kda", "l": "latent"}[kind] for kind in kinds)
    return more | {"layers": len(kinds), "mixers": mixers, "kv_by_layer": True}


NEMOTRON_H = {
    "mixers": ("mamba2", "none", "attention", "none"),
    "alone": True,
    "norms": ("attn_norm",),
    "layers": 5,
    "kv_by_layer": True,
    "ffn": "plain",
    "extra": {"attention.layer_norm_epsilon": 1e-5},
}
# Architectures with state space mixers.
STATE_SPACE: dict[str, dict[str, Any]] = {
    "granitehybrid": GRANITE
    | {"mixers": ("mamba2", "attention", "mamba2"), "layers": 3, "kv_by_layer": True}
    | {"extra": GRANITE["extra"] | {"rope.scaling.finetuned": False}},
    # Attention and Mamba-2 read the same input, and their outputs are added.
    "falcon-h1": {
        "mixers": ("attention, mamba2",),
        "bare_norms": ("ffn_norm",),
        "sizes": {"normed": False},
        "layers": 3,
    },
    # One branch a block, after one norm: Mamba-2, attention or a feed-forward network.
    "nemotron_h": NEMOTRON_H,
    "nemotron_h_moe": NEMOTRON_H
    | EXPERTS
    | {"expert_ff": 48, "shared_ff": 80, "selection_bias": 0.3}
    | {"extra": NEMOTRON_H["extra"] | {"expert_weights_norm": True, "expert_weights_scale": 2.5}},
    "jamba": {"mixers": ("mamba", "attention", "mamba"), "layers": 3, "kv_by_layer": True}
    | {"sizes": {"normed": True}, "omit": ATTENTION_KEYS[1:]},
    # (llama.cpp does not come back where the first block states 0 heads, as the converter writes it.)
    "plamo2": {
        "mixers": ("attention", "plamo2"),
        "layers": 4,
        "kv_by_layer": True,
        "norms": SANDWICH,
        "bare_norms": ("post_attention_norm", "post_ffw_norm"),
        "ffn": "fused",
        "fused_qkv": True,
        "qk_norm": "heads",
        "head_dim": 32,
        "omit": ("rope.dimension_count",),
    },
    # The converter writes 0 heads, and no other key of attention.
    "mamba": {"mixers": ("mamba",), "alone": True, "norms": ("attn_norm",), "layers": 3, "kv_heads": None}
    | {"extra": {"attention.head_count": 0}, "omit": ATTENTION_KEYS},
    "mamba2": {"mixers": ("mamba2",), "alone": True, "norms": ("attn_norm",), "layers": 3, "kv_heads": None}
    | {"extra": {"attention.head_count": 0}, "omit": ATTENTION_KEYS},
}

RWKV: dict[str, dict[str, Any]] = {
    "rwkv6": {"mixers": ("rwkv6",), "norm": "ln_bias", "norms": ("attn_norm", "attn_norm_2"), "embedding_norm": True}
    | {"kv_heads": None, "layers": 4, "ffn": "gated channel mix", "omit": ATTENTION_KEYS}
    | {"extra": {"rescale_every_n_layers": 2}, "sizes": {"head": 16}},
    "rwkv7": {"mixers": ("rwkv7",), "norm": "ln_bias", "norms": ("attn_norm", "attn_norm_2"), "embedding_norm": True}
    | {"kv_heads": None, "layers": 3, "ffn": "channel mix", "omit": ATTENTION_KEYS},
    "rwkv6qwen2": {"mixers": ("linear rwkv6",), "sizes": {"head": 16, "biased": True}, "layers": 3}
    | {"extra": {"token_shift_count": 1}, "omit": ATTENTION_KEYS[1:]},
    "arwkv7": {"mixers": ("rwkv7",), "kv_heads": None, "layers": 3, "omit": ATTENTION_KEYS}
    | {"extra": {"token_shift_count": 1}},
}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"biases": QKV},
    "qwen3": {"qk_norm": "head", "head_dim": 32},
    "gemma": GEMMA,
    "gemma2": GEMMA
    | {
        "norms": SANDWICH,
        "layers": 4,
        "window": 4,
        "extra": {"attn_logit_softcapping": 1.5, "final_logit_softcapping": 1.2},
    },
    # Layer 5 is global: six are the fewest that have both kinds.
    "gemma3": GEMMA | {"norms": SANDWICH, "layers": 7, "qk_norm": "head", "window": 4, "rope_base": 100.0},
    "gemma4": GEMMA4,
    "phi3": {"fused_qkv": True, "ffn": "fused"},
    "olmo2": {"norms": ("post_attention_norm", "post_ffw_norm"), "qk_norm": "full"},
    "mistral3": {},
    "granite": GRANITE,
    "smollm3": {"tied": True, "layers": 5},
    "exaone4": {"norms": ("post_attention_norm", "post_ffw_norm"), "qk_norm": "head"},
    "seed_oss": {"norms": ("attn_norm", "post_attention_norm"), "biases": QKV, "head_dim": 32},
    "hunyuan-dense": {"qk_norm": "head", "head_dim": 32},
    "internlm2": {},
    "ernie4_5": {"tied": True, "head_dim": 32},
    "exaone": {},
    "minicpm": {
        "extra": {"embedding_scale": 6.0, "residual_scale": 0.5, "logit_scale": 4.0},
        "embed_std": 0.2,
        "tied": True,
    },
    "arcee": {"ffn": "plain", "head_dim": 32},
    "apertus": {"ffn": "plain", "qk_norm": "head", "bare": XIELU},
    "glm4": {"norms": SANDWICH, "biases": QKV, "ffn": "fused", "n_rot": 8},
    "cohere2": {
        "norm": "ln",
        "norms": ("attn_norm",),
        "tied": True,
        "layers": 5,
        "window": 4,
        "extra": {"logit_scale": 0.25},
    },
    "gpt2": LAYER_NORM
    | {"positions": True, "fused_qkv": True, "fused_bias": True, "kv_heads": 4, "tied": True}
    | {"biases": (*QKV, "attn_output", "ffn_up", "ffn_down")},
    "phi2": LAYER_NORM
    | {"norms": ("attn_norm",), "n_rot": 8, "kv_heads": 4}
    | {"biases": (*QKV, "attn_output", "ffn_up", "ffn_down", "output")},
    "olmo": {"norm": "ln_bare", "tied": True},
    "command-r": {"norm": "ln", "norms": ("attn_norm",), "tied": True, "extra": {"logit_scale": 0.25}},
    "nemotron": LAYER_NORM | {"n_rot": 8},
    "stablelm": {"norm": "ln_bias", "n_rot": 4, "biases": QKV, "kv_heads": 4},
    "gptneox": LAYER_NORM
    | {"n_rot": 4, "kv_heads": 4, "fused_qkv": True, "fused_bias": True, "extra": {"use_parallel_residual": True}}
    | {"biases": (*QKV, "attn_output", "ffn_up", "ffn_down")},
    "falcon": LAYER_NORM | {"norms": ("attn_norm",), "fused_qkv": True, "kv_heads": 1, "tied": True},
    "starcoder2": LAYER_NORM | {"tied": True, "biases": (*QKV, "attn_output", "ffn_up", "ffn_down")},
    "qwen3moe": EXPERTS | {"qk_norm": "head", "head_dim": 32, "expert_ff": 48},
    "qwen3vl": {"qk_norm": "head", "head_dim": 32, "extra": {"rope.dimension_sections": [6, 5, 5, 0]}},
    "qwen3vlmoe": EXPERTS
    | {"qk_norm": "head", "head_dim": 32, "expert_ff": 48, "extra": {"rope.dimension_sections": [6, 5, 5, 0]}},
    "qwen2moe": EXPERTS | {"biases": QKV, "shared_ff": 80, "shared_gate": True, "expert_ff": 48},
    "olmoe": EXPERTS | {"qk_norm": "full", "kv_heads": 4},
    "granitemoe": EXPERTS | GRANITE,
    # The gain of up makes one value in four leave the clamp at 7.
    "gpt-oss": {
        "norms": ("attn_norm", "post_attention_norm"),
        "layers": 3,
        "window": 4,
        "sinks": True,
        "experts": 6,
        "experts_used": 3,
        "expert_ff": 64,
        "up_gain": 6.0,
        "gate_gain": 6.0,
        "down_gain": 0.2,
        "scaling": YARN,
        "rope_base": 100.0,
        "biases": (
            *(*QKV, "attn_output", "ffn_gate_inp"),
            *("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"),
        ),
    },
    "glm4moe": EXPERTS
    | {"norms": ("attn_norm", "post_attention_norm"), "biases": QKV, "n_rot": 8, "layers": 3, "dense_lead": 1}
    | {"expert_ff": 48, "shared_count": 1, "selection_bias": 0.3}
    | {"extra": {"expert_weights_norm": True, "expert_weights_scale": 1.5}},
    "deepseek": EXPERTS | {"layers": 3, "dense_lead": 1, "expert_ff": 48, "shared_count": 2},
    # llama.cpp takes as many key heads as query heads from these files.
    "dots1": EXPERTS
    | {"qk_norm": "head", "kv_heads": 4, "layers": 3, "dense_lead": 1, "expert_ff": 48, "shared_count": 2}
    | {"selection_bias": 0.3}
    | {"extra": {"expert_weights_norm": True, "expert_weights_scale": 2.5, "expert_gating_func": 2}},
    "ernie4_5-moe": EXPERTS
    | {"layers": 3, "dense_lead": 1, "expert_ff": 48, "shared_ff": 80, "selection_bias": 0.05, "tied": True}
    | {"extra": {"interleave_moe_layer_step": 1}},
    "hunyuan-moe": EXPERTS | {"qk_norm": "head", "head_dim": 32, "shared_ff": 80, "tied": True},
    "bailingmoe": EXPERTS | {"expert_ff": 48, "shared_count": 2, "extra": {"expert_weights_norm": True}},
    "bailingmoe2": EXPERTS
    | {"qk_norm": "head", "fused_qkv": True, "n_rot": 8, "layers": 3, "dense_lead": 1, "experts": 12}
    | {"experts_used": 3, "expert_ff": 48, "shared_count": 1, "selection_bias": 0.3}
    | {"predictor_norms": ("nextn.enorm", "nextn.hnorm", "layer_output_norm")}
    | {"extra": {"expert_weights_norm": True, "expert_weights_scale": 2.5, "expert_gating_func": 2}},
    "exaone-moe": EXPERTS
    | {"qk_norm": "head", "layers": 5, "dense_lead": 1, "window": 4, "expert_ff": 48, "shared_ff": 48}
    | {"selection_bias": 0.3, "predictor_experts": False}
    | {"extra": {"expert_weights_norm": True, "expert_weights_scale": 2.5, "expert_gating_func": 2}},
    # Every layer has numbers of heads and hidden units of its own.
    "openelm": {"qk_norm": "head", "fused_qkv": True, "tied": True, "head_dim": 16, "mixers": ("attention", "narrow")}
    | {"sizes": {"narrow": {"heads": 3, "kv_heads": 1}}, "heads_by_layer": True, "kv_by_layer": True}
    | {"layers": 3, "ffs": (64, 96, 128)},
    # Some layers have lost their attention, or heads, or have a wider network.
    "deci": {"mixers": ("attention", "none", "narrow"), "sizes": {"narrow": {"kv_heads": 1}}, "heads_by_layer": True}
    | {"kv_by_layer": True, "layers": 4, "ffs": (96, 64, 128, 32)},
    "bitnet": {"inner_norms": True, "tied": True},
    "mellum": EXPERTS | {"qk_norm": "head", "head_dim": 32, "expert_ff": 48, "layers": 5, "window": 4},
    # The last layer is full, and the middle one of three.
    "maple": EXPERTS
    | {"qk_norm": "head", "head_dim": 32, "n_rot": 16, "expert_ff": 48, "layers": 4, "window": 4}
    | {"extra": {"attention.sliding_window_pattern": [True, False, True, False], "swiglu_clamp_exp": [0.9] * 4}},
    "granite_swa": GRANITE
    | {"layers": 4, "window": 4, "sinks": True}
    | {"extra": GRANITE["extra"] | {"attention.sliding_window_pattern": [False, True, True, False]}},
    "hy_v3": EXPERTS
    | {"qk_norm": "head", "head_dim": 32, "layers": 3, "dense_lead": 1, "expert_ff": 48, "shared_ff": 80}
    | {"selection_bias": 0.3, "bare_norms": ("exp_probs_b",), "omit": ("leading_dense_block_count",)}
    | {"extra": {"expert_weights_norm": True, "expert_weights_scale": 2.5, "expert_gating_func": 2}},
    # Layers 0 and 4 are full; the first rotates nevertheless, since it is dense.
    "cohere2moe": EXPERTS
    | {"norm": "ln", "norms": ("attn_norm",), "layers": 6, "window": 4, "dense_lead": 1, "expert_ff": 48}
    | {"shared_count": 2, "extra": {"logit_scale": 0.25, "expert_weights_norm": True}},
    # Values are narrower than keys, and windowed layers have more kv heads, and sinks. Pattern in integers.
    "mimo2": EXPERTS
    | {"mixers": ("attention", "window", "window"), "kv_by_layer": True, "kv_heads": 1, "layers": 4, "window": 4}
    | {"sizes": {"window": {"kv_heads": 2, "sinks": True}}, "head_dim": 24, "value_dim": 16, "n_rot": 8}
    | {"dense_lead": 1, "expert_ff": 48, "selection_bias": 0.3}
    | {"omit": ("leading_dense_block_count", *(f"{key}_swa" for key in SIZES_OF_HEADS))}
    | {"extra": {"attention.sliding_window_pattern": [0, 1, 1, 0], "attention.value_scale": 0.7}},
    # The size of the window is not read, but that there is one: every first of four layers is full, and not rotated.
    "smallthinker": EXPERTS | {"expert_ff": 48, "layers": 5, "window": 4, "extra": {"expert_gating_func": 2}},
    "dbrx": EXPERTS
    | {"norm": "ln", "norms": ("attn_norm", "attn_output_norm"), "fused_qkv": True}
    | {"extra": {"attention.clamp_kqv": 1.0}},
    # The dense network is as wide as the stream; the experts read the block's input.
    "arctic": EXPERTS | {"expert_norms": ("ffn_norm_exps",), "dense_beside": True, "dense_ff": 64},
    "grok": EXPERTS
    | {"norms": ("attn_norm", "attn_output_norm", "ffn_norm", "post_ffw_norm"), "dense_beside": True, "expert_ff": 48}
    | {"embed_std": 0.2}
    | {"extra": {"embedding_scale": 5.0, "logit_scale": 0.4, "attention.output_scale": 0.3}},
    # Each pair of experts has one in common, which may be chosen twice.
    "grovemoe": EXPERTS
    | {"qk_norm": "head", "head_dim": 32, "experts_used": 3, "expert_ff": 48, "chunk": 2, "chunk_ff": 40}
    | {"extra": {"expert_group_scale": 0.6}},
    "minimax-m2": EXPERTS
    | {"qk_norm": "full", "n_rot": 8, "head_dim": 32, "selection_bias": 0.3, "extra": {"expert_gating_func": 2}},
    "phimoe": EXPERTS | {"norm": "rms_bias", "biases": (*QKV, "attn_output", "output")},
    "xverse": {"kv_heads": 4},
    # The stated width is that of gate and up together.
    "qwen": {
        "fused_qkv": True,
        "fused_bias": True,
        "biases": QKV,
        "kv_heads": 4,
        "extra": {"feed_forward_length": 192},
    },
    "qwen2vl": {"biases": QKV, "extra": {"rope.dimension_sections": [2, 3, 3, 0]}},
    "starcoder": LAYER_NORM
    | {"positions": True, "fused_qkv": True, "fused_bias": True, "kv_heads": 1, "tied": True}
    | {"biases": (*QKV, "attn_output", "ffn_up", "ffn_down")},
    "codeshell": LAYER_NORM | {"biases": (*QKV, "attn_output", "ffn_up", "ffn_down")},
    "orion": {"norm": "ln_bias"},
    "maincoder": {"qk_norm": "head", "head_dim": 32},
    "chatglm": {"biases": QKV, "ffn": "fused", "fused_qkv": True, "fused_bias": True, "n_rot": 8},
    "pangu-embedded": {"biases": (*QKV, "attn_output"), "head_dim": 32},
    "plamo": {"norms": ("attn_norm",)},
    # Layer 7 is the first that sees everything.
    "plamo3": {"norms": SANDWICH, "bare_norms": ("post_attention_norm", "post_ffw_norm"), "layers": 9, "window": 4}
    | {"qk_norm": "head", "ffn": "fused", "fused_qkv": True, "tied": True, "rope_base": 100.0, "post_gain": 0.4},
    "cogvlm": {"mixers": ("vision experts",), "fused_qkv": True, "kv_heads": 4},
    # The converter writes that no dimension is rotated apart from others.
    "deepseek2-ocr": EXPERTS
    | {"kv_heads": 4, "layers": 3, "dense_lead": 1, "expert_ff": 48, "shared_count": 2}
    | {"extra": {"rope.dimension_count": 0, "expert_weights_scale": 1.0}},
    "baichuan": {"kv_heads": 4},
    "mpt": {"norm": "ln", "ffn": "plain", "fused_qkv": True, "kv_heads": 4, "tied": True}
    | {"extra": {"attention.max_alibi_bias": 8.0}},
    "bloom": LAYER_NORM
    | {"fused_qkv": True, "fused_bias": True, "kv_heads": 4, "tied": True, "embed_norm": True}
    | {"biases": (*QKV, "attn_output", "ffn_up", "ffn_down")},
    "refact": {"kv_heads": 1, "tied": True},
    # Scores are divided by the size of a head, not by its root.
    "jais": {"norm": "ln_bias", "fused_qkv": True, "fused_bias": True, "kv_heads": 4, "score_gain": 3.0}
    | {"biases": (*QKV, "attn_output", "ffn_gate", "ffn_up", "ffn_down")}
    | {"extra": {"attention.max_alibi_bias": 8.0}},
    "jais2": LAYER_NORM | {"biases": (*QKV, "attn_output", "ffn_up", "ffn_down")},
    "paddleocr": {"head_dim": 32, "tied": True, "extra": {"rope.dimension_sections": [4, 6, 6, 0]}},
    "hunyuan_vl": {"qk_norm": "head", "head_dim": 32, "tied": True, "extra": {"rope.dimension_sections": [4, 4, 4, 4]}},
    "qwen35": QWEN35 | {"extra": {"rope.dimension_sections": [3, 3, 2, 0]}},
    "qwen35moe": EXPERTS
    | QWEN35
    | {"expert_ff": 48, "shared_ff": 80, "shared_gate": True, "extra": {"rope.dimension_sections": [3, 3, 2, 0]}},
    "lfm2": LFM2,
    "lfm2moe": EXPERTS
    | LFM2
    | {"dense_lead": 1, "expert_ff": 48, "selection_bias": 0.3, "extra": {"expert_gating_func": 2}},
    "kimi-linear": KIMI,
    "bailingmoe3": KIMI
    | {"shared_ff": 80, "shared_count": 1, "predictor_norms": ("nextn.enorm", "nextn.hnorm", "layer_output_norm")}
    | {"sizes": KIMI["sizes"] | {"head_gate": True, "kda.safe_gate": True, "kda.gate_lower_bound": -5.0}}
    | {"extra": KIMI["extra"] | {"expert_weights_norm": True}},
    # The limits of the activation are where hidden units are.
    "kimi-k3": KIMI
    | {"depth_scores": True, "latent": 40, "latent_name": "routed", "latent_norm": True}
    | {"sizes": KIMI["sizes"] | K3}
    | {"extra": KIMI["extra"] | {"expert_weights_norm": True}},
    "glm5-next": KIMI
    | {"sizes": KIMI["sizes"] | {"query": 24, "flat": True, "indexer": 8, "pool": 4}, "n_rot": 0}
    | {"streams": 4, "stream_rounds": 3, "stream_head": False}
    | {
        "extra": {
            "attention.layer_norm_epsilon": 1e-6,
            "hyper_connection.epsilon": 1e-2,
            "expert_weights_norm": True,
            "expert_weights_scale": 2.5,
        }
    },
    "qwen3next": EXPERTS | QWEN35 | {"expert_ff": 48, "shared_ff": 80, "shared_gate": True},
    "deepseek2": DEEPSEEK,
    "mistral4": LATENT
    | EXPERTS
    | {"kv_heads": 1, "expert_ff": 48, "shared_count": 1}
    | {"extra": {"expert_weights_norm": True, "leading_dense_block_count": 0}},
    "minicpm3": LATENT | {"sizes": UNSPLIT, "kv_heads": 4, "embed_std": 0.1, "tied": True},
    "plm": LATENT | {"sizes": UNSPLIT | {"query": 0}, "kv_heads": 4, "ffn": "plain", "tied": True},
    "deepseek32": DEEPSEEK | {"sizes": SIZES | {"indexer": 8}, "layers": 4, "predictors": 1},
    "glm-dsa": DEEPSEEK
    | {"sizes": SIZES | {"indexer": 8, "indexer_types": [True, False, True]}, "layers": 4, "predictors": 1},
    # Windowed layers have fewer heads, of other sizes; full ones choose their keys.
    "dots3note": EXPERTS
    | {"mixers": ("latent", *2 * ("latent window",), "latent", "latent window"), "n_rot": 8, "kv_heads": 1, "layers": 5}
    | {"predictors": 1, "predictor_experts": False, "dense_lead": 1, "expert_ff": 48, "shared_count": 1}
    | {"selection_bias": 0.3, "window": 4}
    | {"sizes": SIZES | {"head_gate": True, "rope_norm": True, "indexer": 8, "window": NARROW}}
    | {"extra": {"expert_gating_func": 2, "expert_weights_norm": True, "rope.freq_base_swa": 50.0}},
    "hy_v4": LATENT
    | EXPERTS
    | {"sizes": SIZES | {"head_gate": "elements"}, "kv_heads": 1, "layers": 3, "dense_lead": 1, "expert_ff": 48}
    | {"shared_count": 1, "selection_bias": 0.3, "sinks": True, "streams": 3}
    | {"extra": {"hyper_connection.epsilon": 1e-2, "hyper_connection.magnitude": 1.7, "expert_gating_func": 2}},
    # Of the layers one sees its window only, and the others groups of 4 or of 128 tokens besides.
    "deepseek4": EXPERTS
    | {"mixers": ("compressed 0", "compressed 4", "compressed 128"), "layers": 3, "head_dim": 32, "n_rot": 8}
    | {"sizes": {"query": 24, "groups": 2, "rank": 10, "indexer": 8}, "kv_heads": 1, "window": 4, "expert_ff": 48}
    | {"shared_count": 1, "selection_bias": 0.3, "token_experts": 1, "streams": 4, "stream_rounds": 3}
    | {"predictor_streams": True}
    | {
        "extra": {"hyper_connection.epsilon": 1e-2, "expert_gating_func": 4, "expert_weights_norm": True}
        | {"expert_weights_scale": 1.5, "swiglu_clamp_exp": [0.9] * 3, "attention.compress_rope_freq_base": 50.0}
    },
    # The gain of up makes some values leave the clamp at 7.
    "minimax-m3": EXPERTS
    | {"mixers": ("block_sparse",), "sizes": {"indexer": 2}, "qk_norm": "head", "n_rot": 8, "head_dim": 32}
    | {"layers": 3, "dense_lead": 1, "expert_ff": 48, "shared_count": 2, "selection_bias": 0.3}
    | {"up_gain": 6.0, "gate_gain": 6.0, "down_gain": 0.2}
    | {"extra": {"expert_gating_func": 2, "expert_weights_norm": True, "expert_weights_scale": 2.0}},
    # Constants of llama.cpp's: inputs of 256 elements, and a rank of 64.
    "gemma3n": GEMMA
    | {"norms": SANDWICH, "layers": 3, "mixers": ("window", "window", "attention"), "per_layer": 256, "predicted": True}
    | {
        "ff": 256,
        "sizes": {"window": {}},
        "head_dim": 16,
        "window": 4,
        "rope_base": 100.0,
        "qk_norm": "head",
        "qk_gain": 0.8,
    }
    | {"zeros": ("attention.shared_kv_layers",), "extra": {"rope.freq_base_swa": 50.0}},
    "afmoe": EXPERTS
    | {"norms": SANDWICH, "layers": 5, "window": 4, "qk_norm": "head", "attn_gate": "elements", "dense_lead": 1}
    | {"expert_ff": 48, "shared_count": 1, "selection_bias": 0.3, "embed_std": 0.125}
    | {"extra": {"expert_weights_norm": True, "expert_weights_scale": 1.5}},
    # The first layer of four is full, and has fewer heads and rotated dimensions.
    "laguna": EXPERTS
    | {
        "mixers": ("attention", *["window"] * 3),
        "sizes": {"window": {"heads": 6, "n_rot": 16}},
        "head_dim": 16,
        "n_rot": 8,
    }
    | {"layers": 5, "window": 4, "qk_norm": "head", "attn_gate": "heads", "rope_base": 100.0, "dense_lead": 1}
    | {"expert_ff": 48, "shared_ff": 80, "selection_bias": 0.3, "omit": ("attention.sliding_window_pattern",)}
    | {"extra": {"expert_gating_func": 2, "expert_weights_norm": True, "expert_weights_scale": 2.5}},
    # Full layers rotate half of what the file states.
    "step35": EXPERTS
    | {
        "mixers": ("attention", "window", "window"),
        "sizes": {"window": {"heads": 6}},
        "head_dim": 16,
        "rope_base": 100.0,
    }
    | {"layers": 4, "window": 4, "qk_norm": "head", "attn_gate": "heads", "dense_lead": 1, "expert_ff": 48}
    | {"shared_ff": 80, "selection_bias": 0.3, "omit": ("rope.dimension_count_swa",)}
    | {"extra": {"expert_weights_norm": True, "expert_weights_scale": 2.5, "rope.freq_base_swa": 50.0}},
    "spark2_5": {"mixers": ("window", "attention"), "sizes": {"window": {"n_rot": 16}}, "n_rot": 8, "fused_qkv": True}
    | {"layers": 3, "window": 4, "attn_gate": "heads", "rope_base": 100.0, "extra": {"rope.freq_base_swa": 50.0}},
    "muse-glimmer": {"norms": SANDWICH, "layers": 5, "window": 4, "qk_norm": "head", "attn_gate": "elements"}
    | {"embed_std": 0.2, "rope_base": 100.0, "extra": {"logit_scale": 0.5, "final_logit_softcapping": 1.2}},
    "llama4": EXPERTS
    | {"layers": 5, "dense_blocks": (0, 2, 4), "experts_used": 1, "expert_ff": 48, "shared_ff": 48}
    | {"omit": ("expert_shared_feed_forward_length",), "extra": {"interleave_moe_layer_step": 2}},
    # Embeddings do not go past the first norm.
    "minimax-01": EXPERTS
    | {"mixers": ("lightning", "lightning", "attention"), "layers": 4, "n_rot": 8, "expert_ff": 96}
    | {"extra": {"attention.recurrent_layers": [True, True, False, True], "residual_scale": 1.7}},
    # A factor of the output projections is how the converter writes gains of branches.
    "talkie": {"norm": "rms_bare", "qk_norm": "gain", "qk_gain": 1.9, "output_scale": True, "layers": 3}
    | {"scales": ("attn_output", "ffn_down"), "extra": {"logit_scale": 0.5}},
    "nanbeige": {"extra": {"num_loops": 2, "skip_loop_final_norm": False}},
    # Two stacks of one layer; in each of two cycles the first makes two passes.
    "hrm_text": {"norm": "rms_bare", "cycles": (2, 2), "attn_gate": "elements", "embed_std": 0.3}
    | {"extra": {"embedding_scale": 3.0}},
    **STATE_SPACE,
    **RWKV,
}


def of(architecture: str, **row: Any) -> dict[str, Any]:
    """Return a full row: the family's layout, grouped queries, and the differences given; `extra` is merged."""
    family = {"architecture": architecture, "kv_heads": 2} | FAMILIES[architecture]
    extra = family.get("extra", {}) | row.get("extra", {})
    return family | row | {"extra": extra}


LINEAR = {"type": "linear", "factor": 8.0, "attn_factor": 1.3}
LONGROPE = {"type": "longrope", "factor": 2.0, "original_context_length": 256, "attn_factor": 1.2}
LOCAL = [True, False, False, True, True, False, True]
# Keys that mean something elsewhere, for families that do not read them.
UNREAD = {
    "attention.scale": 0.4,
    "attention.temperature_scale": 0.5,
    "attn_logit_softcapping": 1.5,
    "final_logit_softcapping": 1.2,
    "logit_scale": 4.0,
    "residual_scale": 0.5,
    "embedding_scale": 3.0,
    "rope.scaling.finetuned": False,
    "rope.freq_base_swa": 50.0,
    "rope.scaling.original_context_length": 4,
}
UNREAD_ROUTING = {"expert_weights_scale": 2.5, "expert_weights_norm": False, "expert_gating_func": 2}

NO_GROUPS = ("expert_group_count", "expert_group_used_count", "expert_gating_func")
# YaRN as DeepSeek has it: a tenth of its second scale is stored, and the betas are not read.
DEEPSEEK_YARN = YARN | {"yarn_log_multiplier": 0.0707, "yarn_beta_fast": 2.0, "yarn_beta_slow": 0.5}
TEMPERATURE = {"attention.temperature_scale": 0.5, "attention.temperature_length": 4}
# With 26 or 27 blocks queries have no latent. Embeddings are large beside the branches, lest rounding grow with depth.
LITE = {"layers": 27, "d": 32, "heads": 2, "ff": 32, "expert_ff": 32, "shared_count": 1, "experts": 6} | {
    "experts_used": 2,
    "selection_bias": 0.0,
    "omit": NO_GROUPS,
    "embed_std": 3.0,
    "down_gain": 0.5,
}

EXAONE4_32B = {"layers": 64, "d": 32, "ff": 32, "heads": 2, "kv_heads": 1, "post_gain": 0.1}

# Matrices that may have a constant factor: those of attention, and of the feed-forward.
SCALED = (
    ("attn_q", "attn_k", "attn_v", "attn_qkv", "attn_output", "attn_gate", "ssm_in", "ssm_out"),
    tuple(f"ffn_{name}{kind}" for name in ("gate", "up", "down") for kind in ("", "_exps", "_shexp")),
)
FAMILY_CASES: dict[str, dict[str, Any]] = {
    "qwen2": of("qwen2"),
    "qwen2_yarn": of("qwen2", **YARN_ROW, tied=True),
    "qwen2_fused": of("qwen2", fused_qkv=True, fused_bias=True, rope_base=1e6),
    "qwen2_fused_split": of("qwen2", fused_qkv=True, tied=True),
    "qwen3": of("qwen3", rope_base=1e6),
    # Nobody reads these four here: the magnitude stays 1 + 0.1 ln 4, the ramp where it is.
    "qwen3_yarn": of(
        "qwen3",
        **YARN_ROW,
        extra={
            "rope.scaling.yarn_attn_factor": 0.8782,
            "rope.scaling.yarn_beta_fast": 2.0,
            "rope.scaling.yarn_beta_slow": 0.5,
            "rope.scaling.yarn_log_multiplier": 1.0,
        },
    ),
    "qwen3_tied_fused": of("qwen3", tied=True, fused_qkv=True),
    "qwen3_q8_0": of("qwen3", type="Q8_0"),
    "qwen3_nvfp4": of("qwen3", types={"blk.": "NVFP4"}, ff=128, scales=SCALED[0] + SCALED[1]),
    "gemma": of("gemma"),
    "gemma_fused": of("gemma", fused_qkv=True, kv_heads=1),
    "gemma2": of("gemma2"),
    "gemma2_default_caps": of(
        "gemma2",
        omit=("attn_logit_softcapping", "final_logit_softcapping"),
        score_gain=8.0,
        embed_std=6.0,
        layers=2,
    ),
    "gemma2_local_base": of("gemma2", extra={"rope.freq_base_swa": 100.0}),
    "gemma2_none": of("gemma2", scaling={"type": "none", "factor": 4.0}),
    "gemma2_period": of("gemma2", extra={"attention.sliding_window_pattern": 3}),
    "gemma2_27b": of("gemma2", layers=46, d=32, ff=32, embed_std=0.177, post_gain=0.1),
    "gemma3": of("gemma3"),
    "gemma3_local_base": of("gemma3", extra={"rope.freq_base_swa": 50.0}, rope_base=1e6),
    "gemma3_linear": of("gemma3", scaling={"type": "linear", "factor": 8.0}),
    "gemma3_final_cap": of("gemma3", extra={"final_logit_softcapping": 1.2}),
    "gemma3_pattern": of("gemma3", layers=4, extra={"attention.sliding_window_pattern": 2}),
    "gemma3_no_window": of("gemma3", layers=2, window=None),
    "gemma3_27b": of("gemma3", layers=62, d=32, ff=32, embed_std=0.177, post_gain=0.1),
    "gemma3_q8_0": of("gemma3", type="Q8_0"),
    "phi3": of("phi3"),
    "phi3_short": of(
        "phi3", long_short=True, scaling={"original_context_length": 256, "attn_factor": 1.19}, context=1024
    ),
    "phi3_long": of("phi3", long_short=True, scaling={"original_context_length": 32, "attn_factor": 1.19}),
    "phi3_partial": of(
        "phi3", long_short=True, n_rot=12, tied=True, scaling={"original_context_length": 256, "attn_factor": 1.2}
    ),
    "phi3_window_ignored": of("phi3", window=3),
    "phi3_q4_0": of("phi3", type="Q4_0"),
    "olmo2": of("olmo2", rope_base=5e5),
    "olmo3": of(
        "olmo2",
        **YARN_ROW,
        layers=5,
        window=4,
        extra={"attention.sliding_window_pattern": [True, False, True, True, False]},
    ),
    "olmo3_default_period": of("olmo2", **YARN_ROW, layers=4, window=4),
    "mistral3": of("mistral3", head_dim=32),
    "mistral3_yarn": of(
        "mistral3",
        rope_base=100.0,
        scaling=YARN | {"yarn_log_multiplier": 1.0, "yarn_beta_fast": 2.0, "yarn_beta_slow": 0.5},
        extra={"attention.temperature_scale": 0.5},
    ),
    "mistral3_temperature": of(
        "mistral3", scaling={"original_context_length": 4}, extra={"attention.temperature_scale": 0.5}
    ),
    "granite": of("granite"),
    "granite_nope": of("granite", extra={"rope.scaling.finetuned": False}),
    "granite_default_scale": of(
        "granite", omit=("attention.scale", "embedding_scale", "residual_scale"), embed_std=1.0
    ),
    "granite_biases": of(
        "granite", tied=False, biases=(*QKV, "attn_output", "ffn_gate", "ffn_up", "ffn_down"), rope_factors=True
    ),
    "smollm3": of("smollm3"),
    "smollm3_yarn": of("smollm3", **YARN_ROW, layers=8, tied=False),
    "exaone4": of("exaone4", rope_factors=True, rope_base=500.0),
    "exaone4_fused": of("exaone4", fused_qkv=True, tied=True),
    # With 64 blocks it has windows, and rotates in them only.
    "exaone4_32b": of("exaone4", **EXAONE4_32B, window=4, rope_factors=True, rope_base=500.0),
    "exaone4_32b_default_window": of("exaone4", **EXAONE4_32B),
    "exaone4_33b": of("exaone4", **EXAONE4_32B | {"layers": 65, "predictors": 1}, window=4, rope_base=500.0),
    "exaone4_32b_period": of(
        "exaone4",
        **EXAONE4_32B,
        window=4,
        scaling=LINEAR,
        extra={"attention.sliding_window_pattern": 3, "rope.freq_base_swa": 50.0},
    ),
    "seed_oss": of("seed_oss", rope_base=1e6),
    "seed_oss_fused": of("seed_oss", fused_qkv=True, fused_bias=True, tied=True),
    "seed_oss_yarn": of("seed_oss", **YARN_ROW, tied=True),
    "hunyuan": of("hunyuan-dense"),
    "hunyuan_fused": of("hunyuan-dense", fused_qkv=True, biases=QKV, tied=True, rope_base=500.0),
    "hunyuan_yarn": of("hunyuan-dense", **YARN_ROW),
    "internlm2": of("internlm2", rope_base=1e6),
    "internlm2_fused": of("internlm2", **YARN_ROW, fused_qkv=True),
    "ernie4_5": of("ernie4_5", rope_base=5e5),
    "ernie4_5_biases": of("ernie4_5", biases=QKV, tied=False),
    "exaone": of("exaone", rope_factors=True, rope_base=500.0),
    "exaone_biases": of("exaone", biases=QKV, tied=True, scaling=LINEAR),
    "minicpm": of("minicpm"),
    "minicpm_default_scales": of("minicpm", omit=("embedding_scale", "residual_scale", "logit_scale"), tied=False),
    # The default scale of branches depends on the number of blocks, without predictors of later tokens.
    "minicpm_predictor": of("minicpm", omit=("residual_scale",), extra={"block_count": 3, "nextn_predict_layers": 1}),
    "minicpm_no_scales": of("minicpm", extra={"embedding_scale": 0.0, "residual_scale": 0.0}, embed_std=1.0),
    "minicpm_longrope": of("minicpm", long_short=True, scaling=LONGROPE),
    "minicpm_unread": of(
        "minicpm", window=3, extra=UNREAD | {"embedding_scale": 6.0, "residual_scale": 0.5, "logit_scale": 0.5}
    ),
    "arcee": of("arcee", rope_factors=True, rope_base=500.0),
    "arcee_yarn": of("arcee", **YARN_ROW, tied=True),
    "arcee_fused": of("arcee", fused_qkv=True, biases=QKV),
    "apertus": of("apertus", rope_factors=True, rope_base=500.0),
    "apertus_layers": of(
        "apertus",
        layers=3,
        bare={
            "xielu.alpha_n": [-0.7, 1.6, 25.0],
            "xielu.alpha_p": [0.4, -1.3, 0.9],
            "xielu.beta": [0.5, 0.25, 0.75],
            "xielu.eps": [-1e-6, -1e-7, -1e-6],
        },
        down_gain=0.3,
    ),
    "apertus_yarn": of("apertus", **YARN_ROW, fused_qkv=True, head_dim=32),
    "glm4": of("glm4"),
    "glm4_no_bias": of("glm4", biases=(), tied=True),
    "glm4_predictor": of("glm4", layers=3, predictors=1),
    "cohere2": of("cohere2"),
    "cohere2_base": of("cohere2", rope_base=100.0),
    "cohere2_period": of("cohere2", extra={"attention.sliding_window_pattern": 2}),
    "cohere2_partial": of("cohere2", n_rot=8),
    "gpt2": of("gpt2"),
    "gpt2_untied": of("gpt2", tied=False),
    "gpt2_f16": of("gpt2", type="F16"),
    "phi2": of("phi2"),
    "phi2_fused": of("phi2", fused_qkv=True, fused_bias=True),
    "olmo": of("olmo"),
    "olmo_clamped": of("olmo", extra={"attention.clamp_kqv": 1.0}, layers=3, tied=False),
    "olmo_clamped_fused": of("olmo", extra={"attention.clamp_kqv": 0.7}, fused_qkv=True, kv_heads=4, rope_base=100.0),
    "olmo_linear": of("olmo", scaling={"type": "linear", "factor": 4.0}, type="Q8_0", heads=2, head_dim=32),
    "command_r": of("command-r"),
    "command_r_biases": of("command-r", biases=QKV, layers=3, rope_base=8e6, kv_heads=4),
    "command_r_partial": of("command-r", n_rot=8, rope_base=100.0, type="Q8_0", heads=2, head_dim=32),
    # llama.cpp looks for norms of heads from 64 blocks on.
    "command_r_plus": of("command-r", layers=64, d=32, ff=32, qk_norm="heads", down_gain=0.5),
    "nemotron": of("nemotron"),
    "nemotron_biases": of("nemotron", biases=(*QKV, "attn_output", "ffn_up", "ffn_down"), layers=3),
    "nemotron_whole_heads": of("nemotron", head_dim=32, heads=2, kv_heads=1, n_rot=32, rope_base=100.0, type="Q8_0"),
    "stablelm": of("stablelm"),
    "stablelm_3b": of("stablelm", biases=(), n_rot=8, rope_base=100.0),
    "stablelm_12b": of("stablelm", biases=(), norms=("attn_norm",), qk_norm="heads", kv_heads=2, layers=3),
    "stablelm_12b_q8_0": of(
        "stablelm", biases=(), norms=("attn_norm",), qk_norm="heads", head_dim=32, heads=2, kv_heads=1, type="Q8_0"
    ),
    "gptneox": of("gptneox", layers=3),
    "gptneox_sequential": of("gptneox", extra={"use_parallel_residual": False}, rope_base=100.0),
    "gptneox_whole_heads": of("gptneox", n_rot=None, head_dim=32, heads=2, kv_heads=2),
    "gptneox_linear": of("gptneox", scaling={"type": "linear", "factor": 4.0}, n_rot=8),
    "gptneox_f16": of("gptneox", type="F16"),
    "falcon_7b": of("falcon"),
    "falcon_40b": of("falcon", norms=("attn_norm", "attn_norm_2"), kv_heads=2, tied=False),
    "starcoder2": of("starcoder2"),
    "starcoder2_untied": of("starcoder2", tied=False, window=3, rope_base=1e6),
    "mixtral": of("llama", **EXPERTS),
    "mixtral_top3": of("llama", **EXPERTS | {"experts_used": 3}, rope_factors=True),
    "mixtral_one_expert": of("llama", **EXPERTS | {"experts_used": 1}),
    "mixtral_q4_k": of("llama", **EXPERTS | {"expert_ff": 256}, d=256, ff=256, layers=1, type="Q4_K"),
    "mistral3_experts": of("mistral3", **EXPERTS),
    "qwen3moe": of("qwen3moe"),
    "qwen3vl": of("qwen3vl", rope_base=1e6),
    "qwen3vlmoe": of("qwen3vlmoe"),
    # Interleaved, the real files' too leave some pairs to the fourth axis: here 13 and 14, of low bases seen to stand.
    "qwen3vl_still": of("qwen3vl", rope_base=30.0, extra={"rope.dimension_sections": [8, 4, 4, 0]}),
    "qwen3moe_yarn": of("qwen3moe", **YARN_ROW, tied=True, experts=5, experts_used=3),
    "qwen3moe_q8_0": of("qwen3moe", type="Q8_0", expert_ff=64),
    "qwen3moe_nvfp4": of("qwen3moe", types={"blk.": "NVFP4"}, expert_ff=64, scales=SCALED[0] + SCALED[1]),
    "cohere2_scales": of("cohere2", scales=SCALED[0] + SCALED[1], fused_qkv=True),
    "glm4moe_scales": of("glm4moe", scales=SCALED[0]),
    "gpt_oss": of("gpt-oss"),
    "gpt_oss_mxfp4": of("gpt-oss", types={"_exps.weight": "MXFP4"}),
    "gpt_oss_none": of("gpt-oss", scaling={"type": "none", "factor": 4.0}),
    "gpt_oss_period": of("gpt-oss", extra={"attention.sliding_window_pattern": 3}),
    "qwen2moe": of("qwen2moe"),
    # The first files of Qwen 1.5 do not say how wide their experts are.
    "qwen2moe_default_widths": of(
        "qwen2moe", shared_ff=96, omit=("expert_feed_forward_length", "expert_shared_feed_forward_length")
    ),
    "olmoe": of("olmoe"),
    "granitemoe": of("granitemoe"),
    "granitemoe_shared": of("granitemoe", shared_ff=80),
    "openelm": of("openelm"),
    "openelm_linear": of("openelm", scaling=LINEAR, rope_base=100.0, kv_heads=4),
    "openelm_q8_0": of("openelm", type="Q8_0", sizes={"narrow": {"heads": 2, "kv_heads": 2}}),
    "deci": of("deci", rope_factors=True, rope_base=500.0),
    # As the 51B: a projection in place of attention, first and last.
    "deci_linear": of("deci", mixers=("linear", "attention", "none"), head_dim=32, fused_qkv=True, tied=True),
    # As the 253B: layers that do nothing, although two of them have attention. (llama.cpp aborts if the last does.)
    "deci_idle": of("deci", mixers=("attention", "none", "attention"), layers=6, ffs=(0, 96, 64, 0, 0, 32)),
    "deci_biases": of(
        "deci",
        mixers=("attention", "linear"),
        layers=2,
        ffs=(96, 96),
        biases=("ffn_gate", "ffn_up", "ffn_down"),
        scaling=LINEAR,
    ),
    "deci_q8_0": of("deci", type="Q8_0", heads=2, kv_heads=2, sizes={"narrow": {"kv_heads": 1}}),
    "bitnet": of("bitnet"),
    "bitnet_scales": of("bitnet", scales=SCALED[0] + SCALED[1], layers=3),
    # As its converter states it, which multiplies by nothing.
    "bitnet_linear": of("bitnet", scaling={"type": "linear", "factor": 1.0}, rope_base=5e5, eps=0.05, heads=2),
    "bitnet_ternary": of("bitnet", d=256, ff=256, layers=1, heads=2, types={"blk.": "TQ2_0"}),
    "mellum": of("mellum"),
    "mellum_yarn": of("mellum", **YARN_ROW, fused_qkv=True, layers=4),
    "mellum_listed": of(
        "mellum", layers=3, extra={"attention.sliding_window_pattern": [False, True, False]}, rope_base=1e6
    ),
    "mellum_no_window": of("mellum", layers=2, window=None, **YARN_ROW),
    "mellum_unread": of("mellum", layers=4, scaling=LINEAR, extra=UNREAD | UNREAD_ROUTING),
    "mellum_nvfp4": of(
        "mellum", layers=4, types={"blk.": "NVFP4"}, expert_ff=64, scales=SCALED[0] + SCALED[1], experts_used=3
    ),
    "maple": of("maple"),
    "maple_bases": of("maple", n_rot=None, fused_qkv=True, rope_base=100.0, extra={"rope.freq_base_swa": 50.0}),
    # Each layer's own limit, or none; rotation is stretched in windowed layers, too.
    "maple_clamps": of("maple", **YARN_ROW, extra={"swiglu_clamp_exp": [0.5, 0.0, 1.5, 0.7]}),
    "maple_unread": of(
        "maple",
        extra={k: v for k, v in UNREAD.items() if k != "rope.freq_base_swa"}
        | UNREAD_ROUTING
        | {"swiglu_clamp_shexp": [0.1] * 4},
    ),
    "maple_q8_0": of("maple", type="Q8_0", heads=2, expert_ff=64),
    "granite_swa": of("granite_swa"),
    "granite_swa_listed": of(
        "granite_swa",
        layers=3,
        extra={
            "attention.sliding_window_pattern": [True, False, True],
            "attention.rope_pattern": [True, False, False],
        },
        rope_factors=True,
        rope_base=500.0,
        tied=False,
        fused_qkv=True,
    ),
    "granite_swa_biases": of(
        "granite_swa",
        biases=(*QKV, "attn_output", "ffn_gate", "ffn_up", "ffn_down"),
        omit=("attention.scale", "embedding_scale", "residual_scale"),
        embed_std=1.0,
    ),
    "granite_swa_longrope": of("granite_swa", long_short=True, scaling=LONGROPE),
    "granite_swa_experts": of("granite_swa", **EXPERTS, fused_experts=True, shared_ff=80, shared_fused=True),
    "granite_swa_experts_apart": of(
        "granite_swa",
        **EXPERTS,
        layers=3,
        extra=UNREAD_ROUTING | {"attention.sliding_window_pattern": [False, False, True]},
    ),
    "hy_v3": of("hy_v3"),
    # Experts fused; a last block for the token after the next.
    "hy_v3_predictor": of(
        "hy_v3", layers=4, predictors=1, fused_experts=True, fused_qkv=True, tied=True, rope_base=1e6
    ),
    "hy_v3_softmax": of(
        "hy_v3",
        dense_lead=2,
        selection_bias=0.0,
        extra={"expert_gating_func": 1, "expert_weights_scale": 0.0},
        omit=("expert_weights_norm", "leading_dense_block_count"),
        **YARN_ROW,
    ),
    "hy_v3_default_router": of("hy_v3", omit=("expert_gating_func", "expert_shared_feed_forward_length"), shared_ff=48),
    "hy_v3_nvfp4": of(
        "hy_v3",
        types={"blk.": "NVFP4"},
        ff=128,
        expert_ff=64,
        shared_ff=64,
        scales=SCALED[0] + SCALED[1],
    ),
    "cohere2moe": of("cohere2moe"),
    "cohere2moe_rms": of(
        "cohere2moe", norm="rms", dense_lead=2, fused_experts=True, shared_count=0, tied=True, layers=5
    ),
    "cohere2moe_listed": of(
        "cohere2moe",
        layers=4,
        dense_lead=2,
        fused_qkv=True,
        rope_base=100.0,
        extra={
            "attention.sliding_window_pattern": [True, False, False, True],
            "expert_shared_feed_forward_length": 96,
            "expert_weights_scale": 1.5,
        },
        scaling={"type": "none", "factor": 4.0},
    ),
    "cohere2moe_softmax": of(
        "cohere2moe",
        layers=3,
        dense_lead=0,
        shared_count=1,
        extra={"expert_gating_func": 1, "rope.freq_base_swa": 50.0, "attention.sliding_window_pattern": 2},
        omit=("expert_weights_norm",),
        zeros=("leading_dense_block_count",),
    ),
    "cohere2moe_predictor": of("cohere2moe", layers=4, predictors=1, norms=("attn_norm",)),
    "cohere2moe_nvfp4": of(
        "cohere2moe",
        layers=3,
        types={"blk.": "NVFP4"},
        ff=128,
        expert_ff=64,
        scales=SCALED[0] + SCALED[1],
    ),
    "mimo2": of("mimo2"),
    "mimo2_fused": of(
        "mimo2",
        fused_qkv=True,
        layers=3,
        dense_lead=0,
        selection_bias=0.0,
        extra={"attention.sliding_window_pattern": [0, 1, 1], "rope.freq_base_swa": 50.0},
        omit=("attention.value_scale", *(f"{key}_swa" for key in SIZES_OF_HEADS)),
    ),
    "mimo2_predictor": of(
        "mimo2",
        layers=5,
        predictors=1,
        fused_qkv=True,
        scaling=LINEAR,
        extra=UNREAD_ROUTING | {"attention.sliding_window_pattern": [0, 1, 1, 0, 1]},
    ),
    "mimo2_yarn": of("mimo2", **YARN_ROW, sinks=True),
    "mimo2_mxfp4": of("mimo2", types={"_exps.weight": "MXFP4"}, expert_ff=64),
    "smallthinker": of("smallthinker"),
    "smallthinker_softmax": of(
        "smallthinker",
        layers=6,
        extra={"expert_gating_func": 1, "rope.freq_base_swa": 50.0, "attention.sliding_window_pattern": 2},
        tied=True,
        fused_qkv=True,
    ),
    "smallthinker_no_window": of("smallthinker", window=None, layers=3, **YARN_ROW),
    # With four layers, all rotate.
    "smallthinker_four": of("smallthinker", layers=4, scaling=LINEAR),
    "smallthinker_unread": of(
        "smallthinker",
        layers=5,
        extra={k: v for k, v in (UNREAD | UNREAD_ROUTING).items() if k != "rope.freq_base_swa"},
    ),
    "dbrx": of("dbrx"),
    "dbrx_linear": of("dbrx", experts_used=3, layers=3, scaling={"type": "linear", "factor": 4.0}, rope_base=100.0),
    "dbrx_unread": of("dbrx", extra=UNREAD | UNREAD_ROUTING),
    "dbrx_q8_0": of("dbrx", type="Q8_0", heads=2),
    "arctic": of("arctic"),
    "arctic_linear": of("arctic", layers=3, experts_used=3, tied=True, fused_qkv=True, scaling=LINEAR),
    "arctic_unread": of("arctic", extra=UNREAD | UNREAD_ROUTING),
    "arctic_q8_0": of("arctic", type="Q8_0", heads=2),
    "grok": of("grok"),
    # As Grok 1's first files: constants of llama.cpp, no dense network, another name of the last norm.
    "grok_defaults": of(
        "grok",
        norms=("attn_norm", "attn_output_norm", "ffn_norm", "layer_output_norm"),
        dense_beside=False,
        layers=3,
        tied=True,
        score_gain=3.0,
        embed_std=0.012,
        omit=("embedding_scale", "logit_scale", "attention.output_scale", "expert_feed_forward_length"),
        expert_ff=96,
    ),
    # Caps act; those of the router and temperatures are not read by llama.cpp, nor is YaRN's factor on magnitudes.
    "grok_caps": of(
        "grok",
        fused_qkv=True,
        rope_base=100.0,
        scaling=YARN | {"yarn_beta_slow": 0.5, "yarn_attn_factor": 1.3, "yarn_ext_factor": 1.0},
        extra={
            "attn_logit_softcapping": 1.5,
            "final_logit_softcapping": 1.2,
            "router_logit_softcapping": 0.5,
            "attention.temperature_length": 4,
        },
    ),
    # Only beside a large epsilon does it matter how large the sum is that the last norm reads.
    "grok_betas": of(
        "grok", eps=0.5, rope_base=100.0, scaling=YARN | {"yarn_beta_fast": 2.0, "yarn_log_multiplier": 1.0}
    ),
    "glm4moe": of("glm4moe"),
    # As GLM 4.5: norms of heads, two dense blocks, no scale, and a last block for the token after the next.
    "glm4moe_355b": of(
        "glm4moe", layers=5, dense_lead=2, predictors=1, qk_norm="head", shared_count=2, omit=("expert_weights_scale",)
    ),
    "glm4moe_softmax": of("glm4moe", extra={"expert_gating_func": 1}, selection_bias=0.05),
    "glm4moe_not_normed": of("glm4moe", omit=("expert_weights_norm",), extra={"expert_weights_scale": 0.0}),
    "glm4moe_no_dense": of("glm4moe", dense_lead=0, layers=2, biases=(), tied=True, **YARN_ROW),
    "glm4moe_groups": of(
        "glm4moe",
        experts=12,
        experts_used=3,
        extra={"expert_group_count": 4, "expert_group_used_count": 2, "expert_gating_func": 2},
    ),
    # At some tokens all sigmoids are so small that their sum is not divided by.
    "glm4moe_faint": of("glm4moe", experts=2, experts_used=1, router_gain=20.0),
    "glm4moe_q8_0": of("glm4moe", type="Q8_0", heads=2, head_dim=32, n_rot=16, expert_ff=64),
    "deepseek": of("deepseek"),
    "deepseek_scaled": of("deepseek", dense_lead=2, extra={"expert_weights_scale": 2.5}, biases=QKV, tied=True),
    "dots1": of("dots1"),
    "dots1_softmax": of("dots1", selection_bias=0.0, extra={"expert_gating_func": 1}, omit=("expert_weights_norm",)),
    "dots1_fused": of("dots1", fused_qkv=True, biases=QKV, **YARN_ROW),
    "ernie4_5_moe": of("ernie4_5-moe"),
    "ernie4_5_moe_bare": of("ernie4_5-moe", selection_bias=0.0, shared_ff=0, dense_lead=0, layers=2, tied=False),
    "hunyuan_moe": of("hunyuan-moe"),
    "hunyuan_moe_default_width": of("hunyuan-moe", omit=("expert_shared_feed_forward_length",), shared_ff=96),
    "bailingmoe": of("bailingmoe"),
    "bailingmoe_not_normed": of("bailingmoe", extra={"expert_weights_norm": False, "expert_weights_scale": 2.5}),
    "bailingmoe2": of("bailingmoe2"),
    "bailingmoe2_groups": of(
        "bailingmoe2",
        n_rot=None,
        layers=4,
        predictors=1,
        shared_ff=40,
        shared_count=2,
        extra={"expert_group_count": 4, "expert_group_used_count": 2},
    ),
    "exaone_moe": of("exaone-moe", rope_factors=True, rope_base=500.0),
    "exaone_moe_base": of("exaone-moe", extra={"rope.freq_base_swa": 50.0}, selection_bias=0.0, type="Q8_0"),
    "exaone_moe_period": of(
        "exaone-moe", layers=6, predictors=1, **YARN_ROW, extra={"attention.sliding_window_pattern": 3}
    ),
    "exaone_moe_array": of(
        "exaone-moe",
        layers=7,
        predictors=1,
        scaling=LINEAR,
        omit=("expert_shared_feed_forward_length",),
        extra={"attention.sliding_window_pattern": LOCAL[:-1], "expert_gating_func": 1},  # none for the predictor
    ),
    "grovemoe": of("grovemoe"),
    "grovemoe_yarn": of("grovemoe", **YARN_ROW, fused_qkv=True, biases=QKV, tied=True, layers=3),
    "grovemoe_default_width": of(
        "grovemoe", chunk_ff=32, omit=("expert_chunk_feed_forward_length",), type="Q8_0", expert_ff=64, rope_base=1e6
    ),
    "grovemoe_threes": of("grovemoe", chunk=3, experts=9, extra={"expert_group_scale": 1.5}),
    "grovemoe_unread": of("grovemoe", window=3, extra=UNREAD | UNREAD_ROUTING | {"leading_dense_block_count": 1}),
    "minimax_m2": of("minimax-m2"),
    "minimax_m2_fused": of("minimax-m2", fused_qkv=True, biases=QKV, extra={"expert_gating_func": 1}),
    "phimoe": of("phimoe"),
    "phimoe_long": of("phimoe", long_short=True, scaling={"original_context_length": 32, "attn_factor": 1.24}),
    "phimoe_fused": of(
        "phimoe",
        fused_qkv=True,
        fused_bias=True,
        long_short=True,
        scaling={"original_context_length": 256, "attn_factor": 1.24},
        context=1024,
    ),
    "xverse": of("xverse", rope_base=500.0),
    "xverse_unread": of("xverse", **YARN_ROW, window=3, extra=UNREAD, fused_qkv=True),
    "qwen": of("qwen"),
    "qwen_partial": of("qwen", n_rot=8, rope_base=1e6, window=3, extra=UNREAD),
    "qwen2vl": of("qwen2vl", rope_base=1e6, eps=0.05),
    "qwen2vl_yarn": of("qwen2vl", **YARN_ROW, tied=True, fused_qkv=True, fused_bias=True),
    # The last section is the fourth axis', which text has not: with a base this low its pairs are seen to stand.
    "qwen2vl_still": of("qwen2vl", rope_base=30.0, window=3, extra=UNREAD | {"rope.dimension_sections": [3, 1, 1, 3]}),
    "paddleocr": of("paddleocr", rope_base=5e5),
    "paddleocr_unread": of("paddleocr", biases=(*QKV, "attn_output"), tied=False, window=3, extra=UNREAD),
    # As HunyuanOCR: all four axes have sections, and a factor enlarges the base.
    "hunyuan_vl": of("hunyuan_vl", rope_base=10.0, scaling={"type": "none", "factor": 4.0, "alpha": 3.0}),
    "hunyuan_vl_plain": of("hunyuan_vl", tied=False, window=3, omit=("rope.dimension_sections",), extra=UNREAD),
    "hunyuan_alpha": of("hunyuan-dense", rope_base=10.0, scaling={"alpha": 3.0}),
    "starcoder": of("starcoder"),
    "starcoder_unread": of("starcoder", kv_heads=4, tied=False, window=3, extra=UNREAD),
    "codeshell": of("codeshell", scaling={"type": "linear", "factor": 1.0}),
    # The head's matrix has the embeddings, too.
    "codeshell_head_only": of("codeshell", head_only=True, fused_qkv=True, fused_bias=True, window=3, extra=UNREAD),
    "orion": of("orion"),
    "orion_unread": of("orion", **YARN_ROW, fused_qkv=True, window=3, extra=UNREAD),
    "maincoder": of("maincoder"),
    "maincoder_unread": of("maincoder", **YARN_ROW, tied=True, window=3, extra=UNREAD),
    "chatglm": of("chatglm"),
    "chatglm_unread": of(
        "chatglm", n_rot=None, fused_qkv=False, fused_bias=False, biases=(), tied=True, window=3, extra=UNREAD
    ),
    "pangu": of("pangu-embedded", rope_factors=True, rope_base=500.0),
    "pangu_unread": of("pangu-embedded", **YARN_ROW, tied=True, fused_qkv=True, window=3, extra=UNREAD),
    "plamo": of("plamo", rope_base=500.0),
    "plamo_unread": of("plamo", **YARN_ROW, fused_qkv=True, kv_heads=1, window=3, extra=UNREAD),
    "plamo3": of("plamo3"),
    "plamo3_base": of(
        "plamo3",
        layers=3,
        head_dim=32,
        n_rot=16,
        tied=False,
        scaling=YARN,
        extra={"rope.freq_base_swa": 50.0, "attention.sliding_window_pattern": 2},
    ),
    "plamo3_unread": of("plamo3", layers=2, window=None, extra=UNREAD),
    # Nothing is read about the rotation.
    "cogvlm": of("cogvlm", rope_base=5e5, rope_factors=True),
    "cogvlm_unread": of("cogvlm", scaling=YARN, tied=True, window=3, extra=UNREAD),
    "deepseek2_ocr": of("deepseek2-ocr"),
    "deepseek2_ocr_options": of(
        "deepseek2-ocr",
        fused_qkv=True,
        fused_experts=True,
        tied=True,
        selection_bias=0.3,
        extra={"expert_gating_func": 2, "expert_weights_norm": True, "expert_weights_scale": 2.5},
        window=3,
    ),
    # The rotation is not stretched then, but scores are scaled.
    "deepseek2_ocr_linear": of("deepseek2-ocr", dense_lead=0, layers=2, scaling=LINEAR, extra=UNREAD),
    # With another number of blocks than 7B's or 13B's there is neither a rotation nor a bias.
    "baichuan": of("baichuan"),
    "baichuan_7b": of("baichuan", layers=32, d=32, ff=32, heads=2, kv_heads=2, down_gain=0.5, rope_base=100.0),
    "baichuan_13b": of("baichuan", layers=40, d=48, ff=32, heads=3, kv_heads=3, down_gain=0.5, window=3, extra=UNREAD),
    "mpt": of("mpt"),
    # As StoryWriter, with more heads than a power of two.
    "mpt_clamped": of(
        "mpt",
        d=96,
        heads=6,
        kv_heads=3,
        omit=("attention.key_length", "attention.value_length", "rope.dimension_count"),
        extra={"attention.clamp_kqv": 1.0, "attention.max_alibi_bias": 16.0},
    ),
    "mpt_positions": of(
        "mpt",
        **LAYER_NORM,
        positions=True,
        tied=False,
        fused_bias=True,
        biases=(*QKV, "attn_output", "ffn_up", "ffn_down"),
        window=3,
        extra=UNREAD | {"attention.max_alibi_bias": 0.0},
    ),
    # Activations scaled by AWQ.
    "mpt_scaled": of("mpt", act_scales=True, layers=3),
    "bloom": of("bloom", d=80, heads=5, kv_heads=5),
    "bloom_unread": of("bloom", tied=False, window=3, extra=UNREAD | {"attention.max_alibi_bias": 4.0}),
    "refact": of("refact"),
    "refact_unread": of(
        "refact",
        heads=5,
        head_dim=32,
        fused_qkv=True,
        tied=False,
        window=3,
        extra=UNREAD | {"attention.max_alibi_bias": 4.0},
    ),
    "jais": of("jais"),
    "jais_unread": of(
        "jais", omit=("attention.head_count_kv", "attention.max_alibi_bias"), layers=3, window=3, extra=UNREAD
    ),
    "jais2": of("jais2"),
    "jais2_unread": of("jais2", **YARN_ROW, head_dim=32, tied=True, fused_qkv=True, window=3, extra=UNREAD),
    "phimoe_unread": of("phimoe", window=3, extra=UNREAD | UNREAD_ROUTING | {"leading_dense_block_count": 1}),
    "deepseek2": of("deepseek2"),
    "deepseek2_predictor": of("deepseek2", layers=4, predictors=1, shared_count=1, tied=True),
    # As GLM 4.7 Flash's first files.
    "deepseek2_unsplit": of("deepseek2", sizes=UNSPLIT, kv_heads=4),
    "deepseek2_softmax": of(
        "deepseek2", omit=NO_GROUPS, selection_bias=0.05, extra={"expert_weights_norm": False}, dense_lead=2
    ),
    # As Youtu: no experts, of whose size the file speaks all the same.
    "deepseek2_dense": of(
        "deepseek2",
        experts=0,
        experts_used=0,
        dense_lead=3,
        shared_count=0,
        tied=True,
        omit=("expert_group_count", "expert_group_used_count"),
        extra={"expert_shared_count": 0},
    ),
    "deepseek2_yarn": of("deepseek2", rope_base=100.0, scaling=DEEPSEEK_YARN),
    # Without a multiplier the scores have YaRN's magnitude twice, and stretched otherwise, have it nevertheless.
    "deepseek2_yarn_bare": of("deepseek2", rope_base=100.0, scaling=YARN | {"attn_factor": 1.1}),
    "deepseek2_linear": of("deepseek2", scaling=LINEAR | {"yarn_log_multiplier": 0.05}),
    "deepseek2_none": of("deepseek2", scaling={"type": "none", "factor": 4.0, "attn_factor": 1.3}),
    "deepseek2_temperature": of("deepseek2", extra=TEMPERATURE),
    "deepseek2_q8_0": of(
        "deepseek2",
        type="Q8_0",
        sizes={"nope": 32, "latent": 64, "value": 96, "query": 128},
        n_rot=16,
        expert_ff=64,
        head_dim=48,
    ),
    "deepseek2_lite": of("deepseek2", **LITE, sizes={**UNSPLIT, "query": 0}, kv_heads=2),
    "deepseek2_lite_split": of(
        "deepseek2", **LITE | {"layers": 26}, sizes={**SIZES, "query": 0}, scaling=DEEPSEEK_YARN, rope_base=100.0
    ),
    "mistral4": of("mistral4"),
    "mistral4_temperature": of("mistral4", extra=TEMPERATURE, tied=True),
    "mistral4_yarn": of(
        "mistral4", rope_base=100.0, scaling=DEEPSEEK_YARN | {"yarn_log_multiplier": 0.1}, extra=TEMPERATURE
    ),
    "mistral4_yarn_half": of("mistral4", rope_base=100.0, scaling=DEEPSEEK_YARN | {"yarn_log_multiplier": 0.05}),
    "mistral4_sigmoid": of(
        "mistral4", selection_bias=0.3, extra={"expert_gating_func": 2, "expert_weights_scale": 2.5}
    ),
    # The converter leaves it out: values are as wide as the model's width says.
    "minicpm3": of("minicpm3", omit=("attention.value_length",), sizes=UNSPLIT | {"value": 16}),
    "minicpm3_value": of("minicpm3", tied=False, layers=3),
    "minicpm3_short": of("minicpm3", long_short=True, scaling=LONGROPE),
    "minicpm3_long": of("minicpm3", long_short=True, scaling=LONGROPE | {"original_context_length": 64}),
    "minicpm3_yarn": of("minicpm3", **YARN_ROW),
    "plm": of("plm"),
    "plm_yarn": of("plm", **YARN_ROW),
    "plm_q8_0": of("plm", type="Q8_0", sizes={"nope": 32, "latent": 64, "value": 96, "unsplit": True}, n_rot=16),
    "deepseek32": of("deepseek32"),
    "deepseek32_yarn": of(
        "deepseek32",
        predictors=0,
        rope_base=100.0,
        scaling=DEEPSEEK_YARN | {"yarn_log_multiplier": 0.05},
        extra={"expert_gating_func": 1},
        selection_bias=0.05,
    ),
    "glm_dsa": of("glm-dsa"),
    "glm_dsa_yarn": of(
        "glm-dsa",
        predictors=0,
        omit=("expert_gating_func",),
        sizes=SIZES | {"indexer": 8},
        rope_base=100.0,
        scaling=DEEPSEEK_YARN,
    ),
    "dots3note": of("dots3note"),
    "dots3note_yarn": of(
        "dots3note",
        scaling=YARN,
        rope_base=100.0,
        layers=4,
        predictors=0,
        tied=True,
        shared_count=2,
        selection_bias=0.05,
        extra={"expert_gating_func": 1, "expert_weights_norm": False, "expert_weights_scale": 2.5},
    ),
    "hy_v4": of("hy_v4"),
    "hy_v4_indexer": of(
        "hy_v4",
        sizes=SIZES | {"head_gate": "elements", "indexer": 8, "indexer_types": [True, False, True]},
        streams=4,
        selection_bias=0.0,
        dense_lead=0,
        shared_count=2,
        extra={"swiglu_clamp_exp": [0.9, 0.0, 0.7], "expert_weights_norm": True, "expert_weights_scale": 2.5}
        | {"swiglu_clamp_shexp": [0.1] * 3}
        | {"expert_gating_func": 1},
    ),
    "deepseek4": of("deepseek4"),
    "deepseek4_yarn": of(
        "deepseek4",
        mixers=("compressed 4", "compressed 0"),
        layers=2,
        heads=6,
        kv_heads=1,
        sizes={"query": 20, "groups": 3, "rank": 7, "indexer": 8},
        n_rot=32,
        token_experts=2,
        window=5,
        stream_rounds=1,
        **YARN_ROW | {"scaling": YARN | {"attn_factor": 1.3}},
        extra={
            "swiglu_clamp_exp": [0.0, 0.7],
            "swiglu_clamp_shexp": [0.6, 0.0],
            "expert_weights_scale": 0.0,
            "expert_weights_norm": False,
        },
    ),
    "deepseek4_predictor": of(
        "deepseek4",
        mixers=("compressed 4", "compressed 4", "compressed 0"),
        predictors=1,
        token_experts=0,
        zeros=("hash_layer_count",),
        shared_count=2,
        scaling=LINEAR,
        extra={"attention.compress_ratios": [4, 4, 0, 0, 7]},
    ),
    "deepseek4_unread": of(
        "deepseek4", mixers=("compressed 4", "compressed 0"), layers=2, extra=UNREAD | {"swiglu_clamp_exp": [0.0] * 2}
    ),
    "minimax_m3": of("minimax-m3"),
    "minimax_m3_fused": of("minimax-m3", fused_qkv=True, dense_lead=0, layers=2, extra={"expert_gating_func": 1}),
    # Groups of experts any mixture may have.
    "qwen3moe_groups": of(
        "qwen3moe", experts=12, experts_used=3, extra={"expert_group_count": 4, "expert_group_used_count": 2}
    ),
    # What the families share, or pointedly do not.
    **{
        f"{architecture}_unread": of(architecture, window=3, extra=UNREAD)
        for architecture in (
            "llama",
            "qwen2",
            "qwen3",
            "gemma",
            "phi3",
            "glm4",
            "smollm3",
            "exaone4",
            "seed_oss",
            "hunyuan-dense",
            "internlm2",
            "ernie4_5",
            "exaone",
            "apertus",
            "arcee",
            "starcoder2",
            "gpt2",
            "phi2",
            "olmo",
            "nemotron",
            "stablelm",
            "gptneox",
        )
    },
    "mistral3_unread": of("mistral3", window=3, extra=UNREAD | {"attention.temperature_scale": 0.0}),
    "deepseek2_unread": of(
        "deepseek2", window=3, extra=UNREAD | {"attention.temperature_scale": 0.0, "attention.temperature_length": 4}
    ),
    "mistral4_unread": of(
        "mistral4", window=3, extra=UNREAD | {"attention.temperature_scale": 0.0, "attention.temperature_length": 4}
    ),
    **{
        f"{name}_unread": of(architecture, window=3, extra=UNREAD | TEMPERATURE)
        for name, architecture in {
            "minicpm3": "minicpm3",
            "plm": "plm",
            "deepseek32": "deepseek32",
            "glm_dsa": "glm-dsa",
            "minimax_m3": "minimax-m3",
        }.items()
    },
    "granite_window_ignored": of("granite", window=3),
    "granitemoe_finetuned_ignored": of("granitemoe", extra={"rope.scaling.finetuned": False}),
    "mixtral_unread": of("llama", **EXPERTS, window=3, extra=UNREAD | UNREAD_ROUTING),
    "qwen3moe_unread": of("qwen3moe", window=3, extra=UNREAD | UNREAD_ROUTING),
    "qwen2moe_unread": of("qwen2moe", window=3, extra=UNREAD | UNREAD_ROUTING | {"expert_weights_norm": True}),
    "olmoe_unread": of("olmoe", window=3, extra=UNREAD | UNREAD_ROUTING | {"expert_weights_norm": True}),
    "deepseek_unread": of("deepseek", extra=UNREAD | {"expert_weights_norm": True, "expert_gating_func": 2}),
    "bailingmoe_unread": of("bailingmoe", extra=UNREAD | {"leading_dense_block_count": 1, "expert_gating_func": 2}),
    "ernie4_5_moe_unread": of("ernie4_5-moe", extra=UNREAD | UNREAD_ROUTING),
    "hunyuan_moe_unread": of("hunyuan-moe", extra=UNREAD | UNREAD_ROUTING | {"leading_dense_block_count": 1}),
    "minimax_m2_unread": of("minimax-m2", extra=UNREAD | UNREAD_ROUTING | {"leading_dense_block_count": 1}),
    "gpt_oss_unread": of("gpt-oss", extra=UNREAD | UNREAD_ROUTING | {"rope.freq_base_swa": 1000.0}),
    "gemma3_unread": of("gemma3", extra=UNREAD | {"final_logit_softcapping": 0.0}),
    "command_r_unread": of("command-r", window=3, extra=UNREAD | {"logit_scale": 0.25}),
    "cohere2_unread": of("cohere2", extra=UNREAD),
    "olmo3_unread": of("olmo2", layers=4, window=4, extra=UNREAD),
    "qwen3moe_default_width": of("qwen3moe", omit=("expert_feed_forward_length",)),
    "qwen2_output_bias": of("qwen2", biases=(*QKV, "output")),
    "qwen2_per_layer_arrays": of("qwen2", per_layer_arrays=True),
    "gemma3_untied": of("gemma3", tied=False),
    "gemma3_partial": of("gemma3", n_rot=8),
    "phi3_unfused": of("phi3", fused_qkv=False, biases=QKV),
    "gpt_oss_fused": of("gpt-oss", fused_qkv=True, fused_bias=True),
    "starcoder2_fused": of("starcoder2", fused_qkv=True),
    "olmo2_fused": of("olmo2", fused_qkv=True, biases=QKV),
    "mixtral_biases": of("llama", **EXPERTS, biases=(*QKV, "attn_output"), fused_qkv=True),
    "mistral3_biases": of("mistral3", biases=(*QKV, "attn_output", "ffn_gate", "ffn_up", "ffn_down")),
    "granite_head_dim": of("granite", head_dim=32),
    **{
        f"{name}_linear": of(architecture, layers=6, window=4, scaling=LINEAR)
        for name, architecture in {
            "gemma2": "gemma2",
            "olmo3": "olmo2",
            "gpt_oss": "gpt-oss",
            "cohere2": "cohere2",
        }.items()
    },
    **{
        f"{name}_array": of(architecture, layers=7, window=4, extra={"attention.sliding_window_pattern": LOCAL})
        for name, architecture in {
            "gemma2": "gemma2",
            "gemma3": "gemma3",
            "gpt_oss": "gpt-oss",
            "cohere2": "cohere2",
        }.items()
    },
    "gemma3_yarn": of("gemma3", scaling=YARN),
    "olmo3_yarn_attn_factor": of("olmo2", layers=4, window=4, rope_base=100.0, scaling=YARN | {"attn_factor": 1.3}),
    "llama_yarn_attn_factor": of("llama", rope_base=100.0, scaling=YARN | {"attn_factor": 1.3}),
    "llama_yarn_default_context": of("llama", rope_base=100.0, context=32, scaling={"type": "yarn", "factor": 4.0}),
    "llama_longrope": of("llama", long_short=True, scaling=LONGROPE),
    "llama_longrope_long": of("llama", long_short=True, scaling=LONGROPE | {"original_context_length": 64}),
    "granite_longrope": of("granite", long_short=True, scaling=LONGROPE),
    # Both kinds of block are first, and last; the first case is stated by the default period of four.
    "qwen35": of("qwen35", layers=4, mixers=(*["delta"] * 3, "gated attention")),
    "qwen35_listed": of("qwen35", **delta_blocks("fdd"), rope_base=1e6),
    "qwen35_period": of(
        "qwen35", layers=4, mixers=("delta", "gated attention"), extra={"full_attention_interval": 2}, tied=True
    ),
    # Three taps, heads of another size, three value heads for each key head.
    "qwen35_sizes": of(
        "qwen35",
        **delta_blocks("df"),
        sizes=DELTA | {"ssm.conv_kernel": 3, "ssm.state_size": 10, "ssm.time_step_rank": 6, "ssm.inner_size": 60},
    ),
    "qwen35_equal_heads": of(
        "qwen35", **delta_blocks("df"), sizes=DELTA | {"ssm.conv_kernel": 2, "ssm.group_count": 4}
    ),
    "qwen35_eps": of("qwen35", **delta_blocks("df"), eps=0.05),
    "qwen35_predictor": of("qwen35", **delta_blocks("dff"), predictors=1, fused_qkv=True),
    "qwen35_yarn": of("qwen35", **delta_blocks("dff"), **YARN_ROW),
    "qwen35_still": of("qwen35", **delta_blocks("df", extra={"rope.dimension_sections": [4, 2, 2, 0]}), rope_base=30.0),
    # The list of blocks counts, not the period.
    "qwen35_unread": of("qwen35", **delta_blocks("df", extra=UNREAD | {"full_attention_interval": 1}), window=3),
    "qwen35_q8_0": of("qwen35", **delta_blocks("df"), type="Q8_0"),
    "qwen35moe": of("qwen35moe", **delta_blocks("dfd")),
    "qwen35moe_fused": of("qwen35moe", **delta_blocks("fd"), fused_experts=True, experts_used=3, tied=True),
    "qwen35moe_default_widths": of(
        "qwen35moe",
        **delta_blocks("df"),
        shared_ff=96,
        omit=("expert_feed_forward_length", "expert_shared_feed_forward_length"),
    ),
    "qwen35moe_predictor": of("qwen35moe", **delta_blocks("fdf"), predictors=1, fused_experts=True),
    "qwen35moe_unread": of("qwen35moe", **delta_blocks("df", extra=UNREAD | UNREAD_ROUTING), window=3),
    "qwen3next": of("qwen3next", layers=4, mixers=(*["grouped delta"] * 3, "gated attention")),
    # Three value heads for each key head, two taps; the first block's q, k, v and z are in one matrix.
    "qwen3next_old": of(
        "qwen3next",
        **delta_blocks("ofg"),
        sizes=DELTA | {"ssm.conv_kernel": 2, "ssm.state_size": 10, "ssm.time_step_rank": 6, "ssm.inner_size": 60},
    ),
    "qwen3next_fused": of(
        "qwen3next", **delta_blocks("fg"), fused_experts=True, fused_qkv=True, tied=True, rope_base=1e6
    ),
    "qwen3next_predictor": of("qwen3next", **delta_blocks("gff"), predictors=1),
    "qwen3next_yarn": of("qwen3next", **delta_blocks("fgf"), **YARN_ROW),
    "qwen3next_unread": of("qwen3next", **delta_blocks("gf", extra=UNREAD | UNREAD_ROUTING), window=3),
    "lfm2": of("lfm2", **convolution_blocks("ccac"), rope_base=1e6),
    "lfm2_window": of("lfm2", **convolution_blocks("aca"), window=4, tied=False),
    "lfm2_taps": of("lfm2", **convolution_blocks("ac"), sizes={"shortconv.l_cache": 4}, fused_qkv=True),
    "lfm2_two_taps": of("lfm2", **convolution_blocks("ca"), sizes={"shortconv.l_cache": 2}, **YARN_ROW),
    "lfm2_unread": of("lfm2", **convolution_blocks("ca", extra=UNREAD), window=4),
    "lfm2_q8_0": of("lfm2", **convolution_blocks("ca"), type="Q8_0"),
    "lfm2moe": of("lfm2moe", **convolution_blocks("cac")),
    "lfm2moe_softmax": of(
        "lfm2moe", **convolution_blocks("ac", extra={"expert_gating_func": 1}), dense_lead=0, selection_bias=0.05
    ),
    "lfm2moe_groups": of(
        "lfm2moe",
        **convolution_blocks("ca", extra={"expert_group_count": 4, "expert_group_used_count": 2}),
        experts=12,
        experts_used=3,
    ),
    # Nor is the window read here.
    "lfm2moe_unread": of(
        "lfm2moe",
        **convolution_blocks("ca", extra=UNREAD | {"expert_weights_scale": 2.5, "expert_weights_norm": False}),
        window=4,
    ),
    "kimi_linear": of("kimi-linear", **kda_blocks("kkl")),
    # Three taps, heads of a size that does not make the model's width; softmax in the router.
    "kimi_linear_sizes": of(
        "kimi-linear",
        **kda_blocks("lk", extra={"expert_gating_func": 1}),
        sizes=KIMI["sizes"] | {"ssm.conv_kernel": 3, "kda.head_dim": 10},
        selection_bias=0.05,
        dense_lead=0,
    ),
    "kimi_linear_fused": of("kimi-linear", **kda_blocks("kl"), fused_qkv=True),
    "kimi_linear_eps": of("kimi-linear", **kda_blocks("kl"), eps=0.05, dense_lead=2),
    "kimi_linear_unread": of(
        "kimi-linear", **kda_blocks("kl", extra=UNREAD | {"expert_weights_norm": False}), window=3
    ),
    "kimi_k3": of("kimi-k3", **kda_blocks("glg")),
    # The stream begins anew before every block; queries come from it, up is as it is, decays have no bound.
    "kimi_k3_sizes": of(
        "kimi-k3",
        **kda_blocks("lgl", extra={"expert_gating_func": 1, "expert_weights_norm": False}),
        sizes={name: size for name, size in (KIMI["sizes"] | K3).items() if name != "kda.gate_lower_bound"}
        | {"query": 0, "attn_res.block_size": 1, "activation.situ_linear_beta": 0.0},
        latent=0,
        latent_norm=False,
        dense_lead=0,
        shared_count=0,
        zeros=("expert_shared_count",),
        selection_bias=0.05,
    ),
    # One stream, and the sum of experts without a norm.
    "kimi_k3_one_stream": of(
        "kimi-k3",
        **kda_blocks("gl"),
        sizes=KIMI["sizes"] | K3 | {"attn_res.block_size": 0},
        depth_scores=False,
        latent_norm=False,
        dense_lead=2,
    ),
    "kimi_k3_unread": of("kimi-k3", **kda_blocks("gl", extra=UNREAD), eps=0.05, window=3),
    "glm5_next": of("glm5-next", **kda_blocks("kkl")),
    # Decays have a bound; the second block of attention selects as the first; limits, the same in all networks.
    "glm5_next_bounded": of(
        "glm5-next",
        **kda_blocks("lkl", extra={"swiglu_clamp_exp": [0.9, 0.0, 0.7], "kda.gate_lower_bound": -2.0}),
        sizes=FAMILIES["glm5-next"]["sizes"] | {"indexer_types": [True, True, False]},
        stream_rounds=1,
    ),
    # Limits of other networks are their own; softmax in the router; a last block that predicts.
    "glm5_next_predictor": of(
        "glm5-next",
        **kda_blocks(
            "kll",
            extra={"swiglu_clamp_exp": [0.9] * 3, "swiglu_clamp_shexp": [0.0, 0.5, 0.0], "expert_gating_func": 1},
        ),
        selection_bias=0.05,
        predictors=1,
        eps=0.05,
        stream_rounds=20,
    ),
    "bailingmoe3": of("bailingmoe3", **kda_blocks("bbl"), tied=True),
    "bailingmoe3_clamped": of(
        "bailingmoe3",
        **kda_blocks("lbb", extra={"swiglu_clamp_exp": [0.0, 0.5, 0.0], "swiglu_clamp_shexp": [0.7, 0.0, 0.6]}),
    ),
    # As the larger one: queries have a latent, too, and experts are in groups.
    "bailingmoe3_predictor": of(
        "bailingmoe3",
        **kda_blocks("lbl", extra={"expert_group_count": 4, "expert_group_used_count": 2}),
        sizes=KIMI["sizes"] | {"query": 24, "head_gate": True, "kda.gate_lower_bound": -1.5},
        predictors=1,
        shared_ff=0,
        shared_count=2,
        experts=12,
        experts_used=3,
    ),
    # With images: pairs are of halves then.
    "bailingmoe3_sections": of("bailingmoe3", **kda_blocks("bl", extra={"rope.dimension_sections": [2, 1, 1, 0]})),
    "bailingmoe3_yarn": of("bailingmoe3", **kda_blocks("bl"), **YARN_ROW),
    "bailingmoe3_unread": of(
        "bailingmoe3",
        **kda_blocks("bl", extra=UNREAD | {"expert_weights_norm": False, "expert_gating_func": 1}),
        selection_bias=0.05,
        window=3,
    ),
}

STATE_SPACE_CASES: dict[str, dict[str, Any]] = {
    "mamba2": of("mamba2"),
    # One group, a head as wide as four of the others, and a convolution of two tokens.
    "mamba2_one_group": of("mamba2", sizes={"groups": 1, "ssm_heads": 2, "kernel": 2}, tied=True, layers=1),
    # Every head has B and C of its own, and the state is narrower than a head.
    "mamba2_groups": of("mamba2", sizes={"groups": 8, "state": 8, "kernel": 3}, eps=0.05),
    "mamba2_q8_0": of("mamba2", type="Q8_0"),
}
STATE_SPACE_CASES |= {
    "mamba": of("mamba", extra={"ssm.dt_b_c_rms": False}),
    # As Falcon Mamba: steps, B and C have norms without weights.
    "mamba_falcon": of("mamba", extra={"ssm.dt_b_c_rms": True}, eps=0.05, tied=True),
    "mamba_sizes": of("mamba", d=48, sizes={"inner": 96, "rank": 3, "state": 7, "kernel": 2}, layers=2),
    "mamba_q8_0": of("mamba", type="Q8_0"),
    "plamo2": of("plamo2"),
    # The first block has a state space, though it states heads; two taps, one head, an odd state.
    "plamo2_sizes": of(
        "plamo2",
        mixers=("plamo2", "attention"),
        sizes={"inner": 40, "ssm_heads": 1, "state": 7, "kernel": 2},
        extra={"attention.head_count": 4},
        layers=2,
        eps=0.05,
        tied=True,
        rope_base=100.0,
    ),
    "plamo2_yarn": of("plamo2", **YARN_ROW, layers=2),
    "plamo2_unread": of("plamo2", window=3, extra=UNREAD, layers=2),
    "plamo2_q8_0": of("plamo2", type="Q8_0", layers=2),
    "jamba": of("jamba"),
    # Every second block has experts.
    "jamba_experts": of("jamba", **EXPERTS, dense_blocks=(0, 2)),
    "jamba_attention_first": of(
        "jamba", mixers=("attention", "mamba"), layers=2, eps=0.05, tied=True, fused_qkv=True, rope_base=100.0
    ),
    "jamba_unread": of("jamba", **EXPERTS, window=3, extra=UNREAD | UNREAD_ROUTING),
    "jamba_q8_0": of("jamba", type="Q8_0", heads=2, kv_heads=1, layers=2),
}
STATE_SPACE_CASES |= {
    "granitehybrid": of("granitehybrid"),
    # As Bamba: rotated, and nothing is scaled. Attention first and last.
    "granitehybrid_roped": of(
        "granitehybrid",
        mixers=("attention", "mamba2"),
        extra={"rope.scaling.finetuned": True},
        omit=("attention.scale", "embedding_scale", "residual_scale", "logit_scale"),
        embed_std=1.0,
        rope_factors=True,
        rope_base=500.0,
        fused_qkv=True,
        tied=False,
    ),
    "granitehybrid_experts": of("granitehybrid", **EXPERTS, omit=("rope.scaling.finetuned",)),
    "granitehybrid_shared": of("granitehybrid", **EXPERTS, shared_ff=80, layers=2),
    "granitehybrid_biases": of(
        "granitehybrid", biases=(*QKV, "attn_output", "ffn_gate", "ffn_up", "ffn_down"), layers=2
    ),
    "granitehybrid_unread": of(
        "granitehybrid", **EXPERTS, layers=2, window=3, extra={"final_logit_softcapping": 1.2} | UNREAD_ROUTING
    ),
    "granitehybrid_q8_0": of("granitehybrid", type="Q8_0", heads=2, kv_heads=1, layers=2),
}
STATE_SPACE_CASES |= {
    "nemotron_h": of("nemotron_h", rope_base=100.0),
    # Attention first, a feed-forward network last; the norms' epsilon is stated in LayerNorm's key only.
    "nemotron_h_attention_first": of(
        "nemotron_h",
        mixers=("attention", "mamba2", "none"),
        layers=3,
        omit=("attention.layer_norm_rms_epsilon",),
        extra={"attention.layer_norm_epsilon": 0.05},
        head_dim=32,
        tied=True,
    ),
    "nemotron_h_biases": of("nemotron_h", biases=(*QKV, "attn_output", "ffn_up", "ffn_down"), fused_qkv=True, layers=4),
    "nemotron_h_unread": of("nemotron_h", window=3, extra=UNREAD),
    "nemotron_h_q8_0": of("nemotron_h", type="Q8_0", heads=2, kv_heads=1),
    "nemotron_h_moe": of("nemotron_h_moe"),
    # The experts read and write a stream of their own, narrower one.
    "nemotron_h_moe_latent": of("nemotron_h_moe", latent=32),
    # As Puzzle: another number of experts in use in every block, and experts of other widths.
    "nemotron_h_moe_uneven": of(
        "nemotron_h_moe", latent=32, layers=4, extra={"expert_used_count": [0, 3, 0, 1]}, expert_ffs=(0, 48, 0, 64)
    ),
    # (llama.cpp aborts on hybrids that have no block with attention.)
    "nemotron_h_moe_not_normed": of(
        "nemotron_h_moe",
        omit=("expert_weights_norm", "expert_weights_scale"),
        layers=3,
        mixers=("none", "attention", "mamba2"),
    ),
    "nemotron_h_moe_groups": of(
        "nemotron_h_moe",
        experts=12,
        experts_used=3,
        layers=3,
        extra={"expert_group_count": 4, "expert_group_used_count": 2},
    ),
    # A last block for the token after the next has both branches.
    "nemotron_h_moe_predictor": of(
        "nemotron_h_moe",
        layers=4,
        mixers=("mamba2", "attention", "none", "attention"),
        predictors=1,
        predictor_norms=("nextn.enorm", "nextn.hnorm", "nextn.shared_head_norm", "post_attention_norm"),
    ),
    "nemotron_h_moe_scales": of("nemotron_h_moe", latent=32, layers=4, scales=SCALED[0] + SCALED[1]),
    "nemotron_h_moe_q8_0": of("nemotron_h_moe", type="Q8_0", latent=32, expert_ff=64, layers=3),
}
STATE_SPACE_CASES |= {
    "falcon_h1": of("falcon-h1"),
    "falcon_h1_normed": of("falcon-h1", sizes={"inner": 96, "ssm_heads": 6}, tied=True, rope_base=100.0),
    "falcon_h1_fused": of(
        "falcon-h1", fused_qkv=True, head_dim=32, biases=(*QKV, "ffn_gate", "ffn_up", "ffn_down"), layers=2
    ),
    "falcon_h1_unread": of("falcon-h1", layers=2, window=3, extra=UNREAD, rope_factors=True),
    "falcon_h1_yarn": of("falcon-h1", **YARN_ROW, layers=2),
    "falcon_h1_q8_0": of("falcon-h1", type="Q8_0", heads=2, kv_heads=1, layers=2),
}
FAMILY_CASES |= STATE_SPACE_CASES

RWKV_CASES: dict[str, dict[str, Any]] = {
    "rwkv6": of("rwkv6"),
    "rwkv6_not_halved": of("rwkv6", extra={"rescale_every_n_layers": 0}, eps=0.05, layers=2),
    "rwkv6_sizes": of("rwkv6", sizes={"head": 32, "extra": 4, "decay": 3}, layers=3),
    # How much of the position before each projection reads is in five tensors, as in old conversions.
    "rwkv6_apart": of("rwkv6", sizes={"head": 16, "apart": True}, layers=2),
    "rwkv6_q8_0": of("rwkv6", type="Q8_0", layers=2),
    "rwkv7": of("rwkv7"),
    "rwkv7_heads": of("rwkv7", d=128, layers=2, sizes={"rate": 5, "values": 3, "gate": 6, "decay": 8}, eps=0.05),
    "rwkv7_one_layer": of("rwkv7", layers=1),
    "rwkv7_q8_0": of("rwkv7", type="Q8_0", layers=2),
    "rwkv6qwen2": of("rwkv6qwen2", sizes={"head": 16, "biased": True}),
    # Every head has keys of its own; nothing is biased.
    "rwkv6qwen2_heads": of("rwkv6qwen2", kv_heads=2, sizes={"head": 32, "extra": 9, "decay": 5}, layers=2, eps=0.05),
    "rwkv6qwen2_q8_0": of("rwkv6qwen2", type="Q8_0", layers=2, sizes={"head": 32, "extra": 32, "decay": 32}),
    "arwkv7": of("arwkv7"),
    # Two heads; no gate, and no norm of each head.
    "arwkv7_heads": of("arwkv7", d=128, layers=2),
    "arwkv7_no_gate": of("arwkv7", sizes={"gate": 0}),
    "arwkv7_not_normed": of("arwkv7", sizes={"normed": False, "decay": 12, "values": 4}, layers=2, eps=0.05),
    "arwkv7_q8_0": of("arwkv7", type="Q8_0", layers=2, sizes={"decay": 32, "rate": 32, "values": 32, "gate": 32}),
}
FAMILY_CASES |= RWKV_CASES

GEMMA4_CASES: dict[str, dict[str, Any]] = {
    "gemma4": of("gemma4"),
    # Full layers first, windowed last; only those lack the values here, nothing scales the stream, the cap is 30.
    "gemma4_full_first": of(
        "gemma4",
        mixers=("attention", "window"),
        layers=4,
        values=True,
        sizes={"window": {"head_dim": 16, "kv_heads": 4, "values": False, "n_rot": 8}},
        output_scale=False,
        tied=False,
        omit=("final_logit_softcapping", "rope.freq_base_swa"),
    ),
    # Windowed layers do not take the divisors of the rotation, even where they could.
    "gemma4_one_size": of(
        "gemma4",
        kv_heads=2,
        sizes={"window": {"head_dim": 32, "values": True}},
        kv_by_layer=False,
        scaling={"type": "linear", "factor": 8.0},
    ),
    "gemma4_fused": of("gemma4", values=True, fused_qkv=True, layers=3),
    "gemma4_unread": of("gemma4", extra={k: v for k, v in UNREAD.items() if not k.startswith(("final", "rope.freq"))}),
    "gemma4_q8_0": of(
        "gemma4", type="Q8_0", heads=2, sizes={"window": {"head_dim": 16, "kv_heads": 2}}, values=True, layers=3
    ),
}
# A dense network and experts side by side, each between norms of its own.
GEMMA4_EXPERTS = EXPERTS | {
    "expert_ff": 48,
    "expert_norms": ("pre_ffw_norm_2", "post_ffw_norm_1", "post_ffw_norm_2"),
    "dense_beside": True,
    "router_scale": True,
    "expert_scale": True,
    "fused_experts": True,
}
GEMMA4_CASES |= {
    "gemma4_experts": of("gemma4", **GEMMA4_EXPERTS),
    "gemma4_experts_apart": of(
        "gemma4",
        **GEMMA4_EXPERTS | {"fused_experts": False, "expert_scale": False, "dense_lead": 1, "experts_used": 3},
        mixers=("attention", "window"),
        layers=3,
    ),
    "gemma4_experts_unread": of(
        "gemma4", **GEMMA4_EXPERTS, layers=3, extra=UNREAD_ROUTING | {"leading_dense_block_count": 1}
    ),
}
# As E2B and E4B: the last layers have no keys and values, but wider networks; each layer has inputs of its own.
GEMMA4_SMALL = {
    "mixers": ("window", "attention"),
    "values": True,
    "shared_kv": 2,
    "per_layer": 24,
    "omit": ("final_logit_softcapping",),
}
GEMMA4_CASES |= {
    "gemma4_small": of("gemma4", **GEMMA4_SMALL, ffs=(96, 96, 192, 192)),
    # Of two windowed layers, the later one's keys and values are read; those of the last layers are there, unread.
    "gemma4_shared": of(
        "gemma4",
        **GEMMA4_SMALL | {"mixers": ("window", "window", "attention", "window", "attention"), "per_layer": 0},
        idle_kv=True,
        layers=5,
        post_gain=0.5,
    ),
    # As 12B and 31B: the values that are shared are keys.
    "gemma4_shared_keys": of("gemma4", **GEMMA4_SMALL | {"per_layer": 0, "values": False}),
    "gemma4_inputs": of("gemma4", layers=3, per_layer=8, output_scale=False, embed_std=0.5),
    "gemma4_small_q8_0": of(
        "gemma4",
        **GEMMA4_SMALL | {"per_layer": 32, "shared_kv": 1},
        layers=3,
        type="Q8_0",
        heads=2,
        ffs=(96, 96, 192),
    ),
}
FAMILY_CASES |= GEMMA4_CASES

FAMILY_CASES |= {
    "gemma3n": of("gemma3n"),
    # Activations are sparse in the first ten blocks; those from number 20 on read keys and values of the two before.
    "gemma3n_shared": of(
        "gemma3n",
        layers=22,
        mixers=("window", "window", "window", "window", "attention"),
        d=32,
        heads=2,
        kv_heads=1,
        ff=160,
        stream_gain=0.05,
        post_gain=0.2,
        idle_kv=True,
        vocab=48,
        tied=False,
        omit=("rope.freq_base_swa",),
    ),
    "gemma3n_unread": of(
        "gemma3n",
        layers=2,
        mixers=("window", "attention"),
        embed_std=0.5,  # logits that the cap reaches
        omit=("attention.sliding_window_pattern",),
        extra={k: v for k, v in UNREAD.items() if not k.startswith("rope.freq")}
        | {"embedding_length_per_layer_input": 8, "attention.shared_kv_layers": 1},
    ),
}

GATED_CASES: dict[str, dict[str, Any]] = {
    "afmoe": of("afmoe"),
    # Layers rotate by their number, whatever their windows; without a shared expert.
    "afmoe_array": of(
        "afmoe",
        shared_count=0,
        zeros=("expert_shared_count",),
        **YARN_ROW,
        dense_lead=0,
        extra={"attention.sliding_window_pattern": [False, True, True, True, False], "rope.freq_base_swa": 50.0},
    ),
    "afmoe_softmax": of(
        "afmoe",
        layers=4,
        selection_bias=0.05,
        extra={"expert_gating_func": 1},
        omit=("expert_weights_norm",),
        tied=True,
    ),
    "afmoe_unread": of("afmoe", layers=4, extra=UNREAD),
    "laguna": of("laguna"),
    # As M.1: no windows, a gate for each element.
    "laguna_elements": of(
        "laguna", mixers=("attention",), sizes={}, layers=3, window=None, attn_gate="elements", **YARN_ROW, tied=True
    ),
    "laguna_yarn": of(
        "laguna",
        scaling=YARN | {"attn_factor": 1.3},
        layers=3,
        mixers=("attention", "window"),
        omit=(),
        extra={"rope.freq_base_swa": 50.0},
    ),
    "laguna_unread": of("laguna", layers=4, extra=UNREAD),
    "step35": of("step35"),
    "step35_clamped": of(
        "step35", extra={"swiglu_clamp_exp": [0.0, 0.5, 0.0, 0.7], "swiglu_clamp_shexp": [0.7, 0.0, 0.6, 0.0]}
    ),
    # Divisors of frequencies for as many pairs as windowed layers rotate, of which full ones use half.
    "step35_factors": of("step35", rope_factors=True, attn_gate="", qk_norm="", rope_base=500.0, layers=3),
    "step35_predictor": of(
        "step35", predictors=1, predictor_experts=False, layers=3, omit=("rope.freq_base_swa",), scaling=LINEAR
    ),
    "step35_unread": of("step35", layers=3, extra=UNREAD),
    "spark2_5": of("spark2_5"),
    "spark2_5_heads": of("spark2_5", sizes={"window": {"heads": 6, "kv_heads": 3}}, head_dim=16, kv_by_layer=True),
    "spark2_5_yarn": of("spark2_5", **YARN_ROW, tied=True),
    "spark2_5_unread": of("spark2_5", extra=UNREAD),
    "muse_glimmer": of("muse-glimmer"),
    # A branch so small that the epsilon after it acts, and the cap by default.
    "muse_glimmer_faint": of(
        "muse-glimmer",
        layers=3,
        eps=0.05,
        down_gain=1e-4,
        omit=("final_logit_softcapping",),
        extra={
            "attention.sliding_window_pattern": [False, True, True],
            "rope.freq_base_swa": 50.0,
            "logit_scale": 3.0,
        },
    ),
    "muse_glimmer_linear": of("muse-glimmer", layers=4, scaling=LINEAR, fused_qkv=True),
    "muse_glimmer_unread": of(
        "muse-glimmer", layers=4, extra={key: value for key, value in UNREAD.items() if "softcapping" not in key}
    ),
}
FAMILY_CASES |= GATED_CASES

LLAMA4_CASES: dict[str, dict[str, Any]] = {
    "llama4": of("llama4", rope_factors=True, rope_base=500.0),
    # As Maverick: with 128 experts, queries and keys are not normed.
    "llama4_maverick": of(
        "llama4", layers=4, d=32, heads=2, kv_heads=1, ff=32, experts=128, expert_ff=32, shared_ff=32, tied=True
    ),
    "llama4_several": of(
        "llama4",
        layers=4,
        experts_used=3,
        dense_blocks=(),
        extra={"interleave_moe_layer_step": 1},
        fused_qkv=True,
        **YARN_ROW,
    ),
    "llama4_array": of(
        "llama4",
        scaling=LINEAR,
        extra={"attention.sliding_window_pattern": [False, True, True, True, False], "rope.freq_base_swa": 50.0},
    ),
    "llama4_unread": of("llama4", layers=4, window=3, extra=UNREAD | UNREAD_ROUTING),
}
FAMILY_CASES |= LLAMA4_CASES

LIGHTNING_CASES: dict[str, dict[str, Any]] = {
    "minimax_01": of("minimax-01"),
    # The default period is eight.
    "minimax_01_period": of(
        "minimax-01",
        layers=8,
        mixers=(*["lightning"] * 7, "attention"),
        omit=("attention.recurrent_layers",),
        tied=True,
    ),
    "minimax_01_heads": of(
        "minimax-01",
        layers=2,
        mixers=("attention", "lightning"),
        extra={"attention.recurrent_layers": [False, True]},
        heads=6,
        head_dim=10,
        n_rot=10,
        eps=0.05,
        fused_qkv=True,
        **YARN_ROW,
    ),
    "minimax_01_unread": of(
        "minimax-01",
        layers=2,
        mixers=("lightning", "attention"),
        window=3,
        extra={k: v for k, v in UNREAD.items() if k != "residual_scale"}
        | UNREAD_ROUTING
        | {"attention.recurrent_layers": [True, False]},
    ),
    "minimax_01_q8_0": of(
        "minimax-01",
        layers=2,
        mixers=("lightning", "attention"),
        extra={"attention.recurrent_layers": [True, False]},
        type="Q8_0",
    ),
}
FAMILY_CASES |= LIGHTNING_CASES

LOOPED_CASES: dict[str, dict[str, Any]] = {
    "talkie": of("talkie"),
    "talkie_yarn": of("talkie", **YARN_ROW, fused_qkv=True, biases=QKV, scales=(), kv_heads=4, eps=0.05),
    "talkie_q8_0": of("talkie", type="Q8_0", head_dim=32, rope_base=1e6, layers=2),
    "talkie_unread": of("talkie", window=3, extra=UNREAD | {"logit_scale": 0.5}),
    "nanbeige": of("nanbeige", rope_factors=True, rope_base=500.0),
    "nanbeige_once": of("nanbeige", extra={"num_loops": 1}, tied=True, n_rot=8),
    "nanbeige_thrice": of("nanbeige", extra={"num_loops": 3}, layers=1, **YARN_ROW),
    "nanbeige_not_normed": of("nanbeige", extra={"skip_loop_final_norm": True}, fused_qkv=True),
    "nanbeige_unread": of("nanbeige", window=3, extra=UNREAD, omit=("skip_loop_final_norm",)),
}
LOOPED_CASES |= {
    "hrm_text": of("hrm_text"),
    # One pass over two layers, and one cycle; nothing of the first passes is held for later ones.
    "hrm_text_stacks": of("hrm_text", layers=4, cycles=(1, 1), tied=True, n_rot=8, extra={"embedding_scale": 0.0}),
    "hrm_text_thrice": of("hrm_text", cycles=(2, 3), fused_qkv=True, biases=QKV, **YARN_ROW),
    "hrm_text_unread": of("hrm_text", window=3, extra={k: v for k, v in UNREAD.items() if k != "embedding_scale"}),
}
FAMILY_CASES |= LOOPED_CASES
