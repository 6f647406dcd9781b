"""What a configuration says of a model: defaults, slices, and a named refusal for everything else."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from ggjac.architectures import ARCHITECTURES
from ggjac.config import ConfigError, ModelConfig, Rope, fused_parts, read_config
from ggjac.config.keys import Keys
from ggjac.config.read import _decided as decided
from ggjac.gguf import open_gguf
from ggjac.rope import rotation
from ggjac.sizes import Part

L, D, H, G, HD, F, V = 2, 12, 6, 3, 4, 10, 7

METADATA = {
    "general.architecture": "llama",
    "llama.block_count": L,
    "llama.context_length": 32,
    "llama.embedding_length": D,
    "llama.feed_forward_length": F,
    "llama.attention.head_count": H,
    "llama.attention.head_count_kv": G,
    "llama.attention.key_length": HD,
    "llama.attention.value_length": HD,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.dimension_count": HD,
    "llama.rope.freq_base": 500.0,
}
BLOCK = {
    "attn_norm.weight": (D,),
    "attn_q.weight": (H * HD, D),
    "attn_k.weight": (G * HD, D),
    "attn_v.weight": (G * HD, D),
    "attn_output.weight": (D, H * HD),
    "ffn_norm.weight": (D,),
    "ffn_gate.weight": (F, D),
    "ffn_up.weight": (F, D),
    "ffn_down.weight": (D, F),
}
SHAPES = {
    "token_embd.weight": (V, D),
    "output_norm.weight": (D,),
    "output.weight": (V, D),
    **{f"blk.{i}.{name}": shape for i in range(L) for name, shape in BLOCK.items()},
}
ABSENT = object()


def read(metadata: dict[str, Any] | None = None, shapes: dict[str, Any] | None = None) -> ModelConfig:
    """Read the model above with changes; keys without a dot-separated prefix get `llama.`, ABSENT removes."""
    changed = {name if name.startswith(("general.", "llama.")) else f"llama.{name}": value
               for name, value in (metadata or {}).items()}  # fmt: skip
    return read_config(
        {name: value for name, value in (METADATA | changed).items() if value is not ABSENT},
        {name: shape for name, shape in (SHAPES | (shapes or {})).items() if shape is not ABSENT},
    )


def sizes(config: ModelConfig) -> tuple[int, int, int]:
    """Query heads, key/value heads, elements of a head."""
    (own,) = {(layer.heads, layer.kv_heads, layer.key_size) for layer in config.layers}
    assert {layer.value_size for layer in config.layers} == {own[2]}
    return own


def rope_of(config: ModelConfig) -> Rope:
    """The rotation of the first block."""
    rope = config.layers[0].rope
    assert rope is not None
    return rope


# ---- what is read


def test_everything_is_read() -> None:
    config = read()
    assert (config.architecture, config.block_count, config.d, config.vocabulary) == ("llama", L, D, V)
    assert sizes(config) == (H, G, HD)
    assert (config.context_length, {layer.hidden_units for layer in config.layers}) == (32, {F})
    assert config.norm_epsilon == 1e-5
    assert len({layer.rope for layer in config.layers}) == 1
    rope = rope_of(config)
    assert (rope.dimensions, rope.base, rope.pairs) == (HD, 500.0, "adjacent")
    assert (rope.factor, rope.yarn, rope.magnitude) == (1.0, False, 1.0)


def test_defaults_are_llamacpps() -> None:
    """key length d / heads (rounded down), value length = key length, as many kv heads as heads, base 10000."""
    absent = ("attention.head_count_kv", "attention.key_length", "attention.value_length", "rope.dimension_count")
    shapes = {
        f"blk.{i}.{name}": shape
        for i in range(L)
        for name, shape in {
            "attn_q.weight": (12, 12), "attn_k.weight": (12, 12), "attn_v.weight": (12, 12),
            "attn_output.weight": (12, 12),
        }.items()
    }  # fmt: skip
    config = read(dict.fromkeys((*absent, "rope.freq_base"), ABSENT), shapes)
    assert sizes(config) == (H, H, 2)
    assert (rope_of(config).dimensions, rope_of(config).base) == (2, 10000.0)


def test_keys_of_recurrent_blocks_are_read_in_families_that_have_them_only() -> None:
    assert read({"full_attention_interval": 0, "attention.recurrent_layers": [7]}) == read()


def test_sizes_may_be_given_per_block() -> None:
    arrays = {"attention.head_count": [H, H], "attention.head_count_kv": (G, G), "feed_forward_length": [F, F]}
    config = read(arrays)
    assert sizes(config) == (H, G, HD)
    parts = fused_parts(config, 0)
    assert {name: part for name, part in parts.items() if part.stem == "attn_qkv"} == {
        "attn_q": Part("attn_qkv", 0, 24), "attn_k": Part("attn_qkv", 24, 36), "attn_v": Part("attn_qkv", 36, 48)
    }  # fmt: skip
    with pytest.raises(ConfigError, match=r"blk.1.attn_q.weight has shape \[24, 12\], the metadata calls for \[12"):
        read({"attention.head_count": [H, 3]})
    with pytest.raises(ConfigError, match=r"blk.0.attn_v.weight has shape \[12, 12\], the metadata calls for \[6"):
        read({"attention.value_length": 2})


def fused(*, bias: bool) -> dict[str, Any]:
    shapes: dict[str, Any] = {f"blk.{i}.attn_{part}.weight": ABSENT for i in range(L) for part in "qkv"}
    shapes |= {f"blk.{i}.attn_qkv.weight": (48, D) for i in range(L)}
    return shapes | ({f"blk.{i}.attn_qkv.bias": (48,) for i in range(L)} if bias else {})


@pytest.mark.parametrize("bias", [False, True])
def test_fused_attention_replaces_its_parts(bias: bool) -> None:
    assert fused_parts(read(shapes=fused(bias=bias)), 0)["attn_k"] == Part("attn_qkv", 24, 36)


@pytest.mark.parametrize("name", ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"])
def test_any_matrix_may_have_a_bias(name: str) -> None:
    out = BLOCK[f"{name}.weight"][0]
    read(shapes={f"blk.1.{name}.bias": (out,)})
    with pytest.raises(ConfigError, match=rf"tensor blk.1.{name}.bias has shape \[{out + 1}\], .* calls for \[{out}\]"):
        read(shapes={f"blk.1.{name}.bias": (out + 1,)})


def test_optional_tensors() -> None:
    read(shapes={"output.weight": ABSENT})
    read(shapes={"rope_freqs.weight": (HD // 2,)})


SCALINGS: dict[str, tuple[dict[str, Any], tuple[float, bool, int, float]]] = {
    "none at all": ({}, (1.0, False, 32, 1.0)),
    "linear": ({"type": "linear", "factor": 4.0}, (4.0, False, 32, 1.0)),
    "untyped is linear": ({"factor": 4.0}, (4.0, False, 32, 1.0)),
    "the old key": ({"../scale_linear": 4.0}, (4.0, False, 32, 1.0)),
    "the new key wins": ({"factor": 2.0, "../scale_linear": 4.0}, (2.0, False, 32, 1.0)),
    "zero means none": ({"factor": 0.0}, (1.0, False, 32, 1.0)),
    "switched off": ({"type": "none", "factor": 4.0}, (1.0, False, 32, 1.0)),
    "whole numbers": ({"type": "linear", "factor": 4}, (4, False, 32, 1.0)),
    "yarn": ({"type": "yarn", "factor": 4.0, "original_context_length": 8}, (4.0, True, 8, 1 + 0.1 * math.log(4))),
    "yarn, context by default": ({"type": "yarn", "factor": 4.0}, (4.0, True, 32, 1 + 0.1 * math.log(4))),
    "attention factor": ({"factor": 2.0, "attn_factor": 1.5}, (2.0, False, 32, 1.5)),
}


@pytest.mark.parametrize("name", SCALINGS)
def test_rope_scaling(name: str) -> None:
    keys, expected = SCALINGS[name]
    prefix = "rope.scaling."
    rope = rope_of(read({(prefix + key).replace("scaling.../", ""): value for key, value in keys.items()}))
    assert (rope.factor, rope.yarn, rope.original_context, rope.magnitude) == expected


@pytest.mark.parametrize("case", ["plain", "gqa", "fused_biases", "defaults", "per_layer_arrays", "yarn", "odd_sizes"])
def test_files_are_read(case: str, tiny_file: Callable[..., Path]) -> None:
    o = tiny.options(case)
    with open_gguf(tiny_file(case)) as file:
        config = read_config(file.metadata, {t.name: t.shape for t in file.tensors.values()})
    assert (config.block_count, config.d, config.vocabulary) == (o.layers, o.d, o.vocab)
    assert sizes(config) == (o.heads, o.hk, o.hd)
    assert rope_of(config).dimensions == o.hd


# ---- what is refused

HUGE = 2**31 - 1

# name -> (metadata changes, shape changes, message)
REFUSALS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "another architecture": ({"general.architecture": "ours"}, {}, "architecture 'ours' is not supported; supp"),
    "no architecture": ({"general.architecture": ABSENT}, {}, "does not say what it is: general.architecture is missi"),
    "a vision part": ({"general.type": "mmproj"}, {}, r"general.type is 'mmproj' \(the vision or audio part of a mo"),
    "an adapter": ({"general.type": "adapter"}, {}, r"general.type is 'adapter' \(a LoRA adapter: merge it"),
    "statistics": ({"general.type": "imatrix"}, {}, r"general.type is 'imatrix' \(statistics for quantization\), not"),
    "another type": ({"general.type": ["x"]}, {}, r"general.type is \['x'\], not a language model"),
    "an image generator": ({"general.architecture": "flux"}, {}, "'flux' is not supported: it is an image or video ge"),
    "a control vector": ({"general.architecture": "controlvector"}, {}, "it is a control vector, and ggjac needs a la"),
    "an encoder": ({"general.architecture": "bert"}, {}, "'bert' is not supported: it is a text encoder, and ggjac"),
    "an array for architecture": ({"general.architecture": ["llama"]}, {}, r"architecture \['llama'\] is not supp"),
    "terminal codes": ({"general.architecture": "\x1b[2J"}, {}, r"architecture '\\x1b\[2J' is not supported"),
    "a long name": ({"general.architecture": "x" * 10**6}, {}, r"architecture 'x+\.\.\. is not supported"),
    "experts": ({"expert_count": 8}, {}, "metadata key llama.expert_used_count is missing"),
    "experts, but none there": ({"expert_count": 8, "expert_used_count": 2}, {}, "blk.0.ffn_gate_inp.weight is miss"),
    "more experts used": ({"expert_count": 2, "expert_used_count": 3}, {}, "count is 3, but there are 2 experts"),
    "no causal mask": ({"attention.causal": False}, {}, "llama.attention.causal is False: .* not supported; take"),
    "too many blocks": ({"block_count": HUGE}, {}, r"block_count is 2147483647, but the file holds only 21 tensors"),
    "a block too many": ({"block_count": 3}, {}, "tensor blk.2.attn_q.weight is missing; the file is incomplete"),
    "a block too few": ({"block_count": 1}, {}, "tensor 'blk.1.attn_norm.weight' is not part of a llama model"),
    "heads that cannot share": ({"attention.head_count_kv": 4}, {}, "6 heads cannot share 4 key/value heads evenly"),
    "more kv heads": ({"attention.head_count_kv": 12}, {}, "6 heads cannot share 12 key/value heads evenly"),
    "another number of heads": ({"attention.head_count": 3}, {}, r"tensor blk.0.attn_q.weight has shape \[24, 12\]"),
    "more heads than d": ({"attention.head_count": HUGE, "attention.head_count_kv": 1, "attention.key_length": ABSENT},
                          {}, "key_length is 0; expected a whole number from 1"),
    "huge heads": ({"attention.head_count": HUGE, "attention.head_count_kv": HUGE}, {}, r"attn_q.weight has shape"),
    "rope: odd": ({"rope.dimension_count": 3}, {}, "rope.dimension_count 3 does not fit heads of 4 elements"),
    "rope: odd heads": (
        {"attention.key_length": 3, "attention.value_length": 3, "rope.dimension_count": ABSENT}, {}, "heads of 3"
    ),
    "rope: too many": ({"rope.dimension_count": 8}, {}, "rope.dimension_count 8 does not fit heads of 4 elements"),
    "rope: fewer than the head": ({"rope.dimension_count": 2}, {}, "dimension_count 2 does not fit heads of 4"),
    "rope: base of zero": ({"rope.freq_base": 0.0}, {}, "rope.freq_base is 0.0, .* above 0"),
    "rope: yarn at base one": ({"rope.freq_base": 1.0, "rope.scaling.type": "yarn"}, {}, "is 1.0, .* above 1"),
    "rope: sections": ({"rope.dimension_sections": [1, 1, 0, 0]}, {}, r"sections \[1, 1, 0, 0\] is not supported"),
    "rope: a base that grows": ({"rope.scaling.alpha": 1000.0}, {}, "rope.scaling.alpha 1000.0 is not supported"),
    "rope: one section": ({"rope.dimension_sections": 5}, {}, "dimension_sections 5 is not supported"),
    "rope: another scaling": ({"rope.scaling.type": "su"}, {}, "scaling.type 'su' is not supported; supported: none"),
    "rope: type of a wrong type": ({"rope.scaling.type": 3}, {}, "rope.scaling.type 3 is not supported"),
    "rope: an array for a type": ({"rope.scaling.type": ["yarn"]}, {}, "is not supported; supported: none, linear, y"),
    "rope: long factors": ({}, {"rope_factors_long.weight": (3,)}, r"factors_long.weight has shape \[3\], .* \[2\]"),
    "rope: factors of a wrong size": ({}, {"rope_freqs.weight": (4,)}, r"rope_freqs.weight has shape \[4\], .* \[2\]"),
    "array of a wrong length": ({"attention.head_count": [6]}, {}, "head_count has 1 entries for 2 blocks"),
    "array with a zero": ({"feed_forward_length": [10, 0]}, {}, "feed_forward_length\\[1\\] is 0; expected"),
    "array with a string": ({"feed_forward_length": [10, "x"]}, {},
                            "feed_forward_length\\[1\\] is 'x'; expected a finite, non-negative number"),
    "array where a number is due": ({"embedding_length": [12]}, {},
                                    r"embedding_length is \[12\]; expected a finite, non-negative number"),
    "no kv part": ({}, {"blk.1.attn_k.weight": ABSENT}, "tensor blk.1.attn_k.weight is missing"),
    "a fused part short": ({}, fused(bias=False) | {"blk.0.attn_qkv.weight": (47, D)},
                           r"blk.0.attn_qkv.weight has shape \[47, 12\], the metadata calls for \[48, 12\]"),
    "no embeddings": ({}, {"token_embd.weight": ABSENT}, "tensor token_embd.weight is missing; the file is incomplete"),
    "embeddings of another width": ({}, {"token_embd.weight": (V, 8)}, r"token_embd.weight has shape \[7, 8\]"),
    "flat embeddings": ({}, {"token_embd.weight": (V,)}, r"token_embd.weight has shape \[7\]"),
    "a head of another vocabulary": ({}, {"output.weight": (V + 1, D)}, r"output.weight has shape \[8, 12\]"),
    "a tensor that would change the sum": ({}, {"blk.0.attn_q_norm.weight": (HD,)}, "attn_q_norm.weight' is not"),
    "a scale of a norm": ({}, {"blk.0.ffn_norm.scale": (1,)}, "'blk.0.ffn_norm.scale' is not part of a llama model"),
    "a scale of nothing": ({}, {"blk.0.attn_qkv.scale": (1,)}, "'blk.0.attn_qkv.scale' is not part of a llama model"),
    "a scale of a part": ({}, {f"blk.{i}.{name}.weight": shape for i in range(L) for name, shape in
                               (("attn_qkv", (48, D)), *((f"attn_{part}", ABSENT) for part in "qkv"))}
                          | {"blk.1.attn_q.scale": (1,)}, "'blk.1.attn_q.scale' is not part of a llama model"),
    "a scale of a tied head": ({}, {"output.weight": ABSENT, "output.scale": (1,)}, "'output.scale' is not part of a"),
    "a scale of each row": ({}, {"blk.0.ffn_up.scale": (F,)}, r"ffn_up.scale has shape \[10\], .* calls for \[1\]"),
    "scales of the head": ({}, {"output.scale": (V,)}, r"tensor output.scale has shape \[7\], .* calls for \[1\]"),
    "two scales": ({}, {"blk.1.attn_q.input_scale": (2,)}, r"attn_q.input_scale has shape \[2\], .* calls for \[1\]"),
    "a bias scaled or not": ({}, {"blk.0.ffn_up.scale": (1,), "blk.0.ffn_up.bias": (F,)},
                             "'blk.0.ffn_up.scale' is not part of a llama model"),
    "an unprintable tensor": ({}, {"\x1b[31m": (1,)}, r"tensor '\\x1b\[31m' is not part of a llama model"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_name_what_is_wrong(name: str) -> None:
    metadata, shapes, message = REFUSALS[name]
    with pytest.raises(ConfigError, match=message) as error:
        read(metadata, shapes)  # at once: nothing may be built for a number before it is checked
    assert "\n" not in str(error.value)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 160 + len(", ".join(ARCHITECTURES))  # however long what the file says is


REQUIRED = ("block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count",
            "attention.layer_norm_rms_epsilon")  # fmt: skip


@pytest.mark.parametrize("key", REQUIRED)
def test_missing_keys_are_named(key: str) -> None:
    with pytest.raises(ConfigError, match=f"metadata key llama.{key} is missing"):
        read({key: ABSENT})


@pytest.mark.parametrize("name", [name for name in SHAPES if name != "output.weight"])
def test_missing_tensors_are_named(name: str) -> None:
    with pytest.raises(ConfigError, match=f"tensor {name} is missing"):
        read(shapes={name: ABSENT})


@pytest.mark.parametrize("name", SHAPES)
def test_wrong_shapes_are_named(name: str) -> None:
    for shape in ((*SHAPES[name][::-1], 1), (SHAPES[name][0] + 1, *SHAPES[name][1:])):
        with pytest.raises(ConfigError, match=r"has shape .*, the metadata calls for"):
            read(shapes={name: shape})


NUMBERS = [key.removeprefix("llama.") for key in METADATA if key != "general.architecture"]
WRONG = ["12", True, False, -1, -1.0, math.nan, math.inf, -math.inf, {}]


@pytest.mark.parametrize("key", [*NUMBERS, "rope.scaling.factor", "rope.scaling.attn_factor", "rope.scale_linear"])
@pytest.mark.parametrize("value", WRONG, ids=repr)
def test_values_that_are_no_sensible_number_are_named(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"metadata key llama.{key} is .*; expected a finite, non-negative number"):
        read({key: value})


WHOLE = [key for key in NUMBERS if key not in ("attention.layer_norm_rms_epsilon", "rope.freq_base")]


@pytest.mark.parametrize("key", [*WHOLE, "rope.scaling.original_context_length"])
@pytest.mark.parametrize("value", [0, 2.0, 2.5, 2**31, 2**64, 10**40])
def test_counts_are_whole_numbers_within_reason(key: str, value: Any) -> None:
    with pytest.raises(
        ConfigError, match=f"metadata key llama.{key} is .*; expected a whole number from 1 to 2147483647"
    ):
        read({key: value})


scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 40), st.integers(-(2**63), 2**64), st.floats(width=32),
    st.text(max_size=3),
    st.sampled_from(["llama", "yarn", "linear", "none", "longrope", HUGE, 2**63]),
)  # fmt: skip
values = scalars | st.lists(scalars, max_size=3)
KEYS = [*NUMBERS, "general.architecture", "expert_count", "attention.causal", "rope.scaling.type",
        "rope.scaling.factor", "rope.scaling.attn_factor", "rope.scaling.original_context_length"]  # fmt: skip


@settings(deadline=None, max_examples=400)
@given(st.dictionaries(st.sampled_from(KEYS), values, max_size=3))
def test_no_metadata_leads_to_anything_but_a_model_or_a_refusal(changes: dict[str, Any]) -> None:
    try:
        config = read(changes)
    except ConfigError:
        return
    cos, sin = rotation(rope_of(config), 5)
    assert cos.isfinite().all()
    assert sin.isfinite().all()


def test_every_architecture_says_how_its_pairs_rotate() -> None:
    assert {row.rope_pairs for row in ARCHITECTURES.values()} == {"adjacent", "halves", ""}


def of(
    architecture: str, changes: dict[str, Any], tensors: tuple[str, ...], more: dict[str, Any] | None = None
) -> ModelConfig:
    """Read the model above as of another architecture, with more tensors in each block: norms of heads or of d."""
    metadata = {key.replace("llama.", f"{architecture}."): value for key, value in METADATA.items()}
    metadata |= {"general.architecture": architecture} | {f"{architecture}.{k}": v for k, v in changes.items()}
    metadata = {key: value for key, value in metadata.items() if value is not ABSENT}
    shapes = {f"blk.{i}.{name}.weight": (HD if name[-6:] in ("q_norm", "k_norm") else D,)
              for i in range(L) for name in tensors}  # fmt: skip
    return read_config(metadata, SHAPES | shapes | (more or {}))


@pytest.mark.parametrize(
    ("architecture", "sections", "still"),
    [
        ("qwen3vl", [1, 1, 0, 0], ()),
        ("qwen3vl", [2, 0, 0, 0], (1,)),
        ("qwen3vl", [1, 0, 0, 1], None),
        ("qwen3vl", [2], None),
        ("qwen2vl", [2, 0, 0, 0], ()),
        ("qwen2vl", [1, 0, 0, 1], (1,)),
        ("qwen2vl", [1, 0, 0, 0], None),
        ("qwen2vl", [1, 2, 0, -1], None),
        ("qwen2vl", [1, 1, 1], None),
    ],
)
def test_sections_of_rotation_must_cover_all_pairs(
    architecture: str, sections: list[int], still: tuple[int, ...] | None
) -> None:
    """Dealt in turn, the first three must; they may still leave some to the fourth, and text has no place on that."""
    more = ("attn_q_norm", "attn_k_norm") if architecture == "qwen3vl" else ()

    def read_sections() -> ModelConfig:
        return of(architecture, {"rope.dimension_sections": sections}, more)

    if still is None:
        with pytest.raises(ConfigError, match=r"dimension_sections \[.+\] is not supported"):
            read_sections()
    else:
        assert rope_of(read_sections()).still == still


@pytest.mark.parametrize("key", ["rope.dimension_count_swa", "attention.key_length_swa", "attention.value_length_swa"])
def test_windowed_layers_of_another_size_are_refused(key: str) -> None:
    """(llama.cpp reads these keys; where the file says the same for all layers nothing is lost.)"""
    sandwich = ("post_attention_norm", "post_ffw_norm")
    assert of("gemma2", {key: HD}, sandwich).layers[0].window == 4096
    with pytest.raises(ConfigError, match=rf"gemma2.{key} 2 differs from other layers' 4"):
        of("gemma2", {key: 2}, sandwich)


XIELU = {"xielu.alpha_n": 0.5, "xielu.alpha_p": [25.0, -1.0], "xielu.beta": 0.5, "xielu.eps": -1e-6}


def apertus(**changes: Any) -> ModelConfig:
    """Read an Apertus whose keys of xIELU are changed."""
    keys = XIELU | {f"xielu.{name}": value for name, value in changes.items()}
    metadata = {key.replace("llama.", "apertus."): value for key, value in METADATA.items()} | keys
    metadata = {key: value for key, value in metadata.items() if value is not ABSENT}
    norms = {f"blk.{i}.{name}.weight": (HD,) for i in range(L) for name in ("attn_q_norm", "attn_k_norm")}
    shapes = {name: shape for name, shape in SHAPES.items() if "ffn_gate" not in name}
    return read_config(metadata | {"general.architecture": "apertus"}, shapes | norms)


def test_xielu_has_constants_of_each_block() -> None:
    n = 0.5 + math.log(1 + math.exp(0.5))
    assert [layer.xielu for layer in apertus().layers] == [(n, 25.0, 0.5), (n, math.log(1 + math.exp(-1)), 0.5)]
    assert read().layers[0].xielu is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beta": ABSENT}, "xielu.beta is missing"),
        ({"beta": [0.5] * 3}, "xielu.beta has 3 entries for 2 blocks"),
        ({"alpha_n": "x"}, "xielu.alpha_n contains 'x'; expected finite numbers"),
        ({"alpha_n": [0.5, math.nan]}, "xielu.alpha_n contains nan; expected finite numbers"),
        ({"alpha_p": True}, "xielu.alpha_p contains True; expected finite numbers"),
        ({"eps": [-1e-6, -0.5]}, "xielu.eps is -0.5: steps larger than 1e-05 are not supported"),
    ],
)
def test_xielu_is_refused_where_it_makes_no_sense(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        apertus(**changes)


def test_ollamas_own_keys_are_refused_where_they_stand_in_for_llamacpps() -> None:
    """Its first conversions of Gemma 3 have them: llama.cpp, and without a word we, would turn at the default base."""
    tensors = ("attn_q_norm", "attn_k_norm", "post_attention_norm", "post_ffw_norm")
    own = {"rope.global.freq_base": 1e6, "rope.local.freq_base": 1e4}
    assert rope_of(of("gemma3", own, tensors)).base == 500.0
    with pytest.raises(
        ConfigError, match=r"gemma3.rope.global.freq_base is specific to Ollama, .* converted by llama.cpp"
    ):
        of("gemma3", own | {"rope.freq_base": ABSENT}, tensors)


def test_experts_per_token_may_be_given_per_block_if_they_are_equal() -> None:
    experts = {"ffn_gate_inp": (4, D), "ffn_gate_exps": (4, 8, D), "ffn_up_exps": (4, 8, D), "ffn_down_exps": (4, D, 8)}
    shapes: dict[str, Any] = {f"blk.{i}.{name}.weight": shape for i in range(L) for name, shape in experts.items()}
    shapes |= {f"blk.{i}.{name}.weight": ABSENT for i in range(L) for name in ("ffn_gate", "ffn_up", "ffn_down")}
    assert read({"expert_count": 4, "expert_used_count": [2, 2]}, shapes).layers[1].experts_used == 2
    with pytest.raises(ConfigError, match="expert_used_count differs between blocks"):
        read({"expert_count": 4, "expert_used_count": [2, 1]}, shapes)


@pytest.mark.parametrize(("value", "shown"), [(ABSENT, "missing"), (1, "1"), ("true", "'true'")])
def test_whether_branches_are_parallel_must_be_true_or_false(value: Any, shown: str) -> None:
    """llama.cpp does not run a file without it either."""
    with pytest.raises(ConfigError, match=f"key gptneox.use_parallel_residual is {shown}; expected true or false"):
        of("gptneox", {"use_parallel_residual": value}, ())


E, USED, FE = 4, 2, 8


def mixture(architecture: str = "glm4moe", shapes: dict[str, Any] | None = None, **changes: Any) -> ModelConfig:
    """Read the model above as a mixture whose first block is dense, with changes; `__` stands for a dot."""
    keys = {"expert_count": E, "expert_used_count": USED, "expert_feed_forward_length": FE, "expert_shared_count": 2,
            "leading_dense_block_count": 1, "expert_gating_func": 2}  # fmt: skip
    keys |= {name.replace("__", "."): value for name, value in changes.items()}
    metadata = {name.replace("llama.", f"{architecture}."): value for name, value in METADATA.items()}
    metadata |= {"general.architecture": architecture} | {f"{architecture}.{name}": v for name, v in keys.items()}
    routed = {"ffn_gate_inp": (E, D), "ffn_gate_exps": (E, FE, D), "ffn_up_exps": (E, FE, D)}
    routed |= {"ffn_down_exps": (E, D, FE), "ffn_gate_shexp": (2 * FE, D), "ffn_up_shexp": (2 * FE, D)}
    routed |= {"ffn_down_shexp": (D, 2 * FE)}
    found: dict[str, Any] = {name: shape for name, shape in SHAPES.items() if not name.startswith("blk.1.ffn_")}
    if architecture == "glm4moe":
        found = {name.replace("ffn_norm", "post_attention_norm"): shape for name, shape in found.items()}
    found |= {f"blk.1.{name}.weight": shape for name, shape in routed.items()} | {"blk.1.exp_probs_b.bias": (E,)}
    norm = "post_attention_norm" if architecture == "glm4moe" else "ffn_norm"
    found |= {f"blk.1.{norm}.weight": (D,)} | (shapes or {})
    return read_config(
        {name: value for name, value in metadata.items() if value is not ABSENT},
        {name: shape for name, shape in found.items() if shape is not ABSENT},
    )


def test_first_blocks_of_a_mixture_may_be_dense() -> None:
    config = mixture()
    assert [layer.routed for layer in config.layers] == [False, True]
    assert [layer.hidden_units for layer in config.layers] == [F, 0]
    assert config.layers[-1].expert_units == FE
    assert config.expert_shared_feed_forward_length == config.hidden_units == 2 * FE
    wide = dataclasses.replace(config.layers[0], hidden_units=40)
    assert dataclasses.replace(config, layers=(wide, config.layers[1])).hidden_units == 40
    assert (config.expert_groups, config.expert_weights_scale, config.row.renormalize) == (1, 1.0, False)
    assert config.row.router == "sigmoid"
    assert mixture(expert_gating_func=1).row.router == "softmax"
    assert mixture(expert_gating_func=0).row.router == mixture(expert_gating_func=ABSENT).row.router == "sigmoid"
    assert mixture(expert_weights_scale=0.0).expert_weights_scale == 1
    assert mixture(expert_weights_scale=2.5, expert_weights_norm=True).expert_weights_scale == 2.5
    assert mixture(expert_weights_norm=True).row.renormalize
    assert mixture("exaone-moe", HEAD_NORMS, attention__sliding_window=4).row.router == "sigmoid"


def test_blocks_that_predict_later_tokens_are_left_out() -> None:
    """(As llama.cpp does: whatever is in them.)"""
    more = {f"blk.2.{name}.weight": shape for name, shape in {"attn_q": (1,), "nextn.eh_proj": (D, 2 * D)}.items()}
    assert mixture(block_count=3, nextn_predict_layers=1, shapes=more).block_count == 2
    assert (
        mixture(block_count=3, nextn_predict_layers=1, shapes=more, attention__head_count=[H] * 3).layers[0].heads == H
    )


def routed(shapes: dict[str, Any]) -> ModelConfig:
    """Read the model above as a mixture in all blocks, with changes."""
    stacks = {"gate_inp": (E, D), "gate_exps": (E, FE, D), "up_exps": (E, FE, D), "down_exps": (E, D, FE)}
    found: dict[str, Any] = {f"blk.{i}.ffn_{name}.weight": shape for i in range(L) for name, shape in stacks.items()}
    found |= {f"blk.{i}.ffn_{name}.weight": ABSENT for i in range(L) for name in ("gate", "up", "down")}
    return read({"expert_count": E, "expert_used_count": USED}, found | shapes)


FUSED: dict[str, Any] = {f"blk.{i}.ffn_{name}_exps.weight": ABSENT for i in range(L) for name in ("gate", "up")}
FUSED |= {f"blk.{i}.ffn_gate_up_exps.weight": (E, 2 * FE, D) for i in range(L)}


def test_the_experts_gates_may_be_stored_above_their_other_projections() -> None:
    config = routed(FUSED)
    parts = fused_parts(config, 0)
    assert config.layers[-1].expert_units == FE
    assert parts["ffn_gate_exps"] == Part("ffn_gate_up_exps", 0, FE)
    assert parts["ffn_up_exps"] == Part("ffn_gate_up_exps", FE, 2 * FE)


@pytest.mark.parametrize("kind", ["scale", "input_scale", "weight.scale", "weight.input_scale"])
def test_any_matrix_may_have_a_constant_factor(kind: str) -> None:
    read(shapes={"output." + kind: (1,), **{f"blk.0.{name.removesuffix('weight')}{kind}": (1,) for name, shape in
                                            BLOCK.items() if len(shape) > 1}})  # fmt: skip
    read(shapes={f"blk.1.attn_q.{kind}": (1,), "blk.1.attn_q.bias": (H * HD,)})
    routed({f"blk.1.ffn_{name}_exps.{kind}": (E,) for name in ("gate", "up", "down")})
    routed({f"blk.1.ffn_up_exps.{kind}": (E,), "blk.1.ffn_up_exps.bias": (E, FE)})
    routed(FUSED | {f"blk.0.ffn_gate_up_exps.{kind}": (E,), f"blk.1.ffn_gate_up_exps.{kind}": (E,)})
    for architecture in ("llama", "qwen2"):
        of(architecture, {}, (), {f"blk.0.attn_v.{kind}": (1,)})
    with pytest.raises(ConfigError, match=rf"tensor 'blk.0.ffn_up.{kind}' is not part of a qwen2 model"):
        of("qwen2", {}, (), {f"blk.0.ffn_up.{kind}": (1,)})


SCALES: dict[str, tuple[dict[str, Any], str]] = {
    "of a stack": ({"blk.1.ffn_up_exps.scale": (1,)}, r"ffn_up_exps.scale has shape \[1\], .* calls for \[4\]"),
    "of the router": ({"blk.1.ffn_gate_inp.scale": (1,)}, "'blk.1.ffn_gate_inp.scale' is not part of a llama model"),
    "experts one by one": (
        {"blk.0.ffn_gate_exps.weight": ABSENT, "blk.0.ffn_gate.0.weight": (FE, D)},
        r"blk.0.ffn_gate_exps.weight is missing: the experts are single tensors \(blk.0.ffn_gate.0.weight\), as be",
    ),
    "beside the whole": (FUSED | {"blk.1.ffn_up_exps.scale": (E,)}, "'blk.1.ffn_up_exps.scale' is not part of a llama"),
    "of another block": ({"blk.1.ffn_up.scale": (1,)}, "'blk.1.ffn_up.scale' is not part of a llama model"),
    "fused, too narrow": (FUSED | {"blk.1.ffn_gate_up_exps.weight": (E, FE, D)},
                          r"gate_up_exps.weight has shape \[4, 8, 12\], the metadata calls for \[4, 16, 12\]"),
    "neither fused nor gates": (FUSED | {"blk.1.ffn_gate_up_exps.weight": ABSENT}, "blk.1.ffn_gate_exps.weight is mis"),
}  # fmt: skip


@pytest.mark.parametrize("name", SCALES)
def test_scales_and_fused_experts_are_refused_by_name(name: str) -> None:
    shapes, message = SCALES[name]
    with pytest.raises(ConfigError, match=message) as error:
        routed(shapes)
    assert "\n" not in str(error.value)


HEAD_NORMS = {f"blk.{i}.attn_{of}_norm.weight": (HD,) for i in range(L) for of in "qk"}
# name -> (architecture, changes, shape changes, message)
MIXTURES: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "one dense block too many": ("glm4moe", {"leading_dense_block_count": 2}, {}, "blk.1.ffn_gate.weight is missing"),
    "one too few": ("glm4moe", {"leading_dense_block_count": 0}, {}, "tensor blk.0.ffn_gate_inp.weight is missing"),
    "not stated, so none": ("glm4moe", {"leading_dense_block_count": ABSENT}, {}, "blk.0.ffn_gate_inp.weight is miss"),
    "its width": ("glm4moe", {"feed_forward_length": ABSENT}, {}, "feed_forward_length is missing"),
    "experts' width": ("glm4moe", {"expert_feed_forward_length": ABSENT}, {}, "expert_feed_forward_length is missing"),
    "another width": ("glm4moe", {"expert_feed_forward_length": 9}, {}, r"exps.weight has shape .*4, 8, 12.*4, 9, 12"),
    "shared": ("glm4moe", {"expert_shared_count": ABSENT}, {}, "glm4moe.expert_shared_count is missing"),
    "none shared": ("glm4moe", {"expert_shared_count": 0}, {}, "'blk.1.ffn_.+_shexp.weight' is not part of a glm"),
    "more shared": ("glm4moe", {"expert_shared_count": 3}, {}, r"shexp.weight has shape \[16, 12\], .* \[24, 12\]"),
    "no bias": ("glm4moe", {}, {"blk.1.exp_probs_b.bias": ABSENT}, "tensor blk.1.exp_probs_b.bias is missing; the fil"),
    "a bias more": ("glm4moe", {}, {"blk.0.exp_probs_b.bias": (E,)}, "'blk.0.exp_probs_b.bias' is not part of a glm4"),
    "a wrong bias": ("glm4moe", {}, {"blk.1.exp_probs_b.bias": (E + 1,)}, r"probs_b.bias has shape \[5\], .* \[4\]"),
    "a bias where none is": ("deepseek", {}, {}, "'blk.1.exp_probs_b.bias' is not part of a deepseek model"),
    "another router": ("glm4moe", {"expert_gating_func": 3}, {}, "gating_func is 3; supported: 1 softmax, 2 sigmoid"),
    "no router": ("dots1", {"expert_gating_func": ABSENT}, HEAD_NORMS, "dots1.expert_gating_func is missing; suppo"),
    "router by name": ("glm4moe", {"expert_gating_func": "sigmoid"}, {},
                       "is 'sigmoid'; expected a finite, non-negative number"),
    "norm": ("glm4moe", {"expert_weights_norm": 1}, {}, "glm4moe.expert_weights_norm is 1; expected true or false"),
    "a scale": ("glm4moe", {"expert_weights_scale": "x"}, {},
                "expert_weights_scale is 'x'; expected a finite, non-negative number"),
    "a groups' number": ("glm4moe", {"expert_group_count": 2}, {}, "expert_group_used_count is missing"),
    "uneven groups": ("glm4moe", {"expert_group_count": 3, "expert_group_used_count": 2}, {},
                      "glm4moe.expert_group_count is 3, expert_group_used_count 2: 2 of 4 experts cannot be chosen"),
    "groups of one": ("glm4moe", {"expert_group_count": 4, "expert_group_used_count": 2}, {}, "cannot be chosen"),
    "more groups used": ("glm4moe", {"expert_group_count": 2, "expert_group_used_count": 3}, {}, "cannot be chosen"),
    "too few to choose": ("glm4moe", {"expert_group_count": 2, "expert_group_used_count": 1, "expert_used_count": 3},
                          {}, "3 of 4 experts cannot be chosen"),
    "mixtures now and then": ("ernie4_5-moe", {"interleave_moe_layer_step": 2}, {}, "dense blocks between mixtures"),
    "predictors": ("glm4moe", {"nextn_predict_layers": 2}, {}, "nextn_predict_layers is 2, of 2 blocks in all"),
    "a predictor is no block": ("dots1", {"nextn_predict_layers": 1}, HEAD_NORMS, "block 1, one of the last"),
    "half a norm of heads": ("glm4moe", {}, {"blk.0.attn_q_norm.weight": (HD,)}, "blk.0.attn_k_norm.weight is missing"),
    "no window": ("exaone-moe", {}, HEAD_NORMS, "metadata key exaone-moe.attention.sliding_window is missing"),
}  # fmt: skip


@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures_are_refused_by_name(name: str) -> None:
    architecture, changes, shapes, message = MIXTURES[name]
    with pytest.raises(ConfigError, match=message) as error:
        mixture(architecture, shapes, **changes)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 160


NORMED = {"q_norm": H, "k_norm": G}


@pytest.mark.parametrize("layer", range(L))
def test_all_blocks_are_normed_alike(layer: int) -> None:
    """A StableLM's blocks may lack the second norm, or have norms of heads, but not one block without the others."""
    metadata = {name.replace("llama.", "stablelm."): value for name, value in METADATA.items()}
    metadata |= {"general.architecture": "stablelm", "stablelm.attention.layer_norm_epsilon": 1e-5}

    def parallel(shapes: dict[str, Any]) -> bool:
        return read_config(metadata, shapes).row.parallel

    whole = SHAPES | {f"blk.{i}.attn_{of}.weight": (heads, HD) for i in range(L) for of, heads in NORMED.items()}
    for part in ("ffn_norm", "attn_q_norm", "attn_k_norm"):
        lacking = {name: shape for name, shape in whole.items() if name != f"blk.{layer}.{part}.weight"}
        with pytest.raises(ConfigError, match=r"tensor '?blk\.\d\.(ffn|attn_[qk])_norm.weight'? is (missing|not)"):
            parallel(lacking)
    assert not parallel(whole)
    assert parallel({name: shape for name, shape in whole.items() if "ffn_norm" not in name})


# ---- latent attention


def altered(path: Path, keys: dict[str, Any], shapes: dict[str, Any]) -> ModelConfig:
    """Read a file's configuration with changes; keys are below its architecture's, and names below `blk.0.`."""
    with open_gguf(path) as file:
        prefix = file.metadata["general.architecture"]
        metadata = dict(file.metadata) | {f"{prefix}.{key}": value for key, value in keys.items()}
        found = {info.name: info.shape for info in file.tensors.values()}
        outside = ("output", "rope_freqs", "token_embd", "hrm.", "altup_unembd")
        found |= {name if name.startswith(outside) else f"blk.0.{name}": shape for name, shape in shapes.items()}
        return read_config(
            {name: value for name, value in metadata.items() if value is not ABSENT},
            {name: shape for name, shape in found.items() if shape is not ABSENT},
        )


# name -> (case, changes, shape changes, message)
LATENT: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    **{
        f"no {name}": (case, {}, {f"{name}.weight": ABSENT}, f"tensor blk.0.{name}.weight is missing; the file is inco")
        for case, names in {
            "deepseek2": ("attn_q_a", "attn_q_a_norm", "attn_q_b", "attn_kv_a_mqa", "attn_kv_a_norm", "attn_k_b",
                          "attn_v_b", "attn_output"),
            "deepseek2_unsplit": ("attn_kv_b",),
            "plm": ("attn_q",),
        }.items()
        for name in names
    },
    "keys not transposed": ("deepseek2", {}, {"attn_k_b.weight": (4, 12, 20)}, r"k_b.weight has shape \[4, 12, 20\], "
                            r"the metadata calls for \[4, 20, 12\]"),
    "values of another size": ("deepseek2", {"attention.value_length_mla": 11}, {}, r"attn_output.weight has .*, 44\]"),
    "values not as the output": ("deepseek2", {}, {"attn_v_b.weight": (4, 11, 20)}, r"v_b.weight has .* \[4, 10, 20\]"),
    "another latent": ("deepseek2", {"attention.kv_lora_rank": 21}, {}, r"kv_a_mqa.weight has shape .* \[29, 64\]"),
    "no latent": ("deepseek2", {"attention.kv_lora_rank": ABSENT}, {}, "attention.kv_lora_rank is missing"),
    "no latent of queries": ("deepseek2", {"attention.q_lora_rank": ABSENT}, {}, "attention.q_lora_rank is missing"),
    "of size zero": ("minicpm3", {"attention.q_lora_rank": 0}, {}, "q_lora_rank is 0; expected a whole number from 1"),
    "only one size of heads": ("deepseek2", {"attention.key_length_mla": ABSENT}, {}, "the file states one of key_le"),
    "no size of heads": ("deepseek32", {"attention.key_length_mla": ABSENT}, {}, "attention.key_length_mla is missing"),
    "old layout where there is none": ("glm_dsa", {}, {"attn_k_b.weight": ABSENT, "attn_kv_b.weight": (88, 20)},
                                       "tensor blk.0.attn_k_b.weight is missing"),
    "nothing rotates": ("deepseek2", {"rope.dimension_count": ABSENT}, {}, "rope.dimension_count is missing"),
    "everything rotates": ("deepseek2", {"rope.dimension_count": 20}, {},
                           "rope.dimension_count 20 leaves no other elements of keys of 20"),
    "a latent of queries in 27 blocks": ("deepseek2_lite", {"block_count": 28}, {}, "attention.q_lora_rank is missing"),
    "none in 28": ("deepseek2_lite", {}, {"attn_q.weight": ABSENT}, "tensor blk.0.attn_q.weight is missing"),
    "growth by nothing": ("deepseek2", {"attention.temperature_scale": 0.5}, {}, "temperature_length is missing"),
    "growth by zero": ("mistral4", {"attention.temperature_scale": 0.5, "attention.temperature_length": 0}, {},
                       "temperature_length is 0; expected a whole number"),
    "another router": ("deepseek2", {"expert_gating_func": 5}, {}, "gating_func is 5; supported: 1 softmax, 2 sigmoid"),
    "no router": ("deepseek32", {"expert_gating_func": ABSENT}, {}, "deepseek32.expert_gating_func is missing; suppo"),
    "no router of hy_v4": ("hy_v4", {"expert_gating_func": ABSENT}, {}, "hy_v4.expert_gating_func is missing; suppo"),
    "router zero": ("minimax_m3", {"expert_gating_func": 0}, {}, "minimax-m3.expert_gating_func is missing; supported"),
    "sections": ("deepseek32", {"rope.dimension_sections": [2, 1, 1, 0]}, {}, "dimension_sections .* not supported"),
    "no keys chosen": ("deepseek32", {"attention.indexer.top_k": 0}, {}, "indexer.top_k is 0; expected a whole number"),
    "choice not stated": ("glm_dsa", {"attention.indexer.top_k": ABSENT}, {}, "attention.indexer.top_k is missing"),
    "blocks of nothing": ("minimax_m3", {"attention.indexer.block_size": 0}, {}, "indexer.block_size is 0; expected"),
    "another indexer": ("deepseek32", {"attention.indexer.head_count": 7}, {}, r"indexer.attn_q_b.weight has shape "
                        r"\[512, 24\], the metadata calls for \[448, 24\]"),
    "an indexer elsewhere": ("deepseek2", {}, {"indexer.proj.weight": (8, 64)}, "'blk.0.indexer.proj.weight' is not"),
    "a bias of the latent": ("deepseek2", {}, {"attn_kv_a_mqa.bias": (28,)}, "'blk.0.attn_kv_a_mqa.bias' is not part"),
    "one stream": ("hy_v4", {"hyper_connection.count": 1}, {}, "connection.count is 1; at least 2 streams are"),
    "streams of another number": ("hy_v4", {"hyper_connection.count": 4}, {}, r"tensor output_hc_fn.weight has shape"),
    "no weights of streams": ("hy_v4", {}, {"hc_ffn_fn.weight": ABSENT}, "tensor blk.0.hc_ffn_fn.weight is missing"),
    "no magnitude": ("hy_v4", {"hyper_connection.magnitude": ABSENT}, {}, "hyper_connection.magnitude is missing"),
    "no blocks over depth": ("kimi_k3", {"attn_res.block_size": ABSENT}, {}, "attn_res.block_size is missing"),
    "no scores over depth": ("kimi_k3", {}, {"ffn_res_score.weight": ABSENT}, "blk.0.ffn_res_score.weight is missing"),
    "scores of one stream": ("kimi_k3", {"attn_res.block_size": 0}, {}, "'output_res_score.weight' is not part of a"),
    "gates without a limit": ("kimi_k3", {"activation.situ_beta": 0.0}, {}, "situ_beta is 0, but gates are divided"),
    "no limit of up": ("kimi_k3", {"activation.situ_linear_beta": ABSENT}, {}, "situ_linear_beta is missing"),
    "no width of a latent": ("kimi_k3", {"expert_latent_length": ABSENT}, {}, r"ffn_gate_exps.weight has shape"),
    "gates in two steps": ("kimi_k3", {}, {"ssm_g_a.weight": (16, 64)}, "'blk.0.ssm_g_a.weight' is not part of"),
    "no rounds": ("glm5_next", {"hyper_connection.sinkhorn_iterations": ABSENT}, {}, "sinkhorn_iterations is missing"),
    "too many rounds": ("glm5_next", {"hyper_connection.sinkhorn_iterations": 10**6}, {}, "s 1000000; at most 1000"),
    "weights of streams that are not mixed": ("glm5_next", {}, {"hc_attn_fn.weight": (8, 256)},
                                              r"hc_attn_fn.weight has shape \[8, 256\], .* \[24, 256\]"),
    "weights of a mean": ("glm5_next", {}, {"output_hc_fn.weight": (4, 256)}, "output_hc_fn.weight' is not part of a"),
    "a part of a pool": ("glm5_next", {"attention.indexer.top_k": 63}, {}, "top_k is 63: not a whole number of pools"),
    "no pools": ("glm5_next", {"attention.indexer.kpool": ABSENT}, {}, "attention.indexer.kpool is missing"),
    "the last keys left out": ("glm5_next", {"attention.indexer.kpool_select_tail": False}, {},
                               "kpool_select_tail is False: attention without the last keys is not supported"),
    "pools of another size": ("glm5_next_bounded", {"attention.indexer.kpool": 8}, {},
                              r"indexer_compressor_ape.weight has shape \[4, 64\], .* \[8, 64\]"),
    "no number of rotated elements": ("glm5_next", {"rope.dimension_count": ABSENT}, {}, "dimension_count is missing"),
    "no sinks": ("hy_v4", {}, {"attn_sinks.weight": ABSENT}, "tensor blk.0.attn_sinks.weight is missing"),
    "a ratio unknown": ("deepseek4", {"attention.compress_ratios": [0, 4, 8]}, {},
                        "compress_ratios contains 8; expected 0 or 4 or 128 for each of 3 blocks"),
    "too few ratios": ("deepseek4", {"attention.compress_ratios": [0, 4]}, {}, "_ratios has 2 entries; expected 0"),
    "a ratio alone": ("deepseek4", {"attention.compress_ratios": 4}, {}, "compress_ratios is 4; expected 0 or 4"),
    "a ratio of words": ("deepseek4", {"attention.compress_ratios": [0, "8" * 99, 4]}, {}, r"contains '8{56}\.\.\.;"),
    "no ratios": ("deepseek4", {"attention.compress_ratios": ABSENT}, {}, "compress_ratios has 0 entries; expected 0"),
    "groups of heads": ("deepseek4", {"attention.output_group_count": 3}, {}, "4 heads do not make 3 groups"),
    "several heads of keys": ("deepseek4", {"attention.head_count_kv": 2}, {}, "2 key/value heads of 32 and 32 eleme"),
    "values that are not the keys": ("deepseek4", {"attention.value_length": 16}, {}, "heads of 32 and 16 elements; s"),
    "a base of nothing": ("deepseek4", {"attention.compress_rope_freq_base": 0.0}, {}, "rotation needs a base above 0"),
    "a table of another size": ("deepseek4", {}, {"ffn_gate_tid2eid.weight": (127, 2)}, r"calls for \[128, 2\]"),
    "no table": ("deepseek4", {}, {"ffn_gate_tid2eid.weight": ABSENT}, "blk.0.ffn_gate_tid2eid.weight is missing"),
    "a bias beside the table": ("deepseek4", {}, {"exp_probs_b.bias": (6,)}, "'blk.0.exp_probs_b.bias' is not part of"),
    "no bias without a table": ("deepseek4", {"hash_layer_count": 0}, {"ffn_gate_tid2eid.weight": ABSENT},
                                "tensor blk.0.exp_probs_b.bias is missing"),
    "a memory where there is none": ("deepseek4", {}, {"attn_compressor_norm.weight": (32,)}, "norm.weight' is not"),
    "a head of its own": ("plm", {}, {"output.weight": (128, 64)}, "'output.weight' is not part of a plm model"),
    "none": ("minimax_m3", {}, {"output.weight": ABSENT}, "tensor output.weight is missing; the file is incomplete"),
    **{
        f"no {name} in Kimi's delta rule": (case, {}, {name: ABSENT}, f"tensor blk.0.{name} is missing")
        for case, names in {
            "kimi_linear": ("ssm_f_b.weight", "ssm_g_b.weight", "ssm_conv1d_v.weight", "ssm_a", "ssm_dt.bias",
                            "attn_k.weight"),
            "bailingmoe3": ("ssm_f_a.weight", "ssm_beta.weight", "ssm_norm.weight"),
        }.items()
        for name in names
    },
    "decays in one step": ("kimi_linear", {}, {"ssm_f_a.weight": (64, 64)}, r"f_a.weight has .* \[16, 64\]"),
    "decays in two steps": ("bailingmoe3", {}, {"ssm_f_b.weight": (64, 16)}, "'blk.0.ssm_f_b.weight' is not part of"),
    "heads of another size": ("kimi_linear", {"kda.head_dim": 15}, {}, r"attn_output.weight has shape .* \[64, 60\]"),
    "no size of its heads": ("kimi_linear", {"kda.head_dim": ABSENT}, {}, "kimi-linear.kda.head_dim is missing"),
    "taps of another number": ("kimi_linear", {"ssm.conv_kernel": 3}, {}, r"conv1d_q.weight has .* \[1, 64, 1, 4\]"),
    "taps the other way": ("kimi_linear", {}, {"ssm_conv1d_k.weight": (4, 1, 64, 1)}, "conv1d_k.weight has shape"),
    "a latent of queries": ("kimi_linear_sizes", {"attention.q_lora_rank": 8}, {"attn_q_a.weight": (8, 64)},
                            "'blk.0.attn_q_a.weight' is not part of a kimi-linear model"),
    "an old expansion": ("kimi_linear_sizes", {}, {"attn_k_b.weight": ABSENT, "attn_kv_b.weight": (88, 20)},
                         "tensor blk.0.attn_k_b.weight is missing"),
    "no norm of a state space": ("mamba2", {}, {"ssm_norm.weight": ABSENT}, "tensor blk.0.ssm_norm.weight is missing"),
    "no bias of its convolution": ("mamba2", {}, {"ssm_conv1d.bias": ABSENT}, "blk.0.ssm_conv1d.bias is missing"),
    "no bias of a convolution": ("mamba", {}, {"ssm_conv1d.bias": ABSENT}, "blk.0.ssm_conv1d.bias is missing"),
    "no norm of steps": ("jamba", {}, {"ssm_dt_norm.weight": ABSENT}, "tensor blk.0.ssm_dt_norm.weight is missing"),
    "norms of Mamba with weights": ("mamba", {}, {"ssm_b_norm.weight": (12,)}, "'blk.0.ssm_b_norm.weight' is not part"),
    "groups of PLaMo 2": ("plamo2", {"ssm.group_count": 2}, {}, "ssm.group_count is 2; supported: 0"),
    "no factors of full layers": ("gemma4", {}, {"rope_freqs.weight": ABSENT}, "tensor rope_freqs.weight is missing"),
    "no bound": ("bailingmoe3", {"kda.gate_lower_bound": ABSENT}, {}, "kda.gate_lower_bound is missing"),
    "a bound of zero": ("bailingmoe3", {"kda.gate_lower_bound": 0.0}, {}, "gate_lower_bound is 0.0; the logarithm"),
    "decays without a bound": ("bailingmoe3", {"kda.safe_gate": False}, {}, "safe_gate is False: .* not supported"),
    "negative limits": ("bailingmoe3", {"swiglu_clamp_exp": [0.0, -1.0, 0.0]}, {}, "clamp_exp contains -1.0; limits"),
    "limits of other blocks": ("bailingmoe3", {"swiglu_clamp_shexp": [0.0, 1.0]}, {}, "has 2 entries for 3 blocks"),
    **{
        f"sections of {value!r:.40}": ("bailingmoe3", {"rope.dimension_sections": value}, {},
                                       "sections is .*; expected 1 to 4 whole numbers$")
        for value in (0, 0.0, "", False, [], [0] * 1000, [2, 1.0], [True, True])
    },
    **{
        f"a block of {case} without a feed-forward": (
            case,
            {"feed_forward_length": 0, "leading_dense_block_count": 1},
            {f"ffn_{part}.weight": ABSENT for part in parts},
            f"^{case.replace('_', '-')}: block 0 has no feed-forward or nothing that mixes tokens: not supported with",
        )
        for case, parts in {"kimi_k3": ("gate", "up", "down", "norm"), "glm5_next": ("gate", "up", "down")}.items()
    },
    "sections of one axis": ("bailingmoe3", {"rope.dimension_sections": [4, 0, 0, 0]}, {}, "sections .* not supported"),
    "rotated sections": ("deepseek2", {"rope.dimension_sections": [2, 1, 1, 0]}, {}, "sections .* not supp"),
    "no gate of heads": ("bailingmoe3_clamped", {}, {"attn_gate.weight": ABSENT}, "blk.0.attn_gate.weight is missing"),
    "a factor of the output": ("bailingmoe3_clamped", {}, {"attn_output.scale": (1,)}, "attn_output.scale' is not"),
    "no gate of elements": ("afmoe", {}, {"attn_gate.weight": ABSENT}, "blk.0.attn_gate.weight is missing"),
    "a gate of another width": ("laguna", {}, {"attn_gate.weight": (5, 64)}, r"has shape \[5, 64\], .* \[64, 64\]"),
    "a gate of elements": ("spark2_5", {}, {"attn_gate.weight": (64, 64)}, r"has shape \[64, 64\], .* \[4, 64\]"),
    "no pattern of windows": ("step35", {"attention.sliding_window_pattern": ABSENT}, {}, "pattern is missing"),
    "no chunks": ("llama4", {"attention.sliding_window": 0}, {}, "sliding_window is 0; expected a whole number from 1"),
    "too many passes": ("nanbeige", {"num_loops": 257}, {}, "num_loops is 257: so many times 2 blocks exceed 512"),
    "no way back from the streams": ("gemma3n", {}, {"altup_unembd_proj.weight": ABSENT}, "altup_unembd_proj.weight"),
    "keys of another kind at a place that no key states": (
        "gemma3n_shared", {"attention.head_count_kv": [1] * 18 + [2] + [1] * 3}, {}, "^gemma3n: block 20 cannot read"
    ),
    "routes to three streams": ("gemma3n", {}, {"altup_router.weight": (3, 64)}, r"router.weight has shape \[3, "),
    "a matrix of another rank": ("gemma3n", {}, {"laurel_l.weight": (32, 64)}, r"laurel_l.weight has shape \[32, 64\]"),
    "cycles of other blocks": ("hrm_text", {"hrm.l_cycles": 1}, {}, "block_count is 6, but 2 cycles of 1 passes and "
                               "one over 1 blocks make 4; convert"),
    "too many cycles": ("hrm_text", {"block_count": 513}, {}, "block_count is 513, more than 512; take another model"),
    "no cycles": ("hrm_text", {"hrm.h_cycles": ABSENT}, {}, "hrm_text.hrm.h_cycles is missing"),
    "nothing held": ("hrm_text", {}, {"hrm.z_l_init": ABSENT}, "tensor hrm.z_l_init is missing"),
    "a norm with weights": ("hrm_text", {}, {"attn_norm.weight": (64,)}, "'blk.0.attn_norm.weight' is not part of a"),
    "a factor of a block in two places": ("hrm_text", {}, {"attn_q.scale": (1,)}, "'blk.0.attn_q.scale' is not part"),
    "passes over other sizes": ("hrm_text", {"attention.head_count_kv": [2, 2, 2, 4, 2, 2]}, {}, "different sizes are"),
    "no passes": ("nanbeige", {"num_loops": 0}, {}, "num_loops is 0; expected a whole number from 1"),
    "a word in place of yes": ("nanbeige", {"skip_loop_final_norm": 1}, {}, "skip_loop_final_norm is 1; expected true"),
    "no scale of logits": ("muse_glimmer", {"logit_scale": ABSENT}, {}, "muse-glimmer.logit_scale is missing"),
    "no head": ("muse_glimmer", {}, {"output.weight": ABSENT}, "output.weight is missing"),
    "none shared": ("mistral4", {"expert_shared_count": ABSENT}, {}, "mistral4.expert_shared_count is missing"),
}  # fmt: skip


# Likewise: each number that RWKV reads, in ways that make no sense, and tensors that may not be missing.
OF_RWKV = {
    "rwkv6": ("wkv.head_size", "time_mix_extra_dim", "time_decay_extra_dim"),
    "rwkv7": ("wkv.head_size", *(f"attention.{name}_lora_rank" for name in ("decay", "iclr", "value_residual_mix"))),
}
UNUSABLE = {
    ABSENT: "is missing; the file is incomplete",
    0: "is 0; expected a whole number from 1",
    -16: "is -16; expected a finite, non-negative",
    2**31: "is 2147483648; expected a whole number",
    16.0: "is 16.0; expected a whole number",
    True: "is True; expected a finite",
    "16": "is '16'; expected a finite",
}
RWKV: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    **{
        f"{case} {key} {'absent' if value is ABSENT else value!r}": (case, {key: value}, {}, f"{key} {message}")
        for case, keys in OF_RWKV.items()
        for key in keys
        for value, message in UNUSABLE.items()
    },
    **{
        f"{case} {key} beyond its tensors": (case, {key: 2**31 - 1}, {}, "has shape|do not make heads of 2147483647")
        for case, keys in OF_RWKV.items()
        for key in keys
    },
    "gates of another rank": ("rwkv7", {"attention.gate_lora_rank": 2**30}, {}, r"time_mix_g1.weight has shape"),
    "gates of no rank": ("rwkv7", {"attention.gate_lora_rank": 0}, {}, "fused.weight has shape|g1.weight' is not part"),
    "a negative gate": ("rwkv7", {"attention.gate_lora_rank": -1}, {}, "gate_lora_rank is -1; expected a finite"),
    "halved every minus two": ("rwkv6", {"rescale_every_n_layers": -2}, {}, "every_n_layers is -2; expected a finite"),
    "halved every half": ("rwkv6", {"rescale_every_n_layers": 0.5}, {}, "every_n_layers is 0.5; expected a whole num"),
    "one shift": ("rwkv6", {"token_shift_count": 1}, {}, "token_shift_count is 1; supported: 2"),
    "two shifts": ("arwkv7", {"token_shift_count": 2}, {}, "token_shift_count is 2; supported: 1"),
    "no shifts stated": ("arwkv7", {"token_shift_count": ABSENT}, {}, "token_shift_count is 2; supported: 1"),
    "heads that do not fill it": ("rwkv6", {"wkv.head_size": 24}, {}, "64 elements do not make heads of 24"),
    "heads that share no keys": ("rwkv6qwen2", {"attention.head_count_kv": 3}, {}, "heads of 16, 3 of them for keys"),
    "no shares": ("rwkv6", {}, {"time_mix_lerp_fused.weight": ABSENT}, "time_mix_lerp_w.weight is missing"),
    "one share": ("rwkv6_apart", {}, {"time_mix_lerp_g.weight": ABSENT}, "time_mix_lerp_g.weight is missing"),
    "a share of the whole": ("rwkv6", {}, {"time_mix_lerp_fused.weight": (6, 1, 1, 64)}, r"\[5, 1, 1, 64\]"),
    "shares apart elsewhere": ("rwkv6qwen2", {}, {"time_mix_lerp_fused.weight": ABSENT}, "lerp_fused.weight is miss"),
    "no bonus": ("rwkv6", {}, {"time_mix_first.weight": ABSENT}, "tensor blk.0.time_mix_first.weight is missing"),
    "no norm of RWKV's heads": ("rwkv7", {}, {"time_mix_ln.weight": ABSENT}, "time_mix_ln.weight is missing"),
    "no epsilon": ("rwkv6", {"attention.layer_norm_epsilon": ABSENT}, {}, "layer_norm_epsilon is missing"),
}  # fmt: skip


# Likewise.
DENSE: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    **{
        f"{case} without a head": (case, {}, {"output.weight": ABSENT}, "tensor output.weight is missing; the file is")
        for case in ("xverse", "qwen", "codeshell", "codeshell_head_only", "orion", "plamo", "baichuan", "jais")
    },
    "no embeddings": ("orion", {}, {"token_embd.weight": ABSENT}, "tensor token_embd.weight is missing"),
    "a base beyond numbers": ("hunyuan_vl", {"rope.scaling.alpha": 1e30}, {}, r"alpha 1e\+30 is not supported"),
    "a number beyond float32": ("minimax_01", {"residual_scale": 1e300}, {}, r"scale is 1e\+300; expected at most"),
    "a head too wide to list": (
        "qwen2vl",
        {"rope.dimension_sections": [0, 0, 0, 10**9], "rope.dimension_count": 10**9, "attention.key_length": 10**9}
        | {"attention.value_length": 10**9},
        {},
        r"dimension_sections \[0, 0, 0, 1000000000\] is not supported",
    ),
    "no base in windowed layers": ("llama4", {"rope.freq_base_swa": 0.0}, {}, "freq_base_swa is 0.0, .* above 0"),
    "a context stretched to nothing": ("llama4", {"rope.scaling.factor": 1e-30}, {}, "factor is 1e-30; expected at le"),
    "windows that rotate less": ("dots3note", {"rope.dimension_count_swa": 2}, {}, "dimension_count_swa 2 differs"),
    "the width of two networks": ("qwen", {"feed_forward_length": 96}, {}, r"ffn_gate.weight has shape \[96, 64\]"),
    "norms in llama.cpp's way": ("mpt", {}, {"attn_q_norm.weight": (64,)}, "'blk.0.attn_q_norm.weight' is not part"),
    "another number of divisors": ("mpt_scaled", {}, {"ffn.act.scales": (95,)}, r"scales has shape \[95\]"),
    "divisors elsewhere": ("bloom", {}, {"ffn.act.scales": (96,)}, "'blk.0.ffn.act.scales' is not part of a bloom mo"),
    "no norm of embeddings": ("bloom", {}, {"token_embd_norm.weight": ABSENT}, "token_embd_norm.weight is missing"),
    "a negative bias": ("jais", {"attention.max_alibi_bias": -8.0}, {}, "max_alibi_bias is -8.0; expected a finite"),
    "no share of the input": (
        "talkie", {}, {"layer_output_scale.weight": ABSENT}, "blk.0.layer_output_scale.weight is missing"
    ),
    "keys with weights": ("talkie", {}, {"attn_k_norm.weight": (2, 1)}, "'blk.0.attn_k_norm.weight' is not part of"),
    "no scale of logits by heads": ("talkie", {"logit_scale": ABSENT}, {}, "talkie.logit_scale is missing"),
    "a factor of gates": ("talkie", {}, {"ffn_gate.scale": (1,)}, "'blk.0.ffn_gate.scale' is not part of a talkie mod"),
    "groups not of one size": ("grovemoe", {"experts_per_group": 4}, {}, "per_group is 4: not supported where a token"),
    "fewer groups than experts used": ("grovemoe", {"experts_per_group": 3}, {}, "uses 3 of 6 experts, in 1 groups to"),
    "experts chosen from groups": (
        "grovemoe", {"expert_group_count": 2, "expert_group_used_count": 2}, {}, "6 experts, in 2 groups to choose"
    ),
    "no groups": ("grovemoe", {"experts_per_group": ABSENT}, {}, "grovemoe.experts_per_group is missing"),
    "no scale of a second mixture": ("grovemoe", {"expert_group_scale": ABSENT}, {}, "expert_group_scale is missing"),
    "no second mixture": ("grovemoe", {}, {"ffn_up_chexps.weight": ABSENT}, "blk.0.ffn_up_chexps.weight is missing"),
    "biases of a second mixture": ("grovemoe", {}, {"ffn_up_chexps.bias": (3, 40)}, "'blk.0.ffn_up_chexps.bias' is"),
    "a second mixture elsewhere": (
        "qwen3moe", {}, {"ffn_up_chexps.weight": (3, 40, 64)}, "'blk.0.ffn_up_chexps.weight' is not part of a qwen3moe"
    ),
    "images elsewhere": ("orion", {}, {"vis_gate.weight": (96, 64)}, "'blk.0.vis_gate.weight' is not part of a orion"),
    "other images": ("cogvlm", {}, {"vis_gate.weight": (96, 32)}, r"vis_gate.weight has shape \[96, 32\]"),
}  # fmt: skip


@pytest.mark.parametrize("name", LATENT | RWKV | DENSE)
def test_other_attention_and_dense_files_are_refused_by_name(name: str, tiny_file: Callable[..., Path]) -> None:
    case, keys, shapes, message = (LATENT | RWKV | DENSE)[name]
    with pytest.raises(ConfigError, match=message) as error:
        altered(tiny_file(case), keys, shapes)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 160


@pytest.mark.parametrize("blocks", [26, 27])
def test_variants_without_a_latent_of_queries_are_known_by_their_blocks(
    blocks: int, tiny_file: Callable[..., Path]
) -> None:
    """Predictors do not count, and what the file states of the latent does not either."""
    path = tiny_file("deepseek2_lite", layers=blocks)
    assert altered(path, {"attention.q_lora_rank": 24}, {}).layers[0].latent.queries == 0
    longer = {"nextn_predict_layers": 1, "block_count": blocks + 1}
    assert altered(path, longer, {}).block_count == blocks


def test_variants_of_deepseek_are_known_by_their_vocabulary() -> None:
    row = ARCHITECTURES["deepseek2"]
    keys = Keys({"deepseek2.expert_weights_norm": True}, "deepseek2")
    for blocks, vocabulary, queries, router in (
        (48, 128256, "", "softmax"),
        (48, 128255, "required", "softmax"),
        (47, 128256, "required", "softmax"),
        (48, 154880, "required", "sigmoid"),
        (47, 154880, "required", "sigmoid"),
        (46, 154880, "required", "softmax"),
    ):
        shapes = {"token_embd.weight": (vocabulary, 64)}
        found = decided(keys, row, blocks, shapes)
        assert (found.latent_queries, found.router) == (queries, router)
        stated = Keys(keys.metadata | {"deepseek2.expert_gating_func": 1}, "deepseek2")
        assert decided(stated, row, blocks, shapes).router == "softmax"


def test_axes_of_length_one_do_not_count_in_kimis_delta_rule(tiny_file: Callable[..., Path]) -> None:
    path = tiny_file("kimi_linear")
    known = altered(path, {}, {})
    for taps, decays in (((64, 1, 4), (4,)), ((64, 4), (1, 1, 4, 1)), ((1, 64, 1, 4), (4, 1))):
        shapes = {f"ssm_conv1d_{part}.weight": taps for part in "qkv"} | {"ssm_a": decays}
        assert altered(path, {}, shapes) == known


@pytest.mark.parametrize("changes", [{"attention.head_count": 0}, {"attention.head_count": ABSENT}])
def test_attention_without_heads_is_refused(changes: dict[str, Any], tiny_file: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match=r"qwen35\.attention: 0 heads cannot share 2 key/value heads evenly"):
        altered(tiny_file("qwen35"), changes, {})


def test_files_of_predictors_only_are_refused_by_name(tiny_file: Callable[..., Path]) -> None:
    path = tiny_file("glm_dsa")
    with open_gguf(path) as file:
        shapes = {name: info.shape for name, info in file.tensors.items()}
        kept = {name: shape for name, shape in shapes.items() if not name.startswith(("blk.0.", "blk.1.", "blk.2."))}
        with pytest.raises(ConfigError, match="has only the blocks that predict later tokens; give the model's own fi"):
            read_config(dict(file.metadata) | {"glm-dsa.block_count": 100}, kept)


@pytest.mark.parametrize("count", [4, 5, 1000])
def test_some_block_has_keys_of_its_own(count: int, tiny_file: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match="shared_kv_layers: there is no block before block 0 whose keys it can read"):
        altered(tiny_file("gemma4"), {"attention.shared_kv_layers": count}, {})


def test_an_indexer_limits_the_prompt(tiny_file: Callable[..., Path]) -> None:
    assert altered(tiny_file("deepseek32"), {"attention.indexer.top_k": 10}, {}).longest == 10
    assert altered(tiny_file("deepseek32"), {"attention.indexer.top_k": 1000}, {}).longest == 256
    assert altered(tiny_file("minimax_m3"), {"attention.indexer.top_k": 10}, {}).longest == 40
    assert altered(tiny_file("deepseek2"), {"attention.indexer.top_k": 10}, {}).longest == 256
    assert altered(tiny_file("glm5_next"), {"attention.indexer.top_k": 12}, {}).longest == 15
