"""What a GGUF model computes, written a second time: plain float64 torch, to judge the package by.

Nothing is shared with the package and nothing is clever. Bytes are decoded by the `gguf` package, the model is a few
readable functions that follow llama.cpp's rules, the table `FACTS` states what a file does not say, and the detached
Jacobian is autograd's, with `.detach()` on the factors that the method freezes. Mixers other than attention are in
modules of their own, `oracle_*.py`. Itself tested in `test_oracle.py` against llama.cpp and the paper's own code.
Meant for short prompts and small models: all weights are dense float64.
"""

import functools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import gguf
import numpy as np
import oracle_altup
import oracle_compressed
import oracle_delta
import oracle_latent
import oracle_rwkv
import oracle_state
import oracle_streams
import torch
from torch import Tensor


def by_tensors(model: "Oracle", layer: int) -> tuple[str, ...]:
    """Return the mixers whose output projection block `layer` has."""
    outputs = {"attention": "attn_output", "mamba2": "ssm_out"}
    return tuple(kind for kind, name in outputs.items() if f"blk.{layer}.{name}.weight" in model.weights)


class Part(NamedTuple):
    """A network of a feed-forward branch that has several, added up, each between norms of its own."""

    network: str  # dense | mixture
    before: str | None
    after: str | None
    reads: str = "stream"  # | block: its input


class Facts(NamedTuple):
    """What an architecture's name implies and its file does not say. The defaults are those of `llama`."""

    norm: str = "rms"  # rms | ln (weights and biases if there are any)
    epsilon_read: bool = True  # norms have the file's epsilon; else 0
    norm_weights: bool = True  # norms have weights in the file
    clamp_key: bool = False  # attention.clamp_kqv limits queries, keys and values
    parallel: bool = False  # attention and feed-forward read the same input
    parallel_key: bool = False  # or do so if use_parallel_residual, each through a norm of its own
    # Norms before and after the two sublayers; None: there is none.
    attn_norm: str | None = "attn_norm"
    attn_post: str | None = None
    ffn_norm: str | None = "ffn_norm"
    ffn_post: str | None = None
    parts: tuple[Part, ...] = ()  # of a block with a router; (): the experts alone, between the norms above
    dense_optional: bool = False  # of the parts, the first is in some files only
    ffn_post_instead: str | None = None  # which some files have in place of ffn_post
    ffn_norm_optional: bool = False  # without it the feed-forward reads what the attention reads
    # head (if there is one) | head after rope | bare (likewise, without weights, where there is a rope) | gained
    # (likewise, but with a number for each head of queries) | full; all others before the rope, and full before the
    # split
    qk_norm: str | None = None
    unnormed: int | None = None  # with so many experts there is no such norm
    rope: str | None = "adjacent"  # which dimensions are a pair: adjacent | halves
    # all | local (only layers with a window, where there are any) | three of four | listed (attention.rope_pattern)
    # | local or dense (those, and leading dense ones) | not first of four (of more than four, where there are windows)
    roped: str = "all"
    sections: str = "in turn"  # how an image's axes are dealt pairs: in turn | one after another
    halves_in_sections: bool = False  # in files with such axes pairs are halves
    rope_keys: str = "all"  # that are read: all | base (scaling is not done) | none: the base is 10000
    finetuned_key: bool = False  # rope.scaling.finetuned = false turns the rope off
    factors: bool = False  # divisors of the frequencies are read
    yarn_keys: bool = False  # YaRN's betas and log multiplier are read
    yarn_betas: float = 0.0  # the betas only, where not 0: default of the first
    period: int | None = None  # the last of so many layers is global, 0: none; default. None: windows are ignored
    window: int | None = None  # default
    window_fixed: bool = False  # whatever the file says, if it says anything
    window_always: bool = False  # or even if not
    full_first: bool = False  # the first of so many layers is global, not the last
    windowed_at: int | None = None  # with so many layers only are there windows; None: with any number
    local_base: float | None = None  # default of the rope base in local layers; None: that of the global ones
    local_base_key: bool = True
    local_scaling: bool = True  # rope scaling applies to local layers, too
    local_factors: bool = True  # divisors of the frequencies, where they are read, apply to local layers, too
    halved: bool = False  # global layers rotate half of rope.dimension_count
    local_attn_factor: bool = True  # and so does its attn_factor, whatever the scaling
    width_scaled_at: int | None = None  # with so many layers attention is scaled by sqrt(d / heads), not of head_dim
    attn_scale: float | None = None  # of scores; None: 1 / sqrt(head size)
    attn_power: float = -0.5  # or of the head size this power
    attn_scale_key: str | None = None
    alibi: float | str = 0.0  # bias of the first power-of-two heads' last one, in bits; or its key
    alibi_at: int | None = None  # with so many layers only; None: with any number
    roped_at: int | None = None
    shared_kv_key: bool = False  # attention.shared_kv_layers: that many blocks read earlier ones' keys and values
    first_values: bool = False  # layers after the first read the first one's values, too
    value_norm: bool = False  # values are normed, each head by itself and without weights
    attn_cap: float | None = None  # default; None: there is none
    final_cap: float | None = None
    temperature: bool = False
    activation: str = "silu"  # silu | gelu | relu2 (squared) | xielu | oai (clamped, shifted) | situ
    situ: tuple[float, float] = (0.0, 0.0)  # limits of the gate and of up, which has none if 0
    xielu: tuple[float, ...] = ()  # its stored constants in one layer
    limit: float | Tensor = 7.0  # of oai's clamps
    shift: float | Tensor = 1.0  # added to oai's up
    clamp_keys: bool = False  # swiglu_clamp_exp and _shexp limit gate, after SiLU, and up
    clamp_first: bool = False  # the gate before SiLU
    clamp_shared: bool = True  # there is _shexp
    clamp_alike: bool = False  # or else it is as _exp
    clamp: float | Tensor = 0.0  # so in one layer, where it is not zero
    pruned: bool = False  # a block without a feed-forward does nothing
    ffn: str = "gated"  # gated | fused (gate above up in one matrix) | plain
    shared_ffn: str | None = None  # of the expert that all share; None: as above
    router: str = "all"  # softmax over: all | selected; or of each its sigmoid: each
    weighted: str = "output"  # by the router, of an expert: output | input
    # What the experts read: branch | the stream, normed and scaled on its own: stream | the block's input: block.
    router_reads: str = "branch"
    joint_scale: float = 1.0  # of experts and a network beside them
    router_key: bool = False  # expert_gating_func, where it is not 0: 1 all, 2 each, 4 root (of softplus)
    renormalise: bool | None = True  # None: as expert_weights_norm says, else not
    routed_scale_key: bool = False  # expert_weights_scale
    embedding: str | None = None  # root (of d) | key | normed (without weights) | norm (with them)
    post_epsilon: float | None = None  # of the norms after a sublayer; None: that of the others
    residual_key: bool = False
    # Blocks are applied several times: all num_loops times, with the final norm between, or two stacks in cycles.
    looped: bool = False
    normed_skip: bool = False  # past a branch goes what the norm before it makes, times the file's residual_scale
    value_scale_key: bool = False  # attention.value_scale: of what attention adds
    norm_key: bool = False  # attention.layer_norm_rms_epsilon in the file: norms are rms
    logits: str | None = None  # divide | multiply
    mixers: Callable[["Oracle", int], tuple[str, ...]] = lambda model, layer: ("attention",)  # of `MIXERS`: their sum
    query_gate: bool = False  # attn_q has for each head the query, then a gate: its sigmoid scales what the head reads
    head_gate: Callable[[Tensor], Tensor] = torch.sigmoid  # of attn_gate, which has a row for each head, or element
    final_norm: str = "output_norm"
    sum_named_ffn_out: bool = False  # llama.cpp's last ffn_out is the branch and its input
    # More names in llama.cpp's graph, and those of most families that mean other states of ours here.
    graph: Mapping[str, str] = {}
    # llama.cpp's names of the stream before a layer and after the last; (): it names the stream after each layer.
    stream_before: tuple[str, ...] = ()
    norm_unnamed: bool = False  # nor has the final norm's output a name there
    own_scales: tuple[str, ...] = ()  # tensors whose `.scale` is a part of the model, not of how they are stored
    scales: tuple[float, ...] = ()  # of embeddings, branches * sqrt(blocks) and logits * d, where the file has none
    plain_scales: bool = False  # of branches and logits as they are
    scale_keys: bool = True  # and the file may have some
    # Several residual streams (oracle_streams.py): apart | mixed | over depth | held | input (beside that of block 0).
    # Or predicted (oracle_altup.py).
    streams: str = ""
    laurel: bool = False  # a low-rank matrix beside attention, with a norm of its own, and what it reads
    shared_from: int | None = None  # the first block that reads keys and values of one before this
    inputs_width: int | None = None  # of each block's inputs of its own; None: as the file says
    sparse: int = 0  # so many first blocks have sparse gates: those 1.6448533535003662 deviations above the mean
    bound: float | Tensor = 1.0  # times that, where it is frozen
    final_cap_key: bool = True  # final_logit_softcapping overrides final_cap
    mscale: str | None = None  # of latent attention in a stretched context: equal | one | alone (oracle_latent.py)


def by_interval(kind: str, default: int = 4) -> Callable[["Oracle", int], tuple[str, ...]]:
    """Return which mixer a block has, in families that list the blocks of `kind` or their period."""

    def mixers(model: "Oracle", layer: int) -> tuple[str, ...]:
        stated = model.metadata.get("attention.recurrent_layers")
        period = model.metadata.get("full_attention_interval", default)
        return (kind if (stated[layer] if stated else (layer + 1) % period) else "attention",)

    return mixers


def pruned(model: "Oracle", layer: int) -> tuple[str, ...]:
    """Return the mixer of a block that may have lost it, or all of its heads, or its feed-forward and so everything."""
    meta = model.metadata
    if not scalar(meta["attention.head_count"], layer) or not scalar(meta["feed_forward_length"], layer):
        return ()
    return ("attention" if scalar(meta["attention.head_count_kv"], layer) else "linear",)


def by_kv_heads(kind: str, other: str = "attention") -> Callable[["Oracle", int], tuple[str, ...]]:
    """Return which mixer a block has, in families where the blocks of `kind` are said to have no kv heads."""

    def mixers(model: "Oracle", layer: int) -> tuple[str, ...]:
        return (other if scalar(model.metadata["attention.head_count_kv"], layer) else kind,)

    return mixers


SANDWICH = Facts(attn_post="post_attention_norm", ffn_post="post_ffw_norm")
GEMMA = Facts(rope="halves", activation="gelu", embedding="root")
GRANITE = Facts(factors=True, attn_scale_key="attention.scale", embedding="key", residual_key=True, logits="divide")
ROUTED = Facts(router_key=True, renormalise=None, routed_scale_key=True)
LATENT = Facts(mixers=lambda model, layer: ("latent",))
LATENT_ROUTED = ROUTED._replace(mixers=LATENT.mixers, temperature=True)
MAMBA2 = Facts(mixers=by_tensors)
NEMOTRON_H = MAMBA2._replace(
    ffn_norm="attn_norm", rope=None, activation="relu2", ffn="plain", router="each", renormalise=None,
    routed_scale_key=True,
    graph={
        "attn_out": "attention", "mamba_out": "mamba2", "l_out": "ffn_out", "nemotron_h_block_out": "l_out"
    },
)  # fmt: skip
LAYER_NORM = Facts(norm="ln", rope="halves", activation="gelu", ffn="plain")
QWEN35 = Facts(
    ffn_norm="post_attention_norm", rope="halves", qk_norm="head", query_gate=True, mixers=by_interval("delta"),
    graph={"linear_attn_out": "delta", "attn_output": "attention", "attn_residual": "ffn_inp"},
)  # fmt: skip
RWKV = Facts(
    norm="ln",
    embedding="norm",
    ffn_norm="attn_norm_2",
    mixers=lambda model, layer: ("rwkv7",),
    first_values=True,
)
KIMI = ROUTED._replace(
    rope=None, mixers=by_kv_heads("kda", "latent"),
    graph={"kda_out": "kda", "mla_out": "latent"},
)  # fmt: skip
GATED = {"attn_o_proj": "attn_out", "attn_out": "heads"}  # the latter before the gate, which we do not name
LFM2 = Facts(
    rope="halves", qk_norm="head", local_base_key=False, final_norm="token_embd_norm",
    mixers=by_kv_heads("convolution"),
    graph={
        "model.layers.{}.conv.out_proj": "convolution", "model.layers.{}.self_attn.out_proj": "attention"
    },
)  # fmt: skip

FACTS: dict[str, Facts] = {
    "llama": Facts(factors=True),
    "qwen2": Facts(rope="halves"),
    "qwen3": Facts(rope="halves", qk_norm="head"),
    "qwen3moe": Facts(rope="halves", qk_norm="head"),
    "qwen3vl": Facts(rope="halves", qk_norm="head"),
    "qwen3vlmoe": Facts(rope="halves", qk_norm="head"),
    "qwen2moe": Facts(rope="halves", renormalise=False),
    "olmoe": Facts(rope="halves", qk_norm="full", renormalise=False),
    "gemma": GEMMA,
    "gemma2": GEMMA._replace(
        attn_post="post_attention_norm", ffn_post="post_ffw_norm", period=2, window=4096, width_scaled_at=46,
        attn_cap=50.0, final_cap=30.0,
    ),
    "gemma3": GEMMA._replace(
        attn_post="post_attention_norm", ffn_post="post_ffw_norm", qk_norm="head", period=6, width_scaled_at=62,
        local_base=10000.0, local_scaling=False, final_cap=0.0,
    ),
    "gemma3n": GEMMA._replace(
        attn_post="post_attention_norm", ffn_post="post_ffw_norm", qk_norm="head", period=5, local_base=10000.0,
        local_scaling=False, attn_scale=1.0, value_norm=True, final_cap=30.0, final_cap_key=False, streams="predicted",
        laurel=True, shared_from=20, inputs_width=256, sparse=10, graph={"ffn_post_norm": "ffn_out"},
    ),
    "gemma4": GEMMA._replace(
        attn_post="post_attention_norm", ffn_post="post_ffw_norm", qk_norm="head", period=0, local_base=10000.0,
        local_scaling=False, factors=True, local_factors=False, attn_scale=1.0, value_norm=True, final_cap=30.0,
        parts=(
            Part("dense", "ffn_norm", "post_ffw_norm_1"),
            Part("mixture", "pre_ffw_norm_2", "post_ffw_norm_2"),
        ),
        router_reads="stream", shared_kv_key=True,
        own_scales=("ffn_gate_inp", "ffn_down_exps"),
        graph={
            "attn_post_norm": "attn_out", "attn_out": "ffn_inp", "ffn_post_norm": "ffn_out",
            "per_layer_embd_out": "per_layer_out",
        },
    ),
    "phi3": Facts(rope="halves", factors=True, ffn="fused"),
    "olmo2": Facts(
        attn_norm=None, attn_post="post_attention_norm", ffn_norm=None, ffn_post="post_ffw_norm", rope="halves",
        qk_norm="full", period=4, local_base_key=False, local_scaling=False, local_attn_factor=False,
    ),
    "mistral3": Facts(factors=True, yarn_keys=True, temperature=True),
    "granite": GRANITE._replace(finetuned_key=True),
    "granitemoe": GRANITE,
    "smollm3": Facts(roped="three of four"),
    "exaone4": Facts(
        attn_norm=None, attn_post="post_attention_norm", ffn_norm=None, ffn_post="post_ffw_norm", rope="halves",
        qk_norm="head", factors=True, windowed_at=64, period=4, window=4096, local_base_key=False, roped="local",
    ),
    "seed_oss": Facts(ffn_norm="post_attention_norm", rope="halves"),
    "hunyuan-dense": Facts(rope="halves", qk_norm="head after rope"),
    "internlm2": Facts(),
    "ernie4_5": Facts(),
    "exaone": Facts(rope="halves", factors=True),
    "minicpm": Facts(factors=True, embedding="key", residual_key=True, logits="divide", scales=(12.0, 1.4, 256.0)),
    "arcee": Facts(factors=True, activation="relu2", ffn="plain"),
    "apertus": Facts(rope="halves", qk_norm="head", factors=True, activation="xielu", ffn="plain"),
    "glm4": SANDWICH._replace(ffn="fused"),
    "cohere2": Facts(
        norm="ln", parallel=True, ffn_norm=None, period=4, roped="local", local_base_key=False, logits="multiply"
    ),
    "starcoder2": LAYER_NORM,
    "gpt2": LAYER_NORM._replace(rope=None),
    "falcon": LAYER_NORM._replace(parallel=True, ffn_norm=None),
    "phi2": LAYER_NORM._replace(parallel=True, ffn_norm=None),
    "olmo": Facts(norm="ln", norm_weights=False, clamp_key=True, sum_named_ffn_out=True),
    "command-r": Facts(norm="ln", parallel=True, ffn_norm=None, qk_norm="head", logits="multiply"),
    "nemotron": LAYER_NORM._replace(activation="relu2", sum_named_ffn_out=True),
    "stablelm": Facts(norm="ln", rope="halves", ffn_norm_optional=True, qk_norm="head"),
    "gptneox": LAYER_NORM._replace(parallel_key=True, sum_named_ffn_out=True),
    "gpt-oss": Facts(ffn_norm="post_attention_norm", rope="halves", period=2, activation="oai", router="selected"),
    "glm4moe": ROUTED._replace(ffn_norm="post_attention_norm", rope="halves", qk_norm="head", router="each"),
    "deepseek": ROUTED._replace(router_key=False, renormalise=False),
    "dots1": ROUTED._replace(rope="halves", qk_norm="head"),
    "ernie4_5-moe": Facts(),
    "hunyuan-moe": Facts(rope="halves", qk_norm="head after rope"),
    "bailingmoe": ROUTED._replace(router_key=False),
    "bailingmoe2": ROUTED._replace(rope="halves", qk_norm="head"),
    "exaone-moe": ROUTED._replace(
        rope="halves", qk_norm="head", factors=True, period=4, local_base_key=False, roped="local"
    ),
    "openelm": Facts(rope="halves", qk_norm="head"),
    "deci": Facts(factors=True, mixers=pruned, sum_named_ffn_out=True, graph={"wo": "linear"}),
    "bitnet": Facts(rope="halves", graph={"ffn_down": "ffn_out"}),
    "mellum": Facts(
        rope="halves", qk_norm="head", period=4, local_base_key=False, local_scaling=False, local_attn_factor=False,
        sum_named_ffn_out=True, graph={"ffn_moe_out": "ffn_out"},
    ),
    "maple": Facts(
        rope="halves", qk_norm="head", period=0, roped="local", clamp_keys=True, clamp_first=True, clamp_shared=False,
        graph={"ffn_moe_out": "ffn_out"},
    ),
    "granite_swa": GRANITE._replace(period=0, local_base_key=False, roped="listed", shared_ffn="fused"),
    "arctic": Facts(
        parts=(Part("dense", "ffn_norm", None), Part("mixture", "ffn_norm_exps", None, "block")),
        sum_named_ffn_out=True,
    ),
    "grok": Facts(
        rope="halves", attn_post="attn_output_norm", ffn_post="post_ffw_norm", ffn_post_instead="layer_output_norm",
        parts=(Part("dense", "ffn_norm", None), Part("mixture", "ffn_norm", None)), dense_optional=True,
        joint_scale=math.sqrt(0.5), yarn_betas=8.0, attn_scale_key="attention.output_scale",
        attn_scale=0.08838834764831845, attn_cap=30.0, final_cap=0.0, activation="gelu", embedding="key",
        logits="multiply", scales=(78.38367176906169, 1.0, 0.5773502691896257), plain_scales=True,
        graph={"attn_out_norm": "attn_out", "ffn_post_norm": "ffn_out"},
    ),
    "hy_v3": ROUTED._replace(rope="halves", qk_norm="head", router="each", graph={"ffn_dense_out": "ffn_out"}),
    "cohere2moe": ROUTED._replace(
        norm="ln", norm_key=True, parallel=True, ffn_norm=None, period=4, full_first=True, roped="local or dense",
        local_base_key=False, logits="multiply", router="each", joint_scale=0.5,
    ),
    "mimo2": Facts(
        rope="halves", period=0, local_base=10000.0, local_scaling=False, value_scale_key=True, router="each",
        graph={"attn_out": "attention", "attn_out_scaled": "attn_out"},
    ),
    "smallthinker": Facts(
        rope="halves", period=4, full_first=True, window=4096, window_fixed=True, roped="not first of four",
        activation="relu", router_key=True, router_reads="block",
    ),
    "dbrx": Facts(
        norm="ln", rope="halves", ffn_norm="attn_output_norm", clamp_key=True, sum_named_ffn_out=True,
        graph={"ffn_moe_out": "ffn_out"},
    ),
    "grovemoe": Facts(rope="halves", qk_norm="head", graph={"ffn_final_moe_out": "ffn_out"}),
    "minimax-m2": Facts(rope="halves", qk_norm="full", router_key=True),
    "phimoe": Facts(rope="halves", factors=True),
    "xverse": Facts(),
    "qwen": Facts(rope="halves"),
    "qwen2vl": Facts(epsilon_read=False, rope="halves", sections="one after another"),
    "paddleocr": Facts(rope="halves", sections="one after another"),
    "hunyuan_vl": Facts(rope="halves", qk_norm="head after rope", sections="one after another"),
    "starcoder": LAYER_NORM._replace(rope=None),
    "codeshell": LAYER_NORM,
    "orion": Facts(norm="ln", rope="halves"),
    "maincoder": Facts(qk_norm="head after rope"),
    "chatglm": Facts(ffn="fused"),
    "pangu-embedded": Facts(rope="halves", sum_named_ffn_out=True),
    "plamo": Facts(rope="halves", parallel=True, ffn_norm=None),
    "plamo3": SANDWICH._replace(
        rope="halves", qk_norm="head", period=8, local_base=10000.0, local_scaling=False, ffn="fused",
        norm_unnamed=True,
    ),
    "cogvlm": Facts(rope="halves", rope_keys="", sum_named_ffn_out=True),
    "baichuan": Facts(roped_at=32, alibi=8.0, alibi_at=40),
    "mpt": LAYER_NORM._replace(rope=None, clamp_key=True, alibi="attention.max_alibi_bias"),
    "bloom": LAYER_NORM._replace(rope=None, alibi=8.0, embedding="norm"),
    "refact": Facts(rope=None, alibi=8.0),
    "jais": Facts(norm="ln", rope=None, attn_power=-1.0, alibi="attention.max_alibi_bias"),
    "jais2": LAYER_NORM._replace(activation="relu2"),
    "deepseek2-ocr": ROUTED._replace(rope="halves", rope_keys="base", mscale="alone"),
    "qwen35": QWEN35,
    "qwen35moe": QWEN35,
    "lfm2": LFM2._replace(period=0),
    "lfm2moe": LFM2._replace(router_key=True),
    "kimi-linear": KIMI._replace(renormalise=True),
    "bailingmoe3": KIMI._replace(
        rope="adjacent", sections="one after another", halves_in_sections=True,
        mixers=by_kv_heads("bounded kda", "latent"), clamp_keys=True,
        graph={"kda_out": "bounded kda", "mla_out": "latent"},
    ),
    "kimi-k3": KIMI._replace(
        mixers=by_kv_heads("k3 kda", "latent"), streams="over depth", activation="situ",
        graph={"kda_out": "k3 kda", "mla_out": "latent", "prefix_sum_attn": "ffn_inp"},
    ),
    "glm5-next": KIMI._replace(
        mixers=by_kv_heads("glm kda", "latent"), router="each", clamp_keys=True, clamp_first=True, clamp_alike=True,
        streams="mixed", graph={"kda_out": "glm kda", "attn_out": "latent"},
    ),
    "qwen3next": QWEN35._replace(
        mixers=by_interval("grouped delta"), graph=QWEN35.graph | {"linear_attn_out": "grouped delta"}
    ),
    "deepseek2": LATENT_ROUTED._replace(mscale="equal"),
    "mistral4": LATENT_ROUTED._replace(mscale="one"),
    "minicpm3": LATENT._replace(
        rope="halves", factors=True, embedding="key", residual_key=True, logits="multiply", scales=(12.0, 1.4, 256.0),
        scale_keys=False,
    ),
    "plm": LATENT._replace(activation="relu2", ffn="plain"),
    "deepseek32": LATENT_ROUTED._replace(mscale="one", temperature=False),
    "glm-dsa": LATENT_ROUTED._replace(mscale="alone", temperature=False, router="each"),
    "hy_v4": LATENT_ROUTED._replace(
        temperature=False, clamp_keys=True, clamp_first=True, clamp_shared=False, streams="apart",
        graph={"attn_out": "latent"},
    ),
    "deepseek4": ROUTED._replace(
        mixers=lambda model, layer: ("compressed",), period=0, local_base_key=False, clamp_keys=True, clamp_first=True,
        clamp_alike=True, streams="mixed", graph={"attn_out": "compressed", "l_last": "l_out"},
    ),
    "dots3note": LATENT_ROUTED._replace(
        temperature=False, period=0, graph={"attn_output": "latent", "attn_out": "what heads read"}
    ),
    "minimax-m3": ROUTED._replace(rope="halves", qk_norm="head", activation="oai"),
    "granitehybrid": GRANITE._replace(
        finetuned_key=True, mixers=by_tensors,
        graph={"attn_out": "attention", "mamba_out": "mamba2"},
    ),
    "falcon-h1": Facts(
        rope="halves", mixers=by_tensors,
        graph={"attn_out": "attention", "ssm_out": "mamba2", "layer_out": "attn_out"},
    ),
    "nemotron_h": NEMOTRON_H,
    "nemotron_h_moe": NEMOTRON_H,
    "mamba2": MAMBA2._replace(graph={"mamba_out": "mamba2"}),
    "mamba": Facts(mixers=lambda model, layer: ("mamba",)),
    "plamo2": SANDWICH._replace(
        rope="halves", qk_norm="head", ffn="fused", mixers=by_kv_heads("plamo2"),
        graph={
            "mamba_out": "plamo2", "attn_out": "attention", "attn_post_norm": "attn_out", "ffn_post_norm": "ffn_out",
            "attn_residual": "ffn_inp", "ffn_residual": "l_out",
        },
    ),
    "rwkv6": RWKV._replace(mixers=lambda model, layer: ("rwkv6",), first_values=False),
    "rwkv7": RWKV,
    "rwkv6qwen2": Facts(mixers=lambda model, layer: ("rwkv6",)),
    "arwkv7": Facts(mixers=lambda model, layer: ("rwkv7",), first_values=True),
    # What a block's mixer adds has the name of the sum.
    "jamba": Facts(rope=None, renormalise=False, mixers=by_kv_heads("mamba"), graph={"ffn_inp": "attn_out"}),
    "afmoe": ROUTED._replace(
        attn_post="post_attention_norm", ffn_post="post_ffw_norm", rope="halves", roped="three of four", period=4,
        qk_norm="head", router="each", embedding="root",
        graph={"attn_post_norm": "attn_out", "ffn_post_norm": "ffn_out"},
    ),
    "laguna": ROUTED._replace(
        rope="halves", period=4, full_first=True, local_scaling=False, local_attn_factor=False, qk_norm="head",
        head_gate=torch.nn.functional.softplus, router="each", graph=GATED,
    ),
    "step35": ROUTED._replace(
        rope="halves", period=0, halved=True, factors=True, local_factors=False, local_base=10000.0,
        local_scaling=False, qk_norm="head", router="each", clamp_keys=True, graph=GATED | {"attn_proj": "attn_out"},
        stream_before=("attn_norm_in", "h_nextn"),
    ),
    "llama4": Facts(
        factors=True, period=4, window=8192, window_always=True, roped="three of four", qk_norm="bare", unnormed=128,
        router="each", renormalise=False, weighted="input", sum_named_ffn_out=True,
        graph={"ffn_moe_out_merged": "ffn_out"},
    ),
    "minimax-01": Facts(
        rope="halves", normed_skip=True, mixers=by_interval("lightning", 8),
        graph={"ffn_out": "l_out", "ffn_moe_out": "ffn_out"},
    ),
    "talkie": Facts(
        norm_weights=False, rope="halves", qk_norm="gained", embedding="normed", streams="input", logits="multiply",
    ),
    "nanbeige": Facts(factors=True, looped=True, sum_named_ffn_out=True),
    "hrm_text": Facts(norm_weights=False, rope="halves", embedding="key", looped=True, streams="held"),
    "spark2_5": Facts(rope="halves", period=0, activation="gelu", graph=GATED | {"attn_out_proj": "attn_out"}),
    "muse-glimmer": SANDWICH._replace(
        roped="local", period=4, local_scaling=False, qk_norm="head", final_cap=30.0, embedding="normed",
        post_epsilon=1e-8, logits="multiply", graph={"attn_post_norm": "attn_out", "ffn_post_norm": "ffn_out"},
    ),
}  # fmt: skip


class Oracle(NamedTuple):
    """A file's metadata (architecture prefix removed from its keys) and dense float64 weights, by GGUF name."""

    architecture: str
    metadata: dict[str, Any]
    weights: dict[str, Tensor]
    facts: Facts = Facts()
    tokens: Tensor | None = None  # of the prompt, while blocks are computed


class Jacobian(NamedTuple):
    """The detached Jacobian J [d, n, d] of y [d] with respect to x [n, d]; offset = y - J x."""

    J: Tensor
    y: Tensor
    offset: Tensor
    x: Tensor


def load(path: str | os.PathLike[str]) -> Oracle:
    """Read a (single) GGUF file into float64; one that was read a moment ago and has not changed, from memory."""
    return _read(os.fspath(path), os.stat(path).st_mtime_ns)


def decoded(tensor: gguf.ReaderTensor) -> np.ndarray:
    """Return a tensor's numbers; tables are of integers."""
    if tensor.tensor_type == gguf.GGMLQuantizationType.I32:
        return tensor.data
    return gguf.quants.dequantize(tensor.data, tensor.tensor_type)


@functools.lru_cache(maxsize=64)
def _read(path: str, changed: int) -> Oracle:
    reader = gguf.GGUFReader(path)
    fields = {name: f.contents() for name, f in reader.fields.items() if not name.startswith("tokenizer.ggml.")}
    architecture = fields["general.architecture"]
    weights = {t.name: torch.from_numpy(decoded(t).copy()).double() for t in reader.tensors}
    own = tuple(f"{name}.scale" for name in FACTS[architecture].own_scales)
    for name in [name for name in weights if name.endswith("scale") and not name.endswith(own)]:
        factor, matrix = weights.pop(name), name[: name.rindex(".")].removesuffix(".weight") + ".weight"
        if name.endswith(".scale"):  # of the matrix, or of each expert's; no graph of llama.cpp uses an `.input_scale`
            weights[matrix] = weights[matrix] * factor.reshape(-1, *[1] * (weights[matrix].ndim - 1))
    assert architecture in FACTS, f"the oracle does not know {architecture}"
    weights.setdefault("token_embd.weight", weights.get("output.weight"))
    metadata = {k.removeprefix(f"{architecture}."): v for k, v in fields.items()}
    metadata.setdefault("attention.layer_norm_rms_epsilon", metadata.get("attention.layer_norm_epsilon"))
    if scales := FACTS[architecture].scales:
        sizes = 1, math.sqrt(blocks(metadata)), metadata["embedding_length"]
        sizes = (1, 1, 1) if FACTS[architecture].plain_scales else sizes
        names = "embedding_scale", "residual_scale", "logit_scale"
        constants = {name: s / size for name, s, size in zip(names, scales, sizes, strict=True)}
        metadata = constants | metadata if FACTS[architecture].scale_keys else metadata | constants
    facts = FACTS[architecture]
    if facts.norm_key and f"{architecture}.attention.layer_norm_rms_epsilon" in fields:
        facts = facts._replace(norm="rms")
    if facts.halves_in_sections and "rope.dimension_sections" in metadata:
        facts = facts._replace(rope="halves")
    if facts.streams == "over depth" and not metadata["attn_res.block_size"]:
        facts = facts._replace(streams="")
    if facts.activation == "situ":
        facts = facts._replace(situ=(metadata["activation.situ_beta"], metadata["activation.situ_linear_beta"]))
    if facts.looped:
        metadata, weights = unrolled(metadata, weights)
    return Oracle(architecture, metadata, weights, facts)


def unrolled(meta: dict[str, Any], weights: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return a model whose blocks are applied several times as one that has them so often."""
    once, stack = meta["block_count"], meta.get("hrm.layers_per_stack", 0)
    passes = [0] * meta.get("num_loops", 1)  # the first block of each
    if stack:
        passes = ([0] * meta["hrm.l_cycles"] + [stack]) * meta["hrm.h_cycles"]
    length = stack or once
    order = [first + i for first in passes for i in range(length)]
    named = {name: w for name, w in weights.items() if not name.startswith("blk.")}
    for i, stored in enumerate(order):
        prefix = f"blk.{stored}."
        named |= {f"blk.{i}.{name[len(prefix) :]}": w for name, w in weights.items() if name.startswith(prefix)}
    return meta | {"block_count": len(order), "blocks in a loop": length}, named


def blocks(meta: Mapping[str, Any]) -> int:
    """Return the number of blocks without those at the end that predict later tokens."""
    return meta["block_count"] - meta.get("nextn_predict_layers", 0)


def scalar(value: Any, layer: int) -> Any:
    """Some sizes may be stored per layer."""
    return value[layer] if isinstance(value, (list, tuple)) else value


def linear(model: Oracle, name: str, x: Tensor) -> Tensor:
    """Apply W x + b; the bias is optional for every matrix."""
    y = x @ model.weights[f"{name}.weight"].T
    b = model.weights.get(f"{name}.bias")
    return y if b is None else y + b


def root_mean_square(model: Oracle, x: Tensor, epsilon: float | None = None) -> Tensor:
    kind = "rms_" if model.facts.norm == "rms" else ""
    if epsilon is None:
        epsilon = model.metadata[f"attention.layer_norm_{kind}epsilon"] if model.facts.epsilon_read else 0.0
    return torch.sqrt((x * x).mean(-1, keepdim=True) + epsilon)


POST_NORMS = ("post_attention_norm", "post_ffw_norm")


def norm(model: Oracle, name: str, x: Tensor, *, frozen: bool) -> Tensor:
    """Apply RMSNorm or LayerNorm over the last axis; centering is linear and stays alive, the scale may be frozen."""
    if model.facts.norm == "ln":
        x = x - x.mean(-1, keepdim=True)
    scale = 1 / root_mean_square(model, x, model.facts.post_epsilon if name.split(".")[-1] in POST_NORMS else None)
    weight = 1.0
    if model.facts.norm_weights:
        weight = model.weights[name if name in model.weights else f"{name}.weight"]
    y = x * (scale.detach() if frozen else scale) * weight
    return y + model.weights.get(f"{name}.bias", 0.0)


def window(model: Oracle, layer: int) -> int | None:
    """Return how many positions a query of this layer sees, itself included; None: all before it."""
    meta, facts = model.metadata, model.facts
    size = meta.get("attention.sliding_window", None if facts.window_fixed else facts.window)
    size = facts.window if facts.window_always else size
    if facts.period is None or not size or facts.windowed_at not in (None, blocks(meta)):
        return None
    pattern = meta.get("attention.sliding_window_pattern", facts.period)
    local = pattern[layer] if isinstance(pattern, list) else pattern == 0 or layer % pattern < pattern - 1
    if facts.full_first and not isinstance(pattern, list):
        local = pattern == 0 or layer % pattern > 0
    return (facts.window if facts.window_fixed else size) if local else None


def rope_angles(model: Oracle, layer: int, n: int, n_rot: int, context: int) -> tuple[Tensor, float]:
    """Return the angles [n, n_rot / 2] of every pair and the magnitude M that multiplies cos and sin."""
    meta, facts = model.metadata, model.facts
    local = window(model, layer) is not None
    base = meta.get("rope.freq_base", 10000.0)
    if alpha := meta.get("rope.scaling.alpha"):
        width = meta["attention.key_length"]
        base = base * alpha ** (width / (width - 2))
    if local and facts.local_base_key:
        base = meta.get("rope.freq_base_swa", facts.local_base or base)
    if facts.rope_keys != "all":
        base = base if facts.rope_keys == "base" else 10000.0
        return torch.arange(n)[:, None] * base ** (-torch.arange(0, n_rot, 2, dtype=torch.float64) / n_rot), 1.0
    kind = meta.get("rope.scaling.type", "linear")
    factor = meta.get("rope.scaling.factor", meta.get("rope.scale_linear", 1.0)) or 1.0
    if local and not facts.local_scaling:
        kind, factor = "none", 1.0
    elif local and facts.local_base_key and kind == "none":
        kind = "linear"  # "none" is for the global layers only
    original = meta.get("rope.scaling.original_context_length", meta["context_length"])
    magnitude = 1.0 if local and not facts.local_attn_factor else meta.get("rope.scaling.attn_factor", 1.0)
    pair = torch.arange(n_rot // 2, dtype=torch.float64)
    frequency = base ** (-2 * pair / n_rot)
    names = ["rope_freqs.weight", f"rope_factors_{'long' if context > original else 'short'}.weight"]
    factors = facts.factors and (facts.local_factors or not local)
    names = names[:: -1 if kind == "longrope" else 1] if factors else []
    frequency = frequency / next((model.weights[name][: len(pair)] for name in names if name in model.weights), 1.0)
    if kind in ("linear", "longrope"):
        frequency = frequency / factor
    elif kind == "yarn":

        def pair_with(turns: float) -> float:
            """Return the (fractional) pair that turns so often within the original context."""
            return n_rot * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

        fast, slow, multiplier = 32.0, 1.0, 0.0
        if facts.yarn_keys:
            fast = meta.get("rope.scaling.yarn_beta_fast", fast)
            slow = meta.get("rope.scaling.yarn_beta_slow", slow)
            multiplier = meta.get("rope.scaling.yarn_log_multiplier", multiplier)
        if facts.yarn_betas:
            fast = meta.get("rope.scaling.yarn_beta_fast", facts.yarn_betas)
            slow = meta.get("rope.scaling.yarn_beta_slow", slow)
        low = max(0, math.floor(pair_with(fast)))
        high = min(n_rot - 1, math.ceil(pair_with(slow)))
        kept = 1 - ((pair - low) / max(0.001, high - low)).clamp(0, 1)
        frequency = frequency * kept + frequency / factor * (1 - kept)
        magnitude *= (1 + 0.1 * math.log(factor)) / (1 + 0.1 * multiplier * math.log(factor))
    else:
        assert kind == "none", f"rope scaling {kind}"
    if sections := meta.get("rope.dimension_sections"):
        # Dealt to three axes, as many pairs as each has; what is left is of the fourth, which text has not.
        dealt = {3 * turn + axis for axis in range(3) for turn in range(sections[axis])}
        if facts.sections == "one after another":
            dealt = set(range(sections[0] + sections[1] + sections[2]))
        frequency = torch.stack([f if i in dealt else 0 * f for i, f in enumerate(frequency)])
    return torch.arange(n, dtype=torch.float64)[:, None] * frequency, magnitude


def rotate(x: Tensor, angles: Tensor, magnitude: float, *, pairs: str) -> Tensor:
    """Rotate the first 2 * angles.shape[1] dimensions of x [n, heads, hd]; the others pass through.

    Pairs are "adjacent" dimensions (0, 1), (2, 3), ... or of two "halves", (0, r / 2), (1, r / 2 + 1), ...
    """
    cos, sin = magnitude * angles.cos()[:, None], magnitude * angles.sin()[:, None]
    n_rot = 2 * angles.shape[1]
    if pairs == "adjacent":
        first, second = slice(0, n_rot, 2), slice(1, n_rot, 2)
    else:
        first, second = slice(0, n_rot // 2), slice(n_rot // 2, n_rot)
    a, b, out = x[..., first], x[..., second], x.clone()
    out[..., first] = a * cos - b * sin
    out[..., second] = a * sin + b * cos
    return out


def roped(model: Oracle, layer: int) -> bool:
    off = model.facts.finetuned_key and not model.metadata.get("rope.scaling.finetuned", True)
    if model.facts.rope is None or off or model.facts.roped_at not in (None, blocks(model.metadata)):
        return False
    windows = [window(model, i) for i in range(blocks(model.metadata))]
    local = windows[layer] is not None or windows == [None] * len(windows)
    listed = model.metadata.get("attention.rope_pattern", [True] * len(windows))
    rules = {"all": True, "local": local, "three of four": (layer + 1) % 4 != 0, "listed": listed[layer]}
    rules["local or dense"] = local or layer < model.metadata.get("leading_dense_block_count", 0)
    rules["not first of four"] = layer % 4 > 0 or len(windows) == 4 or not any(windows)
    return rules[model.facts.roped]


def of_kind(model: Oracle, layer: int, key: str, default: Any) -> Any:
    """Return a size that layers with a window may have a key of their own for."""
    value = model.metadata.get(key, default)
    return model.metadata.get(f"{key}_swa", value) if window(model, layer) is not None else value


def shape_of_heads(model: Oracle, layer: int) -> dict[str, tuple[int, int]]:
    """Return how many heads queries, keys and values have in a layer, and how wide they are."""
    meta = model.metadata
    heads = scalar(meta["attention.head_count"], layer)
    kv_heads = scalar(meta.get("attention.head_count_kv", heads), layer)
    hd = of_kind(model, layer, "attention.key_length", meta["embedding_length"] // heads)
    return {"q": (heads, hd), "k": (kv_heads, hd), "v": (kv_heads, of_kind(model, layer, "attention.value_length", hd))}


def projection(model: Oracle, layer: int, part: str, h: Tensor) -> Tensor:
    """Return the queries, keys or values of h, "q", "k" or "v", before norms; without their matrix, values are keys."""
    b, limit = f"blk.{layer}", model.metadata.get("attention.clamp_kqv", 0.0)
    if f"{b}.attn_qkv.weight" in model.weights:
        qkv = linear(model, f"{b}.attn_qkv", h)
        if f"{b}.attn_qkv.bias" not in model.weights and f"{b}.attn_q.bias" in model.weights:
            qkv = qkv + torch.cat([model.weights[f"{b}.attn_{name}.bias"] for name in "qkv"])
        widths = [heads * hd for heads, hd in shape_of_heads(model, layer).values()]
        widths[0] *= 2 if model.facts.query_gate else 1
        x = qkv.split(widths, dim=-1)["qkv".index(part)]
    else:
        missing = part == "v" and f"{b}.attn_v.weight" not in model.weights
        x = linear(model, f"{b}.attn_{'k' if missing else part}", h)
    if model.facts.clamp_key and limit:
        x = torch.where(x.abs() <= limit, x, limit * x.detach().sign())
    return x


def turned(model: Oracle, layer: int, part: str, h: Tensor, context: int) -> Tensor:
    """Return the queries or keys of h [n, heads, hd], normed and rotated."""
    facts, name = model.facts, f"blk.{layer}.attn_{part}_norm"
    heads, hd = shape_of_heads(model, layer)[part]
    x = projection(model, layer, part, h)
    if facts.qk_norm == "full":
        x = norm(model, name, x, frozen=False)
    x = x.reshape(len(h), heads, -1)[..., :hd]  # without the queries' gates
    if facts.qk_norm == "head" and f"{name}.weight" in model.weights:
        x = norm(model, name, x, frozen=False)
    if roped(model, layer):
        n_rot = of_kind(model, layer, "rope.dimension_count", hd) if facts.rope_keys == "all" else hd
        n_rot //= 2 if facts.halved and window(model, layer) is None else 1
        angles, magnitude = rope_angles(model, layer, len(h), n_rot, context)
        x = rotate(x, angles, magnitude, pairs=facts.rope)
        if facts.qk_norm == "bare" and model.metadata.get("expert_count") != facts.unnormed:
            x = x / root_mean_square(model, x)
    if facts.qk_norm == "gained":
        x = x / root_mean_square(model, x) * model.weights.get(f"{name}.weight", 1.0)
    return norm(model, name, x, frozen=False) if facts.qk_norm == "head after rope" else x


def values(model: Oracle, layer: int, h: Tensor, *, frozen: bool) -> Tensor:
    """Return the values of h [n, kv heads, hd]."""
    v = projection(model, layer, "v", h).reshape(len(h), *shape_of_heads(model, layer)["v"])
    if not model.facts.value_norm:
        return v
    size = root_mean_square(model, v)
    return v / (size.detach() if frozen else size)


def alibi_slope(model: Oracle, head: int, heads: int) -> float:
    """Return by how much a head's scores fall with each position of distance (Press et al., arXiv 2108.12409).

    Of 2^k heads, the slopes are every step of a geometric series that ends at 2^-bias. Those of the heads beyond are
    every other step of the series for 2^(k + 1) heads, from its first on.
    """
    facts = model.facts
    bias = model.metadata.get(facts.alibi, 0.0) if isinstance(facts.alibi, str) else facts.alibi
    if not bias or facts.alibi_at not in (None, blocks(model.metadata)):
        return 0.0
    power = 2 ** int(math.log2(heads))
    series = [2 ** (-bias * step / power) for step in range(1, power + 1)]
    finer = [2 ** (-bias * step / (2 * power)) for step in range(1, 2 * power + 1)]
    return (series + finer[::2])[head]


def attention(
    model: Oracle, layer: int, h: Tensor, *, frozen: bool, context: int, source: tuple[int, Tensor] | None = None
) -> Tensor:
    """Causal attention on the normed input h [n, d], through the output projection.

    `source` is the earlier layer whose keys and values are read, and what that layer's attention reads; None: this one.
    """
    meta, facts, b, n = model.metadata, model.facts, f"blk.{layer}", len(h)
    heads, hd = shape_of_heads(model, layer)["q"]
    at, read = source or (layer, h)
    q, k = turned(model, layer, "q", h, context), turned(model, at, "k", read, context)
    v = values(model, at, read, frozen=frozen)
    kv_heads = v.shape[1]
    position = torch.arange(n)
    scale = (meta["embedding_length"] // heads if blocks(meta) == facts.width_scaled_at else hd) ** facts.attn_power
    scale = facts.attn_scale or scale
    if facts.attn_scale_key:
        scale = meta.get(facts.attn_scale_key, 0.0) or scale
    if facts.mscale:
        scale *= oracle_latent.stretched(meta, meta.get("rope.scaling.attn_factor", 1.0), facts.mscale)[1]
    scale = torch.full((n, 1), scale, dtype=torch.float64)
    if facts.temperature and meta.get("attention.temperature_scale"):
        original = meta.get("rope.scaling.original_context_length", meta["context_length"])
        scale = (
            scale * (1 + meta["attention.temperature_scale"] * torch.log((position // original + 1).double()))[:, None]
        )
    cap = None if facts.attn_cap is None else meta.get("attn_logit_softcapping", facts.attn_cap)
    distance = position[:, None] - position
    hidden = (distance < 0) | (distance >= (window(model, layer) or n))
    outputs = []
    if facts.query_gate:
        gates = projection(model, layer, "q", h).reshape(n, heads, -1)[..., hd:]
    for head in range(heads):
        group = head // (heads // kv_heads)
        scores = q[:, head] @ k[:, group].T * scale
        if cap:
            scores = cap * torch.tanh(scores / cap)
        scores = scores - alibi_slope(model, head, heads) * distance
        scores = scores.masked_fill(hidden, -math.inf)
        if f"{b}.attn_sinks.weight" in model.weights:
            sink = model.weights[f"{b}.attn_sinks.weight"][head].expand(n, 1)
            p = torch.cat([scores, sink], dim=-1).softmax(-1)[:, :-1]
        else:
            p = scores.softmax(-1)
        outputs.append((p.detach() if frozen else p) @ v[:, group])
        if facts.query_gate:
            share = torch.sigmoid(gates[:, head])
            outputs[-1] = outputs[-1] * (share.detach() if frozen else share)
    read = torch.cat(outputs, dim=-1)
    if f"{b}.attn_gate.weight" in model.weights:
        gate = facts.head_gate(linear(model, f"{b}.attn_gate", h))
        gate = gate[..., None].expand(n, -1, read.shape[1] // gate.shape[1]).flatten(1)
        read = read * (gate.detach() if frozen else gate)
    if f"{b}.attn_sub_norm.weight" in model.weights:
        read = norm(model, f"{b}.attn_sub_norm", read, frozen=frozen)
    return linear(model, f"{b}.attn_output", read)


def only_projected(model: Oracle, layer: int, h: Tensor, **_: Any) -> Tensor:
    """Return what stands in place of attention in some pruned layers."""
    return linear(model, f"blk.{layer}.attn_output", h)


def recurrent(mixer: Callable[..., Tensor], **options: Any) -> Callable[..., Tensor]:
    """Return a mixer of another module, which sees its block's tensors and the metadata only."""

    def mix(model: Oracle, layer: int, h: Tensor, *, frozen: bool, context: int) -> Tensor:
        return mixer(tensors_of(model, layer), model.metadata, h, frozen=frozen, **options)

    return mix


def latent_attention(model: Oracle, layer: int, h: Tensor, *, frozen: bool, context: int) -> Tensor:
    """Causal latent attention on the normed input h [n, d], through the output projection."""
    meta, facts, n = model.metadata, model.facts, len(h)
    w = {name.removesuffix(".weight"): value for name, value in tensors_of(model, layer).items()}
    angles, magnitude = rope_angles(model, layer, n, meta["rope.dimension_count"], context)
    magnitude, factor = oracle_latent.stretched(meta, magnitude, facts.mscale)
    return oracle_latent.attention(
        w,
        h,
        heads=scalar(meta["attention.head_count"], layer),
        eps=meta["attention.layer_norm_rms_epsilon"],
        turn=lambda x: rotate(x, angles, magnitude, pairs=facts.rope) if roped(model, layer) else x,
        factor=factor * oracle_latent.temperatures(meta if facts.temperature else {}, n),
        window=window(model, layer),
        frozen=frozen,
    )


def compressed_attention(model: Oracle, layer: int, h: Tensor, *, frozen: bool, context: int) -> Tensor:
    """Causal attention with a compressed memory on the normed input h [n, d], through the output projection.

    Layers with such a memory have a base of their own; the others do without the file's scaling. Neither scales cos and
    sin.
    """
    meta, ratio = model.metadata, model.metadata["attention.compress_ratios"][layer]
    if ratio:
        meta = meta | {"rope.freq_base": meta["attention.compress_rope_freq_base"]}
    else:
        meta = {key: value for key, value in meta.items() if not key.startswith("rope.scal")}
    angles, _ = rope_angles(model._replace(metadata=meta), layer, len(h), meta["rope.dimension_count"], context)

    def turn(x: Tensor, position: int, direction: int) -> Tensor:
        still, turning = x.tensor_split([x.shape[1] - 2 * angles.shape[1]], dim=1)
        cos, sin = angles[position].cos(), direction * angles[position].sin()
        a, b = turning[:, 0::2], turning[:, 1::2]
        return torch.cat([still, torch.stack([a * cos - b * sin, a * sin + b * cos], dim=2).flatten(1)], dim=1)

    return oracle_compressed.attention(
        {name.removesuffix(".weight"): value for name, value in tensors_of(model, layer).items()},
        h,
        heads=meta["attention.head_count"],
        groups=meta["attention.output_group_count"],
        eps=meta["attention.layer_norm_rms_epsilon"],
        turn=turn,
        ratio=ratio,
        window=meta["attention.sliding_window"],
        frozen=frozen,
    )


def tensors_of(model: Oracle, layer: int) -> dict[str, Tensor]:
    """Return a block's tensors, by their names without the block's."""
    prefix = f"blk.{layer}."
    return {name.removeprefix(prefix): w for name, w in model.weights.items() if name.startswith(prefix)}


def lightning(model: Oracle, layer: int, h: Tensor, *, frozen: bool, context: int) -> Tensor:
    """Apply lightning attention, which fades less in later blocks, through the output projection."""
    depth = layer / (blocks(model.metadata) - 1)
    return oracle_delta.lightning(tensors_of(model, layer), model.metadata, h, depth=depth, frozen=frozen)


# What mixes positions in a block, each on the normed input h [n, d] and through the output projection.
MIXERS: dict[str, Callable[..., Tensor]] = {
    "attention": attention,
    "latent": latent_attention,
    "compressed": compressed_attention,
    "linear": only_projected,
    "mamba": oracle_state.mamba,
    "mamba2": oracle_state.mamba2,
    "plamo2": oracle_state.plamo2,
    "rwkv6": oracle_rwkv.rwkv6,
    "rwkv7": oracle_rwkv.rwkv7,
    "delta": recurrent(oracle_delta.gated_delta, grouped=False),
    "grouped delta": recurrent(oracle_delta.gated_delta, grouped=True),
    "convolution": recurrent(oracle_delta.short_convolution),
    "lightning": lightning,
    "kda": recurrent(oracle_delta.kimi_delta, bound=""),
    "bounded kda": recurrent(oracle_delta.kimi_delta, bound="positive"),
    "k3 kda": recurrent(oracle_delta.kimi_delta, bound="negative"),
    "glm kda": recurrent(oracle_delta.kimi_delta, bound="negative", key_eps=1e-6),
}


def slope(kind: str, g: Tensor) -> Tensor:
    """Return act(g) / g, the factor that is frozen when the path through g stays alive."""
    if kind == "gelu":  # its tanh form
        return (1 + torch.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3))) / 2
    if kind == "relu2":
        return g.clamp(min=0)
    if kind == "relu":
        return (g > 0).double()
    return torch.sigmoid(1.702 * g if kind == "oai" else g)


def gelu_by_table(g: Tensor) -> Tensor:
    """Return GELU as ggml's CPU code has it: argument and value rounded to half precision, for parity only."""
    rounded = g.half().double()
    value = (rounded * slope("gelu", rounded)).half().double()
    return torch.where(g <= -10, 0.0, torch.where(g >= 10, g, value))


def xielu(g: Tensor, alpha_n: float, alpha_p: float, beta: float, eps: float) -> Tensor:
    """Return xIELU as ggml computes it, step below zero included."""
    inside = [math.log(1 + math.exp(alpha)) for alpha in (alpha_n, alpha_p)]
    curved = torch.where(g > 0, inside[1] * g * g, (beta + inside[0]) * (torch.expm1(g.clamp(max=eps)) - g))
    return curved + beta * g


def situ(z: Tensor, limit: float) -> Tensor:
    """Return what is left of z within a soft limit, by z."""
    return limit * torch.tanh(z / limit) / z


def activate(facts: Facts, gate: Tensor, up: Tensor | None, *, freeze: str | None, gelu: str) -> Tensor:
    """Return act(gate) * up, or act(gate) where there is no up, with one factor alive if `freeze` names it."""
    if facts.activation == "oai":
        limit = torch.as_tensor(facts.limit, dtype=torch.float64)
        gate = gate.minimum(limit)
        up = up.minimum(limit).maximum(-limit) + facts.shift
    clamp = torch.as_tensor(facts.clamp or math.inf, dtype=torch.float64)
    up = up if up is None else up.minimum(clamp).maximum(-clamp)
    if facts.clamp_first:
        gate, clamp = gate.minimum(clamp), torch.full_like(clamp, math.inf)
    factor = xielu(gate, *facts.xielu) / gate if facts.xielu else slope(facts.activation, gate)
    if facts.activation == "situ":
        factor = situ(gate, facts.situ[0]) * torch.sigmoid(gate)
        bent = situ(up, facts.situ[1]) if facts.situ[1] else torch.ones_like(up)
        up = up * (bent if freeze is None else bent.detach())
    if gelu == "f16_table" and facts.activation == "gelu":
        assert freeze is None, "the table has no derivative"
        return gelu_by_table(gate) * (1.0 if up is None else up)
    if up is None:
        return gate * (factor if freeze is None else factor.detach())
    if freeze == "up":  # the path through `up` stays alive
        return (gate * factor).minimum(clamp).detach() * up
    if freeze == "gate":  # the linear factor of the gate stays alive
        return (gate * factor.detach()).minimum(clamp) * up.detach()
    return (gate * factor).minimum(clamp) * up


def clamped(model: Oracle, b: str, key: str) -> Facts:
    """Return the facts with layer `b`'s limit, where the file has any."""
    read = model.facts.clamp_keys and (key == "swiglu_clamp_exp" or model.facts.clamp_shared)
    if model.facts.clamp_alike and key not in model.metadata:
        key = "swiglu_clamp_exp"
    limits = model.metadata.get(key, 0.0) if read else 0.0
    return model.facts._replace(clamp=scalar(limits, int(b.removeprefix("blk."))))


def dense(model: Oracle, b: str, h: Tensor, suffix: str = "", **how: Any) -> Tensor:
    """Apply a feed-forward network of layer `b`; `suffix` is `_shexp` for an expert that all share."""
    up, facts = linear(model, f"{b}.ffn_up{suffix}", h), clamped(model, b, "swiglu_clamp_shexp")
    if facts.activation == "xielu":
        layer, names = int(b.removeprefix("blk.")), ("alpha_n", "alpha_p", "beta", "eps")
        facts = facts._replace(xielu=tuple(scalar(model.metadata[f"xielu.{name}"], layer) for name in names))
    form = facts.shared_ffn if suffix and facts.shared_ffn else facts.ffn
    if form == "plain":
        gate, up = up, None
    elif form == "fused":
        gate, up = up.chunk(2, dim=-1)
    else:
        gate = linear(model, f"{b}.ffn_gate{suffix}", h)
    if int(b.removeprefix("blk.")) < facts.sparse:
        least = gate.mean(1, keepdim=True) + 1.6448533535003662 * gate.std(1, keepdim=True)
        gate = torch.relu(gate - (least if how["freeze"] is None else least.detach() * facts.bound))
    hidden = activate(facts, gate, up, **how) / model.weights.get(f"{b}.ffn.act{suffix}.scales", 1.0)
    if f"{b}.ffn_sub_norm{suffix}.weight" in model.weights:
        hidden = norm(model, f"{b}.ffn_sub_norm{suffix}", hidden, frozen=how["freeze"] is not None)
    return linear(model, f"{b}.ffn_down{suffix}", hidden)


def router_input(model: Oracle, b: str, stream: Tensor) -> Tensor:
    """Return the stream normed without weights and scaled, per dimension and by sqrt(d)."""
    scale = model.weights[f"{b}.ffn_gate_inp.scale"] / math.sqrt(stream.shape[-1])
    return stream / root_mean_square(model, stream) * scale


def routes(model: Oracle, b: str, h: Tensor, group: int = 1) -> tuple[Tensor, Tensor]:
    """Return the experts chosen [n, used] and their weights [n, used].

    Of a mixture with one expert for each `group`, those of the chosen ones; their weights are of the experts in the
    router that have their numbers.
    """
    logits, meta, facts = linear(model, f"{b}.ffn_gate_inp", h), model.metadata, model.facts
    used = experts_used(model, b)
    if facts.router == "selected":
        chosen = logits.topk(used).indices
        return chosen, logits.gather(-1, chosen).softmax(-1)
    router = {0: facts.router, 1: "all", 2: "each", 4: "root"}[
        meta.get("expert_gating_func", 0) if facts.router_key else 0
    ]
    p = logits.softmax(-1) if router == "all" else 1 / (1 + torch.exp(-logits))
    if router == "root":
        p = torch.log(1 + torch.exp(logits)).sqrt()
    if f"{b}.ffn_gate_tid2eid.weight" in model.weights:
        chosen = model.weights[f"{b}.ffn_gate_tid2eid.weight"].long()[model.tokens]
    else:
        chosen = torch.tensor([choice(model, b, row) for row in p.detach()])
    chosen = chosen.div(group, rounding_mode="floor")
    weights = p.gather(-1, chosen)
    if meta.get("expert_weights_norm", False) if facts.renormalise is None else facts.renormalise:
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=2**-14)
    scale = meta.get("expert_weights_scale", 0.0) if facts.routed_scale_key else 0.0
    return chosen, weights * (scale or 1.0)


def experts_used(model: Oracle, b: str) -> int:
    return scalar(model.metadata["expert_used_count"], int(b.removeprefix("blk.")))


def choice(model: Oracle, b: str, p: Tensor) -> list[int]:
    """Return the best experts of one position with shares `p` [experts], of the best groups if there are any."""
    merit = p + model.weights.get(f"{b}.exp_probs_b.bias", model.weights.get(f"{b}.exp_probs_b", 0.0))
    groups = list(merit.chunk(model.metadata.get("expert_group_count", 1)))
    if len(groups) > 1:
        ranking = sorted(groups, key=lambda group: -sum(sorted(group.tolist())[-2:]))
        best = ranking[: model.metadata["expert_group_used_count"]]
        groups = [group if any(group is one for one in best) else group - 1e9 for group in groups]
    return torch.cat(groups).argsort(descending=True)[: experts_used(model, b)].tolist()


def mixture(
    model: Oracle, b: str, h: Tensor, *, stream: Tensor | None = None, entry: Tensor | None = None, **how: Any
) -> Tensor:
    """Apply the chosen experts of layer `b`, position by position, and the shared expert where there is one.

    `h` is what the experts read; some routers read the stream before its norm, through one of their own, or the stream
    before the block, `entry`.
    """
    reads = {"branch": h, "block": entry}
    if model.facts.router_reads == "stream":
        reads["stream"] = router_input(model, b, stream)
    chosen, weights = routes(model, b, reads[model.facts.router_reads])
    if how["freeze"] is not None:
        weights = weights.detach()
    facts = clamped(model, b, "swiglu_clamp_exp")
    latent = next((name for name in ("latent", "routed") if f"{b}.ffn_{name}_down.weight" in model.weights), None)
    read = linear(model, f"{b}.ffn_{latent}_down", h) if latent else h
    y = weighted(model, b, read, "exps", chosen, weights, **how)
    if f"{b}.ffn_routed_norm.weight" in model.weights:
        y = norm(model, f"{b}.ffn_routed_norm", y, frozen=how["freeze"] is not None)
    if latent:
        y = linear(model, f"{b}.ffn_{latent}_up", y)
    if f"{b}.ffn_up_chexps.weight" in model.weights:
        chosen, weights = routes(model, b, h, model.metadata["experts_per_group"])
        if how["freeze"] is not None:
            weights = weights.detach()
        scale = model.metadata["expert_group_scale"]
        y = y + scale * weighted(model, b, y, "chexps", chosen, weights, **how)
    if f"{b}.ffn_up_shexp.weight" in model.weights:
        share = torch.ones(())
        if f"{b}.ffn_gate_inp_shexp.weight" in model.weights:
            share = torch.sigmoid(h @ model.weights[f"{b}.ffn_gate_inp_shexp.weight"].flatten())[:, None]
        y = y + (share if how["freeze"] is None else share.detach()) * dense(model, b, h, "_shexp", **how)
        y = y * facts.joint_scale
    return y


def weighted(model: Oracle, b: str, h: Tensor, kind: str, chosen: Tensor, weights: Tensor, **how: Any) -> Tensor:
    """Apply the chosen experts, `kind` of which layer `b` has, to h [n, d], and add them up with their weights."""
    facts, rows = clamped(model, b, "swiglu_clamp_exp"), []
    for i, before in enumerate(h):
        row = torch.zeros_like(before)
        for expert, weight in zip(chosen[i].tolist(), weights[i], strict=True):
            x = before if facts.weighted == "output" else weight * before

            def apply(name: str, x: Tensor, expert: int = expert) -> Tensor:
                y = model.weights[f"{b}.{name}.weight"][expert] @ x
                if f"{b}.{name}.scale" in model.weights:
                    y = y * model.weights[f"{b}.{name}.scale"][expert]
                return y + model.weights[f"{b}.{name}.bias"][expert] if f"{b}.{name}.bias" in model.weights else y

            if f"{b}.ffn_gate_up_{kind}.weight" in model.weights:
                gate, up = apply(f"ffn_gate_up_{kind}", x).chunk(2)
            elif model.facts.ffn == "plain":
                gate, up = apply(f"ffn_up_{kind}", x), None
            else:
                gate, up = apply(f"ffn_gate_{kind}", x), apply(f"ffn_up_{kind}", x)
            added = apply(f"ffn_down_{kind}", activate(facts, gate, up, **how))
            row = row + (weight * added if facts.weighted == "output" else added)
        rows.append(row)
    return torch.stack(rows)


def embed(model: Oracle, ids: Sequence[int] | Tensor) -> Tensor:
    """Return the inputs of block 0 [n, d]: embeddings, scaled as the family has it, and learned positions."""
    x = model.weights["token_embd.weight"][torch.as_tensor(ids)]
    if model.facts.embedding == "root":
        x = x * float(np.float32(math.sqrt(model.metadata["embedding_length"])))  # llama.cpp: sqrtf
    elif model.facts.embedding == "key":
        x = x * (model.metadata.get("embedding_scale", 0.0) or 1.0)
    elif model.facts.embedding == "normed":
        x = x / root_mean_square(model, x)
    elif model.facts.embedding == "norm":
        x = norm(model, "token_embd_norm", x, frozen=False)
    if "position_embd.weight" in model.weights:
        x = x + model.weights["position_embd.weight"][: len(x)]
    return x


def branch_norm(model: Oracle, b: str, name: str | None, x: Tensor, *, frozen: bool) -> Tensor:
    """Apply the norm `name` of a block before or after a branch; None: there is none."""
    return x if name is None else norm(model, f"{b}.{name}", x, frozen=frozen)


def feed_forward(model: Oracle, b: str, x: Tensor, entry: Tensor, before: str | None, **how: Any) -> Tensor:
    """Apply what a block has after its mixer to the stream x [n, d]: one network, or several added, between norms.

    `entry` is the stream before the block.
    """
    facts, frozen = model.facts, how["freeze"] is not None
    routed = f"{b}.ffn_gate_inp.weight" in model.weights
    parts = (Part("mixture" if routed else "dense", before, None),)
    if routed and facts.parts:
        parts = facts.parts
    if facts.dense_optional and f"{b}.ffn_up.weight" not in model.weights:
        parts = parts[1:]
    y = torch.zeros_like(x)
    for network, before, after, reads in parts:
        h = branch_norm(model, b, before, entry if reads == "block" else x, frozen=frozen)
        routed = network == "mixture"
        if f"{b}.channel_mix_key.weight" in model.weights:
            return oracle_rwkv.channel_mix(model, b, h, frozen=frozen)
        added = mixture(model, b, h, stream=x, entry=entry, **how) if routed else dense(model, b, h, **how)
        y = y + branch_norm(model, b, after, added, frozen=frozen)
    y = y * (facts.joint_scale if len(parts) > 1 else 1.0)
    other = facts.ffn_post_instead
    post = other if other and f"{b}.{other}.weight" in model.weights else facts.ffn_post
    return branch_norm(model, b, post, y, frozen=frozen)


def per_layer_inputs(model: Oracle, ids: Sequence[int] | Tensor, x: Tensor) -> Tensor:
    """Return what every layer reads of the tokens [n, layers, width]: from a table, and of the block-0 inputs x."""
    meta, weights = model.metadata, model.weights
    width = model.facts.inputs_width or meta["embedding_length_per_layer_input"]
    shape = (len(x), meta["block_count"], -1)
    table = weights["per_layer_token_embd.weight"][torch.as_tensor(ids)].reshape(shape) * math.sqrt(width)
    projected = (x @ weights["per_layer_model_proj.weight"].T).reshape(shape) / math.sqrt(x.shape[1])
    return (norm(model, "per_layer_proj_norm", projected, frozen=False) + table) / math.sqrt(2)


def per_layer_branch(model: Oracle, b: str, x: Tensor, inputs: Tensor, **how: Any) -> Tensor:
    """Return what a block adds by its inputs of the tokens [n, width]: a gate on the stream x is what stays alive."""
    frozen, predicted = how["freeze"] is not None, model.facts.streams == "predicted"
    if predicted:
        x = x[:, : model.metadata["embedding_length"]] * model.weights[f"{b}.altup_correct_scale.weight"]
    gate = activate(model.facts, linear(model, f"{b}.inp_gate", x), None, **how)
    made = linear(model, f"{b}.proj", gate * (inputs.detach() if frozen else inputs))
    added = norm(model, f"{b}.post_norm", made, frozen=frozen)
    return torch.cat([torch.zeros_like(added), *3 * [added]], dim=1) if predicted else added


def source_of(model: Oracle, layer: int) -> int | None:
    """Return the layer whose keys and values this one reads; None: its own. The last before the first such layer."""
    if model.facts.first_values:
        return 0 if layer else None
    first = model.facts.shared_from
    if first is None:
        first = model.metadata["block_count"] - model.metadata.get("attention.shared_kv_layers", 0)
        first = first if model.facts.shared_kv_key else math.inf
    if layer < first:
        return None
    return first - (1 if window(model, layer) is None else 2)


def block(
    model: Oracle,
    layer: int,
    x: Tensor,
    *,
    freeze: str | None = None,
    context: int | None = None,
    gelu: str = "exact",
    states: Mapping[str, Tensor] = {},
) -> dict[str, Tensor]:
    """Compute layer `layer` on its input x [n, d]; arguments and results are those of `forward`.

    A branch that the block does not have adds zeros. `states` are those before the block, by the names of `forward`,
    for families whose blocks read what earlier ones had.
    """
    model = model._replace(tokens=states.get("tokens"))
    facts, b, frozen = model.facts, f"blk.{layer}", freeze is not None
    x = entered(model, layer, x, frozen=frozen)
    scale = (model.metadata.get("residual_scale", 0.0) or 1.0) if facts.residual_key else 1.0
    how = {"frozen": frozen, "context": len(x) if context is None else context}
    # Falcon 40B has a norm of its own for the attention; the usual one is then the feed-forward's.
    own = facts.parallel and f"{b}.attn_norm_2.weight" in model.weights
    mixers = facts.mixers(model, layer)
    read, after_attn = connected(model, b, "attn", x, frozen=frozen)
    h = branch_norm(model, b, "attn_norm_2" if own else facts.attn_norm, read, frozen=frozen) if mixers else x
    if (source := source_of(model, layer)) is not None:
        stream = states[f"l_out-{source - 1}"] if source else states["x"]
        stream = connected(model, f"blk.{source}", "attn", stream, frozen=frozen)[0]
        how["source"] = source, branch_norm(model, f"blk.{source}", facts.attn_norm, stream, frozen=frozen)
    mixed = {kind: MIXERS[kind](model, layer, h, **how) for kind in mixers}
    attn = ffn = torch.zeros_like(read)
    if mixed:
        attn = branch_norm(model, b, facts.attn_post, sum(mixed.values()), frozen=frozen) * scale
        if facts.value_scale_key:
            attn = attn * (model.metadata.get("attention.value_scale", 0.0) or 1.0)
    if facts.laurel:
        low_rank = linear(model, f"{b}.laurel_r", linear(model, f"{b}.laurel_l", h))
        attn = attn + h + norm(model, f"{b}.laurel_post_norm", low_rank, frozen=frozen)
    middle = attn + model.metadata["residual_scale"] * h if facts.normed_skip else after_attn(attn)
    read, after_ffn = connected(model, b, "ffn", middle, frozen=frozen)
    shared = facts.parallel or (facts.ffn_norm_optional and f"{b}.ffn_norm.weight" not in model.weights)
    together = shared or (facts.parallel_key and model.metadata["use_parallel_residual"])
    if any(f"{b}.{name}.weight" in model.weights for name in ("ffn_down", "ffn_down_exps", "channel_mix_key")):
        before = facts.attn_norm if shared else facts.ffn_norm
        ffn = feed_forward(model, b, x if together else read, x, before, freeze=freeze, gelu=gelu) * scale
    more, out = {}, after_ffn(ffn)
    if facts.normed_skip:
        out = ffn + model.metadata["residual_scale"] * branch_norm(model, b, facts.ffn_norm, middle, frozen=frozen)
    if f"{b}.inp_gate.weight" in model.weights:
        inputs = states["per_layer_inputs"][:, layer]
        more["per_layer_out"] = per_layer_branch(model, b, out, inputs, freeze=freeze, gelu=gelu)
    factor = model.weights.get(f"{b}.layer_output_scale.weight", 1.0) if facts.streams != "input" else 1.0
    out = (out + sum(more.values())) * factor
    halved = model.metadata.get("rescale_every_n_layers", 0)
    out = out / 2 if halved and (layer + 1) % halved == 0 else out
    states = {"attn_out": attn, "ffn_inp": middle, "ffn_out": ffn, "l_out": out} | mixed | more
    return {f"{name}-{layer}": state for name, state in states.items()}


def entered(model: Oracle, layer: int, x: Tensor, *, frozen: bool) -> Tensor:
    """Return the stream with which a layer begins: where a pass over blocks does, from what the last one has left.

    Where the input of the first layer is kept beside the stream, that is of both.
    """
    if model.facts.streams == "input" and layer == 0:
        return torch.cat([x, x], dim=1)
    if model.facts.streams == "predicted" and layer == 0:
        return oracle_altup.opened(model.weights, x, frozen=frozen)
    if not model.facts.looped or layer % model.metadata["blocks in a loop"]:
        return x
    normed = functools.partial(norm, model, model.facts.final_norm, frozen=frozen)
    if model.facts.streams == "held":
        return oracle_streams.turned(model.metadata, model.weights["hrm.z_l_init"], layer, x, normed)
    return normed(x) if layer and not model.metadata.get("skip_loop_final_norm") else x


# Two streams, of which branches read and write the first.
TWO = ("held", "input")
# Kinds of streams of which branches write the first alone.
FIRST_RUNS = ("over depth", *TWO)


def connected(
    model: Oracle, b: str, branch: str, x: Tensor, *, frozen: bool
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Return what a branch reads, before its norm, and the stream after the branch as a function of what it adds."""
    if not model.facts.streams:
        return x, lambda added: x + added
    layer, mixed = int(b.removeprefix("blk.")), model.facts.streams == "mixed"
    w = tensors_of(model, layer)
    if model.facts.streams in TWO:
        own, other = x.chunk(2, dim=1)
        again = model.facts.streams == "input" and branch == "ffn"
        share = w["layer_output_scale.weight"] if again else 0.0
        return own, lambda added: torch.cat([own + added + share * other, other], dim=1)
    if model.facts.streams == "predicted":
        around = oracle_altup.before_attention if branch == "attn" else oracle_altup.before_ffn
        return around(w, x, model.metadata["attention.layer_norm_rms_epsilon"], frozen=frozen)
    if model.facts.streams == "over depth":
        return oracle_streams.connection_over_depth(w, model.metadata, layer, branch, x, frozen=frozen)
    return oracle_streams.connection(w, model.metadata, f"hc_{branch}", x, mixed=mixed, frozen=frozen)


def final_norm(model: Oracle, x: Tensor, *, frozen: bool) -> Tensor:
    """Apply the norm before the head to the stream, or to what it reads of several."""
    width = model.metadata["embedding_length"]
    if model.facts.streams in TWO:
        x = x[:, :width]
    elif model.facts.streams == "predicted":
        x = oracle_altup.closed(model.weights, x, frozen=frozen) if x.shape[1] > width else x
    elif model.facts.streams == "over depth":
        x = oracle_streams.collected_over_depth(model.weights, model.metadata, x, frozen=frozen)
    elif model.facts.streams:
        x = oracle_streams.collected(model.weights, model.metadata, x, frozen=frozen)
    return norm(model, model.facts.final_norm, x, frozen=frozen)


def forward(
    model: Oracle,
    ids: Sequence[int] | Tensor,
    *,
    freeze: str | None = None,
    x: Tensor | None = None,
    context: int | None = None,
    gelu: str = "exact",
) -> dict[str, Tensor]:
    """Compute every state of the model on token `ids` [n], or on block-0 inputs `x` [n, d] in their place.

    `freeze` names the live path of the feed-forward, "up" or "gate", and detaches norm scales, attention, routing and
    the other factor; None is the ordinary model. The values do not depend on it, only the derivatives do.
    `context` is the size that chooses between short and long rope factors: None is the prompt's own length, llama.cpp
    counts what its context can hold. `gelu` "f16_table" emulates ggml's GELU on the CPU.

    Returns, by llama.cpp's names where they mean the same: `x` [n, d]; per layer `attn_out-i` and `ffn_out-i` [n, d],
    each exactly what is added to the residual stream, `ffn_inp-i`, the stream and attn_out, and `l_out-i`, with what
    each mixer of the layer returns under the mixer's name; `result_norm` [n, d]; `logits` [n, v].
    """
    assert freeze in (None, "up", "gate"), freeze
    assert gelu in ("exact", "f16_table"), gelu
    meta = model.metadata
    x = embed(model, ids) if x is None else x
    out = {"x": x, "tokens": torch.as_tensor(ids)}
    if "per_layer_token_embd.weight" in model.weights:
        out["per_layer_inputs"] = per_layer_inputs(model, ids, x)
    for layer in range(blocks(meta)):
        out |= block(model, layer, x, freeze=freeze, context=context, gelu=gelu, states=out)
        x = out[f"l_out-{layer}"]
    out["result_norm"] = final_norm(model, x, frozen=freeze is not None)
    return out | {"logits": head(model, out["result_norm"])}


def head(model: Oracle, y: Tensor, *, capped: bool = True) -> Tensor:
    """Return the logits `[n, v]` of outputs of the final norm, with the soft cap or before it."""
    meta, facts = model.metadata, model.facts
    logits = y @ model.weights.get("output.weight", model.weights["token_embd.weight"]).T
    logits = logits + model.weights.get("output.bias", 0.0)
    if facts.logits is not None:
        scale = meta.get("logit_scale", 0.0) or 1.0
        logits = logits / scale if facts.logits == "divide" else logits * scale
    stated = meta.get("final_logit_softcapping", facts.final_cap)
    if capped and facts.final_cap is not None and (cap := stated if facts.final_cap_key else facts.final_cap):
        logits = cap * torch.tanh(logits / cap)
    return logits


def jacobian(
    source: Oracle | str | os.PathLike[str],
    ids: Sequence[int] | Tensor,
    *,
    mlp_path: str | None,
    position: int = -1,
    x: Tensor | None = None,
    context: int | None = None,
) -> Jacobian:
    """Differentiate the final norm's output at `position` with respect to the block-0 inputs, by autograd.

    `mlp_path` None gives the ordinary Jacobian, in which nothing is frozen. At a position before the last, the
    columns of J for later inputs are zero.
    """
    model = source if isinstance(source, Oracle) else load(source)
    if x is None:
        x = forward(model, ids)["x"]
    x = x.detach().double().requires_grad_()
    y = forward(model, ids, freeze=mlp_path, x=x, context=context)["result_norm"][position]
    identity = torch.eye(len(y), dtype=torch.float64)
    (J,) = torch.autograd.grad(y, x, identity, is_grads_batched=True)
    y, x = y.detach(), x.detach()
    return Jacobian(J, y, y - torch.einsum("end,nd->e", J, x), x)


def inner(
    model: Oracle,
    found: dict[str, Tensor],
    start: int,
    kind: str,
    index: int,
    *,
    position: int = -1,
    raw: bool = False,
    mlp_path: str | None = "up",
) -> Jacobian:
    """Differentiate a tap with respect to the stream after `start` blocks, by autograd.

    The tap is the stream after block `index` (counted from 1) or what its "attn" or "mlp" adds, at `position`; unless
    `raw` it is seen through the final norm, frozen there. `found` is what `forward` returned for the prompt. `mlp_path`
    None gives the ordinary Jacobian, in which nothing is frozen.
    """
    x = (found[f"l_out-{start - 1}"] if start else found["x"]).detach().clone().requires_grad_()
    states = found | {f"l_out-{start - 1}" if start else "x": x}
    h = x
    for i in range(start, index):
        states |= block(model, i, h, freeze=mlp_path, states=states)
        h = states[f"l_out-{i}"]
    name = {"layer": "l_out", "attn": "attn_out", "mlp": "ffn_out"}[kind]
    y = states[f"{name}-{index - 1}"] + 0 * x.sum()  # it may depend on x nowhere
    y = (y if raw else final_norm(model, y, frozen=mlp_path is not None))[position]
    (J,) = torch.autograd.grad(y, x, torch.eye(len(y), dtype=torch.float64), is_grads_batched=True)
    x, y = x.detach(), y.detach()
    return Jacobian(J, y, y - torch.einsum("end,nd->e", J, x), x)
