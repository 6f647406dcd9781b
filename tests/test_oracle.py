"""The oracle is itself judged: values by llama.cpp, detached Jacobians by the paper's own code and by hand.

The negative controls show that the comparison with llama.cpp would notice each classic mistake. A mistake is made by
editing the loaded weights or metadata so that the correct code then computes what the mistaken code would.
"""

import math
from collections.abc import Callable
from pathlib import Path

import gguf
import llamacpp
import numpy as np
import oracle
import pytest
import tiny
import torch
from oracle import Oracle
from safetensors.torch import load_file
from torch import Tensor

IDS_OF_STORIES = [1, 403, 407, 261, 378, 432, 405, 285, 432, 375, 397]


def relative(a: Tensor, b: Tensor) -> float:
    """Return the relative L2 distance of a from b."""
    return float((a.double() - b.double()).norm() / b.double().norm())


def prompt_length(case: str) -> int:
    """Return a length beyond the original context where that is short, since YaRN must hold there too."""
    original = tiny.options(case).scaling.get("original_context_length", 0)
    return original + 16 if 0 < original <= 64 else 12


def parity_file(tiny_file: Callable[..., Path], case: str) -> Path:
    """Return what llama.cpp should run: the file itself, or its exact F32 copy if the file is quantized."""
    return tiny_file(case, ftype=None if tiny.options(case).type == "F32" else "F32")


# ---- values, by llama.cpp


@pytest.mark.parametrize("case", tiny.CASES)
def test_every_state_agrees_with_llamacpp(case: str, tiny_file: Callable[..., Path]) -> None:
    ids = tiny.prompt(case, prompt_length(case))
    theirs = llamacpp.run(parity_file(tiny_file, case), ids)
    ours = oracle.forward(oracle.load(tiny_file(case)), ids)
    assert theirs.keys() == ours.keys() - {"x"}
    assert {
        name: relative(theirs[name], ours[name]) for name in theirs if relative(theirs[name], ours[name]) > 3e-6
    } == {}


def test_yarn_agrees_at_long_positions(tiny_file: Callable[..., Path]) -> None:
    """llama.cpp's angles are float32 products; at position 600 they are good to about 1e-5 only."""
    path, ids = tiny_file("yarn_ramp"), np.random.default_rng(0).integers(0, 128, 600).tolist()
    assert relative(llamacpp.run(path, ids)["logits"], oracle.forward(oracle.load(path), ids)["logits"]) < 1e-5


@pytest.mark.parametrize("kind", ["f32", "q8_0", "q4_0"])
def test_real_model_agrees_with_llamacpp(kind: str, shared: Path, tmp_path: Path) -> None:
    path = shared / "models" / f"stories260K-{kind}.gguf"
    theirs = llamacpp.run(tiny.quantize(path, tmp_path / "f32.gguf", "F32"), IDS_OF_STORIES)
    ours = oracle.forward(oracle.load(path), IDS_OF_STORIES)
    assert max(relative(theirs[name], ours[name]) for name in theirs) < 1e-5


# ---- negative controls


def edit(model: Oracle, part: str, change: Callable[[Tensor], Tensor]) -> Oracle:
    """Return a model with `change` applied to every tensor whose name contains `part`."""
    assert any(part in name for name in model.weights), part
    return model._replace(weights={name: change(w) if part in name else w for name, w in model.weights.items()})


def meta(model: Oracle, **changes: object) -> Oracle:
    """Return a model with metadata changed; `__` stands for a dot."""
    return model._replace(metadata=model.metadata | {key.replace("__", "."): value for key, value in changes.items()})


def heads_apart(model: Oracle, w: Tensor) -> Tensor:
    return w.unflatten(0, (-1, model.metadata["attention.key_length"]))


def rotate_halves(model: Oracle) -> Oracle:
    """Pair dimension i with i + hd / 2, as NEOX does."""

    def reorder(w: Tensor) -> Tensor:
        w = heads_apart(model, w)
        return w.unflatten(1, (2, -1)).transpose(1, 2).flatten(0, 2)

    return edit(edit(model, "attn_q.", reorder), "attn_k.", reorder)


def turn_backwards(model: Oracle) -> Oracle:
    def reorder(w: Tensor) -> Tensor:
        return heads_apart(model, w).unflatten(1, (-1, 2)).flip(2).flatten(0, 2)

    return edit(edit(model, "attn_q.", reorder), "attn_k.", reorder)


def interleave_heads(model: Oracle) -> Oracle:
    """Let query head h use kv head h % HK in place of h // (H / HK)."""
    heads, kv = model.metadata["attention.head_count"], model.metadata["attention.head_count_kv"]
    order = torch.arange(heads).reshape(kv, heads // kv).T.flatten().argsort()

    def columns(w: Tensor) -> Tensor:
        return heads_apart(model, w.T)[order].flatten(0, 1).T

    model = edit(model, "attn_q.", lambda w: heads_apart(model, w)[order].flatten(0, 1))
    return edit(model, "attn_output.weight", columns)


def swap(model: Oracle, a: str, b: str) -> Oracle:
    def other(name: str) -> str:
        return name.replace(a, b) if a in name else name.replace(b, a)

    return model._replace(weights={other(name): w for name, w in model.weights.items()})


def scale_q(model: Oracle, factor: float) -> Oracle:
    return edit(model, "attn_q.", lambda w: w * factor)


def drop(part: str) -> Callable[[Oracle], Oracle]:
    return lambda model: edit(model, part, torch.zeros_like)


ORIGINAL = {"rope__scaling__original_context_length": 2048}

# mistake -> (the row that must reveal it, the edit that makes it)
MISTAKES: dict[str, tuple[str, Callable[[Oracle], Oracle]]] = {
    "rope pairs as NEOX": ("plain", rotate_halves),
    "rope backwards": ("plain", turn_backwards),
    "rope base ignored": ("rope_base", lambda m: meta(m, rope__freq_base=10000.0)),
    "rope factors ignored": ("rope_factors", lambda m: edit(m, "rope_freqs", torch.ones_like)),
    "rope factors multiplied": ("rope_factors", lambda m: edit(m, "rope_freqs", torch.reciprocal)),
    "linear scaling ignored": ("linear", lambda m: meta(m, rope__scaling__factor=1.0)),
    "linear scaling inverted": ("linear", lambda m: meta(m, rope__scaling__factor=0.25)),
    "untyped scaling ignored": ("linear_untyped", lambda m: meta(m, rope__scaling__factor=1.0)),
    "old key ignored": ("linear_old_key", lambda m: meta(m, rope__scale_linear=1.0)),
    "scaling despite none": ("scaling_none", lambda m: meta(m, rope__scaling__type="linear")),
    "attn_factor ignored": ("attn_factor", lambda m: meta(m, rope__scaling__attn_factor=1.0)),
    "YaRN magnitude missing": (
        "yarn",
        lambda m: meta(m, rope__scaling__attn_factor=1 / (1 + 0.1 * math.log(4))),
    ),
    "YaRN magnitude on q only": ("yarn", lambda m: scale_q(m, 1 / (1 + 0.1 * math.log(4)))),
    "YaRN ramp missing": (
        "yarn",
        lambda m: meta(m, rope__scaling__type="linear", rope__scaling__attn_factor=1 + 0.1 * math.log(4)),
    ),
    "YaRN original context ignored": ("yarn_ramp", lambda m: meta(m, **ORIGINAL)),
    "rope factors ignored with YaRN": ("yarn_rope_factors", lambda m: edit(m, "rope_freqs", torch.ones_like)),
    "kv heads interleaved": ("gqa", interleave_heads),
    "attention scaled by d / heads": ("head_dim_wide", lambda m: scale_q(m, math.sqrt(32 / 16))),
    "attention uniform": ("plain", lambda m: scale_q(m, 0.0)),
    "gate and up swapped": ("plain", lambda m: swap(m, "ffn_gate", "ffn_up")),
    "k and v swapped": ("plain", lambda m: swap(m, "attn_k", "attn_v")),
    "attention norm weight ignored": ("plain", lambda m: edit(m, "attn_norm", torch.ones_like)),
    "ffn norm weight ignored": ("plain", lambda m: edit(m, "ffn_norm", torch.ones_like)),
    "final norm weight ignored": ("plain", lambda m: edit(m, "output_norm", torch.ones_like)),
    "eps wrong": ("eps", lambda m: meta(m, attention__layer_norm_rms_epsilon=1e-5)),
    **{f"{name} bias dropped": ("biases", drop(f"{name}.bias")) for name in tiny.ALL_BIASES},
    "fused bias dropped": ("fused_biases", drop("attn_qkv.bias")),
    "split biases of a fused matrix dropped": ("fused_split_biases", drop("attn_v.bias")),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_llamacpp_reveals(mistake: str, tiny_file: Callable[..., Path]) -> None:
    case, make = MISTAKES[mistake]
    path, ids = tiny_file(case), tiny.prompt(case, prompt_length(case))
    wrong = oracle.forward(make(oracle.load(path)), ids)
    assert relative(wrong["logits"], llamacpp.run(path, ids)["logits"]) > 1e-3


# ---- derivatives, by the paper's own code and by hand


def as_llama(model: Oracle) -> Oracle:
    """Rewrite a phi3 model (NEOX pairs, fused gate and up, no long factors) in `llama` terms."""
    metadata, weights = dict(model.metadata), {}
    heads, hd = metadata["attention.head_count"], metadata["rope.dimension_count"]
    kv = metadata["attention.head_count_kv"]
    for name, w in model.weights.items():
        if name.endswith("ffn_up.weight"):
            weights[name.replace("ffn_up", "ffn_gate")], weights[name] = w.chunk(2)
        elif name.endswith("attn_qkv.weight"):
            *rotated, v = w.split([heads * hd, kv * hd, kv * hd])
            rotated = [part.reshape(-1, 2, hd // 2, w.shape[1]).transpose(1, 2).flatten(0, 2) for part in rotated]
            weights[name] = torch.cat([*rotated, v])
        else:
            weights[name] = w
    assert not any("rope_factors" in name for name in weights)
    return Oracle("llama", metadata | {"attention.key_length": hd}, weights)


# The paper's own code: Phi keeps the path through the gate alive, the others the path through `up`.
REFERENCES = {"llama3": ("up", lambda m: m), "mistral": ("up", lambda m: m), "phi3": ("gate", as_llama)}


@pytest.mark.parametrize("name", REFERENCES)
def test_jacobian_agrees_with_the_papers_code(name: str, shared: Path) -> None:
    path, (mlp_path, convert) = shared / "reference" / f"{name}-q4_k_m.gguf", REFERENCES[name]
    theirs = load_file(path.with_name(f"{name}.reference.safetensors"))
    model = convert(oracle.load(path))
    ours = oracle.jacobian(model, theirs["ids"], mlp_path=mlp_path)
    assert relative(ours.x, theirs["x"]) < 1e-7
    assert relative(ours.y, theirs["y"]) < 2e-6
    assert relative(oracle.forward(model, theirs["ids"])["logits"], theirs["logits"]) < 2e-6
    assert relative(ours.J, theirs["jacobian"]) < 2e-6
    s = torch.linalg.svdvals(ours.J.flatten(1))
    assert relative(s, theirs["s"]) < 2e-6
    # The convention matters: the other live path has another Jacobian, though the same output.
    other = oracle.jacobian(model, theirs["ids"], mlp_path={"up": "gate", "gate": "up"}[mlp_path])
    assert relative(other.J, theirs["jacobian"]) > 0.05
    assert relative(other.y, theirs["y"]) < 2e-6


def test_jacobian_of_one_layer_by_hand(tiny_file: Callable[..., Path]) -> None:
    """Assemble (norm) (I + ffn) (I + attn) from explicit matrices; the frozen numbers come from the states."""
    model, ids = oracle.load(tiny_file("one_layer")), tiny.prompt("one_layer", 5)
    w = {name.removeprefix("blk.0.").removesuffix(".weight"): value for name, value in model.weights.items()}
    n, d, heads, hd = 5, 64, 4, 16
    states = oracle.forward(model, ids)

    def norm(state: Tensor, gamma: Tensor) -> Tensor:
        """Return the frozen norm as diagonals [n, d]."""
        return gamma * (state.square().mean(-1, keepdim=True) + 1e-5).rsqrt()

    x, middle = states["x"], states["x"] + states["attn_out-0"]
    before, between, after = (
        norm(x, w["attn_norm"]),
        norm(middle, w["ffn_norm"]),
        norm(states["l_out-0"], w["output_norm"]),
    )
    # The rotation of adjacent pairs, as complex numbers.
    turn = torch.polar(
        torch.ones(n, 8).double(), torch.outer(torch.arange(n), 10000.0 ** -(torch.arange(8) / 8).double())
    )
    q, k = (
        torch.view_as_real(torch.view_as_complex(((before * x) @ w[name].T).reshape(n, heads, 8, 2)) * turn[:, None])
        for name in ("attn_q", "attn_k")
    )
    scores = torch.einsum("ihpc,jhpc->hij", q, k) / 4
    p = scores.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf).softmax(-1)
    o, v = w["attn_output"].reshape(d, heads, hd), w["attn_v"].reshape(heads, hd, d)
    eye = torch.eye(n * d, dtype=torch.float64).reshape(n, d, n, d)
    attn = eye + torch.einsum("hij,ahc,hcb,jb->iajb", p, o, v, before)
    gate = (between * middle) @ w["ffn_gate"].T
    ffn = torch.eye(d).double() + w["ffn_down"] * (gate * gate.sigmoid())[-1] @ w["ffn_up"] * between[-1]
    J = torch.einsum("a,ab,bjc->ajc", after[-1], ffn, attn[-1])
    ours = oracle.jacobian(model, ids, mlp_path="up")
    assert relative(J, ours.J) < 1e-6  # eps is float32 in the file
    assert relative(ours.y, states["result_norm"][-1]) < 1e-14


@pytest.mark.parametrize("mlp_path", ["up", "gate"])
@pytest.mark.parametrize("case", tiny.CASES)
def test_offset_is_what_the_live_biases_add(case: str, mlp_path: str, tiny_file: Callable[..., Path]) -> None:
    """With the coefficients frozen, y is linear in x and the biases on its path taken together."""
    model, ids = oracle.load(tiny_file(case)), tiny.prompt(case, 6)
    J = oracle.jacobian(model, ids, mlp_path=mlp_path)
    live = {name: w.clone().requires_grad_() for name, w in model.weights.items() if name.endswith(".bias")}
    expected = torch.zeros_like(J.y)
    y = oracle.forward(model._replace(weights=model.weights | live), ids, freeze=mlp_path)["result_norm"][-1]
    if y.requires_grad:  # else no bias is on the live path
        eye = torch.eye(len(y), dtype=torch.float64)
        grads = torch.autograd.grad(y, list(live.values()), eye, is_grads_batched=True, allow_unused=True)
        expected = sum(g @ b.detach() for g, b in zip(grads, live.values(), strict=True) if g is not None)
    assert (J.offset - expected).norm() < 1e-12 * J.y.norm()
    # Biases of q and k are frozen with the attention; any other must show.
    assert (expected.norm() > 0.01 * J.y.norm()) == any(
        name.endswith((f"{part}.bias", "attn_qkv.bias"))
        for name in live
        for part in ("attn_v", "attn_output", "ffn_down", f"ffn_{mlp_path}")
    )


def test_ordinary_jacobian_does_not_reconstruct(tiny_file: Callable[..., Path]) -> None:
    ordinary = oracle.jacobian(tiny_file("plain"), tiny.prompt("plain", 6), mlp_path=None)
    assert ordinary.offset.norm() > 0.1 * ordinary.y.norm()


def test_an_earlier_position_is_a_shorter_prompt(tiny_file: Callable[..., Path]) -> None:
    path, ids = tiny_file("gqa"), tiny.prompt("gqa", 6)
    early, short = (
        oracle.jacobian(path, *args, mlp_path="up", position=p) for args, p in (((ids,), 2), ((ids[:3],), -1))
    )
    assert relative(early.J[:, :3], short.J) < 1e-13
    assert not early.J[:, 3:].any()
    assert relative(early.offset + torch.einsum("end,nd->e", early.J, early.x), early.y) < 1e-13


# ---- the files themselves


# type -> the largest relative error of storing a standard normal that is still a sign of sound bytes
KINDS = {
    "F16": 1e-3, "BF16": 5e-3, "Q4_0": 0.1, "Q4_1": 0.1, "Q5_0": 0.06, "Q5_1": 0.06, "Q8_0": 0.01, "Q2_K": 0.35,
    "Q3_K": 0.2, "Q4_K": 0.1, "Q5_K": 0.06, "Q6_K": 0.03, "IQ4_NL": 0.1, "IQ4_XS": 0.1, "IQ3_S": 0.2, "TQ1_0": 0.9,
    "TQ2_0": 0.9, "MXFP4": 0.15, "NVFP4": 0.15,
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_tiny_files_hold_the_type_asked_for(kind: str, tmp_path: Path) -> None:
    row = {"d": 256, "ff": 32, "layers": 1, "vocab": 8, "heads": 1, "head_dim": 16}
    path = tiny.write(tmp_path / "kind.gguf", type=kind, **row)
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}
    assert types["blk.0.attn_norm.weight"] == "F32"
    assert types["blk.0.ffn_up.weight"] == kind
    assert types["blk.0.attn_output.weight"] == (kind if kind in ("F16", "BF16") else "F32")  # rows of 16: no block
    up = "blk.0.ffn_up.weight"
    plain = oracle.load(tiny.write(tmp_path / "plain.gguf", **row)).weights[up]
    assert 0 < relative(oracle.load(path).weights[up], plain) < KINDS[kind]


def test_files_that_differ_in_one_option_share_the_other_weights(tiny_file: Callable[..., Path]) -> None:
    plain, biased = (oracle.load(tiny_file("plain", **row)) for row in ({}, {"biases": tiny.ALL_BIASES}))
    assert plain.weights.keys() < biased.weights.keys()
    assert all(torch.equal(w, biased.weights[name]) for name, w in plain.weights.items())
    other = oracle.load(tiny_file("plain", seed=1))
    assert not any(torch.equal(w, other.weights[name]) for name, w in plain.weights.items())
