"""The forward pass: every layer against the oracle in float64 and against llama.cpp in float32, and the refusals."""

import dataclasses
import inspect
import math
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gguf
import llamacpp
import oracle
import pytest
import tiny
import torch
from helpers import IDS, distance, edited, held
from torch import Tensor
from torch.nn.functional import softplus

import ggjac
from ggjac import blocks, linop, model, planner, weights
from ggjac.architectures import Norms
from ggjac.blocks import NumericsError, activations, memory, mixers, networks, norms, streams
from ggjac.blocks.memory import record_memory
from ggjac.blocks.norms import HeadNorm
from ggjac.blocks.patterns import Recurrence, attention_pattern
from ggjac.config import Compressed, ConfigError, ModelConfig, Rope
from ggjac.generation import Continuation
from ggjac.linop import LinearOperator
from ggjac.model import Model, PromptError, open_model
from ggjac.planner import machine, work
from ggjac.rope import Turn
from ggjac.sizes import Part
from ggjac.weights import Block, WeightError


def states(path: Path, ids: list[int], dtype: str) -> dict[str, Tensor]:
    """Return everything that a trace can show, by llama.cpp's names."""
    seen: dict[str, Tensor] = {}
    trace = open_model(path, dtype=dtype).trace(ids, observe=lambda name, value: seen.update({name: value.clone()}))
    return seen | {"logits": trace.all_logits()}


def prompt(case: str) -> list[int]:
    """Return a prompt longer than the original context where that is short, since YaRN must hold there too."""
    original = tiny.options(case).scaling.get("original_context_length", 0)
    return tiny.prompt(case, original + 16 if 0 < original <= 64 else 12)


def as_f32(tiny_file: Callable[..., Path], case: str) -> Path:
    """Return what llama.cpp computes in float32: the file itself, or its exact F32 copy."""
    return tiny_file(case, ftype=None if tiny.options(case).type == "F32" else "F32")


def names(case: str, *branches: str) -> set[str]:
    """Return what there is to compare: the stream after every layer, what comes after, and the branches asked for."""
    layers = range(tiny.options(case).blocks)
    return {"result_norm", "logits", *(f"{name}-{i}" for name in ("l_out", *branches) for i in layers)}


# ---- the judges


@pytest.mark.parametrize("case", tiny.CASES)
def test_every_layer_agrees_with_the_oracle(case: str, tiny_file: Callable[..., Path]) -> None:
    ours = states(tiny_file(case), prompt(case), "float64")
    theirs = oracle.forward(oracle.load(tiny_file(case)), prompt(case))
    assert ours.keys() == names(case, "attn_out", "ffn_out")
    # (The oracle's branches are what is added to the stream, a trace shows llama.cpp's: before post-norm and scale.)
    assert {name: error for name in names(case) if (error := distance(ours[name], theirs[name])) > 1e-10} == {}


@pytest.mark.parametrize("case", tiny.LLAMA_CASES)
def test_every_layer_agrees_with_llamacpp(case: str, tiny_file: Callable[..., Path]) -> None:
    """On quantized files ggjac reads the file itself, llama.cpp its exact F32 copy. All families: test_families.py."""
    ours = states(tiny_file(case), prompt(case), "float32")
    theirs = llamacpp.run(as_f32(tiny_file, case), prompt(case))
    assert ours.keys() == names(case, "attn_out", "ffn_out")
    assert {name: error for name in ours if (error := distance(ours[name], theirs[name])) > 1e-5} == {}


STORY = "Once upon a time, there was a little girl named"


@pytest.mark.parametrize("kind", ["f32", "q8_0", "q4_0"])
def test_a_real_model_tells_the_story(kind: str, shared: Path, tmp_path: Path) -> None:
    path = shared / "models" / f"stories260K-{kind}.gguf"
    model = open_model(path)
    trace = model.trace(STORY)
    assert trace.ids[0] == 1  # BOS
    ids = list(trace.ids)
    for _ in range(8):  # " Lily" takes several tokens in a vocabulary of 512
        ids.append(int(model.trace(ids).logits.argmax()))
    assert model.tokenizer.decode(ids[len(trace.ids) :]).lstrip().startswith("Lily")
    theirs = llamacpp.run(tiny.quantize(path, tmp_path / "f32.gguf", "F32"), trace.ids)
    assert distance(trace.all_logits(), theirs["logits"]) < 1e-5


# ---- negative controls: each mistake, made in the package itself, must show


def relative_logits(tiny_file: Callable[..., Path], case: str) -> float:
    ids = prompt(case)
    ours = open_model(tiny_file(case)).trace(ids).all_logits()
    return distance(ours, llamacpp.run(as_f32(tiny_file, case), ids)["logits"])


Patch = pytest.MonkeyPatch


def uncentred_heads(patch: Patch) -> None:
    right = mixers.record_head_norm

    def changed(w: blocks.BlockWeights, name: str, config: ModelConfig, x: torch.Tensor, heads: int = 1) -> HeadNorm:
        return right(w, name, dataclasses.replace(config, row=dataclasses.replace(config.row, norm="rms")), x, heads)

    patch.setattr(mixers, "record_head_norm", changed)


def one_norm_of_heads(patch: Patch) -> None:
    vector = weights.Block.vector

    def changed(self: weights.Block, name: str, expert: int | None = None) -> torch.Tensor:
        found = vector(self, name, expert)
        return found[:1] if name == "attn_q_norm.weight" else found

    patch.setattr(weights.Block, "vector", changed)


def uncentred_bare_norm(patch: Patch) -> None:
    frozen = norms.frozen_norm
    for module in (norms, blocks):  # of branches, and before the head
        patch.setattr(module, "frozen_norm", lambda *args: frozen(*args)._replace(centred=False))


def unclamped_values(patch: Patch) -> None:
    patch.setattr(mixers, "_value_factor", lambda config, layer, v: None)


def change_config(patch: Patch, **changes: object) -> None:
    """Let every model be read with some fields changed; `rope__x`, `layer__x` and so on reach inside."""
    read = model.read_config
    inner: dict[str, dict[str, object]] = {"rope": {}, "layer": {}, "recurrence": {}, "row": {}, "": {}}
    for name, value in changes.items():
        where, _, field = name.rpartition("__")
        inner[where][field] = value

    def changed(*args: object) -> ModelConfig:
        config = read(*args)
        layers = tuple(
            dataclasses.replace(
                layer,
                **{"rope": layer.rope and dataclasses.replace(layer.rope, **inner["rope"])}
                | {name: value(layer) if callable(value) else value for name, value in inner["layer"].items()},
            )
            for layer in config.layers
        )
        row = dataclasses.replace(config.row, **inner["row"])
        recurrence = dataclasses.replace(config.recurrence, **inner["recurrence"])
        return dataclasses.replace(config, **{"layers": layers, "recurrence": recurrence, "row": row} | inner[""])

    patch.setattr(model, "read_config", changed)


def change_part(patch: Patch, part: str, **changes: float) -> None:
    """Let every model be read with other constants of its residual streams, or of second mixtures."""
    read = model.read_config

    def changed(*args: object) -> ModelConfig:
        config = read(*args)
        return dataclasses.replace(config, **{part: dataclasses.replace(getattr(config, part), **changes)})

    patch.setattr(model, "read_config", changed)


doubly_stochastic = streams._doubly_stochastic


def unmixed(logits: Tensor, *how: object) -> Tensor:
    """Return weights by which every stream stays as it is."""
    return torch.eye(logits.shape[1]).expand_as(logits)


def copies(p: Patch) -> None:
    """Keep the input of block 0 as a stream of its own, and do not add it again."""
    p.setattr(
        streams,
        "_with_input",
        lambda w, config, branch, x: x.new_ones(len(x), 2, 1) if x.shape[1] == config.d else None,
    )


def mask_off_by_one(patch: Patch) -> None:
    """Let a position see its successor."""
    triu = Tensor.triu
    patch.setattr(Tensor, "triu", lambda self, diagonal=0: triu(self, diagonal + 1))


def wrong_scale(patch: Patch) -> None:
    right = mixers.attention_pattern
    patch.setattr(mixers, "attention_pattern", lambda q, k, scale, **rest: right(q, k, scale * math.sqrt(2), **rest))


def interleaved_keys(patch: Patch) -> None:
    """Let query head i read key head i % g in place of i // (h / g)."""
    right = mixers.attention_pattern

    def wrong(q: Tensor, k: Tensor, scale: float, **rest: object) -> Tensor:
        heads = torch.arange(q.shape[1]) % k.shape[1]
        return right(q, k[:, heads], scale, **rest)

    patch.setattr(mixers, "attention_pattern", wrong)


def interleaved_values(patch: Patch) -> None:
    right = linop.Mix.matmat

    def wrong(self: linop.Mix, X: Tensor, t: Tensor | None = None) -> Tensor:
        groups, shared = self.pattern.shape[:2]
        everyone = X.unflatten(2, (groups, self.head_size))[:, :, torch.arange(groups * shared) % groups]
        apart = linop.Mix(self.pattern.flatten(0, 1), groups * shared, self.head_size)
        return right(apart, everyone.flatten(2), t)

    patch.setattr(linop.Mix, "matmat", wrong)


def without_sinks(patch: Patch) -> None:
    right = mixers.attention_pattern
    patch.setattr(mixers, "attention_pattern", lambda *args, **rest: right(*args, **rest | {"sinks": None}))


def without(name: str) -> Callable[[Patch], None]:
    """Let the file seem to lack a tensor."""

    def make(patch: Patch) -> None:
        from ggjac.weights import Block

        contains = Block.__contains__
        patch.setattr(Block, "__contains__", lambda self, wanted: wanted != name and contains(self, wanted))

    return make


def changed_activation(**changes: object) -> Callable[[Patch], None]:
    """Let the gpt-oss activation have other fields."""

    def make(patch: Patch) -> None:
        patch.setitem(activations.ACTIVATIONS, "silu_oai", activations.ACTIVATIONS["silu_oai"]._replace(**changes))

    return make


def swapped(patch: Patch, a: str, b: str) -> None:
    from ggjac.weights import Block

    stored = Block._stored

    def other(self: Block, name: str) -> tuple[str, Part | None]:
        return stored(self, name.replace(a, b) if a in name else name.replace(b, a))

    patch.setattr(Block, "_stored", other)


def biased_weights(patch: Patch) -> None:
    """Weigh experts by what they are chosen by."""
    choice, chosen, router = networks._choice, networks._chosen, networks.ROUTERS["sigmoid"]
    bias: list[Tensor] = []

    def shifted(w: Block, *args: object) -> object:
        bias.append(w.wide_vector("exp_probs_b.bias"))
        return choice(w, *args)

    patch.setattr(networks, "_choice", shifted)
    patch.setitem(networks.ROUTERS, "sigmoid", lambda logits: router(logits) + bias[-1])
    patch.setattr(networks, "_chosen", lambda w, config, scores, used: chosen(w, config, scores - bias[-1], used))


def without_shared(patch: Patch) -> None:
    patch.setattr(networks, "record_shared", lambda *args: [])


def best_of_groups(members: int) -> Callable[[Patch], None]:
    """Rank groups by so many of their members."""

    def make(patch: Patch) -> None:
        def wrong(w: Block, config: ModelConfig, scores: Tensor, used: int) -> Tensor:
            scores = (scores + w.wide_vector("exp_probs_b.bias")).unflatten(-1, (config.expert_groups, -1))
            best = scores.topk(members).values.sum(-1).topk(config.expert_groups_used).indices
            kept = torch.zeros(scores.shape[:2], dtype=torch.bool).scatter(-1, best, True)
            return scores.where(kept[..., None], -torch.inf).flatten(1).topk(used).indices

        patch.setattr(networks, "_chosen", wrong)

    return make


def without_factors(patch: Patch) -> None:
    right = model.rotation
    patch.setattr(model, "rotation", lambda rope, n, factors=None: right(rope, n))


def without_magnitude(patch: Patch) -> None:
    right = model.rotation

    def wrong(*args: object) -> tuple[Tensor, Tensor]:
        cos, sin = right(*args)
        size = torch.hypot(cos, sin)
        return cos / size, sin / size

    patch.setattr(model, "rotation", wrong)


def recorded(kind: str, change: Callable[[mixers.Mixed], mixers.Mixed]) -> Callable[[Patch], None]:
    """Change what is recorded of a kind of mixer."""

    def make(patch: Patch) -> None:
        right = mixers.RECORD[kind]
        patch.setitem(mixers.RECORD, kind, lambda *args: change(right(*args)))

    return make


def ungated(mixed: mixers.Mixed) -> mixers.Mixed:
    return mixed._replace(tape=mixed.tape._replace(read=None))


def keys_and_queries_swapped(patch: Patch) -> None:
    right = mixers._from_values

    def wrong(*args: Any) -> tuple[Tensor, ...]:
        step, key, query = right(*args)
        return step, query, key

    patch.setattr(mixers, "_from_values", wrong)


def changed_recurrence(**changes: Any) -> Callable[[Patch], None]:
    """Let recurrences have other fields; a function is given the field."""

    def make(patch: Patch) -> None:
        def wrong(*args: Any, **rest: Any) -> Recurrence:
            right = Recurrence(*args, **rest)
            new = {name: value(getattr(right, name)) if callable(value) else value for name, value in changes.items()}
            return right._replace(**new)

        patch.setattr(mixers, "Recurrence", wrong)

    return make


def reversed_taps(patch: Patch) -> None:
    taps = mixers._taps

    def wrong(w: blocks.BlockWeights, stem: str) -> tuple[Tensor, Tensor | None]:
        weight, bias = taps(w, stem)
        return weight.flip(1), bias

    patch.setattr(mixers, "_taps", wrong)


def unclamped_queries(patch: Patch) -> None:
    """Clamp the values alone."""
    right = mixers._queries_or_keys

    def wrong(*args: Any) -> Any:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(mixers, "_passed", lambda config, x: None)
            return right(*args)

    patch.setattr(mixers, "_queries_or_keys", wrong)


def shifted_positions(patch: Patch) -> None:
    """Rotate queries as if one position later than keys."""
    right, calls = mixers._rotation, []

    def wrong(frame: blocks.Frame, layer: int, x: Tensor, heads: int, at: slice, first: int = 0) -> Any:
        calls.append(1)
        if len(calls) % 2:
            later = {rope: model.rotation(rope, len(x) + 1) for rope in frame.rotations}
            frame, at = frame._replace(rotations=later), slice(at.start + 1, at.stop + 1)
        return right(frame, layer, x, heads, at, first)

    patch.setattr(mixers, "_rotation", wrong)


def changed_vector(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Patch], None]:
    """Let a small tensor be read as another."""

    def make(patch: Patch) -> None:
        vector = weights.Block.vector

        def changed(self: weights.Block, wanted: str, expert: int | None = None) -> Tensor:
            found = vector(self, wanted, expert)
            return change(found) if wanted == name else found

        patch.setattr(weights.Block, "vector", changed)

    return make


def turned_forth(*how: Any, **more: Any) -> LinearOperator:
    """Return the rotation whichever way was asked for."""
    return Turn(*how)


def in_other_order(*parts: LinearOperator) -> LinearOperator:
    """Return the parts side by side, the last one first."""
    return linop.Beside(*reversed(parts))


def without_earlier_groups(shares: Tensor, n: int) -> LinearOperator:
    """Return sums over groups in which a position counts for its own group only."""
    kept = shares.clone()
    kept[:, :-1] = 0
    return linop.Pool(kept, n)


def turned_later(*how: Any) -> tuple[blocks.MemoryTape | None, Tensor]:
    """Record a memory with the rotation of the positions after those of its tokens."""
    *rest, turn = how
    return record_memory(*rest, turn.roll(-1, 1))


def seen_early(*how: Any, ratio: int, **more: Any) -> Tensor:
    """Return attention to groups from their last but one position on."""
    return attention_pattern(*how, ratio=max(0, ratio - 1), **more)


def changed_wide_vector(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Patch], None]:
    """Let a small tensor that is read at full precision be another."""

    def make(patch: Patch) -> None:
        vector = weights.Block.wide_vector

        def changed(self: weights.Block, wanted: str) -> Tensor:
            found = vector(self, wanted)
            return change(found) if wanted == name else found

        patch.setattr(weights.Block, "wide_vector", changed)

    return make


def unbounded_decays(patch: Patch) -> None:
    """Let decays be those of files without a bound, whose constants have the other sign."""
    change_config(patch, decay_bound=0.0)
    changed_wide_vector("ssm_a", torch.neg)(patch)


def one_decay_of_heads(patch: Patch) -> None:
    """Let all channels of a head decay alike."""
    right = mixers._log_decay
    patch.setattr(mixers, "_log_decay", lambda *args: right(*args).mean(-1, keepdim=True))


def moved(name: str, by: int) -> Callable[[Patch], None]:
    """Let the elements of all queries or keys of latent attention be shifted, as if its parts had another order."""

    def make(patch: Patch) -> None:
        right = getattr(mixers, name)

        def wrong(w: blocks.BlockWeights, frame: blocks.Frame, layer: int, *rest: Any) -> Any:
            made = right(w, frame, layer, *rest)
            heads = made.value.unflatten(1, (frame.config.layers[layer].heads, -1))
            return made._replace(value=heads.roll(by, -1).flatten(1))

        patch.setattr(mixers, name, wrong)

    return make


def keys_above_values(patch: Patch) -> None:
    """Take the first rows of a fused expansion for the keys of all heads, not the first of each head."""
    right = model.fused_parts

    def wrong(config: ModelConfig, layer: int) -> dict[str, Part]:
        parts, own = right(config, layer), config.layers[layer]
        keys, rows = own.heads * (own.key_size - own.latent.rotary), own.heads * own.value_size
        return parts | {"attn_k_nope": Part("attn_kv_b", 0, keys), "attn_v_b": Part("attn_kv_b", keys, keys + rows)}

    patch.setattr(model, "fused_parts", wrong)


MISTAKES: dict[str, tuple[str, Callable[[Patch], None]]] = {
    "rope pairs as NEOX": ("plain", lambda p: change_config(p, rope__pairs="halves")),
    "rope base ignored": ("rope_base", lambda p: change_config(p, rope__base=10000.0)),
    "rope factors ignored": ("rope_factors", without_factors),
    "linear scaling ignored": ("linear", lambda p: change_config(p, rope__factor=1.0)),
    "YaRN as linear": ("yarn", lambda p: change_config(p, rope__yarn=False)),
    "YaRN magnitude missing": ("yarn", without_magnitude),
    "YaRN original context ignored": ("yarn_ramp", lambda p: change_config(p, rope__original_context=2048)),
    "queries a position late": ("plain", shifted_positions),
    "mask off by one": ("plain", mask_off_by_one),
    "attention scaled wrongly": ("plain", wrong_scale),
    "key heads interleaved": ("gqa", interleaved_keys),
    "value heads interleaved": ("gqa", interleaved_values),
    "norm epsilon wrong": ("eps", lambda p: change_config(p, norm_epsilon=1e-5)),
    "gate and up swapped": ("plain", lambda p: swapped(p, "ffn_gate", "ffn_up")),
    "norms swapped": ("plain", lambda p: swapped(p, "attn_norm", "ffn_norm")),
    "k and v swapped": ("plain", lambda p: swapped(p, "attn_k", "attn_v")),
    **{f"{name} bias dropped": ("biases", without(f"{name}.bias")) for name in tiny.ALL_BIASES},
    "part of a fused bias dropped": ("fused_biases", without("attn_v.bias")),
    "rope pairs as NORM": ("qwen3", lambda p: change_config(p, rope__pairs="adjacent")),
    "partial rotation ignored": ("glm4", lambda p: change_config(p, rope__dimensions=16)),
    "rope where there is none": (
        "smollm3", lambda p: change_config(p, layer__rope=lambda layer: Rope(16, 10000.0, "adjacent"))
    ),
    "local layers as global ones": ("olmo3", lambda p: change_config(p, layer__window=None)),
    "window one too wide": ("olmo3", lambda p: change_config(p, layer__window=lambda layer: layer.window and 5)),
    "window one too narrow": ("gpt_oss", lambda p: change_config(p, layer__window=lambda layer: layer.window and 3)),
    "rope on full layers, too": (
        "exaone4_32b", lambda p: change_config(p, layer__rope=lambda layer: Rope(16, 500.0, "halves"))
    ),
    "norm of queries and keys before their rotation": ("hunyuan", lambda p: change_config(p, row__qk_norm="head")),
    "no norm on queries and keys": ("qwen3", lambda p: change_config(p, row__qk_norm="")),
    "sinks missing": ("gpt_oss", without_sinks),
    "score cap missing": ("gemma2", lambda p: change_config(p, attention_softcap=0.0)),
    "logit cap missing": ("gemma2", lambda p: change_config(p, logit_softcap=0.0)),
    "score scale of another size": ("gemma3_27b", lambda p: change_config(p, layer__attention_scale=1 / 8)),
    "queries do not grow": ("mistral3_temperature", lambda p: change_config(p, temperature_scale=0.0)),
    "embeddings unscaled": ("gemma3", lambda p: change_config(p, embedding_scale=1.0)),
    "branches unscaled": ("granite", lambda p: change_config(p, residual_scale=1.0)),
    "defaults of scales ignored": (
        "minicpm_default_scales", lambda p: change_config(p, embedding_scale=1.0, residual_scale=1.0)
    ),
    "logits unscaled": ("granite", lambda p: change_config(p, logit_scale=1.0)),
    "post-norm of attention missing": ("gemma3", without("post_attention_norm.weight")),
    "post-norm of feed-forward missing": ("glm4", without("post_ffw_norm.weight")),
    "branches one after the other": ("cohere2", lambda p: change_config(p, row__parallel=False)),
    "heads normed without centring": ("stablelm_12b", uncentred_heads),
    "one head's norm for all": ("stablelm_12b", one_norm_of_heads),
    "no norm of heads": ("stablelm_12b", lambda p: change_config(p, row__qk_norm="")),
    "StableLM 12B one after the other": ("stablelm_12b", lambda p: change_config(p, row__parallel=False)),
    "Command R+ without a norm of heads": ("command_r_plus", lambda p: change_config(p, row__qk_norm="")),
    "OLMo's norm not centred": ("olmo", uncentred_bare_norm),
    "clamp missing": ("olmo_clamped", lambda p: change_config(p, attention_clamp=0.0)),
    "values not clamped": ("olmo_clamped", unclamped_values),
    "queries and keys not clamped": ("olmo_clamped", unclamped_queries),
    "branches at once": ("gptneox_sequential", lambda p: change_config(p, row__parallel=True)),
    "branches not at once": ("gptneox", lambda p: change_config(p, row__parallel=False)),
    "one norm for both branches": ("gptneox", lambda p: change_config(p, row__norms=Norms(ffn_in=("attn_norm",)))),
    "LayerNorm not centred": ("gpt2", lambda p: change_config(p, row__norm="rms")),
    "LayerNorm bias dropped": ("starcoder2", without("attn_norm.bias")),
    "second norm of Falcon 40B ignored": ("falcon_40b", without("attn_norm_2.weight")),
    "ReLU not squared": (
        "arcee", lambda p: p.setitem(activations.ACTIVATIONS, "relu2", activations.Activation(lambda g: (g > 0).to(g)))
    ),
    "xIELU of the first block in all": (
        "apertus_layers", lambda p: change_config(p, layer__xielu=(0.9, 0.91, 0.5))
    ),
    "GELU as silu": ("gemma3", lambda p: change_config(p, row__activation="silu")),
    "experts not renormalized": ("mixtral", lambda p: change_config(p, row__renormalize=False)),
    "experts renormalized": ("olmoe", lambda p: change_config(p, row__renormalize=True)),
    "softmax before the choice": ("gpt_oss", lambda p: change_config(p, row__router="softmax")),
    "an expert too few": ("mixtral", lambda p: change_config(p, layer__experts_used=1)),
    "router bias dropped": ("gpt_oss", without("ffn_gate_inp.bias")),
    "expert biases dropped": ("gpt_oss", without("ffn_down_exps.bias")),
    "shared expert missing": ("granitemoe_shared", without("ffn_up_shexp.weight")),
    "shared expert not gated": ("qwen2moe", without("ffn_gate_inp_shexp.weight")),
    **{
        f"{case}: {mistake}": (case, make)
        for case in (
            *("glm4moe", "glm4moe_355b", "dots1", "bailingmoe2_groups", "exaone_moe_period", "deepseek2"), "minimax_m3"
        )
        for mistake, make in {
            "softmax in place of sigmoid": lambda p: change_config(p, row__router="softmax"),
            "weights not normed": lambda p: change_config(p, row__renormalize=False),
            "selection bias left out": without("exp_probs_b.bias"),
            "selection bias in the weights": biased_weights,
            "shared expert left out": without_shared,
        }.items()
    },
    **{
        f"{case}: weights not scaled": (case, lambda p: change_config(p, expert_weights_scale=1.0))
        for case in ("glm4moe", "deepseek_scaled", "dots1", "bailingmoe2", "exaone_moe", "bailingmoe_not_normed")
    },
    **{
        f"{case}: all groups": (case, lambda p: change_config(p, expert_groups=1))
        for case in ("glm4moe_groups", "bailingmoe2_groups", "qwen3moe_groups")
    },
    "the third best of a group counts": ("glm4moe_groups", best_of_groups(3)),
    "a group is as good as its best": ("glm4moe_groups", best_of_groups(1)),
    "weights divided by whatever their sum": (
        "glm4moe_faint", lambda p: p.setattr(Tensor, "clamp_min", lambda self, least: self)
    ),
    "a group more": ("bailingmoe2_groups", lambda p: change_config(p, expert_groups_used=3)),
    "sigmoid in place of softmax": ("glm4moe_softmax", lambda p: change_config(p, row__router="sigmoid")),
    "weights normed": ("deepseek", lambda p: change_config(p, row__renormalize=True)),
    "selection bias left out of a softmax": ("ernie4_5_moe", without("exp_probs_b.bias")),
    "selection bias left out beside whole norms": ("minimax_m2", without("exp_probs_b.bias")),
    "RMSNorm's bias dropped": ("phimoe", without("ffn_norm.bias")),
    "RMSNorm centred": ("phimoe", lambda p: change_config(p, row__norm="layer")),
    "heads normed before their rotation": ("hunyuan_moe", lambda p: change_config(p, row__qk_norm="head")),
    "rotation everywhere": (
        "exaone_moe_base", lambda p: change_config(p, layer__rope=lambda layer: Rope(16, 10000.0, "halves"))
    ),
    "windows ignored": ("exaone_moe", lambda p: change_config(p, layer__window=None)),
    "no norm on heads that have one": ("glm4moe_355b", lambda p: change_config(p, row__qk_norm="")),
    "key heads grouped": ("qwen35", lambda p: change_config(p, row__key_heads_tiled=False)),
    "key heads tiled": ("qwen3next", lambda p: change_config(p, row__key_heads_tiled=True)),
    "gate of attention ignored": ("qwen35", recorded("attention", ungated)),
    "gate of a recurrence ignored": ("qwen35", recorded("delta", ungated)),
    "gate as a sigmoid": ("qwen35", lambda p: change_config(p, row__sigmoid_gate=True)),
    "nothing removed": ("qwen35", changed_recurrence(removes=False)),
    "no decay": ("qwen35", changed_recurrence(log_decay=torch.zeros_like)),
    "everything written": ("qwen35", changed_recurrence(write=torch.ones_like)),
    "queries unscaled": ("qwen35_eps", changed_recurrence(q=lambda q: q * q.shape[-1] ** 0.5)),
    "keys not of unit length": ("qwen35", changed_recurrence(k=lambda k: 2 * k)),
    "taps reversed": ("qwen35", reversed_taps),
    "short convolution reversed": ("lfm2", reversed_taps),
    "gates of a convolution swapped": ("lfm2", lambda p: swapped(p, "in_proj_b", "in_proj_c")),
    "a convolution's second gate ignored": ("lfm2", recorded("convolution", ungated)),
    "B and C swapped": ("mamba2", lambda p: swapped(p, "ssm_in_b", "ssm_in_c")),
    "no skip": ("mamba2", changed_recurrence(skip=None)),
    "steps cut off": ("mamba2", lambda p: p.setattr(mixers, "softplus", torch.relu)),
    "steps without their bias": ("mamba2", changed_wide_vector("ssm_dt.bias", torch.zeros_like)),
    "no decay of a state space": ("mamba2", changed_recurrence(log_decay=torch.zeros_like)),
    "gate of a state space ignored": ("mamba2", recorded("state space", ungated)),
    "bias of a convolution dropped": ("mamba2", without("ssm_conv1d_x.bias")),
    **{
        f"{case}: {mistake}": (case, make)
        for case in ("mamba", "jamba")
        for mistake, make in {
            "steps cut off": lambda p: p.setattr(mixers, "softplus", torch.relu),
            "steps without their bias": without("ssm_dt.bias"),
            "B and C swapped": keys_and_queries_swapped,
            "one decay of a channel": changed_wide_vector(
                "ssm_a", lambda a: a.mean(1, keepdim=True).expand_as(a) if a.ndim > 1 else a
            ),
            "no skip": changed_wide_vector("ssm_d", torch.zeros_like),
            "gate ignored": recorded("channel state space", ungated),
            "taps reversed": reversed_taps,
        }.items()
    },
    "values made of gates": ("plamo2", lambda p: swapped(p, "ssm_in_x", "ssm_in_z")),
    "B and C of PLaMo 2 swapped": ("plamo2", keys_and_queries_swapped),
    "no norm of B": ("plamo2", without("ssm_b_norm")),
    "steps not normed": ("mamba_falcon", lambda p: change_config(p, recurrence__normed=False)),
    "norms of steps without weights": ("jamba", changed_vector("ssm_dt_norm.weight", torch.ones_like)),
    "taps of a state space reversed": ("granitehybrid", reversed_taps),
    "branches of a hybrid unscaled": ("granitehybrid", lambda p: change_config(p, residual_scale=1.0)),
    "attention without what is beside it": (
        "falcon_h1", lambda p: change_config(p, layer__mixers=("attention",))
    ),
    "norm of a state space missing": ("falcon_h1_normed", without("ssm_norm.weight")),
    "ungated experts not normed": ("nemotron_h_moe", lambda p: change_config(p, row__renormalize=False)),
    "values not normed": ("gemma4", lambda p: change_config(p, row__value_norm=False)),
    "scores scaled in Gemma 4": ("gemma4", lambda p: change_config(p, layer__attention_scale=0.25)),
    "stream not scaled": ("gemma4", without("layer_output_scale.weight")),
    "router without a norm of its own": ("gemma4_experts", lambda p: change_config(p, row__router_reads="input")),
    "norm after experts missing": ("gemma4_experts", without("post_ffw_norm_2.weight")),
    "norm after the dense network missing": ("gemma4_experts", without("post_ffw_norm_1.weight")),
    "inputs of blocks ignored": ("gemma4_inputs", lambda p: change_config(p, inputs=0)),
    "beta and alpha swapped": ("qwen3next", lambda p: swapped(p, "ssm_beta", "ssm_alpha")),
    "no clamp": ("gpt_oss", changed_activation(limit=None)),
    "up not shifted": ("gpt_oss", changed_activation(shift=0.0)),
    "norm of the latent without weights": ("deepseek2", changed_vector("attn_kv_a_norm.weight", torch.ones_like)),
    "norm of the queries' latent without weights": (
        "deepseek2", changed_vector("attn_q_a_norm.weight", torch.ones_like)
    ),
    "norm of the queries' latent missing": (
        "deepseek2", lambda p: p.setattr(mixers, "record_head_norm", lambda *args: None)
    ),
    "rotating part of queries first": ("deepseek2", moved("_latent_queries", 8)),
    "rotating part of keys first": ("deepseek2_unsplit", moved("_latent_keys", 8)),
    "keys of all heads above their values": ("deepseek2_unsplit", keys_above_values),
    "latent attention rotates halves": ("deepseek2", lambda p: change_config(p, rope__pairs="halves")),
    "latent attention does not rotate": ("deepseek2_lite", lambda p: change_config(p, layer__rope=None)),
    "scores scaled by the size of what is cached": (
        "deepseek2", lambda p: change_config(p, layer__attention_scale=28**-0.5)
    ),
    "streams written by equal weights": ("hy_v4", lambda p: change_part(p, "streams", magnitude=1.0)),
    "weights of streams without epsilon": ("hy_v4", lambda p: change_part(p, "streams", epsilon=0.0)),
    "streams over depth read alike": ("kimi_k3", changed_wide_vector("ffn_res_score.weight", torch.zeros_like)),
    "head reads streams over depth alike": (
        "kimi_k3", changed_wide_vector("output_res_score.weight", torch.zeros_like)
    ),
    "stream begins anew elsewhere": ("kimi_k3", lambda p: change_part(p, "streams", period=3)),
    "up without its limit": ("kimi_k3", lambda p: change_config(p, situ=(1.5, 0.0))),
    "another limit of gates": ("kimi_k3_sizes", lambda p: change_config(p, situ=(3.0, 0.0))),
    "sum of latent experts not normed": ("kimi_k3", without("ffn_routed_norm.weight")),
    "bounded decays of the other sign": ("kimi_k3", lambda p: change_config(p, row__bounded_decay="required")),
    "streams mixed in another number of rounds": ("glm5_next_bounded", lambda p: change_part(p, "streams", rounds=2)),
    "streams not mixed": ("glm5_next", lambda p: p.setattr(streams, "_doubly_stochastic", unmixed)),
    "streams mixed in the other direction": (
        "glm5_next", lambda p: p.setattr(streams, "_doubly_stochastic", lambda *how: doubly_stochastic(*how).mT)
    ),
    "keys of a delta rule with the norms' epsilon": (
        "glm5_next_predictor", lambda p: change_config(p, row__key_epsilon=0.0)
    ),
    "decays not bounded in GLM": ("glm5_next_bounded", lambda p: change_config(p, decay_bound=0.0)),
    "gates clamped after their activation in GLM": (
        "glm5_next_bounded", lambda p: change_config(p, row__hidden_clamps="after")
    ),
    "what heads read not turned back": ("deepseek4", lambda p: p.setattr(mixers, "Turn", turned_forth)),
    "keys that are values too not normed": ("deepseek4", changed_vector("attn_kv_a_norm.weight", torch.ones_like)),
    "heads projected in other groups": ("deepseek4", lambda p: p.setattr(mixers, "Beside", in_other_order)),
    "no memory": ("deepseek4_yarn", lambda p: change_config(p, layer__compressed=Compressed(0, 1, 3, 7))),
    "shares of a group alike": ("deepseek4", changed_wide_vector("attn_compressor_ape.weight", torch.zeros_like)),
    "groups that do not overlap": ("deepseek4", lambda p: p.setattr(memory, "Pool", without_earlier_groups)),
    "groups rotated to their ends": ("deepseek4", lambda p: p.setattr(mixers, "record_memory", turned_later)),
    "groups seen before they are complete": ("deepseek4", lambda p: p.setattr(mixers, "attention_pattern", seen_early)),
    "experts by scores and not by tokens": ("deepseek4", lambda p: change_config(p, layer__token_experts=False)),
    "router without its root": ("deepseek4", lambda p: p.setitem(networks.ROUTERS, "sqrt_softplus", softplus)),
    "rotated parts of keys not normed": ("dots3note", without("attn_k_norm.weight")),
    "latent attention without its window": ("dots3note", lambda p: change_config(p, layer__window=None)),
    "scores not scaled by YaRN": ("deepseek2_yarn", lambda p: change_config(p, layer__attention_scale=20**-0.5)),
    "scores not scaled by YaRN's magnitude": (
        "deepseek2_yarn_bare", lambda p: change_config(p, layer__attention_scale=20**-0.5)
    ),
    "magnitude of YaRN's own": ("deepseek2_yarn", lambda p: change_config(p, rope__magnitude=1 + 0.1 * math.log(4))),
    "scores not scaled where nothing is stretched": (
        "deepseek2_none", lambda p: change_config(p, layer__attention_scale=20**-0.5)
    ),
    "latent queries do not grow": ("deepseek2_temperature", lambda p: change_config(p, temperature_scale=0.0)),
    "magnitude of YaRN left as stored": ("mistral4_yarn_half", lambda p: change_config(p, rope__magnitude=1.0)),
    "MiniCPM 3's scales as in the file": (
        "minicpm3_unread", lambda p: change_config(p, embedding_scale=3.0, residual_scale=0.5)
    ),
    "MiniCPM 3's logits divided": ("minicpm3", lambda p: change_config(p, logit_scale=64 / 256)),
    "MiniCPM 3 rotates adjacent elements": ("minicpm3", lambda p: change_config(p, rope__pairs="adjacent")),
    "factors of a short context": ("minicpm3_long", without_factors),
    "both multipliers of YaRN read where one counts": (
        "glm_dsa_yarn", lambda p: change_config(p, rope__magnitude=1.0)
    ),
    "no multiplier of YaRN read": ("deepseek32_yarn", lambda p: change_config(p, layer__attention_scale=20**-0.5)),
    "no clamp in dense blocks": ("minimax_m3", changed_activation(limit=None)),
    "no shift in shared experts": ("minimax_m3", changed_activation(shift=0.0)),
    "no norm of heads beside an indexer": ("minimax_m3", lambda p: change_config(p, row__qk_norm="")),
    "decay of each head alone": ("kimi_linear", one_decay_of_heads),
    "decays without their bias": ("kimi_linear", changed_wide_vector("ssm_dt.bias", torch.zeros_like)),
    "decays bounded": ("kimi_linear", lambda p: change_config(p, decay_bound=-5.0)),
    "decays not bounded": ("bailingmoe3", unbounded_decays),
    "decays of the other sign": ("bailingmoe3", changed_wide_vector("ssm_a", torch.neg)),
    "another bound of decays": ("bailingmoe3_predictor", lambda p: change_config(p, decay_bound=-5.0)),
    "gate of a delta rule with SiLU": ("kimi_linear", lambda p: change_config(p, row__sigmoid_gate=False)),
    "keys of a delta rule of another length": ("kimi_linear_eps", lambda p: change_config(p, norm_epsilon=1e-5)),
    "taps of queries and keys swapped": ("kimi_linear", lambda p: swapped(p, "ssm_conv1d_q", "ssm_conv1d_k")),
    "decay and gate swapped": ("kimi_linear", lambda p: swapped(p, "ssm_f_", "ssm_g_")),
    "latent attention rotates in Kimi Linear": (
        "kimi_linear", lambda p: change_config(p, layer__rope=lambda layer: Rope(8, 10000.0, "adjacent"))
    ),
    "heads of latent attention not gated": ("bailingmoe3", without("attn_gate.weight")),
    "latent attention does not rotate beside a delta rule": (
        "bailingmoe3", lambda p: change_config(p, layer__rope=None)
    ),
    "hidden units not clamped": ("bailingmoe3_clamped", lambda p: change_config(p, layer__clamps=(0.0, 0.0))),
    "experts clamped as shared ones": (
        "bailingmoe3_clamped", lambda p: change_config(p, layer__clamps=lambda layer: layer.clamps[::-1])
    ),
    "no norm of what heads read": ("bitnet", without("attn_sub_norm.weight")),
    "no norm of hidden units": ("bitnet", without("ffn_sub_norm.weight")),
    "experts read the stream after attention": ("arctic", lambda p: change_config(p, row__experts_skip=False)),
    "a dense network beside experts added in full": (
        "grok_betas", lambda p: change_config(p, row__joint_scale=1.0)
    ),
    "another first beta of YaRN": ("grok_caps", lambda p: change_config(p, rope__beta_fast=2.0)),
    "a shared expert added in full": ("cohere2moe", lambda p: change_config(p, row__joint_scale=1.0)),
    "experts alone halved": (
        "cohere2moe", lambda p: change_config(p, row__joint_scale=1.0, expert_weights_scale=0.5)
    ),
    "a dense layer not rotated": (
        "cohere2moe", lambda p: change_config(p, layer__rope=lambda own: own.window and own.rope)
    ),
    "LayerNorms in place of RMSNorms": ("cohere2moe_rms", lambda p: change_config(p, row__norm="layer")),
    "values not scaled": ("mimo2", lambda p: change_config(p, value_scale=1.0)),
    "the router reads what the experts read": ("smallthinker", lambda p: change_config(p, row__router_reads="input")),
    "gates with SiLU in place of ReLU": ("smallthinker", lambda p: change_config(p, row__activation="silu")),
    "values of a mixture not clamped": ("dbrx", unclamped_values),
    "gates clamped after their activation": ("maple", lambda p: change_config(p, row__hidden_clamps="after")),
    "layers rotate that are not listed": (
        "granite_swa_listed", lambda p: change_config(p, layer__rope=Rope(16, 500.0, "adjacent"))
    ),
    "weights not normed in Kimi Linear": ("kimi_linear_unread", lambda p: change_config(p, row__renormalize=False)),
    "heads of attention not gated": ("afmoe", without("attn_gate.weight")),
    "gates of heads by a sigmoid": ("laguna", lambda p: change_config(p, row__softplus_gate=False)),
    "one epsilon for all norms": ("muse_glimmer_faint", lambda p: change_config(p, row__post_norm_epsilon=0.0)),
    "embeddings not normed": ("muse_glimmer", lambda p: change_config(p, row__embedding_norm="")),
    "experts' outputs weighted": ("llama4", lambda p: change_config(p, row__weighted_inputs=False)),
    "queries and keys not normed after rotation": ("llama4", lambda p: change_config(p, row__qk_norm="")),
    "the stream goes past branches": ("minimax_01", lambda p: change_config(p, row__normed_skip=False)),
    "what goes past branches not scaled": ("minimax_01", lambda p: change_config(p, skip_scale=1.0)),
    "lightning attention fades alike in all blocks": (
        "minimax_01", lambda p: p.setattr(mixers, "_slopes", lambda heads, *_, of=mixers._slopes: of(heads, 0, 4))
    ),
    "nothing beside attention": ("gemma3n", lambda p: change_config(p, row__laurel=0)),
    "no sparse gates": ("gemma3n", lambda p: change_config(p, layer__sparsity=0.0)),
    "inputs read without their scale": ("gemma3n", changed_vector("altup_correct_scale.weight", torch.ones_like)),
    "keys of another block": (
        "gemma3n_shared", lambda p: change_config(p, layer__source=lambda own: own.source and own.source - 1)
    ),
    "one stack in place of two": ("hrm_text", lambda p: change_config(p, order=(0,) * 6)),
    "no vector before the first pass": (
        "hrm_text", lambda p: p.setattr(blocks.TurnTape, "operator", lambda tape: linop.StreamMix(tape.mixed, tape.d))
    ),
    "norms with another epsilon": ("hrm_text", lambda p: change_config(p, norm_epsilon=0.1)),
    **{
        f"a second mixture {mistake}": ("grovemoe", lambda p, change=change: change_part(p, "adjugates", **change))
        for mistake, change in {
            "left out": {"group": 0}, "added in full": {"scale": 1.0}, "of other experts": {"group": 3}
        }.items()
    },
    "the input not added again": ("talkie", copies),
    "queries without a number for each head": ("talkie", without("attn_q_norm.weight")),
    "logits not scaled": ("talkie", lambda p: change_config(p, logit_scale=1.0)),
    "no norm between passes": ("nanbeige", lambda p: change_config(p, loop_norm=False)),
    "latent queries grow late": ("deepseek2_temperature", lambda p: change_config(p, temperature_length=5)),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_llamacpp_reveals(mistake: str, tiny_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    case, make = MISTAKES[mistake]
    gelu = open_model(tiny_file(case)).config.row.activation == "gelu"  # llama.cpp's half-precision table blurs it
    assert relative_logits(tiny_file, case) < (1e-3 if gelu else 1e-5)
    make(monkeypatch)
    assert relative_logits(tiny_file, case) > (5e-3 if gelu else 1e-3)


def test_a_selection_bias_is_not_rounded(tiny_file: Callable[..., Path]) -> None:
    """What all experts share of it is large in some models: in 16 bits, nothing that sets them apart is left."""
    path, ids = tiny_file("glm4moe", selection_mean=200.0), tiny.prompt("glm4moe", 20)
    wide, narrow = (open_model(path, dtype=dtype).trace(ids).tapes for dtype in ("float64", "bfloat16"))
    first = 1  # the first mixture, whose input is still alike
    used = [
        {(network.expert, position) for network in tapes[first].ffn.networks if network.kind == "_exps"
         for position in network.positions.tolist()}
        for tapes in (wide, narrow)
    ]  # fmt: skip
    assert len(used[0]) == len(used[1]) == 40
    assert len(used[0] & used[1]) > 36


def test_xielu_is_smooth_at_zero() -> None:
    z = torch.tensor([-1e-9, 0.0, 1e-9], dtype=torch.float64, requires_grad=True)
    share = activations.xielu_share(z, 0.9, 0.4, 0.5)
    assert torch.allclose(share.detach(), torch.full_like(share, 0.5), rtol=0, atol=1e-7)
    (slope,) = torch.autograd.grad((z * share).sum(), z)
    assert torch.allclose(slope, torch.full_like(slope, 0.5), rtol=0, atol=1e-7)


# ---- what a trace holds


@pytest.mark.parametrize("case", ["plain", "tied", "q4_0_tied"])
def test_outputs_and_logits(case: str, tiny_file: Callable[..., Path]) -> None:
    ids = tiny.prompt(case, 5)
    m = open_model(tiny_file(case), dtype="float64")
    trace, theirs = m.trace(ids), oracle.forward(oracle.load(tiny_file(case)), ids)
    assert trace.ids == ids
    assert distance(trace.x, theirs["x"]) == 0
    assert distance(trace.outputs, theirs["result_norm"]) < 1e-10
    assert torch.equal(trace.output, trace.outputs[-1])
    assert distance(trace.logits, theirs["logits"][-1]) < 1e-10
    assert distance(trace.logits_at(1), theirs["logits"][1]) < 1e-10
    assert (m.head.matrix.info.name == m.embedding.info.name) == tiny.options(case).tied


@pytest.mark.parametrize("mlp_path", ["up", "gate"])
@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_experts_may_be_stored_with_their_gates_above(kind: str, mlp_path: str, tiny_file: Callable[..., Path]) -> None:
    """No bit changes, and neither does what is read and planned."""
    files = (tiny_file("qwen3moe", type=kind, expert_ff=64, fused_experts=fused) for fused in (False, True))
    (apart, fused), ids = (open_model(file) for file in files), tiny.prompt("qwen3moe", 6)
    assert "blk.0.ffn_gate_up_exps.weight" in fused.gguf.tensors
    J, K = (m.trace(ids, mlp_path=mlp_path).jacobian() for m in (apart, fused))
    assert torch.equal(J.output, K.output)
    for m in (apart, fused):
        m.weights.reads.clear()
    assert torch.equal(J.to_dense(), K.to_dense())
    live = [f"blk.0.ffn_{name}_exps.weight" for name in (mlp_path, "gate_up")]
    assert apart.weights.reads[live[0]] == fused.weights.reads[live[1]] > 0
    assert apart.weights.reads["blk.0.ffn_down_exps.weight"] == fused.weights.reads["blk.0.ffn_down_exps.weight"]
    plans = [m.plan(ids, "svd", rank=1, mlp_path=mlp_path).layers for m in (apart, fused)]
    assert [(a.sweep, a.trace, a.kept) for a in plans[0]] == [(b.sweep, b.trace, b.kept) for b in plans[1]]


def test_mlp_path_does_not_change_the_forward_pass(tiny_file: Callable[..., Path]) -> None:
    m = open_model(tiny_file("biases"), dtype="float64")
    up, gate = (m.trace([1, 2, 3], mlp_path=path) for path in ("up", "gate"))
    assert distance(up.logits, gate.logits) < 1e-14
    with pytest.raises(ValueError, match="mlp_path 'down' is unknown; known: up, gate"):
        inspect.unwrap(model.Model.trace)(m, [1], mlp_path="down")  # without the run-time check of types


def test_a_later_token_changes_nothing_before_it(tiny_file: Callable[..., Path]) -> None:
    m = open_model(tiny_file("gqa"), dtype="float64")
    long, short = m.trace([4, 8, 15, 16, 23]), m.trace([4, 8, 15])
    assert distance(long.outputs[:3], short.outputs) < 1e-14


@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-5), ("bfloat16", 0.1), ("float16", 0.02)])
@pytest.mark.parametrize("case", ["gqa", "qwen35", "bailingmoe3", "mamba2", "lfm2", "deepseek2", "gemma4_small"])
def test_every_dtype_is_near_float64(case: str, dtype: str, limit: float, tiny_files: dict[str, Path]) -> None:
    ids = tiny.prompt(case, 8)
    logits = open_model(tiny_files[case], dtype=dtype).trace(ids).logits
    assert logits.dtype == getattr(torch, dtype)
    assert distance(logits, open_model(tiny_files[case], dtype="float64").trace(ids).logits) < limit


def test_squares_beyond_float16_are_added_up(tiny_file: Callable[..., Path]) -> None:
    """The norms inside of mixers too: of each head's values, and of what a recurrence yields."""
    found = norms.inverse_rms(torch.full((2, 64), -300.0, dtype=torch.float16), open_model(tiny_file("gqa")).config)
    assert found.dtype == torch.float32
    assert torch.allclose(found, torch.tensor(1 / 300))


def test_progress_counts_blocks(tiny_file: Callable[..., Path]) -> None:
    seen: list[tuple[int, int]] = []
    open_model(tiny_file("three_layers")).trace([1], progress=lambda *counts: seen.append(counts))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_text_goes_through_the_files_tokenizer(tiny_file: Callable[..., Path]) -> None:
    m = ggjac.open_model(tiny_file("tokenizer"))
    assert m.trace("the").ids == m.tokenize("the")
    assert m.tokenize("the")[0] == 1


# ---- refusals


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "prompt has no tokens"),
        ([3, 128], "token id 128 is out of range; the vocabulary has ids 0 to 127"),
        ([-1], "token id -1 is out of range"),
        ([2**70], "token id .* is out of range"),
        ([1] * 257, "prompt has 257 tokens, the model's context 256"),
    ],
)
def test_prompts_that_cannot_be_run_are_refused(ids: list[int], message: str, tiny_file: Callable[..., Path]) -> None:
    m = open_model(tiny_file("plain"))
    with pytest.raises(PromptError, match=message):
        m.trace(ids)
    assert not m.weights.reads  # before anything is read


@pytest.mark.parametrize("case", ["deepseek32", "glm_dsa"])
def test_prompts_of_which_attention_would_leave_something_out_are_refused(
    case: str, tiny_file: Callable[..., Path]
) -> None:
    """llama.cpp selects keys, the most at the last positions; up to 64, all of them."""
    path = tiny_file(case)
    m, ids = open_model(path), [i * i % 128 for i in range(90)]
    whole = oracle.forward(oracle.load(path), ids)["logits"]
    selected = llamacpp.run(path, ids)["logits"]
    assert distance(selected[:64], whole[:64]) < 1e-5
    assert distance(selected[64:], whole[64:]) > 1e-2
    assert distance(m.trace(ids[:64]).all_logits(), whole[:64]) < 1e-5
    reads = dict(m.weights.reads)
    with pytest.raises(PromptError, match="has 65 tokens, of which this model's attention selects 64: not supported"):
        m.trace(ids[:65])
    with pytest.raises(PromptError, match="grow to 65 tokens"):
        Continuation(m, 65)
    with pytest.raises(work.PlanError, match="a prompt of 65 tokens cannot run; this model takes from 1 to 64"):
        m.plan(65)
    assert dict(m.weights.reads) == reads


def test_prompts_of_which_groups_would_be_left_out_are_refused(tiny_file: Callable[..., Path]) -> None:
    """llama.cpp selects 3 groups of 4 tokens: with the sixteenth token there are 4."""
    keys = dict(tiny.options("deepseek4").extra) | {"attention.indexer.top_k": 3}
    path = tiny_file("deepseek4", extra=keys)
    m, ids = open_model(path), [i * i % 128 for i in range(16)]
    whole, selected = oracle.forward(oracle.load(path), ids)["logits"], llamacpp.run(path, ids)["logits"]
    assert distance(selected[:15], whole[:15]) < 1e-5
    assert distance(selected[15:], whole[15:]) > 1e-3
    assert distance(m.trace(ids[:15]).all_logits(), whole[:15]) < 1e-5
    with pytest.raises(PromptError, match="has 16 tokens, of which this model's attention selects 15: not supported"):
        m.trace(ids)


def test_a_table_of_experts_that_are_not_there_is_refused(tmp_path: Path, tiny_file: Callable[..., Path]) -> None:
    """Its numbers are read as they are needed: of the prompt's tokens."""
    path = tmp_path / "m.gguf"
    path.write_bytes(tiny_file("deepseek4").read_bytes())
    reader = gguf.GGUFReader(path, "r+")
    table = next(t for t in reader.tensors if t.name == "blk.0.ffn_gate_tid2eid.weight")
    table.data[7, 1] = 6
    table.data[8, 0] = -1
    reader.data.flush()
    m = open_model(path)
    m.trace([5, 6])
    for token, expert in ((7, 6), (8, -1)):
        with pytest.raises(WeightError, match=f"tid2eid.weight names expert {expert} for a token, but there are exper"):
            m.trace([5, token])


def test_prompts_beyond_the_first_chunk_are_refused(tiny_file: Callable[..., Path]) -> None:
    """As in llama.cpp, queries of the last position of 8192 grow, and the next one begins another chunk."""
    m = open_model(tiny_file("llama4", context=9000))
    assert len(m.check_prompt([1] * 8191)) == 8191
    with pytest.raises(PromptError, match=r"has 8192 tokens, of which .* leave some out: not supported beyond 8191"):
        m.trace([1] * 8192)


def test_a_full_context_runs(tiny_file: Callable[..., Path]) -> None:
    assert open_model(tiny_file("one_layer")).trace([1] * 256).logits.isfinite().all()


@pytest.mark.parametrize("position", [3, -4, 100])
def test_positions_outside_the_prompt_are_refused(position: int, tiny_file: Callable[..., Path]) -> None:
    trace = open_model(tiny_file("plain")).trace([1, 2, 3])
    with pytest.raises(PromptError, match=f"position {position} is out of range; the prompt has positions 0 to 2"):
        trace.jacobian(position)


def test_unknown_dtypes_and_absent_devices_are_refused(
    tiny_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="dtype 'int8' is unknown; known: float32, float64, bfloat16, float16"):
        open_model(tiny_file("plain"), dtype="int8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"device cuda was asked for, .* use cpu"):
        open_model(tiny_file("plain"), device="cuda")
    assert open_model(tiny_file("plain"), device="auto").device.type == "cpu"


def test_an_unsupported_model_is_refused_when_it_is_opened(tmp_path: Path) -> None:
    path = tiny.write(tmp_path / "m.gguf", **tiny.resized("plain", extra={"attention.causal": False}))
    with pytest.raises(ConfigError, match="attention to later tokens is not supported"):
        open_model(path)


REFUSE = {
    "an unknown device": (lambda path: open_model(path, device="banana"), "device 'banana' is unknown"),
    "a dtype that is no float": (
        lambda path: open_model(path, dtype=torch.int32),
        "dtype torch.int32 is not supported",
    ),
    "a negative number of threads": (
        lambda path: open_model(path, threads=-1),
        "threads -1 is out of range: it must be at least 1",
    ),
}


@pytest.mark.parametrize("what", REFUSE)
def test_impossible_arguments_are_refused(what: str, tiny_file: Callable[..., Path]) -> None:
    call, message = REFUSE[what]
    with pytest.raises(ValueError, match=message):
        call(tiny_file("plain"))


# ---- numbers that mean nothing are refused


OVERFLOWS = {
    "rotation by infinity": ("rope_factors", "rope_freqs.weight", 0.0, "float32", "overflow"),
    "a stream beyond float16": ("plain", "blk.0.attn_norm.weight", 60000.0, "float16", "overflow"),
    "squares beyond float32": (
        "plain",
        "token_embd.weight",
        1e30,
        "float32",
        "block 0 overflowed float32; try dtype=float64",
    ),
    "logits beyond float16": (
        "plain",
        "output.weight",
        60000.0,
        "float16",
        "logits overflowed float16; try dtype=float32",
    ),
}


@pytest.mark.parametrize("what", OVERFLOWS)
def test_overflow_is_refused(what: str, tmp_path: Path) -> None:
    case, tensor, value, dtype, message = OVERFLOWS[what]
    path = edited(tiny.write(tmp_path / "m.gguf", **tiny.resized(case)), tensor, value)
    with pytest.raises(NumericsError, match=message):
        assert open_model(path, dtype=dtype).trace([1, 2, 3]).logits is None


def test_softmax_takes_scores_in_float32() -> None:
    """Scores beyond float16 (q and k of 40 in each of 128 elements) still give a pattern."""
    q = torch.full((3, 2, 128), 40.0, dtype=torch.float16)
    pattern = blocks.attention_pattern(q, q[:, :1], 1.0)
    assert pattern.dtype == torch.float16
    assert torch.allclose(pattern[0].float(), torch.ones(3, 3).tril() / torch.arange(1, 4)[:, None], rtol=1e-3)


def test_a_trace_without_tapes_has_outputs_only(tiny_file: Callable[..., Path]) -> None:
    m = open_model(tiny_file("plain"))
    light = m.trace([1, 2, 3], tapes=False)
    assert torch.equal(light.logits, m.trace([1, 2, 3]).logits)
    with pytest.raises(ValueError, match="kept no tapes; trace the prompt again"):
        light.jacobian()


def test_what_was_freed_between_tapes_is_given_back(
    tiny_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    m, trimmed = open_model(tiny_file("plain")), list[bool]()
    monkeypatch.setattr(machine, "trim_memory", lambda: trimmed.append(True))
    m.trace([1, 2, 3], tapes=False)
    assert not trimmed  # it comes often, and nothing stays in between
    m.trace([1, 2, 3])
    assert trimmed == [True]


def test_positions_of_logits_are_checked(tiny_file: Callable[..., Path]) -> None:
    trace = open_model(tiny_file("plain")).trace([1, 2, 3])
    assert torch.equal(trace.logits_at(-1), trace.logits_at(2))
    with pytest.raises(PromptError, match="position 7 is out of range"):
        trace.logits_at(7)


def test_logits_are_kept_for_the_last_position_asked_for(tiny_file: Callable[..., Path]) -> None:
    """Those of all positions would outweigh the trace."""
    trace = open_model(tiny_file("plain")).trace([1, 2, 3])
    kept = [weakref.ref(trace.logits_at(i)) for i in range(3)]
    assert [logits() is not None for logits in kept] == [False, False, True]
    assert trace.logits is kept[-1](), "no second pass over the head"


def test_threads_may_share_a_model(tiny_file: Callable[..., Path]) -> None:
    J = open_model(tiny_file("q8_0"), dtype="float64").trace([1, 2, 3]).jacobian()
    Y = torch.randn(20, 2, *J.out_shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    alone = [J.rmatmat(y) for y in Y]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(J.rmatmat, Y))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


# ---- plans


@pytest.mark.parametrize("case", ["gqa", "mixtral"])
def test_weights_that_are_kept_change_no_bit_and_take_what_was_planned(
    case: str, tiny_file: Callable[..., Path]
) -> None:
    path, ids = tiny_file(case, layers=4, type="Q8_0"), tiny.prompt(case, 6)
    ample = open_model(path).plan(ids, rank=2, ram_budget="1GiB")
    needed, two = ample.ram_needed, sum(layer.dense_bytes for layer in ample.layers[2:])
    peaks, results = [], []
    for budget, kept in ((needed, 0), (needed + two, 2), ("1GiB", 4)):
        model = open_model(path)
        plan = model.plan(ids, rank=2, ram_budget=budget)
        assert plan.places == ["file"] * (4 - kept) + ["dense"] * kept
        model.fit(plan)
        peaks.append(held(lambda model=model: results.append(model.trace(ids).jacobian().svd(2))))
        # Routers choose fewer experts than the plan counts with.
        assert 0.5 * plan.resident("dense") <= peaks[-1] - peaks[0] <= plan.resident("dense")
        assert (peaks[-1] - peaks[0] == plan.resident("dense")) or case == "mixtral"
        name = "blk.3.attn_v.weight"
        reads = model.weights.reads[name] / model.gguf.tensors[name].rows
        # The trace, and once, or in the product that gives the signs and in every sweep.
        assert reads == (2 if kept else 2 + results[-1].sweeps)
    for found in results[1:]:
        assert all(torch.equal(getattr(found, name), getattr(results[0], name)) for name in ("U", "S", "Vh"))
    assert held(lambda: open_model(path).trace(ids).jacobian().svd(2)) == peaks[0]


def test_a_plan_that_cannot_work_is_refused(tiny_file: Callable[..., Path]) -> None:
    model, ids = open_model(tiny_file("gqa")), tiny.prompt("gqa", 6)
    with pytest.raises(planner.NoFitError, match=r"svd needs .* but --ram-budget allows 1\.0 MiB"):
        model.fit(model.plan(ids, ram_budget="1MiB"))
    assert model.weights.places == []
    with pytest.raises(planner.PlanError, match="'sing' is not planned"):
        model.plan(ids, "sing")
    with pytest.raises(PromptError, match="out of range"):
        model.plan([1, 10**6])


def test_dense_rows_come_in_chunks_that_fit(tiny_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "CHUNK_BYTES", 1 << 22)
    model, ids = open_model(tiny_file("gqa")), [5] * 60
    least = model.plan(ids, "jacobian", ram_budget=1).ram_needed
    rows = []
    for budget in ("1GiB", least):
        model.fit(model.plan(ids, "jacobian", ram_budget=budget))
        rows.append(model.trace(ids).jacobian().rows_at_once())
    assert rows[1] < rows[0]


def test_weights_stay_ready_between_sweeps_unless_a_plan_rules(
    tiny_files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Model, "keeps_ready", True)
    model = open_model(tiny_files["gqa"])
    J = model.trace(IDS).jacobian()
    first = J.svd(2)
    read = model.weights.reads["blk.0.ffn_down.weight"]
    assert torch.equal(model.trace(IDS).jacobian().svd(2).S, first.S)
    again = model.weights.reads["blk.0.ffn_down.weight"]
    assert again - read <= read / 2, "only the trace reads them again"
    monkeypatch.setattr(Model, "keeps_ready", False)
    streaming = open_model(tiny_files["gqa"])
    assert torch.equal(streaming.trace(IDS).jacobian().svd(2).S, first.S)
    assert streaming.weights.reads["blk.0.ffn_down.weight"] > 2 * read
    monkeypatch.setattr(Model, "keeps_ready", True)
    ruled = open_model(tiny_files["gqa"])
    ruled.fit(ruled.plan(IDS, ram_budget=ruled.plan(IDS).ram_needed))
    assert torch.equal(ruled.trace(IDS).jacobian().svd(2).S, first.S)
    assert ruled.weights.reads["blk.0.ffn_down.weight"] > 2 * read
