"""Write tiny random GGUF files for the tests: one table row, one variation.

`write(path, **row(name))` makes a complete file that llama.cpp loads. Weights are random but scaled like a trained
model's: residual stream and branches of order one, attention scores with a spread of about two (so attention is far
from uniform), gates with a spread of about one and a half (so silu is far from linear), norm weights around one. Every
tensor has its own generator, seeded by the option `seed` and its name: two files that differ in one option share all
other weights.

A new variation is a row of `CASES`, or for architectures other than a dense `llama` of `FAMILY_CASES` (families.py).
This module shares nothing with the package under test: it writes through the `gguf` package and quantizes through
`gguf` or llama.cpp.
"""

import contextlib
import ctypes
import dataclasses
import functools
import logging
import math
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
from families import FAMILY_CASES

INDEXER_KEY = 64  # llama.cpp multiplies an indexer's keys by an orthogonal matrix of this size
ALL_BIASES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


@dataclass(frozen=True)
class Options:
    """What a tiny file contains; sizes in elements."""

    architecture: str = "llama"
    layers: int = 2
    d: int = 64
    heads: int = 4
    kv_heads: int | None = None  # None: as many as heads
    head_dim: int | None = None  # None: d / heads
    value_dim: int | None = None  # of a value head; None: as wide as keys
    ff: int = 96
    ffs: tuple[int, ...] = ()  # of each layer; (): ff in all
    vocab: int = 128
    eps: float = 1e-5
    context: int = 256
    rope_base: float = 10000.0
    rope_factors: bool = False  # write rope_freqs.weight, Llama-3 style
    still_pairs: int = 0  # of a head the last, which do not rotate: their divisors in rope_freqs.weight are 1e30
    scaling: Mapping[str, Any] = field(default_factory=dict)  # keys below `{arch}.rope.scaling.`
    extra: Mapping[str, Any] = field(default_factory=dict)  # more keys below `{arch}.`
    bare: Mapping[str, Any] = field(default_factory=dict)  # more keys, below nothing
    zeros: tuple[str, ...] = ()  # keys below `{arch}.` that are written although they are 0
    omit: tuple[str, ...] = ()  # keys below `{arch}.` to leave out, so that the reader's defaults count
    per_layer_arrays: bool = False  # write head counts and feed-forward length as arrays of equal numbers
    tied: bool = False  # no output.weight
    head_only: bool = False  # no token_embd.weight
    fused_qkv: bool = False
    fused_bias: bool = False  # write attn_qkv.bias in place of the biases of q, k and v
    biases: tuple[str, ...] = ()  # of ALL_BIASES, "output", and those of the experts
    norm: str = "rms"  # rms | rms_bias | rms_bare (neither) | ln (weight only) | ln_bias | ln_bare (neither)
    norms: tuple[str, ...] = ("attn_norm", "ffn_norm")  # of each layer
    bare_norms: tuple[str, ...] = ()  # whose tensors' names do not end in .weight (or exp_probs_b, not in .bias)
    mixers: tuple[str, ...] = ("attention",)  # of `MIXERS`, one a layer, over and over
    sizes: Mapping[str, Any] = field(default_factory=dict)  # of mixers other than attention, by names of theirs or keys
    final_norm: str = "output_norm"
    embedding_norm: bool = False  # a norm of the embeddings
    output_scale: bool = False  # a factor of the stream after each layer
    alone: bool = False  # a layer is its mixer only, or its feed-forward network only where the mixer is "none"
    heads_by_layer: bool = False  # write an array of numbers of heads, 0 where a layer has none
    inner_norms: bool = False  # before the output projections
    kv_by_layer: bool = False  # write an array of numbers of kv heads, 0 where a layer has no attention
    qk_gain: float = 1.4  # of the norms of q and k
    qk_norm: str = ""  # head | heads (weights of each head's own) | gain (a weight for each head of queries) | full
    shared_kv: int = 0  # so many of the last layers read earlier layers' keys and values
    idle_kv: bool = False  # and still have the matrices for their own
    per_layer: int = 0  # width of the inputs that each layer has of its own; 0: none
    attn_gate: str = ""  # heads | elements: a gate on what each head has read, as one number or element by element
    values: bool = True  # there is attn_v; else the values are made by attn_k
    n_rot: int | None = None  # rotated dimensions of a head; None: all
    long_short: bool = False  # write rope_factors_long and rope_factors_short
    positions: bool = False  # write position_embd
    embed_norm: bool = False  # write token_embd_norm
    act_scales: bool = False  # divisors of hidden units
    window: int | None = None
    sinks: bool = False
    ffn: str = "gated"  # gated | fused (gate above up in one matrix) | plain | channel mix | gated channel mix
    experts: int = 0  # 0: dense
    experts_used: int = 0
    expert_ff: int = 0
    expert_ffs: tuple[int, ...] = ()  # of each layer; (): expert_ff in all
    shared_ff: int = 0  # width of a shared expert beside the routed ones; 0: none
    shared_fused: bool = False  # the shared expert's gate above up in one tensor
    shared_gate: bool = False  # whether a sigmoid scales the shared expert
    shared_count: int = 0  # of shared experts of expert_ff in one, stated so; 0: not stated
    dense_lead: int = 0  # the first blocks, without experts
    dense_blocks: tuple[int, ...] = ()  # more of them, wherever they are
    chunk: int = 0  # so many experts have one in common that reads what they yield; 0: no such
    chunk_ff: int = 0
    expert_norms: tuple[str, ...] = ()  # of layers with experts only
    dense_beside: bool = False  # layers with experts have a dense network, too
    dense_ff: int | None = None  # its width; None: ff
    fused_experts: bool = False  # the experts' gate above up in one tensor
    router_scale: bool = False  # ffn_gate_inp.scale, of the router's input
    expert_scale: bool = False  # ffn_down_exps.scale, of each expert's output
    selection_bias: float = 0.0  # spread of exp_probs_b around `selection_mean`; 0: no such tensor
    selection_mean: float = 0.0
    # Cycles of two stacks, each of half of the layers, and passes of the first in each; 0: none.
    cycles: tuple[int, int] = (0, 0)
    token_experts: int = 0  # of the first layers, in which a table has the experts of each token
    predicted: bool = False  # four streams, of which branches read and write one; a low-rank matrix beside attention
    laurel: int = 64  # its rank
    stream_gain: float = 0.4  # of what streams are predicted and corrected by, beside what they are without it
    streams: int = 0  # residual streams that branches read and write by weights of their own; 0: one stream
    stream_rounds: int = 0  # of the iteration that makes the weights by which streams are mixed; 0: they are not
    stream_head: bool = True  # the head reads them by weights, too; else their mean
    latent: int = 0  # width of the stream that routed experts read and write; 0: that of all
    latent_name: str = "latent"  # latent | routed: in the names of what leads to it and back
    latent_norm: bool = False  # a norm of what the experts add there
    depth_scores: bool = False  # earlier streams are read by attention over depth
    predictors: int = 0  # of `layers` the last, which predict later tokens
    predictor_norms: tuple[str, ...] = ("nextn.enorm", "nextn.hnorm")
    predictor_streams: bool = False  # predictors have weights of streams, too
    predictor_experts: bool = True  # predictors are mixtures where the other blocks are
    embed_std: float = 1.0
    post_gain: float = 1.0  # of the norms after a sublayer
    score_gain: float = 1.4  # of the projections to q and k
    gate_gain: float = 1.5
    router_gain: float = 1.5
    up_gain: float = 1.0
    down_gain: float = 1.5
    tokenizer: str = "none"  # none | spm
    scales: tuple[str, ...] = ()  # matrices in the blocks that have a constant factor
    type: str = "F32"  # of the matrices whose rows are whole blocks; the others stay F32
    types: Mapping[str, str] = field(default_factory=dict)  # part of a tensor's name -> its type
    seed: int = 0

    @property
    def hd(self) -> int:
        return self.head_dim or self.d // self.heads

    @property
    def hv(self) -> int:
        return self.value_dim or self.hd

    @property
    def blocks(self) -> int:
        """Those of the model: several passes over layers count each."""
        high, low = self.cycles
        passes = high * (low + 1) / 2 if high else self.extra.get("num_loops", 1)
        return int((self.layers - self.predictors) * passes)

    @property
    def working(self) -> int:
        """Number of blocks that do something."""
        return sum(not self.ffs or self.ffs[layer] > 0 for layer in range(self.blocks))

    @property
    def hk(self) -> int:
        return self.kv_heads or self.heads


class Entry(NamedTuple):
    """A tensor to write: values are `mean + std * standard normal`, unless `values` is given."""

    name: str
    shape: tuple[int, ...]
    std: float
    mean: float = 0.0
    values: np.ndarray | None = None


def matrix(name: str, out: int, into: int, gain: float = 1.0) -> Entry:
    """Return a matrix that turns an input of order one into an output of order `gain`."""
    return Entry(f"{name}.weight", (out, into), gain / math.sqrt(into))


def norms(o: Options, name: str, width: int, gain: float = 1.0) -> Iterator[Entry]:
    if not o.norm.endswith("_bare"):
        suffix = "" if name.split(".")[-1] in o.bare_norms else ".weight"
        yield Entry(f"{name}{suffix}", (width,), 0.3 * gain, gain)
    if o.norm.endswith("_bias"):
        yield bias(name, width)


def bias(name: str, width: int) -> Entry:
    return Entry(f"{name}.bias", (width,), 0.4)


def stacked(o: Options, name: str, parts: Sequence[Entry], axis: int = 0) -> Entry:
    """Return the parts in one tensor: the same numbers as in a file that keeps them apart."""
    values = np.concatenate([draw(part, o.seed) for part in parts], axis)
    return Entry(name, values.shape, 0.0, values=values)


def interleaved(o: Options, name: str, groups: int, parts: Sequence[Entry]) -> Entry:
    """Return the parts in one tensor, by group: its share of the rows of each part."""
    values = np.concatenate([v.reshape(groups, -1, o.d) for v in (draw(part, o.seed) for part in parts)], axis=1)
    return Entry(name, (values.size // o.d, o.d), 0.0, values=values.reshape(-1, o.d))


def llama3_factors(n_rot: int, base: float, *, factor: float = 8.0, original: float = 64.0) -> np.ndarray:
    """Return Llama 3's frequency divisors [n_rot / 2] (low_freq_factor 1, high_freq_factor 4)."""
    wavelength = 2 * math.pi * base ** (np.arange(0, n_rot, 2) / n_rot)
    smooth = np.clip((original / wavelength - 1.0) / (4.0 - 1.0), 0.0, 1.0)
    return (1.0 / ((1.0 - smooth) / factor + smooth)).astype(np.float32)


def metadata(o: Options) -> dict[str, Any]:
    """Return the keys below `{arch}.`; Python floats are written as float32, integers as uint32."""
    repeat: Callable[[int], Any] = (lambda count: [count] * o.layers) if o.per_layer_arrays else (lambda count: count)
    kinds = [kind_of(o, layer) for layer in range(o.layers)]
    keys = {
        "block_count": o.layers,
        "context_length": o.context,
        "embedding_length": o.d,
        "feed_forward_length": [o.ff * feeds(o, layer) for layer in range(o.layers)]
        if o.alone
        else list(o.ffs) or repeat(o.ff),
        "attention.head_count": [heads(o, kind) for kind in kinds]
        if o.heads_by_layer or "heads" in o.sizes.get("window", {})
        else repeat(o.heads),
        "attention.head_count_kv": [kv_heads(o, kind) for kind in kinds] if o.kv_by_layer else repeat(o.hk),
        "attention.key_length": o.hd,
        "attention.value_length": o.hv,
        f"attention.layer_norm_{'rms_' if o.norm.startswith('rms') else ''}epsilon": o.eps,
        "rope.dimension_count": o.hd if o.n_rot is None else o.n_rot,
        "rope.freq_base": o.rope_base,
        "vocab_size": o.vocab,
    }
    optional = {
        "attention.sliding_window": o.window or 0,
        "expert_count": o.experts,
        "expert_used_count": o.experts_used,
        "expert_feed_forward_length": list(o.expert_ffs) or o.expert_ff,
        "expert_shared_feed_forward_length": o.shared_ff,
        "expert_shared_count": o.shared_count,
        "experts_per_group": o.chunk,
        "expert_chunk_feed_forward_length": o.chunk_ff,
        "moe_latent_size" if o.latent_name == "latent" else "expert_latent_length": o.latent,
        "attention.shared_kv_layers": o.shared_kv,
        "embedding_length_per_layer_input": o.per_layer,
        "leading_dense_block_count": o.dense_lead,
        "nextn_predict_layers": o.predictors,
        "hash_layer_count": o.token_experts,
        "hyper_connection.count": o.streams,
        "hyper_connection.sinkhorn_iterations": o.stream_rounds,
    }
    keys |= {key: value for key, value in optional.items() if value or key in o.zeros}
    if any(o.cycles):
        names = ("layers_per_stack", "h_cycles", "l_cycles")
        keys |= {f"hrm.{key}": value for key, value in zip(names, (o.layers // 2, *o.cycles), strict=True)}
        keys["block_count"] = o.blocks
    keys |= {key: value for key, value in o.sizes.items() if "." in key}
    for kind in dict.fromkeys(kinds):
        keys |= KEYS.get(kind, lambda _: {})(o)
    return keys | {f"rope.scaling.{key}": value for key, value in o.scaling.items()} | dict(o.extra)


def tensors(o: Options) -> Iterator[Entry]:
    """List the tensors of a file."""
    q, kv, pairs = o.heads * o.hd, o.hk * o.hd, (o.n_rot or o.hd) // 2
    if not o.head_only:
        yield Entry("token_embd.weight", (o.vocab, o.d), o.embed_std)
    if o.embed_norm:
        yield from norms(o, "token_embd_norm", o.d)
    if o.positions:
        yield Entry("position_embd.weight", (o.context, o.d), 0.5)
    yield from norms(o, o.final_norm, o.d)
    if o.embedding_norm:
        yield from norms(o, "token_embd_norm", o.d)
    if o.streams and o.stream_head:
        yield from stream_weights(o, "output_hc", o.streams, 1)
    if o.depth_scores:
        yield depth_score("output_res_score", o.d)
    if o.predicted:
        for name in ("altup_proj", "altup_unembd_proj"):
            yield Entry(f"{name}.weight", (3, o.d, o.d), 1 / math.sqrt(o.d))
    if any(o.cycles):
        yield Entry("hrm.z_l_init", (o.d,), 0.8)
    if not o.tied:
        yield Entry("output.weight", (o.vocab, o.d), o.embed_std if o.head_only else 2.0 / math.sqrt(o.d))
    if "output" in o.biases:
        yield bias("output", o.vocab)
    if o.rope_factors:
        yield Entry("rope_freqs.weight", (o.hd // 2,), 0.0, values=llama3_factors(o.hd, o.rope_base))
    if o.per_layer:
        width = o.layers * o.per_layer
        yield Entry("per_layer_token_embd.weight", (o.vocab, width), 1 / math.sqrt(o.per_layer))
        yield matrix("per_layer_model_proj", width, o.d, math.sqrt(o.d))
        yield from norms(o, "per_layer_proj_norm", o.per_layer)
    if o.still_pairs:
        divisors = np.repeat([1.0, 1e30], [o.hd // 2 - o.still_pairs, o.still_pairs])
        yield Entry("rope_freqs.weight", (o.hd // 2,), 0.0, values=divisors)
    if o.long_short:
        yield Entry("rope_factors_short.weight", (pairs,), 0.0, values=np.linspace(1.0, 1.6, pairs))
        yield Entry("rope_factors_long.weight", (pairs,), 0.0, values=np.geomspace(1.1, 12.0, pairs))
    widths = {"attn_q": q, "attn_k": kv, "attn_v": kv, "ffn_gate": o.ff, "ffn_up": o.ff, "ffn_gate_inp": o.experts}
    for layer in range(o.layers):
        b = f"blk.{layer}"
        kind = kind_of(o, layer)
        for name in o.norms:
            if has_norm(o, layer, name):
                yield from norms(o, f"{b}.{name}", o.d, o.post_gain if name.startswith("post_") else 1.0)
        entries = MIXERS[kind](o, b)
        if layer >= o.layers - o.shared_kv and not o.idle_kv:
            entries = (entry for entry in entries if ".attn_k" not in entry.name and ".attn_v" not in entry.name)
        yield from entries
        if o.per_layer:
            yield from [matrix(f"{b}.inp_gate", o.per_layer, o.d, 0.7), matrix(f"{b}.proj", o.d, o.per_layer)]
            yield from norms(o, f"{b}.post_norm", o.d, o.post_gain)
        if o.streams and (o.predictor_streams or layer < o.blocks):
            uses = 2 * o.streams + o.streams**2 * (o.stream_rounds > 0)
            for branch in ("attn", "ffn"):
                yield from stream_weights(o, f"{b}.hc_{branch}", uses, 3 if o.stream_rounds else 2)
        if o.predicted:
            yield from predicted(o, b)
        if o.depth_scores:
            yield from (depth_score(f"{b}.{branch}_res_score", o.d) for branch in ("attn", "ffn"))
        if o.output_scale:
            yield Entry(f"{b}.layer_output_scale.weight", (1,), 0.1, 0.8)
        predictor = layer >= o.blocks
        if feeds(o, layer):
            routed = o.experts > 0 and layer >= o.dense_lead and layer not in o.dense_blocks
            routed = routed and (o.predictor_experts or not predictor)
            width = o.expert_ffs[layer] if o.expert_ffs else o.expert_ff
            yield from experts(o, b, width) if routed else feed_forward(o, b, "", o.ffs[layer] if o.ffs else o.ff)
        if predictor:
            yield matrix(f"{b}.nextn.eh_proj", o.d, 2 * o.d)
            for name in o.predictor_norms:
                yield from norms(o, f"{b}.{name}", o.d)
        present = [bias(f"{b}.{name}", widths.get(name, o.d)) for name in o.biases if name in (*ALL_BIASES, *widths)]
        present = [entry for entry in present if has_part(o, layer, entry.name)]
        if o.fused_bias:
            qkv = [entry for entry in present if entry.name.split(".")[2] in ALL_BIASES[:3]]
            present = [entry for entry in present if entry not in qkv]
            yield stacked(o, f"{b}.attn_qkv.bias", qkv)
        yield from present


def predicted(o: Options, b: str) -> Iterator[Entry]:
    """List the tensors of a layer by which streams are predicted and corrected, and of the matrix beside attention."""
    yield matrix(f"{b}.altup_router", 4, o.d, 3.0 * o.d)  # its input is divided by the width
    yield from norms(o, f"{b}.altup_router_norm", o.d)
    for name, out in (("predict", 16), ("correct", 4)):
        yield matrix(f"{b}.altup_{name}_coef", out, 4, o.stream_gain)
    yield Entry(f"{b}.altup_correct_scale.weight", (o.d,), 0.3, 1.0)
    yield from [matrix(f"{b}.laurel_l", o.laurel, o.d), matrix(f"{b}.laurel_r", o.d, o.laurel)]
    yield from norms(o, f"{b}.laurel_post_norm", o.d, o.post_gain)


def stream_weights(o: Options, name: str, weights: int, uses: int) -> Iterator[Entry]:
    """List what makes the weights by which something reads or writes residual streams, from all of these."""
    yield matrix(f"{name}_fn", weights, o.streams * o.d)
    yield Entry(f"{name}_base.weight", (weights,), 0.7)
    yield Entry(f"{name}_scale.weight", (uses,), 0.2, 1.0)


def depth_score(name: str, width: int) -> Entry:
    """Return what scores streams over depth: with larger numbers a single one would be read."""
    return Entry(f"{name}.weight", (width,), 1.2 / math.sqrt(width))


def scaled(o: Options) -> Iterator[Entry]:
    """List the tensors of a file, with a factor of a matrix (or of each expert's) where the options name it.

    A second one, of the matrix's input in low precision, is there to be ignored.
    """
    for entry in tensors(o):
        yield entry
        stem, kind = entry.name.rsplit(".", 1)
        if kind == "weight" and stem.rpartition(".")[2] in o.scales:
            for suffix in ("scale", "input_scale"):
                yield Entry(f"{stem}.{suffix}", entry.shape[:-2] or (1,), 0.2, 0.8)


def kind_of(o: Options, layer: int) -> str:
    return o.mixers[layer % len(o.mixers)]


def feeds(o: Options, layer: int) -> bool:
    """Return whether a layer has a feed-forward network."""
    if o.ffs and not o.ffs[layer]:
        return False
    return not o.alone or kind_of(o, layer) == "none" or layer >= o.blocks


def has_part(o: Options, layer: int, name: str) -> bool:
    """Return whether a layer has the sublayer, attention or feed-forward, that a tensor belongs to."""
    return kv_heads(o, kind_of(o, layer)) > 0 if ".attn_" in name else feeds(o, layer)


def has_norm(o: Options, layer: int, name: str) -> bool:
    """Return whether a layer has the sublayer, its mixer or its feed-forward, that a norm belongs to."""
    if name == "attn_norm" and not o.alone:
        return kind_of(o, layer) != "none"
    return name != "ffn_norm" or feeds(o, layer)


def sized(o: Options, kind: str) -> Options:
    """Return the options of a kind of attention, which may have sizes of its own."""
    return dataclasses.replace(o, **o.sizes.get(kind, {})) if kind in ("window", "narrow") else o


def heads(o: Options, kind: str) -> int:
    """Return the number of heads of a layer with this mixer, as the file has it."""
    return 0 if kind == "none" else sized(o, kind).heads


def kv_heads(o: Options, kind: str) -> int:
    """Return the number of kv heads of a layer with this mixer."""
    return 0 if kind in RECURRENT else sized(o, kind).hk


def attention(o: Options, b: str, *, gated: bool = False) -> Iterator[Entry]:
    """List the tensors of softmax attention in layer `b`, without its norm; `gated`: each head's query has a gate."""
    q, kv = o.heads * o.hd, o.hk * o.hd
    query, gate = (matrix(f"{b}.{name}", q, o.d, gain) for name, gain in (("attn_q", o.score_gain), ("gate_q", 2.0)))
    parts = [
        interleaved(o, query.name, o.heads, [query, gate]) if gated else query,
        matrix(f"{b}.attn_k", kv, o.d, o.score_gain),
        *([matrix(f"{b}.attn_v", o.hk * o.hv, o.d)] if o.values else []),
    ]
    yield from [stacked(o, f"{b}.attn_qkv.weight", parts)] if o.fused_qkv else parts
    if o.qk_norm:
        # Normed heads have scores with a spread of one; 1.4 squared makes it two. (Where scores are divided by a root.)
        normed = (("attn_q_norm", o.heads, q), ("attn_k_norm", o.hk, kv))
        for name, heads, whole in normed[: 1 if o.qk_norm == "gain" else 2]:
            shape = {"head": (o.hd,), "heads": (heads, o.hd), "gain": (heads, 1), "full": (whole,)}[o.qk_norm]
            yield Entry(f"{b}.{name}.weight", shape, 0.3, o.qk_gain)
    if o.sinks:
        yield Entry(f"{b}.attn_sinks.weight", (o.heads,), 1.0, 2.0)
    if o.attn_gate:
        yield matrix(f"{b}.attn_gate", {"heads": o.heads, "elements": q}[o.attn_gate], o.d, 2.0)
    if o.inner_norms:
        yield from norms(o, f"{b}.attn_sub_norm", o.heads * o.hv)
    yield matrix(f"{b}.attn_output", o.d, o.heads * o.hv)


def with_vision_experts(o: Options, b: str) -> Iterator[Entry]:
    """List attention, and the layer's matrices for tokens of images."""
    yield from attention(o, b)
    rows = (o.heads + 2 * o.hk) * o.hd
    for name, out, into in (("attn_qkv", rows, o.d), ("attn_output", o.d, o.heads * o.hd)):
        yield matrix(f"{b}.vis_{name}", out, into)
    for name, out, into in (("gate", o.ff, o.d), ("up", o.ff, o.d), ("down", o.d, o.ff)):
        yield matrix(f"{b}.vis_{name}", out, into)


def delta(o: Options, b: str, *, layout: str) -> Iterator[Entry]:
    """List the tensors of a gated delta net in layer `b`, without its norm.

    `layout` is of qwen35 (alpha and beta apart), qwen3next (together, by key head), or its older files (q, k, v and z
    together, too). Decays are from 0.99 in the first head to about 0.01 in the last, write strengths anywhere.
    """
    size, keys, heads = (o.sizes[f"ssm.{name}"] for name in ("state_size", "group_count", "time_step_rank"))
    k, v, kernel = keys * size, heads * size, o.sizes["ssm.conv_kernel"]
    parts = [matrix(f"{b}.{name}", out, o.d) for name, out in (("delta_q", k), ("delta_k", k), ("delta_v", v))]
    z = matrix(f"{b}.attn_gate", v, o.d, o.gate_gain)
    if layout == "old":
        yield interleaved(o, f"{b}.ssm_in.weight", keys, [*parts, z])
    else:
        yield from [stacked(o, f"{b}.attn_qkv.weight", parts), z]
    beta, alpha = (matrix(f"{b}.ssm_{name}", heads, o.d, gain) for name, gain in (("beta", 3.0), ("alpha", 1.5)))
    yield from [beta, alpha] if layout == "qwen35" else [interleaved(o, f"{b}.ssm_ba.weight", keys, [beta, alpha])]
    yield Entry(f"{b}.ssm_conv1d.weight", (2 * k + v, kernel), 1.2 / math.sqrt(kernel))
    yield Entry(f"{b}.ssm_dt.bias", (heads,), 0.5)
    spread = draw(Entry(f"{b}.ssm_a", (heads,), 0.2), o.seed)
    yield Entry(f"{b}.ssm_a", (heads,), 0.0, values=-np.geomspace(0.02, 6.0, heads) * np.exp(spread))
    yield Entry(f"{b}.ssm_norm.weight", (size,), 0.3, 1.0)
    yield matrix(f"{b}.ssm_out", o.d, v, 1.5)


def kda(o: Options, b: str, *, steps: str) -> Iterator[Entry]:
    """List the tensors of Kimi Delta Attention in layer `b`, without its norm.

    `steps`: which projections are in two steps, to decays (f) and to the gate (g); without any, `ssm_a` is positive.
    The size `flat`: the rates of decay have one axis.
    """
    size, kernel = o.sizes["kda.head_dim"], o.sizes["ssm.conv_kernel"]
    width = o.heads * size
    qkv = [matrix(f"{b}.attn_{part}", width, o.d) for part in "qkv"]
    yield from [stacked(o, f"{b}.attn_qkv.weight", qkv)] if o.fused_qkv else qkv
    for part in "qkv":
        yield Entry(f"{b}.ssm_conv1d_{part}.weight", (1, width, 1, kernel), 1.2 / math.sqrt(kernel))
    for name, gain in (("ssm_f", 2.0), ("ssm_g", o.gate_gain)):
        if name[-1] in steps:
            yield from (matrix(f"{b}.{name}_a", size, o.d), matrix(f"{b}.{name}_b", width, size, gain))
        else:
            yield matrix(f"{b}.{name}{'' if steps else '_a'}", width, o.d, gain)
    spread = np.exp(draw(Entry(f"{b}.ssm_a", (o.heads, 1), 0.2), o.seed))
    ends = (0.4, 2.5) if "kda.gate_lower_bound" in o.sizes else (0.02, 6.0)
    rates = (-1 if steps else 1) * np.geomspace(*ends, o.heads)[:, None] * spread
    rates = rates[:, 0] if o.sizes.get("flat") else rates
    yield Entry(f"{b}.ssm_a", rates.shape, 0.0, values=rates)
    yield Entry(f"{b}.ssm_dt.bias", (width,), 1.0)
    yield matrix(f"{b}.ssm_beta", o.heads, o.d, 3.0)
    yield Entry(f"{b}.ssm_norm.weight", (size,), 0.3, 1.0)
    yield matrix(f"{b}.attn_output", o.d, width, 1.5)


def lightning(o: Options, b: str) -> Iterator[Entry]:
    """List the tensors of lightning attention in layer `b`, without its norm; q, k and v are side by side by head."""
    width = o.heads * o.hd
    yield interleaved(o, f"{b}.attn_qkv.weight", o.heads, [matrix(f"{b}.attn_{part}", width, o.d) for part in "qkv"])
    yield matrix(f"{b}.attn_gate", width, o.d, o.gate_gain)
    yield Entry(f"{b}.attn_norm_2.weight", (width,), 0.3, 1.0)
    yield matrix(f"{b}.attn_output", o.d, width, 1.5)


def short_convolution(o: Options, b: str) -> Iterator[Entry]:
    """List the tensors of a gated short convolution in layer `b`, without its norm."""
    yield matrix(f"{b}.shortconv.in_proj", 3 * o.d, o.d)
    yield Entry(f"{b}.shortconv.conv.weight", (o.d, o.sizes["shortconv.l_cache"]), 0.8)
    yield matrix(f"{b}.shortconv.out_proj", o.d, o.d)


def latent(o: Options, b: str) -> Iterator[Entry]:
    """List the tensors of latent attention in layer `b`; rotated dimensions are `n_rot`.

    Sizes: `nope` (of a key, not rotated), `latent`, `value`, `query` (of the queries' latent vector; without it, they
    have none), `head_gate` (a sigmoid scales what each head has read; "elements": each element of it), `rope_norm` (the
    rotated part of keys is normed), `unsplit` (keys and values are made by one matrix), `indexer` (heads that choose
    the keys to attend to), `indexer_types` (which blocks choose; the others do as the block before; without it, all
    choose), `pool` (of so many consecutive keys one is made for the indexer, which chooses them together).
    """
    rope, nope, width, value = o.n_rot or 0, o.sizes["nope"], o.sizes["latent"], o.sizes["value"]
    q = o.heads * (nope + rope)
    if query := o.sizes.get("query"):
        yield matrix(f"{b}.attn_q_a", query, o.d)
        yield from norms(o, f"{b}.attn_q_a_norm", query)
        yield matrix(f"{b}.attn_q_b", q, query, o.score_gain)
    else:
        yield matrix(f"{b}.attn_q", q, o.d, o.score_gain)
    parts = [matrix(f"{b}.attn_kv_a", width, o.d), matrix(f"{b}.attn_k_rope", rope, o.d, o.score_gain)]
    yield stacked(o, f"{b}.attn_kv_a_mqa.weight", parts)
    yield from norms(o, f"{b}.attn_kv_a_norm", width)
    keys = Entry(f"{b}.attn_k_b.weight", (o.heads, width, nope), o.score_gain / math.sqrt(width))
    values = Entry(f"{b}.attn_v_b.weight", (o.heads, value, width), 1 / math.sqrt(width))
    if o.sizes.get("unsplit"):
        both = np.concatenate([draw(keys, o.seed).transpose(0, 2, 1), draw(values, o.seed)], axis=1)
        both = both.reshape(-1, width)
        yield Entry(f"{b}.attn_kv_b.weight", both.shape, 0.0, values=both)
    else:
        yield from (keys, values)
    if gate := o.sizes.get("head_gate"):
        yield matrix(f"{b}.attn_gate", o.heads * (value if gate == "elements" else 1), o.d, 2.0)
    if o.sinks:
        yield Entry(f"{b}.attn_sinks.weight", (o.heads,), 1.0, 2.0)
    if o.sizes.get("rope_norm"):
        yield from norms(o, f"{b}.attn_k_norm", rope)
    yield matrix(f"{b}.attn_output", o.d, o.heads * value)
    choosing = dict(enumerate(o.sizes.get("indexer_types", ())))
    if "indexer" in o.sizes and choosing.get(int(b.removeprefix("blk.")), True):
        yield matrix(f"{b}.indexer.attn_q_b", o.sizes["indexer"] * INDEXER_KEY, o.sizes["query"])
        yield matrix(f"{b}.indexer.attn_k", INDEXER_KEY, o.d)
        yield matrix(f"{b}.indexer.proj", o.sizes["indexer"], o.d)
        yield Entry(f"{b}.indexer.k_norm.weight", (INDEXER_KEY,), 0.3, 1.0)
        yield bias(f"{b}.indexer.k_norm", INDEXER_KEY)
        if pool := o.sizes.get("pool"):
            yield matrix(f"{b}.indexer_compressor_gate", INDEXER_KEY, o.d)
            yield Entry(f"{b}.indexer_compressor_ape.weight", (pool, INDEXER_KEY), 1.0)


def compressed(o: Options, b: str, *, ratio: int) -> Iterator[Entry]:
    """List attention with a memory of groups of `ratio` tokens in layer `b`; 0: without such a memory.

    Sizes: `query` (of the queries' latent vector), `groups` (of heads with a projection of their own), `rank` (of what
    it makes), `indexer` (heads that choose groups of 4).
    """
    query, groups, rank = (o.sizes[name] for name in ("query", "groups", "rank"))
    yield matrix(f"{b}.attn_q_a", query, o.d)
    yield from norms(o, f"{b}.attn_q_a_norm", query)
    yield matrix(f"{b}.attn_q_b", o.heads * o.hd, query)
    yield matrix(f"{b}.attn_kv", o.hd, o.d)
    yield Entry(f"{b}.attn_kv_a_norm.weight", (o.hd,), 0.3, o.qk_gain)
    yield Entry(f"{b}.attn_sinks.weight", (o.heads,), 1.0, 2.0)
    yield matrix(f"{b}.attn_output_a", groups * rank, o.heads * o.hd // groups)
    yield matrix(f"{b}.attn_output_b", o.d, groups * rank, 1.5)
    if not ratio:
        return
    overlapping = ratio == 4
    stems = [("attn_compressor", o.hd)]
    if overlapping:
        yield matrix(f"{b}.indexer.attn_q_b", o.sizes["indexer"] * INDEXER_KEY, query)
        yield matrix(f"{b}.indexer.proj", o.sizes["indexer"], o.d)
        stems.append(("indexer_compressor", INDEXER_KEY))
    for stem, size in stems:
        for part, gain in (("kv", 1.0), ("gate", 1.5)):
            yield matrix(f"{b}.{stem}_{part}", size * (1 + overlapping), o.d, gain)
        yield Entry(f"{b}.{stem}_ape.weight", (ratio, size * (1 + overlapping)), 0.7)
        yield Entry(f"{b}.{stem}_norm.weight", (size,), 0.3, o.qk_gain)


def compressed_keys(o: Options) -> dict[str, Any]:
    names = {"q_lora_rank": "query", "output_group_count": "groups", "output_lora_rank": "rank"}
    keys = {f"attention.{key}": o.sizes[name] for key, name in names.items()} | indexer_keys(o)
    ratios = [int(kind_of(o, layer).removeprefix("compressed ")) for layer in range(o.layers)]
    return keys | {"attention.compress_ratios": ratios}


def block_sparse(o: Options, b: str) -> Iterator[Entry]:
    """List attention with an indexer that chooses blocks of keys, in all but the leading dense layers."""
    yield from attention(o, b)
    if int(b.removeprefix("blk.")) >= o.dense_lead:
        yield matrix(f"{b}.indexer.q_proj", o.sizes["indexer"] * INDEXER_KEY, o.d)
        yield matrix(f"{b}.indexer.k_proj", INDEXER_KEY, o.d)
        yield from (Entry(f"{b}.indexer.{part}_norm.weight", (INDEXER_KEY,), 0.3, 1.0) for part in "qk")


def block_sparse_keys(o: Options) -> dict[str, Any]:
    return indexer_keys(o) | {"attention.indexer.block_size": 4, "attention.indexer.local_blocks": 1}


def indexer_keys(o: Options) -> dict[str, Any]:
    """Return the keys of an indexer that chooses everything in a prompt that is as short as in the tests."""
    keys = {"head_count": o.sizes["indexer"], "key_length": INDEXER_KEY, "top_k": 64}
    if types := o.sizes.get("indexer_types"):
        keys["types"] = types
    if pool := o.sizes.get("pool"):
        keys["kpool"] = pool
    return {f"attention.indexer.{name}": value for name, value in keys.items()}


def latent_keys(o: Options) -> dict[str, Any]:
    """Return the keys of latent attention: a file in two parts describes what is cached as if it were one wide head."""
    key, value, width = o.sizes["nope"] + (o.n_rot or 0), o.sizes["value"], o.sizes["latent"]
    keys = {"attention.kv_lora_rank": width, "attention.key_length": key, "attention.value_length": value}
    if query := o.sizes.get("query"):
        keys["attention.q_lora_rank"] = query
    if not o.sizes.get("unsplit"):
        keys |= {"attention.key_length": width + (o.n_rot or 0), "attention.value_length": width}
        keys |= {"attention.key_length_mla": key, "attention.value_length_mla": value}
    return keys | (indexer_keys(o) if "indexer" in o.sizes else {})


def latent_window(o: Options, b: str) -> Iterator[Entry]:
    yield from latent(narrow(o), b)


def latent_window_keys(o: Options) -> dict[str, Any]:
    """Return the keys of windowed layers with latent attention of sizes of their own."""
    names = ("kv_lora_rank", "key_length", "value_length", "key_length_mla", "value_length_mla")
    own = latent_keys(narrow(o))
    kinds = [kind_of(o, layer) == "latent window" for layer in range(o.layers)]
    heads = [narrow(o).heads if local else o.heads for local in kinds]
    keys = {"attention.sliding_window_pattern": kinds, "attention.head_count": heads}
    keys["attention.indexer.types"] = [not local for local in kinds]
    return keys | {f"attention.{name}_swa": own[f"attention.{name}"] for name in names}


def narrow(o: Options) -> Options:
    """Return the options of windowed layers with latent attention: `sizes` of their own under "window", no indexer."""
    sizes = {name: size for name, size in (o.sizes | o.sizes["window"]).items() if name != "indexer"}
    return dataclasses.replace(o, heads=sizes["heads"], sizes=sizes)


def nothing(o: Options, b: str) -> Iterator[Entry]:
    """List the tensors of a layer that does not mix positions."""
    yield from ()


# ---- windowed layers of another size


def window(o: Options, b: str) -> Iterator[Entry]:
    yield from attention(sized(o, "window"), b)


def window_keys(o: Options) -> dict[str, Any]:
    local = sized(o, "window")
    return {
        "attention.sliding_window_pattern": [kind_of(o, layer) == "window" for layer in range(o.layers)],
        "attention.key_length_swa": local.hd,
        "attention.value_length_swa": local.hd,
        "rope.dimension_count_swa": local.n_rot or local.hd,
    }


# ---- state space


def mamba2(o: Options, b: str) -> Iterator[Entry]:
    """List the tensors of a Mamba-2 mixer; its input projection makes the gate z, x, B, C and the time steps."""
    s = MAMBA2 | o.sizes
    inner, heads, bc = s["inner"], s["ssm_heads"], s["groups"] * s["state"]
    parts = {"z": (inner, o.gate_gain), "x": (inner, 1.0), "b": (bc, 1.0), "c": (bc, 1.0), "dt": (heads, 1.0)}
    rows = [matrix(f"{b}.ssm_in_{name}", out, o.d, gain) for name, (out, gain) in parts.items()]
    yield stacked(o, f"{b}.ssm_in.weight", rows)
    yield Entry(f"{b}.ssm_conv1d.weight", (inner + 2 * bc, s["kernel"]), 1 / math.sqrt(s["kernel"]), 0.2)
    yield bias(f"{b}.ssm_conv1d", inner + 2 * bc)
    # With time steps around one half, some heads forget within a token and others nothing within the prompt.
    yield Entry(f"{b}.ssm_dt.bias", (heads,), 1.0, -0.5)
    yield Entry(f"{b}.ssm_a", (heads, 1), 0.0, values=-np.geomspace(0.02, 12.0, heads)[:, None])
    yield Entry(f"{b}.ssm_d", (heads, 1), 0.5, 1.0)
    if s["normed"]:
        yield Entry(f"{b}.ssm_norm.weight", (s["groups"], inner // s["groups"]), 0.3, 1.0)
    yield matrix(f"{b}.ssm_out", o.d, inner, s["out_gain"])


def mamba2_keys(o: Options) -> dict[str, Any]:
    names = {"conv_kernel": "kernel", "inner_size": "inner", "state_size": "state", "time_step_rank": "ssm_heads"}
    s = MAMBA2 | o.sizes
    return {f"ssm.{key}": s[name] for key, name in (names | {"group_count": "groups"}).items()}


def mamba(o: Options, b: str) -> Iterator[Entry]:
    """List the tensors of a Mamba-1 mixer; what it makes of x are the vectors of time steps, B and C."""
    s = MAMBA | o.sizes
    inner, rank, state = s["inner"], s["rank"], s["state"]
    rows = [matrix(f"{b}.ssm_in_{name}", inner, o.d, gain) for name, gain in (("x", 1.0), ("z", o.gate_gain))]
    yield stacked(o, f"{b}.ssm_in.weight", rows)
    yield Entry(f"{b}.ssm_conv1d.weight", (inner, s["kernel"]), 1 / math.sqrt(s["kernel"]), 0.2)
    yield bias(f"{b}.ssm_conv1d", inner)
    parts = [matrix(f"{b}.ssm_x_{name}", out, inner, 1.5) for name, out in (("dt", rank), ("b", state), ("c", state))]
    yield stacked(o, f"{b}.ssm_x.weight", parts)
    yield matrix(f"{b}.ssm_dt", inner, rank)
    yield Entry(f"{b}.ssm_dt.bias", (inner,), 1.0, -0.5)
    spread = np.exp(draw(Entry(f"{b}.ssm_a", (inner, state), 0.3), o.seed))
    yield Entry(f"{b}.ssm_a", spread.shape, 0.0, values=-np.geomspace(0.02, 12.0, state) * spread)
    yield Entry(f"{b}.ssm_d", (inner,), 0.5, 1.0)
    if s["normed"]:
        for name, width in (("dt", rank), ("b", state), ("c", state)):
            yield Entry(f"{b}.ssm_{name}_norm.weight", (width,), 0.3, 1.0)
    yield matrix(f"{b}.ssm_out", o.d, inner, s["out_gain"])


def plamo2(o: Options, b: str) -> Iterator[Entry]:
    """List the tensors of PLaMo 2's mixer: Mamba-2 with time steps, B and C that are made from the values."""
    s = PLAMO2 | o.sizes
    inner, heads, rank, state = s["inner"], s["ssm_heads"], s["rank"], s["state"]
    rows = [matrix(f"{b}.ssm_in_{name}", inner, o.d, gain) for name, gain in (("z", o.gate_gain), ("x", 1.0))]
    yield interleaved(o, f"{b}.ssm_in.weight", heads, rows)
    yield Entry(f"{b}.ssm_conv1d.weight", (inner, s["kernel"]), 1 / math.sqrt(s["kernel"]), 0.2)
    parts = [matrix(f"{b}.ssm_x_{name}", out, inner, 1.5) for name, out in (("b", state), ("c", state), ("dt", rank))]
    yield stacked(o, f"{b}.ssm_x.weight", parts)
    yield matrix(f"{b}.ssm_dt", heads, rank)
    yield Entry(f"{b}.ssm_dt.bias", (heads,), 1.0, -0.5)
    yield Entry(f"{b}.ssm_a", (heads,), 0.0, values=-np.geomspace(0.02, 12.0, heads))
    yield Entry(f"{b}.ssm_d", (heads,), 0.5, 1.0)
    for name, width in (("dt", rank), ("b", state), ("c", state)):
        yield Entry(f"{b}.ssm_{name}_norm", (width,), 0.3, 1.0)
    yield matrix(f"{b}.ssm_out", o.d, inner, s["out_gain"])


def plamo2_keys(o: Options) -> dict[str, Any]:
    names = {"conv_kernel": "kernel", "inner_size": "inner", "state_size": "state", "time_step_rank": "ssm_heads"}
    s = PLAMO2 | o.sizes
    heads = [0 if kind_of(o, layer) == "plamo2" else o.heads for layer in range(o.layers)]
    return {f"ssm.{key}": s[name] for key, name in names.items()} | {
        "ssm.group_count": 0,
        "attention.head_count": heads,
    }


# llama.cpp wants vectors of 64 for the time steps, or more in wide models.
PLAMO2 = {"inner": 96, "ssm_heads": 6, "rank": 64, "state": 12, "kernel": 4, "out_gain": 1.0}


def mamba_keys(o: Options) -> dict[str, Any]:
    names = {"conv_kernel": "kernel", "inner_size": "inner", "state_size": "state", "time_step_rank": "rank"}
    s = MAMBA | o.sizes
    return {f"ssm.{key}": s[name] for key, name in names.items()}


# llama.cpp wants the values twice as wide as the model.
MAMBA = {"inner": 128, "rank": 5, "state": 12, "kernel": 4, "normed": False, "out_gain": 1.0}


def mamba2_beside_attention(o: Options, b: str) -> Iterator[Entry]:
    yield from attention(o, b)
    yield from mamba2(o, b)


# ---- RWKV


def lerps(b: str, count: int, width: int, names: str = "") -> Iterator[Entry]:
    """List how much of the token before each of several projections reads, by channel: in one tensor, or by name."""
    values = np.random.default_rng([7, zlib.crc32(b.encode())]).uniform(0.1, 0.9, (count, 1, 1, width))
    if not names:
        yield Entry(f"{b}.time_mix_lerp_fused.weight", values.shape, 0.0, values=values)
    for name, own in zip(names, values[:, 0, 0], strict=False):
        yield Entry(f"{b}.time_mix_lerp_{name}.weight", own.shape, 0.0, values=own)


def shares_of_before(name: str, width: int) -> Entry:
    return Entry(f"{name}.weight", (width,), 0.2, 0.5)


def group_norm(b: str, width: int) -> Iterator[Entry]:
    yield Entry(f"{b}.time_mix_ln.weight", (width,), 0.3, 1.0)
    yield bias(f"{b}.time_mix_ln", width)


def rwkv6(o: Options, b: str, *, linear: bool = False) -> Iterator[Entry]:
    """List the tensors of RWKV-6's time mixing; `linear`: as a Qwen model has it, as gated linear attention."""
    s, d, kv = RWKV | o.sizes, o.d, o.hk * o.sizes["head"] if linear else o.d
    extra, decay = s["extra"], s["decay"]
    yield matrix(f"{b}.time_mix_w1", 5 * extra, d)
    yield Entry(f"{b}.time_mix_w2.weight", (5, d, extra), 0.3 / math.sqrt(extra))
    yield shares_of_before(f"{b}.time_mix_lerp_x", d)
    yield from lerps(b, 5, d, "wkvrg" if s["apart"] else "")
    if not linear:
        yield Entry(f"{b}.time_mix_first.weight", (d // s["head"], s["head"]), 0.5, 0.5)
        yield from group_norm(b, d)
    yield Entry(f"{b}.time_mix_decay.weight", (d,), 0.0, values=np.linspace(-4.0, 1.5, d))
    yield matrix(f"{b}.time_mix_decay_w1", decay, d)
    yield matrix(f"{b}.time_mix_decay_w2", d, decay)
    for name, width, gain in (("key", kv, 1.0), ("value", kv, 1.0), ("receptance", d, 1.0), ("gate", d, o.gate_gain)):
        yield matrix(f"{b}.time_mix_{name}", width, d, gain)
        if s["biased"] and name != "gate":
            yield bias(f"{b}.time_mix_{name}", width)
    yield matrix(f"{b}.time_mix_output", d, d)


def rwkv7(o: Options, b: str) -> Iterator[Entry]:
    """List the tensors of RWKV-7's time mixing. Those of the first block for values of the first block are not used."""
    s, d = RWKV | o.sizes, o.d
    ranks = {"w": s["decay"], "a": s["rate"], "v": s["rate"] if b == "blk.0" else s["values"], "g": s["gate"]}
    for name, rank in ranks.items():
        if not rank:
            continue
        if name != "g":
            at = np.linspace(-3.0, 3.0, d) if name == "w" else np.linspace(-1.0, 1.0, d)
            yield Entry(f"{b}.time_mix_{name}0.weight", (d,), 0.0, values=at)
        yield matrix(f"{b}.time_mix_{name}1", rank, d)
        yield matrix(f"{b}.time_mix_{name}2", d, rank, 2.0 if name == "g" else 1.0)
    yield from lerps(b, 6 if s["gate"] else 5, d)
    for name, spread, mean in (("k_k", 0.3, 1.0), ("k_a", 0.3, 0.7), ("r_k", 0.3, 0.0)):
        yield Entry(f"{b}.time_mix_{name}.weight", (d,), spread, mean)
    for name in ("key", "value", "receptance"):
        yield matrix(f"{b}.time_mix_{name}", d, d)
    if s["normed"]:
        yield from group_norm(b, d)
    yield matrix(f"{b}.time_mix_output", d, d)


def channel_mix(o: Options, b: str) -> Iterator[Entry]:
    """List RWKV's feed-forward network, which reads the token before, too."""
    yield shares_of_before(f"{b}.channel_mix_lerp_k", o.d)
    yield matrix(f"{b}.channel_mix_key", o.ff, o.d)
    yield matrix(f"{b}.channel_mix_value", o.d, o.ff, o.down_gain)
    if o.ffn == "gated channel mix":
        yield shares_of_before(f"{b}.channel_mix_lerp_r", o.d)
        yield matrix(f"{b}.channel_mix_receptance", o.d, o.d, o.gate_gain)


def rwkv6_keys(o: Options) -> dict[str, Any]:
    s = RWKV | o.sizes
    keys = {"wkv.head_size": s["head"], "time_mix_extra_dim": s["extra"], "time_decay_extra_dim": s["decay"]}
    return keys | {"attention.head_count": 0}


def rwkv7_keys(o: Options) -> dict[str, Any]:
    s, names = RWKV | o.sizes, {"decay": "decay", "iclr": "rate", "value_residual_mix": "values", "gate": "gate"}
    ranks = {f"attention.{key}_lora_rank": s[name] for key, name in names.items()}
    return ranks | {"wkv.head_size": s["head"], "attention.head_count": 0}


# llama.cpp reads beyond heads whose size is not a multiple of 64 in RWKV-7.
RWKV = {"head": 64, "extra": 6, "decay": 10, "rate": 7, "values": 5, "gate": 9, "normed": True, "biased": False}
RWKV |= {"apart": False}

# Heads are 16 wide, not as wide as the state; four of them share a group's B and C.
MAMBA2 = {
    "inner": 128,
    "ssm_heads": 8,
    "state": 24,
    "groups": 2,
    "kernel": 4,
    "normed": True,
    "out_gain": 1.0,
}

# Token mixers: what a layer has in place of attention, by the name that `Options.mixers` uses.
MIXERS: dict[str, Callable[[Options, str], Iterator[Entry]]] = {
    "attention": attention,
    "gated attention": functools.partial(attention, gated=True),
    "window": window,
    "vision experts": with_vision_experts,
    "latent": latent,
    "latent window": latent_window,
    "block_sparse": block_sparse,
    **{f"compressed {ratio}": functools.partial(compressed, ratio=ratio) for ratio in (0, 4, 128)},
    "delta": functools.partial(delta, layout="qwen35"),
    "grouped delta": functools.partial(delta, layout="qwen3next"),
    "old delta": functools.partial(delta, layout="old"),
    "convolution": short_convolution,
    "lightning": lightning,
    "kda": functools.partial(kda, steps="fg"),
    "k3 kda": functools.partial(kda, steps="f"),
    "bounded kda": functools.partial(kda, steps=""),
    "mamba": mamba,
    "mamba2": mamba2,
    "plamo2": plamo2,
    "rwkv6": rwkv6,
    "linear rwkv6": functools.partial(rwkv6, linear=True),
    "rwkv7": rwkv7,
    "attention, mamba2": mamba2_beside_attention,
    "narrow": lambda o, b: attention(sized(o, "narrow"), b),
    "linear": lambda o, b: iter([matrix(f"{b}.attn_output", o.d, o.d)]),
    "none": nothing,
}
# Those that have no kv heads.
RECURRENT = {
    "delta",
    "grouped delta",
    "old delta",
    "convolution",
    "kda",
    "k3 kda",
    "bounded kda",
    "lightning",
    "mamba",
    "mamba2",
    "plamo2",
    "linear",
    "none",
}
# What the metadata then have besides, or instead; sizes with a dot in their names are keys themselves.
KEYS: dict[str, Callable[[Options], dict[str, Any]]] = {
    "window": window_keys,
    "latent": latent_keys,
    "latent window": latent_window_keys,
    "block_sparse": block_sparse_keys,
    **{f"compressed {ratio}": compressed_keys for ratio in (0, 4, 128)},
    "mamba": mamba_keys,
    "mamba2": mamba2_keys,
    "plamo2": plamo2_keys,
    "rwkv6": rwkv6_keys,
    "linear rwkv6": rwkv6_keys,
    "rwkv7": rwkv7_keys,
    "attention, mamba2": mamba2_keys,
}


def feed_forward(o: Options, b: str, suffix: str, width: int) -> Iterator[Entry]:
    """List a dense feed-forward network of layer `b`; `suffix` is `_shexp` for a shared expert's."""
    if o.ffn.endswith("channel mix"):
        yield from channel_mix(o, b)
        return
    gate = matrix(f"{b}.ffn_gate{suffix}", width, o.d, o.gate_gain)
    up = matrix(f"{b}.ffn_up{suffix}", width, o.d, o.up_gain)
    if o.ffn == "fused" or (suffix and o.shared_fused):
        yield stacked(o, up.name, [gate, up])
    else:
        yield from [up] if o.ffn == "plain" else [gate, up]
    if o.inner_norms:
        yield from norms(o, f"{b}.ffn_sub_norm{suffix}", width)
    yield matrix(f"{b}.ffn_down{suffix}", o.d, width, o.down_gain)
    if o.act_scales:
        yield Entry(f"{b}.ffn.act.scales", (width,), 0.2, 1.0)


def experts(o: Options, b: str, width: int) -> Iterator[Entry]:
    """List a router and its experts of `width` hidden units, with a shared one where there is one."""
    yield matrix(f"{b}.ffn_gate_inp", o.experts, o.d, o.router_gain)
    into = o.latent or o.d
    shapes = {
        "ffn_gate_exps": (width, into, o.gate_gain),
        "ffn_up_exps": (width, into, o.up_gain),
        "ffn_down_exps": (into, width, o.down_gain),
    }
    if o.ffn == "plain":
        del shapes["ffn_gate_exps"]
    if o.latent:
        yield matrix(f"{b}.ffn_{o.latent_name}_down", o.latent, o.d)
        yield matrix(f"{b}.ffn_{o.latent_name}_up", o.d, o.latent)
    if o.latent_norm:
        yield from norms(o, f"{b}.ffn_{o.latent_name}_norm", o.latent)
    parts = {
        name: Entry(f"{b}.{name}.weight", (o.experts, out, into), gain / math.sqrt(into))
        for name, (out, into, gain) in shapes.items()
    }
    if o.fused_experts:
        yield stacked(o, f"{b}.ffn_gate_up_exps.weight", [parts.pop("ffn_gate_exps"), parts.pop("ffn_up_exps")], 1)
    for name, part in parts.items():
        yield part
        if name in o.biases:
            yield Entry(f"{b}.{name}.bias", part.shape[:2], 0.4)
    if o.chunk:
        for name, out, into, gain in (
            ("gate", o.chunk_ff, o.d, o.gate_gain),
            ("up", o.chunk_ff, o.d, o.up_gain),
            ("down", o.d, o.chunk_ff, o.down_gain),
        ):
            yield Entry(f"{b}.ffn_{name}_chexps.weight", (o.experts // o.chunk, out, into), gain / math.sqrt(into))
    if o.router_scale:  # the normed input is divided by sqrt(d)
        yield Entry(f"{b}.ffn_gate_inp.scale", (o.d,), 0.3 * math.sqrt(o.d), math.sqrt(o.d))
    if o.expert_scale:
        yield Entry(f"{b}.ffn_down_exps.scale", (o.experts,), 0.3, 1.0)
    for name in o.expert_norms:
        yield from norms(o, f"{b}.{name}", o.d, o.post_gain if name.startswith("post_") else 1.0)
    if o.dense_beside:
        yield from feed_forward(o, b, "", o.dense_ff or o.ff)
    if int(b.removeprefix("blk.")) < o.token_experts:
        random = np.random.default_rng([o.seed, zlib.crc32(b.encode())])
        chosen = random.permuted(np.tile(np.arange(o.experts), (o.vocab, 1)), axis=1)[:, : o.experts_used]
        yield Entry(f"{b}.ffn_gate_tid2eid.weight", chosen.shape, 0.0, values=chosen)
    elif o.selection_bias:
        suffix = "" if "exp_probs_b" in o.bare_norms else ".bias"
        yield Entry(f"{b}.exp_probs_b{suffix}", (o.experts,), o.selection_bias, o.selection_mean)
    if shared := o.shared_count * (o.shared_ff or o.expert_ff) or o.shared_ff:
        yield from feed_forward(o, b, "_shexp", shared)
        if o.shared_gate:
            yield Entry(f"{b}.ffn_gate_inp_shexp.weight", (o.d,), 1.5 / math.sqrt(o.d))


YARN = {"type": "yarn", "factor": 4.0, "original_context_length": 32}

# One row per variation. A row is what differs from `Options`.
LLAMA_CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "one_layer": {"layers": 1},
    "three_layers": {"layers": 3, "d": 32, "heads": 2, "ff": 64},
    "gqa": {"kv_heads": 2},
    "mqa": {"kv_heads": 1},
    "head_dim_wide": {"head_dim": 32, "kv_heads": 2},
    "head_dim_narrow": {"head_dim": 8},
    "odd_sizes": {"ff": 90, "vocab": 131, "d": 60, "heads": 3, "head_dim": 18},
    "ff_narrow": {"ff": 40},
    "rope_base": {"rope_base": 500000.0},
    "rope_factors": {"rope_factors": True, "rope_base": 500.0},
    "linear": {"scaling": {"type": "linear", "factor": 4.0}},
    "linear_untyped": {"scaling": {"factor": 4.0}},
    "linear_old_key": {"extra": {"rope.scale_linear": 4.0}},
    "scaling_none": {"scaling": {"type": "none", "factor": 4.0}},
    "yarn": {"scaling": YARN, "rope_base": 100.0},
    "yarn_ramp": {"scaling": YARN | {"original_context_length": 512}, "context": 2048, "head_dim": 32},
    "yarn_rope_factors": {"scaling": YARN, "rope_base": 100.0, "rope_factors": True},
    "attn_factor": {"scaling": {"type": "linear", "factor": 2.0, "attn_factor": 1.3}},
    "tied": {"tied": True},
    "fused_qkv": {"fused_qkv": True, "kv_heads": 2},
    "biases": {"biases": ALL_BIASES, "kv_heads": 2},
    "live_biases": {"biases": ("attn_v", "attn_output", "ffn_up", "ffn_down")},
    "frozen_biases": {"biases": ("attn_q", "attn_k")},
    "fused_biases": {"fused_qkv": True, "fused_bias": True, "kv_heads": 2, "biases": ALL_BIASES},
    "fused_split_biases": {"fused_qkv": True, "kv_heads": 2, "biases": ALL_BIASES},
    "defaults": {
        "omit": (
            "attention.head_count_kv",
            "attention.key_length",
            "attention.value_length",
            "rope.dimension_count",
            "rope.freq_base",
        )
    },
    "per_layer_arrays": {"per_layer_arrays": True, "kv_heads": 2},
    "eps": {"eps": 0.05},
    "predictor_missing": {"extra": {"block_count": 3, "nextn_predict_layers": 1}},
    "tokenizer": {"tokenizer": "spm", "vocab": 320},
    "bf16": {"type": "BF16"},
    "f16": {"type": "F16"},
    "q8_0": {"type": "Q8_0"},
    "q4_0_tied": {"type": "Q4_0", "tied": True},
    "q4_k_mixed": {
        "type": "Q4_K",
        "types": {"ffn_down": "Q6_K", "attn_v": "Q5_0", "output.weight": "Q6_K"},
        "d": 256,
        "ff": 256,
        "kv_heads": 2,
        "layers": 1,
    },
}


def row(case: str | Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a row of `CASES` or `FAMILY_CASES` by name; a row itself is returned as it is."""
    return CASES[case] if isinstance(case, str) else case


CASES = LLAMA_CASES | FAMILY_CASES


def options(case: str | Mapping[str, Any]) -> Options:
    """Return the full options of a row, by name or as the row itself."""
    return Options(**row(case))


def prompt(case: str | Mapping[str, Any], length: int = 12, *, seed: int = 1) -> list[int]:
    """Return seeded token ids, all different from their neighbours' where the vocabulary allows."""
    return np.random.default_rng(seed).permutation(options(case).vocab)[:length].tolist()


def draw(entry: Entry, seed: int) -> np.ndarray:
    """Return the float32 values of a tensor."""
    if entry.values is not None:
        return entry.values.astype(np.float32)
    random = np.random.default_rng([seed, zlib.crc32(entry.name.encode())])
    return (entry.mean + entry.std * random.standard_normal(entry.shape)).astype(np.float32)


def write(path: str | os.PathLike[str], **differences: Any) -> Path:
    """Write a tiny GGUF file of the `Options` given and return its path."""
    o = Options(**differences)
    writer = gguf.GGUFWriter(os.fspath(path), o.architecture)
    keys = {f"{o.architecture}.{key}": value for key, value in metadata(o).items() if key not in o.omit}
    for key, value in (keys | dict(o.bare)).items():
        add = {float: writer.add_float32, int: writer.add_uint32, str: writer.add_string, list: writer.add_array}
        (add | {bool: writer.add_bool})[type(value)](key, value)
    {"none": lambda *_: writer.add_tokenizer_model("none"), "spm": add_spm}[o.tokenizer](writer, o.vocab)
    for entry in scaled(o):
        values = draw(entry, o.seed)
        name = next((kind for part, kind in o.types.items() if part in entry.name), o.type)
        kind = gguf.GGMLQuantizationType[name]
        # Norms, routers, learned positions, convolutions and RWKV's small matrices are never quantized; llama.cpp's
        # copy in F32 would keep them as they are.
        kept = ("_norm.weight", "ffn_gate_inp", "hc_", "position_embd.weight", "conv1d", "conv.conv", "time_mix_lerp")
        kept += ("time_mix_first", "time_mix_decay", *(f"time_mix_{name}{step}" for name in "wavg" for step in (1, 2)))
        exempt = values.ndim < 2 or any(part in entry.name for part in kept)
        if entry.name.endswith("tid2eid.weight"):  # a table of integers
            writer.add_tensor(entry.name, values.astype(np.int32))
            continue
        if exempt or values.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
            kind = gguf.GGMLQuantizationType.F32
        writer.add_tensor(entry.name, encode(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(path)


def add_spm(writer: gguf.GGUFWriter, vocab: int) -> None:
    """Add a SentencePiece-style vocabulary: 3 control tokens, 256 bytes, letters, and a few words."""
    words = ["▁", *"etaoinshrdlu", "th", "▁th", "▁the", "he", "in", "▁a", "re", "er", "ed", "▁s", "st", "on"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    pieces += [f"[extra{i}]" for i in range(vocab - len(pieces))]
    assert len(pieces) == vocab, f"a vocabulary of {vocab} cannot hold the {len(pieces)} basic pieces"
    kinds = gguf.TokenType
    control = [kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL]
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(pieces)
    writer.add_token_scores([0.0] * 259 + [-float(i) for i in range(vocab - 259)])
    writer.add_token_types(control + [kinds.BYTE] * 256 + [kinds.NORMAL] * (vocab - 259))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(True)


@functools.cache
def libggml() -> ctypes.CDLL:
    """Return llama.cpp's tensor library, for the quantizers that the `gguf` package does not have."""
    import llama_cpp

    library = ctypes.CDLL(str(next(Path(llama_cpp.__file__).parent.glob("lib/*ggml-base.*"))))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = (
        [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p] + [ctypes.c_int64] * 3 + [ctypes.c_void_p]
    )
    return library


def encode(values: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """Return float32 `values` [..., rows, columns] as stored bytes (float arrays for F32 and F16)."""
    if kind.name in ("F32", "F16"):
        return values.astype(np.float32 if kind.name == "F32" else np.float16)
    try:
        return gguf.quants.quantize(values, kind)
    except NotImplementedError:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        columns = values.shape[-1]
        values = np.ascontiguousarray(values)
        out = np.zeros((*values.shape[:-1], columns // block * size), np.uint8)
        # Some formats insist on an importance per column; equal ones are neutral.
        weight = np.ones(columns, np.float32)
        rows = values.size // columns
        written = libggml().ggml_quantize_chunk(
            int(kind), values.ctypes.data, out.ctypes.data, 0, rows, columns, weight.ctypes.data
        )
        assert written == out.nbytes, f"{kind.name}: wrote {written} of {out.nbytes} bytes"
        return out


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence llama.cpp: its Python binding filters by this logger's level, and maps warnings to errors."""
    logger = logging.getLogger("llama-cpp-python")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def quantize(source: str | os.PathLike[str], target: str | os.PathLike[str], ftype: str) -> Path:
    """Rewrite a GGUF file with llama.cpp's quantizer; `ftype` as in `LLAMA_FTYPE_MOSTLY_...`, or "F32".

    "F32" dequantizes exactly and keeps all metadata: what llama.cpp must be run on for tight agreement.
    """
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    prefix = "ALL" if ftype == "F32" else "MOSTLY"
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_{prefix}_{ftype}")
    params.allow_requantize = True
    params.nthread = 1
    with quiet():
        failed = llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(target), params)
    assert not failed, f"llama_model_quantize failed on {source} with {ftype}"
    return Path(target)


def resized(case: str | Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    """Return a row with some options changed, checked against the names of `Options`."""
    changed = dict(row(case)) | changes
    unknown = changed.keys() - {f.name for f in dataclasses.fields(Options)}
    assert not unknown, f"unknown options {unknown}"
    return changed
