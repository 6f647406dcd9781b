"""Generation with cached keys and values: against the oracle without a cache, and against llama.cpp's own choice."""

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import oracle
import pytest
import tiny
import torch
from helpers import distance, edited

from ggjac.blocks import NumericsError
from ggjac.generation import Continuation, end_tokens, greedy
from ggjac.gguf.hub import demo_path
from ggjac.model import PromptError, open_model
from ggjac.parity import run_llama_cpp

TinyFile = Callable[..., Path]

# Every way in which a position enters attention (rope kinds, windows, sinks, temperature, learned), the branches around
# it (experts, shared experts, parallel blocks, post-norms, biases), and mixers whose past is a state and a few rows.
CASES = [
    "gqa", "mqa", "biases", "fused_qkv", "rope_factors", "linear", "yarn", "attn_factor", "qwen2", "qwen3", "qwen3moe",
    "gemma", "gemma2", "gemma3", "phi2", "phi3", "phi3_long", "phi3_short", "phi3_partial", "olmo2", "olmo3",
    "mistral3_temperature", "granite", "granite_nope", "smollm3", "glm4", "cohere2", "gpt2", "falcon_7b", "falcon_40b",
    "starcoder2", "mixtral", "gpt_oss", "qwen2moe", "olmoe", "granitemoe_shared", "llama_longrope_long", "qwen3vl",
    "hunyuan_yarn", "gptneox", "stablelm_12b", "nemotron", "command_r", "olmo_clamped", "glm4moe", "bailingmoe2_groups",
    "exaone_moe_period", "qwen35", "qwen35_sizes", "qwen35_predictor", "qwen35moe_fused", "qwen3next_old", "lfm2",
    "lfm2_window", "lfm2_taps", "lfm2moe", "mamba2", "mamba2_groups", "granitehybrid", "falcon_h1_normed", "nemotron_h",
    "nemotron_h_moe_latent", "mamba_falcon", "mamba_sizes", "jamba", "plamo2", "rwkv6qwen2",
    "arwkv7", "arwkv7_heads", "rwkv6", "rwkv7",
    "gemma4", "gemma4_full_first", "gemma4_experts", "gemma4_small",
    "gemma4_shared", "gemma4_shared_keys", "laguna", "muse_glimmer", "llama4_several", "minimax_01", "nanbeige",
    "granite_swa_listed", "cohere2moe", "mimo2", "smallthinker", "arctic", "deci_linear", "deci_idle", "bitnet",
    "deepseek2_yarn", "deepseek2_temperature", "deepseek2_unsplit", "minicpm3_long", "glm_dsa", "minimax_m3",
    "dots3note", "hy_v4", "deepseek4", "deepseek4_yarn", "glm5_next", "hrm_text", "kimi_k3", "grovemoe", "talkie",
    "gemma3n", "gemma3n_shared",
    "kimi_linear", "kimi_linear_sizes", "bailingmoe3_predictor", "bailingmoe3_clamped",
]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_pieces_give_what_the_whole_gives(case: str, tiny_file: TinyFile) -> None:
    """A prompt in pieces, most of them single tokens, against the oracle that computes it at once."""
    path, ids, capacity = tiny_file(case), tiny.prompt(case, 12), 20
    truth = oracle.forward(oracle.load(path), ids, context=capacity)
    model = open_model(path, dtype="float64")
    text = Continuation(model, capacity)
    edges = [0, 5, 6, 7, 10, 11]
    outputs = torch.cat([text.extend(ids[a:b]) for a, b in pairwise(edges)])
    assert distance(outputs, truth["result_norm"][:11]) < 1e-11
    assert distance(text.logits(ids[11:]), truth["logits"][-1]) < 1e-11


@pytest.mark.parametrize("case", ["gqa", "gemma3", "gpt_oss"])
def test_at_once_the_bits_are_the_traces(case: str, tiny_file: TinyFile) -> None:
    model, ids = open_model(tiny_file(case)), tiny.prompt(case, 12)
    assert torch.equal(Continuation(model, 12).extend(ids), model.trace(ids, tapes=False).outputs)


def test_a_token_costs_one_position(tiny_file: TinyFile) -> None:
    model, ids = open_model(tiny_file("gqa")), tiny.prompt("gqa", 12)
    seen: list[tuple[int, int]] = []

    def watch(layer: int, h: torch.Tensor) -> torch.Tensor:
        seen.append((layer, len(h)))
        return h

    text = Continuation(model, 20, change=watch)
    text.extend(ids)
    model.weights.reads.clear()
    text.extend([7])
    layers = range(model.config.block_count + 1)
    assert seen == [(i, 12) for i in layers] + [(i, 1) for i in layers]
    assert model.weights.reads["blk.0.attn_v.weight"] == model.weights["blk.0.attn_v.weight"].shape[0]  # each row once


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_change_goes_on_from_where_it_is_made(layer: int, tiny_file: TinyFile) -> None:
    path, ids = tiny_file("gqa"), tiny.prompt("gqa", 6)
    known = oracle.load(path)
    push = torch.linspace(-1, 1, 64, dtype=torch.float64)
    h = oracle.embed(known, ids)
    for i in range(2):
        h = oracle.block(known, i, h + push * (i == layer))[f"l_out-{i}"]
    truth = oracle.norm(known, "output_norm", h + push * (layer == 2), frozen=False)
    model = open_model(path, dtype="float64")
    text = Continuation(model, 6, change=lambda at, h: h + push * (at == layer))
    assert distance(torch.cat([text.extend(ids[:4]), text.extend(ids[4:5]), text.extend(ids[5:])]), truth) < 1e-12


@pytest.mark.parametrize("case", ["gqa", "gemma3", "gpt_oss", "qwen3moe", "phi3", "qwen35", "lfm2"])
def test_greedy_tokens_are_llamacpps(case: str, tiny_file: TinyFile) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    path, ids = tiny_file(case, ftype="F32"), tiny.prompt(case, 8)
    model = open_model(path)
    found, first = greedy(Continuation(model, 256), ids, 16)  # 256: what llama.cpp's context is rounded up to
    theirs = run_llama_cpp(path, ids + found, layers=False, threads=1).logits
    assert theirs[len(ids) - 1 : -1].argmax(1).tolist() == found
    assert distance(first, theirs[len(ids) - 1]) < (1e-3 if model.config.row.activation == "gelu" else 1e-5)


def test_greedy_tokens_of_a_trained_model_are_llamacpps(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    path = tiny.quantize(demo_path(), tmp_path / "f32.gguf", "F32")
    model = open_model(path)
    ids = model.tokenize("The bridge out of Marin is the")
    found, _ = greedy(Continuation(model, len(ids) + 24), ids, 24)
    assert model.tokenizer.piece(found[0]) == b" Golden"
    theirs = run_llama_cpp(path, ids + found, layers=False, threads=1).logits
    assert theirs[len(ids) - 1 : -1].argmax(1).tolist() == found


def test_the_models_own_end_is_the_end() -> None:
    model = open_model()
    ids = model.tokenize("The bridge out of Marin is the Golden Gate Bridge")
    (end,) = end_tokens(model)
    assert model.tokenizer.piece(end) == b"<|end_of_text|>"
    told: list[tuple[int, int]] = []

    def forced(layer: int, h: torch.Tensor) -> torch.Tensor:
        """Write the end token's own row of the head over the second new position's last stream."""
        if layer == model.config.block_count and len(h) == 1:
            return next(model.head.matrix.rows(end, end + 1).tiles())[2].clone() * 100
        return h

    def record(done: int, total: int) -> None:
        told.append((done, total))

    found, _ = greedy(Continuation(model, 40, change=forced), ids, 20, progress=record)
    assert len(found) == 2
    assert found[1] == end
    assert told == [(1, 20), (20, 20)]


def test_what_does_not_fit_is_refused(tiny_file: TinyFile) -> None:
    model = open_model(tiny_file("gqa"))
    context = model.config.context_length
    with pytest.raises(PromptError, match=f"grow to {context + 1} tokens, this model takes at most {context}"):
        Continuation(model, context + 1)
    text = Continuation(model, 4)
    text.extend([1, 2, 3])
    with pytest.raises(PromptError, match="room for 4 tokens, not for 5"):
        text.extend([4, 5])
    with pytest.raises(PromptError, match="no tokens"):
        text.extend([])
    assert text.extend([4]).isfinite().all()
    with pytest.raises(NumericsError, match="block 1 overflowed float"):
        Continuation(model, 4, change=lambda layer, h: h * math.inf if layer == 2 else h).extend([1])


def test_logits_that_overflow_are_refused(tmp_path: Path) -> None:
    """As a trace's are: what is computed from them would be without meaning."""
    path = edited(tiny.write(tmp_path / "m.gguf"), "output.weight", 60000.0)
    with pytest.raises(NumericsError, match="logits overflow"):
        Continuation(open_model(path, dtype="float16"), 4).logits([1, 2, 3])
